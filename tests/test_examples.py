"""The main job as a user runs it: the embedded pipeline, examples/generate.py, and what the README prints."""

from pathlib import Path

import generate
import minutes
import nbclient
import nbformat
import numpy as np
import pytest
import soundfile
import torch
from diffusers import AudioLDM2Pipeline
from judge import classify

import litefocus

ROOT = Path(__file__).parents[1]


def test_the_default_clip_sounds_as_prompted(tmp_path: Path) -> None:
    """The README's first command. The judge was trained on assembled recordings, never on generated clips."""
    output = tmp_path / "clip.wav"
    generate.main(["--output", str(output)])
    audio, rate = soundfile.read(output)
    assert (rate, len(audio)) == (16000, 320000)
    assert 0.05 < np.abs(audio).max() <= 1
    assert classify(audio) == ("tabla", "fast")
    assert list(tmp_path.iterdir()) == [output]


def test_compare_writes_both_clips_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate.main(["a slow bell", "--seconds", "6", "--steps", "2", "--compare", "--output", str(tmp_path / "a.wav")])
    assert {path.name for path in tmp_path.iterdir()} == {"a.wav", "a_dense.wav", "a.png"}
    patched, dense = (soundfile.read(tmp_path / name)[0] for name in ("a.wav", "a_dense.wav"))
    assert patched.shape == dense.shape == (96000,)
    assert np.abs(patched - dense).max() > 1e-3
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out
    assert "dense: 6.00 s of audio in" in lines
    assert "speed-up of the whole pipeline:" in lines

    generate.main(["a slow bell", "--seconds", "6", "--steps", "2", "--no-patch", "--output", str(tmp_path / "b.wav")])
    assert np.array_equal(soundfile.read(tmp_path / "b.wav")[0], dense)


def test_words_outside_of_the_vocabulary_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate.main(["a slow zither", "--seconds", "1", "--steps", "1", "--output", str(tmp_path / "a.wav")])
    assert "not in this model's vocabulary" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0"], "--seconds must be between 0.5 and 3600, got 0"),
        (["--seconds", "nan"], "--seconds must be between 0.5 and 3600, got nan"),
        (["--seconds", "1e9"], "--seconds must be between 0.5 and 3600"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--guidance", "-1"], "--guidance must be finite and at least 0, got -1"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--output", "clip.mp3"], "--output must end in .wav, got clip.mp3"),
        (["--output", "missing/clip.wav"], "cannot write into missing: No such file or directory"),
        (["--model", "missing"], "cannot use missing: no such folder, and hub ids look like owner/name"),
        (["--model", "."], "cannot use ."),
    ],
)
def test_errors_are_one_line_and_leave_nothing(arguments, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        generate.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore")  # of Jupyter's own parts
def test_the_notebook_runs_from_the_first_cell_to_the_last() -> None:
    path = ROOT / "examples" / "litefocus.ipynb"
    assert path.stat().st_size < 1.5e6
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum("audio/ogg" in str(cell.outputs) or "<audio" in str(cell.outputs) for cell in cells) == 3
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()  # raises CellExecutionError where a cell fails


def test_the_readme_shows_the_table_as_printed() -> None:
    pipe = AudioLDM2Pipeline.from_pretrained(ROOT / "examples" / "embedded" / "pipeline")
    litefocus.patch(pipe)
    assert repr(litefocus.status(pipe, seconds=80)) in (ROOT / "README.md").read_text()


def test_the_embedded_pipeline_stays_small() -> None:
    files = [path for path in (ROOT / "examples" / "embedded").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    assert {path.suffix for path in files if path.stat().st_size > 1e5} == {".safetensors"}


def test_decoding_in_windows_is_all_but_the_same() -> None:
    pipe = AudioLDM2Pipeline.from_pretrained(ROOT / "examples" / "embedded" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    latents = pipe("a fast tabla rhythm", audio_length_in_s=10.24, num_inference_steps=8, output_type="latent").audios
    scaled = latents / pipe.vae.config.scaling_factor
    with torch.inference_mode():
        whole = pipe.vae.decode(scaled).sample
        mels = minutes.in_windows(lambda x: pipe.vae.decode(x).sample, scaled, 4, window=128, overlap=16)
        exact = pipe.vocoder(whole[:, 0]).numpy()[:, : 160 * whole.shape[2]]  # which ends a little later
    assert mels.shape == whole.shape
    assert (mels - whole).abs().mean() < 0.1  # nats; group norms see a window where they saw the clip
    seam = slice(511, 513)
    assert (mels - whole)[:, :, seam].abs().mean() < 0.1
    np.testing.assert_allclose(minutes.vocode(pipe, whole, window=300), exact, atol=1e-5)
    assert np.array_equal(minutes.decode(pipe, latents, window=10**6), exact)
    assert minutes.decode(pipe, latents, window=100, overlap=8).shape == exact.shape


def test_clips_of_minutes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "clip.wav"
    minutes.main(["a slow bell", "--seconds", "45", "--steps", "2", "--output", str(output)])
    assert soundfile.info(output).frames == 45 * 16000
    assert "45 s of audio in" in capsys.readouterr().out
