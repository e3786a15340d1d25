"""Causal check of matches: does steering the target along a match do what its source feature does in the source?

Steering vectors move between models by the linear part of a residual map and are rescaled there, as in Sec. 3 of
arXiv 2506.06609 (Chen et al.); random directions of the same length and permuted matches are the controls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from transfer.alignment.stitch import ratio_of_means
from transfer.core.alignment import Alignment
from transfer.core.errors import TransferError
from transfer.core.stats import Interval

if TYPE_CHECKING:
    from aligners.maps import ResidualMap
    from models.adapter import Adapter
    from models.tokens import Rendered

ARMS = ("mapped", "matched", "random")
"""What the target is steered along: the source direction through the map, the matched decoder row, random draws."""
HEADROOM = 0.05
"""A match whose ceiling is less than this above random has no ratio of its own."""
PERMUTATIONS = 2000
"""Permutations of the matches behind each p-value."""


@dataclass(frozen=True)
class CausalCheck:
    """Effects of steering along matches; arrays have one entry a match unless said otherwise.

    Agreement is the correlation over shared tokens between the native effect (source model, source feature) on one half
    of the texts and an arm's effect in the target on the other half, averaged over both ways round. The ceiling is the
    native effect against itself over the same halves, so a perfect copy of the source would reach it.

    The mapped arm knows only the source feature: its agreement tests the map, whatever the match. The matched arm, and
    the rise of the target feature under the mapped direction, test the match.
    """

    source: str
    """Space id."""
    target: str
    """Space id."""
    method: str
    """What made the matches."""
    pairs: np.ndarray
    """Source and target feature of the matches checked, int64 [n, 2]."""
    agreement: dict[str, np.ndarray]
    """``mapped``, ``matched``, ``random`` (mean of the draws), ``ceiling``, and ``mapped_shuffled`` and
    ``matched_shuffled``: the mean agreement of the source feature with the arms of all other matches."""
    rise: dict[str, np.ndarray]
    """How much an arm raises the activation of the match's own target feature at the last content token: ``mapped``,
    ``matched``, ``random``, and ``mapped_shuffled`` (all other matches' mapped directions)."""
    beyond: np.ndarray
    """Whether the mapped arm raises the feature more than every random draw does, bool [n]."""
    p_values: dict[str, float]
    """Permutation tests of the mean over matches against permuted matches: ``agreement_mapped``, ``agreement_matched``,
    ``rise_mapped``."""
    n_available: int
    """Matches in the alignment, of which ``pairs`` are a sample."""
    n_texts: int
    n_dropped: int
    """Texts left out: empty, cut, or not ending at the same byte in both models."""
    n_tokens: int
    """Tokens that both vocabularies hold."""
    n_random: int
    strength: float
    sizes: tuple[float, float]
    """Length of the steering vectors in source and target."""
    seed: int

    def ratio(self, arm: str = "mapped") -> np.ndarray:
        """Transfer ratio per match, (arm − random) / (ceiling − random); NaN below ``HEADROOM``, float64 [n]."""
        room = self.agreement["ceiling"] - self.agreement["random"]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(room >= HEADROOM, (self.agreement[arm] - self.agreement["random"]) / room, np.nan)

    def transfer(self, arm: str = "mapped", *, level: float = 0.95) -> Interval:
        """The same ratio of the means over all matches, with a bootstrap interval over matches.

        It covers other matches of the same kind on these texts, with these random draws.
        """
        a = self.agreement
        return ratio_of_means(a[arm] - a["random"], a["ceiling"] - a["random"], level=level, seed=self.seed)

    def raised(self, *, level: float = 0.95) -> Interval:
        """Rise of the matched feature under the mapped direction as a share of its rise under its own, beyond random.

        (mapped − random) / (matched − random) of the means over matches, bootstrap over matches.
        """
        r = self.rise
        return ratio_of_means(r["mapped"] - r["random"], r["matched"] - r["random"], level=level, seed=self.seed)

    def mean(self, kind: str, arm: str, *, level: float = 0.95) -> Interval:
        """Mean of ``agreement`` or ``rise`` in one arm with a bootstrap interval over matches."""
        values = {"agreement": self.agreement, "rise": self.rise}[kind][arm]
        return ratio_of_means(values, np.ones(len(values)), level=level, seed=self.seed)

    def to_rows(self) -> list[dict[str, float]]:
        """One row a match."""
        columns = {
            "source": self.pairs[:, 0],
            "target": self.pairs[:, 1],
            **{f"agreement_{name}": v for name, v in self.agreement.items()},
            **{f"rise_{name}": v for name, v in self.rise.items()},
            **{f"ratio_{arm}": self.ratio(arm) for arm in ("mapped", "matched")},
            "beyond": self.beyond,
        }
        return [{name: v[i].item() for name, v in columns.items()} for i in range(len(self.pairs))]

    def summary(self) -> dict[str, Any]:
        """The numbers of a table's row; every mean and ratio with its interval as ``_low`` and ``_high``."""
        row: dict[str, Any] = {"source": self.source, "target": self.target, "method": self.method}
        row |= {"n_matches": len(self.pairs), "n_available": self.n_available, "n_texts": self.n_texts}
        row |= {"n_dropped": self.n_dropped, "n_tokens": self.n_tokens, "n_random": self.n_random}
        row |= {"strength": self.strength, "size_source": self.sizes[0], "size_target": self.sizes[1]}
        found = {f"agreement_{arm}": self.mean("agreement", arm) for arm in self.agreement}
        found |= {f"rise_{arm}": self.mean("rise", arm) for arm in self.rise}
        found |= {f"transfer_{arm}": self.transfer(arm) for arm in ("mapped", "matched")} | {"raised": self.raised()}
        for name, interval in found.items():
            row |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
        row["n_no_ratio"] = int(np.isnan(self.ratio()).sum())
        row["beyond_random"] = float(self.beyond.mean())
        return row | {f"p_{name}": p for name, p in self.p_values.items()}


def check_matches(
    source: Adapter,
    target: Adapter,
    alignment: Alignment,
    mapping: ResidualMap,
    texts: list[str],
    *,
    n_matches: int = 64,
    n_random: int = 16,
    strength: float = 0.5,
    max_tokens: int = 512,
    seed: int = 0,
    token_budget: int = 8192,
) -> CausalCheck:
    """Steer both models along matches and compare what happens.

    Each steering vector is ``strength`` times the median norm of the model's own residual stream on the texts, added at
    all content positions of the spaces' layers. The logit effect is the mean change of the logits behind the last
    content token, over the tokens that both vocabularies hold and centred over them (so that logits and
    log-probabilities give the same). The random draws are shared by all matches, since all vectors are equally long.

    Cost: (2 + 1 + n_random / n_matches) × matches × texts forward passes of one text. Memory:
    (6 × matches + 2 × n_random) × shared tokens float32, matches² float64, ``DIRECTIONS`` × texts steering vectors, and
    what one batch of ``models.interventions.steered_logits`` takes.

    Args:
        source: Model and SAE of the alignment's source.
        target: Model and SAE of the alignment's target.
        alignment: Its matches are checked; filter them first. More than ``n_matches`` are sampled evenly at random.
        mapping: Map of residuals, fitted on other texts.
        texts: Probe texts, at least four.
        n_matches: Matches checked at most.
        n_random: Random directions, at least 8.
        strength: Length of steering vectors, in median residual norms.
        max_tokens: Texts with longer renderings are left out.
        seed: Of the sample, the random directions and the intervals.
        token_budget: Padded tokens in one forward pass at most.

    Raises:
        TransferError: When spaces, widths or numbers do not fit, or too few matches or texts are left.
    """
    alignment.source.check(source.space, "The alignment's source")
    alignment.target.check(target.space, "The alignment's target")
    widths = (source.space.d_model, target.space.d_model)
    if mapping.matrix.shape != widths:
        raise TransferError(f"The residual map is {mapping.matrix.shape}, the models are {widths} wide.")
    if n_random < 8 or strength <= 0:
        raise TransferError(
            f"n_random is {n_random} and strength {strength}.", "Use 8 or more, and a strength above 0."
        )
    if min(len(alignment), n_matches) < 2:
        raise TransferError(f"{len(alignment)} matches; a check against permuted matches needs two.", "Filter less.")
    from models.interventions import Probe

    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(len(alignment))[:n_matches])
    pairs = np.stack([alignment.matches[side][chosen] for side in ("source", "target")], axis=1)
    lines = _probes(source, target, texts, max_tokens)
    left, right = (
        Probe(side, rows, strength, token_budget) for side, rows in zip((source, target), lines, strict=True)
    )
    own = source.dictionary.directions()[pairs[:, 0]].astype(np.float64)
    along = {
        "mapped": mapping.vectors(own),
        "matched": target.dictionary.directions()[pairs[:, 1]],
        "random": rng.normal(size=(n_random, widths[1])),
    }
    steer = {arm: right.vectors(v) for arm, v in along.items()}
    vocabularies = [side.language.vocabulary() for side in (source, target)]
    shared = sorted(set(vocabularies[0]) & set(vocabularies[1]))
    if len(shared) < 2:
        raise TransferError(f"The vocabularies share {len(shared)} tokens; effects cannot be compared.")
    ids = [np.array([v[word] for word in shared], dtype=np.int64) for v in vocabularies]
    native = left.effects(left.vectors(own), ids[0])
    table = {arm: across(native, right.effects(vectors, ids[1])) for arm, vectors in steer.items()}
    rises = {arm: right.rises(vectors, pairs[:, 1]) for arm, vectors in steer.items()}
    agreement = {arm: np.diag(table[arm]).copy() for arm in ("mapped", "matched")}
    agreement |= {"random": table["random"].mean(axis=1), "ceiling": np.sum(native[0] * native[1], axis=1)}
    agreement |= {f"{arm}_shuffled": _others(table[arm]) for arm in ("mapped", "matched")}
    rise = {arm: np.diag(rises[arm]).copy() for arm in ("mapped", "matched")}
    rise |= {"random": rises["random"].mean(axis=0), "mapped_shuffled": _others(rises["mapped"].T)}
    return CausalCheck(
        source=source.space.id,
        target=target.space.id,
        method=alignment.method,
        pairs=pairs,
        agreement={k: v.astype(np.float64) for k, v in agreement.items()},
        rise=rise,
        beyond=rise["mapped"] > rises["random"].max(axis=0),
        p_values={
            "agreement_mapped": permutation_p(table["mapped"], seed),
            "agreement_matched": permutation_p(table["matched"], seed),
            "rise_mapped": permutation_p(rises["mapped"], seed),
        },
        n_available=len(alignment),
        n_texts=len(lines[0]),
        n_dropped=len(texts) - len(lines[0]),
        n_tokens=len(shared),
        n_random=n_random,
        strength=strength,
        sizes=(left.size, right.size),
        seed=seed,
    )


