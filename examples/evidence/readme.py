"""Write README's tables from `benchmark.json` and `evaluate.json`: no figure there is typed by hand.

python examples/readme.py           # after benchmark.py and evaluate.py with --output
python examples/readme.py --check   # exit code 1 where README says something else
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from benchmark import METHODS as WAYS
from benchmark import build, decoders
from methods import flop_ratio

from litefocus._decoding import Tiles, decoding_bytes

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
MARKED = re.compile(r"(<!-- (figures|memory) -->\n).*?(<!-- /\2 -->)", re.DOTALL)

METHODS = ("dense", "litefocus", "paper", "time tiles", "token merging")
TIMED, SECONDS = "audioldm2", (10.0, 80.0, 600.0)
JUDGED, LENGTHS = "seed 1", {1: "5 s", 8: "41 s"}  # of a model whose native length is 5.12 s


def row_of(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any] | None:
    """The row with these values."""
    return next((row for row in rows if all(row[name] == value for name, value in wanted.items())), None)


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
        return build(TIMED, SimpleNamespace(device="meta", dtype="float32"))


def cells(method: str, times: list[dict[str, Any]], sounds: list[dict[str, Any]]) -> Iterator[str]:
    """One line of the table."""
    for length in SECONDS:
        row = row_of(times, model=TIMED, method=method, seconds=length, device="cpu", dtype="float32")
        if row is None:
            yield f"{flop_ratio(timed_model(), WAYS[method], length):.2f}x \\*"
        else:
            yield seconds(row["median"]) if method == "dense" else f"{row['ratio']:.2f}x"
    for metric, digits in (("frechet", 2), ("drift", 3)):
        for length in LENGTHS if metric == "frechet" else [max(LENGTHS)]:
            row = row_of(sounds, model=JUDGED, method=method, times=length)
            if row is None:
                yield "not measured"
            elif method == "dense":
                yield f"{row[metric]['value']:.{digits}f}"
            else:
                yield difference(row[metric], digits)


def worse(method: str, counts: list[dict[str, Any]]) -> str:
    """In how many comparisons, of all UNets and lengths."""
    found = [count for count in counts if count["method"] == method]
    return f"{method} in {sum(c['worse_2'] for c in found)} of {sum(c['cells'] for c in found)}"


def figures() -> str:
    """What stands between the marks: table, where its figures come from, picture."""
    times = json.loads((HERE / "benchmark.json").read_text())["rows"]
    evaluation = json.loads((HERE / "evaluate.json").read_text())
    sounds = evaluation["rows"]
    long = LENGTHS[max(LENGTHS)]
    header = ["", *(f"step, {length:g} s" for length in SECONDS)]
    header += [*(f"Fréchet, {name}" for name in LENGTHS.values()), f"drift, {long}"]
    lines = ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header))]
    for method in METHODS:
        name = f"**{method}**" if method == "litefocus" else method
        lines.append(f"| {name} | " + " | ".join(cells(method, times, sounds)) + " |")
    timed = row_of(times, model=TIMED, method="litefocus", seconds=max(SECONDS)) or times[0]
    judged = row_of(sounds, model=JUDGED, method="litefocus", times=max(LENGTHS)) or sounds[0]
    clips = {length: row_of(sounds, model=JUDGED, method="dense", times=length) for length in LENGTHS}
    counted = ", ".join(f"{row['clips']} of {LENGTHS[length]}" for length, row in clips.items() if row)
    machine, date = timed["measured"].split(",")[0], judged["measured"].split(", ")[-1]
    judgements = [worse(method, evaluation["counts"]) for method in ("litefocus", "paper", "time tiles")]
    models, longest = len({row["model"] for row in sounds}), max(row["times"] for row in sounds)
    text = (
        f"Step: one UNet step of AudioLDM 2, published widths and random weights, on a CPU ({machine}); dense in "
        "seconds, others as speed-up (\\* by arithmetic, not measured). Fréchet distance (of 5 s windows to real ones, "
        "lower is better) and drift within a clip: differences to dense ± standard error, on a small trained model of "
        "5 s native length, "
        f"{counted}. On {models} trained UNets, by seven measures at 1x to {longest}x their native length, worse "
        f"than dense by over two standard errors: {', '.join(judgements)} (2.3 % by chance alone). By "
        f"`examples/benchmark.py` and `examples/evaluate.py`, {date}; all figures: "
        "[BENCHMARK.md](examples/BENCHMARK.md), [EVALUATION.md](examples/EVALUATION.md)."
    )
    picture = "![error of attention against cost, all settings and peers](examples/evaluate_cost.png)"
    lines += ["", *textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False), "", picture]
    return "\n".join(lines) + "\n"


def gibibytes(size: float) -> str:
    """With one decimal."""
    return f"{size / 2**30:.1f} GiB" if size >= 0.05 * 2**30 else "< 0.1 GiB"


def memory() -> str:
    """What a clip needs beside the weights, by its length."""
    times = json.loads((HERE / "benchmark.json").read_text())["rows"]
    with torch.device("meta"):
        vae, vocoder = decoders()
    pipe = SimpleNamespace(vae=vae.half(), vocoder=vocoder.half())
    steps = [row_of(times, model=TIMED, method="litefocus", seconds=length, dtype="float32") for length in SECONDS]
    rows = {
        "a UNet step, patched": [None if row is None else row["peak_mb"] / 2 * 1e6 for row in steps],
        "decoding, whole": [decoding_bytes(pipe, length) for length in SECONDS],
        "decoding, `tile_decoding`": [decoding_bytes(pipe, length, Tiles(10.24, 0.64)) for length in SECONDS],
    }
    lines = ["| float16, beside the weights | " + " | ".join(f"{length:g} s" for length in SECONDS) + " |"]
    lines.append("| --- |" + " --- |" * len(SECONDS))
    for name, sizes in rows.items():
        cells = ["not measured" if size is None else gibibytes(size) for size in sizes]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where README is another")
    args = parser.parse_args(argv)
    old = README.read_text()
    parts = {"figures": figures, "memory": memory}
    new = MARKED.sub(lambda found: found[1] + parts[found[2]]() + found[3], old)
    if args.check:
        sys.exit("README's figures are not those of the JSON files: python examples/readme.py" if new != old else 0)
    README.write_text(new)


if __name__ == "__main__":
    main()
