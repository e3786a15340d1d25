"""``transfer align``: the pipeline's stage (``run``), and alignments as artefacts: fit, score, show, export."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from transfer.core.console import say, set_quiet, show
from transfer.core.errors import TransferError
from transfer.verbs.options import Json, Quiet, RunByDefault, TextColumn

if TYPE_CHECKING:
    from aligners.tokens import Pooling

HELP = """\
Match features between models.

\b
  transfer align demo                            all pairs of an experiment (short for: align run demo)
  transfer align fit zoo:llama zoo:qwen --out a  one pair: fit, score on held-out documents, save
  transfer align score a --corpus new.jsonl      the same matches on other texts
  transfer align show a
  transfer align export a --out a.graphml
  transfer align families a b c                  artefacts of all pairs of three models or more, taken together
  transfer align ladder                          tests of an aligner where the answer is known"""


align = typer.Typer(cls=RunByDefault, help=HELP, no_args_is_help=True, rich_markup_mode=None)

METHODS_HELP = (
    "fused, activation, map, unembedding, same, sinkhorn, relative, gromov, crosscoder; controls: random, gromov-cold."
)
Artefact = Annotated[Path, typer.Argument(help="Folder that `transfer align fit` wrote.")]
CorpusRef = Annotated[
    str | None, typer.Option("--corpus", help="Texts: JSONL, CSV, parquet, hub:<dataset>@<rev>, or bundled.")
]
Splits = Annotated[list[str], typer.Option("--split", help="Only this split of the texts; repeatable.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the split into documents to fit and to score on, and of the null.")]
Draws = Annotated[int, typer.Option("--n-null", min=1, help="Draws of the shuffled-corpus null.")]
SourceSae = Annotated[str | None, typer.Option(help="SAE of the source; default: <source>/sae, or the store's own.")]
TargetSae = Annotated[str | None, typer.Option(help="SAE of the target; default: <target>/sae, or the store's own.")]
Level = Annotated[float, typer.Option("--q-max", min=0, max=1, help="A match counts up to this q-value.")]
Top = Annotated[int, typer.Option(min=0, help="Best matches to list.")]
Pool = Annotated[
    str,
    typer.Option(help="What a row of paired codes is: last (token), or max, mean, sum since the row before."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


def _answer(alignment: Any, out: Path, as_json: bool, q_max: float, top: int) -> None:
    from transfer.alignment.describe import describe, text
    from transfer.core.files import plain

    found = {"artefact": str(out), **describe(alignment, q_max=q_max, top=top)}
    show(plain(found) if as_json else text(found))


@align.command()
def fit(
    source: Annotated[str, typer.Argument(help="Folder of an activation store, or zoo:…, path:…, hub:… model.")],
    target: Annotated[str, typer.Argument(help="The same for the other side.")],
    out: Annotated[Path, typer.Option(help="Folder of the artefact.")],
    method: Annotated[str, typer.Option(help=METHODS_HELP)] = "fused",
    settings: Annotated[
        list[str], typer.Option("--set", help="Parameter of the method, such as min_support=5; repeatable.")
    ] = [],  # noqa: B006 - typer reads the default, nothing changes it
    corpus: CorpusRef = None,
    split: Splits = [],  # noqa: B006
    text_column: TextColumn = None,
    source_sae: SourceSae = None,
    target_sae: TargetSae = None,
    source_layer: Annotated[int | None, typer.Option(help="Layer of the source, where its SAE does not say.")] = None,
    target_layer: Annotated[int | None, typer.Option(help="Layer of the target, where its SAE does not say.")] = None,
    fraction: Annotated[float, typer.Option("--fit-fraction", help="Share of the documents to fit on.")] = 0.6,
    pool: Pool = "last",
    n_null: Draws = 20,
    seed: Seed = 0,
    q_max: Level = 0.05,
    top: Top = 10,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit one pair on a share of the documents, score the matches on the rest, and save both.

    Models are harvested first, on --corpus (default: the bundled requests); stores are used as they are. The same
    command again shows the finished artefact.
    """
    set_quiet(quiet or as_json)
    from transfer.alignment import artefact
    from transfer.alignment.methods import make_aligner
    from transfer.alignment.sides import SideRef, open_stores, open_views, read_corpus
    from transfer.core.files import plain
    from transfer.core.rundir import runs_folder

    aligner = make_aligner(method, settings, seed)
    how = artefact.Settings(fraction, n_null, seed, cast("Pooling", pool))
    refs = (SideRef("source", source, source_sae, source_layer), SideRef("target", target, target_sae, target_layer))
    artefact.writable(out)
    if corpus is None and any(r.is_model for r in refs):
        corpus = "bundled"
    texts = read_corpus(corpus, text_column=text_column, splits=split)
    request = plain(
        {
            "source": [source, source_sae, source_layer],
            "target": [target, target_sae, target_layer],
            "corpus": texts.hash if texts else None,
            "method": method,
            "params": aligner.get_params(),
            "fraction": fraction,
            "pool": pool,
            "n_null": n_null,
            "seed": seed,
        }
    )
    before = None if force else artefact.existing(out, request)
    needs = aligner.needs()
    stores = open_stores(refs, texts, runs_folder(), residual="residuals" in aligner.takes())
    if before is not None and not artefact.same_inputs(before, stores):
        raise TransferError(
            f"{out} holds an alignment of other activations.", "Pass --force to replace it, or name another folder."
        )
    if before is not None:
        say(f"fit {method}  reused {out}")
    else:
        saes = (source_sae, target_sae)
        views = open_views((stores[0].space, stores[1].space), saes, unembedding="unembedding" in needs)
        before = artefact.fit(aligner, views, stores, how, corpus=texts, request=request)
        before.save(out)
    _answer(before, out, as_json, q_max, top)


