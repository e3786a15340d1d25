from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from transfer.core.errors import TransferError
from transfer.corpus import load_corpus


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n", "utf8")
    return str(path)


def test_conversations_json_lists_and_long_fields(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "yes?"},
                      {"role": "user", "content": "a joke"}], "label": "a"},
    ]  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps(rows))
    assert [t.text for t in load_corpus(str(tmp_path / "x.json"))] == ["hi there\n\na joke"]
    shared = [{"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "no"}]}]
    (tmp_path / "y.jsonl").write_text("\n".join(map(json.dumps, shared)))
    assert [t.text for t in load_corpus(str(tmp_path / "y.jsonl"))] == ["hello"]
    silent = {"messages": [{"role": "assistant", "content": "hello"}]}
    (tmp_path / "z.jsonl").write_text(json.dumps(silent))
    with pytest.raises(TransferError, match="empty text in column 'messages'"):
        load_corpus(str(tmp_path / "z.jsonl"))
    (tmp_path / "o.json").write_text("{}")
    with pytest.raises(TransferError, match="not a JSON list"):
        load_corpus(str(tmp_path / "o.json"))
    (tmp_path / "long.csv").write_text("text\n" + "word " * 50_000 + "\n")
    assert [len(t.text) for t in load_corpus(str(tmp_path / "long.csv"))] == [5 * 50_000 - 1]
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(TransferError, match="line 1"):
        load_corpus(str(tmp_path / "deep.jsonl"))
    (tmp_path / "digits.jsonl").write_text('{"text": ' + "1" * 6000 + "}\n")
    with pytest.raises(TransferError, match="line 1"):
        load_corpus(str(tmp_path / "digits.jsonl"))


def test_the_bundled_requests_load_with_labels_topics_and_splits():
    corpus = load_corpus("bundled:requests")
    assert corpus.name == "requests" and len(corpus) >= 1200
    assert {t.label for t in corpus} == {"benign", "harmful"}
    assert {t.split for t in corpus} == {"anchor", "seed", "evaluation"}
    anchor, seed = corpus.split("anchor"), corpus.split("seed")
    assert {t.topic for t in seed} < {t.topic for t in anchor}


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path: Path):
    ref = write(tmp_path / "a.jsonl", [{"text": "one\u2028two"}, {"text": "three\u0085four"}, {"text": "five\x0csix"}])
    assert [t.text for t in load_corpus(ref)] == ["one\u2028two", "three\u0085four", "five\x0csix"]


def test_kinds_of_file_give_the_same_corpus(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"id": "a", "text": 'say "hi",\nplease', "label": "0"}, {"id": "b", "text": "ünï", "label": "1"}]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    (tmp_path / "x.csv").write_text('id,text,label\na,"say ""hi"",\nplease",0\nb,ünï,1\n', "utf8")
    (tmp_path / "x.tsv").write_text('id\ttext\tlabel\na\t"say ""hi"",\nplease"\t0\nb\tünï\t1\n', "utf8")
    (tmp_path / "bom").mkdir()
    (tmp_path / "bom/x.csv").write_text('\ufeffid,text,label\r\na,"say ""hi"",\nplease",0\r\nb,ünï,1\r\n', "utf8")
    write(tmp_path / "x.jsonl", rows)
    found = [load_corpus(str(tmp_path / n)).hash for n in ("x.jsonl", "x.csv", "x.tsv", "x.parquet", "bom/x.csv")]
    assert len(set(found)) == 1


def test_columns_can_be_named_and_white_space_is_cut(tmp_path: Path):
    ref = write(tmp_path / "a.jsonl", [{"prompt": "  hello \n", "toxic": 1, "area": "x", "part": "seed"}])
    corpus = load_corpus(
        ref, text_column="prompt", label_column="toxic", topic_column="area", split_column="part", name="mine"
    )
    (text,) = corpus.texts
    assert (text.id, text.text, text.label, text.topic, text.split) == ("row0000000", "hello", "1", "x", "seed")
    assert corpus.name == "mine"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no rows"),
        ('{"text": "a"}\n{"text": \n', "line 2 is not valid JSON (Expecting value, column 10)"),
        ('{"text": "a"}\n\n["a"]\n', "line 3 is a JSON list"),
        ('{"text": "a"}\n{"text": "  "}\n', "line 2 has an empty text"),
        ('{"text": "a"}\n{"label": "b"}\n', "line 2: column 'text' is missing"),
        ('{"text": 3}\n', "line 1: column 'text' is a int"),
        ('{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n', "line 2 repeats the id '1' of"),
        ('{"id": null, "text": "a"}\n', "line 1 has an empty 'id'"),
        ('{"texts": "a"}\n', "no column 'text'. Did you mean 'texts'?"),
        ('{"text": "a \\ud800 b"}\n', "line 1 holds half of a surrogate pair"),
    ],
)
def test_bad_jsonl_is_named_with_its_line(tmp_path: Path, content: str, says: str):
    path = tmp_path / "bad.jsonl"
    path.write_text(content, "utf8")
    with pytest.raises(TransferError) as caught:
        load_corpus(str(path))
    assert says in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    (tmp_path / "latin.csv").write_bytes(b"id,text\n1,a\n2,\xe9\n")
    (tmp_path / "short.csv").write_text("id,text\n1\n", "utf8")
    (tmp_path / "long.csv").write_text("id,text\n1,two, three\n", "utf8")
    (tmp_path / "quote.csv").write_text('id,text\n1,"two\n', "utf8")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    (tmp_path / "notes.docx").write_bytes(b"x")
    for name, says in {
        "latin.jsonl": "line 2 is not UTF-8",
        "latin.csv": "line 3 is not UTF-8",
        "short.csv": "line 2 does not have the columns",
        "long.csv": "line 2 does not have the columns",
        "quote.csv": "is broken after line",
        "broken.parquet": "not a readable parquet",
        "notes.docx": "no known kind (.docx)",
        "absent.jsonl": "does not exist",
        ".": "is a folder",
    }.items():
        with pytest.raises(TransferError, match=says.replace("(", r"\(").replace(")", r"\)")):
            load_corpus(str(tmp_path / name))
    with pytest.raises(TransferError, match="Did you mean 'requests'"):
        load_corpus("bundled:request")


def test_a_hub_dataset_is_read_through_datasets(monkeypatch: pytest.MonkeyPatch):
    asked = []

    class Rows(list):
        column_names = ("text", "label")
        features = {"label": SimpleNamespace(int2str=lambda i: ["benign", "harmful"][i])}

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return Rows([{"text": "a", "label": 1}, {"text": "b", "label": 0}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    corpus = load_corpus("hub:owner/set@abc?split=test")
    assert asked == [(("owner/set", None), {"split": "test", "revision": "abc", "data_files": None})]
    assert [t.label for t in corpus] == ["harmful", "benign"] and corpus.name == "owner/set"


def test_no_network_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub.\nMore lines")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(TransferError) as caught:
        load_corpus("hub:owner/set")
    assert "owner/set@main" in str(caught.value) and "Couldn't reach the Hub" in str(caught.value)
    assert "\n" not in str(caught.value) and caught.value.__suppress_context__
