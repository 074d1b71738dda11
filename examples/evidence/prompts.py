"""Do prompts over time come when they are scheduled? Clips of two and of three sounds, heard by a judge.

    python examples/evidence/prompts.py --output examples/evidence/prompts    # goes on where it stopped
    python examples/evidence/prompts.py --ways default --seconds 20 --cases 2 # a few clips, to see it work

Every case is two or three of the twelve sounds that the embedded pipeline knows, in equal parts with fades of 2 s, and
every sound alone, from the same noise. Its decoded mel spectrogram is cut into windows of 2.56 s. `right` is the share
of windows whose class, by the judge, is that of the prompt in force; windows that a fade touches are left out.
`next one early` and `one before late`: the share that is heard as the sound of a later or of an earlier part. `old
until` and `new from`: around a change, the middle of the first of the windows, 0.32 s apart, at which the judge no
longer hears the old sound, or hears the new one, in half of the clips; from the new prompt's time on. `jump`: the
largest change of level, in the fade, from one latent frame (40 ms) to the next, relative to the largest one elsewhere
in the clip; by chance it is above 1 in as large a share of changes as a fade is of the clip, the last figure in
brackets. `alone`: `right` of patched plain clips of the same length, each sound counted as often as in the line.
`dip`: by how many dB the quietest 0.64 s of a fade are below the quietest of the 5 s before and after it.
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


WAYS: dict[str, dict[str, Any] | None] = {"dense": None, "default": {}}  # fields of LiteFocusConfig, None for dense

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


def name_of(sounds: tuple[int, ...]) -> str:
    """Of a case, in the JSON."""
    return " > ".join(CLASS_NAMES[sound] for sound in sounds)


def prompt_of(sound: int) -> str:
    """A prompt for a class."""
    return f"a {TEMPO_NAMES[sound % 3]} {NOUNS[CLASS_NAMES[sound]][0]}"


def generate(pipe: Any, sounds: tuple[int, ...], seconds: float, way: str, seed: int, steps: int) -> torch.Tensor:
    """The decoded mel spectrogram of one clip, (frames, 64)."""
    length = seconds / len(sounds)
    later = {length * i: prompt_of(sound) for i, sound in enumerate(sounds) if i}
    settings = WAYS[way]
    with contextlib.ExitStack() as stack:
        if settings is not None:
            stack.enter_context(litefocus.patch(pipe, **settings))
        if later:
            stack.enter_context(litefocus.schedule_prompts(pipe, later, fade=FADE))
        latents = pipe(
            prompt_of(sounds[0]),
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
        for way in (args.ways if parts > 1 else [way for way in args.ways if way != "dense"])
    ]
    open_ = [plan for plan in planned if (name_of(plan[0]), *plan[1:], args.steps) not in done]
    for sounds, *others in tqdm(open_, mininterval=10):
        seconds = others[0]
        mels = generate(pipe, sounds, *others, args.steps)
        row = dict(zip(KEY, (name_of(sounds), *others, args.steps), strict=True))
        yield {**row, **listen(mels, sounds, seconds), "measured": measured("cpu")}


def share(flags: list[bool]) -> float:
    """Of those that are true."""
    return sum(flags) / len(flags) if flags else float("nan")


def first_offset(flags: list[bool]) -> str:
    """The first of OFFSETS at which something holds, in words."""
    return next((f"{offset:+.1f} s" for offset, holds in zip(OFFSETS, flags, strict=True) if holds), "-")


def judged(rows: list[Row]) -> list[tuple[int, int, int, list[int]]]:
    """(part, class of its prompt, class that was heard, classes of the clip) of every window that counts."""
    return [
        (row["classes"].index(wanted), wanted, heard, row["classes"])
        for row in rows
        for wanted, heard in zip(row["wanted"], row["heard"], strict=True)
        if wanted is not None
    ]


def cells(rows: list[Row], alone: list[Row]) -> list[str]:
    """Figures of the clips of one line of the table. alone: plain clips of the same length."""
    pairs = judged(rows)
    right = share([wanted == heard for _, wanted, heard, _ in pairs])
    line = [f"{len(rows)}, {len(pairs)}", f"{right:.1%}"]
    around = [change for row in rows for change in row["around"]]
    if not around:
        return [*line, *["-"] * 7]
    plain = judged(alone)
    ceilings = [share([heard == sound for _, wanted, heard, _ in plain if wanted == sound]) for _, sound, *_ in pairs]
    line.append(f"{np.mean(ceilings):.1%}" if alone else "-")
    early = share([heard in classes[part + 1 :] for part, _, heard, classes in pairs])
    late = share([heard in classes[:part] for part, _, heard, classes in pairs])
    old, new = (
        [share([change[str(o)] == which for change in around if str(o) in change]) for o in OFFSETS] for which in "on"
    )
    jumps, dips = ([value for row in rows for value in row[name]] for name in ("jumps", "dips"))
    over = share([jump > 1 for jump in jumps])
    return [
        *line,
        f"{early:.1%}",
        f"{late:.1%}",
        first_offset([o > -1 and x < 0.5 for o, x in zip(OFFSETS, old, strict=True)]),
        first_offset([x >= 0.5 for x in new]),
        f"{np.median(jumps):.2f} ({over:.0%} above 1, {max(jumps):.2f} at most; {FADE / rows[0]['seconds']:.0%})",
        f"{np.median(dips):.1f} dB (at most {max(dips):.1f})",
    ]


def page(rows: list[Row], file: str) -> str:
    """Tables, in Markdown."""
    header = ["parts", "seconds", "attention", "clips, windows", "right", "alone", "next one early", "one before late"]
    header += ["old until", "new from", "jump", "dip"]
    groups = by(rows, "seconds", "parts", "way", "steps")
    order = sorted(groups, key=lambda key: (key[0], key[1], list(WAYS).index(key[2])))
    lines = []
    for length, parts, way, steps in order:
        alone = [row for each in WAYS for row in groups.get((length, 1, each, steps), [])]
        lines.append([str(parts), f"{length:g}", way, *cells(groups[length, parts, way, steps], alone)])
    wrong: dict[str, int] = {}
    for row in rows:
        for wanted, heard in zip(row["wanted"], row["heard"], strict=True):
            if wanted not in (None, heard) and row["way"] != "dense":
                told = f"{CLASS_NAMES[wanted]} as {CLASS_NAMES[heard]}, {'alone' if row['parts'] == 1 else 'in parts'}"
                wrong[told] = wrong.get(told, 0) + 1
    mistakes = "; ".join(f"{told}: {wrong[told]}" for told in sorted(wrong, key=lambda told: -wrong[told]))
    steps, seeds = ({row[name] for row in rows} for name in ("steps", "seed"))
    return "\n".join(
        [
            "# Prompts over time",
            "",
            f"Written by `python examples/evidence/prompts.py --output examples/evidence/{file}`; the figures are",
            f"those of `{file}.json`. How they are measured is in the docstring of `prompts.py`. Clips of one part are",
            "plain ones, the ceiling; `alone` is that of a line's sounds. "
            f"Steps: {', '.join(map(str, sorted(steps)))}; seeds: {', '.join(map(str, sorted(seeds)))}. Samples were",
            "those of `litefocus, independent samples` in `quality.md`.",
            "",
            table(header, lines),
            f"Windows that the judge takes for another class, patched: {mistakes or 'none'}.",
            "",
            *(f"{source}.\n" for source in dict.fromkeys(row["measured"] for row in rows)),
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing, and write or print the tables."""
    args = parse(argv)
    torch.set_num_threads(1)
    file = args.output.with_suffix(".json") if args.output else None
    rows = read(file, "rows")["rows"] if file else []
    for row in run(args):
        rows = merged(rows, [row], *KEY)
        if file:
            write(file, {"rows": rows})
    text = page(rows, args.output.name if args.output else "NAME")
    if args.output:
        args.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    with interruptible():
        main()
