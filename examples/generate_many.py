"""Generate many clips with LiteFocus attention, on as many devices as there are.

    accelerate launch --num_processes 2 examples/generate_many.py prompts.txt --output clips
    python examples/generate_many.py prompts.jsonl --output clips --seconds 60

Prompts are lines of text, or of JSON with "prompt" and, if they differ from the command line's, "seed" and "seconds".
Every clip is a wav, named after its prompt and a digest of prompt, seed and settings, and a line in records.jsonl: its
settings, how long it took, or why it failed. Run the same command again to go on where it stopped, and to try
again what failed; other prompts or settings make further files. A clip depends on its
prompt, seed and settings alone, not on the number of processes. The exit code is 1 where clips failed.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import os
import re
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import _cli

RECORDS = "records.jsonl"
Job = dict[str, Any]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options and, as `args.lines`, what the file of prompts asks for, checked."""
    parser = _cli.Parser(__doc__)
    parser.add_argument("prompts", type=Path, help=".txt or .jsonl")
    parser.add_argument("--output", type=Path, default=Path("clips"), help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    with _cli.refusing():
        args.lines = read_lines(args.prompts)
    return args


def read_lines(path: Path) -> list[Job]:
    """What every line asks for: a prompt, perhaps seed and seconds. Raises ValueError for the first bad line."""
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            own = json.loads(line) if path.suffix == ".jsonl" else {"prompt": line.strip()}
            if not isinstance(own, dict) or "prompt" not in own or not own.keys() <= {"prompt", "seed", "seconds"}:
                raise ValueError('must hold "prompt" and at most "seed", "seconds"')
            _cli.check(own)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        lines.append(own)
    if not lines:
        raise ValueError(f"{path} holds no prompt")
    return lines


if __name__ == "__main__":
    parse()  # `--help` and mistakes are answered before the imports below, which take seconds

with _cli.interruptible():
    import soundfile
    from accelerate import PartialState
    from generate import generate, load
    from tqdm import tqdm


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """What to generate, one record a clip, each clip once."""
    names = ("seconds", "steps", "guidance", "model", "dtype", "tile_decoding", "seed")
    common = {name: getattr(args, name) for name in names} | {"attention": asdict(args.config)}
    jobs: dict[str, Job] = {}
    repeats: Counter[tuple[str, float]] = Counter()
    for own in args.lines:
        job = {**common, **own}
        job["seconds"] = float(job["seconds"])
        if "seed" not in own:  # a prompt that comes again is another clip
            job["seed"] += repeats[job["prompt"], job["seconds"]]
            repeats[job["prompt"], job["seconds"]] += 1
        jobs.setdefault(file_name(job), {"file": file_name(job), **job})
    return list(jobs.values())


def file_name(job: Job) -> str:
    """The start of the prompt, for people, and a digest of everything that the clip depends on."""
    stem = re.sub(r"\W+", "-", job["prompt"].lower()).strip("-")[:40]
    return f"{stem or 'clip'}-{hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:12]}.wav"


def shares(jobs: list[Job], processes: int) -> list[list[Job]]:
    """The jobs of every process: longest first, each to the process that has the least to do so far."""
    parts: list[list[Job]] = [[] for _ in range(processes)]
    loads = [(0.0, process) for process in range(processes)]
    for job in sorted(jobs, key=lambda job: -job["seconds"]):
        load, process = heapq.heappop(loads)
        parts[process].append(job)
        heapq.heappush(loads, (load + job["seconds"], process))
    return parts


def append(path: Path, record: Job) -> None:
    """Add a line in one write, which processes that append to one file do not tear. A torn line before is ended."""
    file = os.open(path, os.O_APPEND | os.O_CREAT | os.O_RDWR | getattr(os, "O_BINARY", 0), 0o644)
    try:
        torn = os.fstat(file).st_size > 0
        if torn:
            os.lseek(file, -1, os.SEEK_END)
            torn = os.read(file, 1) != b"\n"
        os.write(file, ("\n" * torn + json.dumps(record, ensure_ascii=False) + "\n").encode())
    finally:
        os.close(file)


def read_records(file: TextIO) -> list[Job]:
    """The records from where `file` stands to its end. Torn lines are passed over; one at the end is left for later."""
    records = []
    while True:
        start = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(start)
            return records
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue


def make(pipe: Any, job: Job, folder: Path) -> Job:
    """Generate one clip; the record of it, or of why it failed."""
    started = time.perf_counter()
    try:
        audio, _ = generate(pipe, job)
        rate = pipe.vocoder.config.sampling_rate
        _cli.save(folder / job["file"], lambda whole: soundfile.write(whole, audio, rate))
    except Exception as error:  # the others go on
        return {**job, "error": f"{type(error).__name__}: {error}"}
    return {**job, "took": round(time.perf_counter() - started, 3)}


def watch(file: TextIO, names: set[str], bar: tqdm, records: dict[str, Job]) -> None:
    """Collect the records of all processes as they come, until there is one for each of `names`."""
    while records.keys() < names:
        for record in read_records(file):
            if record["file"] in names:
                records[record["file"]] = record
                bar.update()
                if "error" in record:
                    tqdm.write(f"{record['file']} ({record['prompt']!r}): {record['error']}", file=sys.stderr)
        time.sleep(0.2)


def main(argv: list[str] | None = None) -> int:
    """Generate what is missing; the exit code, of the first process that for all of them."""
    args = parse(argv)
    with _cli.refusing():
        _cli.complete(args)
        jobs = jobs_of(args)
        args.output.mkdir(parents=True, exist_ok=True)
        state = PartialState()
        args.device = state.device
        path = args.output / RECORDS
        path.touch()
        pending = [job for job in jobs if not (args.output / job["file"]).exists()]
        log = path.open(encoding="utf-8")
        recorded = {record["file"] for record in read_records(log) if "error" not in record}
        if state.is_main_process:
            for job in jobs:
                if job not in pending and job["file"] not in recorded:  # stopped between clip and record
                    append(path, job)
        log.seek(0, os.SEEK_END)
        state.wait_for_everyone()  # before the first clip is there, so that all share out the same
        if pending:
            pipe, _ = load(args)
            pipe.set_progress_bar_config(disable=True)

    started = time.perf_counter()
    records: dict[str, Job] = {}
    with tqdm(total=len(pending), desc="clips", disable=not state.is_main_process) as bar:
        names = {job["file"] for job in pending}
        watcher = threading.Thread(target=watch, args=(log, names, bar, records), daemon=True)
        if state.is_main_process:
            watcher.start()
        for job in shares(pending, state.num_processes)[state.process_index]:
            append(path, make(pipe, job, args.output))
        if not state.is_main_process:
            return 0
        watcher.join()
    log.close()
    failed = sum("error" in record for record in records.values())
    print(f"{len(records) - failed} done, {len(jobs) - len(pending)} there before, {failed} failed", end="")
    if made := sum(record["seconds"] for record in records.values() if "error" not in record):
        print(f"; {made / (time.perf_counter() - started):.2f} s of audio a second", end="")
    print(f", in {args.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    with _cli.interruptible():
        sys.exit(main())
