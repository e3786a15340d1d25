"""The ladder of truth: each rung passes where it should, and a wrong aligner or a broken copy fails it."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aligners.activation import ActivationAligner
from aligners.chance import RandomAligner
from aligners.fused import FusedAligner
from aligners.stress import stress_pair
from models.adapter import Adapter
from models.rotation import rotated, rotated_model
from transfer.__main__ import main
from transfer.alignment.stitch import rotation
from transfer.core.errors import TransferError
from transfer.core.texts import Corpus
from transfer.corpus import load_corpus
from transfer.ladder import across, climb, copies, negatives, planted, row, saelens
from transfer.ladder.zoo import Parts, Zoo

CELL = planted.cell_setting(0.6, 0.4, 0.5, n=400)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Two zoo models and a second SAE on 420 requests of all topics."""
    texts = load_corpus("bundled:requests")
    runs = tmp_path_factory.mktemp("runs")
    return Zoo(("zoo:llama", "zoo:mistral"), "zoo:llama/sae_seed1", Corpus("some", texts.texts[::4]), runs)


@pytest.fixture(scope="module")
def parts() -> tuple[tuple[Any, Any], Parts]:
    case = stress_pair(negatives.SMALL, seed=3)
    first, second = case.pairs.split(0.6, seed=0)
    return (case.source, case.target), Parts(first, second, None)


def adapter(folder: Path) -> Adapter:
    return Adapter.load(f"path:{folder}", f"path:{folder}/sae")


# The rotated model.


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen"])
def test_a_rotated_copy_is_the_same_model_in_other_coordinates(name: str, request: pytest.FixtureRequest) -> None:
    side = adapter(request.getfixturevalue(f"tiny_{name}"))
    before = side.language.model.lm_head.weight.clone()
    turn, order = rotation(side.space.d_model, 1), np.random.default_rng(1).permutation(64)
    turned = rotated(side, turn, order)
    texts = ["How do I bake a cake?", "Tell me a joke about computers and coffee."]
    assert copies.logit_change(side, turned, texts) <= copies.LOGITS
    lines = side.language.render_many(texts)
    here, there = (s.encode(lines, residual=True) for s in (side, turned))
    assert here.residual is not None and there.residual is not None
    assert np.abs(here.residual @ turn - there.residual).max() < 1e-3 * np.abs(here.residual).max()
    assert np.abs(here.residual - there.residual).max() > 0.1 * np.abs(here.residual).max()
    assert abs(here.tokens[:, order] - there.tokens).max() < 1e-2
    assert np.allclose(side.dictionary.directions()[order] @ turn, turned.dictionary.directions(), atol=1e-5)
    assert torch.equal(before, side.language.model.lm_head.weight)
    assert turned.space.id != side.space.id and not turned.language.model.config.tie_word_embeddings


def test_a_copy_with_one_other_weight_is_noticed(tiny_llama: Path) -> None:
    side = adapter(tiny_llama)
    turned = rotated(side, rotation(side.space.d_model, 1))
    turned.language.model.model.norm.weight.data[:4] *= 1.5
    assert copies.logit_change(side, turned, ["How do I bake a cake?"]) > copies.LOGITS


def test_what_is_no_rotation_is_refused(tiny_llama: Path) -> None:
    side = adapter(tiny_llama)
    with pytest.raises(TransferError, match="not orthogonal"):
        rotated(side, 2 * np.eye(side.space.d_model))
    with pytest.raises(TransferError, match="permutation"):
        rotated(side, np.eye(side.space.d_model), np.zeros(64, dtype=np.int64))
    odd = dataclasses.replace(side.language, model=copy.deepcopy(side.language.model))
    del odd.model.model.layers[1].mlp.gate_proj
    with pytest.raises(TransferError, match="layer 1 has no mlp.gate_proj"):
        rotated_model(odd, np.eye(side.space.d_model))


# G0.


def test_g0_identity_is_found_and_chance_fails_it() -> None:
    (found,) = planted.identity(FusedAligner, [700], 0)
    assert found.passed is True, found.text()
    assert found.measured["accepted"] == found.measured["true"] > 600
    (wrong,) = planted.identity(RandomAligner, [700], 0)
    assert wrong.passed is False and wrong.measured["recall"] < 0.05


