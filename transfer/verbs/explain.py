"""``transfer explain``: what an experiment's missing features are about, and whether they matter for its task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from transfer.core.console import say, set_quiet, show
from transfer.core.errors import TransferError
from transfer.verbs.options import Json, Quiet, command_line

if TYPE_CHECKING:
    from models.chat import ChatModel
    from models.judges import Judge
    from transfer.explain import Explained, Material
    from transfer.pipeline import Pipeline

KINDS = ("statistical", "endpoint", "local")


def explain(
    config: Annotated[str, typer.Argument(help="Experiment YAML, or a preset name.")] = "demo",
    settings: Annotated[
        list[str], typer.Option("--set", help="Override a key, such as judge.model=gpt-4o-mini; repeatable.")
    ] = [],  # noqa: B006 - typer reads the default, nothing changes it
    model: Annotated[list[str], typer.Option(help="Only this model of the experiment; repeatable.")] = [],  # noqa: B006
    features: Annotated[
        str, typer.Option(help="missing, relevant, or feature ids such as 3,17,200 (then with one --model).")
    ] = "missing",
    judge: Annotated[
        list[str], typer.Option(help="statistical, endpoint or local; give it twice for the agreement of two.")
    ] = [],  # noqa: B006
    rubric: Annotated[str | None, typer.Option(help="Name of a rubric, or a YAML file.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Explain this many features a model at most.")] = None,
    dry_run: Annotated[
        int | None, typer.Option("--dry-run", min=0, help="Show N prompts of each kind and spend nothing.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Do not cut texts of a harmful class in these prompts.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Describe features, judge their relevance, and score each description on held-out texts."""
    set_quiet(quiet or as_json)
    from transfer.core.experiment import load_experiment
    from transfer.core.rundir import runs_folder

    overrides = list(settings) + ([f"judge.rubric={rubric}"] if rubric else [])
    experiment = load_experiment(config, overrides)
    kinds = list(dict.fromkeys(judge)) or [experiment.judge.kind]
    unknown = sorted(set(kinds) - set(KINDS)) + sorted(set(model) - set(experiment.models))
    if unknown:
        raise TransferError(
            f"There is no judge or model {unknown[0]!r} here.",
            f"Judges: {', '.join(KINDS)}; models: {', '.join(experiment.models)}.",
        )
    if len(kinds) > 2:
        raise TransferError("Agreement is between two judges.", "Give --judge at most twice.")
    names = list(dict.fromkeys(model)) or list(experiment.models)
    if _named(features) is not None and len(names) > 1:
        raise TransferError(
            f"Feature ids belong to one model, and these are for {len(names)}: {', '.join(names)}.",
            "Name one with --model.",
        )
    from models.rubric import load_rubric

    asked = load_rubric(experiment.judge.rubric)  # a misspelt name is told before the models are loaded
    from transfer.evidence.statistical import side_of
    from transfer.pipeline import Pipeline

    pipeline = Pipeline(experiment, runs_folder(), command=command_line())
    if "statistical" in kinds:  # before another judge is paid
        side_of(asked, [t.label for t in pipeline.corpora["anchor"]], (experiment.data.positive,))
    pipeline.check("cover")
    if dry_run is not None:
        rows = _rehearsed(pipeline, names, kinds, features, limit, dry_run, full)
        show({"dry_run": rows} if as_json else _estimates(rows))
        return
    result = _explained(pipeline, names, kinds, features, limit)
    show(result if as_json else _table(result))


def _explained(
    pipeline: Pipeline, names: list[str], kinds: list[str], features: str, limit: int | None
) -> dict[str, Any]:
    """Run every judge on every model, write the files, and collect the numbers."""
    from models.cache import AnswerCache
    from models.judges import agreement
    from transfer.evidence.asking import CACHE
    from transfer.evidence.judging import chat_model

    experiment = pipeline.experiment
    out = pipeline.dir.path / "explain"
    result: dict[str, Any] = {"explained": [], "agreement": [], "usage": {}}
    with AnswerCache(pipeline.dir.store / CACHE) as cache:
        chats = {kind: chat_model(experiment, kind, cache) for kind in kinds if kind != "statistical"}
        for name in names:
            done: list[Explained] = []
            for kind in kinds:
                found = explain_model(pipeline, name, kind, chats.get(kind), _ids(pipeline, name, features, limit))
                path = out / f"{name}-{kind}-{Path(experiment.judge.rubric).stem}"
                found.save(path)
                say(f"explained  {name}  {len(found.cases)} features by {kind}  {path}.jsonl")
                done.append(found)
                result["explained"].append(
                    {"name": name, "kind": kind, **found.summary(), "file": f"{path}.jsonl", "rows": _brief(found)}
                )
            if len(done) == 2:
                import dataclasses

                found = agreement(done[0].judged, done[1].judged, experiment.judge.threshold)
                result["agreement"].append({"name": name, **dataclasses.asdict(found)})
        result["usage"] = {kind: c.usage.to_dict() for kind, c in chats.items() if hasattr(c, "usage")}  # type: ignore[attr-defined]
    return result


