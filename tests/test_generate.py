"""examples/generate.py as a user runs it."""

import collections
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _cli
import generate
import numpy as np
import pytest
import soundfile
from data import NOUNS
from DeepCache import DeepCacheSDHelper
from judge import classify
from test_cli import options

import litefocus
from litefocus import LiteFocusConfig

SCRIPT = Path(generate.__file__)


@pytest.mark.slow
def test_the_default_clip_sounds_as_prompted(tmp_path: Path) -> None:
    """The README's first command. The judge was trained on assembled recordings, never on generated clips."""
    command = [sys.executable, SCRIPT]
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
    short = ["--seconds", "3", "--steps", "3", "--min-sampled", "0", "--sparse-ratio", "0"]
    generate.main([*short, "--compare", "--runs", "1", "--output", str(tmp_path / "a.wav")])
    assert {path.name for path in tmp_path.iterdir()} == {"a.wav", "a_dense.wav", "a.png"}
    patched, dense = (soundfile.read(tmp_path / name)[0] for name in ("a.wav", "a_dense.wav"))
    assert patched.shape == dense.shape == (48000,)
    assert np.abs(patched - dense).max() > 1e-3
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out
    assert "dense: 3.00 s of audio in" in lines
    assert "speed-up of the whole pipeline:" in lines

    generate.main([*short, "--no-patch", "--output", str(tmp_path / "b.wav")])
    assert np.array_equal(soundfile.read(tmp_path / "b.wav")[0], dense)


def test_prompts_over_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options_ = ["a slow bell", "--seconds", "6", "--steps", "2", "--output", str(tmp_path / "a.wav")]
    generate.main([*options_, "--at", "4", "a fast mermaid", "--at", "2", "a snare drum", "--fade", "1"])
    assert "note: words that this model does not know: mermaid\n" in capsys.readouterr().err
    pipe, _ = generate.load(options())
    litefocus.schedule_prompts(pipe, {2: "a snare drum", 4: "a fast mermaid"}, fade=1)
    clip, _ = generate.generate(pipe, {"prompt": "a slow bell", "seconds": 6, "steps": 2, "guidance": 5.0, "seed": 0})
    assert np.abs(soundfile.read(tmp_path / "a.wav")[0] - clip).max() < 1e-4  # 16 bits


def test_step_cache_is_deepcache(tmp_path: Path) -> None:
    generate.main(["--seconds", "3", "--steps", "4", "--step-cache", "2", "--output", str(tmp_path / "a.wav")])
    pipe, _ = generate.load(options())
    settings = {"prompt": _cli.PROMPT, "seconds": 3, "steps": 4, "guidance": 5.0, "seed": 0}
    without, _ = generate.generate(pipe, settings)
    helper = DeepCacheSDHelper(pipe)
    helper.set_params(cache_interval=2)
    helper.enable()
    clip, _ = generate.generate(pipe, settings)
    assert np.abs(soundfile.read(tmp_path / "a.wav")[0] - clip).max() < 1e-4  # 16 bits
    assert np.abs(without - clip).max() > 1e-2


def test_both_ways_take_turns_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = generate.load(options())
    litefocus.unpatch(pipe)
    calls, labels = [], []

    def timed(pipe: Any, settings: dict[str, Any]) -> tuple[np.ndarray, float]:
        calls.append((litefocus.status(pipe).config, settings["steps"]))
        labels.append(pipe._progress_bar_config["desc"])
        return np.zeros(1), float(len(calls))

    monkeypatch.setattr(generate, "generate", timed)
    config = LiteFocusConfig(sparse_ratio=0.5)
    _, took = generate.compare(pipe, config, {"steps": 7, "runs": 2})
    assert calls == [(None, 1), (None, 7), (config, 1), (config, 7)] * 2
    assert took == {"dense": [2, 6], "litefocus": [4, 8]}
    names = ["dense 1 of 2", "litefocus 1 of 2", "dense 2 of 2", "litefocus 2 of 2"]
    assert labels[1::2] == names
    assert labels[::2] == [f"{name.split()[0]}, warming up" for name in names]


def test_a_speed_up_above_the_bound_comes_with_the_reason() -> None:
    line, above = "speed-up of the whole pipeline: 4", "50x, above the 4.00x that the arithmetic saved suggests: "
    assert (
        _cli.speed_up([9, 4, 2], [2, 1, 1], 4.5)
        == f"{line}.00x, where 4.50x is expected from the arithmetic that is saved"
    )
    scatter = "the timings scatter by more than that (dense 5.0 to 10.0 s, litefocus 1.0 to 2.0 s)"
    assert _cli.speed_up([9, 10, 5], [2, 1, 2], 4.0) == f"{line}.{above}{scatter}"
    slow = "an operation of dense attention takes longer on this machine than one of the rest of the UNet"
    assert _cli.speed_up([9, 10, 9], [2, 2, 2], 4.0) == f"{line}.{above}{slow}"


