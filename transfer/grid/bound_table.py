"""``bounds``, ``bound_notes`` and ``efficiency`` of ``results.json``: the theory for every training set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transfer import bounds
from transfer.bounds import LOSS_RANGE, SIGMA, WEIGHT_NATS

EPS = 1e-3
"""Smoothing of the divergence, ``transfer.coverage.coverage``'s own."""

ASSUMES = {
    "surrogate_tv": "Exact total variation between uniform distributions over the relevant features that anchor and "
    "data activate; it says nothing of how often a feature fires, nor of the texts.",
    "tv": "The smaller of Pinsker's and Bretagnolle and Huber's bound on that total variation, from the divergence of "
    "Eq. 47; as a bound on the distance of the texts it would need eps_cond = 0, which is not known and not likely.",
    "tv_loss": "The first term of Theorem 4.1, 2 C TV, for the zero-one loss (C = 1), under the same unproven "
    "eps_cond = 0.",
    "entropy_words": "E[length] H(word) + H(length) nats a text, from word counts (Miller-Madow): at least the entropy "
    "of the words, but blind to case and punctuation, and too low where most words occur once; not used below.",
    "entropy_model": "Cross-entropy under the writer's own model, unsteered and unprompted, on a sample of its kept "
    "texts, plus the entropy of the length: an upper bound in expectation.",
    "information": "The least of n H(X), which takes the n written texts as independent, and of 32 bits for every "
    "trainable weight, as an upper bound on I(S_gen; W); the seed data counts as fixed.",
    "gap": "Lemma 6.1 for the zero-one loss (sigma = 1/2, c = 0), on the size of the expected gap; independent texts, "
    "though the filter chose them together.",
    "gap_absolute": "The same for the expected size of the gap, which is what the paper prints: needs ln 2 nats more.",
    "transfer": "Theorem 4.1 as a sum of both terms, under all of these assumptions.",
}
"""What each number assumes, a sentence each, in the order shown."""
LIMITS = {"tv": 1.0, **dict.fromkeys(("tv_loss", "gap", "gap_absolute", "transfer"), LOSS_RANGE)}
"""From here on a bound says nothing."""


def bound_table(
    coverage: Sequence[Mapping[str, Any]],
    entropies: Sequence[Mapping[str, Any]],
    n_trainable: Mapping[str, int],
    eps: float = EPS,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One row a training set, and one note a quantity: what it assumes, in how many sets it is vacuous.

    Args:
        coverage: Rows of ``results.json``: of the seed data, and of every written arm.
        entropies: Rows of ``entropy.json``.
        n_trainable: Trainable parameters per target; of several recipes the largest.
        eps: Smoothing of the divergence.
    """
    texts = {(e["target"], e["arm"], e["writer"]): e for e in entropies}
    rows = []
    for row in coverage:
        arm, writer = row.get("arm") or "seed_only", row.get("writer") or ""
        tv, which = bounds.tv_bound(max(0.0, row["kl"]))
        found: dict[str, Any] = {
            "target": row["model"],
            "arm": arm,
            "writer": writer,
            "kl": row["kl"],
            "surrogate_tv": bounds.surrogate_tv(
                row["n_anchor"],
                round(row["fac_uncapped"] * row["n_anchor"]),
                row["n_covered"],
                row["n_relevant"],
                eps,
            ),
            "pinsker": bounds.pinsker(max(0.0, row["kl"])),
            "bretagnolle_huber": bounds.bretagnolle_huber(max(0.0, row["kl"])),
            "tv": tv,
            "tv_from": which,
            "tv_loss": bounds.transfer_bound(tv, 0.0),
        }
        entropy = texts.get((row["model"], arm, writer))
        if entropy:
            n = entropy["n"]
            capacity = WEIGHT_NATS * n_trainable[row["model"]]
            least = min(n * entropy["entropy_model"], capacity)
            gap = bounds.information_bound(least, n, sigma=SIGMA)
            found |= {k: v for k, v in entropy.items() if k not in ("target", "arm", "writer", "source")}
            found |= {
                "information": least,
                "information_from": "weights" if least == capacity else "texts",
                "gap": gap,
                **{f"gap{end}": _gap(entropy[f"entropy_model{end}"], n, capacity) for end in ("_low", "_high")},
                "gap_absolute": bounds.information_bound(least, n, sigma=SIGMA, absolute=True),
                "transfer": bounds.transfer_bound(tv, gap),
            }
        found["vacuous"] = [name for name, limit in LIMITS.items() if name in found and found[name] >= limit]
        rows.append(found)
    return rows, [_note(name, rows) for name in ASSUMES if any(name in row for row in rows)]


def _gap(nats: float | None, n: int, capacity: float) -> float | None:
    return None if nats is None else bounds.information_bound(min(n * nats, capacity), n, sigma=SIGMA)


def _note(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    values = [row[name] for row in rows if name in row]
    limit = LIMITS.get(name)
    vacuous = sum(value >= limit for value in values) if limit is not None else None
    if limit is None:
        said = "no bound by itself"
    elif vacuous == len(values):
        said = f"vacuous in all {len(values)} sets"
    elif vacuous:
        said = f"vacuous in {vacuous} of {len(values)} sets"
    else:
        said = f"vacuous in none of {len(values)} sets"
    return {
        "quantity": name,
        "assumes": ASSUMES[name],
        "least": min(values),
        "largest": max(values),
        "limit": limit,
        "n": len(values),
        "n_vacuous": vacuous,
        "said": said,
    }


def efficiency(
    transfer: Sequence[Mapping[str, Any]],
    metric: str,
    n_written: Mapping[tuple[str, str, str], int],
    n_trainable: Mapping[tuple[str, str], int],
) -> list[dict[str, Any]]:
    """DES and PES of every cell that some model wrote for, with the interval of its score.

    Args:
        transfer: Rows of ``results.json``.
        metric: The score.
        n_written: Synthesised texts by (target, arm, generator).
        n_trainable: Trainable parameters by (target, recipe).
    """
    rows = []
    for row in transfer:
        texts = n_written.get((row["target"], row["arm"], row["generator"]), 0)
        if row["metric"] != metric or texts < 2:
            continue
        weights = n_trainable[row["target"], row["recipe"]]
        found = {k: row[k] for k in ("target", "arm", "generator", "recipe", "metric")}
        found |= {"score": row["mean"], "n_written": texts, "n_trainable": weights}
        for end, key in (("", "mean"), ("_low", "ci_low"), ("_high", "ci_high")):
            score = row[key]
            known = score is not None
            found[f"des{end}"] = bounds.data_efficiency(score, texts) if known else None
            found[f"pes{end}"] = bounds.parameter_efficiency(score, weights) if known else None
        rows.append(found)
    return rows
