"""Your checkpoint, your prompts: dense attention, LiteFocus, the paper's settings, time tiles and token merging.

    python examples/compare.py                              # the embedded pipeline, in under five minutes
    python examples/compare.py --model cvssp/audioldm2 --prompts prompts.txt --seconds 10 40 80 --steps 200
    python examples/compare.py --prompts prompts.txt --reference recordings --embedder my_package.ears:embed

PROMPTS has one prompt a line. Every method gets the same prompts and the same noise. `litefocus` has the settings that
the options of attention give, which are the defaults. For every length a table:

`time`, of one generation, text to sound: CPU seconds, on CUDA the device's; the median over prompts, methods
alternating. `speed-up`: dense attention's time over it; `at most`: the same for the arithmetic of the UNet alone.
`latents`: the distance of the final latents to dense attention's, relative to these; 0 is the same clip, and the row
`other noise`, dense attention from other noise, shows how far another clip is. `attention`: the error of the attention
output that `litefocus.probe` finds, on average over the layers and in the worst. `Fréchet`: the squared Fréchet
distance of embeddings of windows, side by side, to those of the sounds in the folder REFERENCE.

An embedder is `module:callable`, found from the working directory too. It is called as callable(waveforms,
sampling_rate) with mono waveforms (batch, samples), a float32 array, and returns (batch, features). The embedded one
knows twelve small synthetic classes and says little about other sounds.

Writes NAME.json, NAME.png (error against cost), the clips as wavs into the folder NAME, and NAME.html to hear them side
by side; after every length, with those before it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import pkgutil
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import date
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import generate

with generate.interruptible():
    import diffusers
    import numpy as np
    import numpy.typing as npt
    import plots
    import soundfile
    import torch
    import transformers
    from benchmark import environment, in_seconds, seconds_of, table
    from methods import NATIVE_FRAMES, Merged, Tiles, flop_ratio, installed
    from scipy.signal import resample_poly
    from torch import Tensor
    from tqdm import tqdm

    import litefocus
    from litefocus import LiteFocusConfig

METHODS = ("dense", "litefocus", "paper", "time tiles", "token merging")
OTHER_NOISE = "other noise"
PROMPTS = ("a fast tabla rhythm", "a slow drone")
FRAMES_PER_SECOND = 25  # of the latents of AudioLDM-style pipelines
EMBEDDER = "judge:embed"
EMBEDDER_NOTE = "the embedder is the embedded one, of twelve small synthetic classes: it says little about other sounds"
BATCH = 16  # windows that an embedder gets at once
Waves = npt.NDArray[np.float32]
Features = npt.NDArray[np.float64]
Row = dict[str, Any]


def read_prompts(path: Path | None) -> list[str]:
    """The lines that are not empty. Raises ValueError for a file without."""
    if path is None:
        return list(PROMPTS)
    prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def find_embedder(path: str) -> Callable[[Waves, int], Any]:
    """What `module:callable` names. Raises ValueError."""
    sys.path += [folder for folder in (str(Path.cwd()), str(generate.EMBEDDED.parent)) if folder not in sys.path]
    try:
        found = pkgutil.resolve_name(path)
        if ":" not in path or not callable(found):
            raise TypeError(f"it must be module:callable, and names a {type(found).__name__}")
        return found
    except Exception as error:  # importing it runs code of others
        raise ValueError(f"cannot use embedder {path}: {generate.first_line(error)}") from error


def find_sounds(folder: Path) -> list[Path]:
    """The wav and flac files in a folder and below. Raises ValueError where there are none."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".wav", ".flac"))
    if not files:
        raise ValueError(f"reference {folder} is no folder that holds a .wav or .flac")
    return files


def beside(output: Path, suffix: str) -> Path:
    """NAME with a suffix; it may hold dots."""
    return output.with_name(output.name + suffix)


