"""The main job as a user runs it: the embedded pipeline, the examples, and what the README prints."""

import argparse
import dataclasses
import math
import signal
import subprocess
import sys
import types
import typing
from pathlib import Path
from typing import Any

import generate
import nbclient
import nbformat
import numpy as np
import pytest
import soundfile
import torch
from diffusers import AudioLDM2Pipeline, DDPMScheduler, UNet2DConditionModel
from judge import classify
from torch import Tensor, nn

import litefocus
from litefocus import LiteFocusConfig

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def options(*argv: str) -> argparse.Namespace:
    args = generate.Parser(None).parse_args(argv)
    generate.complete(args)
    return args


def test_the_default_clip_sounds_as_prompted(tmp_path: Path) -> None:
    """The README's first command. The judge was trained on assembled recordings, never on generated clips."""
    command = [sys.executable, EXAMPLES / "generate.py"]
    shown = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    audio, rate = soundfile.read(tmp_path / "clip.wav")
    assert (rate, len(audio)) == (16000, 320000)
    assert 0.05 < np.abs(audio).max() <= 1
    assert classify(audio) == ("tabla", "fast")
    assert [path.name for path in tmp_path.iterdir()] == ["clip.wav"]
    # no warning reaches the user, whatever transformers and diffusers are to change next
    assert [line for line in shown.stderr.splitlines() if line and "/50 [" not in line] == []
    assert shown.stdout.startswith("litefocus: 20.00 s of audio in ")


def test_compare_writes_both_clips_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--seconds", "6", "--steps", "8", "--min-sampled", "0", "--sparse-ratio", "0"]
    generate.main([*short, "--compare", "--runs", "1", "--output", str(tmp_path / "a.wav")])
    assert {path.name for path in tmp_path.iterdir()} == {"a.wav", "a_dense.wav", "a.png"}
    patched, dense = (soundfile.read(tmp_path / name)[0] for name in ("a.wav", "a_dense.wav"))
    assert patched.shape == dense.shape == (96000,)
    assert np.abs(patched - dense).max() > 1e-3
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out
    assert "dense: 6.00 s of audio in" in lines
    assert "speed-up of the whole pipeline:" in lines

    generate.main([*short, "--no-patch", "--output", str(tmp_path / "b.wav")])
    assert np.array_equal(soundfile.read(tmp_path / "b.wav")[0], dense)


def test_both_ways_take_turns_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = generate.load(options())
    litefocus.unpatch(pipe)
    calls = []

    def timed(pipe: Any, settings: dict[str, Any]) -> tuple[np.ndarray, float]:
        calls.append((litefocus.status(pipe).config, settings["steps"]))
        return np.zeros(1), float(len(calls))

    monkeypatch.setattr(generate, "generate", timed)
    config = LiteFocusConfig(sparse_ratio=0.5)
    _, took = generate.compare(pipe, config, {"steps": 7, "runs": 2})
    assert calls == [(None, 1), (None, 7), (config, 1), (config, 7)] * 2
    assert took == {"dense": [2, 6], "litefocus": [4, 8]}


@pytest.mark.parametrize(
    ("dense", "patched", "line"),
    [
        ([9, 4, 2], [2, 1, 1], "4.00x, where arithmetic alone allows at most 4.50x"),  # of medians
        (
            [9, 10, 5],
            [2, 1, 2],
            "4.50x, above the 4.00x that arithmetic allows: the timings scatter by more than that "
            "(dense 5.0 to 10.0 s, litefocus 1.0 to 2.0 s)",
        ),
        (
            [9, 10, 9],
            [2, 2, 2],
            "4.50x, above the 4.00x that arithmetic allows: an operation of dense attention takes longer on this "
            "machine than one of the rest of the UNet",
        ),
    ],
)
def test_a_speed_up_above_the_bound_comes_with_the_reason(dense: list[int], patched: list[int], line: str) -> None:
    bound = 4.5 if "4.50x" in line.split(",")[1] else 4.0
    assert generate.speed_up(dense, patched, bound) == f"speed-up of the whole pipeline: {line}"


