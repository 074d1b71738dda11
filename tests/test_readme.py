"""The README: its first program runs, its figures are those of the JSON files, its links lead somewhere."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import encoding
import pytest
import readme
import soundfile
from diffusers import AudioLDM2Pipeline
from support.embedded import EMBEDDED

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
REPOSITORY = "cvssp/audioldm2"


def test_the_first_program_runs_on_the_embedded_pipeline_by_its_name_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 80 seconds and 50 steps that it asks for, the pipeline makes two and one."""
    (program, *_) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert program.count(REPOSITORY) == 1
    asked: list[dict[str, Any]] = []
    make = AudioLDM2Pipeline.__call__

    def shorter(self: Any, prompt: str, **settings: Any) -> Any:
        asked.append(settings)
        return make(self, prompt, **{**settings, "audio_length_in_s": 2.0, "num_inference_steps": 1})

    monkeypatch.setattr(AudioLDM2Pipeline, "__call__", shorter)
    monkeypatch.chdir(tmp_path)
    exec(compile(program.replace(REPOSITORY, str(EMBEDDED)), "README.md", "exec"), {})
    assert asked == [{"audio_length_in_s": 80, "num_inference_steps": 50}]
    assert soundfile.info(tmp_path / "clip.wav").frames == 32000


def test_its_length() -> None:
    assert len(README.encode()) <= 9216


def test_its_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_its_figures_are_those_of_the_json_files() -> None:
    for file, text in readme.pages().items():
        assert file.read_text() == text, f"python examples/evidence/readme.py writes another {file.name}"
    rows = json.loads((ROOT / "examples" / "evidence" / "quality.json").read_text())["rows"]
    (ours,) = [row for row in rows if (row["model"], row["method"], row["times"]) == ("seed 1", "litefocus", 8)]
    assert f"{ours['frechet']['diff']:+.2f} ± {ours['frechet']['diff_se']:.2f} |" in README


@pytest.mark.parametrize(("seconds", "tiled"), [(80.0, False), (30.0, True)])
def test_the_memory_of_encoding_is_counted_again(seconds: float, tiled: bool) -> None:
    rows = json.loads((ROOT / "examples" / "evidence" / "encoding.json").read_text())["rows"]
    assert encoding.count(seconds, tiled) in rows


def test_what_it_says_that_one_sees_is_what_the_code_says() -> None:
    section = README.split("## Troubleshooting")[1].split("\n## ")[0]
    seen = [text.removesuffix(" ...") for text in re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)]
    assert len(seen) == 3
    strings = [
        node.value
        for path in (ROOT / "litefocus").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert [text for text in seen if not any(text in string for string in strings)] == []
