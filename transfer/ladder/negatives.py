"""G6: pairs in which (next to) nothing is to be found, and one in which everything is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import numpy as np
import scipy.sparse as sp

from aligners.base import Aligner
from aligners.correlation import usable_features
from aligners.metrics import is_right
from aligners.stress import STRESS, Setting, stress_pair
from models.adapter import Adapter
from transfer.core.keys import digest
from transfer.core.space import FeatureView
from transfer.core.store import PairedActivations
from transfer.ladder.planted import accepted, same
from transfer.ladder.row import LEVEL, Finding, Row, judged
from transfer.ladder.zoo import Parts, Zoo, fitted, title, view

Make = Callable[[], Aligner]
Views = tuple[FeatureView, FeatureView]
NEAR_NONE = 0.01
"""Share of the testable features of the smaller side that may be accepted where there is nothing."""
CENTRE_TEXTS = 64
"""Texts from which a random SAE takes its centre."""
HALVES = 4
"""Random halves of the matches whose counterparts are removed, one after the other."""
SMALL = STRESS.scaled(0.1, d_source=96, d_target=128)
"""Of the planted case."""


def negatives(make: Make, others: list[Make], zoo: Zoo) -> list[Row]:
    """G6 on the first model and its first partner; ``others`` stand beside as context."""
    a, b = zoo.pairs_of_models()[0]
    parts, views, seed = zoo.parts(a, b), (view(a), view(b)), zoo.seed
    wrong = shuffled_documents(parts, seed)
    turned = (views[0], shuffled_directions(views[1], seed))
    none, few, all_ = (
        f"accepted ≤ {NEAR_NONE:.0%} of the testable",
        f"substitutes ≤ {LEVEL:.0%}",
        "precision = recall = 1",
    )
    pair = title(a, b)
    cases: list[tuple[str, str, Callable[[Make], Finding]]] = [
        (f"{a.space.model} ↔ untrained {b.space.model}", none, lambda m: _untrained(m, zoo, a, b)),
        (f"{pair}, documents shuffled", none, lambda m: nothing(m, views, wrong, seed)),
        (f"{pair}, directions shuffled", none, lambda m: nothing(m, turned, parts, seed)),
        (f"{pair}, counterparts removed", few, lambda m: substitutes(m, views, parts, seed)),
        (f"planted, {SMALL.n_features} features, counterparts removed", few, lambda m: planted_substitutes(m, seed)),
        (f"{a.space.model} ↔ itself", all_, lambda m: _itself(m, zoo, a)),
    ]

    def context(work: Callable[[Make], Finding], maker: Make) -> Finding:
        return work(maker)[0], None

    rows = []
    for case, expected, work in cases:
        rows.append(judged("G6", case, make().name(), expected, lambda w=work: w(make)))
        for other in others:
            rows.append(judged("G6", case, other().name(), "context", lambda w=work, o=other: context(w, o)))
    return rows


def nothing(make: Make, views: Views, parts: Parts, seed: int) -> Finding:
    """Accepted matches where there should be none."""
    found = fitted(make(), views, parts, seed)
    left, right, _ = usable_features(parts.fit, found.params.get("min_support", 2))
    n, testable = len(accepted(found)[0]), min(len(left.ids), len(right.ids))
    return {"accepted": n, "matches": len(found), "testable": testable}, n <= NEAR_NONE * testable


def shuffled_documents(parts: Parts, seed: int) -> Parts:
    """The target's rows with their documents in another order, in every part: what fires together is chance."""

    def moved(part: PairedActivations) -> PairedActivations:
        blocks = np.split(np.arange(len(part.docs)), np.flatnonzero(np.diff(part.docs)) + 1)
        order = np.random.default_rng(seed).permutation(len(blocks))
        rows = np.concatenate([blocks[i] for i in order])
        residual = None if part.target_residual is None else part.target_residual[rows]
        return dataclasses.replace(part, target=sp.csr_matrix(part.target[rows]), target_residual=residual)

    return Parts(moved(parts.fit), moved(parts.heldout), None)


def shuffled_directions(target: FeatureView, seed: int) -> FeatureView:
    """The same features with each other's directions: no map fits them."""
    order = np.random.default_rng(seed).permutation(len(target.directions))
    return dataclasses.replace(target, directions=target.directions[order])


