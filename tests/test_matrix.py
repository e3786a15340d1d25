"""The grid: resumption, failures, worker processes, and claims that can say no."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from transfer import matrix
from transfer.core.config import TuneSection
from transfer.core.errors import NoSpaceError, StageError, TransferError
from transfer.core.files import write_json
from transfer.core.outcomes import EvalResult, FinetuneRun
from transfer.core.texts import Corpus, Text
from transfer.core.workers import Workers
from transfer.finetune import Recipe, data_hash
from transfer.grid.claims import compare, summarise, verdict
from transfer.matrix import Cell, CellResult, cell_key, run_cells, write_examples
from transfer.tasks import grid_task
from transfer.tasks.base import Predictions
from transfer.tasks.intent import Intent, weighted_auprc

RECIPE = Recipe("head", "head", epochs=1, lr=1e-2, batch=4)
HASHES = {"zoo:a": "hash-a", "zoo:b": "hash-b"}
WORDS = ("bread", "cake", "tea", "lock", "wire", "poison")
EVALUATION = Corpus(
    "evaluation",
    tuple(
        Text(f"e{i}", f"{WORDS[i % 6]} and {WORDS[(i // 6) % 6]} {i}", "harmful" if i % 6 > 2 else "benign")
        for i in range(72)
    ),
)


class WordCounts:
    """A classifier that needs no network: log odds of the words seen in training, plus seeded noise."""

    def __init__(self, examples, seed):
        self.odds: dict[str, float] = {}
        for text, label in examples:
            for word in text.split():
                self.odds[word] = self.odds.get(word, 0.0) + (1.0 if label else -1.0)
        self.noise = np.random.default_rng(seed)

    def predict(self, texts):
        sums = np.array([sum(np.tanh(self.odds.get(w, 0.0)) for w in text.split()) for text in texts])
        positive = 1 / (1 + np.exp(-sums - 0.8 * self.noise.normal(size=len(texts))))
        return Predictions(np.stack([1 - positive, positive], axis=1), 0)


@dataclass(frozen=True)
class WordTask(Intent):
    """Intent detection by word counts; texts can ask for trouble."""

    log: str = ""

    def fit(self, base, examples, recipe, seed, out=None):
        if self.log:
            with Path(self.log).open("a") as file:
                file.write(f"{base} {seed}\n")
        if any("raise" in text for text, _ in examples):
            raise ValueError("asked for")
        if any("disk is full" in text for text, _ in examples):
            raise NoSpaceError("No space left to write it.", "Free some.")
        if any("die" in text for text, _ in examples):
            os.kill(os.getpid(), signal.SIGKILL)
        run = FinetuneRun(
            base=base,
            base_hash=HASHES[base],
            recipe=recipe.name,
            data_hash=data_hash(examples),
            n_examples=len(examples),
            n_dropped=0,
            n_trainable=1,
            n_tokens=1,
            seed=seed,
            curve=(0.7, 0.1),
            seconds=0.0,
        )
        return WordCounts(examples, [seed, len(examples)]), run


TASK = WordTask(draws=50)
SEED_DATA = (("bread and tea", 0), ("cake", 0), ("lock", 1), ("tea cake", 0))


def cell(arm="seed_only", target="zoo:a", seed=0, extra=(), source="") -> Cell:
    return Cell(source, source, target, arm, RECIPE, seed, examples=SEED_DATA + tuple(extra))


def grid() -> list[Cell]:
    return [
        c
        for target in HASHES
        for seed in range(3)
        for c in (
            cell(target=target, seed=seed),
            cell("mapped", target, seed, [("poison and wire", 1), ("a wire", 1)], "zoo:c"),
            cell("random", target, seed, [("bread", 1), ("cake", 1)], "zoo:c"),
        )
    ]


def run(cells, out: Path, processes=1, task=TASK):
    with Workers(processes) as pool:  # it starts nothing unless it is used
        chosen = pool if processes > 1 else None
        return run_cells(cells, EVALUATION, task, pool=chosen, out_dir=out, base_hashes=HASHES)


def contents(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in sorted(folder.iterdir())}


def test_results_come_in_the_order_of_the_cells(tmp_path):
    cells = grid()
    one = run(cells, tmp_path / "one")
    two = run(cells[::-1], tmp_path / "two")
    assert one == two[::-1]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert [(r.target, r.arm, r.seed) for r in one] == [(c.target, c.arm, c.seed) for c in cells]


@pytest.mark.parametrize("harm", ["digit", "cut", "scores"])
def test_a_cell_that_changed_on_disk_is_trained_again(tmp_path, harm, capfd):
    cells = grid()
    right = run(cells, tmp_path)
    before = contents(tmp_path)
    record = sorted(tmp_path.glob("*.json"))[0]
    if harm == "digit":
        record.write_text(record.read_text().replace('"value": 0.', '"value": 1.', 1))
    elif harm == "cut":
        record.write_text(record.read_text()[:40])
    else:
        record.with_suffix(".jsonl").write_text("{}\n")
    assert contents(tmp_path) != before
    assert run(cells, tmp_path) == right
    assert contents(tmp_path) == before
    assert "changed since it was written; trained again" in capfd.readouterr().err


def test_real_models_give_the_same_bits_in_one_process_and_in_two(tmp_path, tiny_mistral):
    recipes = [Recipe("lora", "lora", 1, 1e-3, 4, max_tokens=64), Recipe("head", "head", 2, 1e-2, 4, max_tokens=64)]
    few = Corpus("few", EVALUATION.texts[:20])
    cells = [
        replace(cell(arm, f"path:{tiny_mistral}", seed, extra), recipe=recipe)
        for recipe in recipes
        for arm, seed, extra in [("seed_only", 0, ()), ("full", 1, (("poison wire", 1), ("bread", 0)))]
    ]
    task = Intent(draws=20)
    one = run_cells(cells, few, task, pool=None, out_dir=tmp_path / "one")
    with Workers(2) as pool:
        two = run_cells(cells[::-1], few, task, pool=pool, out_dir=tmp_path / "two")[::-1]
    for a, b in zip(one, two, strict=True):
        assert replace(a, run=replace(a.run, seconds=0)) == replace(b, run=replace(b.run, seconds=0))
        assert (tmp_path / "one" / f"{a.key}.jsonl").read_bytes() == (tmp_path / "two" / f"{b.key}.jsonl").read_bytes()
    assert len({a.key for a in one}) == len(cells)
    assert len({(tmp_path / "one" / f"{a.key}.jsonl").read_bytes() for a in one}) == len(cells)


def test_finished_cells_are_not_run_again(tmp_path):
    log = tmp_path / "log"
    task = WordTask(draws=50, log=str(log))
    cells, out = grid(), tmp_path / "out"
    first = run(cells[:7], out, task=task)
    before = contents(out)
    unfinished = first[3].key
    (out / f"{unfinished}.json").unlink()  # killed after the scores, before the result
    done = len(log.read_text().splitlines())
    again = run(cells, out, task=task)
    assert len(log.read_text().splitlines()) == done + (len(cells) - 7) + 1
    assert {k: v for k, v in contents(out).items() if k in before} == before
    assert run(cells, out, task=task) == again
    assert len(log.read_text().splitlines()) == done + (len(cells) - 7) + 1


def test_cells_with_equal_content_are_trained_once(tmp_path):
    log = tmp_path / "log"
    results = run([cell(), cell("mapped", source="zoo:c")], tmp_path / "out", task=WordTask(draws=50, log=str(log)))
    assert len(log.read_text().splitlines()) == 1
    assert results[0].key == results[1].key
    assert [r.arm for r in results] == ["seed_only", "mapped"]


def test_key_changes_with_everything_that_matters():
    base = cell()
    key = cell_key(base, "h", EVALUATION, TASK)
    other = Corpus("evaluation", EVALUATION.texts[:-1])
    assert key == cell_key(replace(base, arm="full", source="x"), "h", EVALUATION, TASK)
    variants = [
        cell_key(replace(base, seed=1), "h", EVALUATION, TASK),
        cell_key(replace(base, examples=base.examples[::-1]), "h", EVALUATION, TASK),
        cell_key(replace(base, recipe=replace(RECIPE, lr=1.0)), "h", EVALUATION, TASK),
        cell_key(base, "h2", EVALUATION, TASK),
        cell_key(base, "h", other, TASK),
        cell_key(base, "h", EVALUATION, replace(TASK, unseen=("x",))),
    ]
    assert len({key, *variants}) == len(variants) + 1


def test_a_failing_cell_does_not_stop_the_others(tmp_path):
    cells = [cell(seed=0), cell("mapped", extra=[("please raise", 1)]), cell(seed=1), cell(seed=2)]
    with pytest.raises(StageError, match=r"1 of 4 cells failed \(cell no features -> zoo:a, mapped.*ValueError: asked"):
        run(cells, tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 3
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_ends_the_grid_at_once(tmp_path, processes):
    cells = [cell("mapped", extra=[("disk is full", 1)] * 9), *(cell(seed=s) for s in range(6))]
    with pytest.raises(NoSpaceError, match="No space left"):
        run(cells, tmp_path, processes=processes)
    assert len(list(tmp_path.glob("*.json"))) < 6


def test_a_dying_worker_fails_its_own_cell_only(tmp_path):
    bad = [cell("mapped", extra=[("please die", 1)]), cell("random", extra=[("please raise", 1)])]
    with pytest.raises(StageError, match="2 of 5 cells failed") as caught:
        run([cell(seed=s) for s in range(3)] + bad, tmp_path, processes=2)
    assert "worker process died" in str(caught.value)
    assert "ValueError: asked for" in str(caught.value)
    assert len(list(tmp_path.glob("*.json"))) == 3


def test_a_task_that_cannot_travel_is_reported(tmp_path):
    @dataclass(frozen=True)
    class Local(WordTask):
        pass

    with pytest.raises(StageError, match="1 of 1 cells failed.*(pickle|local)"):
        run([cell()], tmp_path, processes=2, task=Local(draws=50))


def test_training_sets_in_files(tmp_path):
    examples = [("brot — bread", 0), ("lock", 1)]
    path = tmp_path / "train.jsonl"
    written = write_examples(path, examples)
    in_file = Cell("", "", "zoo:a", "full", RECIPE, 0, file=str(path), file_hash=written)
    assert in_file.load() == examples
    assert in_file.data_hash == Cell("", "", "zoo:a", "full", RECIPE, 0, examples=tuple(examples)).data_hash
    run([in_file], tmp_path / "out")
    path.write_text(path.read_text().replace("lock", "door"))
    with pytest.raises(StageError, match="has changed"):
        run([replace(in_file, seed=1)], tmp_path / "out")
    path.unlink()
    with pytest.raises(StageError, match="does not exist"):
        run([replace(in_file, seed=2)], tmp_path / "out")
    with pytest.raises(TransferError, match="needs its examples"):
        Cell("", "", "zoo:a", "full", RECIPE, 0)
    with pytest.raises(TransferError, match="Unknown arm 'best'"):
        cell("best")


def test_leaked_texts_are_counted(tmp_path):
    text = EVALUATION.texts[4]
    assert run([cell(extra=[(f" {text.text.upper()}", 1), ("new", 0)])], tmp_path)[0].n_leaked == 1


def made(arm, seed, value, source="zoo:c", target="zoo:a", n=100, generator=None) -> CellResult:
    """A cell result with a given AUPRC."""
    fit = FinetuneRun("b", "h", "head", "d", n, 0, 1, 1, seed, (0.1,), 0.0)
    score = EvalResult("intent", "auprc", value, 0.01, 72, 0, "x.jsonl")
    source = "" if arm in ("seed_only", "full") else source
    generator = source if generator is None else generator
    return CellResult(source, generator, target, arm, "head", seed, f"{arm}{seed}", (score,), fit, 0)


def arms(n_seeds=5, target="zoo:a", **means) -> list[CellResult]:
    rng = np.random.default_rng(0)
    shared = rng.normal(scale=0.06, size=n_seeds)
    return [
        made(arm, s, mean + shared[s] + rng.normal(scale=0.004), target=target, n=60 if arm == "seed_only" else 100)
        for arm, mean in means.items()
        for s in range(n_seeds)
    ]


def test_summaries_hold_mean_interval_and_delta_against_the_seed():
    results = arms(seed_only=0.4, mapped=0.6, full=0.8)
    rows = {r.arm: r for r in summarise(results, "intent", "auprc")}
    mapped = rows["mapped"]
    assert mapped.values == tuple(r.value("auprc") for r in results if r.arm == "mapped")
    assert mapped.ci_low < mapped.mean < mapped.ci_high
    assert (mapped.control, mapped.delta) == ("seed_only", pytest.approx(0.2, abs=0.01))
    assert mapped.delta_low is not None
    assert mapped.delta_high is not None
    assert mapped.delta_high - mapped.delta_low < (mapped.ci_high - mapped.ci_low) / 2, "pairing must help here"
    assert (rows["seed_only"].control, rows["seed_only"].delta) == ("", None)
    with pytest.raises(TransferError, match="No metric 'f1'"):
        summarise(results, "intent", "f1")
    with pytest.raises(TransferError, match="Two results for seed_only"):
        summarise(results + results[:1], "intent", "auprc")


def test_planted_gain_is_supported_and_planted_nothing_is_not():
    results = [
        *arms(seed_only=0.40, own=0.55, mapped=0.60, random=0.45, shuffled=0.50),
        *arms(target="zoo:b", seed_only=0.40, own=0.55, mapped=0.45, random=0.50, shuffled=0.41),
    ]
    found = compare(results, "auprc")
    assert [(c.target, c.arm, c.control) for c in found] == [
        (t, a, c)
        for a, c in (("mapped", "random"), ("mapped", "shuffled"), ("own", "random"))
        for t in ("zoo:a", "zoo:b")
    ]
    head = {c.target: c for c in verdict(found)}
    assert (head["zoo:a"].control, head["zoo:a"].verdict) == ("shuffled", "supported")
    assert (head["zoo:b"].control, head["zoo:b"].verdict) == ("random", "not supported")
    assert head["zoo:a"].p < head["zoo:a"].p_holm < 0.05
    assert {c.target: c.verdict for c in found if c.arm == "own"} == {"zoo:a": "supported", "zoo:b": "supported"}


def test_too_few_seeds_are_undecided_and_say_how_many_are_needed():
    values = {"mapped": [0.50, 0.56, 0.47], "random": [0.48, 0.49, 0.50]}
    results = [made(arm, s, v) for arm, row in values.items() for s, v in enumerate(row)]
    (c,) = compare(results, "auprc", pairs=[("mapped", "random")])
    assert c.low < 0 < c.high
    assert c.mde > c.delta
    needed = int(c.verdict.removeprefix("undecided: would need ").removesuffix(" seeds"))
    assert c.seeds_needed == needed > 3
    (one,) = compare([r for r in results if r.seed == 0], "auprc", pairs=[("mapped", "random")])
    assert one.verdict == "undecided: one seed gives no interval"


def test_holm_can_take_a_single_significance_back():
    def pair(target, deltas):
        return [
            made(arm, s, 0.5 + (d if arm == "mapped" else 0), target=target)
            for arm in ("mapped", "random")
            for s, d in enumerate(deltas)
        ]

    strong = pair("zoo:a", [0.10, 0.13, 0.07, 0.02])
    alone = verdict(compare(strong, "auprc"))[0]
    assert alone.verdict == "supported"
    many = strong + [r for i in range(5) for r in pair(f"zoo:{i}", [0.1, -0.1, 0.05, -0.02])]
    among = next(c for c in verdict(compare(many, "auprc")) if c.target == "zoo:a")
    assert among.p == alone.p
    assert among.p_holm == pytest.approx(6 * alone.p)
    assert among.verdict.startswith("undecided: would need")


def test_comparisons_pair_the_seeds_that_both_arms_have():
    results = [made("mapped", s, 0.6 + 0.1 * s) for s in (0, 1, 2)]
    results += [made("random", s, 0.5 + 0.1 * s + (0.001 if s == 2 else 0)) for s in (1, 2, 7)]
    (found,) = compare(results, "auprc", pairs=[("mapped", "random")])
    assert found.n_seeds == 2 and found.delta == pytest.approx(0.0995) and found.high - found.low < 0.02


def test_a_bigger_budget_is_no_claim():
    results = arms(mapped=0.6, random=0.4)
    results = [replace(r, run=replace(r.run, n_examples=130)) if r.arm == "mapped" else r for r in results]
    assert compare(results, "auprc")[0].verdict == "undecided: unequal budget (130 examples against 100)"


def test_controls_are_the_nearest_and_then_the_strongest():
    seeds = range(3)
    results = [made("mapped", s, 0.6 + 0.01 * s) for s in seeds]
    results += [made("random", s, 0.2, source="zoo:c") for s in seeds]
    results += [made("random", s, 0.5, source="zoo:b") for s in seeds]
    assert compare(results, "auprc")[0].control_source == "zoo:c"
    results = [r for r in results if (r.arm, r.source) != ("random", "zoo:c")]
    results += [made("random", s, 0.55, source="zoo:a") for s in seeds]
    assert compare(results, "auprc")[0].control_source == "zoo:a"
    assert compare([r for r in results if r.arm == "mapped"], "auprc") == []


def test_bootstrap_bounds_come_from_the_score_files(tmp_path):
    cells = grid()
    results = run(cells, tmp_path)
    found = compare(results, "auprc", folder=tmp_path, weighted=TASK.weighted("auprc"))
    assert len(found) == 2
    for c in found:
        assert c.boot_low < c.delta < c.boot_high
    keys = {r.seed: r.key for r in results if (r.target, r.arm) == ("zoo:a", "mapped")}
    rows = [json.loads(x) for x in (tmp_path / f"{keys[0]}.jsonl").read_text().splitlines()]
    labels, scores = (np.array([row[k] for row in rows]) for k in ("label", "score"))
    value = weighted_auprc(labels, scores, np.ones((len(rows), 1)))[0]
    assert value == pytest.approx(next(r for r in results if r.key == keys[0]).value("auprc"))
    assert np.isnan(compare(results, "auprc")[0].boot_low)


def test_results_survive_json(tmp_path):
    results = run(grid(), tmp_path)
    rows = summarise(results, "intent", "auprc")
    write_json(tmp_path / "r.json", [r.summary() for r in rows] + [c.summary() for c in compare(results, "auprc")])
    data = json.loads((tmp_path / "r.json").read_text())
    assert {"mean", "ci_low", "ci_high", "n_seeds", "arm", "metric"} <= set(data[0])


ORPHAN = """
import os, time
from transfer.core.workers import Workers
if __name__ == "__main__":
    pool = Workers(1).executor
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 60).result()
"""


def alive(pid: int) -> bool:
    """Whether the process still runs; a dead one that nobody has reaped does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_killed_grid_leaves_no_workers_behind(tmp_path):
    script = tmp_path / "grid.py"
    script.write_text(ORPHAN)
    env = {**os.environ, "PYTHONPATH": str(Path(matrix.__file__).parents[1])}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=env) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 10
        try:
            while alive(worker):
                assert time.monotonic() < deadline, "the worker outlived the grid"
                time.sleep(0.05)
        finally:
            if alive(worker):
                os.kill(worker, signal.SIGKILL)


def test_results_of_the_finished_cells_come_with_the_failure(tmp_path):
    cells = [cell(seed=0), cell("mapped", extra=[("please raise", 1)], source="zoo:c"), cell(seed=1)]
    with pytest.raises(matrix.FailedCells) as caught:
        run(cells, tmp_path)
    assert [(r.arm, r.seed) for r in caught.value.results] == [("seed_only", 0), ("seed_only", 1)]
    assert caught.value.failures == {cells[1].name: "ValueError: asked for"}


def test_a_toxicity_grid_takes_the_labels_of_its_data() -> None:
    tune = TuneSection.model_validate({"task": "toxicity"})
    corpus = Corpus("own", (Text("a", "mild", "fine"), Text("b", "less so", "rude")))
    assert [label for _, label in grid_task(tune, "rude").examples(corpus)] == [0, 1]
    third = Corpus("own", (*corpus.texts, Text("c", "other", "spam")))
    with pytest.raises(TransferError, match=r"fine, rude, spam.*data\.positive"):
        grid_task(tune, "rude").examples(third)
