"""Your checkpoint, your prompts: dense attention, LiteFocus, the paper's settings, time tiles and token merging.

    python examples/compare.py                              # the embedded pipeline, in under five minutes
    python examples/compare.py "a slow bell" "a fast tom drum" --seconds 10
    python examples/compare.py --model cvssp/audioldm2 --prompts prompts.txt --seconds 10 40 80 --steps 200
    python examples/compare.py --prompts prompts.txt --reference recordings --embedder my_package:embed

Prompts come first, or one a line in a file. Every method gets the same prompts and the same noise. `litefocus` has the
settings that the options of attention give, which are the defaults. For every length a table:

`time`, of one generation, text to sound: seconds of the CPU, with a GPU of the clock; the median over prompts, methods
alternating. `speed-up`: dense attention's time over it; `FLOP ratio`: the same for the arithmetic of the UNet.
`latents`: the distance of the final latents to dense attention's, relative to these; 0 is the same clip, and the row
`other noise`, dense attention from other noise, shows how far another clip is. `attention`: the error of the attention
output that `litefocus.probe` finds, on average over the layers and in the worst. `Fréchet`: the squared Fréchet
distance of embeddings of windows, side by side, to those of the sounds in the folder REFERENCE.

An embedder is `module:callable`, found from the working directory too. It is called as callable(waveforms,
sampling_rate) with mono waveforms (batch, samples), a float32 array, and returns (batch, features). The embedded one
knows twelve small synthetic classes and says little about other sounds.

Writes NAME.html, one page with all of it to hear, see and send on; NAME.json; NAME.png (error against cost); and the
clips as wavs into the folder NAME; after every length, with those before it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import importlib.util
import json
import math
import pkgutil
import platform
import statistics
import string
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from datetime import date
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import _cli

METHODS = ("dense", "litefocus", "paper", "time tiles", "token merging")
OTHER_NOISE = "other noise"
PROMPTS = ("a fast tabla rhythm", "a slow drone")
FRAMES_PER_SECOND = 25  # of the latents of AudioLDM-style pipelines
EMBEDDER = "judge:embed"
EMBEDDER_NOTE = "the embedder is the embedded one, of twelve small synthetic classes: it says little about other sounds"
NATIVE_FRAMES = 256  # latent frames of the length that the published checkpoints were trained on, 10.24 s
BATCH = 16  # windows that an embedder gets at once
Row = dict[str, Any]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked."""
    parser = _cli.Parser(__doc__, conflict_handler="resolve")  # several lengths where the others have one
    parser.set_defaults(steps=5)
    add = parser.add_argument
    add("texts", nargs="*", metavar="PROMPT", help=f"what should sound (default: {', '.join(PROMPTS)})")
    add("--prompts", type=Path, metavar="FILE", help="prompts, one a line")
    lengths = {"dest": "lengths", "nargs": "+", "type": float, "metavar": "S"}
    add("--seconds", **lengths, default=[10.0, 30.0], help="lengths of clips (default: 10 30)")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD", help="default: all")
    add("--native", type=float, metavar="S", help="length of time tiles (default: 10.24; embedded pipeline: 5.12)")
    add("--reference", type=Path, metavar="FOLDER", help="of wav or flac files, for Fréchet distances")
    add("--embedder", default=EMBEDDER, metavar="MODULE:CALLABLE", help="default: the embedded one, see above")
    add("--window", type=float, default=5.12, metavar="S", help="of sound for an embedder (default: %(default)s)")
    add("--output", type=Path, default=Path("compare"), metavar="NAME", help="default: %(default)s")
    args = parser.parse_args(argv)
    with _cli.refusing():
        check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Check everything that needs no model, and fill in what follows from it. Raises ValueError."""
    for seconds in args.lengths:
        _cli.check({"seconds": seconds})
    args.lengths = list(dict.fromkeys(args.lengths))
    args.methods = list(dict.fromkeys(["dense", *args.methods]))  # what the others are compared with
    if args.texts and args.prompts:
        raise ValueError("prompts come from the command line or from a file, not from both")
    args.texts = list(dict.fromkeys(args.texts or read_prompts(args.prompts)))
    for text in args.texts:
        _cli.check({"prompt": text})
    if args.native is None:
        args.native = 5.12 if args.model == str(_cli.EMBEDDED) else NATIVE_FRAMES / FRAMES_PER_SECOND
    for name in ("native", "window"):
        if not 0.5 <= getattr(args, name) < math.inf:
            raise ValueError(f"{name} must be at least 0.5 seconds, got {getattr(args, name)}")
    if "token merging" in args.methods and importlib.util.find_spec("tomesd") is None:
        raise ValueError("token merging needs tomesd: pip install tomesd")
    if args.reference is not None:
        args.sounds = find_sounds(args.reference)
        if len(args.texts) * (min(args.lengths) // args.window) < 2:
            raise ValueError(f"a Fréchet distance needs two windows of {args.window:g} s or more at every length")
    elif args.embedder != EMBEDDER:
        raise ValueError("an embedder needs sounds to compare with: add --reference FOLDER")
    _cli.check_output(with_ending(args.output, ".wav"))
    blocked = [path for suffix in (".json", ".png", ".html") if (path := with_ending(args.output, suffix)).is_dir()]
    if blocked or args.output.is_file():
        raise ValueError(
            f"output {[*blocked, args.output][0]} is in the way: it is a {'folder' if blocked else 'file'}"
        )


def read_prompts(path: Path | None) -> list[str]:
    """The lines that are not empty. Raises ValueError for a file without."""
    if path is None:
        return list(PROMPTS)
    return [text for _, text in _cli.read_lines(path)]


def find_sounds(folder: Path) -> list[Path]:
    """The wav and flac files in a folder and below. Raises ValueError where there are none."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".wav", ".flac"))
    if not files:
        raise ValueError(f"reference {folder} is no folder that holds a .wav or .flac")
    return files