def substitutes(make: Make, views: Views, parts: Parts, seed: int) -> Finding:
    """Sources that find another partner once theirs is taken away, half of the matches at a time.

    In real spaces some are right, since a concept that the target splits has a second partner; those that the first fit
    kept as splits are counted apart.
    """
    found = fitted(make(), views, parts, seed)
    src, tgt = accepted(found)
    if len(src) < 2:
        return {"accepted": len(src), "removed": 0}, False
    edges = found.coupling.tocoo()
    known = np.stack([edges.row, edges.col], axis=1).astype(np.int64)
    removed = again = split = 0
    for draw in range(HALVES):
        half = np.random.default_rng([seed, draw]).permutation(len(src))[: len(src) // 2]
        keep = np.setdiff1d(np.arange(views[1].space.n_features), tgt[half])
        refit = fitted(make(), (views[0], _kept(views[1], keep)), _target(parts, keep), seed)
        new = np.stack(accepted(refit), axis=1)
        new = new[np.isin(new[:, 0], src[half])]
        removed, again = removed + len(half), again + len(new)
        split += int(np.sum(is_right(new[:, 0], keep[new[:, 1]], known)))
    measured = {"accepted": len(src), "removed": removed, "accepted_again": again, "of_these_known_splits": split}
    share = (again - split) / removed
    return {**measured, "substitutes": share}, share <= LEVEL


def planted_substitutes(make: Make, seed: int, setting: Setting = SMALL) -> Finding:
    """The same on a planted pair, where every counterpart of half of the concepts found is removed: none is right."""
    case = stress_pair(setting, seed=seed)
    docs = np.unique(case.pairs.docs)
    fit = case.pairs.docs < docs[round(0.6 * len(docs))]
    parts = Parts(case.pairs.take(np.flatnonzero(fit)), case.pairs.take(np.flatnonzero(~fit)), None)
    found = fitted(make(), (case.source, case.target), parts, seed)
    concepts = np.unique(case.left.concept[np.intersect1d(accepted(found)[0], case.truth[:, 0])])
    gone = np.random.default_rng(seed).permutation(concepts)[: len(concepts) // 2]
    if not len(gone):
        return {"concepts": len(concepts), "removed": 0}, False
    lost = case.right.shared & np.isin(case.right.concept, gone)
    keep = np.flatnonzero(~lost)
    again = fitted(make(), (case.source, _kept(case.target, keep)), _target(parts, keep), seed)
    tested = case.left.shared & np.isin(case.left.concept, gone)
    n = int(tested[accepted(again)[0]].sum())
    measured = {"concepts": len(concepts), "removed": int(lost.sum()), "sources": int(tested.sum())}
    return measured | {"accepted_again": n, "substitutes": n / int(tested.sum())}, n <= LEVEL * int(tested.sum())


def _kept(side: FeatureView, keep: np.ndarray) -> FeatureView:
    space = dataclasses.replace(side.space, n_features=len(keep), sae_hash=digest([side.space.sae_hash, keep.tolist()]))
    return dataclasses.replace(side, space=space, directions=side.directions[keep])


def _target(parts: Parts, keep: np.ndarray) -> Parts:
    fit, heldout = (dataclasses.replace(p, target=sp.csr_matrix(p.target[:, keep])) for p in (parts.fit, parts.heldout))
    return Parts(fit, heldout, None)


def _itself(make: Make, zoo: Zoo, side: Adapter) -> Finding:
    pairs, one = zoo.pairs(side, side), view(side)
    found = make().fit(one, one, pairs=pairs).alignment_
    return same(found, np.repeat(np.arange(side.space.n_features)[:, None], 2, axis=1), pairs)


def _untrained(make: Make, zoo: Zoo, a: Adapter, b: Adapter) -> Finding:
    random = untrained(b, [t.text for t in zoo.corpus][:CENTRE_TEXTS], zoo.seed)
    return nothing(make, (view(a), view(random)), zoo.parts(a, random), zoo.seed)


def untrained(adapter: Adapter, texts: list[str], seed: int) -> Adapter:
    """A model of the same shape with its initial weights, and a random SAE centred on what it gives for the texts.

    Decoder rows are random with the lengths of the original's, encoders point the same way. Such a pair still knows
    which token it reads.
    """
    import torch
    from transformers import AutoModelForCausalLM

    language, dictionary = adapter.language, adapter.dictionary
    sae = copy.deepcopy(dictionary.sae)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(language.model.config, dtype=torch.float32)
        rows = torch.randn_like(sae.W_dec)
        rows /= rows.norm(dim=1, keepdim=True)
        sae.W_enc.copy_(rows.T)
        sae.W_dec.copy_(rows * sae.W_dec.norm(dim=1, keepdim=True))
        sae.b_enc.zero_()
    model.requires_grad_(False).eval()
    language = dataclasses.replace(
        language,
        ref=f"{language.ref}+untrained",
        hash=digest([language.hash, "untrained", seed]),
        model=model.to(language.device),
        card={},
    )
    lines = language.render_many(texts)
    states = language.capture([line.ids for line in lines], adapter.space.layer)
    content = [s[torch.from_numpy(line.content)] for s, line in zip(states, lines, strict=True)]
    sae.b_dec.copy_(torch.cat(content).mean(dim=0))
    dictionary = dataclasses.replace(
        dictionary, ref=f"{dictionary.ref}+random", hash=digest([dictionary.hash, "random", seed]), sae=sae, card={}
    )
    return Adapter.join(language, dictionary, adapter.space.layer)
