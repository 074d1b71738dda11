"""examples/generate_many.py: what is made, what is kept, and how workers share a folder, one of them killed midway."""

import collections
import concurrent.futures
import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
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

SCRIPT = Path(generate_many.__file__)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
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
        file, text = tmp_path / "prompts.txt", "\n".join(prompts)
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        files = [str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "clips")]
        return generate_many.main([*files, *SETTINGS, *options])

    return run


def records(folder: Path) -> list[dict[str, Any]]:
    lines = [line for path in folder.glob("records-*.jsonl") for line in path.read_text().splitlines(keepends=True)]
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def clips(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (folder / "clips").glob("*.wav")}


def test_failures_are_told_and_tried_again(
    many: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(pipe: Any, jobs: list[dict[str, Any]]) -> np.ndarray:
        if jobs[0]["prompt"] == "a bell":
            raise RuntimeError("out of memory")
        return made(pipe, jobs)

    made = generate_many.generate
    monkeypatch.setattr(generate_many, "generate", fails)
    assert many(["a drone", "a bell", "a kick drum"]) == 1
    told = capsys.readouterr()
    assert "2 done, 0 there before, 1 failed; " in told.out
    assert " s of audio a second, 1 worker(s), in " in told.out
    assert "('a bell'): RuntimeError: out of memory" in told.err
    (bell,) = (record for record in records(tmp_path / "clips") if record["prompt"] == "a bell")
    assert bell["error"] == "RuntimeError: out of memory"
    before = clips(tmp_path)
    assert len(before) == 2

    monkeypatch.setattr(generate_many, "generate", made)
    assert many(["a drone", "a bell", "a kick drum"]) == 0
    assert "1 done, 2 there before, 0 failed; " in capsys.readouterr().out
    after = clips(tmp_path)
    assert len(after) == 3
    assert before.items() <= after.items()


def test_a_wav_that_is_not_as_its_record_says_is_made_again(
    many: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["a drone", "a bell", "a kick drum", "a tom drum"]
    assert many(prompts) == 0
    before = clips(tmp_path)
    cut, zeros, gone, _ = (tmp_path / "clips" / name for name in sorted(before))
    cut.write_bytes(cut.read_bytes()[:100])
    zeros.write_bytes(bytes(zeros.stat().st_size))  # as a crash of the machine leaves it
    gone.unlink()
    (tmp_path / "clips" / f"{cut.name}.claim-0").write_text('{"host": "elsewhere", "pid": 1}')
    os.utime(tmp_path / "clips" / f"{cut.name}.claim-0", (0, 0))
    (tmp_path / "clips" / "another.wav.claim-0").write_text("")
    assert many(prompts) == 0
    assert [path.name for path in claims(tmp_path / "clips")] == ["another.wav.claim-0"]
    assert "3 done, 1 there before, 0 failed; " in capsys.readouterr().out
    assert {name: content for name, (content, _) in clips(tmp_path).items()} == {
        name: content for name, (content, _) in before.items()
    }
    assert many(prompts) == 0
    assert "0 done, 4 there before, 0 failed, in " in capsys.readouterr().out


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


def test_records_are_read_once_whole_and_those_of_other_machines_too(tmp_path: Path) -> None:
    folder = generate_many.Folder(tmp_path)
    folder.append({"file": "a"})
    (tmp_path / "records-elsewhere.jsonl").write_text('{"file": "b"}\n{"file": "c"')
    assert {record["file"] for record in folder.read()} == {"a", "b"}
    assert folder.read() == []
    with (tmp_path / "records-elsewhere.jsonl").open("a") as file:
        file.write("}\n")
    assert folder.read() == [{"file": "c"}]
    with folder.log.open("a") as file:
        file.write('{"file": "0000')  # torn by a kill
    folder.append({"file": "d"})
    assert folder.read() == [{"file": "d", **folder.worker}]


def claims(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.claim-*"))


def test_a_clip_is_claimed_by_one_worker_also_if_it_is_taken_over(tmp_path: Path) -> None:
    names = [f"{number}.wav" for number in range(40)]
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    folders = [generate_many.Folder(tmp_path) for _ in range(6)]
    for name in names[:20]:  # a dead worker's
        (tmp_path / f"{name}.claim-0").write_text(json.dumps({**folders[0].worker, "pid": gone.pid}))
    with concurrent.futures.ThreadPoolExecutor(6) as workers:
        got = list(workers.map(lambda folder: [name for name in names if folder.claim(name)], folders))
    assert sorted(name for part in got for name in part) == sorted(names)
    assert not folders[0].claim(names[0])
    for folder in folders:
        folder.close()
    assert claims(tmp_path) == []
    assert folders[1].claim(names[0])


@pytest.mark.parametrize(("before", "taken"), [(True, False), (False, False), (True, True)])
def test_ctrl_c_while_a_clip_is_claimed_leaves_no_claim_and_takes_none(
    before: bool, taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes before the file is there, or right after."""
    folder, make = generate_many.Folder(tmp_path), Path.open
    if taken:
        (tmp_path / "a.wav.claim-0").write_text(json.dumps({"host": "elsewhere", "pid": 1}))

    def press(path: Path, *args: Any) -> Any:
        if not before:
            make(path, *args).close()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "open", press)
    with pytest.raises(KeyboardInterrupt):
        folder.claim("a.wav")
    monkeypatch.undo()
    folder.close()
    assert len(claims(tmp_path)) == taken


def test_the_claim_of_another_machine_lasts_while_its_worker_shows_that_it_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = generate_many.Folder(tmp_path)
    claim = tmp_path / "a.wav.claim-0"
    for text in ('{"host": "elsewhere", "pid": 1}', "", json.dumps(folder.worker)):  # "": between create and write
        claim.write_text(text)
        for quiet, free in ((0, False), (170, False), (190, True)):
            os.utime(claim, (time.time() - quiet,) * 2)
            assert folder.claim("a.wav") is free
        folder.close()
    monkeypatch.setattr(generate_many, "BEAT", 0.05)
    folder = generate_many.Folder(tmp_path)
    folder.claim("b.wav")
    os.utime(tmp_path / "b.wav.claim-0", (0, 0))
    deadline = time.monotonic() + 60
    while (tmp_path / "b.wav.claim-0").stat().st_mtime == 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_runs_on_one_folder_share_the_work(
    pipe: Any, many: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def slow(pipe: Any, jobs: list[dict[str, Any]]) -> np.ndarray:
        made.extend(job["prompt"] for job in jobs)
        time.sleep(0.1)
        return np.zeros((len(jobs), 10240), dtype="float32")

    monkeypatch.setattr(generate_many, "generate", slow)
    prompts = [f"{number} bells" for number in range(20)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))  # both runs read it
    with concurrent.futures.ThreadPoolExecutor(2) as workers:
        runs = [workers.submit(many, prompts, "--batch-size", str(size)) for size in (1, 2)]
        assert [run.result() for run in runs] == [0, 0]
    assert sorted(made) == sorted(prompts)
    assert len(records(tmp_path / "clips")) == 20
    assert claims(tmp_path / "clips") == []


def test_clips_that_are_made_together_are_what_they_are_alone(
    pipe: Any, many: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["a bell", "a drone", "a slow tabla", "a kick", "a fast robot voice", "a tom"]
    batches: list[list[dict[str, Any]]] = []
    together: dict[str, np.ndarray] = {}
    made = generate_many.generate

    def noted(pipe: Any, jobs: list[dict[str, Any]]) -> np.ndarray:
        batches.append(jobs)
        audios = made(pipe, jobs)
        together.update({job["prompt"]: audio for job, audio in zip(jobs, audios, strict=True)})
        return audios

    monkeypatch.setattr(generate_many, "generate", noted)
    assert many(prompts, "--batch-size", "3", "--seed", "3") == 0
    assert [[job["prompt"] for job in jobs] for jobs in batches] == [
        ["a bell", "a drone", "a kick"],
        ["a tom"],
        ["a slow tabla"],  # AudioLDM 2 would hear the padding of a shorter prompt
        ["a fast robot voice"],
    ]
    for job in (job for jobs in batches for job in jobs):
        alone, _ = generate.generate(pipe, job)
        assert np.array_equal(made(pipe, [job])[0], alone)
        assert np.abs(together[job["prompt"]] - alone).max() < 1e-4 * np.abs(alone).max()
    assert len({audio.tobytes() for audio in together.values()}) == 6


def test_a_disk_that_fills_up_is_one_line_and_no_failure_of_a_clip(
    many: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[Path] = []

    def write(path: Path, content: Any) -> None:
        written.append(path)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        with path.open("wb") as file:
            file.write(content)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", write)
        with pytest.raises(SystemExit) as stop, _cli.interruptible():
            many(["a bell", "a drone", "a kick"])
    assert stop.value.code == 1
    assert "error: disk full: cannot write " in capsys.readouterr().err.splitlines()[-1]
    assert len(written) == 2
    assert ["error" in record for record in records(tmp_path / "clips")] == [False]
    assert claims(tmp_path / "clips") == []
    assert many(["a bell", "a drone", "a kick"]) == 0
    assert "2 done, 1 there before" in capsys.readouterr().out

    usage = collections.namedtuple("usage", "free")(90_000)
    monkeypatch.setattr(_cli.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(generate_many, "load", lambda args: pytest.fail("work was begun"))
    with pytest.raises(SystemExit) as stop:
        many(["a bell", "a drone", "a kick", "a tom", "a cymbal", "a tabla", "bells", "drones"])  # 5 are missing
    assert stop.value.code == 2
    message = f"error: disk full: 0.1 MB are needed in {tmp_path / 'clips'}, and 0.1 MB are free"
    assert capsys.readouterr().err.strip().endswith(message)


def test_a_launcher_that_starts_fewer_workers_than_it_was_asked_for_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a bell\n")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", str(SCRIPT)]
    command += [str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "clips")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert "error: accelerate launch has started one worker, as it does on a CPU: use torchrun" in done.stderr
    assert not (tmp_path / "clips").exists()


@pytest.mark.slow
def test_torchrun_shares_the_work_of_as_many_workers_as_were_asked_for(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(f"{number} bells" for number in range(12)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(SCRIPT)]
    command += [str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "clips"), "--seconds", "1.28", "--steps", "6"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.count("12 done, 0 there before, 0 failed; ") == 1  # of the first worker alone
    assert "2 worker(s)" in done.stdout
    made = records(tmp_path / "clips")
    assert len({record["file"] for record in made}) == len(made) == 12
    assert len({record["pid"] for record in made}) == 2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="who is gone is seen at once on Linux alone")
def test_of_two_launches_one_is_killed_and_the_other_makes_what_one_alone_makes(pipe: Any, tmp_path: Path) -> None:
    names = ("tabla", "bell", "drone", "kick", "cowbell", "hat", "snare", "tom", "cymbal", "robot", "guitar", "bass")
    lines = [{"prompt": f"a fast {name}", "seed": 7} for name in names]
    lines[2]["seconds"] = 2.56  # is made first
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, lines)))
    two = tmp_path / "two"
    options = ["--seconds", "1.28", "--steps", "6"]
    command = [sys.executable, str(SCRIPT), str(prompts), "--output", str(two), *options]

    def makers() -> set[int]:
        return {record["pid"] for record in records(two)}

    def holders() -> set[int]:
        found = set()
        for claim in claims(two):
            with contextlib.suppress(OSError, ValueError):
                found.add(json.loads(claim.read_text())["pid"])
        return found

    with contextlib.ExitStack() as stack:
        one, other = (
            stack.enter_context(
                subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
            for _ in range(2)
        )
        deadline = time.monotonic() + 300
        while len(makers()) < 2 or one.pid not in holders():
            assert one.poll() is other.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        one.send_signal(signal.SIGKILL)
        one.communicate(timeout=60)
        told, _ = other.communicate(timeout=300)
    assert other.returncode == 0
    assert "12 done, 0 there before, 0 failed; " in told
    assert "2 worker(s)" in told
    assert claims(two) == []
    after = records(two)
    assert sorted(record["prompt"] for record in after) == sorted(line["prompt"] for line in lines)  # each once
    assert makers() == {one.pid, other.pid}
    for record in after:
        alone, _ = generate.generate(pipe, record)
        heard = soundfile.read(two / record["file"])[0]
        assert np.abs(heard - alone).max() <= 2**-15
        assert len(heard) == round(16000 * record["seconds"])


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
        ("a.txt", "a drone", ["--batch-size", "0"], "batch_size must be an integer of at least 1, got 0"),
        ("a.txt", b"a bell\na caf\xe9", [], "a.txt, line 2: not UTF-8: b'a caf\\xe9'; save the file as"),
        ("a.jsonl", '{"prompt": "\xe9"}'.encode("latin-1"), [], "a.jsonl, line 1: not UTF-8: "),
        ("missing.txt", None, [], "No such file"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(name, text, options, message, tmp_path, refused) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in refused(generate_many.main, str(tmp_path / name), "--output", str(tmp_path / "clips"), *options)
    assert not (tmp_path / "clips").exists()
