"""Generate many clips with LiteFocus attention, on as many devices as there are.

    accelerate launch --num_processes 2 examples/generate_many.py prompts.txt --output clips
    python examples/generate_many.py prompts.jsonl --output clips --seconds 60

Prompts are lines of text, or of JSON with "prompt" and, if they differ from the command line's, "seed" and "seconds".
Every clip is a wav, and a line in records.jsonl: what was asked for, how long it took, or why it failed. Run the same
command again to go on where it stopped, and to try again what failed. A clip depends on its prompt, seed and settings
alone, not on the number of processes.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import soundfile
from accelerate import PartialState
from generate import EMBEDDED, generate, guidance_for, load_pipeline, save
from tqdm import tqdm

import litefocus

RECORDS = "records.jsonl"


def read_jobs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What to generate, one record a clip. Raises ValueError for a line that cannot be read."""
    jobs = []
    for number, line in enumerate(args.prompts.read_text().splitlines(), 1):
        if not line.strip():
            continue
        own = {"prompt": line.strip()}
        if args.prompts.suffix == ".jsonl":
            try:
                own = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{args.prompts}, line {number}: {error}") from None
        if not isinstance(own, dict) or "prompt" not in own or not own.keys() <= {"prompt", "seed", "seconds"}:
            raise ValueError(f'{args.prompts}, line {number}: must hold "prompt" and at most "seed", "seconds"')
        settings = {name: getattr(args, name) for name in ("seconds", "model", "steps", "guidance", "time_window")}
        job = {"file": f"{len(jobs):05d}.wav", "seed": args.seed + len(jobs), **settings, **own}
        jobs.append(job)
    return jobs


def done(folder: Path) -> list[dict[str, Any]]:
    """The jobs of all clips that are there, as their last records tell. A torn last line is passed over."""
    last: dict[str, dict[str, Any]] = {}
    path = folder / RECORDS
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        last[record["file"]] = record
    whole = [record for record in last.values() if "error" not in record and (folder / record["file"]).exists()]
    return [{name: value for name, value in record.items() if name != "took"} for record in whole]


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a line in one write, which processes that append to one file do not tear. A torn line before is ended."""
    file = os.open(path, os.O_APPEND | os.O_CREAT | os.O_RDWR, 0o644)
    try:
        torn = os.fstat(file).st_size > 0
        if torn:
            os.lseek(file, -1, os.SEEK_END)
            torn = os.read(file, 1) != b"\n"
        os.write(file, ("\n" * torn + json.dumps(record, ensure_ascii=False) + "\n").encode())
    finally:
        os.close(file)


def make(pipe: Any, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Generate one clip; the record of it, or of why it failed."""
    started = time.perf_counter()
    try:
        with litefocus.patch(pipe, time_window=job["time_window"]):
            audio, _ = generate(pipe, argparse.Namespace(**job))
        rate = pipe.vocoder.config.sampling_rate
        save(folder / job["file"], lambda whole: soundfile.write(whole, audio, rate), quiet=True)
    except Exception as error:  # the others go on
        return {**job, "error": f"{type(error).__name__}: {error}"}
    return {**job, "took": round(time.perf_counter() - started, 3)}


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help=".txt or .jsonl")
    parser.add_argument("--output", type=Path, default=Path("clips"), help="folder (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a clip (default: %(default)s)")
    parser.add_argument("--model", default=str(EMBEDDED), help="folder or hub id (default: the embedded pipeline)")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (default: %(default)s)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's; 5 if embedded)")
    parser.add_argument("--seed", type=int, default=0, help="of the first clip, then one more each (default: 0)")
    parser.add_argument("--time-window", type=int, help="latent frames around a query, for clips of minutes")
    args = parser.parse_args(argv)
    args.guidance = guidance_for(args.model, args.guidance)
    try:
        jobs = read_jobs(args)
        args.output.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")

    state = PartialState()
    finished = done(args.output)
    pending = [job for job in jobs if job not in finished]
    state.wait_for_everyone()  # before the first clip is there, so that all share out the same
    if not pending:
        return
    pipe = load_pipeline(args.model, state.device)
    pipe.set_progress_bar_config(disable=True)
    with (
        state.split_between_processes(pending) as mine,
        tqdm(mine, desc="clips of the first process", disable=not state.is_main_process) as bar,
    ):
        for job in bar:
            record = make(pipe, job, args.output)
            append(args.output / RECORDS, record)
            if "error" in record:
                tqdm.write(f"{job['file']} ({job['prompt']!r}): {record['error']}")


if __name__ == "__main__":
    main()
