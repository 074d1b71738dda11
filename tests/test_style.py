"""Lint, format, types and documentation, so that one command checks everything."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import readme

import litefocus

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", litefocus.__all__)
def test_every_public_name_has_an_example(name: str) -> None:
    """Which `--doctest-modules` then runs."""
    assert ">>> " in getattr(litefocus, name).__doc__


@pytest.mark.parametrize("check", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=" ".join)
def test_style(check: list[str]) -> None:
    result = subprocess.run([sys.executable, "-m", *check], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_figures_in_the_readme_are_those_of_the_json() -> None:
    text = (ROOT / "README.md").read_text()
    between = text.split("<!-- figures -->\n")[1].split("<!-- /figures -->")[0]
    assert between == readme.figures()
    assert f"<!-- memory -->\n{readme.memory()}<!-- /memory -->" in text
    rows = json.loads((ROOT / "examples" / "evidence" / "quality.json").read_text())["rows"]
    (ours,) = [row for row in rows if (row["model"], row["method"], row["times"]) == ("seed 1", "litefocus", 8)]
    assert f"{ours['frechet']['diff']:+.2f} ± {ours['frechet']['diff_se']:.2f}" in between
    assert {file.name for file, text in readme.pages().items() if file.read_text() != text} == set()
    assert len((ROOT / "README.md").read_bytes()) < 12_000


def test_messages_in_the_readme_are_those_of_the_code() -> None:
    section = (ROOT / "README.md").read_text().split("## When something goes wrong")[1].split("\n## ")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert len(messages) > 8
    strings = [
        node.value
        for path in (ROOT / "litefocus").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert [text for text in messages if not any(text in string for string in strings)] == []
