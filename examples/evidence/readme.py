"""Write the tables of README and of the pages beside this file from the JSON files: no figure in them is typed by hand.

python examples/evidence/readme.py           # after any script of this folder has written its JSON
python examples/evidence/readme.py --check   # exit code 1 where one of them says something else
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from report import EXAMPLES, HERE, Row, interruptible, read, row_of, table


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a page is another")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse()  # `--help` and mistakes are answered before the imports below, which take seconds

with interruptible():
    import prompts
    import quality
    import speed
    import torch
    from methods import flop_ratio

    import litefocus
    from litefocus import _decoding, _grid

README = EXAMPLES.parent / "README.md"
MARKED = re.compile(r"(<!-- (figures|memory|allocator|audiosr|cache) -->\n).*?(<!-- /\2 -->)", re.DOTALL)

METHODS = ("dense", "litefocus", "paper", "time tiles", "token merging")
TIMED, SECONDS = "audioldm2", (10.0, 80.0, 600.0)
JUDGED, TIMES, LENGTH = "seed 1", 8, "41 s"  # 8 times its native length, 5.12 s


def seconds(value: float) -> str:
    """CPU seconds with two digits that matter, or more."""
    return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"


def difference(cell: dict[str, float], digits: int) -> str:
    """A difference to dense with its standard error."""
    if not cell["diff_se"]:
        return "the same"
    return f"{cell['diff']:+.{digits}f} ± {cell['diff_se']:.{digits}f}"


@functools.cache
def timed_model() -> Any:
    """Its shapes alone."""
    with torch.device("meta"):
        return speed.build(TIMED, SimpleNamespace(device="meta", dtype="float32"))


def cells(method: str, times: list[Row], sounds: list[Row]) -> Iterator[str]:
    """One line of the table."""
    for length in SECONDS[1:]:
        row = row_of(times, model=TIMED, method=method, seconds=length, device="cpu", dtype="float32")
        if row is None:
            yield f"{flop_ratio(timed_model(), speed.WAYS[method], length):.2f}x \\*"
        else:
            yield seconds(row["median"]) if method == "dense" else f"{row['ratio']:.2f}x"
    judged = row_of(sounds, model=JUDGED, method=method, times=TIMES)
    if judged is None:
        yield "not measured"
    else:
        yield f"{judged['frechet']['value']:.2f}" if method == "dense" else difference(judged["frechet"], 2)


def worse(method: str, counts: list[Row]) -> str:
    """In how many comparisons, and of what."""
    found = [count for count in counts if count["method"] == method and quality.of_usual_steps(count)]
    unets = {count["model"].split(", ")[0] for count in found}
    longest = max(length for count in found for length in count["lengths"])
    share = f"{sum(count['worse_2'] for count in found)} of {sum(count['cells'] for count in found)}"
    return f"{method} in {share} ({len(unets)} UNets, up to {longest}x)"


def figures() -> str:
    """The table of results, and where its figures come from."""
    times = read(HERE / "speed.json", "rows")["rows"]
    evaluation = json.loads((HERE / "quality.json").read_text())
    sounds = evaluation["rows"]
    header = ["", *(f"step, {length:g} s" for length in SECONDS[1:]), f"sound, {LENGTH}"]
    names = {method: f"**{method}**" if method == "litefocus" else method for method in METHODS}
    rows = [[name, *cells(method, times, sounds)] for method, name in names.items()]
    shown = [
        row for row in times if row["model"] == TIMED and row["method"] in METHODS and row["seconds"] in SECONDS[1:]
    ]
    judged = row_of(sounds, model=JUDGED, method="litefocus", times=TIMES) or sounds[0]
    machines = " and ".join(dict.fromkeys(row["measured"].split(",")[0] for row in shown))
    date = judged["measured"].split(", ")[-1]
    judgements = [worse(name, evaluation["counts"]) for name in ("litefocus", "paper", "time tiles")]
    dense = row_of(sounds, model=JUDGED, method="dense", times=TIMES) or sounds[0]
    pooled = {row["method"]: row["drift"] for row in quality.pooled(sounds)}
    drifts = [difference(pooled[name], 4) for name in ("litefocus", "time tiles")]
    text = (
        f"A UNet step of AudioLDM 2 (published widths, random weights) on one thread of an {machines}: dense in "
        "seconds, the others as speed-up (\\* estimated from FLOPs); 600 s is summed up from layers. Sound: Fréchet "
        "distance of 5 s windows to real ones, lower is better, as difference to dense ± standard error: "
        f"{judged['clips']} clips, 10 steps, a small model trained at 5 s, `time_window` 128. By seven measures at "
        "multiples of 5 s, worse than dense by over two errors, as 2.3 % are by chance: "
        f"{', '.join(judgements)}. From {quality.POOLED_FROM}x on, drift is {drifts[0]} above dense's "
        f"{dense['drift']['value']:.2f} (time tiles {drifts[1]}). "
        f"[Speed](examples/evidence/speed.md), [sound](examples/evidence/quality.md), {date}."
    )
    return f"{table(header, rows)}\n{wrapped(text)}\n"


def wrapped(text: str) -> str:
    """In lines of README's width."""
    return "\n".join(textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False))