def test_words_outside_of_the_vocabulary_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate.main(["a slow zither", "--seconds", "1", "--steps", "1", "--output", str(tmp_path / "a.wav")])
    assert "not in this model's vocabulary" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "prompt must be text, and not empty, got ''"),
        (["--seconds", "0"], "seconds must be a number between 0.5 and 3600, got 0.0"),
        (["--seconds", "nan"], "seconds must be a number between 0.5 and 3600, got nan"),
        (["--seconds", "1e9"], "seconds must be a number between 0.5 and 3600, got 1000000000.0"),
        (["--seconds", "a minute"], "argument --seconds: invalid float value: 'a minute'"),
        (["--steps", "0"], "steps must be an integer between 1 and 1000, got 0"),
        (["--guidance", "-1"], "guidance must be a finite number of at least 0, got -1"),
        (["--seed", "-1"], "seed must be an integer of at least 0 and below 2**63, got -1"),
        (["--compare", "--runs", "0"], "runs must be an integer of at least 1, got 0"),
        (["--dtype", "float8"], "argument --dtype: invalid choice: 'float8'"),
        (["--time-window", "0"], "time_window must be an integer of at least 1, got 0"),
        (["--min-freq-bins", "99"], "set min_freq_bins to 8 or less"),
        (["--output", "clip.ogg"], "output must end in .wav, .flac, .mp3, got clip.ogg"),
        (["--output", "missing/clip.wav"], "cannot write into missing: No such file or directory"),
        (["--model", "missing"], "cannot use missing: no such folder, and hub ids look like owner/name"),
        (["--model", "."], "cannot use ."),
        (["--no-patch", "--compare"], "argument --compare: not allowed with argument --no-patch"),
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


@pytest.mark.parametrize("arguments", [["--offload"], ["--dtype", "float16"]], ids=" ".join)
def test_what_needs_a_gpu_says_so(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a GPU"):
        options(*arguments)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = options(*arguments)
    assert (args.device, args.dtype) == (torch.device("cuda"), "float16")


def test_every_field_of_the_configuration_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert options().config == LiteFocusConfig()
    changed = {}
    argv = []
    for field in dataclasses.fields(LiteFocusConfig):
        flag = "focus-seed" if field.name == "seed" else field.name.replace("_", "-")
        if field.default is True:
            changed[field.name], argv = False, [*argv, f"--no-{flag}"]
        else:
            changed[field.name] = 0.75 if isinstance(field.default, float) else 3
            argv += [f"--{flag}", str(changed[field.name])]
    changed["same_frequency"] = True  # one of the two branches has to stay
    argv.remove("--no-same-frequency")
    args = options(*argv)
    assert args.config == LiteFocusConfig(**changed)
    assert args.seed == 0
    assert options("--time-window", "none").config.time_window is None
    with pytest.raises(SystemExit):
        generate.Parser("").parse_args(["--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(LiteFocusConfig):
        assert f"(default: {field.default})" in " ".join(shown.split())


def test_decoding_is_tiled_unless_told_otherwise() -> None:
    def peak(*argv: str) -> list[int]:
        """Mel frames of every call of the VAE's last layer."""
        pipe, _ = generate.load(options(*argv))
        frames: list[int] = []
        pipe.vae.decoder.conv_out.register_forward_hook(lambda _, inputs, __: frames.append(inputs[0].shape[2]))
        pipe.set_progress_bar_config(disable=True)
        generate.generate(pipe, {"prompt": "a bell", "seconds": 25, "steps": 1, "guidance": 1.0, "seed": 0})
        return frames

    assert max(peak()) < 2500
    assert peak("--no-tile-decoding") == [2500]


def test_half_precision_and_offloading() -> None:
    settings = {"prompt": "a bell", "seconds": 0.64, "steps": 1, "guidance": 2.0, "seed": 0}
    pipe, _ = generate.load(options("--dtype", "bfloat16"))
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.vocoder, pipe.language_model)} == {torch.bfloat16}
    clip, _ = generate.generate(pipe, settings)
    assert clip.dtype == np.float32
    assert np.isfinite(clip).all()

    whole = generate.load_pipeline(str(generate.EMBEDDED), "cpu")
    parts = generate.load_pipeline(str(generate.EMBEDDED), "cpu", offload=True)
    assert not hasattr(whole.unet, "_hf_hook")
    assert hasattr(parts.unet, "_hf_hook")
    assert np.array_equal(generate.generate(parts, settings)[0], generate.generate(whole, settings)[0])


def test_peak_memory_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resource", reason="Unix has it")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shown = generate.peak_memory()
    used = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1])
    assert shown.endswith(" GiB of memory at most")
    assert math.isclose(float(shown.split()[0]), used / 2**20, abs_tol=0.02)
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert generate.peak_memory() == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    assert generate.peak_memory() == "3.00 GiB of GPU memory at most"


