"""The report's sections on diversity and bounds: complete, anchored, and quiet where nothing was recorded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from reports.build import build_report
from reports.diversity import LABELS, QUANTITIES, figure
from reports.load import MAIN, TEXT_METRICS, load_run
from transfer.core.errors import TransferError
from transfer.diversity import METRICS
from transfer.grid.bound_table import ASSUMES
from transfer.grid.correlations import PREDICTORS


def results() -> dict[str, Any]:
    correlations = [
        {
            "recipe": recipe,
            "metric": "auprc",
            "predictor": predictor,
            "statistic": statistic,
            "pooled": 0.31 + 0.01 * i,
            "pooled_low": -0.2,
            "pooled_high": 0.7,
            "within": None if predictor == "pos_distinct_2" else 0.1234 + 0.01 * i,
            "within_low": -0.31,
            "within_high": 0.52,
            "p": 0.4,
            "p_holm": 1.0,
            "n_points": 24,
            "n_groups": 3,
            "least_to_find": 0.567,
            "verdict": "not measured in 24 of 24 cells" if predictor == "pos_distinct_2" else "undecided",
        }
        for recipe in ("head", "lora")
        for statistic in ("pearson", "spearman")
        for i, predictor in enumerate(PREDICTORS)
    ]
    measured = {k: 0.4 for m in METRICS if m != "pos_distinct_2" for k in (m, f"{m}_low", f"{m}_high")}
    diversity = [
        {
            "target": "zoo:llama",
            "arm": arm,
            "writer": writer,
            "generator": f"zoo:{writer}" if writer else "",
            "n": 39,
            "n_texts": 52,
            "n_distinct": 51,
            "n_words": 680.5,
            "n_cuts": 5,
            "embedding": "words only <b>",
            "reasons": {"pos_distinct_2": "no tagger <i>here</i>"},
            **measured,
        }
        for arm, writer in (("own", "llama"), ("seed_only", ""), ("mapped", "qwen"))
    ]
    bounds = [
        {"target": "zoo:llama", "arm": "seed_only", "writer": "", "kl": 0.66, "tv": 0.57, "tv_from": "pinsker"},
        {"target": "zoo:llama", "arm": "own", "writer": "llama", "kl": 0.2, "tv": 0.3, "gap": 7.4, "vacuous": ["gap"]},
    ]
    notes = [
        {"quantity": q, "assumes": a, "said": "vacuous in all 24 sets", "least": 1.5, "largest": 2.5, "limit": 1.0}
        for q, a in ASSUMES.items()
    ]
    efficiency = [
        {
            "target": "zoo:llama",
            "arm": "own",
            "generator": "zoo:llama",
            "recipe": "head",
            "metric": "auprc",
            "score": 0.54,
            "n_written": 39,
            "n_trainable": 384,
            "des": 0.3377,
            "pes": 0.2079,
        }
    ]
    lists = {"diversity": diversity, "diversity_correlations": correlations, "bounds": bounds}
    return {**lists, "bound_notes": notes, "efficiency": efficiency, **dict.fromkeys(MAIN, [])}


def build(folder: Path, data: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(data), "utf8")
    return build_report(folder).read_text("utf8")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build(tmp_path_factory.mktemp("run"), results())


def test_every_number_is_there_with_its_anchor(page: str) -> None:
    for name, rows in results().items():
        for i, row in enumerate(rows):
            for key, value in row.items():
                shown = isinstance(value, float) and key not in ("n_cuts",)
                if shown and (name, key) not in (("bounds", "tv"), ("bound_notes", "n")):
                    assert f'<data id="{name}.{i}.{key}" value="{value}">' in page, (name, i, key)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_words_of_the_results_are_escaped_and_reasons_shown(page: str) -> None:
    assert "<i>here</i>" not in page and "no tagger &lt;i&gt;here" in page and "words only &lt;b&gt;" in page
    assert "POS distinct-2 not measured in 3 sets" in page
    assert page.count("vacuous in all 24 sets") == len(ASSUMES)
    for sentence in ASSUMES.values():
        assert sentence.split("'")[0] in page


def test_the_figure_shows_what_was_measured() -> None:
    drawing = figure(results()["diversity_correlations"])
    assert drawing is not None and "0.123" in drawing.title
    assert drawing.svg.count("self-BLEU") == 2 and "POS distinct-2" not in drawing.svg
    assert figure([]) is None


def test_names_are_those_of_the_stages() -> None:
    assert tuple(METRICS) == TEXT_METRICS
    assert set(LABELS) == set(PREDICTORS) and set(QUANTITIES) == set(ASSUMES)


def test_a_run_without_them_still_has_a_report(tmp_path: Path) -> None:
    page = build(tmp_path / "a", dict.fromkeys(MAIN, []))
    assert "No correlation recorded." in page and "No bound recorded." in page


def test_a_broken_row_is_named(tmp_path: Path) -> None:
    data = results()
    data["diversity"][1]["vendi"] = "many"
    (tmp_path / "results.json").write_text(json.dumps(data), "utf8")
    with pytest.raises(TransferError, match=r"diversity\[1\]\.vendi"):
        load_run(tmp_path)
