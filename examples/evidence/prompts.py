"""Do prompts over time come when they are scheduled? Clips of two and of three sounds, heard by a judge.

    python examples/evidence/prompts.py --output examples/evidence/prompts    # goes on where it stopped
    python examples/evidence/prompts.py --ways default --seconds 20 --cases 2 # a few clips, to see it work

Every case is two or three of the twelve sounds that the embedded pipeline knows, in equal parts with fades of 2 s, and
every sound alone, from the same noise. Its decoded mel spectrogram is cut into windows of 2.56 s. `right` is the share
of windows whose class, by the judge, is that of the prompt in force; windows that a fade touches are left out. Around a
change, windows 0.32 s apart show when the judge stops hearing the old sound and starts hearing the new one. `jump`: the
largest change of level, in the fade, from one latent frame (40 ms) to the next, relative to the largest one elsewhere
in the clip. `dip`: by how many dB the quietest 0.64 s of a fade are below the quietest of the seconds around it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from report import EXAMPLES, Row, by, interruptible, measured, merged, read, table, write

KEY = ("sounds", "seconds", "way", "seed", "steps")
FADE = 2.0
WINDOW, HOP, FRAME = 2.56, 0.32, 0.01  # seconds
OFFSETS = [round(-6 + HOP * i, 2) for i in range(45)]  # of windows around a change


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seconds", nargs="+", type=float, default=[20.0, 60.0], help="lengths of clips (default: %(default)s)")
    add("--ways", nargs="+", default=["default", "dense"], choices=list(WAYS), help="(default: %(default)s)")
    add("--parts", nargs="+", type=int, default=[1, 2, 3], help="of a clip: 1 is a plain one (default: %(default)s)")
    add("--cases", type=int, default=24, help="at most, of each number of parts (default: %(default)s)")
    add("--seeds", nargs="+", type=int, default=[0, 1])
    add("--steps", type=int, default=50)
    add("--output", type=Path, help="write NAME.json, where other rows stay, and NAME.md")
    return parser.parse_args(argv)


WAYS: dict[str, dict[str, Any] | None] = {  # fields of LiteFocusConfig, None for dense attention
    "dense": None,
    "default": {},
    "no far sample": {"far_sampled": 0},
    "native window": {"time_window": 128},
    "native window, no far sample": {"time_window": 128, "far_sampled": 0},
}

if __name__ == "__main__":
    parse()  # `--help` and mistakes are answered before the imports below, which take seconds

with interruptible():
    import numpy as np
    import torch
    from data import CLASS_NAMES, NOUNS, TEMPO_NAMES
    from diffusers import AudioLDM2Pipeline
    from judge import load_judge
    from tqdm import tqdm

    import litefocus


def cases(parts: int) -> list[tuple[int, ...]]:
    """Numbers of classes: every sound alone, 24 ordered pairs of them, in which each is as often first as second, or
    six triples.
    """
    if parts == 3:
        return [(2 * i, (2 * i + 3) % 12, (2 * i + 7) % 12) for i in range(6)]
    return [(i,) for i in range(12)] if parts == 1 else [(i, (i + step) % 12) for step in (1, 5) for i in range(12)]


def name(sounds: tuple[int, ...]) -> str:
    """Of a case, in the JSON."""
    return " > ".join(CLASS_NAMES[sound] for sound in sounds)


def text(sound: int) -> str:
    """A prompt for a class."""
    return f"a {TEMPO_NAMES[sound % 3]} {NOUNS[CLASS_NAMES[sound]][0]}"


def generate(pipe: Any, sounds: tuple[int, ...], seconds: float, way: str, seed: int, steps: int) -> torch.Tensor:
    """The decoded mel spectrogram of one clip, (frames, 64)."""
    length = seconds / len(sounds)
    later = {length * i: text(sound) for i, sound in enumerate(sounds) if i}
    settings = WAYS[way]
    with contextlib.ExitStack() as stack:
        if settings is not None:
            stack.enter_context(litefocus.patch(pipe, **settings))
        if later:
            stack.enter_context(litefocus.schedule_prompts(pipe, later, fade=FADE))
        latents = pipe(
            text(sounds[0]),
            audio_length_in_s=seconds,
            num_inference_steps=steps,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).audios
    with torch.inference_mode():
        mels: torch.Tensor = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample[0, 0]
    return mels


def hear(mels: torch.Tensor, starts: list[float]) -> list[int]:
    """The classes, by the judge, of windows that start at these seconds."""
    windows = [mels[round(start / FRAME) :][: round(WINDOW / FRAME)] for start in starts]
    with torch.inference_mode():
        return load_judge()[0](torch.stack(windows)[:, None])[0].argmax(dim=1).tolist()


def listen(mels: torch.Tensor, sounds: tuple[int, ...], seconds: float) -> Row:
    """What is heard in a clip."""
    changes = [seconds / len(sounds) * i for i in range(1, len(sounds))]
    starts = [WINDOW * i for i in range(int(seconds / WINDOW))]
    wanted: list[int | None] = []
    for start in starts:
        fades = any(start < change + FADE and start + WINDOW > change for change in changes)
        wanted.append(None if fades else sounds[sum(start >= change for change in changes)])
    found: Row = {"parts": len(sounds), "classes": list(sounds), "wanted": wanted, "heard": hear(mels, starts)}
    found |= {"around": [], "jumps": [], "dips": []}
    power = mels[: len(mels) // 4 * 4].double().mul(2).exp().mean(dim=1)
    level = 10 * power.view(-1, 4).mean(dim=1).log10()  # dB of every latent frame
    jumps = level.diff().abs()
    quiet = 10 * power[: len(power) // 64 * 64].view(-1, 64).mean(dim=1).log10()
    for change, (old, new) in zip(changes, itertools.pairwise(sounds), strict=True):
        inside = [o for o in OFFSETS if WINDOW / 2 <= change + o <= seconds - WINDOW / 2]
        classes = hear(mels, [change + o - WINDOW / 2 for o in inside])
        found["around"].append({str(o): "on-"[[old, new, c].index(c)] for o, c in zip(inside, classes, strict=True)})
        fade = slice(round(change / 0.04), round((change + FADE) / 0.04))
        elsewhere = torch.cat([jumps[: fade.start], jumps[fade.stop :]])
        found["jumps"].append(float(jumps[fade].max() / elsewhere.max()))
        first, last = round(change / 0.64), round((change + FADE) / 0.64)
        around = torch.cat([quiet[max(0, first - 8) : first], quiet[last : last + 8]])
        found["dips"].append(float(around.min() - quiet[first:last].min()))
    return found


def run(args: argparse.Namespace) -> Iterator[Row]:
    """A row for every clip that the JSON does not have, short ones first."""
    pipe = AudioLDM2Pipeline.from_pretrained(EXAMPLES / "embedded" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    done = by(read(args.output.with_suffix(".json"), "rows")["rows"], *KEY) if args.output else {}
    planned = [
        (sounds, seconds, way, seed)
        for seed in args.seeds
        for seconds in args.seconds
        for parts in args.parts
        for sounds in cases(parts)[: args.cases]
        for way in (args.ways if parts > 1 else [way for way in args.ways if way == "default"])
    ]
    open_ = [plan for plan in planned if (name(plan[0]), *plan[1:], args.steps) not in done]
    for sounds, *others in tqdm(open_, mininterval=10):
        seconds = others[0]
        mels = generate(pipe, sounds, *others, args.steps)
        row = dict(zip(KEY, (name(sounds), *others, args.steps), strict=True))
        yield {**row, **listen(mels, sounds, seconds), "measured": measured("cpu")}


def share(flags: list[bool]) -> float:
    """Of those that are true."""
    return sum(flags) / len(flags) if flags else float("nan")


def summary(rows: list[Row]) -> Row:
    """Figures of the clips of one line."""
    windows = [
        (wanted, found, row["classes"], i / len(row["wanted"]))
        for row in rows
        for i, (wanted, found) in enumerate(zip(row["wanted"], row["heard"], strict=True))
        if wanted is not None
    ]
    wrong = [(wanted, found, classes) for wanted, found, classes, _ in windows if wanted != found]
    before = [found in classes[classes.index(wanted) + 1 :] for wanted, found, classes in wrong]
    after = [found in classes[: classes.index(wanted)] for wanted, found, classes in wrong]
    around = [change for row in rows for change in row["around"]]
    new = [share([change[str(o)] == "n" for change in around if str(o) in change]) for o in OFFSETS] if around else []
    old = [share([change[str(o)] == "o" for change in around if str(o) in change]) for o in OFFSETS] if around else []
    return {
        "clips": len(rows),
        "windows": len(windows),
        "right": 1 - len(wrong) / len(windows),
        "before": sum(before) / len(windows),
        "after": sum(after) / len(windows),
        "starts": next((o for o, x in zip(OFFSETS, old, strict=False) if x < 0.5), None),
        "arrives": next((o for o, x in zip(OFFSETS, new, strict=False) if x >= 0.5), None),
        "jumps": [jump for row in rows for jump in row["jumps"]],
        "dips": [dip for row in rows for dip in row["dips"]],
    }


def page(rows: list[Row], file: str) -> str:
    """The table, in Markdown."""
    header = ("clips of", "seconds", "attention", "clips", "windows", "right", "next one early", "last one late")
    header += ("old until", "new from", "jump", "dip")
    lines = []
    order = sorted(
        by(rows, "seconds", "steps", "way").items(), key=lambda item: (item[0][0], list(WAYS).index(item[0][2]))
    )
    for (seconds, steps, way), group in order:
        for (parts,), some in by(sorted(group, key=lambda row: len(row["classes"])), "parts").items():
            found = summary(some)
            cells = [str(parts), f"{seconds:g}", way, f"{found['clips']} ({steps} steps)", str(found["windows"])]
            cells.append(f"{found['right']:.1%}")
            if parts == 1:
                cells += ["-"] * 6
            else:
                cells += [f"{found['before']:.1%}", f"{found['after']:.1%}"]
                cells += ["-" if found[x] is None else f"{found[x]:+.2f} s" for x in ("starts", "arrives")]
                cells += [f"{np.median(found['jumps']):.2f} (at most {max(found['jumps']):.2f})"]
                cells += [f"{np.median(found['dips']):.1f} dB (at most {max(found['dips']):.1f})"]
            lines.append(cells)
    return table(header, lines)


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing, and print the table."""
    args = parse(argv)
    torch.set_num_threads(1)
    file = args.output.with_suffix(".json") if args.output else None
    rows = read(file, "rows")["rows"] if file else []
    for row in run(args):
        rows = merged(rows, [row], *KEY)
        if file:
            write(file, {"rows": rows})
    print(page(rows, ""))


if __name__ == "__main__":
    with interruptible():
        main()
