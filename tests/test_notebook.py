"""The notebook, the sounds, and how large the folder of examples is."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest
import soundfile

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_embedded_pipeline_stays_small() -> None:
    files = [path for path in (EXAMPLES / "embedded").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    assert len([path for path in EXAMPLES.iterdir() if path.name != "__pycache__"]) <= 10
    assert {path.suffix for path in files if path.stat().st_size > 1e5} == {".safetensors"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own parts
def test_the_notebook_runs_from_any_folder(tmp_path: Path) -> None:
    path = EXAMPLES / "litefocus.ipynb"
    assert path.stat().st_size < 1.5e6
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum("<audio" in str(cell.outputs) for cell in cells) == 4
    assert "%pip install" in cells[0].source
    quicker = {'rhythm", 20, 20': 'rhythm", 12, 2', "range(4)": "range(2)", "seconds=60)\n": "seconds=24)\n"}
    for setting, quick in quicker.items():
        (cell,) = [cell for cell in cells if setting in cell.source]
        cell.source = cell.source.replace(setting, quick)
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()  # raises CellExecutionError where a cell fails
    shown = ""
    bars = 0
    for output in (output for cell in cells for output in cell.outputs):
        text = str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
        if output.get("name") == "stderr":  # nothing but progress bars, labelled
            assert re.fullmatch(r"\s*|\r[\w ,]+ s: .*|\rdense and litefocus, turns: .*", text, re.S), text
            bars += text.count(" 0/")
            continue
        assert len(text.splitlines()) <= 12, text
        shown += text
    assert bars == 7
    lengths = re.findall(r"(\d+) s: .* less arithmetic for the small embedded UNet\n", shown)
    assert lengths == ["12", "60", "300", "600"]
    assert "the same: True" in shown
    assert sum("<audio" in str(cell.outputs) for cell in cells) == 4
    assert sum("image/png" in str(cell.outputs) for cell in cells) == 2
    assert list(tmp_path.iterdir()) == []


def test_the_sounds_are_pairs_and_small() -> None:
    clips = {path.stem: soundfile.info(path) for path in (EXAMPLES / "evidence" / "sounds").glob("*.mp3")}
    assert clips.pop("three_minutes").duration == pytest.approx(180, abs=0.1)
    assert clips.pop("three_sounds").duration == pytest.approx(60, abs=0.1)
    patched = [stem for stem in clips if not stem.endswith("_dense")]
    assert len(patched) == 4
    assert sorted(clips) == sorted([*patched, *(f"{stem}_dense" for stem in patched)])
    assert {round(clip.duration, 1) for clip in clips.values()} == {20.0}
    assert sum(path.stat().st_size for path in (EXAMPLES / "evidence" / "sounds").iterdir()) < 2.5e6