@align.command()
def score(
    folder: Artefact,
    stores: Annotated[
        list[str] | None, typer.Argument(help="Source and target store of other texts, in place of --corpus.")
    ] = None,
    corpus: CorpusRef = None,
    split: Splits = [],  # noqa: B006
    text_column: TextColumn = None,
    out: Annotated[Path | None, typer.Option(help="Folder of a scored copy; default: the artefact itself.")] = None,
    source_sae: SourceSae = None,
    target_sae: TargetSae = None,
    n_null: Draws = 20,
    seed: Seed = 0,
    q_max: Level = 0.05,
    top: Top = 10,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score the frozen matches on documents that the fit has not seen, such as another domain.

    The matches do not change; their held-out correlation, p and q do. Documents seen by the fit are left out.
    """
    set_quiet(quiet or as_json)
    from transfer.alignment import artefact
    from transfer.alignment.sides import SideRef, open_stores, read_corpus
    from transfer.core.alignment import Alignment
    from transfer.core.rundir import runs_folder

    alignment = Alignment.load(folder)
    place = out or folder
    if out is not None and out.resolve() != folder.resolve() and (out / "alignment.json").exists() and not force:
        raise TransferError(f"{out} already holds an artefact.", "Pass --force to replace it.")
    artefact.writable(place)
    if stores and len(stores) != 2:
        raise TransferError(f"{len(stores)} stores are named; scoring needs a source and a target.")
    if not stores and corpus is None:
        raise TransferError("There are no documents to score on.", "Name texts with --corpus, or two stores.")
    texts = read_corpus(corpus, text_column=text_column, splits=split)
    source, target = stores or (alignment.source.model, alignment.target.model)
    spaces = (alignment.source, alignment.target)
    refs = (
        SideRef("source", source, source_sae or spaces[0].sae, spaces[0].layer),
        SideRef("target", target, target_sae or spaces[1].sae, spaces[1].layer),
    )
    opened = open_stores(refs, texts, runs_folder(), residual=False)
    scored = artefact.score(alignment, opened, artefact.Settings(n_null=n_null, seed=seed), corpus=texts)
    scored.save(place)
    _answer(scored, place, as_json, q_max, top)


@align.command("show")
def show_artefact(folder: Artefact, q_max: Level = 0.05, top: Top = 10, as_json: Json = False) -> None:
    """Spaces, matches at a q-value, held-out correlation against the null, convergence, what was untestable."""
    from transfer.core.alignment import Alignment

    _answer(Alignment.load(folder), folder, as_json, q_max, top)


@align.command()
def export(
    folder: Artefact,
    out: Annotated[Path, typer.Option(help="File to write.")],
    format: Annotated[str | None, typer.Option(help="csv, parquet or graphml; default: the file's suffix.")] = None,  # noqa: A002
    q_max: Annotated[
        float | None, typer.Option("--q-max", help="Only matches up to this q-value, and their splits.")
    ] = None,
    least_mass: Annotated[float, typer.Option(help="Coupling from which an edge counts as a split.")] = 0.1,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write matches and splits as CSV, parquet or GraphML, with the space ids in every row."""
    set_quiet(quiet or as_json)
    from transfer.alignment.export import export as write
    from transfer.core.alignment import Alignment

    found = write(Alignment.load(folder), out, format=format, q_max=q_max, least_mass=least_mass, force=force)
    show(found if as_json else "{file}: {matches} matches, {splits} splits".format(**found))


@align.command()
def families(
    folders: Annotated[
        list[Path], typer.Argument(metavar="ARTEFACT ARTEFACT...", help="Folders that `transfer align fit` wrote.")
    ],
    q_max: Level = 0.05,
    as_json: Json = False,
) -> None:
    """Features that all models share, from the artefacts of every pair: shares, consistency, compositions.

    Universal features belong to a family of all models whose pairs are all matches, shared ones have a match, private
    ones none (missed matches included). A composition goes from A to C through B and is compared with A to C.
    """
    from transfer.alignment import families as found

    numbers = found.numbers(found.load(folders), q_max)
    show(numbers if as_json else found.text(numbers))


@align.command()
def ladder(
    rungs: Annotated[str, typer.Option(help="Only these, such as G0,G6.")] = "G0,G1,G2,G3,G4,G5,G6",
    model: Annotated[list[str] | None, typer.Option(help="Models with an SAE beside them; repeatable.")] = None,
    second_sae: Annotated[
        str | None, typer.Option(help="Another SAE of the first model: the ceiling. Default: the zoo's second seed.")
    ] = None,
    method: Annotated[str, typer.Option(help="Method that is judged.")] = "fused",
    methods: Annotated[
        str | None, typer.Option(help="Methods beside each other in G4, such as fused,crosscoder.")
    ] = None,
    sizes: Annotated[str, typer.Option(help="Planted spaces of G0, in features, such as 4096,131072.")] = "4096",
    draws: Annotated[int, typer.Option(min=2, help="Draws of each planted cell of G1.")] = 3,
    stress: Annotated[float, typer.Option(help="Share of the stress setting's full size in G1.")] = 1.0,
    corpus: CorpusRef = "bundled",
    unseen: Annotated[
        str | None, typer.Option(help="Texts of another domain. Default: a quarter of the corpus' topics, held out.")
    ] = None,
    text_column: TextColumn = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to save all rows in.")] = None,
    seed: Seed = 0,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when a row failed.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Try an aligner where the answer is known: copies, planted pairs, two SAEs of one model, and pairs of nothing.

    G0 identity, G1 planted truth, G2 two SAE seeds, G3 activations against decoders, G4 across families, G5 steering,
    G6 negatives. A row that failed is shown as such; the exit code stays 0 unless --strict. All of it takes four to
    five minutes of one core.
    """
    set_quiet(quiet or as_json)
    from transfer.alignment.artefact import writable
    from transfer.alignment.sides import read_corpus
    from transfer.core.files import write_json
    from transfer.core.rundir import runs_folder
    from transfer.ladder.climb import METHODS, Plan, climb, table
    from transfer.ladder.zoo import Zoo

    if out is not None:
        writable(out.parent)
        if out.is_dir():
            raise TransferError(f"--out {out} is a folder.", "Name a file, such as ladder.json.")
    try:
        numbers = tuple(int(size) for size in _words(sizes))
    except ValueError:
        raise TransferError(f"--sizes {sizes!r} is not a list of whole numbers.", "Write it as 4096,16384.") from None
    among = _words(methods) if methods else METHODS
    plan = Plan(_words(rungs), method, among, sizes=numbers, draws=draws, stress=stress, seed=seed)
    texts = read_corpus(corpus, text_column=text_column)
    assert texts is not None
    models = tuple(model or ("zoo:llama", "zoo:mistral", "zoo:qwen"))
    second = second_sae or (None if model else "zoo:llama/sae_seed1")
    zoo = Zoo(models, second, texts, runs_folder(), unseen=read_corpus(unseen), seed=seed)
    rows = []
    for row in climb(plan, zoo):
        rows.append(row)
        if out is not None:
            write_json(out, [r.to_dict() for r in rows])
    found = [r.to_dict() for r in rows]
    show(found if as_json else table(rows, shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    if strict and any(row.passed is False for row in rows):
        raise typer.Exit(1)


def _words(listed: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in listed.split(",") if word.strip())
