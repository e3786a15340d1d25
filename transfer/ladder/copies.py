"""G0, G2 and G3 on real models: a rotated copy, two SAE seeds, and two kinds of evidence against each other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp

from aligners.base import Aligner
from aligners.canonical import canonical_space
from aligners.coactivation import PairedCodes
from aligners.correlation import usable_features
from aligners.metrics import is_right
from aligners.partners import top_partners
from aligners.same_space import SHARED, SaeWeights, dual_match, pw_mcc
from aligners.topk import unit_rows
from models.adapter import Adapter
from transfer.alignment.stitch import rotation
from transfer.ladder.planted import accepted, same
from transfer.ladder.row import LEVEL, Finding, Row, judged
from transfer.ladder.zoo import Zoo, fitted, title, view

Make = Callable[[], Aligner]
LOGITS = 1e-4
"""Largest change of any logit that a rotated copy may show."""
SUPPORT = 10
"""Rows a feature must fire on to count as evidence in G3."""


def rotated_copy(make: Make, zoo: Zoo) -> list[Row]:
    """G0: the first model against itself with a rotation folded into its weights, its features in another order."""
    side = zoo.first
    return [
        judged(
            "G0",
            f"{side.space.model}, rotation in its weights",
            make().name(),
            f"precision = recall = 1, logits within {LOGITS}",
            lambda: _rotated(make, zoo, side),
        )
    ]


def _rotated(make: Make, zoo: Zoo, side: Adapter) -> Finding:
    from models.rotation import rotated

    order = np.random.default_rng(zoo.seed).permutation(side.space.n_features)
    copy = rotated(side, rotation(side.space.d_model, zoo.seed), order)
    change = logit_change(side, copy, [t.text for t in zoo.corpus][:8])
    pairs = zoo.pairs(side, copy)
    found = make().fit(view(side), view(copy), pairs=pairs).alignment_
    measured, good = same(found, np.stack([order, np.arange(len(order))], axis=1), pairs)
    return {**measured, "logit_change": change}, bool(good) and change <= LOGITS


def logit_change(a: Adapter, b: Adapter, texts: list[str]) -> float:
    """Largest difference of any logit of two models with one tokenizer."""
    import torch

    largest = 0.0
    with torch.inference_mode():
        for text in a.language.render_many(texts):
            ids = torch.tensor([text.ids])
            one, other = (side.language.model(input_ids=ids.to(side.language.device)).logits for side in (a, b))
            largest = max(largest, float((one.float() - other.float()).abs().max()))
    return largest


def seeds(make: Make, others: list[Make], zoo: Zoo) -> list[Row]:
    """G2: two SAEs of one model; cosines in their common space are the truth. ``others`` stand beside as context.

    For activations the truth is independent. The fused aligner's space is learned from the residuals and does not know
    that both sides are one space, but it compares the same decoders.
    """
    case = f"two SAEs of {zoo.models[0]}"
    if zoo.second_sae is None:
        return [Row("G2", case, make().name(), {"left_out": "no second SAE was named"}, "context", None, 0.0)]
    rows = [judged("G2", case, make().name(), f"cosine ≥ {SHARED} for {1 - LEVEL:.0%}", lambda: _seeds(make, zoo))]
    for other in others:
        rows.append(judged("G2", case, other().name(), "context", lambda o=other: (_seeds(o, zoo)[0], None)))
    return rows


def _seeds(make: Make, zoo: Zoo) -> Finding:
    a, b = zoo.seeds
    parts = zoo.parts(a, b)
    weights = [sae_weights(side) for side in (a, b)]
    found = fitted(make(), (view(a), view(b)), parts, zoo.seed)
    shared = dual_match(*weights)
    left, right, _ = usable_features(parts.fit, found.params.get("min_support", 2))
    true = shared.pairs[np.isin(shared.pairs[:, 0], left.ids) & np.isin(shared.pairs[:, 1], right.ids)]
    src, tgt = accepted(found)
    cosine = np.einsum("nd,nd->n", unit_rows(weights[0].decoder[src]), unit_rows(weights[1].decoder[tgt]))
    good = is_right(src, tgt, true)
    heldout = found.matches["heldout_corr"][found.matches["q_value"] <= LEVEL]
    alike = float(np.mean(cosine >= SHARED)) if len(src) else 0.0
    return {
        "accepted": len(src),
        "matches": len(found),
        "cosine_median": float(np.median(cosine)) if len(src) else float("nan"),
        f"cosine_from_{SHARED}": alike,
        "dual_shared": len(true),
        "dual_precision": float(good.mean()) if len(src) else 0.0,
        "dual_recall": float(good.sum() / len(true)) if len(true) else float("nan"),
        "dual_share_of_all": shared.source_share,
        "pw_mcc": pw_mcc(weights[0].decoder, weights[1].decoder).mean,
        "heldout_corr": float(np.nanmedian(heldout)) if len(src) else float("nan"),
    }, alike >= 1 - LEVEL


def sae_weights(side: Adapter) -> SaeWeights:
    """Encoder and decoder rows of a loaded SAE."""
    sae = side.dictionary.sae
    bias = getattr(sae, "b_enc", None)
    encoder = sae.W_enc.detach().float().cpu().numpy().T
    return SaeWeights(
        np.ascontiguousarray(encoder),
        np.zeros(len(encoder), np.float32) if bias is None else bias.detach().float().cpu().numpy(),
        side.dictionary.directions(),
    )


def evidence(zoo: Zoo) -> list[Row]:
    """G3: how geometry alone ranks the partner that activations alone chose."""
    both = [zoo.seeds] if zoo.second_sae else []
    return [
        judged(
            "G3",
            title(a, b),
            "φ, then canonical space",
            "median rank below that of shuffled partners",
            lambda a=a, b=b: _evidence(zoo, a, b),
        )
        for a, b in (*both, *zoo.pairs_of_models())
    ]


def _evidence(zoo: Zoo, a: Adapter, b: Adapter) -> Finding:
    pairs = zoo.parts(a, b).fit
    assert pairs.source_residual is not None and pairs.target_residual is not None
    left, right, _ = usable_features(pairs, SUPPORT)
    codes = PairedCodes.of([(sp.csr_matrix(pairs.source[:, left.ids]), sp.csr_matrix(pairs.target[:, right.ids]))])
    rows, cols = top_partners(codes, 1)
    src = np.flatnonzero(rows.ids[:, 0] >= 0)
    src = src[cols.ids[rows.ids[src, 0], 0] == src]
    tgt = rows.ids[src, 0]
    x, y = view(a).directions[left.ids], view(b).directions[right.ids]
    space = canonical_space(x, y, pairs.source_residual, pairs.target_residual, pairs.docs)
    cosine = space.source[src] @ space.target.T
    own = cosine[np.arange(len(src)), tgt]
    wrong = cosine[np.arange(len(src)), np.random.default_rng(zoo.seed).permutation(tgt)]
    rank, null = (1 + np.sum(cosine > c[:, None], axis=1) for c in (own, wrong))
    return {
        "mutual": len(src),
        "of": len(right.ids),
        "rank_median": float(np.median(rank)),
        "top1": float(np.mean(rank == 1)),
        "shuffled_rank_median": float(np.median(null)),
        "shuffled_top1": float(np.mean(null == 1)),
    }, bool(np.median(rank) < np.median(null))
