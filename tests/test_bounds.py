"""Bounds are bounds where the truth is known, and the cases in which a printed bound would be false are shown."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transfer.bounds import (
    WEIGHT_NATS,
    bretagnolle_huber,
    data_efficiency,
    information_bound,
    miller_madow,
    model_entropy,
    parameter_efficiency,
    pinsker,
    surrogate_tv,
    text_entropy,
    transfer_bound,
    tv_bound,
    word_entropy,
)
from transfer.core.errors import TransferError
from transfer.cover.kl import kl_terms
from transfer.grid.bound_table import ASSUMES, bound_table, efficiency
from transfer.text.ngrams import entropy


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.abs(p - q).sum() / 2)


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    there = p > 0
    with np.errstate(divide="ignore"):
        return float(np.sum(p[there] * np.log(p[there] / q[there])))


SHARES = st.lists(st.floats(0, 1), min_size=2, max_size=6).filter(lambda x: sum(x) > 1e-3)


def distribution(weights: list[float]) -> np.ndarray:
    return np.array(weights) / sum(weights)


# Total variation.


@given(SHARES, st.randoms(use_true_random=False))
@settings(max_examples=150)
def test_both_bounds_hold(weights: list[float], random: Any) -> None:
    p = distribution(weights)
    q = distribution([random.random() ** 3 + 1e-9 for _ in weights])
    kl = max(0.0, divergence(p, q))
    truth = total_variation(p, q) - 1e-9
    assert truth <= pinsker(kl) and truth <= bretagnolle_huber(kl)
    assert truth <= tv_bound(kl)[0] == min(pinsker(kl), bretagnolle_huber(kl))


def test_pinsker_is_tight_for_near_and_the_other_for_far_distributions() -> None:
    p, q = np.array([0.51, 0.49]), np.array([0.5, 0.5])
    assert pinsker(divergence(p, q)) == pytest.approx(total_variation(p, q), rel=0.01)
    assert tv_bound(0.5)[1] == "pinsker" and tv_bound(2.0)[1] == "bretagnolle-huber"
    assert tv_bound(1.593)[1] == "pinsker" and tv_bound(1.595)[1] == "bretagnolle-huber"
    assert pinsker(50) == 5 and bretagnolle_huber(50) <= 1
    assert tv_bound(math.inf) == (1.0, "bretagnolle-huber")
    assert tv_bound(0.0)[0] == 0.0
    for wrong in (-0.1, math.nan):
        with pytest.raises(TransferError, match="does not exist"):
            pinsker(wrong)


@given(st.integers(0, 3), st.integers(0, 4), st.integers(0, 4), st.integers(0, 3), st.floats(1e-4, 1))
@settings(max_examples=100)
def test_surrogate_is_that_of_the_sets_it_stands_for(common: int, only: int, extra: int, rest: int, eps: float) -> None:
    n_anchor, n_data, n = common + only, common + extra, common + only + extra + rest
    if n_anchor == 0 or n_data == 0:
        return
    p = np.array([1.0] * n_anchor + [0.0] * (extra + rest)) / n_anchor
    in_data = np.array([1.0] * common + [0.0] * only + [1.0] * extra + [0.0] * rest)
    q = (1 - eps) * in_data / n_data + eps / n
    kl = sum(kl_terms(n_anchor, n_data, common, n, eps))
    assert divergence(p, q) == pytest.approx(kl, abs=1e-9)
    truth = surrogate_tv(n_anchor, n_data, common, n, eps)
    assert truth == pytest.approx(total_variation(p, q))
    assert truth <= tv_bound(max(0.0, kl))[0] + 1e-9


def test_surrogate_refuses_impossible_sets_and_bears_an_empty_one() -> None:
    assert surrogate_tv(4, 0, 0, 8, 0.1) == pytest.approx((4 * (1 / 4 - 0.1 / 8) + 4 * 0.1 / 8 + 0.9) / 2)
    for counts in ((4, 3, 4, 8), (0, 3, 0, 8), (4, 6, 1, 8), (4, 4, 2, 5)):
        with pytest.raises(TransferError, match="No sets have"):
            surrogate_tv(*counts, 0.1)


# Features against texts: what Eq. 2 needs eps_cond for.


@given(st.lists(st.floats(0.01, 1), min_size=12, max_size=12), st.lists(st.floats(0.01, 1), min_size=12, max_size=12))
@settings(max_examples=80)
def test_chain_rule_and_data_processing(p_weights: list[float], q_weights: list[float]) -> None:
    """Twelve texts, three feature values: KL(texts) = KL(features) + eps_cond, so features bound it from below."""
    p, q = distribution(p_weights).reshape(3, 4), distribution(q_weights).reshape(3, 4)
    of_features = divergence(p.sum(axis=1), q.sum(axis=1))
    eps_cond = sum(
        share * divergence(p[z] / share, q[z] / q[z].sum()) for z, share in enumerate(p.sum(axis=1)) if share
    )
    of_texts = divergence(p.ravel(), q.ravel())
    assert of_texts == pytest.approx(of_features + eps_cond, abs=1e-9)
    assert of_features <= of_texts + 1e-9
    assert total_variation(p, q) <= tv_bound(max(0.0, of_features + eps_cond))[0] + 1e-9
    assert total_variation(p.sum(axis=1), q.sum(axis=1)) <= total_variation(p, q) + 1e-9


def test_without_eps_cond_the_bound_on_texts_is_false() -> None:
    """Two sources with the same features and no text in common: the feature bound says 0, the truth is 1."""
    p = np.array([[0.5, 0.0], [0.5, 0.0]])
    q = np.array([[0.0, 0.5], [0.0, 0.5]])
    bound = tv_bound(divergence(p.sum(axis=1), q.sum(axis=1)))[0]
    assert bound == 0.0
    assert total_variation(p, q) == 1.0
    # A classifier that is right on one and wrong on the other: Theorem 4.1 with the feature bound fails, too.
    loss = np.array([[1.0, 0.0], [1.0, 0.0]])
    error, trained_on = float((p * loss).sum()), float((q * loss).sum())
    assert abs(error - trained_on) > transfer_bound(bound, 0.0)
    assert abs(error - trained_on) <= transfer_bound(total_variation(p, q), 0.0)


@given(SHARES, st.randoms(use_true_random=False), st.floats(0.1, 5))
@settings(max_examples=80)
def test_theorem_4_1_with_the_true_distance(weights: list[float], random: Any, scale: float) -> None:
    p = distribution(weights)
    q = distribution([random.random() + 1e-9 for _ in weights])
    loss = np.array([scale * random.random() for _ in weights])
    empirical = scale * random.random()
    gap = abs(float(q @ loss) - empirical)
    assert abs(float(p @ loss) - empirical) <= transfer_bound(total_variation(p, q), gap, scale) + 1e-9


# Lemma 6.1.


def learner(n: int, p: float, choose: np.ndarray) -> tuple[float, float, float, float]:
    """A learner on n coin flips, worked out over all samples.

    Args:
        n: Flips.
        p: Chance of a one.
        choose: Chance of answering "one", by the number of ones seen, [n + 1].

    Returns:
        I(S; W) in nats, H(S), |E gap| and E|gap| under the zero-one loss.
    """
    chance_of_one = 0.0
    rows = []
    for sample in itertools.product((0, 1), repeat=n):
        ones = sum(sample)
        chance = p**ones * (1 - p) ** (n - ones)
        rows.append((chance, ones / n, choose[ones]))
        chance_of_one += chance * choose[ones]
    information = gap = size = 0.0
    for chance, share, answer in rows:
        for probability, prior, loss, risk in (
            (answer, chance_of_one, 1 - share, 1 - p),
            (1 - answer, 1 - chance_of_one, share, p),
        ):
            if probability > 0 and chance > 0:
                information += chance * probability * math.log(probability / prior)
                gap += chance * probability * (risk - loss)
                size += chance * probability * abs(risk - loss)
    flips = -sum(x * math.log(x) for x in (p, 1 - p) if x > 0)
    return max(0.0, information), n * flips, abs(gap), size


@given(st.integers(1, 7), st.floats(0.05, 0.95), st.lists(st.floats(0, 1), min_size=8, max_size=8))
@settings(max_examples=80)
def test_lemma_6_1_on_learners_worked_out_exactly(n: int, p: float, choose: list[float]) -> None:
    information, of_data, gap, size = learner(n, p, np.array(choose))
    assert information <= of_data + 1e-9
    assert gap <= information_bound(information, n) + 1e-9
    assert gap <= information_bound(of_data, n) + 1e-9
    assert size <= information_bound(information, n, absolute=True) + 1e-9


def test_lemma_6_1_for_the_learner_that_follows_the_majority() -> None:
    for n in range(1, 9):
        majority = np.array([float(ones > n / 2) for ones in range(n + 1)])
        information, _, gap, size = learner(n, 0.5, majority)
        assert 0 < gap <= information_bound(information, n)
        assert size <= information_bound(information, n, absolute=True)


def test_lemma_6_1_as_printed_is_false() -> None:
    """A learner that never looks: no information, no expected gap, and yet a gap of some size in every draw."""
    information, _, gap, size = learner(5, 0.5, np.ones(6))
    assert information == pytest.approx(0) and gap == pytest.approx(0)
    assert size > 0.15 > information_bound(information, 5)
    assert size <= information_bound(information, 5, absolute=True)


def test_lemma_6_1_for_an_unbounded_loss() -> None:
    """Exponential losses are (1, 1)-sub-Gamma; picking the smaller of two overfits by 1 - E min = 1/2."""
    gap, information = 0.5, math.log(2)
    assert gap <= information_bound(information, 1, sigma=1, c=1)
    assert information_bound(information, 1, sigma=1, c=1) == pytest.approx(math.sqrt(2 * math.log(2)) + math.log(2))


def test_with_independent_texts_more_of_them_do_not_help() -> None:
    assert information_bound(100.0 * 10, 10) == pytest.approx(information_bound(100.0 * 10_000, 10_000))
    assert information_bound(100.0, 10) > information_bound(100.0, 10_000)
    for information, n, c in ((-1, 1, 0), (1, 0, 0), (1, 1, -1)):
        with pytest.raises(TransferError, match="out of range"):
            information_bound(information, n, c=c)


# Entropy.


def test_miller_madow_takes_most_of_the_bias() -> None:
    rng = np.random.default_rng(0)
    share = distribution(list(1 / np.arange(1, 60)))
    truth = -float(np.sum(share * np.log(share)))
    tables = [np.bincount(rng.choice(59, size=200, p=share)) for _ in range(200)]
    plug_in = np.mean([entropy(t[t > 0]) for t in tables])
    corrected = np.mean([miller_madow(t[t > 0]) for t in tables])
    assert plug_in < truth - 0.08
    assert abs(corrected - truth) < 0.4 * (truth - plug_in)


def chain_texts(n: int, seed: int) -> tuple[list[str], float, list[float], list[int]]:
    """Texts of a two-state chain of 1 to 6 words: texts, true entropy a text, true nats, lengths."""
    rng = np.random.default_rng(seed)
    stay = 0.8
    texts, nats, lengths = [], [], []
    for _ in range(n):
        length = int(rng.integers(1, 7))
        state = int(rng.integers(2))
        chain, cost = [state], math.log(2)
        for _ in range(length - 1):
            same = rng.random() < stay
            state = state if same else 1 - state
            cost -= math.log(stay if same else 1 - stay)
            chain.append(state)
        texts.append(" ".join("ab"[s] for s in chain))
        nats.append(cost)
        lengths.append(length)
    step = -(stay * math.log(stay) + (1 - stay) * math.log(1 - stay))
    return texts, math.log(6) + math.log(2) + 2.5 * step, nats, lengths


def test_entropies_bound_the_truth_from_their_sides() -> None:
    texts, truth, nats, lengths = chain_texts(4000, 0)
    by_words = word_entropy(texts)
    assert by_words.low > truth  # words in any order: dependence is ignored
    exact = model_entropy(nats, lengths)
    assert exact.low <= truth <= exact.high  # the true source as the model
    wrong = model_entropy([n * math.log(2) for n in lengths], lengths)  # a model that sees no order
    assert wrong.low > truth
    few = chain_texts(40, 1)[0]
    assert text_entropy([str(i) for i in range(40)]) == pytest.approx(math.log(40) + 39 / 80)
    assert text_entropy(few) <= math.log(40) + 0.5


def test_word_entropy_interval_holds_its_expectation() -> None:
    found = [word_entropy(chain_texts(60, s)[0]) for s in range(80)]
    mean = np.mean([f.value for f in found])
    assert np.mean([f.low <= mean <= f.high for f in found]) >= 0.87


def test_entropy_refuses_what_it_cannot_use() -> None:
    with pytest.raises(TransferError, match="1 texts"):
        word_entropy(["one"])
    with pytest.raises(TransferError, match="2 likelihoods and 1"):
        model_entropy([1.0, 2.0], [3])
    assert word_entropy(["!", "?"]).value == 0.0


# Efficiency, and the table of a run.


def test_efficiency_scores_by_hand() -> None:
    assert data_efficiency(0.626, 200) == pytest.approx(0.626 / 2.30103, rel=1e-5)
    assert parameter_efficiency(0.5, 1000) == pytest.approx(0.5 / 3)
    for few in (0, 1):
        with pytest.raises(TransferError, match="two synthesised samples or more"):
            data_efficiency(0.5, few)


def covered(kl: float, arm: str = "", writer: str = "") -> dict[str, Any]:
    row: dict[str, Any] = {"model": "zoo:t", "kl": kl, "n_anchor": 8, "n_covered": 4, "n_relevant": 12}
    row["fac_uncapped"] = 5 / 8
    return row | ({"arm": arm, "writer": writer} if arm else {})


def written(nats: float) -> dict[str, Any]:
    row: dict[str, Any] = {"target": "zoo:t", "arm": "own", "writer": "t", "generator": "zoo:t", "n": 50}
    for kind, factor in (("words", 0.9), ("model", 1.0)):
        row |= {f"entropy_{kind}": factor * nats, f"entropy_{kind}_low": 0.8 * nats, f"entropy_{kind}_high": 2 * nats}
    return row | {"entropy_texts": 4.4, "n_model": 50}


def test_the_table_says_what_is_vacuous() -> None:
    coverage = [covered(3.0), covered(0.02, "own", "t")]
    rows, notes = bound_table(coverage, [written(100.0)], {"zoo:t": 10_000})
    seed, own = rows
    assert seed["arm"] == "seed_only" and seed["tv_from"] == "bretagnolle-huber" and seed["vacuous"] == ["tv_loss"]
    assert own["tv"] == pytest.approx(0.1) and own["tv_loss"] == pytest.approx(0.2)
    assert own["gap"] == pytest.approx(math.sqrt(100 / 2)) and own["information_from"] == "texts"
    assert own["vacuous"] == ["gap", "gap_absolute", "transfer"]
    assert own["gap_low"] < own["gap"] < own["gap_high"] and own["transfer"] == own["tv_loss"] + own["gap"]
    said = {note["quantity"]: note for note in notes}
    assert list(said) == list(ASSUMES)
    assert said["gap"]["said"] == "vacuous in all 1 sets" and said["tv_loss"]["said"] == "vacuous in 1 of 2 sets"
    assert said["tv"]["said"] == "vacuous in none of 2 sets" and said["information"]["said"] == "no bound by itself"
    assert all(len(note["assumes"]) > 40 for note in notes)


def test_few_weights_can_tell_less_than_the_texts() -> None:
    (own,), _ = bound_table([covered(0.02, "own", "t")], [written(0.001)], {"zoo:t": 10_000})
    assert own["gap"] == pytest.approx(math.sqrt(0.001 / 2)) and own["vacuous"] == []
    (own,), _ = bound_table([covered(0.02, "own", "t")], [written(1000.0)], {"zoo:t": 10})
    assert own["information"] == pytest.approx(10 * WEIGHT_NATS) and own["information_from"] == "weights"


def test_efficiency_of_the_cells_that_were_written_for() -> None:
    cell = {"target": "zoo:t", "recipe": "head", "metric": "auprc", "mean": 0.6, "ci_low": 0.5, "ci_high": None}
    transfer = [
        {**cell, "arm": "own", "generator": "zoo:t"},
        {**cell, "arm": "own", "generator": "zoo:t", "metric": "auroc"},
        {**cell, "arm": "seed_only", "generator": ""},
    ]
    (row,) = efficiency(transfer, "auprc", {("zoo:t", "own", "zoo:t"): 100}, {("zoo:t", "head"): 1000})
    assert row["des"] == pytest.approx(0.3) and row["pes"] == pytest.approx(0.2)
    assert row["des_low"] == pytest.approx(0.25) and row["des_high"] is None
