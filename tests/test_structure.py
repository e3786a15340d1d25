"""The rules of the house that can be read off the source: import direction, no prints, no pickles."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "transfer.core": ("aligners", "models", "reports", "transfer"),
    "aligners": ("models", "reports", "transfer"),
    "models": ("aligners", "reports", "transfer"),
    "reports": ("aligners", "models", "transfer"),
}


def package_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "transfer.core" if parts[:2] == ("transfer", "core") else parts[0]


def imported(tree: ast.AST) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def offenders(path: Path, source: str, package: str) -> list[str]:
    tree = ast.parse(source)
    bad = [f"{path}:{n.lineno} imports relatively" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
    for line, name in imported(tree):
        verbs = name.startswith("transfer.verbs") and path.parent.name != "verbs" and path.name != "cli.py"
        if verbs or (name.startswith("transfer.cli") and path.name not in ("__main__.py", "cli.py")):
            bad.append(f"{path}:{line} imports {name}")
        if name == "transfer.core" or name.startswith("transfer.core."):
            continue
        if name.split(".")[0] in FORBIDDEN.get(package, ()) and name.split(".")[0] != package:
            bad.append(f"{path}:{line} imports {name}")
    return bad


FILES = sorted(p for folder in ("transfer", "aligners", "models", "reports") for p in (ROOT / folder).rglob("*.py"))


def test_imports_go_one_way() -> None:
    bad = []
    for path in FILES:
        bad += offenders(path.relative_to(ROOT), path.read_text("utf8"), package_of(path))
    assert not bad, "\n".join(bad)


def test_the_import_check_can_fail() -> None:
    assert offenders(Path("aligners/x.py"), "from models.language import LanguageModel", "aligners")
    assert offenders(Path("transfer/core/x.py"), "import transfer.pipeline", "transfer.core")
    assert offenders(Path("transfer/core/x.py"), "from ..corpus import load_corpus", "transfer.core")
    assert offenders(Path("transfer/x.py"), "from transfer.cli import app", "transfer")
    assert offenders(Path("transfer/x.py"), "from transfer.verbs.align import align", "transfer")
    assert not offenders(Path("aligners/x.py"), "from transfer.core.errors import TransferError", "aligners")


def test_reports_need_no_torch() -> None:
    for path in (ROOT / "reports").rglob("*.py"):
        names = {name.split(".")[0] for _, name in imported(ast.parse(path.read_text("utf8")))}
        assert not names & {"torch", "transformers", "sae_lens"}, path


@pytest.mark.parametrize("word", ["import pickle", "torch.load(", "shell=True"])
def test_no_unsafe_reads(word: str) -> None:
    for path in FILES:
        text = path.read_text("utf8")
        if word == "torch.load(":
            assert text.count("torch.load(") == text.count("weights_only=True"), path
        else:
            assert word not in text, path


def test_no_module_hides_the_standard_library() -> None:
    import sys

    for path in FILES:
        if path.parent.name in ("aligners", "models", "reports"):
            assert path.stem not in sys.stdlib_module_names, path
