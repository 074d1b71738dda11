"""What the programs share: options, what they refuse, precision and offloading, Ctrl-C, and how fast they answer."""

import argparse
import dataclasses
import http.server
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import _cli
import generate
import numpy as np
import pytest
import torch

from litefocus import LiteFocusConfig

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def options(*argv: str) -> argparse.Namespace:
    args = _cli.Parser(None).parse_args(argv)
    _cli.complete(args)
    return args


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
        _cli.Parser("").parse_args(["--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(LiteFocusConfig):
        assert f"(default: {field.default})" in " ".join(shown.split())


def test_half_precision_and_offloading() -> None:
    settings = {"prompt": "a bell", "seconds": 0.64, "steps": 1, "guidance": 2.0, "seed": 0}
    pipe, _ = generate.load(options("--dtype", "bfloat16"))
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.vocoder, pipe.language_model)} == {torch.bfloat16}
    clip, _ = generate.generate(pipe, settings)
    assert clip.dtype == np.float32
    assert np.isfinite(clip).all()

    whole = _cli.load_pipeline(str(_cli.EMBEDDED), "cpu")
    parts = _cli.load_pipeline(str(_cli.EMBEDDED), "cpu", offload=True)
    assert not hasattr(whole.unet, "_hf_hook")
    assert hasattr(parts.unet, "_hf_hook")
    assert np.array_equal(generate.generate(parts, settings)[0], generate.generate(whole, settings)[0])


def test_peak_memory_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resource", reason="Unix has it")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shown = _cli.peak_memory()
    used = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1])
    assert shown.endswith(" GiB of memory at most")
    assert math.isclose(float(shown.split()[0]), used / 2**20, abs_tol=0.02)
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert _cli.peak_memory() == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    assert _cli.peak_memory() == "3.00 GiB of GPU memory at most"


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


def test_ctrl_c_during_imports_ends_the_program_also_if_they_swallow_it(tmp_path: Path) -> None:
    swallows = "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    pass\n"
    (tmp_path / "torch.py").write_text(swallows)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "generate.py")], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.strip()) == (130, "interrupted")


@pytest.mark.parametrize("server", ["refuses", "is silent", "answers"])
def test_no_network_is_said_in_under_five_seconds(server: str, tmp_path: Path) -> None:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(404)
            self.end_headers()

    with (
        socket.create_server(("localhost", 0)) as silent,
        http.server.HTTPServer(("localhost", 0), Answer) as answering,
    ):
        threading.Thread(target=answering.serve_forever, daemon=True).start()
        port = {"refuses": 9, "is silent": silent.getsockname()[1], "answers": answering.server_port}[server]
        environment = {**os.environ, "HF_ENDPOINT": f"http://localhost:{port}", "HF_HOME": str(tmp_path)}
        environment["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES), str(ROOT)])

        def run(*command: str) -> subprocess.CompletedProcess[str]:
            command = (sys.executable, *command)
            return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

        if server != "answers":
            started = time.monotonic()
            done = run(str(EXAMPLES / "generate.py"), "--model", "owner/name")
            assert time.monotonic() - started < 5
            assert done.returncode == 2
            message = f"no network: http://localhost:{port} does not answer, and no copy is here"
            assert done.stderr == f"generate.py: error: cannot use owner/name: {message}\n"
            copy = tmp_path / "hub" / "models--owner--name"  # as the hub's client keeps it
            (copy / "snapshots" / "1").mkdir(parents=True)
            (copy / "refs").mkdir()
            (copy / "refs" / "main").write_text("1")
        done = run("-c", "import _cli; print(_cli.on_hub('owner/name'))")
        assert done.stdout == ("True\n" if server == "answers" else "False\n"), done.stderr
        answering.shutdown()


SOURCES = {path.relative_to(EXAMPLES): path.read_text() for path in sorted(EXAMPLES.rglob("*.py"))}
PROGRAMS = [str(path) for path, text in SOURCES.items() if 'if __name__ == "__main__":\n    parse()' in text]


def test_every_program_is_found() -> None:
    assert len(PROGRAMS) == 12
    assert all(name in PROGRAMS for name in ("generate.py", "app.py", "evidence/readme.py", "embedded/train/train.py"))


@pytest.mark.parametrize("script", PROGRAMS)
def test_help_and_mistakes_are_answered_before_torch_is_imported(script: str, tmp_path: Path) -> None:
    """An import of torch would take seconds: here there is none to be found."""
    for name in ("torch", "diffusers", "transformers", "gradio", "accelerate"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported too early')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    for arguments, code in ((["--help"], 0), (["--no-such-option"], 2)):
        command = [sys.executable, str(EXAMPLES / script), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == code, done.stderr
        assert "imported too early" not in done.stdout + done.stderr
        assert "usage: " in done.stdout if code == 0 else "error: " in done.stderr


def test_unknown_words_are_named() -> None:
    pipe = _cli.load_pipeline(str(_cli.EMBEDDED), "cpu")
    assert _cli.unknown_words(pipe, "A slow bell") == []
    assert _cli.unknown_words(pipe, "a mermaid, a BELL and a mermaid, loud") == ["mermaid", "loud"]
    assert [_cli.unknown_words(pipe, f"a slow {sound}") for sound in _cli.SOUNDS] == [[]] * 12
    assert _cli.unknown_words(SimpleNamespace(), "a mermaid") == []  # AudioLDM has one tokenizer, which knows all


@pytest.mark.parametrize(("hertz", "rate", "seconds"), [(440, 16000, 0.5), (1000, 16000, 90), (4000, 48000, 3)])
def test_spectrograms_are_over_mel(hertz: int, rate: int, seconds: float) -> None:
    tone = np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate).astype(np.float32)
    figure = _cli.spectrograms({"a tone of $x": tone}, rate)
    figure.canvas.draw()  # a $ in a title is no formula
    axes = figure.axes[0]
    (picture,) = axes.get_images()
    levels = picture.get_array()
    assert levels.shape[0] == 96
    assert levels.shape[1] <= 800
    left, right, bottom, top = picture.get_extent()
    assert (left, right, bottom) == (0, seconds, 0)
    loudest = levels.mean(axis=1).argmax()
    assert abs((loudest + 0.5) / 96 * top - 1127.01048 * math.log(1 + hertz / 700)) < 1.5 * top / 96
    ticks = dict(zip((text.get_text() for text in axes.get_yticklabels()), axes.get_yticks(), strict=True))
    assert math.isclose(ticks["1,000"], 1000, rel_tol=1e-3)  # mel is so scaled
    assert ticks["8,000"] - ticks["4,000"] < 4 * (ticks["1,000"] - ticks["500"])
    assert axes.get_ylabel() == "frequency (Hz)"
