from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from models.adapter import max_over_tokens
from tests.test_explain import space
from transfer.core.errors import TransferError
from transfer.core.files import save_arrays, write_json
from transfer.core.keys import SCHEMA
from transfer.core.span import Span
from transfer.core.store import ActivationStore
from transfer.core.texts import Corpus, Text
from transfer.evidence.spans import Spans
from transfer.text.words import WordCounts, describe


def word_store(folder: Path, corpus: Corpus, fires: list[dict[str, float]]) -> ActivationStore:
    """A store whose tokens are words with the blank before them; feature ``i`` fires on the words of ``fires[i]``."""
    ends, marks, rows, columns, values = [], [], [], [], []
    for d, text in enumerate(corpus):
        for match in re.finditer(r"\s*\S+", text.text):
            for feature, by_word in enumerate(fires):
                value = by_word.get(match.group().strip().casefold(), 0.0)
                if value:
                    rows.append(len(ends))
                    columns.append(feature)
                    values.append(value)
            ends.append(len(text.text[: match.end()].encode()))
            marks.append(d)
    shape = (len(ends), len(fires))
    tokens = sp.csr_matrix((np.array(values, dtype=np.float32), (rows, columns)), shape=shape)
    docs, peaks = max_over_tokens(tokens, np.array(marks, dtype=np.int32), len(corpus))
    docs.sort_indices()
    peaks.sort_indices()
    arrays = {"values": tokens.data, "indices": tokens.indices, "indptr": tokens.indptr}
    places = {"doc": np.array(marks, dtype=np.int32), "end": np.array(ends, dtype=np.int32)}
    save_arrays(folder / "tokens-00000.safetensors", {**arrays, **places})
    arrays = {"values": docs.data, "indices": docs.indices, "indptr": docs.indptr}
    save_arrays(folder / "docs-00000.safetensors", {**arrays, "position": (peaks.data - 1).astype(np.int32)})
    meta = {
        "schema": SCHEMA,
        "space": dataclasses.asdict(space(len(fires))),
        "corpus_hash": corpus.hash,
        "doc_ids": [t.id for t in corpus],
        "n_tokens": len(ends),
        "shards": 1,
        "counts": {},
    }
    write_json(folder / "meta.json", meta)
    return ActivationStore.load(folder)


NOUNS = ("door", "gate", "roof", "tree", "lamp", "boat", "desk", "shoe", "pond", "kite")


def garden(folder: Path) -> tuple[ActivationStore, Corpus]:
    """Feature 0 fires on colours with ten strengths, 1 on ``paint``, 2 nowhere; every fifth text has no colour."""
    colours = [f"colour{i}" for i in range(10)]
    texts = [
        f"please {'paint' if i % 2 else 'draw'} the {NOUNS[i % 10]} near {NOUNS[(i // 10) % 10]}{i}"
        + (f" in {colours[i % 10]}" if i % 5 else " today")
        for i in range(60)
    ]
    corpus = Corpus("garden", tuple(Text(f"d{i}", t) for i, t in enumerate(texts)))
    strengths = {c: 1.0 + i for i, c in enumerate(colours)}
    return word_store(folder, corpus, [strengths, {"paint": 2.0}, {}]), corpus


def test_strata_cover_the_range_and_draws_repeat(tmp_path: Path) -> None:
    store, corpus = garden(tmp_path)
    spans = Spans(store, corpus)
    drawn = spans.stratified([0, 2], strata=4, per_stratum=2, seed=3)
    assert drawn == spans.stratified([0, 2], strata=4, per_stratum=2, seed=3)
    assert drawn != spans.stratified([0, 2], strata=4, per_stratum=2, seed=4)
    found = drawn[0]
    assert len(found) == 8 and drawn[2] == []
    values = [s.value for s in found]
    assert values == sorted(values, reverse=True)
    quantiles = [s.quantile for s in found]
    assert all(q is not None for q in quantiles)
    # Two of each quarter of the 48 positive documents (values are tied within a quarter's edge).
    positives = store.docs[:, [0]].toarray().ravel()
    positives = np.sort(positives[positives > 0])[::-1]
    for stratum in range(4):
        part = positives[stratum * 12 : stratum * 12 + 12]
        assert all(part.min() <= v <= part.max() for v in values[2 * stratum : 2 * stratum + 2])
    top = spans.top([0], k=8)[0]
    assert min(s.value for s in top) > min(values)  # top examples hide the weak end
    assert all(s.token.startswith("colour") for s in found)


