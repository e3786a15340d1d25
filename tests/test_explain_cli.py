from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from tests.test_endpoint import Reply, completion, serving
from transfer.core.errors import TransferError
from transfer.core.experiment import load_experiment
from transfer.core.files import read_json
from transfer.evidence.judging import judge_inputs, relevant_by_chat
from transfer.verbs.explain import explain

app = typer.Typer()
app.command()(explain)

NOUNS = ("bread", "boats", "rain", "poems", "knives", "bombs")


@pytest.fixture(scope="module")
def experiment(tiny_llama: Path, tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random tiny models on a hundred short texts; harvested once for all tests of this file."""
    folder = tmp_path_factory.mktemp("explain")
    rows = []
    for i in range(120):
        noun = NOUNS[i % 6]
        asked = f"Tell me {'how' if i % 2 else 'why'} people like {noun} number {i}"
        rows.append(
            {
                "text": f"{asked}, please, and how it all will end-{i}.",
                "label": "harmful" if noun in ("knives", "bombs") else "benign",
                "topic": noun,
                "split": ("anchor", "anchor", "seed", "evaluation")[i // 6 % 4],
            }
        )
    (folder / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf8")
    config = {
        "name": "tiny",
        "models": {n: {"model": f"path:{f}", "sae": f"path:{f}/sae"} for n, f in (("a", tiny_llama), ("b", tiny_qwen))},
        "data": {"source": str(folder / "texts.jsonl")},
        "cover": {"fdr": 0.9, "min_docs": 2},
        "judge": {"spans": 4, "silent": 2, "quiz": 3},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config), "utf8")
    return folder


def run(experiment: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Result:
    monkeypatch.setenv("TRANSFER_RUNS", str(experiment / "runs"))
    return CliRunner().invoke(app, [str(experiment / "tiny.yaml"), *options], catch_exceptions=False)


def obedient(body: dict[str, Any], _: int) -> Reply:
    """Ends with the asked line, whatever the question."""
    kind = re.findall(r"\n(Concept|Fit|Relevant|Active|Right):", body["messages"][1]["content"])[-1]
    said = {"Concept": "what people like", "Fit": "Probably", "Relevant": "Maybe", "Active": "1, 2", "Right": "none"}
    return completion(f"Well.\n{kind}: {said[kind]}", 100, 10)


def test_the_statistical_judge_needs_nobody(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(run(experiment, monkeypatch, "--features", "relevant", "--json").stdout)
    assert [part["name"] for part in found["explained"]] == ["a", "b"] and found["agreement"] == []
    part = found["explained"][0]
    assert part["n_judged"] + part["n_silent"] > 3 and sum(part["labels"].values()) == part["n_judged"]
    assert {"n", "n_untested"} <= set(part["words"])
    rows = [json.loads(line) for line in Path(part["file"]).read_text("utf8").splitlines()]
    assert len(rows) == part["n_judged"] == len(part["rows"]) and "toxicity-1#" in rows[0]["rubric"]
    assert not any("people like" in json.dumps(r) for r in part["rows"] if r["description"] == "")
    table = run(experiment, monkeypatch, "--features", "relevant", "--model", "a").stdout
    assert "a by statistical:" in table and "words: n" in table and "b by" not in table
    assert "Tell me" not in table  # no text of the corpus is printed


def test_two_judges_are_compared_and_paid_for_once(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(obedient) as stub:
        options = ["--model", "a", "--features", "relevant", "--limit", "3", "--judge", "statistical"]
        options += ["--judge", "endpoint", "--set", f"judge.base_url={stub.url}", "--set", "judge.model=m"]
        options += ["--set", "judge.price_prompt=1", "--set", "judge.price_written=10", "--json"]
        found = json.loads(run(experiment, monkeypatch, *options).stdout)
        n = len(stub.bodies)
        judged = found["explained"][1]
        assert judged["kind"] == "endpoint" and judged["labels"] == {"Maybe": judged["n_judged"]}
        assert judged["counts"]["explain_asked"] == judged["n_judged"] and "explain-1#" in judged["judge"]
        assert found["usage"]["endpoint"]["n_answered"] == n > 0
        assert found["usage"]["endpoint"]["cost"] == pytest.approx(n * (100 * 1 + 10 * 10) / 1e6)
        (agreed,) = found["agreement"]
        assert agreed["n"] == judged["n_judged"] and sum(map(sum, agreed["table"])) == agreed["n"]
        again = json.loads(run(experiment, monkeypatch, *options).stdout)
        assert len(stub.bodies) == n and again["usage"]["endpoint"]["cost"] == 0
        assert again["explained"] == found["explained"]
        # The cap counts what earlier runs of the experiment have paid.
        capped = [*options[:6], *options[8:-1], "--set", f"judge.max_tokens={110 * n + 50}", "--rubric", "survival"]
        with pytest.raises(TransferError, match="cap"):
            run(experiment, monkeypatch, *capped)
        assert len(stub.bodies) == n


def test_a_dry_run_shows_prompts_and_asks_nobody(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--model", "a", "--features", "relevant", "--limit", "3", "--judge", "endpoint", "--dry-run", "1"]
    settings = ["--set", "judge.base_url=http://127.0.0.1:9/v1", "--set", "judge.price_prompt=2"]
    shown = run(experiment, monkeypatch, *options, *settings).stdout
    assert shown.count("--- request") == 5  # one of each kind
    assert re.search(r"endpoint:\(none\): \d+ requests, at most \d+ tokens read .*; nothing was asked", shown)
    counted = json.loads(run(experiment, monkeypatch, *options, *settings, "--json").stdout)["dry_run"][0]
    assert len(counted["prompts"]) == 5 and counted["cost"] > 0


def test_a_dry_run_asks_nobody_for_the_relevant_features_either(
    experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(obedient) as stub:
        settings = ["judge.kind=endpoint", "judge.model=rehearsed", f"judge.base_url={stub.url}", "judge.spans=2"]
        settings += ["cover.always_on=1.0", "judge.threshold=Probably"]
        options = ["--features", "relevant", "--limit", "2", *(x for s in settings for x in ("--set", s))]
        dry = json.loads(run(experiment, monkeypatch, *options, "--dry-run", "1", "--json").stdout)["dry_run"]
        assert not stub.bodies and [r["stage"] for r in dry] == ["cover", "explain"]
        assert len(dry[0]["prompts"]) == 3 and len(dry[1]["prompts"]) == 5
        assert dry == json.loads(run(experiment, monkeypatch, *options, "--dry-run", "1", "--json").stdout)["dry_run"]
        table = run(experiment, monkeypatch, *options, "--dry-run", "0").stdout
        assert f"cover by endpoint:rehearsed: {dry[0]['requests']} requests" in table and "---" not in table
        options += ["--set", "judge.threshold=Maybe"]
        run(experiment, monkeypatch, *options, "--json")
        # The judge was asked what the rehearsal counted; once it has answered, that is asked no more.
        assert len(stub.bodies) <= dry[0]["requests"] + dry[1]["requests"] and len(stub.bodies) > dry[0]["requests"]
        n = len(stub.bodies)
        dry = json.loads(run(experiment, monkeypatch, *options, "--dry-run", "1", "--json").stdout)["dry_run"]
        assert [r["stage"] for r in dry] == ["explain"] and len(stub.bodies) == n


def test_texts_of_a_harmful_class_are_cut_in_a_dry_run(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--model", "a", "--features", "relevant", "--limit", "3", "--judge", "endpoint", "--dry-run", "2"]
    for more in ([], ["--json"]):
        cut = run(experiment, monkeypatch, *options, *more).stdout
        whole = run(experiment, monkeypatch, *options, *more, "--full").stdout
        assert "will end-" not in cut and "more characters folded]" in cut and "Tell me" in cut
        assert "will end-" in whole and "folded" not in whole
        for words in ("What do the reactions have in common?", "and say whether it is the wording or the meaning."):
            assert words in cut and words in whole


def test_features_can_be_named(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(run(experiment, monkeypatch, "--model", "b", "--features", "0,5,5,3", "--json").stdout)
    part = found["explained"][0]
    assert part["n_judged"] + part["n_silent"] == 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--judge", "oracle"], "no judge or model 'oracle'"),
        (["--model", "zebra"], "no judge or model 'zebra'"),
        (["--judge", "local"], "needs a model"),
        (["--rubric", "happiness"], "There is no rubric happiness"),
        (["--features", "many"], "neither a set nor ids"),
        (["--features", "3,9999", "--model", "a"], "has no feature 9999"),
        (["--features", "3,17"], "Feature ids belong to one model, and these are for 2: a, b."),
        (["--features", "3", "--model", "a", "--model", "b", "--dry-run", "1"], "belong to one model"),
        (["--judge", "statistical", "--judge", "local", "--judge", "endpoint"], "at most twice"),
        (["--rubric", "sycophancy", "--set", "data.positive=benign", "--judge", "local"], "needs a model"),
        (["--rubric", "sycophancy"], "goes by the labels matching, sycophantic, and the texts have benign, harmful"),
        (["--judge", "local", "--judge", "statistical", "--rubric", "survival"], "goes by the labels resisting"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    experiment: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], sentence: str
) -> None:
    with pytest.raises(TransferError, match=re.escape(sentence)):
        run(experiment, monkeypatch, *options)


def test_a_served_model_can_choose_the_relevant_features(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transfer.pipeline import Pipeline

    run(experiment, monkeypatch, "--model", "a", "--features", "0", "--quiet")
    with serving(obedient) as stub:
        settings = ["judge.kind=endpoint", f"judge.base_url={stub.url}", "judge.model=m", "judge.spans=2"]
        settings += ["judge.price_prompt=3"]
        judged = load_experiment(experiment / "tiny.yaml", settings)
        pipeline = Pipeline(judged, experiment / "runs", [])
        out = experiment / "cache"
        found = relevant_by_chat(pipeline.stores["a"], pipeline.corpora["anchor"], judged, out, out)
        n = len(stub.bodies)
        assert len(found) > 0 and n == 3 * len(found) and set(found.labels) <= {"harmful", "benign"}
        usage = read_json(out / "usage.json")
        assert (usage["n_answered"], usage["n_prompt"], usage["n_written"]) == (n, 100 * n, 10 * n)
        assert usage["judge"] == "endpoint:m" and usage["cost"] == pytest.approx(n * 100 * 3 / 1e6)
        again = relevant_by_chat(pipeline.stores["a"], pipeline.corpora["anchor"], judged, out, out)
        usage = read_json(out / "usage.json")
        assert (usage["n_cached"], usage["n_cached_prompt"], usage["cost"]) == (n, 100 * n, 0)
        assert again.to_dict() == found.to_dict() and len(stub.bodies) == n


def test_stages_say_what_they_asked_and_book_it_on_the_experiment(
    experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.cache import AnswerCache
    from transfer.pipeline import Pipeline
    from transfer.synth.rounds import RoundSettings
    from transfer.synth.rounds_stage import model_rounds

    monkeypatch.setenv("TRANSFER_RUNS", str(experiment / "runs"))
    with serving(obedient) as judge, serving(lambda *_: completion('["people like boats"]', 30, 7)) as writer:
        settings = ["judge.kind=endpoint", f"judge.base_url={judge.url}", "judge.model=booked", "judge.spans=2"]
        settings += ["synth.generator=chat", f"synth.chat={writer.url}#writer", "synth.allow_harmful=true"]
        asking = load_experiment(experiment / "tiny.yaml", [*settings, "cover.always_on=1.0"])
        pipeline = Pipeline(asking, experiment / "runs", [])
        folders = [folder for _, folder in pipeline.coverage.values()]
        taken = [read_json(folder / "usage.json") for folder in folders]
        assert sum(t["n_answered"] + t["n_cached"] for t in taken) >= len(judge.bodies) > 0
        found = model_rounds(pipeline, "a", RoundSettings(rounds=1))
        run = read_json(Path(found.folders[0]) / "synthesis.json")
        assert run["info"]["usage"]["n_answered"] == len(writer.bodies) > 0
    with AnswerCache(experiment / "runs" / ".store" / "answers.sqlite") as cache:
        assert cache.spent("endpoint:writer", "tiny/synth") == (30 * len(writer.bodies), 7 * len(writer.bodies))
        assert cache.spent("endpoint:booked", "tiny") == (100 * len(judge.bodies), 10 * len(judge.bodies))


def test_only_what_decides_relevance_is_part_of_the_key(experiment: Path) -> None:
    def inputs(*settings: str) -> dict[str, Any]:
        return judge_inputs(load_experiment(experiment / "tiny.yaml", [f"judge.{s}" for s in settings]))

    assert inputs() == inputs("model=m") == {} != inputs("test=auroc")
    served = inputs("kind=endpoint", "model=m")
    assert served == inputs("kind=endpoint", "model=m", "concurrency=2", "max_tokens=9")
    assert served == inputs("kind=endpoint", "model=m", "base_url=http://localhost:8000/v1/")
    moved = inputs(
        "kind=endpoint", "model=m", "base_url=http://localhost:8001/v1", "served_by=http://localhost:8000/v1"
    )
    assert served == moved
    for change in ("model=n", "rubric=survival", "threshold=Yes", "spans=3", "base_url=http://localhost:8001/v1"):
        assert inputs("kind=endpoint", "model=m", change) != served