def test_words_outside_of_the_vocabulary_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate.main(["Slow zither, and kazoo", "--seconds", "1", "--steps", "1", "--output", str(tmp_path / "a.wav")])
    first, second = capsys.readouterr().err.splitlines()[:2]
    assert first == "note: words that this model does not know: zither, kazoo"
    assert second == f"it knows, slow, medium or fast: {', '.join(nouns[0] for nouns in NOUNS.values())}"


def test_a_full_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    """Before the work where it can be seen, and after it where not."""
    monkeypatch.setattr(generate, "generate", lambda pipe, settings: (np.zeros(16000, dtype=np.float32), 1.0))

    def write(path: Path, content: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(SystemExit) as stop, _cli.interruptible():
        generate.main(["--seconds", "1", "--output", str(tmp_path / "a.wav")])
    assert stop.value.code == 1
    assert "error: disk full: cannot write " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

    usage = collections.namedtuple("usage", "free")(1_500_000)
    monkeypatch.setattr(_cli.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(generate, "load", lambda args: pytest.fail("work was begun"))
    for arguments in (["--seconds", "60"], ["--seconds", "30", "--compare"]):
        message = f"error: disk full: 1.9 MB are needed in {tmp_path}, and 1.5 MB are free"
        assert refused(generate.main, *arguments, "--output", str(tmp_path / "a.wav")).endswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "prompt must be text, and not empty, got ''"),
        (["--seconds", "0"], "seconds must be a number between 0.5 and 3600, got 0.0"),
        (["--seconds", "nan"], "seconds must be a number between 0.5 and 3600, got nan"),
        (["--seconds", "a minute"], "argument --seconds: invalid float value: 'a minute'"),
        (["--steps", "0"], "steps must be an integer between 1 and 1000, got 0"),
        (["--guidance", "-1"], "guidance must be a finite number of at least 0, got -1"),
        (["--seed", "-1"], "seed must be an integer of at least 0 and below 2**63, got -1"),
        (["--compare", "--runs", "0"], "runs must be an integer of at least 1, got 0"),
        (["--runs", "3"], "--runs needs --compare"),
        (["--step-cache", "1"], "--step-cache must be at least 2, and --compare makes clips without it"),
        (["--step-cache", "2", "--compare"], "--step-cache must be at least 2, and --compare makes clips without it"),
        (["a", "slow", "bell", "--seconds", "3"], 'a prompt of several words needs quotes: "a slow bell"'),
        (["a bell", "--sparse", "1", "--no-such"], "unrecognized arguments: --no-such"),
        (["--dtype", "float8"], "argument --dtype: invalid choice: 'float8'"),
        (["--time-window", "0"], "time_window must be an integer of at least 1, got 0"),
        (["--min-freq-bins", "99"], "set min_freq_bins to 8 or less"),
        (["--output", "clip.ogg"], "output must end in .wav, .flac, .mp3, got clip.ogg"),
        (["--output", "missing/clip.wav"], "cannot write into missing: No such file or directory"),
        (["--model", "missing"], "cannot use missing: no such folder, and hub ids look like owner/name"),
        (["--model", "."], "cannot use ."),
        (["--at", "a bell", "10"], "a later prompt needs the seconds at which it begins, got 'a bell'"),
        (["--at", "20", "a bell"], "a later prompt must begin above 0 and below 20 s, the clip's end, got 20"),
        (["--at", "nan", "a bell"], "a later prompt must begin above 0 and below 20 s, the clip's end, got nan"),
        (["--at", "5", " "], "prompt must be text, and not empty, got ' '"),
        (["--at", "5", "a bell", "--at", "6", "a tom"], "later prompts must begin at least 2 s apart"),
        (["--at", "5", "a bell", "--at", "5", "a tom", "--fade", "0"], "later prompts must begin at least 0 s apart"),
        (["--fade", "-1"], "fade must be a finite number of at least 0, got -1.0"),
        (["--no-patch", "--compare"], "argument --compare: not allowed with argument --no-patch"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(arguments, message, tmp_path, monkeypatch, refused) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(generate.main, *arguments)
    assert list(tmp_path.iterdir()) == []


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
