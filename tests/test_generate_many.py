"""examples/generate_many.py with accelerate: two processes, one of them killed midway, and a prompt that fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import generate_many
import numpy as np
import pytest
import soundfile

SCRIPT = Path(generate_many.__file__)
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
SETTINGS = ["--seconds", "0.64", "--steps", "4"]


def records(folder: Path) -> list[dict]:
    path = folder / "records.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


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


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the worker to kill in /proc")
def test_goes_on_after_a_kill_and_makes_what_one_process_makes(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"a fast {name}", "seed": 7} for name in ("tabla", "bell", "drone", "kick", "cowbell", "hat")]
    lines.insert(3, {"prompt": "fails", "seconds": -1})
    prompts.write_text("\n".join(map(json.dumps, lines)))
    two, one = tmp_path / "two", tmp_path / "one"
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

    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    after = generate_many.done(two)
    assert {record["prompt"] for record in after} == {line["prompt"] for line in lines} - {"fails"}
    good = [record["file"] for record in before if "error" not in record]
    text = (two / "records.jsonl").read_text()
    assert all(text.count(f'"{name}"') == 1 for name in good)  # not made again
    (failed,) = {json.loads(line)["error"] for line in text.splitlines() if '"error"' in line}
    assert failed.startswith("ValueError")
    assert not list(two.glob(".*"))

    generate_many.main([str(prompts), "--output", str(one), *SETTINGS])
    for record in after:
        clips = [soundfile.read(folder / record["file"])[0] for folder in (one, two)]
        assert np.array_equal(*clips)
        assert len(clips[0]) == 10240


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "{", "line 1: "),
        ("a.jsonl", '\n{"prompt": "a", "sed": 1}', 'line 2: must hold "prompt" and at most "seed", "seconds"'),
        ("missing.txt", None, "No such file"),
    ],
)
def test_errors_are_one_line(name: str, text: str | None, message: str, tmp_path: Path, capsys) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as stop:
        generate_many.main([str(tmp_path / name), "--output", str(tmp_path / "clips")])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