def across(native: np.ndarray, effects: np.ndarray) -> np.ndarray:
    """Correlation of each native effect with each effect of an arm, across the halves of the texts.

    Args:
        native: Centred unit effects, [2 halves, n, tokens].
        effects: The same of an arm, [2 halves, m, tokens].

    Returns:
        Mean of both ways round, float64 [n, m].
    """
    return 0.5 * (native[0] @ effects[1].T + native[1] @ effects[0].T).astype(np.float64)


def permutation_p(table: np.ndarray, seed: int) -> float:
    """One-sided p-value of the mean of the diagonal among ``PERMUTATIONS`` random permutations of the columns."""
    rng, n = np.random.default_rng([seed, 1]), len(table)
    null = np.array([table[np.arange(n), rng.permutation(n)].mean() for _ in range(PERMUTATIONS)])
    # Equal permutations must count as ties whatever the order of summation.
    slack = 1e-12 * max(1.0, float(np.abs(table).max()))
    return float((1 + np.sum(null >= np.diag(table).mean() - slack)) / (1 + PERMUTATIONS))


def _probes(source: Adapter, target: Adapter, texts: list[str], max_tokens: int) -> tuple[list[Rendered], ...]:
    """Renderings of the texts that both models read whole and to the same byte, up to the last content token."""
    cut = [[r.cut(max_tokens) for r in side.language.render_many(texts)] for side in (source, target)]

    def whole(line: Rendered, lost: bool) -> bool:
        return not lost and len(line.content) > 0 and int(line.ends[-1]) >= 0

    use = [
        i
        for i, (a, b) in enumerate(zip(*cut, strict=True))
        if whole(*a) and whole(*b) and a[0].ends[-1] == b[0].ends[-1]
    ]
    if len(use) < 4:
        raise TransferError(
            f"{len(use)} of {len(texts)} probe texts can be read whole by both models; four are needed.",
            "Pass more or shorter texts.",
        )
    return tuple([side[i][0] for i in use] for side in cut)


def _others(table: np.ndarray) -> np.ndarray:
    """Mean of each row without its diagonal entry."""
    return (table.sum(axis=1) - np.diag(table)) / (len(table) - 1)
