"""Peak memory and CPU time of a ten-minute clip, by the allocator that the environment names: allocator.json.

python examples/evidence/allocator.py           # runs itself once for every setting
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time

from report import EXAMPLES, HERE, interruptible, measured, write

SETTINGS = (
    "",
    "MALLOC_TRIM_THRESHOLD_=16777216 MALLOC_MMAP_THRESHOLD_=16777216",
    "LD_PRELOAD=libtcmalloc_minimal.so.4",
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="length of the clip")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--one", metavar="SETTING", help="measure this process, and print a row")
    return parser.parse_args(argv)


def one(setting: str, seconds: float, steps: int) -> dict[str, object]:
    """Of a clip that this process makes, under the environment that it was started with."""
    import torch
    from diffusers import AudioLDM2Pipeline

    import litefocus

    torch.set_num_threads(1)
    pipe = AudioLDM2Pipeline.from_pretrained(EXAMPLES / "embedded" / "pipeline")
    litefocus.patch(pipe)
    litefocus.tile_decoding(pipe)
    begin = time.process_time()
    pipe(
        "a slow bell", audio_length_in_s=seconds, num_inference_steps=steps, generator=torch.Generator().manual_seed(0)
    )
    return {
        "setting": setting or "nothing",
        "seconds": seconds,
        "steps": steps,
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "cpu": time.process_time() - begin,
        "measured": measured("cpu", "1 thread"),
    }


def main(argv: list[str] | None = None) -> None:
    """Measure every setting in a process of its own."""
    args = parse(argv)
    if args.one is not None:
        print(json.dumps(one(args.one, args.seconds, args.steps), ensure_ascii=False))
        return
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LD_PRELOAD"))}
    rows = []
    for setting in SETTINGS:
        environment = plain | dict(pair.split("=", 1) for pair in setting.split())
        length = [f"--seconds={args.seconds}", f"--steps={args.steps}"]
        command = [sys.executable, __file__, "--one", setting, *length]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    write(HERE / "allocator.json", {"rows": rows})


if __name__ == "__main__":
    with interruptible():
        main()
