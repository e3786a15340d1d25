"""The done-when study of synthesis: which way of writing reaches the features that a small toxic-comment set lacks.

    python -m tests.benchmarks.synthesis surge_toxicity.jsonl --out synthesis.json

For every model of the zoo and every seed: texts are split by hash into anchor, seed candidates and test; the seed data
are ten of the candidates; what the seed data lack of the anchor's toxic-labelled relevant features is asked for, by
every way of writing with the same number of texts a feature. Nothing is chosen on the test split, which only serves to
count contamination. Texts are never printed. The fixed strengths, the guidance and all other settings were set on the
bundled requests.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from collections import Counter
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from models.adapter import Adapter
from models.fluency import log_perplexity
from models.guided import GuidedGenerator
from models.steered import SteeredGenerator
from transfer.alignment.sides import stored
from transfer.core.config import SynthSection
from transfer.core.files import read_json, write_json
from transfer.core.outcomes import Candidate, SynthesisRun
from transfer.core.space import FeatureSet
from transfer.core.stats import mean_interval, paired_delta
from transfer.core.texts import Corpus, Text
from transfer.cover.delta import DeltaRule, thresholds
from transfer.coverage import coverage, missing_hit_rate
from transfer.evidence.relevance import judge_relevance
from transfer.evidence.spans import top_spans
from transfer.synth.drafts import encode
from transfer.synth.strength import StrengthSearch
from transfer.synth.verdicts import Written, judge
from transfer.synth.writing import make_openings
from transfer.synthesis import Options, steering_vectors, synthesise
from transfer.text.duplicates import Contamination

MODELS = ("llama", "mistral", "qwen")
ALL = "all three"
RULES = ("quantile:0.5", "constant:0", "constant:1", "constant:2", "quantile:0.9")
TEXTS = 6
"""Texts a feature, of all steps together."""
FIXED = (0.0, 2.0, 4.0)
"""Strengths of the presets."""
SEED_TEXTS = 10
FEATURES = 16
"""Missing features asked for at most, the most telling first."""
FEW = 2
GUIDE = 4.0
WAYS = (
    "one step",
    "two steps",
    "strength 2",
    "strength searched",
    "guided",
    "guided, retries",
    "4 and 2 texts",
    "4 and 2 texts, openings",
)
COMPARED = (
    ("two steps", "one step"),
    ("strength searched", "strength 2"),
    ("strength searched", "two steps"),
    ("guided", "two steps"),
    ("guided, retries", "guided"),
    ("4 and 2 texts, openings", "4 and 2 texts"),
)
CANDIDATES = 16


def split(path: Path) -> dict[str, list[Text]]:
    """Texts by the hash of their words: 60 % anchor, 10 % seed candidates, 30 % test."""
    found: dict[str, list[Text]] = {"anchor": [], "seed": [], "test": []}
    # Not splitlines: some texts hold U+2028.
    with path.open(encoding="utf8", newline="\n") as lines:
        for number, line in enumerate(lines):
            row = json.loads(line)
            place = int(hashlib.sha256(row["text"].encode()).hexdigest()[:8], 16) % 100
            name = "anchor" if place < 60 else "seed" if place < 70 else "test"
            found[name].append(Text(str(number), row["text"].strip(), "toxic" if row["toxic"] else "fine"))
    return found


class Case:
    """One model and one seed: what is missing, and how to write for it."""

    def __init__(self, adapter: Adapter, texts: dict[str, list[Text]], anchor_docs: Any, seed: int) -> None:
        self.adapter, self.seed, self.anchor_docs = adapter, seed, anchor_docs
        rng = np.random.default_rng(seed)
        chosen = [texts["seed"][i] for i in sorted(rng.permutation(len(texts["seed"]))[:SEED_TEXTS])]
        self.seed_docs, _ = encode(adapter, [t.text for t in chosen], "seed")
        self.anchor = Corpus("anchor", tuple(texts["anchor"]))
        self.known = [t.text for t in (*texts["anchor"], *chosen)]
        self.delta = thresholds(anchor_docs, DeltaRule.parse(RULES[0]))
        self.relevant = judge_relevance(
            adapter.space, anchor_docs, [t.label for t in self.anchor], delta=self.delta, fdr=0.1
        )
        self.missing = {rule: self._missing(rule) for rule in RULES}
        default = self.missing[RULES[0]]
        scores = default.scores if default.scores is not None else np.ones(len(default))
        self.asked = default.subset(default.features[np.argsort(-scores, kind="stable")[:FEATURES]], "asked for")
        self.missing = {r: m.subset(self.asked.features, "missing and asked for") for r, m in self.missing.items()}
        columns = anchor_docs.tocsc()
        toxic = np.array([t.label == "toxic" for t in self.anchor])
        self.examples: dict[int, list[str]] = {}
        for i in self.asked.features.tolist():
            part = slice(columns.indptr[i], columns.indptr[i + 1])
            order = columns.indices[part][np.argsort(-columns.data[part], kind="stable")]
            self.examples[i] = [self.anchor.texts[j].text for j in order if toxic[j]][: 2 * FEW]

    @cached_property
    def openings(self) -> dict[int, list[str]]:
        """What ``transfer synth`` starts every other text with: spans of the toxic anchor texts."""
        toxic = self.anchor.where("toxic", lambda t: t.label == "toxic")
        with TemporaryDirectory() as folder:
            store = stored(self.adapter, toxic, Path(folder), residual=False)
            spans = top_spans(store, toxic, self.asked.features.tolist(), k=2 * FEW)
        return make_openings(SynthSection.model_validate({"examples": FEW}), spans)

    def _missing(self, rule: str) -> FeatureSet:
        delta = thresholds(self.anchor_docs, DeltaRule.parse(rule))
        report = coverage(self.adapter.space, self.anchor_docs, self.seed_docs, self.relevant, delta)
        toxic = [i for i, name in zip(report.missing.features, report.missing.labels, strict=True) if name == "toxic"]
        return report.missing.subset(np.array(toxic, dtype=np.int64), "missing, of the toxic class")

    def write(
        self,
        n: int,
        m: int,
        strengths: Sequence[float],
        guide: float = 0.0,
        openings: dict[int, list[str]] | None = None,
        **options: Any,
    ) -> SynthesisRun:
        """One way of writing."""
        common: dict[str, Any] = dict(model=self.adapter.space.model, max_new_tokens=32, batch_size=96, chunk=96)
        generator = (
            GuidedGenerator(self.adapter, weight=guide, candidates=CANDIDATES, **common)
            if guide
            else SteeredGenerator(self.adapter.language, self.adapter.space.layer, **common)
        )
        directions = self.adapter.dictionary.directions()
        return synthesise(
            self.adapter,
            generator,
            self.asked,
            self.examples,
            self.delta,
            missing=self.missing[RULES[0]],
            anchor_texts=self.known,
            steering=steering_vectors(directions, self.delta * np.linalg.norm(directions, axis=1)),
            strengths=strengths,
            n=n,
            m=m,
            few_shot=FEW,
            openings=openings,
            seed=self.seed,
            options=Options(**options),
        )

    def rates(self, run: SynthesisRun) -> dict[str, float | None]:
        """Hit rate over the missing features at each threshold rule, judged anew; None where nothing is missing."""
        docs, place = encode(self.adapter, (c.text for c in run.candidates if c.text), "judge")
        found: dict[str, float | None] = {}
        for rule in RULES:
            delta = thresholds(self.anchor_docs, DeltaRule.parse(rule))
            written = [_written(c, float(delta[c.feature]), self.examples[c.feature]) for c in run.candidates]
            kept = [
                place[c.text] for c, v in zip(run.candidates, judge(written, self.known), strict=True) if v == "kept"
            ]
            missing = self.missing[rule]
            found[rule] = missing_hit_rate(missing, docs[kept], delta)[1] if len(missing) else None
        return found


def ways(case: Case) -> dict[str, Any]:
    """The ways of writing, ``TEXTS`` texts a feature each; retries come on top and are a row of their own."""
    half = TEXTS // 2
    # The search takes the place of step 1: each feature writes one text at each fixed strength.
    search = StrengthSearch(log_perplexity(case.adapter.language), probes=len(FIXED))
    return {
        "one step": lambda: case.write(TEXTS, 0, FIXED),
        "two steps": lambda: case.write(half, half, FIXED),
        "strength 2": lambda: case.write(half, half, (2.0,)),
        "strength searched": lambda: case.write(0, half, FIXED, search=search),
        "guided": lambda: case.write(half, half, (0.0,), GUIDE, retries=2),
        # Even numbers of texts a step, so that half have an opening.
        "4 and 2 texts": lambda: case.write(4, 2, FIXED),
        "4 and 2 texts, openings": lambda: case.write(4, 2, FIXED, openings=case.openings),
    }


def one(name: str, texts: dict[str, list[Text]], seeds: Sequence[int], done: Collection[str]) -> list[dict[str, Any]]:
    """All ways and seeds of one model, without those that are done."""
    adapter = Adapter.load(f"zoo:{name}", f"zoo:{name}/sae")
    anchor_docs, _ = encode(adapter, [t.text for t in texts["anchor"]], "anchor")
    usual = log_perplexity(adapter.language)
    test = Contamination([t.text for t in texts["test"]])
    rows = []
    for seed in seeds:
        case = Case(adapter, texts, anchor_docs, seed)
        for way, write in ways(case).items():
            if way in done:
                continue
            start = time.process_time()
            whole = write()
            seconds = time.process_time() - start
            first = dataclasses.replace(whole, candidates=tuple(c for c in whole.candidates if not c.round))
            again = [(f"{way}, retries", whole)] if len(first.candidates) < len(whole.candidates) else []
            for way_, run in ((way, first), *again):
                rows.append(
                    _row(case, run, usual, test)
                    | {"model": name, "seed": seed, "way": way_, "cpu_seconds": seconds, "info": whole.info}
                )
                shown = {k: v for k, v in rows[-1].items() if k not in ("info", "rejected", "n_missing")}
                print(shown, flush=True)  # noqa: T201
    return rows


def _written(c: Candidate, delta: float, examples: list[str]) -> Written:
    return Written(c.text, c.feature, c.score, delta, (c.positive, *examples), opening=c.opening)


def _row(case: Case, run: SynthesisRun, usual: Any, test: Contamination) -> dict[str, Any]:
    """The numbers of one run; those of its first pass alone are judged anew."""
    verdicts = judge(
        [_written(c, c.delta, case.examples[c.feature]) for c in run.candidates],
        case.known,
    )
    kept = [c for c, v in zip(run.candidates, verdicts, strict=True) if v == "kept"]
    texts = [c.text for c in kept]
    free = dataclasses.replace(run, candidates=tuple(c for c in run.candidates if not c.opened))
    return {
        "hit_rate": case.rates(run),
        "own_rate": len({c.feature for c in kept}) / len(case.asked),
        "hit_rate_free": case.rates(free)[RULES[0]],
        "n_kept_opened": sum(c.opened for c in kept),
        "n_missing": {r: len(m) for r, m in case.missing.items()},
        "n_asked": len(case.asked),
        "n_candidates": len(run.candidates),
        "n_kept": len(kept),
        "rejected": dict(Counter(v for v in verdicts if v != "kept")),
        "log_perplexity": float(np.nanmedian(usual(texts))) if texts else None,
        "contaminated": sum(t in test for t in texts),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds with 95 % intervals, one line a model and way; then paired differences."""
    lines = [
        "| model | way | " + " | ".join(RULES) + " | own, quantile:0.5 | texts | kept | log-perplexity | CPU s |",
        "|---" * (len(RULES) + 7) + "|",
    ]
    known = {r["way"] for r in rows}
    names = [way for way in WAYS if way in known]
    for model in (*MODELS, ALL):
        for way in names:
            mine = [r for r in rows if model in (r["model"], ALL) and r["way"] == way]
            if not mine:
                continue
            cells = [_interval([r["hit_rate"][rule] for r in mine]) for rule in RULES]
            cells.append(_interval([r["own_rate"] for r in mine]))
            cells += [f"{np.mean([r[k] for r in mine]):.0f}" for k in ("n_candidates", "n_kept")]
            levels = [r["log_perplexity"] for r in mine if r["log_perplexity"] is not None]
            cells += [f"{np.mean(levels):.2f}", f"{np.mean([r['cpu_seconds'] for r in mine]):.0f}"]
            lines.append(f"| {model} | {way} | {' | '.join(cells)} |")
    lines += ["", "| difference | " + " | ".join((*RULES, "own")) + " |", "|---" * (len(RULES) + 2) + "|"]
    for a, b in ((a, b) for a, b in COMPARED if {a, b} <= known):
        cells = []
        for rule in (*RULES, "own"):
            pairs = [
                (x["own_rate"], y["own_rate"]) if rule == "own" else (x["hit_rate"][rule], y["hit_rate"][rule])
                for x in rows
                for y in rows
                if x["way"] == a and y["way"] == b and (x["model"], x["seed"]) == (y["model"], y["seed"])
            ]
            both = [(x, y) for x, y in pairs if x is not None and y is not None]
            delta = paired_delta([x for x, _ in both], [y for _, y in both])
            cells.append(f"{delta.delta:+.2f} ({delta.low:+.2f} to {delta.high:+.2f}; n {delta.n})")
        lines.append(f"| {a} − {b} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _interval(values: list[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    found = mean_interval(known)
    return f"{found.value:.2f} ({max(found.low, 0):.2f}–{min(found.high, 1):.2f})"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="JSON of all rows; what is in it is kept.")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--ways", default="", help="Only these, separated by semicolons.")
    parser.add_argument("--table", action="store_true", help="Only print the table of what is there.")
    args = parser.parse_args()
    rows = read_json(args.out) if args.out.exists() else []
    if not args.table:
        import torch

        torch.set_num_threads(1)
        texts = split(args.data)
        for seed in map(int, args.seeds.split(",")):
            for model in args.models.split(","):
                done = {r["way"] for r in rows if (r["model"], r["seed"]) == (model, seed)}
                asked = set(args.ways.split(";")) if args.ways else set(WAYS)
                rows += one(model, texts, [seed], done | (set(WAYS) - asked))
                write_json(args.out, rows)
    print(table(rows))  # noqa: T201


if __name__ == "__main__":
    main()