def test_g0_pair_is_what_it_says() -> None:
    case = planted.identity_pair(300, seed=1)
    i, j = case.truth.T
    assert len(case.truth) == 285 == case.target.space.n_features
    assert case.source.space.d_model != case.target.space.d_model
    x, y = (d / np.linalg.norm(d, axis=1, keepdims=True) for d in (case.source.directions, case.target.directions))
    assert np.allclose(x[i] @ x[i].T, y[j] @ y[j].T, atol=1e-5)
    ratio = case.pairs.target[:, j].sum(axis=0) / case.pairs.source[:, i].sum(axis=0)
    assert np.ptp(np.asarray(ratio)) > 3
    assert abs((case.pairs.source[:, i] > 0).astype(int) - (case.pairs.target[:, j] > 0).astype(int)).sum() == 0


def test_g0_rotated_zoo_model(zoo: Zoo) -> None:
    (found,) = copies.rotated_copy(FusedAligner, zoo)
    assert found.passed is True, found.text()
    assert found.measured["true"] > 1000 and found.measured["logit_change"] <= copies.LOGITS


# G1.


def test_g1_cell_holds_its_fdr_where_activations_alone_do_not() -> None:
    fused, good = planted.cell(FusedAligner, CELL, range(2))
    assert good and fused["fdr"] <= row.LEVEL and fused["recall"] > 0.9 and fused["accepted"] > 200
    plain, good = planted.cell(lambda: ActivationAligner(min_support=3), CELL, range(2))
    assert not good and plain["fdr"] > 0.1 and plain["wrong"] > 10


def test_g1_stress_setting_scaled() -> None:
    measured, good = planted.stressed(FusedAligner, negatives.SMALL, 1)
    assert good, measured
    assert not planted.stressed(lambda: ActivationAligner(min_support=3), negatives.SMALL, 1)[1]


def test_g1_cells_have_the_overlap_they_name() -> None:
    for overlap in planted.OVERLAPS:
        setting = planted.cell_setting(overlap, 0.2, 0.5)
        assert setting.n_features == planted.CELL
        case = stress_pair(dataclasses.replace(setting, n_rows=500), seed=0)
        assert case.left.shared.mean() == pytest.approx(overlap, abs=0.01)


def test_g1_saelens_pair_is_independent_of_ours_and_reproducible() -> None:
    small = dict(n_shared=60, n_own=30, d_source=64, d_target=80, rows=3000)
    one, two = (saelens.synthetic_pair(**small, seed=5) for _ in range(2))
    assert abs(one.pairs.source - two.pairs.source).sum() == 0 and len(one.truth) == 60
    active = np.diff(one.pairs.target.indptr)
    assert active.max() <= 8
    found = FusedAligner().fit(one.source, one.target, pairs=one.pairs).alignment_
    src, tgt = planted.accepted(found)
    assert len(src) == 0 or planted.is_right(src, tgt, one.truth).mean() >= 0.9


# G2, G3.


def test_g2_and_g3_two_seeds(zoo: Zoo) -> None:
    fused, plain = copies.seeds(FusedAligner, [ActivationAligner], zoo)
    assert plain.passed is None and "refused" not in fused.measured
    assert 0.3 < fused.measured["pw_mcc"] < 0.9 and fused.measured["dual_shared"] > 100
    assert fused.passed is (fused.measured["cosine_from_0.7"] >= 1 - row.LEVEL)
    first = copies.evidence(zoo)[0]
    assert first.passed and first.measured["rank_median"] <= 2 and first.measured["shuffled_rank_median"] > 300


def test_g2_without_a_second_sae_says_so(zoo: Zoo) -> None:
    (found,) = copies.seeds(FusedAligner, [], dataclasses.replace(zoo, second_sae=None))
    assert found.passed is None and "no second SAE" in found.text()


def test_no_document_is_in_two_parts(zoo: Zoo) -> None:
    found = zoo.parts(*zoo.pairs_of_models()[0])
    assert found.unseen is not None
    docs = [set(np.unique(p.docs)) for p in (found.fit, found.heldout, found.unseen)]
    assert not docs[0] & docs[1] and not (docs[0] | docs[1]) & docs[2]
    topics = [{zoo.corpus.texts[i].topic for i in d} for d in docs]
    assert len(topics[2]) == 7 and not topics[2] & (topics[0] | topics[1])


