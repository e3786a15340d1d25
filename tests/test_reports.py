"""The report: complete, escaped, self-contained, byte-stable, and honest about what is absent."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports.build import MAX_TABLE, build_report
from reports.figures import overview
from reports.load import clean, load_run
from reports.order import arms_run, lacks_control
from reports.words import Names, excerpt, folded, number, spread
from transfer.core.errors import TransferError

MODELS = ("llama", "mistral", "qwen")
AWKWARD = "<script>alert('x')</script> & \"quoted\" 🦙 مرحبا بالعالم \u202eabc \ud83d\x00 {{ 7*7 }} $x_1$ <!-- -->"


def example_run() -> dict[str, Any]:
    """The files of a run with every kind of row, awkward texts included."""
    alignments = [
        {
            "source": f"zoo:{s}",
            "target": f"zoo:{t}",
            "method": method,
            "n_features": [2048, 2304],
            "n_matches": 700 + 13 * i,
            "heldout_corr_median": 0.31 + 0.02 * j - 0.01 * i,
            "null_corr_median": 0.004 * j,
            "q_value_max": 0.0499,
            "converged": method != "sinkhorn" or i > 0,
            "row_error": 1e-9,
            "col_error": 7.1e-7,
            "heldout_r2": 0.61,
            "n_untestable": 12,
            "n_significant": 511,
        }
        for i, (s, t) in enumerate([("llama", "mistral"), ("llama", "qwen"), ("mistral", "qwen")])
        for j, method in enumerate(("correlation", "residual_map", "sinkhorn"))
    ]
    coverage = [
        {
            "model": f"zoo:{m}",
            "dataset": dataset,
            "fac": 0.5 + 0.06 * j,
            "fac_uncapped": 0.7 + 0.06 * j,
            "ci_low": 0.46 + 0.06 * j,
            "ci_high": 0.54 + 0.06 * j,
            "n_anchor": 240 + i,
            "n_covered": 120 + i,
            "n_missing": 120,
            "n_relevant": 300,
            "n_docs": 400,
            "delta_rule": "quantile 0.5",
            "kl": 0.21,
        }
        for i, m in enumerate(MODELS)
        for j, dataset in enumerate(("seed", "seed + random", "seed + shuffled", "seed + own", "seed + mapped"))
    ]
    synthesis = [
        {
            "source": m,
            "generator": m,
            "pool": pool,
            "n_requested": 60,
            "n_candidates": 960,
            "n_kept": 300 + 20 * i,
            "missing_hit_rate": 0.55,
            "n_hit": 66,
            "n_missing": 120,
            "rejected": {"below_threshold": 500 - 20 * i, "duplicate": 100, "unparsable": 60},
        }
        for i, m in enumerate(MODELS)
        for pool in ("missing", "random")
    ]
    transfer = []
    for metric, i, target in (
        (metric, i, target) for metric in ("auprc", "auprc@unseen") for i, target in enumerate(MODELS)
    ):
        others = [m for m in MODELS if m != target]
        plan = [("seed_only", "", ""), ("random", target, "seed_only"), ("own", target, "random"), ("full", "", "")]
        plan += [(arm, o, "random") for arm in ("mapped", "shuffled") for o in others]
        for recipe in ("lora", "head"):
            for k, (arm, source, control) in enumerate(plan):
                mean = 0.70123 + 0.011 * k + 0.02 * i - (0.04 if recipe == "head" else 0)
                transfer.append(
                    {
                        "source": source,
                        "generator": source,
                        "target": target,
                        "task": "harmful intent",
                        "arm": arm,
                        "recipe": recipe,
                        "metric": metric,
                        "values": [mean - 0.012, mean, mean + 0.012],
                        "seeds": [0, 1, 2],
                        "mean": mean,
                        "ci_low": mean - 0.02137,
                        "ci_high": mean + 0.02137,
                        "n_seeds": 3,
                        "n_train": 120,
                        "control": control,
                        "delta": 0.0111 if control else None,
                        "delta_low": -0.0033 if control else None,
                        "delta_high": 0.0255 if control else None,
                    }
                )
    comparisons = [
        {
            "source": "llama" if target != "llama" else "qwen",
            "target": target,
            "recipe": "lora",
            "arm": "mapped",
            "control": control,
            "delta": 0.021 - 0.02 * i,
            "low": -0.004 - 0.02 * i,
            "high": 0.046 - 0.02 * i,
            "p": 0.25,
            "p_holm": 0.5,
            "n_seeds": 3,
            "mde": 0.04,
            "boot_low": -0.02 - 0.02 * i,
            "boot_high": 0.06 - 0.02 * i,
            "verdict": "no proven gain",
        }
        for i, target in enumerate(MODELS)
        for control in ("random", "shuffled")
    ]
    results = {
        "alignments": alignments,
        "coverage": coverage,
        "synthesis": synthesis,
        "transfer": transfer,
        "comparisons": comparisons,
        "claims": [
            {
                "sentence": "Texts that llama writes for what qwen lacks do not help qwen more than random ones.",
                "verdict": "not shown",
                "number": 0.0111,
                "low": -0.0033,
                "high": 0.0255,
                "control": "random",
                "anchor": "transfer[4].delta",
            },
            {
                "sentence": f"Second claim {AWKWARD}",
                "verdict": "shown",
                "number": 0.31,
                "low": None,
                "high": None,
                "control": "",
                "anchor": "cell-a-b-lora",
            },
            {
                "sentence": "Third claim.",
                "verdict": "not shown",
                "number": 0.021,
                "low": -0.004,
                "high": 0.046,
                "control": "shuffled",
                "anchor": "cell-qwen-llama-lora",
            },
        ],
        "alerts": [
            {"level": "note", "text": "12 features are untestable (fewer than 5 documents)."},
            {"level": "severe", "text": "sinkhorn llama → mistral did not converge: column error 7e-7."},
            {"level": "warn", "text": f"Odd text {AWKWARD}"},
        ],
        "limits": ["Three tiny models trained on one mix.", AWKWARD],
    }
    spans = [
        {
            "text": "How do I bake sourdough bread at home?",
            "start": 14,
            "end": 23,
            "value": 3.21,
            "label": "0",
            "fold": False,
        },
        {
            "text": "Tell me how to break the lock of my neighbour.",
            "start": 15,
            "end": 20,
            "value": 2.5,
            "label": "1",
            "fold": True,
        },
        {"text": AWKWARD, "start": 0, "end": 8, "value": 1.1, "label": ""},
        {"text": "No position. " * 60, "start": None, "end": None, "value": None, "label": ""},
    ]
    details = {
        "examples": [
            {
                "source": "llama",
                "target": t,
                "source_feature": 1204 + i,
                "target_feature": 77 + i,
                "score": 0.72,
                "heldout_corr": 0.66,
                "q_value": 0.0004,
                "source_description": "baking and bread",
                "target_description": AWKWARD,
                "label": "",
                "source_spans": spans,
                "target_spans": spans[:3],
            }
            for i, t in enumerate(("mistral", "qwen"))
        ],
        "samples": [
            {
                "source": m,
                "generator": m,
                "feature": 5 + i,
                "label": "harmful" if i % 2 else "benign",
                "fold": bool(i % 2),
                "text": "A generated request about " + ("locks. " if i % 2 else AWKWARD),
                "score": 1.7,
                "delta": 0.9,
                "step": 1 + i % 2,
                "strength": 4.0,
                "positive": "An earlier strong text." if i % 2 else "",
                "verdict": "kept" if i else "below_threshold",
            }
            for m in MODELS
            for i in range(3)
        ],
        "missing": [
            {"model": m, "feature": i, "label": "harmful", "description": f"feature {i} {AWKWARD}", "n_anchor_docs": 4}
            for m in MODELS
            for i in range(120)
        ],
        "cards": [
            {
                "name": m,
                "parameters": 4_100_000,
                "bits_per_byte": 1.31,
                "layer": 3,
                "data": ["dolly", "books"],
                "sae": {"width": 2048, "l0": 16.0, "normalised_mse": 0.11, "cross_entropy_recovered": 0.95},
            }
            for m in MODELS
        ],
    }
    manifest = {
        "command": ["transfer", "run", "a file; with spaces.yaml"],
        "versions": {"python": "3.11", "torch": "2.13", "transfer": "0.1.0"},
        "hashes": {f"{m} model": "a1b2c3d4e5f60718" for m in MODELS},
        "seconds": {"harvest": 31.25, "align": 12.5, "tune": 101.0},
        "machine": {"cores": 2},
        "started": "2026-11-21T10:00:00",
        "finished": "2026-11-21T10:04:00",
    }
    return {"results.json": results, "details.json": details, "manifest.json": manifest}


def small_run() -> dict[str, Any]:
    """The same with few rows a list, for tests that need many builds."""
    files = example_run()
    for name in ("results.json", "details.json"):
        files[name] = {k: v[:3] for k, v in files[name].items()}
    return files


def write_run(folder: Path, files: dict[str, Any]) -> Path:
    """Write a run directory."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_text(json.dumps(data), "utf8")
    (folder / "experiment.yaml").write_text("name: demo <run>\nseed: 0\nnote: '</code></pre><b>'\n", "utf8")
    return folder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("run"), example_run())
    build_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    return (run_dir / "report.html").read_text("utf8")


