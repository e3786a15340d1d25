"""The readable form of a verb's result."""

from __future__ import annotations

from transfer.verbs.lines import lines_of


def test_nested_values_are_written_out_not_dumped() -> None:
    result = {
        "texts": {"anchor": 3, "seed": 1},
        "unused": {},
        "harvest": [{"model": "a", "nmse": 0.12345, "spans": [1, 2], "card": None}],
        "more": {"ok": True, "names": ["x", "y"]},
        "hours": None,
        "coverage_curves": [{"size": 1}],
    }
    assert lines_of(result).splitlines() == [
        "texts: anchor 3 · seed 1",
        "unused: none",
        "harvest:",
        "  model a · nmse 0.123",
        "more:",
        "  ok: yes",
        "  names:",
        "    x",
        "    y",
        "hours: not known",
    ]


def test_wide_tables_keep_the_columns_a_reader_needs() -> None:
    row = {"source": "a", "target": "b", "method": "fused", "n_matches": 2, "n_features": [5, 6], "q_value_max": 0.1}
    assert lines_of({"alignments": [row]}) == "alignments:\n  source a · target b · method fused · n_matches 2"