def explain_model(pipeline: Pipeline, name: str, kind: str, chat: ChatModel | None, ids: list[int]) -> Explained:
    """Explain features of one model of an experiment with one judge."""
    from models.detector import ChatReader
    from models.judges import ChatJudge
    from models.lens import promoted_tokens
    from models.rubric import load_rubric
    from transfer.explain import Material
    from transfer.explain import explain as explained

    experiment = pipeline.experiment
    settings = experiment.judge
    material = Material(
        pipeline.stores[name], pipeline.reference, fraction=settings.shown_fraction, seed=experiment.seed
    )
    adapter = pipeline.adapters[name]
    lens = promoted_tokens(adapter.language, adapter.dictionary.directions(), _array(ids))
    promotes = {f: [w for w, _ in tokens] for f, tokens in lens.items()}
    rubric = load_rubric(settings.rubric)
    judge: Judge = _statistical(pipeline, name, material) if chat is None else ChatJudge(chat, seed=experiment.seed)
    reader = None if chat is None else ChatReader(chat, seed=experiment.seed)
    return explained(material, ids, judge, rubric, settings, promotes=promotes, reader=reader)


def _statistical(pipeline: Pipeline, name: str, material: Material) -> Judge:
    """The offline judge, on the anchor's labels and the thresholds of the coverage."""
    from transfer.evidence.statistical import StatisticalJudge
    from transfer.stages import load_delta, split_docs

    experiment = pipeline.experiment
    anchor = pipeline.corpora["anchor"]
    topics = [t.topic for t in anchor]
    return StatisticalJudge(
        pipeline.spaces[name],
        split_docs(pipeline.stores[name], anchor),
        [t.label for t in anchor],
        topics if any(topics) else (),
        background=material.background,
        positive=(experiment.data.positive,),
        delta=load_delta(pipeline.coverage[name][1]),
        min_support=experiment.cover.min_docs,
        test=experiment.judge.test,
        seed=experiment.seed,
    )


def _rehearsed(
    pipeline: Pipeline, names: list[str], kinds: list[str], features: str, limit: int | None, n: int, full: bool
) -> list[dict[str, Any]]:
    """Prompts and the most they can cost, without asking anybody; one row a judge, the coverage stage's first.

    Texts of a harmful class are cut unless ``full``.
    """
    from tempfile import TemporaryDirectory

    from models.chat import DryRun
    from models.prompts import REHEARSAL
    from models.rubric import load_rubric
    from transfer.evidence.rehearsal import Rehearsal, folded, rehearse_cover
    from transfer.synth.safety import harmful

    experiment = pipeline.experiment
    settings = experiment.judge
    rubric, fold = load_rubric(settings.rubric), harmful(experiment) and not full
    rows: list[dict[str, Any]] = []

    def judge(kind: str) -> tuple[DryRun, list[str]]:
        prompts: list[str] = []
        prices = (settings.price_prompt, settings.price_written)
        keep = lambda p: prompts.append(folded(p, rubric) if fold else p)  # noqa: E731
        return DryRun(f"{kind}:{settings.model or '(none)'}", n, keep, prices, answer=REHEARSAL), prompts

    def row(stage: str, dry: DryRun, prompts: list[str]) -> dict[str, Any]:
        return {"stage": stage, "judge": dry.name, **dry.estimate(), "prompts": prompts}

    if settings.kind != "statistical":
        dry, prompts = judge(settings.kind)
        runs, cover = pipeline.dir.path.parent, lambda name, out: rehearse_cover(pipeline, name, dry, out)
        with TemporaryDirectory() as scratch:
            pipeline.dir = Rehearsal(runs, experiment.name, Path(scratch), cover)
            _ = pipeline.coverage
        rows += [row("cover", dry, prompts)] if dry.n_requests else []
    for kind in (k for k in kinds if k != "statistical"):
        dry, prompts = judge(kind)
        for name in names:
            explain_model(pipeline, name, kind, dry, _ids(pipeline, name, features, limit))
        rows.append(row("explain", dry, prompts))
    if not rows:
        say("the statistical judge asks nobody: nothing to show")
    return rows