# G4, G5.


def test_g4_counts_against_the_ceiling_and_chance_fails_it(zoo: Zoo) -> None:
    rows = across.across([ActivationAligner, RandomAligner], zoo)
    assert [r.method for r in rows] == ["activation", "random"] * 2
    top, found = rows[0], rows[2]
    assert top.passed and found.passed and "of_ceiling" not in top.measured
    assert found.measured["of_ceiling"] == found.measured["accepted"] / top.measured["accepted"]
    assert found.measured["unseen_corr"] > 0.3 and found.measured["heldout_corr_of_best_300"] > 0.3
    assert rows[1].passed is False and rows[3].passed is False


def test_g5_steers_along_accepted_matches(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(across, "TEXTS", 6)
    monkeypatch.setattr(across, "MATCHES", 6)
    (found,) = across.causal(ActivationAligner, zoo)
    assert found.measured["n_matches"] == 6 and found.measured["agreement_ceiling"] > 0.5, found.text()
    assert found.passed is (found.measured["p_matched"] <= row.LEVEL)
    (none,) = across.causal(RandomAligner, zoo)
    assert none.passed is False, none.text()


def test_g4_halves_of_the_corpus(zoo: Zoo) -> None:
    seeds, pair = across.steady(ActivationAligner, zoo)
    assert seeds.passed is None and "halves" in pair.case and pair.measured["accepted"] > 100
    assert 0.1 < pair.measured["in_a_half"] < 1 and 0.1 < pair.measured["two_halves_overlap"] < 1, pair
    # Coming back is no evidence of being right: this one does not look at the corpus.
    blind = across.steady(RandomAligner, zoo)[1]
    assert blind.measured["in_a_half"] == 1


def test_g5_stitched_models_run_on(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(across, "STITCHED", 12)
    rows = across.stitched(zoo)
    assert len(rows) == 2 and rows[0].case.split(", ")[0].split(" → ") == rows[1].case.split(", ")[0].split(" → ")[::-1]
    for found in (r.measured for r in rows):
        assert found["recovered_stitched"] > 0.4 > found["recovered_rotated"], found
    assert all(r.passed for r in rows)


# G6.


def test_g6_nothing_is_found_where_nothing_is(parts: tuple[tuple[Any, Any], Parts]) -> None:
    views, real = parts
    wrong = negatives.shuffled_documents(real, 0)
    assert (wrong.fit.target.sum(), wrong.fit.target.nnz) == pytest.approx((real.fit.target.sum(), real.fit.target.nnz))
    assert negatives.nothing(FusedAligner, views, wrong, 0)[1]
    turned = (views[0], negatives.shuffled_directions(views[1], 0))
    assert negatives.nothing(FusedAligner, turned, real, 0)[1]
    # Without the control it is no negative, and activations do not see that directions were shuffled.
    assert not negatives.nothing(FusedAligner, views, real, 0)[1]
    assert not negatives.nothing(ActivationAligner, turned, real, 0)[1]


def test_g6_removed_counterparts_are_not_replaced(parts: tuple[tuple[Any, Any], Parts]) -> None:
    measured, good = negatives.planted_substitutes(FusedAligner, 0)
    assert good and measured["sources"] > 100
    assert not negatives.planted_substitutes(ActivationAligner, 0)[1]
    found, good = negatives.substitutes(FusedAligner, *parts, 0)
    assert found["removed"] == negatives.HALVES * (found["accepted"] // 2) > 400
    # Partners of split concepts are right and were known before.
    assert good and found["accepted_again"] == found["of_these_known_splits"] + round(
        found["substitutes"] * found["removed"]
    )
    assert not negatives.substitutes(ActivationAligner, *parts, 0)[1]


def test_g6_untrained_model(zoo: Zoo) -> None:
    side = zoo.adapter("zoo:mistral")
    texts = [t.text for t in zoo.corpus][:16]
    one, two = (negatives.untrained(side, texts, 0) for _ in range(2))
    assert np.array_equal(one.dictionary.directions(), two.dictionary.directions())
    assert one.space.id == two.space.id != side.space.id
    weights = [s.language.model.model.layers[0].mlp.up_proj.weight for s in (one, two, side)]
    assert torch.equal(weights[0], weights[1]) and not torch.allclose(weights[0], weights[2], atol=1e-3)
    fires = one.encode(one.language.render_many(texts)).tokens
    assert len(np.unique(fires.indices)) > 0.2 * one.space.n_features


# Rows, table, command.


def test_a_refused_case_is_a_failed_row_with_the_reason() -> None:
    def refuse() -> row.Finding:
        raise TransferError("There is nothing here.", "Bring something.")

    found = row.judged("G0", "case", "m", "all", refuse)
    assert found.passed is False and "nothing here" in found.text()


def test_numbers_do_not_round_up_to_all() -> None:
    made = row.Row("G1", "c", "m", {"a": 0.99971, "b": 1.0, "c": float("nan"), "d": 12345, "e": True}, "x", None, 0.1)
    assert made.text() == "a 0.99971, b 1.000, c -, d 12,345, e True"
    assert made.to_dict()["measured"]["c"] is None
    assert "G1" in climb.table([made]) and "\x1b" not in climb.table([made])
    drawn = climb.table([dataclasses.replace(made, case="[red]x")], width=200)
    assert "[red]x" in drawn and "\x1b" in drawn and "1 are context" in climb.table([made])


def test_impossible_plans_are_refused() -> None:
    for change in ({"rungs": ("G7",)}, {"rungs": ()}, {"draws": 1}, {"stress": 0.0}, {"sizes": (5,)}):
        with pytest.raises(TransferError):
            climb.Plan(**change)  # pyright: ignore[reportArgumentType]
    one = Zoo(("zoo:llama",), None, Corpus("none", ()), Path("runs"))
    with pytest.raises(TransferError, match="two models"):
        list(climb.climb(climb.Plan(rungs=("G2", "G4")), one))


@pytest.fixture
def command(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """``transfer align ladder`` on a tiny model and 40 texts, as typed."""
    lines = [json.dumps({"text": t.text, "topic": t.topic}) for t in load_corpus("bundled:requests")][:40]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    monkeypatch.setenv("TRANSFER_RUNS", str(tmp_path / "runs"))

    def run(*args: str) -> tuple[int, str, str]:
        fixed = ["--model", f"path:{tiny_llama}", "--corpus", str(tmp_path / "texts.jsonl"), "--sizes", "200"]
        monkeypatch.setattr(sys, "argv", ["transfer", "align", "ladder", *fixed, *args])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_command_prints_saves_and_is_strict_on_demand(command: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "ladder.json"
    code, printed, _ = command("--rungs", "G0", "--method", "random", "--json", "--out", str(out))
    rows = json.loads(printed)
    assert code == 0 and [r["passed"] for r in rows] == [False, False] and json.loads(out.read_text()) == rows
    assert set(rows[0]) == {"rung", "case", "method", "measured", "expected", "passed", "seconds"}
    assert rows[1]["measured"]["logit_change"] <= copies.LOGITS
    code, printed, _ = command("--rungs", "G0", "--method", "random", "--strict", "--quiet")
    assert code == 1 and "FAIL" in printed and "0 passed, 2 failed" in printed


def test_command_refuses_what_it_does_not_know(command: Callable[..., Any], tmp_path: Path) -> None:
    code, printed, err = command("--rungs", "G1", "--out", str(tmp_path))
    assert code == 2 and not printed and "is a folder" in err
    for args in (("--rungs", "G9"), ("--method", "magic", "--rungs", "G1"), ("--sizes", "many")):
        code, printed, err = command(*args)
        assert code != 0 and not printed and args[1] in err


@pytest.mark.slow
def test_whole_ladder(tmp_path: Path) -> None:
    """Every rung on the zoo and the bundled requests; only substitutes in real spaces and the hardest cell may fail."""
    zoo = Zoo(
        ("zoo:llama", "zoo:mistral", "zoo:qwen"), "zoo:llama/sae_seed1", load_corpus("bundled:requests"), tmp_path
    )
    rows = list(climb.climb(climb.Plan(stress=0.3), zoo))
    assert {r.rung for r in rows} == set(climb.RUNGS)
    failed = [f"{r.rung} {r.case}: {r.text()}" for r in rows if r.passed is False]
    allowed = ("overlap 30%, noise 0.6, children 0.5", "counterparts removed")
    assert not [f for f in failed if not any(a in f for a in allowed)], failed
