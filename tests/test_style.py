"""Lint, format, types and examples in docstrings, so that one command checks everything."""

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
