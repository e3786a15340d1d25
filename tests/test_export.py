"""Export: every match and split with its space ids, filtered by q, in three formats that read back the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from transfer.alignment import export as module
from transfer.alignment.export import export, split_edges, table
from transfer.core.alignment import Alignment
from transfer.core.errors import TransferError
from transfer.core.space import FeatureSpace


def space(model: str = "zoo:one", n: int = 6) -> FeatureSpace:
    return FeatureSpace(model, "m", 2, f"{model}/sae", "s", n, 4, "topk-2", 3)


def alignment(**changes: Any) -> Alignment:
    """Matches 0-1 (sure), 2-2 (poor), 4-0 (untestable); 0-3 and 5-2 are splits, 3-4 carries almost nothing."""
    edges = {(0, 1): 0.9, (0, 3): 0.6, (2, 2): 0.5, (3, 4): 0.001, (4, 0): 0.7, (5, 2): 0.4}
    rows, cols = (np.array(ids) for ids in zip(*edges, strict=True))
    parts: dict[str, Any] = {
        "source": space(),
        "target": space("hub:org/two@main", 5),
        "method": "test",
        "coupling": sp.csr_matrix((np.array(list(edges.values()), dtype=np.float32), (rows, cols)), shape=(6, 5)),
        "matches": {
            "source": np.array([0, 2, 4]),
            "target": np.array([1, 2, 0]),
            "score": np.array([0.9, 0.5, 0.7]),
            "heldout_corr": np.array([0.8, 0.1, np.nan]),
            "p_value": np.array([0.001, 0.4, np.nan]),
            "q_value": np.array([0.01, 0.4, np.nan]),
            "fit_q": np.array([0.01, 0.2, 0.02]),
        },
        "converged": True,
    }
    return Alignment(**{**parts, **changes})


def pairs(frame: pd.DataFrame, kind: str) -> set[tuple[int, int]]:
    part = frame[frame["kind"] == kind]
    return set(zip(part["source"].tolist(), part["target"].tolist(), strict=True))


def test_the_table_keeps_many_to_many() -> None:
    frame, counts = table(alignment())
    assert pairs(frame, "match") == {(0, 1), (2, 2), (4, 0)}
    assert pairs(frame, "split") == {(0, 3), (5, 2)}
    assert set(frame["source_space"]) == {space().id} and set(frame["target_space"]) == {alignment().target.id}
    assert frame["mass"].tolist() == pytest.approx([0.9, 0.5, 0.7, 0.6, 0.4])
    assert frame.loc[frame["kind"] == "split", ["score", "q_value", "heldout_corr", "fit_q"]].isna().all().all()
    assert counts == {
        "matches": 3,
        "splits": 2,
        "matches_left_out": 0,
        "matches_without_q": 1,
        "splits_left_out": 0,
    }


def test_a_level_keeps_good_matches_and_their_splits() -> None:
    frame, counts = table(alignment(), q_max=0.05)
    assert pairs(frame, "match") == {(0, 1)} and pairs(frame, "split") == {(0, 3)}
    assert counts["matches_left_out"] == 2 and counts["splits_left_out"] == 1
    assert pairs(table(alignment(), q_max=0.4)[0], "split") == {(0, 3), (5, 2)}


def test_the_mass_of_a_split_can_be_set() -> None:
    assert [ids.tolist() for ids in split_edges(alignment(), 0.5)[:2]] == [[0], [3]]
    assert (3, 4) in pairs(table(alignment(), least_mass=1e-4)[0], "split")


def test_tables_read_back_equal(tmp_path: Path) -> None:
    frame, _ = table(alignment())
    for name, read in (("a.csv", pd.read_csv), ("a.parquet", pd.read_parquet)):
        answer = export(alignment(), tmp_path / name)
        assert answer["format"] == name.rpartition(".")[2] and answer["matches"] == 3 and answer["splits"] == 2
        back: Any = read(tmp_path / name)
        pd.testing.assert_frame_equal(back, frame, check_dtype=False)
    assert (tmp_path / "a.csv").read_text().splitlines()[0].startswith("kind,source_space,source,target_space,target,")
    assert "\r" not in (tmp_path / "a.csv").read_bytes().decode()


def test_a_graph_reads_back_equal(tmp_path: Path) -> None:
    import networkx as nx

    export(alignment(), tmp_path / "a.graphml")
    graph: Any = nx.read_graphml(tmp_path / "a.graphml")
    one, two = alignment().source.id, alignment().target.id
    assert graph.number_of_edges() == 5 and not graph.is_directed()
    assert graph.nodes[f"{one}:0"] == {"side": "source", "space": one, "feature": 0}
    assert graph.nodes[f"{two}:1"] == {"side": "target", "space": two, "feature": 1}
    edge = graph.edges[f"{one}:0", f"{two}:1"]
    assert edge["kind"] == "match" and edge["score"] == 0.9 and edge["q_value"] == 0.01 and edge["heldout_corr"] == 0.8
    untestable = graph.edges[f"{one}:4", f"{two}:0"]
    assert "q_value" not in untestable and untestable["score"] == 0.7
    assert graph.edges[f"{one}:0", f"{two}:3"]["kind"] == "split"
    assert graph.degree[f"{one}:0"] == 2 and graph.degree[f"{two}:2"] == 2


def test_one_space_has_two_sides(tmp_path: Path) -> None:
    import networkx as nx

    same = alignment(target=space(), coupling=sp.csr_matrix((6, 6), dtype=np.float32))
    export(same, tmp_path / "a.graphml")
    graph: Any = nx.read_graphml(tmp_path / "a.graphml")
    assert graph.number_of_edges() == 3 and not list(nx.selfloop_edges(graph))
    assert f"source:{space().id}:2" in graph and f"target:{space().id}:2" in graph


def test_nothing_matched_is_an_empty_file_with_a_header(tmp_path: Path) -> None:
    none = {name: values[:0] for name, values in alignment().matches.items()}
    empty = alignment(matches=none, coupling=sp.csr_matrix((6, 5), dtype=np.float32))
    for name in ("a.csv", "a.parquet", "a.graphml"):
        assert export(empty, tmp_path / name)["matches"] == 0
    assert len(pd.read_csv(tmp_path / "a.csv")) == 0 and "q_value" in pd.read_parquet(tmp_path / "a.parquet")


def test_refusals(tmp_path: Path) -> None:
    one = alignment()
    with pytest.raises(TransferError, match="does not say which format.*csv, parquet, graphml"):
        export(one, tmp_path / "a.txt")
    with pytest.raises(TransferError, match="Unknown export format 'xml'"):
        export(one, tmp_path / "a.csv", format="xml")
    with pytest.raises(TransferError, match="q-value lies between"):
        export(one, tmp_path / "a.csv", q_max=1.5)
    with pytest.raises(TransferError, match="must be positive"):
        export(one, tmp_path / "a.csv", least_mass=0)
    with pytest.raises(TransferError, match="is a folder"):
        export(one, tmp_path, format="csv")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.csv").write_text("mine")
    with pytest.raises(TransferError, match="--force"):
        export(one, tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text() == "mine"
    assert export(one, tmp_path / "a.csv", force=True)["matches"] == 3


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(frame: Any, alignment: Any, path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    (tmp_path / "a.csv").write_text("before")
    monkeypatch.setitem(module.WRITERS, "csv", breaks)
    with pytest.raises(TransferError, match="No space left"):
        export(alignment(), tmp_path / "a.csv", force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"] and (tmp_path / "a.csv").read_text() == "before"