def _named(features: str) -> list[int] | None:
    """The ids that the option names; None for a set.

    Raises:
        TransferError: When it is neither a set nor ids.
    """
    if features in ("missing", "relevant"):
        return None
    try:
        return sorted({int(part) for part in features.split(",")})
    except ValueError:
        raise TransferError(
            f"--features {features!r} is neither a set nor ids.", "Write missing, relevant or 3,17,200."
        ) from None


def _ids(pipeline: Pipeline, name: str, features: str, limit: int | None) -> list[int]:
    """Feature ids that the option asks for.

    Raises:
        TransferError: When the space has no such feature, or the set none at all.
    """
    report = pipeline.coverage[name][0]
    found = _named(features)
    if found is None:
        found = getattr(report, features).features.tolist()
    elif outside := [i for i in found if not 0 <= i < report.space.n_features]:
        raise TransferError(f"{report.space.id} has no feature {outside[0]}: ids end at {report.space.n_features - 1}.")
    if not found:
        raise TransferError(f"{name} has no {features} features to explain.", "Write --features relevant.")
    return found[:limit]


def _array(ids: list[int]) -> Any:
    import numpy as np

    return np.array(ids, dtype=np.int64)


def _brief(found: Explained) -> list[dict[str, Any]]:
    """What the table shows of each feature: no text of the corpus."""
    keys = ("feature", "label", "fit", "relevant", "description", "words_auroc", "detection")
    rows = []
    for row in found.rows():
        brief = {k: row.get(k) for k in keys}
        brief["words_auroc"] = row["words_auroc"]["value"] if row["words_auroc"] else None
        brief["detection"] = (row.get("detection") or {}).get("own")
        rows.append(brief)
    return rows


SHOWN_ROWS = 20


def _table(result: dict[str, Any]) -> str:
    lines: list[str] = []
    for part in result["explained"]:
        lines.append(
            f"{part['name']} by {part['kind']}: {part['n_judged']} judged, {part['n_relevant']} relevant "
            f"({part['threshold']} or better for {part['rubric']}), {part['n_silent']} silent on the shown texts"
        )
        lines.append(f"  labels {_counts(part['labels'])} · fits {_counts(part['fits'])}")
        for name in ("words", "detection", "fuzzing"):
            if name in part:
                lines.append(f"  {name}: {_score(part[name])}")
        for row in part["rows"][:SHOWN_ROWS]:
            auroc = "-" if row["words_auroc"] is None else f"{row['words_auroc']:.2f}"
            lines.append(f"  {row['feature']:>6}  {row['label']:<10} words {auroc}  {row['description'][:100]}")
        if len(part["rows"]) > SHOWN_ROWS:
            lines.append(f"  … {len(part['rows']) - SHOWN_ROWS} more in {part['file']}")
    for row in result["agreement"]:
        lines.append(
            f"{row['name']}: the judges agree on {row['agree']:.2f} of {row['n']} features; κ {row['kappa']:.2f}, "
            f"weighted {row['weighted']:.2f}, relevant or not {row['binary']:.2f}; {row['n_unread']} unread"
        )
    for kind, usage in result["usage"].items():
        lines.append(f"{kind}: {_counts({k: v for k, v in usage.items() if v})}")
    return "\n".join(lines)


def _counts(values: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())


def _score(summary: dict[str, Any]) -> str:
    parts = [f"n {summary['n']}, {summary['n_untested']} untested"]
    for name in ("auroc", "balanced_accuracy", "control", "gain"):
        if name in summary:
            low, high = summary[f"{name}_low"], summary[f"{name}_high"]
            parts.append(f"{name} {summary[name]:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]"))
    return " · ".join(parts)


def _estimates(rows: list[dict[str, Any]]) -> str:
    lines = [prompt for r in rows for prompt in r["prompts"]]
    lines += [
        f"{r['stage']} by {r['judge']}: {r['requests']} requests, at most {r['most_prompt']} tokens read and "
        f"{r['most_written']} written, {r['cost']:.4g} in money; nothing was asked"
        for r in rows
    ]
    return "\n".join(lines)