def test_silent_texts_do_not_fire(tmp_path: Path) -> None:
    store, corpus = garden(tmp_path)
    spans = Spans(store, corpus)
    silent = spans.silent([0, 1], k=6, seed=1)
    assert len(silent[0]) == len(silent[1]) == 6
    assert all("colour" not in s.text and s.value == 0 and s.marked() == s.text for s in silent[0])
    assert all("paint" not in s.text for s in silent[1])
    assert len(spans.silent([0], k=100)[0]) == 12


def test_near_duplicates_are_shown_once(tmp_path: Path) -> None:
    long = "could you tell me how I might paint the old wooden garden fence behind our house"
    texts = (f"{long} today", f"{long} soon", "paint  it", "PAINT it", "we paint boats in the harbour")
    corpus = Corpus("c", tuple(Text(f"d{i}", t) for i, t in enumerate(texts)))
    store = word_store(tmp_path, corpus, [{"paint": 2.0}])
    assert [s.doc_id for s in Spans(store, corpus).top([0])[0]] == ["d0", "d1", "d2", "d4"]
    assert [s.doc_id for s in Spans(store, corpus, near=0.7).top([0])[0]] == ["d0", "d2", "d4"]
    assert len(Spans(store, corpus, near=0.7).stratified([0], strata=1, per_stratum=5)[0]) == 3
    with pytest.raises(TransferError, match="between 0 and 1"):
        Spans(store, corpus, near=7).top([0])


def test_a_wrong_mark_stands_where_the_feature_is_silent(tmp_path: Path) -> None:
    store, corpus = garden(tmp_path)
    spans = Spans(store, corpus)
    shown = spans.top([0], k=12)[0]
    wrong = spans.mismarked(0, shown, seed=2)
    assert all(
        w is not None and w.text == s.text and w.token and w.start != s.start for w, s in zip(wrong, shown, strict=True)
    )
    assert wrong == spans.mismarked(0, shown, seed=2)
    assert len({w.start for w in wrong if w}) > 1
    everywhere = Corpus("all", (Text("a", "paint paint"),))
    store = word_store(tmp_path / "all", everywhere, [{"paint": 1.0}])
    always = Spans(store, everywhere)
    assert always.mismarked(0, always.top([0])[0]) == [None]


def test_a_long_text_is_shown_around_the_mark() -> None:
    text = " ".join(f"word{i}" for i in range(200))
    start = text.index("word90")
    shown = Span("d", text, start, start + 6, 1.0).around(80)
    assert "«word90»" in shown and shown.startswith("… word") and shown.endswith(" …") and len(shown) < 100
    assert Span("d", "a short text", 2, 7, 1.0).around(80) == "a «short» text"
    assert Span("d", "nothing marked", 0, 0, 0.0).around(80) == "nothing marked"
    assert Span("d", "x" * 500, 250, 251, 1.0).around(40).count("«") == 1


def test_pairs_of_words_say_more_than_words() -> None:
    inside = [f"paint the garden fence {NOUNS[i]} now" for i in range(8)]
    rest = [f"the garden has a {x} and one fence {i}" for i in range(30) for x in ("gate", "shed")]
    pairs = WordCounts(inside + rest, pairs=True)
    found = pairs.contrast(inside, n=4)
    assert "garden fence" in found
    assert not {"garden", "fence"} & set(found)  # part of the pair, left out
    assert not any(w.split()[0] == "the" for w in found)
    spans = [Span("d", t, 0, 5, 1.0) for t in inside]
    line = describe(spans, pairs, promotes=["brush"])
    assert line.startswith("fires on “paint”") and "garden fence" in line and line.endswith("promotes: brush")