def with_ending(output: Path, suffix: str) -> Path:
    """NAME with a suffix; it may hold dots."""
    return output.with_name(output.name + suffix)


if __name__ == "__main__":
    parse()  # `--help` and mistakes are answered before the imports below, which take seconds

with _cli.interruptible():
    import diffusers
    import generate
    import numpy as np
    import numpy.typing as npt
    import soundfile
    import torch
    import transformers
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.image import imsave
    from scipy.signal import resample_poly
    from torch import Tensor
    from tqdm import tqdm

    import litefocus
    from litefocus import LiteFocusConfig

Waves = npt.NDArray[np.float32]
Features = npt.NDArray[np.float64]


# ------------------------------------------------------------------------------------------------------- methods


class Peer:
    """A processor that runs self-attention its own way: here not at all. Cross-attention stays with `original`.

    Args:
        original: the processor that it replaces.
        freq_bins: frequency bins of the layer's grid.
        native_frames: latent frames, at the UNet's input, of the length that the model was trained on.
        input_bins: frequency bins of the UNet's input.
    """

    def __init__(self, original: Any, freq_bins: int, native_frames: int = NATIVE_FRAMES, input_bins: int = 16) -> None:
        self.original, self.freq_bins = original, freq_bins
        self.native = math.ceil(native_frames * freq_bins / input_bins)  # frames, at this layer's level

    def __call__(self, attn: Any, x: Tensor, encoder_hidden_states: Tensor | None = None, **others: Any) -> Tensor:
        if encoder_hidden_states is not None:
            return self.original(attn, x, encoder_hidden_states, **others)
        return self.own(attn, x)

    def own(self, attn: Any, x: Tensor) -> Tensor:
        """Self-attention over x (batch, tokens, channels)."""
        return x

    def kept(self, frames: int) -> float:
        """Share of dense self-attention's arithmetic over a grid of `frames` frames."""
        return 0.0


