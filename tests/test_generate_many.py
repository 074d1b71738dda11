"""examples/generate_many.py: what is made, what is kept, and two processes of accelerate, one of them killed midway."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _cli
import generate
import generate_many
import numpy as np
import pytest
import soundfile
from tqdm import tqdm

SCRIPT = Path(generate_many.__file__)
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
SETTINGS = ["--seconds", "0.64", "--steps", "2"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    args = _cli.Parser(None).parse_args([])
    _cli.complete(args)
    pipe, _ = generate.load(args)
    return pipe


@pytest.fixture
def many(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command on `prompts` into the folder clips; the exit code."""
    monkeypatch.setattr(generate_many, "load", lambda args: (pipe, None))

    def run(prompts: list[str], *options: str) -> int:
        (tmp_path / "prompts.txt").write_text("\n".join(prompts))
        files = [str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "clips")]
        return generate_many.main([*files, *SETTINGS, *options])

    return run


def records(folder: Path) -> list[dict[str, Any]]:
    path = folder / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def clips(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (folder / "clips").glob("*.wav")}


def test_failures_are_told_and_tried_again(
    many: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(pipe: Any, job: dict[str, Any]) -> tuple[np.ndarray, float]:
        if job["prompt"] == "a bell":
            raise RuntimeError("out of memory")
        return generate.generate(pipe, job)

    monkeypatch.setattr(generate_many, "generate", fails)
    assert many(["a drone", "a bell", "a kick drum"]) == 1
    told = capsys.readouterr()
    assert "2 done, 0 there before, 1 failed; " in told.out
    assert " s of audio a second, in " in told.out
    assert "('a bell'): RuntimeError: out of memory" in told.err
    (bell,) = (record for record in records(tmp_path / "clips") if record["prompt"] == "a bell")
    assert bell["error"] == "RuntimeError: out of memory"
    before = clips(tmp_path)
    assert len(before) == 2

    monkeypatch.setattr(generate_many, "generate", generate.generate)
    assert many(["a drone", "a bell", "a kick drum"]) == 0
    assert "1 done, 2 there before, 0 failed; " in capsys.readouterr().out
    after = clips(tmp_path)
    assert len(after) == 3
    assert before.items() <= after.items()

    (tmp_path / "clips" / "records.jsonl").unlink()  # as where a run stopped between clip and record
    assert many(["a drone", "a bell", "a kick drum"]) == 0
    assert "0 done, 3 there before, 0 failed, in " in capsys.readouterr().out
    assert {record["file"] for record in records(tmp_path / "clips")} == after.keys()
    assert clips(tmp_path) == after


def test_other_prompts_and_settings_leave_what_is_there(many: Callable[..., int], tmp_path: Path) -> None:
    many(["a drone", "a bell"])
    first = clips(tmp_path)
    assert sorted(name[:-17] for name in first) == ["a-bell", "a-drone"]  # and -, 12 digits, .wav
    many(["inserted at the top", "a drone", "a bell"])
    second = clips(tmp_path)
    assert len(second) == 3
    assert first.items() <= second.items()
    for options in (["--steps", "1"], ["--seed", "1"], ["--sparse-ratio", "0.5"], ["--guidance", "2"]):
        before = clips(tmp_path)
        many(["a drone"], *options)
        assert len(clips(tmp_path)) == len(before) + 1
        assert before.items() <= clips(tmp_path).items()


def test_a_prompt_that_comes_again_is_another_clip(many: Callable[..., int], tmp_path: Path) -> None:
    many(["a drone", "a bell", "a drone"], "--seed", "5")
    made = sorted((record["prompt"], record["seed"]) for record in records(tmp_path / "clips"))
    assert made == [("a bell", 5), ("a drone", 5), ("a drone", 6)]
    assert len({content for content, _ in clips(tmp_path).values()}) == 3


def test_work_is_shared_out_longest_first_and_evenly() -> None:
    jobs = [{"file": str(i), "seconds": seconds} for i, seconds in enumerate([10.0, 60.0, 10.0, 30.0, 20.0, 10.0, 5.0])]
    parts = generate_many.shares(jobs, 2)
    assert sorted(job["file"] for part in parts for job in part) == list("0123456")
    assert [sum(job["seconds"] for job in part) for part in parts] == [75, 70]
    for part in parts:
        assert [job["seconds"] for job in part] == sorted((job["seconds"] for job in part), reverse=True)


def test_the_bar_counts_the_clips_of_all_processes(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"file": "a", "of": "an earlier run"}\n')
    seen: dict[str, Any] = {}
    with path.open() as log, tqdm(total=2, disable=True) as bar:
        generate_many.read_records(log)
        bar.disable = False
        bar.update = lambda: counted.append(len(seen))  # type: ignore[method-assign]
        counted: list[int] = []
        watcher = threading.Thread(target=generate_many.watch, args=(log, {"a", "b"}, bar, seen), daemon=True)
        watcher.start()
        line = json.dumps({"file": "b"}) + "\n"
        with path.open("a") as file:  # half a line, then the rest: it is read once it is whole
            file.write(line[:5])
            file.flush()
            time.sleep(0.5)
            assert watcher.is_alive()
            file.write(line[5:])
        generate_many.append(path, {"file": "somebody else's"})
        generate_many.append(path, {"file": "a"})
        watcher.join(timeout=60)
        assert not watcher.is_alive()
        bar.disable = True
    assert counted == [1, 2]
    assert seen == {"a": {"file": "a"}, "b": {"file": "b"}}


def workers(launcher: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            stat = entry.read_text()
        except OSError:
            continue
        if int(stat.rsplit(")", 1)[1].split()[1]) == launcher:
            found.append(int(entry.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the worker to kill in /proc")
def test_goes_on_after_a_kill_and_makes_what_one_process_makes(many: Callable[..., int], tmp_path: Path) -> None:
    names = ("tabla", "bell", "drone", "kick", "cowbell", "hat", "snare", "tom")
    lines = [{"prompt": f"a fast {name}", "seed": 7} for name in names]
    lines[2]["seconds"] = 1.28  # is made first
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, lines)))
    two = tmp_path / "two"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*LAUNCH, str(SCRIPT), str(prompts), "--output", str(two), *SETTINGS]

    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True) as running:
        deadline = time.monotonic() + 300
        while not records(two) and running.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(max(workers(running.pid)), signal.SIGKILL)
        running.communicate(timeout=120)
    assert running.returncode != 0
    before = records(two)
    assert 0 < len(before) < len(lines)
    (two / "records.jsonl").write_bytes((two / "records.jsonl").read_bytes() + b'{"file": "0000')  # torn by the kill

    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=300)
    assert "8 done, 0 there before" not in done.stdout
    assert done.stdout.count(" there before, 0 failed") == 1  # of the first process alone
    after = records(two)
    assert sorted(record["prompt"] for record in after) == sorted(line["prompt"] for line in lines)  # each once
    assert after[: len(before)] == before
    assert not list(two.glob(".*"))

    assert generate_many.main([str(prompts), "--output", str(tmp_path / "one"), *SETTINGS]) == 0
    for record in after:
        heard = [soundfile.read(folder / record["file"])[0] for folder in (tmp_path / "one", two)]
        assert np.array_equal(*heard)
        assert len(heard[0]) == round(16000 * record["seconds"])


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("a.jsonl", "{", [], "a.jsonl, line 1: Expecting property name"),
        ("a.jsonl", '\n{"prompt": "a", "sed": 1}', [], 'line 2: must hold "prompt" and at most "seed", "seconds"'),
        ("a.jsonl", '["a"]', [], 'line 1: must hold "prompt"'),
        ("a.jsonl", '{"prompt": 3}', [], "line 1: prompt must be text, and not empty, got 3"),
        ("a.jsonl", '{"prompt": "\\ud800"}', [], "line 1: prompt must be text, and not empty"),
        ("a.jsonl", '{"prompt": "a", "seconds": "20"}', [], "seconds must be a number between 0.5 and 3600, got '20'"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "a", "seed": 1.5}', [], "line 2: seed must be an integer of at least"),
        ("a.txt", "\n \n", [], "a.txt holds no prompt"),
        ("a.txt", "a drone", ["--steps", "-2"], "steps must be an integer between 1 and 1000, got -2"),
        ("a.txt", "a drone", ["--min-freq-bins", "x"], "argument --min-freq-bins: invalid int value: 'x'"),
        ("a.txt", "a drone", ["--sparse-ratio", "2"], "sparse_ratio must be a finite number in [0, 1], got 2.0"),
        ("missing.txt", None, [], "No such file"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(name, text, options, message, tmp_path, capsys) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as stop:
        generate_many.main([str(tmp_path / name), "--output", str(tmp_path / "clips"), *options])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "clips").exists()
