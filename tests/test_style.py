"""Lint, format, types and documentation, so that one command checks everything."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
