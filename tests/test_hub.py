"""References to data sets on the Hub: what they say, which rows they leave, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from transfer.core.errors import TransferError
from transfer.hub import HubRef, UnreachableError, chosen, load_hub, parse_hub
from transfer.tasks.preferences import load_pairs


def some(n: int = 20) -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"id": i, "human": i % 2 == 0, "text": f"text {i}"} for i in range(n)])


def test_a_reference_says_file_rows_and_columns():
    assert parse_hub("hub:a/b") == HubRef("a/b")
    found = parse_hub("hub:a/b@1f?config=c&split=test&file=x/y.jsonl.gz&rows=5&text=t&label=l&human=True")
    assert found == HubRef("a/b", "1f", "c", "test", "x/y.jsonl.gz", 5, "t", "l", (("human", "True"),))
    for ref, words in [
        ("hub:", "names no dataset"),
        ("hub:a/b?rows=x", "'x' rows"),
        ("hub:a/b?rows=0", "'0' rows"),
        ("hub:a/b?split", "cannot be read"),
    ]:
        with pytest.raises(TransferError, match=words):
            parse_hub(ref)


def test_rows_are_filtered_then_sampled_in_order_and_repeatably():
    named = parse_hub("hub:a/b?human=True&rows=4")
    one, two = (chosen("r", named, some())["id"] for _ in range(2))
    assert list(one) == list(two) == sorted(one) and len(one) == 4
    assert all(i % 2 == 0 for i in one)
    assert list(chosen("r", parse_hub("hub:a/b?rows=99"), some())["id"]) == list(range(20))
    with pytest.raises(TransferError, match="no column 'humna'.*'human'"):
        chosen("r", parse_hub("hub:a/b?humna=True"), some())
    with pytest.raises(TransferError, match="leaves no row"):
        chosen("r", parse_hub("hub:a/b?human=maybe"), some())


def test_what_cannot_be_reached_is_told_apart():
    with pytest.raises(UnreachableError, match="Cannot load no/such@main"):
        load_hub("hub:no/such")


def test_a_task_reads_its_data_from_the_hub(monkeypatch):
    from datasets import Dataset

    rows = Dataset.from_list(
        [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": "a"}]
    )
    monkeypatch.setattr("transfer.tasks.rows.load_hub", lambda ref: rows)
    found = load_pairs("hub:some/pairs@main?split=filtered")
    assert (found.name, len(found), found.left_out) == ("some/pairs", 1, {"equal answers": 1})
