"""Generate many clips with LiteFocus attention, by any number of workers, on one machine or on many.

    python examples/generate_many.py prompts.txt --output clips
    torchrun --nproc_per_node 8 examples/generate_many.py prompts.jsonl --output clips --seconds 60 --batch-size 4

The second starts eight workers, one a GPU; on two nodes, give it on both, with --output on a disk that both see. All
workers of a folder share its work, whatever started them, and nothing but the folder is between them: a clip is claimed
by a file beside it before it is made. The claim of a worker that is gone is taken over: on its own machine at once (if
that is Linux), on others once it was quiet for three minutes.

Prompts are lines of text, or of JSON with "prompt" and, if they differ from the command line's, "seed" and "seconds".
Every clip is a wav, named after its prompt and a digest of prompt, seed and settings, and a line in
records-HOST.jsonl: its settings, who made it, how long it took, or why it failed. Run the same command again to go on
where it stopped, to make again what is not as large and long as its record says, and to try again what failed; other
prompts or settings make further files. A clip depends on its prompt, seed and settings alone, not on the number of
workers; with --batch-size it differs by rounding from the one made alone. --model as it is written and --dtype are
settings too, and the default of --dtype is another on a machine without a GPU. The exit code is 1 where clips failed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import platform
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _cli

Job = dict[str, Any]
BEAT, STALE = 15.0, 180.0  # seconds; a network file system may show the age of a file a minute late
CONTAINER = Path("/proc/self/ns/pid")  # Linux has it
MAIN = os.environ.get("RANK", "0") == "0"  # the worker that tells, of those that one command has started


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options and, as `args.lines`, what the file of prompts asks for, checked."""
    parser = _cli.Parser(__doc__)
    parser.add_argument("prompts", type=Path, help=".txt or .jsonl")
    parser.add_argument("--output", type=Path, default=Path("clips"), help="folder (default: %(default)s)")
    together = "clips of one length made together, for a GPU with memory for them (default: %(default)s)"
    parser.add_argument("--batch-size", type=int, default=1, help=together)
    args = parser.parse_args(argv)
    if {"MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ:
        parser.error("accelerate launch has started one worker, as it does on a CPU: use torchrun --nproc_per_node N")
    with _cli.refusing():
        args.lines = read_jobs(args.prompts)
    return args


def read_jobs(path: Path) -> list[Job]:
    """What every line asks for: a prompt, perhaps seed and seconds. Raises ValueError for the first bad line."""
    jobs = []
    for number, line in _cli.read_lines(path):
        try:
            own = json.loads(line) if path.suffix == ".jsonl" else {"prompt": line}
            if not isinstance(own, dict) or "prompt" not in own or not own.keys() <= {"prompt", "seed", "seconds"}:
                raise ValueError('must hold "prompt" and at most "seed", "seconds"')
            _cli.check(own)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        jobs.append(own)
    return jobs


if __name__ == "__main__":
    parse()  # `--help` and mistakes are answered before the imports below, which take seconds

with _cli.interruptible():
    import soundfile
    import torch
    from generate import load
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


class Folder:
    """A folder of clips that any number of workers fill, on any number of machines: what is there, who makes what.

    Claims of a clip are files NAME.wav.claim-0, and, where the worker of that is gone, claim-1, and so on: the file
    system grants each to one worker alone. A worker touches its claims while it lives. Records lie in a file for every
    machine, as appending is safe from torn lines on one, but not from others over a network.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.worker = {"host": platform.node(), "pid": os.getpid()}
        if CONTAINER.exists():  # containers of one name may number their processes each for itself
            self.worker["host"] += f"-{CONTAINER.stat().st_ino}"
        self.ends: dict[Path, int] = {}  # of what was read
        self.held: dict[str, Path] = {}
        self.tried: tuple[str, Path] | None = None
        path.mkdir(parents=True, exist_ok=True)
        self.log = path / f"records-{platform.node()}.jsonl"
        threading.Thread(target=self.beat, daemon=True).start()

    def beat(self) -> None:
        """Show that the holder of the claims is alive."""
        while True:
            time.sleep(BEAT)
            for path in list(self.held.values()):
                with contextlib.suppress(OSError):
                    os.utime(path)

    def read(self) -> list[Job]:
        """The records that have come since the last call, of all workers. A torn line is passed over."""
        records = []
        for path in sorted(self.path.glob("records*.jsonl")):
            with path.open("rb") as file:
                file.seek(self.ends.get(path, 0))
                *lines, rest = file.read().split(b"\n")
                self.ends[path] = file.tell() - len(rest)
            for line in lines:
                with contextlib.suppress(ValueError):
                    records.append(json.loads(line))
        return records

    def append(self, record: Job) -> None:
        """Add a line in one write, which workers of one machine do not tear. A torn line before is ended."""
        with self.log.open("a+b", buffering=0) as file:
            file.seek(max(file.tell() - 1, 0))
            torn = file.read(1) not in (b"", b"\n")
            file.write(("\n" * torn + json.dumps({**record, **self.worker}, ensure_ascii=False) + "\n").encode())

    def holds(self, record: Job) -> bool:
        """Whether the clip of a record is there, as large and as long as the record says."""
        path = self.path / record["file"]
        try:
            return path.stat().st_size == record["bytes"] and soundfile.info(path).frames == record["samples"]
        except (OSError, KeyError, soundfile.SoundFileError):
            return False

    def claim(self, name: str) -> bool:
        """Claim a clip, unless a worker that is alive has claimed it."""
        for number in itertools.count():
            path = self.path / f"{name}.claim-{number}"
            self.tried = name, path  # Ctrl-C may come between the two lines below
            try:
                with path.open("x") as file:
                    self.held[name] = path
                    json.dump(self.worker, file)
                return True
            except FileExistsError:
                self.tried = None
                if self.alive(path):
                    return False

    def alive(self, claim: Path) -> bool:
        """Whether the worker of a claim is alive: its process, where it is of this machine, and its touch."""
        try:
            self.log.touch()  # what time it is where the folder lies
            quiet = self.log.stat().st_mtime - claim.stat().st_mtime
            worker = json.loads(claim.read_text())
        except FileNotFoundError:
            return False
        except ValueError:  # it is being written
            worker = {}
        here = CONTAINER.exists() and worker.get("host") == self.worker["host"]
        return quiet < STALE and not (here and not Path(f"/proc/{worker['pid']}").exists())

    def mine(self, claim: Path) -> bool:
        """Whether a claim is there, and this worker's: Ctrl-C may have come before, or while it was written."""
        try:
            return bool(json.loads(claim.read_text()) == self.worker)
        except FileNotFoundError:
            return False
        except ValueError:
            return True

    def close(self) -> None:
        """Give up all claims, and with each those before it, whose workers are gone."""
        if self.tried and self.mine(self.tried[1]):
            self.held.setdefault(*self.tried)
        for name, path in self.held.items():
            for number in range(int(path.suffix.rpartition("-")[2]) + 1):
                (self.path / f"{name}.claim-{number}").unlink(missing_ok=True)
        self.held.clear()
        self.tried = None


def alike(pipe: Any, job: Job) -> tuple[float, int]:
    """What clips that are made together share: their length, and that of their prompts in tokens.

    AudioLDM 2 pads shorter prompts to the longest, and its language model takes the padding for text.
    """
    tokenizer = getattr(pipe, "tokenizer_2", None)
    return -job["seconds"], len(tokenizer(job["prompt"])["input_ids"]) if tokenizer else 0


def claim_alike(folder: Folder, todo: Iterable[tuple[Any, Job]], size: int) -> list[Job]:
    """Claim the next clip that nobody makes, and up to `size` in all that are alike. `todo` is sorted by what is."""
    for _, group in itertools.groupby(todo, key=lambda pair: pair[0]):
        claimed = (job for _, job in group if folder.claim(job["file"]))
        if batch := list(itertools.islice(claimed, size)):
            return batch
    return []


def generate(pipe: Any, jobs: list[Job]) -> Any:
    """Samples of clips that are alike, made together, each from a generator of its own: what it would be alone."""
    first = jobs[0]
    options = {} if first["guidance"] is None else {"guidance_scale": first["guidance"]}
    return pipe(
        [job["prompt"] for job in jobs],
        audio_length_in_s=first["seconds"],
        num_inference_steps=first["steps"],
        generator=[torch.Generator("cpu").manual_seed(job["seed"]) for job in jobs],
        **options,
    ).audios.astype("float32")


def make(pipe: Any, jobs: list[Job], folder: Path) -> Iterator[Job]:
    """Generate and write clips that are alike; the record of each, or of why it failed."""
    started = time.perf_counter()
    rate = pipe.vocoder.config.sampling_rate
    try:
        clips = generate(pipe, jobs)
        took = round((time.perf_counter() - started) / len(jobs), 3)
        for job, clip in zip(jobs, clips, strict=True):
            path = folder / job["file"]
            _cli.save_sound(path, clip, rate)
            yield {**job, "took": took, "samples": len(clip), "bytes": path.stat().st_size}
    except Exception as error:  # the others go on
        if _cli.disk_full(error):
            raise
        for job in jobs:
            yield {**job, "error": f"{type(error).__name__}: {error}"}


def main(argv: list[str] | None = None) -> int:
    """Generate what is missing, with all others who do so; the exit code, of a command's first worker alone."""
    args = parse(argv)
    with _cli.refusing():
        _cli.complete(args)
        if args.device.type == "cuda":
            args.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        jobs = jobs_of(args)
        folder = Folder(args.output)
        made = {record["file"]: record for record in folder.read() if "error" not in record}
        missing = [job for job in jobs if job["file"] not in made or not folder.holds(made[job["file"]])]
        todo: dict[str, tuple[Any, Job]] = {}
        if missing:
            _cli.check_space(args.output, sum(job["seconds"] for job in missing))
            pipe, _ = load(args)
            pipe.set_progress_bar_config(disable=True)
            kinds = [(alike(pipe, job), job) for job in missing]
            todo = {job["file"]: (kind, job) for kind, job in sorted(kinds, key=lambda pair: pair[0])}
            if MAIN:
                _cli.note_unknown_words(pipe, *(job["prompt"] for job in missing))

    started = time.perf_counter()
    records: list[Job] = []
    with contextlib.closing(folder), tqdm(total=len(todo), desc="clips", disable=not MAIN) as bar:
        while todo:
            batch = claim_alike(folder, todo.values(), args.batch_size)
            for record in folder.read():  # of all workers, so after the claim: another may just have made the clip
                if todo.pop(record["file"], None):
                    records.append(record)
                    bar.update()
                    if "error" in record and MAIN:
                        tqdm.write(f"{record['file']} ({record['prompt']!r}): {record['error']}", file=sys.stderr)
            if claimed := [job for job in batch if job["file"] in todo]:
                for record in make(pipe, claimed, folder.path):
                    folder.append(record)
            elif todo and not batch:
                time.sleep(1)  # the others are at work on what is left
            folder.close()
    for claim in folder.path.glob("*.claim-*"):  # of who was gone between a record and its claim
        if claim.stem in {job["file"] for job in jobs}:
            claim.unlink(missing_ok=True)
    if not MAIN:
        return 0
    made = [record for record in records if "error" not in record]
    failed = len(records) - len(made)
    print(f"{len(made)} done, {len(jobs) - len(missing)} there before, {failed} failed", end="")
    if made:
        speed = sum(record["seconds"] for record in made) / (time.perf_counter() - started)
        workers = len({(record["host"], record["pid"]) for record in made})
        print(f"; {speed:.2f} s of audio a second, {workers} worker(s)", end="")
    print(f", in {args.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    with _cli.interruptible():
        sys.exit(main())