def check_all(args: Any) -> None:
    """Check everything that needs no model, and fill in what hangs on it. Raises ValueError."""
    generate.complete(args)
    for seconds in args.lengths:
        generate.check({"seconds": seconds})
    args.lengths = list(dict.fromkeys(args.lengths))
    args.methods = list(dict.fromkeys(["dense", *args.methods]))  # what the others are compared with
    args.texts = read_prompts(args.prompts)
    if args.native is None:
        args.native = 5.12 if args.model == str(generate.EMBEDDED) else NATIVE_FRAMES / FRAMES_PER_SECOND
    for name in ("native", "window"):
        if not 0.5 <= getattr(args, name) < math.inf:
            raise ValueError(f"{name} must be at least 0.5 seconds, got {getattr(args, name)}")
    if "token merging" in args.methods and importlib.util.find_spec("tomesd") is None:
        raise ValueError("token merging needs tomesd: pip install tomesd")
    if args.reference is not None:
        args.sounds, args.embed = find_sounds(args.reference), find_embedder(args.embedder)
        if len(args.texts) * (min(args.lengths) // args.window) < 2:
            raise ValueError(f"a Fréchet distance needs two windows of {args.window:g} s or more at every length")
    elif args.embedder != EMBEDDER:
        raise ValueError("an embedder needs sounds to compare with: add --reference FOLDER")
    generate.check_output(beside(args.output, ".wav"))
    blocked = [path for suffix in (".json", ".png", ".html") if (path := beside(args.output, suffix)).is_dir()]
    if blocked or args.output.is_file():
        raise ValueError(
            f"output {[*blocked, args.output][0]} is in the way: it is a {'folder' if blocked else 'file'}"
        )


def frechet(one: Features, other: Features) -> float:
    """Squared Fréchet distance of two normal distributions, fitted to embeddings (windows, features).

    The trace of the root of the covariances' product is the sum of the singular values of one's centred points times
    the other's, so no root of a matrix is taken, and fewer windows than features do no harm to its accuracy.
    """
    centred = [(points - points.mean(axis=0)) / math.sqrt(len(points) - 1) for points in (one, other)]
    x, y = (np.linalg.qr(points, mode="r") for points in centred)
    shift = one.mean(axis=0) - other.mean(axis=0)
    return float(shift @ shift + (x**2).sum() + (y**2).sum() - 2 * np.linalg.norm(x @ y.T, "nuc"))


class Ears:
    """An embedder, and what it makes of the reference. Raises ValueError where they cannot be used.

    rate: the pipeline's sampling rate, which reference sounds are brought down to.
    """

    def __init__(self, args: Any, rate: int) -> None:
        self.name, self.call, self.rate, self.size = args.embedder, args.embed, rate, round(args.window * rate)
        self.reference = self.embed(self.read(path) for path in args.sounds)
        if len(self.reference) < 2:
            raise ValueError(f"reference {args.reference} holds fewer than two windows of {args.window:g} s")

    def read(self, path: Path) -> Waves:
        """A sound, mono, at the pipeline's rate."""
        try:
            sound, rate = soundfile.read(path, dtype="float32", always_2d=True)
        except soundfile.SoundFileError as error:
            raise ValueError(f"cannot read {path}: {generate.first_line(error)}") from error
        if rate < self.rate:
            raise ValueError(f"{path} has {rate} Hz, the pipeline {self.rate}: its treble would be missing")
        common = math.gcd(rate, self.rate)
        return resample_poly(sound.mean(axis=1), self.rate // common, rate // common).astype(np.float32)

    def embed(self, waves: Iterable[Waves]) -> Features:
        """(windows, features) of the windows of some sounds; a rest shorter than a window is left out."""
        parts: list[Features] = []
        for wave in waves:
            count = len(wave) // self.size
            cut = np.ascontiguousarray(wave[: count * self.size], dtype=np.float32).reshape(count, self.size)
            for batch in (cut[start : start + BATCH] for start in range(0, count, BATCH)):
                try:
                    found = torch.as_tensor(self.call(batch, self.rate)).detach().double().cpu().numpy()
                    if found.ndim != 2 or len(found) != len(batch) or not np.isfinite(found).all():
                        raise ValueError(
                            f"must return finite numbers (batch, features) for waveforms {batch.shape}, got shape "
                            f"{found.shape}"
                        )
                except Exception as error:  # code of others
                    raise ValueError(f"embedder {self.name}: {generate.first_line(error)}") from error
                parts.append(found)
        return np.concatenate(parts) if parts else np.empty((0, 0))

    def notes(self, windows: int) -> list[str]:
        """What to know of distances of so many windows."""
        found, (reference, features) = [EMBEDDER_NOTE] * (self.name == EMBEDDER), self.reference.shape
        if min(windows, reference) < 2 * features:
            found.append(
                f"{windows} generated and {reference} reference windows for {features} features: with fewer than twice "
                "as many windows as features a Fréchet distance is too large, and uncertain"
            )
        return found


def make(pipe: Any, settings: Row, device: torch.device) -> tuple[Waves, Tensor, float]:
    """Samples and final latents of one clip, and the seconds that it took."""
    made: dict[str, Any] = {}

    def after(step: int, timestep: Any, latents: Tensor) -> None:
        made["latents"] = latents

    def run() -> None:
        made["audio"], _ = generate.generate(pipe, settings, callback=after)

    took = seconds_of(run, device)
    return made["audio"], made["latents"].float().cpu(), took


def compare(
    pipe: Any, seconds: float, ears: Ears | None, args: Any, bar: Any
) -> tuple[list[Row], dict[str, list[Waves]]]:
    """A row for every method at one length, and its clips, one for every prompt."""
    hows = {"litefocus": args.config, "paper": LiteFocusConfig.paper(), "time tiles": Tiles, "token merging": Merged}
    native = round(args.native * FRAMES_PER_SECOND)
    names = [*args.methods, OTHER_NOISE]
    clips: dict[str, list[Waves]] = {name: [] for name in names}
    latents: dict[str, list[Tensor]] = {name: [] for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    probe = litefocus.probe(pipe, args.config)
    for i, prompt in enumerate(args.texts):
        for name in names:
            bar.set_postfix_str(f"{seconds:g} s, {name}")
            settings = {"prompt": prompt, "seconds": seconds, "steps": args.steps, "guidance": args.guidance}
            settings["seed"] = args.seed + i + (len(args.texts) if name == OTHER_NOISE else 0)
            # clips from other noise are not timed, so the probe may look on
            with probe if name == OTHER_NOISE else installed(pipe, hows.get(name), native):
                if not i and name != OTHER_NOISE:
                    generate.generate(pipe, {**settings, "steps": 1})  # warm: kernels and memory are there
                made = make(pipe, settings, args.device)
            for kept, value in zip((clips, latents, times), made, strict=True):
                kept[name].append(value)
            bar.update()

    layers = [layer for layer in probe.layers if layer.calls]
    settings_of = {"litefocus": next(iter(layers[0].errors)), "paper": "paper"}  # by their names in the probe
    rows: list[Row] = []
    for name in names:
        pairs = zip(latents[name], latents["dense"], strict=True)
        distances = [float((latent - dense).norm() / dense.norm()) for latent, dense in pairs]
        row: Row = {"seconds": seconds, "method": name, "distance": statistics.mean(distances), "distances": distances}
        if name != OTHER_NOISE:
            row |= {"median": statistics.median(times[name]), "times": times[name]}
            row["ratio"] = statistics.median(times["dense"]) / row["median"]
            row["flop_ratio"] = flop_ratio(pipe, hows.get(name), seconds, native)
        if name in settings_of:
            errors = {layer.name: layer.errors[settings_of[name]] for layer in layers}
            worst = max(errors, key=lambda layer: errors[layer])
            row |= {"attention": statistics.mean(errors.values()), "worst": errors[worst], "worst_layer": worst}
        if ears:
            heard = ears.embed(clips[name])
            row |= {"frechet": frechet(heard, ears.reference), "windows": len(heard), "notes": ears.notes(len(heard))}
        rows.append(row)
    return rows, clips


def show(rows: list[Row]) -> str:
    """The table of one length."""
    columns: dict[str, Callable[[Row], str]] = {
        "method": lambda row: row["method"],
        "time": lambda row: in_seconds(row["median"]),
        "speed-up": lambda row: f"{row['ratio']:.2f}x",
        "at most": lambda row: f"{row['flop_ratio']:.2f}x",
        "latents": lambda row: f"{row['distance']:.3f}",
        "of other noise": lambda row: f"{row['distance'] / rows[-1]['distance']:.0%}",
        "attention": lambda row: f"{row['attention']:.3f}",
        "worst layer": lambda row: f"{row['worst']:.3f}",
        **({"Fréchet": lambda row: f"{row['frechet']:.4g}"} if "frechet" in rows[0] else {}),
    }

    def cell(row: Row, text: Callable[[Row], str]) -> str:
        try:
            return text(row)
        except KeyError:  # not measured
            return ""

    cells = [[cell(row, text) for text in columns.values()] for row in rows]
    notes = [f"Note: {note}.\n" for note in rows[0].get("notes", [])]
    return f"{rows[0]['seconds']:g} s\n\n{table(columns, cells)}{''.join(notes)}"


def plot(rows: list[Row], path: Path) -> None:
    """Distance of final latents to dense attention's against time, a panel for every length."""
    lengths = list(dict.fromkeys(row["seconds"] for row in rows))
    look = plots.styles(dict.fromkeys(row["method"] for row in rows))
    timed = [row for row in rows if "median" in row]
    figure, every = plots.panels(len(lengths), width=4.6, height=4.2)
    right, top = 1.5 * max(1 / row["ratio"] for row in timed), 1.12 * max(row["distance"] for row in rows)
    for axes, seconds in zip(every, lengths, strict=True):
        points = {row["method"]: (1 / row["ratio"], row["distance"]) for row in timed if row["seconds"] == seconds}
        noise = next(row for row in rows if (row["seconds"], row["method"]) == (seconds, OTHER_NOISE))["distance"]
        axes.axhline(noise, color="0.4", linestyle="--", linewidth=1)
        axes.annotate(
            "dense, other noise",
            (0.02 * right, noise),
            xytext=(0, -4),
            textcoords="offset points",
            va="top",
            fontsize=11,
        )
        axes.set(xlim=(0, right), ylim=(-0.06 * top, top))
        axes.set_title(f"{seconds:g} s", fontsize=14)
        axes.set_xlabel("time of a clip (dense: 1)", fontsize=13)
        axes.tick_params(labelsize=12)
        for name, point in points.items():
            axes.plot(*point, color=look[name][0], marker=look[name][1], markersize=9, linestyle="none", clip_on=False)
        plots.label_points(axes, points, {name: colour for name, (colour, _) in look.items()}, size=12)
    every[0].set_ylabel("distance of final latents to dense\n(relative)", fontsize=13)
    plots.save(figure, path)


def page(record: Row, folder: str) -> str:
    """All clips side by side, prompts by methods, with players; `folder` of the wavs as seen from the page."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>litefocus: side by side</title>",
        "<style>body{font:15px sans-serif;margin:2em}td,th{padding:.4em .8em;text-align:left;vertical-align:top}"
        "audio{width:12em}small{font-weight:normal;color:#555}</style>",
        f"<h1>{escape(record['model'])}</h1><p>{escape(record['measured'])}</p>",
    ]
    for seconds in dict.fromkeys(row["seconds"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["seconds"] == seconds]
        parts.append(f"<h2>{seconds:g} s</h2><table><tr><th>prompt")
        for row in rows:
            speed = f"{row['ratio']:.2f}x, " if "ratio" in row else ""
            parts.append(f"<th>{escape(row['method'])}<br><small>{speed}latents {row['distance']:.3f}</small>")
        for i, prompt in enumerate(record["prompts"]):
            parts.append(f"<tr><th>{escape(prompt)}")
            for row in rows:
                source = quote(f"{folder}/{row['wavs'][i]}")
                parts.append(f'<td><audio controls preload=none src="{source}"></audio>')
        parts.append("</table>")
    return "\n".join([*parts, "</html>\n"])


def write(record: Row, output: Path) -> None:
    """The JSON, the picture and the page, each whole or not at all."""
    for suffix, text in ((".json", json.dumps(record, indent=1) + "\n"), (".html", page(record, output.name))):
        generate.save(beside(output, suffix), lambda whole, text=text: whole.write_text(text, encoding="utf-8"))
    generate.save(beside(output, ".png"), lambda whole: plot(record["rows"], whole))


def main(argv: Sequence[str] | None = None) -> None:
    """Refuse, or measure, print and write."""
    parser = generate.Parser(__doc__, conflict_handler="resolve")  # several lengths where the others have one
    parser.set_defaults(steps=5)
    add = parser.add_argument
    add("--prompts", type=Path, metavar="FILE", help=f"one a line (default: {', '.join(PROMPTS)})")
    lengths = {"dest": "lengths", "nargs": "+", "type": float, "metavar": "S"}
    add("--seconds", **lengths, default=[10.0, 20.0, 40.0], help="lengths of clips (default: 10 20 40)")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD", help="default: all")
    add("--native", type=float, metavar="S", help="length of time tiles (default: 10.24; embedded pipeline: 5.12)")
    add("--reference", type=Path, metavar="FOLDER", help="of wav or flac files, for Fréchet distances")
    add("--embedder", default=EMBEDDER, metavar="MODULE:CALLABLE", help="default: the embedded one, see above")
    add("--window", type=float, default=5.12, metavar="S", help="that an embedder hears (default: %(default)s)")
    add("--output", type=Path, default=Path("compare"), metavar="NAME", help="default: %(default)s")
    args = parser.parse_args(argv)
    with parser.refusing():
        check_all(args)
        pipe, patch = generate.load(args)
        patch.remove()
        rate = pipe.vocoder.config.sampling_rate
        ears = Ears(args, rate) if args.reference is not None else None
        args.output.mkdir(exist_ok=True)
    pipe.set_progress_bar_config(disable=True)
    for prompt in args.texts:
        generate.note_unknown_words(pipe, prompt)

    args.command = " ".join(["python examples/compare.py", *(sys.argv[1:] if argv is None else argv)])
    args.threads, args.rounds = torch.get_num_threads(), len(args.texts)
    libraries = (torch, diffusers, transformers, litefocus)
    record: Row = {
        "model": "the embedded pipeline" if args.model == str(generate.EMBEDDED) else args.model,
        **{name: getattr(args, name) for name in ("steps", "guidance", "seed", "dtype", "native")},
        "prompts": args.texts,
        "litefocus": asdict(args.config),
        "measured": environment(args),
        "date": str(date.today()),
        "versions": {"python": platform.python_version(), **{of.__name__: of.__version__ for of in libraries}},
        "rows": [],
    }
    if ears:
        windows, features = ears.reference.shape
        record["reference"] = {"folder": str(args.reference), "windows": windows, "seconds": args.window}
        record["embedder"] = {"callable": args.embedder, "features": features}
    print(record["measured"] + "\n")
    with tqdm(total=len(args.lengths) * len(args.texts) * (len(args.methods) + 1), desc="clips") as bar:
        for seconds in args.lengths:
            rows, clips = compare(pipe, seconds, ears, args, bar)
            for row in rows:
                stem = f"{seconds:g}s-{row['method'].replace(' ', '-')}"
                row["wavs"] = [f"{stem}-{i}.wav" for i in range(1, len(args.texts) + 1)]
                for name, clip in zip(row["wavs"], clips[row["method"]], strict=True):
                    generate.save(args.output / name, lambda whole, clip=clip: soundfile.write(whole, clip, rate))
            record["rows"] += rows
            write(record, args.output)
            tqdm.write(show(rows))
    print(f"wrote {args.output}.json, .png and .html, and wavs into {args.output}")


if __name__ == "__main__":
    with generate.interruptible():
        main()