class Tiles(Peer):
    """Dense attention in time tiles of native length, as HyperTile has it for images."""

    def own(self, attn: Any, x: Tensor) -> Tensor:
        """Whole tiles side by side in the batch, then the rest."""
        size = self.native * self.freq_bins
        whole = x.shape[1] // size * size
        parts = []
        if whole:
            tiles = x[:, :whole].reshape(-1, size, x.shape[2])
            parts.append(self.original(attn, tiles).reshape(x.shape[0], whole, -1))
        if whole < x.shape[1]:
            parts.append(self.original(attn, x[:, whole:]))
        return torch.cat(parts, dim=1)

    def kept(self, frames: int) -> float:
        """Whole tiles and the rest."""
        return (frames // self.native * self.native**2 + (frames % self.native) ** 2) / frames**2


class Merged(Peer):
    """Half of the tokens merged before self-attention, by tomesd's own functions."""

    def own(self, attn: Any, x: Tensor) -> Tensor:
        """Matched anew in every layer, as tomesd does."""
        from tomesd.merge import bipartite_soft_matching_random2d as matching

        tokens = x.shape[1]
        draw = torch.Generator(x.device).manual_seed(0)
        width, height = self.freq_bins, tokens // self.freq_bins
        merge, unmerge = matching(x, width, height, 2, 2, tokens // 2, generator=draw)
        return unmerge(self.original(attn, merge(x)))

    def kept(self, frames: int) -> float:
        """Half the queries, half the keys; the matching's own arithmetic is not counted."""
        return 0.25


Method = LiteFocusConfig | type[Peer] | None
"""LiteFocus with these settings, a peer, or dense attention."""


def install(pipe: Any, peer: type[Peer], native_frames: int = NATIVE_FRAMES) -> list[tuple[Any, Any]]:
    """Put a peer on every self-attention layer of a pipeline, which must not be patched.

    Args:
        pipe: what `litefocus.patch` accepts without `freq_bins`: with VAE and vocoder, and a UNet of diffusers.
        peer: its class.
        native_frames: see `Peer`.

    Returns:
        (layer, the processor that was there) of every layer.
    """
    before = []
    for row in litefocus.status(pipe).layers:
        layer = pipe.unet.get_submodule(row.name)
        before.append((layer, layer.processor))
        layer.set_processor(peer(layer.processor, row.freq_bins or 0, native_frames))
    return before


@contextlib.contextmanager
def installed(pipe: Any, method: Method, native_frames: int = NATIVE_FRAMES) -> Iterator[None]:
    """A `with` block in which the pipeline runs `method`; afterwards it is as it was. Arguments as in `install`."""
    if method is None:
        yield
    elif isinstance(method, LiteFocusConfig):
        with litefocus.patch(pipe, method):
            yield
    else:
        before = install(pipe, method, native_frames)
        try:
            yield
        finally:
            for layer, processor in before:
                layer.set_processor(processor)


def flop_ratio(pipe: Any, method: Method, seconds: float, native_frames: int = NATIVE_FRAMES) -> float:
    """Dense arithmetic of a UNet step / the method's, for a clip of `seconds`: the most that a step can be faster."""
    if method is None:
        return 1.0
    with litefocus.patch(pipe, method) if isinstance(method, LiteFocusConfig) else contextlib.nullcontext():
        status = litefocus.status(pipe, seconds=seconds)
    assert status.flops is not None
    if isinstance(method, LiteFocusConfig):
        return status.flops.ratio
    saved = 0.0
    for row in status.layers:
        frames, freq_bins = row.frames or 0, row.freq_bins or 0
        dense = 4 * (frames * freq_bins) ** 2 * pipe.unet.get_submodule(row.name).to_q.out_features
        saved += dense * (1 - method(None, freq_bins, native_frames).kept(frames))
    return status.flops.dense / (status.flops.dense - saved)


# ----------------------------------------------------------------------------------------------------- embeddings


def find_embedder(path: str) -> Callable[[Waves, int], Any]:
    """What `module:callable` names. Raises ValueError."""
    folders = (str(Path.cwd()), str(_cli.EMBEDDED.parent / "train"))
    sys.path += [folder for folder in folders if folder not in sys.path]
    try:
        found = pkgutil.resolve_name(path)
        if ":" not in path or not callable(found):
            raise TypeError(f"it must be module:callable, and names a {type(found).__name__}")
        return found
    except Exception as error:  # importing it runs code of others
        raise ValueError(f"cannot use embedder {path}: {_cli.first_line(error)}") from error


def frechet(one: Features, other: Features) -> float:
    """Squared Fréchet distance of two normal distributions, fitted to embeddings (windows, features).

    The trace of the root of the covariances' product is the sum of the singular values of one's centred points times
    the other's, so no root of a matrix is taken, and fewer windows than features do no harm to its accuracy.
    """
    centred = [(points - points.mean(axis=0)) / math.sqrt(len(points) - 1) for points in (one, other)]
    x, y = (np.linalg.qr(points, mode="r") for points in centred)
    shift = one.mean(axis=0) - other.mean(axis=0)
    return float(shift @ shift + (x**2).sum() + (y**2).sum() - 2 * np.linalg.norm(x @ y.T, "nuc"))


class Embedder:
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
            raise ValueError(f"cannot read {path}: {_cli.first_line(error)}") from error
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
                    raise ValueError(f"embedder {self.name}: {_cli.first_line(error)}") from error
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

    clock = time.process_time if device.type == "cpu" else time.perf_counter
    started = clock()
    audio, _ = generate.generate(pipe, settings, callback=after)
    took = clock() - started
    return audio, made["latents"].float().cpu(), took


# ------------------------------------------------------------------------------------------------ all methods, told


def compare(
    pipe: Any, seconds: float, embedder: Embedder | None, args: Any, bar: Any
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
            bar.set_description(f"{seconds:g} s clips, {name}")
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
        if embedder:
            points = embedder.embed(clips[name])
            row |= {"frechet": frechet(points, embedder.reference)}
            row |= {"windows": len(points), "notes": embedder.notes(len(points))}
        rows.append(row)
    return rows, clips


COLUMNS = {  # header: what of a row, how, and in words
    "method": ("method", "{}", "how self-attention is computed"),
    "time": ("median", "{:.3g} s", "of one generation, text to sound"),
    "speed-up": ("ratio", "{:.2f}x", "dense time / time"),
    "FLOP ratio": ("flop_ratio", "{:.2f}x", "the same for the arithmetic of the UNet"),
    "latents": ("distance", "{:.3f}", "relative distance to the dense clip before decoding; 0: the same clip"),
    "of other noise": ("of_noise", "{:.0%}", "that distance / the distance of an unrelated clip"),
    "attention": ("attention", "{:.3f}", "relative error of the attention output, mean of the layers"),
    "worst layer": ("worst", "{:.3f}", "the same in the worst layer"),
    "Fréchet": ("frechet", "{:.4g}", "squared Fréchet distance to the reference sounds; lower is better"),
}


def cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of one length."""
    columns = {name: column for name, column in COLUMNS.items() if name != "Fréchet" or "frechet" in rows[0]}
    rows = [{**row, "of_noise": row["distance"] / rows[-1]["distance"]} for row in rows]
    return list(columns), [
        [how.format(row[of]) if of in row else "" for of, how, _ in columns.values()] for row in rows
    ]


def show(rows: list[Row]) -> str:
    """The table of one length."""
    notes = [f"Note: {note}.\n" for note in rows[0].get("notes", [])]
    return f"{rows[0]['seconds']:g} s\n\n{_cli.table(*cells(rows))}{''.join(notes)}"


def plot(rows: list[Row], path: Path | BytesIO) -> None:
    """Distance of final latents to dense attention's against time, a panel for every length."""
    lengths = list(dict.fromkeys(row["seconds"] for row in rows))
    figure = Figure(figsize=(4.6 * len(lengths), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    every = figure.subplots(1, len(lengths), squeeze=False, sharex=True, sharey=True)[0]
    for axes, seconds in zip(every, lengths, strict=True):
        for row in rows:
            if row["seconds"] != seconds:
                continue
            if row["method"] == OTHER_NOISE:
                axes.axhline(row["distance"], color="0.4", linestyle="--", linewidth=1, label="dense, other noise")
            else:
                axes.plot(1 / row["ratio"], row["distance"], "o", markersize=9, label=row["method"])
        axes.set(title=f"{seconds:g} s", xlabel="time of a clip (dense: 1)")
    every[0].set_xlim(0, 1.1 * max(1 / row["ratio"] for row in rows if "ratio" in row))
    every[0].set_ylabel("distance of final latents to dense\n(relative)")
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=110)


def data(kind: str, write: Callable[[BytesIO], Any]) -> str:
    """What `write` writes into a file, as a URI."""
    write(file := BytesIO())
    return f"data:{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def player(path: Path, title: str, told: str) -> str:
    """A clip on the page, with its spectrogram over its time."""
    clip, rate = soundfile.read(path, dtype="float32")
    sound = data("audio/flac", lambda file: soundfile.write(file, clip, rate, format="FLAC"))
    picture = data("image/png", lambda file: imsave(file, _cli.mel_levels(clip, rate), **_cli.LEVELS))
    marks = [f'<span style="left:{25 * i}%">{i * len(clip) / rate / 4:g} s</span>' for i in range(5)]
    for hertz in (500, 1000, 2000, 4000):
        marks.append(f'<b style="bottom:{_cli.mel(hertz) / _cli.mel(rate / 2):.1%}">{hertz} Hz</b>')
    return (
        f"<article><div><b>{escape(title)}</b><br>{told}<audio controls preload=metadata src={sound}></audio></div>"
        f'<figure><img alt="spectrogram" src={picture}>{"".join(marks)}<i></i></figure></article>'
    )


def page(record: Row, folder: Path) -> str:
    """A page that needs no other file: the plot, and for every length a table and the clips by prompt."""
    lengths, prompts = list(dict.fromkeys(row["seconds"] for row in record["rows"])), record["prompts"]
    parts = []
    for seconds in lengths:
        rows = [row for row in record["rows"] if row["seconds"] == seconds]
        header, lines = cells(rows)
        head = "".join(f"<th>{name}<small>{COLUMNS[name][2]}</small>" for name in header)
        body = "".join("<tr>" + "".join(f"<td>{cell}" for cell in line) for line in lines)
        notes = "".join(f"<p><small>{escape(note)}.</small>" for note in rows[0].get("notes", []))
        parts.append(f"<h2>Clips of {seconds:g} s</h2><div class=wide><table><tr>{head}{body}</table></div>{notes}")
        for i, prompt in enumerate(prompts):
            parts.append(f"<h3>{escape(prompt)}, {seconds:g} s</h3>")
            for row in rows:
                speed = f"{row['ratio']:.2f} times as fast as dense, " if row["method"] in METHODS[1:] else ""
                far = f"{speed}latents differ from dense by {row['distances'][i]:.3f} of their norm"
                parts.append(player(folder / row["wavs"][i], row["method"], far if row["method"] != "dense" else ""))
    words = {name: escape(str(record[name])) for name in ("model", "steps", "measured")}
    return string.Template((Path(_cli.__file__).parent / "compare.html").read_text(encoding="utf-8")).substitute(
        words,
        lengths=f"{', '.join(f'{seconds:g}' for seconds in lengths)} s",
        prompts=f"{len(prompts)} prompt{'s' * (len(prompts) > 1)}",
        folder=escape(folder.name),
        plot=data("image/png", lambda file: plot(record["rows"], file)),
        body="\n".join(parts),
    )


def write(record: Row, output: Path) -> None:
    """The JSON, the picture and the page, each whole or not at all."""
    for suffix, text in ((".json", json.dumps(record, indent=1) + "\n"), (".html", page(record, output))):
        _cli.save(with_ending(output, suffix), lambda whole, text=text: whole.write_text(text, encoding="utf-8"))
    _cli.save(with_ending(output, ".png"), lambda whole: plot(record["rows"], whole))


def main(argv: list[str] | None = None) -> None:
    """Refuse, or measure, print and write."""
    args = parse(argv)
    with _cli.refusing():
        _cli.complete(args)
        if args.reference is not None:
            args.embed = find_embedder(args.embedder)
        pipe, patch = generate.load(args)
        patch.remove()
        rate = pipe.vocoder.config.sampling_rate
        embedder = Embedder(args, rate) if args.reference is not None else None
        args.output.mkdir(exist_ok=True)
    pipe.set_progress_bar_config(disable=True)
    for prompt in args.texts:
        _cli.note_unknown_words(pipe, prompt)

    libraries = (torch, diffusers, transformers, litefocus)
    record: Row = {
        "model": "the embedded pipeline" if args.model == str(_cli.EMBEDDED) else args.model,
        **{name: getattr(args, name) for name in ("steps", "guidance", "seed", "dtype", "native")},
        "prompts": args.texts,
        "litefocus": asdict(args.config),
        "measured": f"{_cli.machine(args.device.type)}, {date.today()}",
        "date": str(date.today()),
        "versions": {"python": platform.python_version(), **{of.__name__: of.__version__ for of in libraries}},
        "rows": [],
    }
    if embedder:
        windows, features = embedder.reference.shape
        record["reference"] = {"folder": str(args.reference), "windows": windows, "seconds": args.window}
        record["embedder"] = {"callable": args.embedder, "features": features}
    print(record["measured"] + "\n")
    with tqdm(total=len(args.lengths) * len(args.texts) * (len(args.methods) + 1), desc="clips", unit="clip") as bar:
        for seconds in args.lengths:
            rows, clips = compare(pipe, seconds, embedder, args, bar)
            for row in rows:
                stem = f"{seconds:g}s-{row['method'].replace(' ', '-')}"
                row["wavs"] = [f"{stem}-{i}.wav" for i in range(1, len(args.texts) + 1)]
                for name, clip in zip(row["wavs"], clips[row["method"]], strict=True):
                    _cli.save(args.output / name, lambda whole, clip=clip: soundfile.write(whole, clip, rate))
            record["rows"] += rows
            write(record, args.output)
            tqdm.write(show(rows))
    print(f"wrote {args.output}.html to hear and see it all, {args.output}.json and .png, and wavs into {args.output}")


if __name__ == "__main__":
    with _cli.interruptible():
        main()
