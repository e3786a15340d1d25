"""A configuration makes the generator and the options that it names, and the stage keeps the gate."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from models.adapter import Adapter
from models.cache import AnswerCache
from models.chat import Answer, Chat
from tests.test_arms import report, space
from tests.test_endpoint import Reply, completion, serving
from transfer.core.config import SynthSection
from transfer.core.errors import StageError, TransferError
from transfer.core.experiment import load_experiment
from transfer.core.files import save_arrays
from transfer.core.space import FeatureSet
from transfer.core.span import Span
from transfer.core.texts import Corpus, Text
from transfer.pipeline import Pipeline
from transfer.synth import stage as synth_stage
from transfer.synth.drafts import Target
from transfer.synth.writing import make_chat, make_generator, make_options
from transfer.synthesis import steering_vectors, synthesise
from transfer.text.words import WordCounts

SENTENCES = [
    "How do I bake a chocolate cake without eggs?",
    "Please write a short poem about the autumn rain in Lisbon.",
    "What is the capital of Mongolia, and how many people live there?",
    "Give me three ideas for a birthday present under 20 dollars.",
]


def settings(**values: Any) -> SynthSection:
    return SynthSection.model_validate({"max_new_tokens": 6, "batch": 8, **values})


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path) -> Adapter:
    return Adapter.load(f"path:{tiny_llama}", f"path:{tiny_llama}/sae")


class Fixed:
    name = "fixed"

    def complete(self, chats: list[Chat]) -> list[Answer]:
        return [Answer('["an answer in plain words"]', 1, 1) for _ in chats]


def test_each_generator_is_the_one_named(adapter: Adapter) -> None:
    kinds = {
        "steered": make_generator(settings(), adapter).name,
        "guided": make_generator(settings(generator="guided", guide=1.0), adapter).name,
        "chat": make_generator(settings(generator="chat", chat="local:x"), adapter, chat=Fixed()).name,
    }
    assert all(name.startswith(f"{kind}:") for kind, name in kinds.items())
    pair = make_generator(settings(generator="chat", chat="local:x", format="preference"), adapter, chat=Fixed())
    assert pair.format_name == "preference"  # type: ignore[attr-defined]
    for wrong in ("qwen", "http://localhost:1/v1", "ftp://x#y"):
        with pytest.raises(TransferError, match="Write local:"):
            make_chat(settings(generator="chat", chat=wrong))


def test_options_follow_the_settings(adapter: Adapter) -> None:
    plain = make_options(settings(), adapter, targets=[Target(adapter, {}, np.zeros(64))], evaluation=[Text("a", "b")])
    assert plain.search is None and plain.targets == () and plain.retries == 0
    # The whole of an evaluation text is protected without being asked for, a part of it is not.
    guard = make_options(settings(), adapter, evaluation=[Text("a", "one two three four five")]).protected
    assert "One two, three four FIVE!" in guard and "one two three four" not in guard and "..." not in guard
    spans = {1: [Span("d", "the red apple tree", 4, 7, 1.0)]}
    words = WordCounts(["the red apple tree", "a dog"])
    every = make_options(
        settings(
            generator="chat",
            chat="local:x",
            require="both",
            retries=2,
            retry_budget=9,
            duplicates="minhash",
            decontaminate=3,
        ),
        adapter,
        targets=[Target(adapter, {}, np.zeros(64))],
        evaluation=[Text("a", "one two three four")],
        spans=spans,
        background=words,
    )
    assert (every.require, every.retries, every.retry_budget, every.duplicates) == ("both", 2, 9, "minhash")
    assert "zero one two three" in every.protected and len(every.targets) == 1
    assert every.spans == {1: ["the «red» apple tree"]} and "red" in every.descriptions[1]
    search = make_options(settings(search=True, perplexity_cap=1.5, probes=4, search_features=3), adapter).search
    assert search and (search.cap, search.probes, search.features) == (1.5, 4, 3)


def test_search_guidance_and_retries_work_together_on_a_model(adapter: Adapter) -> None:
    docs = adapter.encode_texts(SENTENCES)[0]
    live = np.unique(docs.indices)[:3].astype(np.int64)
    asked = FeatureSet(adapter.space, live, "missing", labels=("a",) * len(live))
    delta = np.full(adapter.space.n_features, 0.01, dtype=np.float32)
    how = settings(generator="guided", search=True, probes=3, search_features=2, retries=1, guide=5.0)
    directions = adapter.dictionary.directions()

    def once() -> Any:
        return synthesise(
            adapter,
            make_generator(how, adapter),
            asked,
            {int(i): SENTENCES for i in live},
            delta,
            missing=asked,
            anchor_texts=SENTENCES,
            steering=steering_vectors(directions, 1.0),
            strengths=(0.0, 2.0),
            n=2,
            m=1,
            few_shot=2,
            options=make_options(how, adapter),
        )

    made = once()
    assert made == once()
    assert {c.step for c in made.candidates} == {0, 1, 2} and len(made.info["strength_search"]["tried"]) <= 3
    assert sum(made.rejected().values()) + len(made.kept) == len(made.candidates)
    assert {c.feature for c in made.candidates if c.step == 0} < set(live.tolist())


def written(body: dict[str, Any], n: int) -> Reply:
    subject = ("bread", "boats", "rain", "poems", "tea", "trains")[n % 6]
    return completion(json.dumps([f"Please say how {subject} of kind {n} are made today."] * 2), 100, 10)


def test_what_a_chat_generator_took_is_told_and_capped(
    adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSFER_RUNS", str(tmp_path))
    live = np.unique(adapter.encode_texts(SENTENCES)[0].indices)[:3].astype(np.int64)
    asked = FeatureSet(adapter.space, live, "missing", labels=("a",) * len(live))
    delta = np.zeros(adapter.space.n_features, dtype=np.float32)

    def usage(url: str, **asking: Any) -> dict[str, Any]:
        how = settings(generator="chat", chat=f"{url}#m", per_request=2, asking={"served_by": "stub", **asking})
        generator = make_generator(how, adapter, account="mine")
        made = [
            synthesise(
                adapter,
                generator,
                asked,
                {int(i): SENTENCES for i in live},
                delta,
                missing=asked,
                anchor_texts=SENTENCES,
                n=2,
                m=2,
                seed=seed,
            ).info["usage"]
            for seed in (0, 1)
        ]
        assert all(part["n_answered"] + part["n_cached"] == 6 for part in made)
        return {name: made[0][name] + made[1][name] for name in made[0]}

    with serving(written) as stub:
        paid = usage(stub.url, price_prompt=1.0, price_written=10.0)
        assert paid["n_answered"] == len(stub.bodies) == 12 and (paid["n_prompt"], paid["n_written"]) == (1200, 120)
        assert paid["cost"] == pytest.approx(12 * (100 * 1 + 10 * 10) / 1e6)
        again = usage(stub.url, price_prompt=1.0, price_written=10.0)
        assert len(stub.bodies) == 12 and again["cost"] == 0 == again["n_answered"]
        assert (again["n_cached_prompt"], again["n_cached_written"]) == (1200, 120)
    cache = AnswerCache(tmp_path / ".store" / "answers.sqlite")
    assert cache.spent("endpoint:m", "mine/synth") == (1200, 120) and cache.spent("endpoint:m", "mine") == (0, 0)
    cache.close()
    with serving(lambda *_: (503, {"retry-after": "0"}, b"no")) as stub:
        with pytest.raises(StageError, match="cap"):  # what was spent before counts
            usage(stub.url, max_tokens=1400, served_by="another")
        assert not stub.bodies
        with pytest.raises(StageError, match="failed 2 times"):
            usage(stub.url, retries=1, concurrency=1, served_by="another")
        assert len(stub.bodies) == 2
    with pytest.raises(TransferError, match="NO_SUCH_KEY holds no key"):
        usage("http://localhost:1/v1", key_variable="NO_SUCH_KEY")


def test_the_stage_refuses_harmful_classes_before_it_begins(tmp_path: Path) -> None:
    experiment = load_experiment("demo", ["data.source=mine.jsonl"])
    nothing: Any = None
    with pytest.raises(TransferError, match="allow_harmful"):
        synth_stage.synth(
            "llama", "llama", nothing, nothing, nothing, nothing, nothing, nothing, tmp_path / "out", experiment
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("writer", "kind"), [("s", "guided"), ("w", "steered")])
def test_only_the_source_itself_is_steered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, kind: str
) -> None:
    """Directions of the source's residual stream mean nothing in another writer's."""

    class Asked(Exception):
        pass

    seen: dict[str, Any] = {}

    def watched(adapter: Any, generator: Any, features: Any, examples: Any, delta: Any, **how: Any) -> Any:
        seen.update(how, scorer=adapter, generator=generator)
        raise Asked

    def maker(settings: SynthSection, adapter: Any, pool: Any, account: str) -> Any:
        return settings.generator, adapter.name

    span = Span("a", "a mild text", 2, 6, 1.0)
    monkeypatch.setattr(synth_stage, "synthesise", watched)
    monkeypatch.setattr(synth_stage, "make_generator", maker)
    monkeypatch.setattr(synth_stage, "make_options", lambda *args, **more: None)
    monkeypatch.setattr(synth_stage, "top_spans", lambda store, texts, wanted, k: {i: [span] for i in wanted})
    save_arrays(tmp_path / "delta.safetensors", {"delta": np.ones(40, dtype=np.float32)})
    directions = SimpleNamespace(directions=lambda: np.ones((40, 8), dtype=np.float32))
    adapters: Any = {n: SimpleNamespace(name=n, space=space(n), dictionary=directions) for n in ("s", "w")}
    corpus = Corpus("anchor", (Text("a", "a mild text", "benign"),))
    plan = {"own": [1], "random": [], "mapped": {}, "shuffled": {}}
    found = report("s", [1])
    known = dataclasses.replace(found.relevant, descriptions=("topic tea",) * 40)
    covered = {"s": (dataclasses.replace(found, relevant=known), tmp_path), "w": (report("w", [1]), tmp_path)}
    store: Any = SimpleNamespace(space=space("s"))
    experiment = load_experiment("demo", ["synth.generator=guided", "synth.search=true"])
    with pytest.raises(Asked):
        synth_stage.synth(
            "s",
            writer,
            adapters,
            store,
            plan,
            covered,
            dict.fromkeys(("anchor", "seed"), corpus),
            {"w": {}},
            tmp_path,
            experiment,
        )
    assert seen["generator"] == (kind, writer) and seen["scorer"] is adapters["s"]
    assert (seen["steering"] is None) == (writer != "s")


def test_what_was_written_depends_on_the_evaluation_texts(tmp_path: Path) -> None:
    pipeline = Pipeline(load_experiment("demo"), tmp_path, ["test"])
    assert pipeline.experiment.synth.decontaminate == 0
    assert pipeline._protected == pipeline.corpora["evaluation"].hash