def cache() -> str:
    """What DeepCache adds in speed, and takes in sound, by the number of steps."""
    times = read(HERE / "speed.json", "rows")["rows"]
    counts = json.loads((HERE / "quality.json").read_text())["counts"]
    said = []
    for interval in (2, 3):
        method = f"litefocus + DeepCache {interval}"
        rows = [row_of(times, model=TIMED, method=method, seconds=length, device="cpu") for length in SECONDS[1:]]
        found = [row_of(counts, model=f"{JUDGED}, {steps} steps", method=method) for steps in (25, 50)]
        ratios = [f"{row['ratio']:.1f}x at {row['seconds']:g} s" for row in rows if row is not None]
        shares = [f"{row['worse_2']} of {row['cells']}" for row in found if row is not None]
        said.append((" and ".join(ratios), " and in ".join(shares)))
    (fast, worse_in), (faster, worse_in_more) = said
    text = (
        f"With `patch` too, a step is on average faster than a dense one by {fast}; with every third, by {faster}. "
        "Sound, by seven measures as below at 5 and 20 s, is worse than dense at 25 and at 50 steps in "
        f"{worse_in}; with every third, in {worse_in_more}: take every second, from 50 steps on."
    )
    return f"{wrapped(text)}\n"


def decoding(pipe: Any, length: float, tiled: bool) -> float | None:
    """Bytes of decoding a clip, as the library estimates them for `status`."""
    return _decoding.decoding_bytes(pipe, length, (10.24, 0.64) if tiled else None)


def encoding(length: float, tiled: bool) -> float | None:
    """Bytes of encoding a clip by AudioSR's VAE, as they were counted."""
    row = row_of(read(HERE / "encoding.json", "rows")["rows"], seconds=length, tiled=tiled)
    return None if row is None else row["bytes"]


def focus_sets(length: float) -> float:
    """Bytes of the focus sets of all layers after a few steps."""
    frames = round(25 * length)
    with litefocus.patch(timed_model()) as patch:
        grids = patch._setting.grids.values()
        kept: dict[int, int] = {}
        for grid in grids:
            size = (_grid.halved(frames, grid.level), _grid.halved(16, grid.level))
            for sample in range(grid.num_samples if grid.keys_kept(*size) < 1 else 0):
                grid.focus_set(*size, torch.device("cpu"), sample)
            for built in grid._built.values():
                tensors = (built.focus.queries, built.focus.keys, built.focus.inverse)
                kept |= {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
        return sum(kept.values())


def gibibytes(size: float) -> str:
    """With one decimal, or none from 100 on."""
    if size < 0.05 * 2**30:
        return "< 0.1 GiB"
    return f"{size / 2**30:.1f} GiB" if size < 100 * 2**30 else f"{size / 2**30:.0f} GiB"


def memory() -> str:
    """What a clip needs beside the weights, by its length."""
    times = read(HERE / "speed.json", "rows")["rows"]
    pipe = speed.decoders()
    steps = [
        row_of(times, model=TIMED, method="litefocus", seconds=length, device="cpu", dtype="float32")
        for length in SECONDS
    ]
    rows = {
        "a UNet step, patched": [None if row is None else row["peak_mb"] / 2 * 1e6 for row in steps],
        "its focus sets": [focus_sets(length) for length in SECONDS],
        "decoding, whole": [decoding(pipe, length, tiled=False) for length in SECONDS],
        "decoding, `tile_decoding`": [decoding(pipe, length, tiled=True) for length in SECONDS],
    }
    return sizes("float16, weights not counted, estimated", rows)


def audiosr() -> str:
    """What AudioSR needs beside the weights to encode a clip."""
    rows = {
        "whole": [encoding(length, tiled=False) for length in SECONDS],
        "`tile_decoding`": [encoding(length, tiled=True) for length in SECONDS],
    }
    return sizes("encoding in float32, beside the weights", rows)


def sizes(what: str, rows: dict[str, list[float | None]]) -> str:
    """A table of bytes by the length of the clip."""
    cells = [[name, *("not measured" if size is None else gibibytes(size) for size in of)] for name, of in rows.items()]
    return table([what, *(f"{length:g} s" for length in SECONDS)], cells)


def allocator() -> str:
    """Memory and time of ten minutes on a CPU, by settings of the C library's allocator."""
    rows = read(HERE / "allocator.json", "rows")["rows"]
    usual = rows[0]
    cells = [
        [
            row["setting"] if row is usual else f"`{row['setting']}`",
            f"{row['gib']:.1f} GiB",
            f"{row['cpu'] / usual['cpu']:.2f}",
        ]
        for row in rows
    ]
    machine, date = usual["measured"].split(",")[0], usual["measured"].split(", ")[-1]
    note = f"The small trained pipeline, patched and tiled, 2 steps, one thread ({machine}, {date}, `allocator.py`)."
    return table(["in the environment", "peak, 600 s", "CPU time"], cells) + "\n" + note + "\n"


def pages() -> dict[Any, str]:
    """Every file that is written, and its text."""
    parts = {"figures": figures, "cache": cache, "memory": memory, "allocator": allocator, "audiosr": audiosr}
    evaluation = json.loads((HERE / "quality.json").read_text())
    marked = {
        file: MARKED.sub(lambda found: found[1] + parts[found[2]]() + found[3], file.read_text())
        for file in (README, EXAMPLES / "README.md")
    }
    return {
        **marked,
        HERE / "speed.md": speed.page(read(HERE / "speed.json", "rows", "checks"), "speed.png"),
        HERE / "quality.md": quality.page(evaluation, "quality"),
        HERE / "prompts.md": prompts.page(read(HERE / "prompts.json", "rows")["rows"], "prompts"),
    }


def main(argv: list[str] | None = None) -> None:
    """Write, or check."""
    args = parse(argv)
    for file, text in pages().items():
        if args.check and file.read_text() != text:
            sys.exit(f"{file.name} does not say what the JSON files say: python examples/evidence/readme.py")
        if not args.check:
            file.write_text(text)


if __name__ == "__main__":
    with interruptible():
        main()