class Page(HTMLParser):
    """Tags, ids and links of a page; complains about unbalanced tags."""

    VOID = frozenset({"meta", "link", "br", "img", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(text)
        self.wrong += self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def all(self, attribute: str) -> list[str]:
        """Values of one attribute over all tags."""
        return [attrs[attribute] or "" for _, attrs in self.tags if attribute in attrs]


def loads_from_outside(text: str) -> list[str]:
    """Everything in a page that could make a browser ask another place."""
    page = Page(text)
    links = [v for a in ("src", "href", "xlink:href", "srcset", "action", "data", "poster") for v in page.all(a)]
    styles = re.findall(r"url\(([^)]*)\)|@import\s+(\S+)", text)
    found = [v for v in links if re.match(r"(?i)\s*([a-z]+:)?//|\s*(?!data:)[a-z]+:", v)]
    found += [u for pair in styles for u in pair if u and not u.strip("'\"").startswith(("#", "data:"))]
    return found + [tag for tag, _ in page.tags if tag in ("script", "iframe", "object", "embed", "audio", "video")]


def test_the_outside_check_can_fail() -> None:
    assert loads_from_outside('<img src="https://a.b/c.png">')
    assert loads_from_outside('<a href="//a.b">x</a>')
    assert loads_from_outside("<style>p{background:url(//a.b)}</style>")
    assert loads_from_outside("<script>1</script>")
    assert not loads_from_outside('<a href="results.json">x</a><link href="data:,"><p style="fill: url(#clip)">')


def test_page_loads_nothing_and_names_no_web_address(page: str) -> None:
    assert loads_from_outside(page) == []
    assert "http://" not in page
    assert "https://" not in page
    assert "default-src 'none'" in page


def test_page_is_well_formed_with_distinct_ids_and_live_links(page: str, run_dir: Path) -> None:
    parsed = Page(page)
    assert parsed.wrong == []
    ids = parsed.all("id")
    assert len(ids) == len(set(ids))
    assert not [i for i in ids if re.search(r"\s", i)]
    for link in parsed.all("href"):
        if link.startswith("#"):
            assert link[1:] in ids, link
        elif not link.startswith("data:"):
            assert (run_dir / link).is_file(), link


def test_texts_are_escaped(page: str) -> None:
    assert "<script" not in page
    assert "<b>" not in page
    assert "<!-- -->" not in page
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in page
    assert "{{ 7*7 }}" in page
    assert "مرحبا" in page
    assert "🦙" in page
    assert "\x00" not in page
    assert "<bdi>demo &lt;run&gt;</bdi>" in page


def test_every_number_of_the_transfer_table_is_there_with_its_anchor(page: str, run_dir: Path) -> None:
    rows = json.loads((run_dir / "results.json").read_text("utf8"))["transfer"]
    assert len(rows) < MAX_TABLE
    for i, row in enumerate(rows):
        for name in ("mean", "ci_low", "ci_high", "n_seeds", "n_train"):
            want = f'<data id="transfer.{i}.{name}" value="{row[name]}">{number(row[name])}</data>'
            assert want in page, want
        if row["delta"] is not None:
            assert f'<data id="transfer.{i}.delta" value="{row["delta"]}">{number(row["delta"], signed=True)}<' in page
        for k, one in enumerate(row["values"]):
            assert f'id="transfer.{i}.values.{k}" value="{one}"' in page


def test_other_numbers_are_there(page: str, run_dir: Path) -> None:
    results = json.loads((run_dir / "results.json").read_text("utf8"))
    for kind, names in {
        "alignments": ("heldout_corr_median", "null_corr_median", "q_value_max", "n_matches"),
        "coverage": ("fac", "ci_low", "ci_high", "n_anchor", "n_missing"),
        "synthesis": ("n_requested", "n_candidates", "n_kept", "missing_hit_rate"),
        "comparisons": ("delta", "low", "high", "p"),
    }.items():
        for i, row in enumerate(results[kind]):
            for name in names:
                assert f'id="{kind}.{i}.{name}" value="{row[name]}"' in page
    assert 'id="synthesis.0.rejected.duplicate" value="100"' in page
    assert 'id="seconds.tune" value="101.0"' in page


def test_claim_comes_first_and_links_to_its_number(page: str) -> None:
    assert page.index("do not help qwen") < page.index('id="alerts"') < page.index('id="setup"')
    assert 'href="#transfer.4.delta"' in page
    assert "not shown" in page
    assert '<li id="cell-a-b-lora">' in page
    assert re.search(r'<li id="cell-qwen-llama-lora">.*href="#comparisons\.1\.delta"', page)


def test_alerts_are_ranked(page: str) -> None:
    places = [page.index(f'class="{level}" id="alerts.') for level in ("severe", "warn", "note")]
    assert places == sorted(places)


def test_firing_token_is_marked_and_harmful_text_is_folded(page: str) -> None:
    assert "How do I bake <mark>sourdough</mark> bread at home?" in page
    at = page.index("Tell me how to <mark>break</mark>")
    assert page.rfind('<details class="fold">', 0, at) > page.rfind("</details>", 0, at)
    mild = page.index("How do I bake <mark>sourdough</mark>")
    assert page.rfind('<details class="fold">', 0, mild) <= page.rfind("</details>", 0, mild)
    assert "position not recorded" in page


def test_figures_have_alt_text_and_files(page: str, run_dir: Path) -> None:
    names = {"alignment", "coverage", "funnel", "transfer", "comparisons"}
    parsed = Page(page)
    drawn = [attrs for tag, attrs in parsed.tags if tag == "svg"]
    assert len(drawn) == len(names)
    for attrs in drawn:
        assert attrs["role"] == "img"
        assert all(i in parsed.all("id") for i in (attrs["aria-labelledby"] or "").split())
    assert {f.stem for f in (run_dir / "figures").glob("*.svg")} == names
    import xml.etree.ElementTree as ET

    for file in (run_dir / "figures").glob("*.svg"):
        assert ET.parse(file).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_headers_have_scope(page: str) -> None:
    heads = [attrs for tag, attrs in Page(page).tags if tag == "th"]
    assert heads
    assert all(attrs.get("scope") in ("col", "row") for attrs in heads)


def test_equal_input_gives_equal_bytes_in_any_folder(run_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copied under another name"
    write_run(copy, example_run())
    build_report(copy)
    assert (copy / "report.html").read_bytes() == (run_dir / "report.html").read_bytes()
    changed = example_run()
    changed["results.json"]["transfer"][0]["mean"] = 0.123
    assert build_report(write_run(copy, changed)).read_bytes() != (run_dir / "report.html").read_bytes()


def test_same_bytes_in_another_process(run_dir: Path, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", example_run())
    code = (
        "import sys; from pathlib import Path; from reports.build import build_report; build_report(Path(sys.argv[1]));"
        "heavy = {'torch', 'transformers', 'sae_lens', 'matplotlib.pyplot'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    root = Path(__file__).parents[1]
    env = {"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(folder)], cwd=root, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "report.html").read_bytes() == (run_dir / "report.html").read_bytes()


def test_empty_lists_still_give_a_report(tmp_path: Path) -> None:
    files = example_run()
    empty = {name: {k: [] for k in files[name]} for name in ("results.json", "details.json")}
    text = build_report(write_run(tmp_path, {**empty, "manifest.json": {}})).read_text("utf8")
    assert Page(text).wrong == []
    assert "This run makes no claim." in text
    assert "No transfer cell recorded." in text
    assert "<svg" not in text


@pytest.mark.parametrize("kind", ["alignments", "coverage", "synthesis", "transfer", "comparisons", "claims", "alerts"])
def test_each_list_may_be_empty(tmp_path: Path, kind: str) -> None:
    files = small_run()
    files["results.json"][kind] = []
    text = build_report(write_run(tmp_path, files)).read_text("utf8")
    assert Page(text).wrong == []
    assert f'"{kind}.0' not in text


def test_only_the_columns_of_the_agreed_shape_are_needed(tmp_path: Path) -> None:
    results = {
        "alignments": [
            {
                "source": "a",
                "target": "b",
                "method": "m",
                "n_features": None,
                "n_matches": 0,
                "heldout_corr_median": None,
                "null_corr_median": None,
                "q_value_max": None,
            }
        ],
        "coverage": [{"model": "a", "dataset": "seed", "fac": None, "n_anchor": 0, "n_covered": 0, "n_missing": 0}],
        "synthesis": [
            {"source": "a", "generator": "b", "n_requested": 3, "n_kept": 0, "missing_hit_rate": None, "rejected": {}}
        ],
        "transfer": [
            {
                "source": "a",
                "target": "b",
                "task": "t",
                "arm": "mapped",
                "metric": "m",
                "mean": None,
                "ci_low": None,
                "ci_high": None,
                "n_seeds": 0,
            }
        ],
    }
    (tmp_path / "results.json").write_text(json.dumps(results), "utf8")
    text = build_report(tmp_path).read_text("utf8")
    assert Page(text).wrong == []
    for file in ("details.json", "manifest.json", "experiment.yaml"):
        assert f"{file} is not there" in text
        assert f'href="{file}"' not in text
    assert "no control" in text


def test_long_lists_are_capped_and_say_so(tmp_path: Path) -> None:
    files = small_run()
    files["results.json"]["transfer"] *= 80
    files["details.json"]["missing"] *= 80
    text = build_report(write_run(tmp_path, files)).read_text("utf8")
    assert text.count(f"the first {MAX_TABLE} of 240") == 2
    assert text.count('<tr id="missing.') == text.count('<tr id="transfer.') == MAX_TABLE
    page = Page(text)
    assert not [link for link in page.all("href") if link.startswith("#") and link[1:] not in page.all("id")]


def test_missing_results_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match=r"No results\.json in .*transfer run"):
        build_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["transfer"][2].pop("mean"), r"transfer\[2\] lacks mean"),
        (lambda r: r["coverage"][0].update(fac="high"), r"coverage\[0\]\.fac is 'high', not a number"),
        (lambda r: r.update(alignments={"a": 1}), "alignments is not a list"),
        (lambda r: r.clear(), r"results\.json lacks alignments, coverage, synthesis, transfer"),
        (lambda r: r["claims"].append("words"), r"claims\[3\] is not an object"),
        (lambda r: r["synthesis"][1].update(rejected=[1]), r"synthesis\[1\]\.rejected"),
        (lambda r: r["transfer"][0].update(values=["x"]), r"transfer\[0\]\.values"),
    ],
)
def test_broken_results_name_the_place(tmp_path: Path, change: Any, words: str) -> None:
    files = example_run()
    change(files["results.json"])
    with pytest.raises(TransferError, match=words):
        build_report(write_run(tmp_path, files))
    assert not (tmp_path / "report.html").exists()


def test_a_failed_build_keeps_the_old_report(tmp_path: Path) -> None:
    write_run(tmp_path, example_run())
    (tmp_path / "report.html").write_text("old", "utf8")
    (tmp_path / "results.json").write_text("{", "utf8")
    with pytest.raises(TransferError, match="not valid JSON"):
        build_report(tmp_path)
    assert (tmp_path / "report.html").read_text("utf8") == "old"


def test_hollow_needs_a_named_control_that_was_run() -> None:
    cell = {"task": "t", "recipe": "r", "metric": "m", "target": "a"}
    mapped, control = {**cell, "arm": "mapped", "control": "random"}, {**cell, "arm": "random", "control": ""}
    assert not lacks_control(mapped, arms_run([mapped, control]))
    assert lacks_control(mapped, arms_run([mapped]))
    assert lacks_control(mapped, arms_run([mapped, {**control, "target": "b"}]))
    assert lacks_control(mapped, arms_run([mapped, {**control, "recipe": "other"}]))
    assert lacks_control({**mapped, "control": ""}, arms_run([mapped, control]))
    assert not lacks_control(control, arms_run([control]))


def test_overview_is_a_stable_picture(tmp_path: Path) -> None:
    results = example_run()["results.json"]
    first = overview(results, tmp_path / "a.png").read_bytes()
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert overview(results, tmp_path / "b.png").read_bytes() == first
    assert overview({}, tmp_path / "empty.png").stat().st_size > 1000


def test_names_are_short_unless_they_clash() -> None:
    names = Names(["zoo:llama", "llama", "llama@1a2b", "hub:org/Qwen2-7B@rev", "hub:a/x", "hub:b/x"])
    assert [names(n) for n in ("zoo:llama", "llama@1a2b", "hub:org/Qwen2-7B@rev")] == ["llama", "llama", "Qwen2-7B"]
    assert names("hub:a/x") == "hub:a/x"
    assert names(None) == names("") == ""


def test_numbers_are_written_readably() -> None:
    assert [number(v) for v in (None, 0.0, 1234567, 0.12345, -0.5, 2e-5, 4321.7, True)] == [
        "–",
        "0.000",
        "1,234,567",
        "0.123",
        "\u22120.500",
        "2.0e\u22125",
        "4,322",
        "yes",
    ]
    assert number(0.5, signed=True) == "+0.500"
    assert spread([None, 0.3, 0.1]) == "0.100 to 0.300"
    assert spread([]) == "–"


def test_texts_fold_where_the_run_says_so_and_every_labelled_one_where_it_does_not() -> None:
    assert folded({"label": "1", "fold": True}) and not folded({"label": "harmful", "fold": False})
    assert folded({"label": "benign", "fold": None}) and not folded({"label": "", "fold": None})


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60), st.integers(-5, 70), st.integers(-5, 70))
def test_excerpt_loses_nothing_of_a_short_text(text: str, start: int, end: int) -> None:
    cut = excerpt(text, start, end)
    assert cut.before + cut.token + cut.after == text
    assert not cut.cut
    assert cut.token == (text[start:end] if 0 <= start < end <= len(text) else "")


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(), max_size=40))
def test_clean_text_can_always_be_written(text: str) -> None:
    words = clean(text)
    words.encode("utf8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", words)
    assert clean(words) == words


