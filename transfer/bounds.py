"""Quantities of the paper's theory (arXiv 2602.10388, sections 4 to 6) that a run can estimate, and what each assumes.

They are reported to be looked at, not to be trusted: each says whether it is vacuous, that is, no smaller than what the
loss could be anyway. Three facts decide how to read them.

- The features are a function of the text, so KL(P_Z || Q_Z) <= KL(P_X || Q_X): the feature divergence bounds the
  distance of the *feature* distributions. For the texts it is a lower bound of the divergence that Pinsker needs, and
  without eps_cond (Eq. 2), which nobody estimates, Theorem 4.1 does not follow from it.
- The divergence that runs report is that of Appendix D, between uniform distributions over sets of features. It says
  nothing about how often a feature fires.
- Lemma 6.1 bounds |E gap|. With the absolute value inside the expectation, as the paper prints it, it is false: a
  learner that ignores its data has no mutual information with it and still a gap in every draw. One ln 2 repairs it
  (``absolute``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from transfer.core.errors import TransferError
from transfer.core.span import words
from transfer.core.stats import Interval, mean_interval
from transfer.text.ngrams import Ngrams, entropy

LOSS_RANGE = 1.0
"""Largest loss C: that of the zero-one loss, for which all bounds here are stated."""
SIGMA = 0.5
"""Sub-Gaussian scale of any loss in [0, 1] (Hoeffding's lemma); its sub-Gamma scale c is then 0."""
WEIGHT_NATS = 32 * math.log(2)
"""The most that one float32 weight can tell about the data."""
BLOCKS = 40
"""Blocks of texts that the jackknife leaves out in turn, at most."""


def pinsker(kl: float) -> float:
    """Largest total variation that a divergence allows, sqrt(KL / 2); above KL = 2 it says nothing.

    Raises:
        TransferError: For a negative or undefined divergence.
    """
    return math.sqrt(_divergence(kl) / 2)


def bretagnolle_huber(kl: float) -> float:
    """Largest total variation that a divergence allows, sqrt(1 - exp(-KL)): below one for every finite divergence.

    The smaller of the two bounds above KL = 1.59, see Canonne (arXiv 2202.07198).

    Raises:
        TransferError: For a negative or undefined divergence.
    """
    return math.sqrt(-math.expm1(-_divergence(kl)))


def _divergence(kl: float) -> float:
    if not kl >= 0:
        raise TransferError(f"A divergence of {kl} does not exist.", "It is zero or more, in nats.")
    return kl


def tv_bound(kl: float) -> tuple[float, str]:
    """The smaller of both bounds on the total variation, and its name: ``pinsker`` or ``bretagnolle-huber``."""
    return min((pinsker(kl), "pinsker"), (bretagnolle_huber(kl), "bretagnolle-huber"))


def surrogate_tv(n_anchor: int, n_data: int, n_covered: int, n_relevant: int, eps: float) -> float:
    """Exact total variation of the two distributions whose divergence is Eq. 47: what its bounds are bounds on.

    P_F is uniform on the anchor's features, Q^eps mixes the uniform distributions on the data's features (weight
    1 - eps) and on all relevant ones (eps). Where the data has no feature, that weight counts as lost.

    Args:
        n_anchor: |F(P)|, at least 1.
        n_data: |F(Q)|.
        n_covered: |F(P) and F(Q)|.
        n_relevant: |F|.
        eps: Smoothing weight in (0, 1].

    Raises:
        TransferError: For counts that no sets can have.
    """
    rest = n_relevant - n_anchor - n_data + n_covered
    if not (0 <= n_covered <= min(n_anchor, n_data) and n_anchor > 0 and rest >= 0 and 0 < eps <= 1):
        raise TransferError(
            f"No sets have {n_anchor} anchor, {n_data} data, {n_covered} common of {n_relevant} features (eps {eps})."
        )
    p, floor = 1 / n_anchor, eps / n_relevant
    q = (1 - eps) / n_data + floor if n_data else 0.0
    apart = n_covered * abs(p - q) + (n_anchor - n_covered) * abs(p - floor) + (n_data - n_covered) * q + rest * floor
    return (apart + (0.0 if n_data else 1 - eps)) / 2


def transfer_bound(tv: float, gap: float, loss_range: float = LOSS_RANGE) -> float:
    """Theorem 4.1: Err <= 2 C TV(D, D_gen) + |R_gen - R̂_gen| for a loss in [0, C]; vacuous from C on.

    Args:
        tv: Total variation of the text distributions, or a bound on it. With that of the features in its place the
            theorem does not follow.
        gap: Generalisation gap on the generated distribution, or a bound on it.
        loss_range: C.
    """
    return 2 * loss_range * tv + gap


def information_bound(
    information: float, n: int, *, sigma: float = SIGMA, c: float = 0.0, absolute: bool = False
) -> float:
    """Lemma 6.1: |E gap| <= sqrt(2 sigma^2 I / n) + c I / n, for losses that are (sigma, c)-sub-Gamma on both sides.

    Assumes ``n`` independent examples (Xu and Raginsky, arXiv 1705.07809). I = I(S; W) may be replaced by anything
    larger, such as H(S): then, for independent texts, H(S) = n H(X), ``n`` cancels, and more data does not help.

    Args:
        information: I(S; W) in nats, or a bound on it.
        n: Examples.
        sigma: Scale of the loss; 1/2 for any loss in [0, 1].
        c: Sub-Gamma scale; 0 is sub-Gaussian.
        absolute: Bound E|gap| instead, which costs ln 2 nats.

    Raises:
        TransferError: For numbers out of range.
    """
    if not (information >= 0 and n > 0 and sigma > 0 and c >= 0):
        raise TransferError(f"I = {information}, n = {n}, sigma = {sigma}, c = {c}: out of range.", "n, sigma > 0.")
    each = (information + (math.log(2) if absolute else 0.0)) / n
    return math.sqrt(2 * sigma**2 * each) + c * each


def miller_madow(counts: np.ndarray) -> float:
    """Shannon entropy of a table of counts in nats: plug-in plus (kinds - 1) / (2 N), its bias to first order."""
    return entropy(counts) + (len(counts) - 1) / (2 * int(counts.sum())) if len(counts) else math.nan


def word_entropy(texts: Sequence[str], level: float = 0.95) -> Interval:
    """Nats a text, at most, from word counts alone: E[length] H(word) + H(length), both Miller-Madow.

    H(X) <= H(length) + sum_t H(word t | length >= t) <= H(length) + E[length] H(word) for every distribution of texts
    of the same source. It counts words (``core.span.words``), so case and punctuation carry nothing. Miller-Madow still
    falls short where most words are seen once: then the estimate may lie below the bound it stands for.

    The interval is the jackknife's over blocks of texts.

    Raises:
        TransferError: For fewer than two texts.
    """
    if len(texts) < 2:
        raise TransferError(f"Entropy of {len(texts)} texts cannot be estimated.", "Give two or more.")
    grams = Ngrams.up_to([words(t) for t in texts], 1)[0]
    length = grams.sizes(np.arange(len(texts)))

    def estimate(rows: np.ndarray) -> float:
        n_words = length[rows]
        per_word = miller_madow(grams.counts(rows)) if n_words.sum() else 0.0
        return float(n_words.mean() * per_word + miller_madow(np.unique(n_words, return_counts=True)[1]))

    everything = np.arange(len(texts))
    blocks = np.array_split(everything, min(BLOCKS, len(texts)))
    without = np.array([estimate(np.delete(everything, block)) for block in blocks])
    error = math.sqrt((len(blocks) - 1) * float(np.var(without)))
    return _normal(estimate(everything), error, len(texts), level, "jackknife")


def model_entropy(nats: Sequence[float] | np.ndarray, n_tokens: Sequence[int], level: float = 0.95) -> Interval:
    """Nats a text, at most, from a language model: E[-log Q(tokens)] + H(number of tokens).

    The cross-entropy with any Q that was not fitted on these texts is at least their entropy. A model without an end
    sign spreads its mass over the texts of one length, so the entropy of the length is added (Miller-Madow). One
    tokenisation is less likely than the text, which only makes the bound larger.

    Args:
        nats: Negative log-likelihood of each text.
        n_tokens: Tokens of each text.
        level: Of the interval over texts.

    Raises:
        TransferError: For no texts, or lists of different lengths.
    """
    if len(nats) != len(n_tokens):
        raise TransferError(f"There are {len(nats)} likelihoods and {len(n_tokens)} lengths.")
    mean = mean_interval(nats, level)
    more = miller_madow(np.unique(np.asarray(n_tokens), return_counts=True)[1])
    return Interval(mean.value + more, mean.low + more, mean.high + more, mean.n, mean.method)


def text_entropy(texts: Sequence[str]) -> float:
    """Plug-in entropy over whole texts (Miller-Madow), nats a text: at most ln n + 1/2, so far too low for texts."""
    return miller_madow(np.unique(np.asarray(texts, dtype=object), return_counts=True)[1])


def _normal(value: float, error: float, n: int, level: float, method: str) -> Interval:
    from scipy.stats import norm

    reach = float(norm.ppf((1 + level) / 2)) * error
    return Interval(value, max(0.0, value - reach), value + reach, n, method)


def data_efficiency(score: float, n_texts: int) -> float:
    """DES: score / log10(synthesised samples) (section 7.6).

    It falls as samples are added at an equal score, and depends on the unit of the score; below about 10 samples the
    logarithm blows it up.

    Raises:
        TransferError: For fewer than two samples, whose logarithm is not positive.
    """
    return _efficiency(score, n_texts, "synthesised samples")


def parameter_efficiency(score: float, n_trainable: int) -> float:
    """PES: score / log10(trainable parameters) (Eq. 92); the same as ``data_efficiency`` otherwise.

    Raises:
        TransferError: For fewer than two parameters.
    """
    return _efficiency(score, n_trainable, "trainable parameters")


def _efficiency(score: float, count: int, what: str) -> float:
    if count < 2:
        raise TransferError(f"An efficiency score needs two {what} or more, not {count}.")
    return score / math.log10(count)