@pytest.mark.parametrize("script", ["generate.py", "generate_many.py"])
def test_ctrl_c_is_one_line(script: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a slow bell\n")
    prompts = ["prompts.txt"] if "many" in script else []
    command = [sys.executable, str(EXAMPLES / script), *prompts, "--steps", "1000"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, bufsize=1) as running:
        assert running.stderr is not None
        shown = ""
        while "/1 [" not in shown and "/1000 [" not in shown:  # the progress bar
            shown += running.stderr.read(1)
        running.send_signal(signal.SIGINT)
        shown += running.communicate(timeout=120)[1]
    assert running.returncode == 130
    assert shown.strip().splitlines()[-1] == "interrupted"
    assert "Traceback" not in shown
    assert not list(tmp_path.rglob("*.wav*"))


# --- Tango -----------------------------------------------------------------------------------------------------------

WIDTH = 16  # of the embeddings


class Model(nn.Module):
    """What tango.py calls of Tango's `AudioDiffusion`, around a small UNet of its kind."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(
            in_channels=8,
            out_channels=8,
            block_out_channels=(8, 16, 16, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=WIDTH,
            use_linear_projection=True,
            upcast_attention=True,
        )
        self.text_encoder = nn.Embedding(256, WIDTH)

    def prepare_latents(
        self, batch_size: int, inference_scheduler: Any, num_channels_latents: int, dtype: torch.dtype, device: Any
    ) -> Tensor:
        return torch.randn(batch_size, num_channels_latents, 256, 16, dtype=dtype, device=device)

    def inference(
        self, prompt, inference_scheduler, num_steps, guidance_scale, num_samples, disable_progress
    ) -> Tensor:
        assert not disable_progress
        embeds = self.text_encoder(torch.tensor([list(prompt[0].encode())]))
        inference_scheduler.set_timesteps(num_steps)
        latents = self.prepare_latents(1, inference_scheduler, 8, embeds.dtype, embeds.device)
        for t in inference_scheduler.timesteps:
            mask = torch.ones(embeds.shape[:2], dtype=torch.bool)
            noise = self.unet(latents, t, encoder_hidden_states=embeds, encoder_attention_mask=mask).sample
            latents = inference_scheduler.step(guidance_scale * noise, t, latents).prev_sample
        return latents


class VAE(nn.Module):
    """What Tango calls of AudioLDM's VAE, around the embedded pipeline's VAE and vocoder."""

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.inner, self.vocoder = pipe.vae, pipe.vocoder
        self.encoder, self.decoder = pipe.vae.encoder, pipe.vae.decoder
        levels = len(pipe.vae.config.block_out_channels)
        for part in (self.encoder, self.decoder):
            part.num_resolutions, part.downsample_time_stride4_levels = levels, ()
        config, vocoder = pipe.vocoder.config, pipe.vocoder
        vocoder.h = types.SimpleNamespace(
            num_mels=config.model_in_dim, upsample_rates=config.upsample_rates, sampling_rate=config.sampling_rate
        )
        vocoder.ups = vocoder.upsampler

    def decode(self, z: Tensor) -> Tensor:
        return self.inner.decode(z).sample

    def decode_first_stage(self, z: Tensor) -> Tensor:
        return self.decode(z)

    def decode_to_waveform(self, mel: Tensor) -> np.ndarray:
        return self.vocoder(mel.squeeze(1)).numpy()


class Tango:
    """A plain object, as `tango.Tango` is."""

    def __init__(self, name: str, device: str) -> None:
        torch.manual_seed(0)
        pipe = AudioLDM2Pipeline.from_pretrained(generate.EMBEDDED)
        self.vae, self.model, self.scheduler = VAE(pipe).to(device), Model().to(device).eval(), DDPMScheduler()
        self.name = name
        made.append(self)

    @torch.no_grad()
    def generate(
        self, prompt: str, steps: int, guidance: float, samples: int = 1, disable_progress: bool = True
    ) -> Any:
        latents = self.model.inference([prompt], self.scheduler, steps, guidance, samples, disable_progress)
        mel = self.vae.decode_first_stage(latents)
        return self.vae.decode_to_waveform(mel)[0]


made: list[Tango] = []


@pytest.fixture
def tango(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> typing.Callable[..., np.ndarray]:
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
    exec(compile((EXAMPLES / "tango.py").read_text(), "tango.py", "exec"), script)
    clone = types.ModuleType("tango")
    clone.Tango = Tango  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tango", clone)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> np.ndarray:
        made.clear()
        script["main"](["rain on a roof", "--steps", "1", *arguments])  # type: ignore[operator]
        return soundfile.read(tmp_path / "tango.wav")[0]

    run.librosa = librosa  # type: ignore[attr-defined]
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
    assert made[0].model.text_encoder.weight.dtype == made[0].vae.inner.dtype == torch.float32
    assert not np.array_equal(half, clip)
    assert np.abs(half - clip).mean() < 0.2 * np.abs(clip).mean()


def test_tango_offloads(tango: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[tuple[str, str]] = []

    def to(self: nn.Module, device: Any) -> nn.Module:
        if isinstance(self, (Model, VAE)) and made:
            moves.append((type(self).__name__, str(device)))
        return self

    clip = tango("--seconds", "2")
    monkeypatch.setattr(Model, "to", to, raising=False)
    monkeypatch.setattr(VAE, "to", to, raising=False)
    monkeypatch.setattr(generate.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(generate, "peak_memory", lambda: "")
    assert np.array_equal(tango("--seconds", "2", "--offload", "--dtype", "float32"), clip)
    assert moves == [("VAE", "cpu"), ("Model", "cuda"), ("Model", "cpu"), ("VAE", "cuda")]


def test_tango_checks_first(tango: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--steps", "-2"], "steps must be"),
        (["--output", "a.ogg"], "output must end in .wav"),
    ):
        with pytest.raises(SystemExit) as stop:
            tango(*arguments)
        error = capsys.readouterr().err
        assert (stop.value.code, message in error, len(error.strip().splitlines())) == (2, True, 1)
    assert made == []


# --- the notebook, the README and the embedded pipeline --------------------------------------------------------------


def test_the_embedded_pipeline_stays_small() -> None:
    files = [path for path in (ROOT / "examples" / "embedded").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    assert {path.suffix for path in files if path.stat().st_size > 1e5} == {".safetensors"}


@pytest.mark.filterwarnings("ignore")  # of Jupyter's own parts
def test_the_notebook_runs_from_any_folder(tmp_path: Path) -> None:
    path = EXAMPLES / "litefocus.ipynb"
    assert path.stat().st_size < 1.5e6
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum("<audio" in str(cell.outputs) for cell in cells) == 3
    assert "%pip install" in cells[0].source
    for setting, quick in {
        'rhythm", 20, 20': 'rhythm", 12, 2',
        "range(4)": "range(2)",
        "seconds=60)\n": "seconds=24)\n",
    }.items():
        (cell,) = [cell for cell in cells if setting in cell.source]
        cell.source = cell.source.replace(setting, quick)
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()  # raises CellExecutionError where a cell fails
    shown = ""
    for output in (output for cell in cells for output in cell.outputs):
        text = str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
        assert len(text.splitlines()) <= 12, text
        assert output.get("name") != "stderr", text
        shown += text
    assert "12 s: " in shown
    assert "the same: True" in shown
    assert sum("<audio" in str(cell.outputs) for cell in cells) == 3
    assert sum("image/png" in str(cell.outputs) for cell in cells) == 2
    assert list(tmp_path.iterdir()) == []


def test_the_sounds_are_pairs_and_small() -> None:
    clips = {path.stem: soundfile.info(path) for path in (EXAMPLES / "sounds").glob("*.mp3")}
    assert clips.pop("three_minutes").duration == pytest.approx(180, abs=0.1)
    patched = [stem for stem in clips if not stem.endswith("_dense")]
    assert len(patched) == 4
    assert sorted(clips) == sorted([*patched, *(f"{stem}_dense" for stem in patched)])
    assert {round(clip.duration, 1) for clip in clips.values()} == {20.0}
    assert sum(path.stat().st_size for path in (EXAMPLES / "sounds").iterdir()) < 2e6