def test_nan_is_read_as_absent(tmp_path: Path) -> None:
    files = example_run()
    files["results.json"]["coverage"][0]["kl"] = float("nan")
    assert load_run(write_run(tmp_path, files)).results["coverage"][0]["kl"] is None


@pytest.mark.browser
def test_browser_opens_it_without_error_or_request(run_dir: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here")
    log = tmp_path / "net.json"
    quiet = ("gpu", "quic", "background-networking", "component-update", "sync", "extensions", "default-apps")
    flags = ["--disable-" + word for word in quiet] + ["--no-first-run", "--headless", "--no-sandbox"]
    page = (run_dir / "report.html").resolve().as_uri()
    done = subprocess.run(
        [
            chromium,
            *flags,
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--log-net-log={log}",
            "--dump-dom",
            page,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Transfer report" in done.stdout
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    # Chromium's own housekeeping (updates, search engine) is not the page's doing: only the page's requests count.
    urls = set(re.findall(r'"url":"([^"]+)"', log.read_text("utf8", errors="replace")))
    initiated = [u for u in urls if not u.startswith(("file:", "data:", "chrome:", "chrome-extension:"))]
    assert not [u for u in initiated if "google" not in u], initiated


def test_what_a_gain_is_worth_is_shown(tmp_path: Path) -> None:
    files = example_run()
    files["results.json"] |= {
        "room": [{"model": "zoo:llama", "n_anchor": 90, "n_missing": 29, "least": 30, "informative": False}],
        "failed_cells": [{"cell": "cell <x>", "problem": "ValueError: why"}],
        "transfer_efficiency": [
            {"target": "zoo:qwen", "source": "zoo:llama", "generator": "zoo:mistral", "recipe": "head"}
            | {"gain_mapped": 0.1, "gain_own": 0.2, "efficiency": 0.5, "low": 0.125, "high": 0.75, "n_seeds": 5},
            {"target": "", "source": "", "generator": "", "recipe": "head", "gain_mapped": -0.1, "gain_own": -0.2}
            | {"efficiency": None, "low": None, "high": None, "n_seeds": 5, "said": "own features do not surely gain"},
        ],
        "dose": [
            {"recipe": "head", "target": "zoo:qwen", "metric": "auprc", "n_seed": 12, "mean": 0.625, "low": 0.5}
            | {"high": 0.75, "fac": 0.8125, "n_missing": 77, "n_seeds": 5}
        ],
    }  # fmt: skip
    build_report(write_run(tmp_path, files))
    page = (tmp_path / "report.html").read_text("utf8")
    assert Page(page).wrong == []
    for place in ("room.0.n_missing", "transfer_efficiency.0.efficiency", "dose.0.mean"):
        assert f'id="{place}"' in page, place
    assert "cell &lt;x&gt;" in page and "own features do not surely gain" in page and "all cells" in page
