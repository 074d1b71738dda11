"""examples/tango.py in a clone of Tango: its code and librosa are stand-ins, UNet, VAE and vocoder are real."""

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _cli
import numpy as np
import pytest
import soundfile
import support.tango
import torch
from support.tango import AudioDiffusion, TangoVAE, tango_unet
from torch import nn

import litefocus
from litefocus import LiteFocusConfig

SCRIPT = Path(_cli.__file__).parents[1] / "tango.py"


class Tango(support.tango.Tango):
    """Loaded by its name, as the original is."""

    def __init__(self, name: str, device: str) -> None:
        torch.manual_seed(0)
        super().__init__(tango_unet())
        self.name = name
        made.append(self)


made: list[Tango] = []


@pytest.fixture
def tango(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., np.ndarray]:
    """Run examples/tango.py in a "clone" whose `tango` holds the class above; the clip."""

    def keywords_only(**given: Any) -> dict[str, Any]:
        return given

    filters = types.SimpleNamespace(mel=keywords_only)
    util = types.SimpleNamespace(pad_center=lambda data, *, size: (data, size))
    librosa = types.ModuleType("librosa")
    librosa.filters, librosa.util = filters, util  # type: ignore[attr-defined]
    for name, module in {"librosa": librosa, "librosa.filters": filters, "librosa.util": util}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "tango", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    script = {"__name__": "example"}
    exec(compile(SCRIPT.read_text(), "tango.py", "exec"), script)
    clone = types.ModuleType("tango")
    clone.Tango = Tango  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tango", clone)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "audioldm").mkdir()
    (tmp_path / "tango.py").touch()
    monkeypatch.setattr(_cli, "on_hub", lambda model: True)
    needs = script["NEEDS"].copy()  # type: ignore[attr-defined]
    script["NEEDS"].clear()  # type: ignore[attr-defined]

    def run(*arguments: str) -> np.ndarray:
        made.clear()
        script["main"](["rain on a roof", "--steps", "1", *arguments])  # type: ignore[operator]
        return soundfile.read(tmp_path / "tango.wav")[0]

    run.librosa = librosa  # type: ignore[attr-defined]
    run.needs, run.needed = needs, script["NEEDS"]  # type: ignore[attr-defined]
    return run


def test_tango_makes_long_clips(tango: Any) -> None:
    clip = tango("--seconds", "15", "--sparse-ratio", "0.3")
    assert len(clip) == pytest.approx(15 * 16000, abs=160)
    assert made[0].name == "declare-lab/tango2"
    assert litefocus.status(made[0]).config == LiteFocusConfig(sparse_ratio=0.3)
    assert tango.librosa.filters.mel(16000, 1024, n_mels=64) == {"sr": 16000, "n_fft": 1024, "n_mels": 64}
    assert tango.librosa.util.pad_center([1], 2) == ([1], 2)
    again = tango("--seconds", "15", "--sparse-ratio", "0.3")
    assert np.array_equal(clip, again)

    half = tango("--seconds", "15", "--sparse-ratio", "0.3", "--dtype", "bfloat16")
    assert made[0].model.unet.dtype == torch.bfloat16
    assert made[0].model.text_encoder.dtype == made[0].vae.inner.dtype == torch.float32
    assert not np.array_equal(half, clip)
    assert np.abs(half - clip).mean() < 0.2 * np.abs(clip).mean()


def test_tango_offloads(tango: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[tuple[str, str]] = []

    def to(self: nn.Module, device: Any) -> nn.Module:
        if isinstance(self, (AudioDiffusion, TangoVAE)) and made:
            moves.append((type(self).__name__, str(device)))
        return self

    clip = tango("--seconds", "2")
    for kind in (AudioDiffusion, TangoVAE):
        monkeypatch.setattr(kind, "to", to, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_cli, "peak_memory", lambda: "")
    assert np.array_equal(tango("--seconds", "2", "--offload", "--dtype", "float32"), clip)
    assert moves == [("TangoVAE", "cpu"), ("AudioDiffusion", "cuda"), ("AudioDiffusion", "cpu"), ("TangoVAE", "cuda")]


def test_tango_checks_first(tango: Any, refused: Callable[..., str]) -> None:
    for arguments, message in (
        (["--steps", "-2"], "steps must be"),
        (["--output", "a.ogg"], "output must end in .wav"),
    ):
        assert message in refused(lambda given: tango(*given), *arguments)
    assert made == []


def test_tango_says_where_to_run_it_and_all_that_it_needs(
    tango: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    def error() -> str:
        return refused(lambda _: tango()).split(": error: ")[1]

    tango.needed.update({**tango.needs, "yaml_too": "pyyaml-too"})
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # where nothing is installed
    for name in tango.needs:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(_cli, "config_class", lambda: LiteFocusConfig)
    everything = "einops librosa progressbar scipy torchaudio tqdm pyyaml pyyaml-too"
    assert error() == f"Tango's code needs more: pip install {everything}"
    assert set(everything.split()) - {"pyyaml-too"} <= set(SCRIPT.read_text().split('"""')[1].split())
    (tmp_path / "audioldm").rmdir()
    place = "run this in a clone of declare-lab/tango: git clone https://github.com/declare-lab/tango"
    assert error() == place
    monkeypatch.chdir(SCRIPT.parent)  # which holds a tango.py
    assert error() == place
