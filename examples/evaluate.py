"""Does it sound as good? Dense attention, LiteFocus and its peers on a small trained model, judged by numbers.

    python examples/evaluate.py --samples DIR               # every method at 1x, 2x, 4x and 8x the native length
    python examples/evaluate.py --samples DIR --quick       # a few clips, to see it work
    python examples/evaluate.py --samples DIR --methods dense litefocus "self only" --lengths 1
    python examples/evaluate.py --samples DIR --wavs        # and 12 clips of every method as wavs and spectrograms

DIR holds the flac files of Debian's sonic-pi-samples, for real scenes to compare with. Every method gets the same
prompts and the same noise, class and tempo balanced alike at every length. What is generated lies in --work, so a run
goes on where it stopped. A file there is named by what the UNet computes for a fixed input with the method in
place: a method that changes nothing at some length shares the file of dense attention, and no stale file can be taken
for another. Judge and embedder hear decoded mel spectrograms; the vocoder, the same for all, is left out.

Of every 5.12 s window: `class` and `tempo` right; `kl` of the judge's class posterior from that of real windows of the
class; `inception`, the judge's inception score; `frechet`, the Fréchet distance of embeddings to those of 720 real
windows. Of every clip: `beat`, the highest autocorrelation of its onset envelope at lags of 0.2 to 2 s; `drift`, the
mean squared distance between embeddings of its 2.56 s windows, where windows of unrelated real clips have 1.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import soundfile
import torch
import torch.nn.functional as F
import transformers
from benchmark import COLOURS, MARKERS, Merged, Peer, Published, Tiles
from diffusers import AudioLDM2Pipeline, AudioLDM2UNet2DConditionModel
from generate import save_spectrograms
from torch import Tensor
from tqdm import tqdm

import litefocus
from litefocus import LiteFocusAttnProcessor
from litefocus.processor import project
from litefocus.unet import get_processor, set_processor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "embedded"))

from data import CLASS_NAMES, TEMPO_NAMES, Bank, prompts, scene  # noqa: E402
from judge import load_embedder, load_judge  # noqa: E402
from mel import CLIP_SECONDS, LogMel  # noqa: E402

Array = npt.NDArray[np.float64]
CLIP_FRAMES = 512  # mel frames of a window
NATIVE = 128  # latent frames of the native length
CLIPS = {1: 288, 2: 144, 4: 72, 8: 48}  # by length: 288 windows, 384 at 8x
REFERENCE = 720  # real windows


# ----------------------------------------------------------------------------------------------------- methods


class NativePeer(Peer):
    """A peer of the benchmark on a model whose native length is 5.12 s."""

    def __init__(self, original: Any, freq_bins: int) -> None:
        super().__init__(original, freq_bins)
        self.native = math.ceil(NATIVE * freq_bins / 16)


class NativeTiles(NativePeer, Tiles):
    """Dense attention in tiles of the native length."""


class SelfOnly(Peer):
    """The control: every token attends to itself alone."""

    def own(self, attn: Any, x: Tensor) -> Tensor:
        """Values go straight to the output projection."""
        return attn.to_out[0](attn.to_v(x))


class LengthScaled(NativePeer):
    """Dense attention whose logits grow with the log of the length, so that its entropy stays that of native length."""

    def own(self, attn: Any, x: Tensor) -> Tensor:
        """Logits times log(tokens) / log(tokens at native length), where there are more."""
        query, key, value = project(attn, x)
        scale = max(1.0, math.log(x.shape[1]) / math.log(self.native * self.freq_bins))
        attended = F.scaled_dot_product_attention(query, key, value, scale=scale * query.shape[-1] ** -0.5)
        return attn.to_out[0](attended.transpose(1, 2).flatten(2))


@dataclass(frozen=True)
class Method:
    """LiteFocus with these settings, or a peer; `fresh`: another sample at every step."""

    settings: dict[str, Any] | None = None
    peer: type[Peer] | None = None
    fresh: bool = False

    @contextlib.contextmanager
    def on(self, pipe: AudioLDM2Pipeline) -> Iterator[Callable[..., None] | None]:
        """The pipeline with the method in place; yields a callback for every step, where it needs one."""
        if self.settings is None and self.peer is None:
            yield None
            return
        with litefocus.patch(pipe, **(self.settings or {})):
            if self.peer is not None:  # litefocus has found the layers and knows their grids
                for layer in pipe.unet.modules():
                    focus = get_processor(layer)
                    if isinstance(focus, LiteFocusAttnProcessor):
                        set_processor(layer, self.peer(focus.original, focus.freq_bins))
            try:
                yield functools.partial(self._next, pipe) if self.fresh else None
            finally:
                litefocus.patch(pipe)  # over the peers, so that leaving restores every layer

    def _next(self, pipe: AudioLDM2Pipeline, step: int, *_: Any) -> None:
        litefocus.patch(pipe, **{**(self.settings or {}), "seed": step + 1})


METHODS: dict[str, Method] = {
    "dense": Method(),
    "litefocus": Method({"min_freq_bins": 8}),
    "every level": Method({"min_freq_bins": 2}),
    "r = 0 (own bin only)": Method({"min_freq_bins": 8, "sparse_ratio": 0.0}),
    "r = 0.05": Method({"min_freq_bins": 8, "sparse_ratio": 0.05}),
    "r = 0.2": Method({"min_freq_bins": 8, "sparse_ratio": 0.2}),
    "fresh sample": Method({"min_freq_bins": 8}, fresh=True),
    "window 1x": Method({"min_freq_bins": 2, "time_window": NATIVE}),
    "window 2x": Method({"min_freq_bins": 2, "time_window": 2 * NATIVE}),
    "published arithmetic": Method(peer=Published),
    "time tiles": Method(peer=NativeTiles),
    "token merging 50 %": Method(peer=Merged),
    "log-length scaling": Method(peer=LengthScaled),
    "self only": Method(peer=SelfOnly),
}


# -------------------------------------------------------------------------------------------------- generation


def labels_of(count: int) -> list[tuple[str, str]]:
    """`count` pairs of class and tempo: classes alike, and tempi alike, for every multiple of 12 divisible by 3."""
    return [(CLASS_NAMES[i % 12], TEMPO_NAMES[(i + i // 12) % 3]) for i in range(count)]


def half_precision(pipe: AudioLDM2Pipeline, dtype: torch.dtype) -> None:
    """Run the UNet alone in `dtype`; the sampler around it stays in float32."""

    def cast(value: Any, to: torch.dtype) -> Any:
        return value.to(to) if isinstance(value, Tensor) and value.is_floating_point() else value

    def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(cast(x, dtype) for x in args), {name: cast(x, dtype) for name, x in kwargs.items()}

    def leave(_: Any, __: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(cast(x, torch.float32) for x in output)

    for part in pipe.unet.children():
        part.to(dtype)
    pipe.unet.register_forward_pre_hook(enter, with_kwargs=True)
    pipe.unet.register_forward_hook(leave)


def load(args: argparse.Namespace) -> AudioLDM2Pipeline:
    """The embedded pipeline, with the UNet to judge."""
    pipe = AudioLDM2Pipeline.from_pretrained(HERE / "embedded" / "pipeline")
    pipe.register_modules(unet=AudioLDM2UNet2DConditionModel.from_pretrained(args.unet).eval())
    pipe.set_progress_bar_config(disable=True)
    if args.dtype != "float32":
        half_precision(pipe, getattr(torch, args.dtype))
    return pipe


def digest(*tensors: Tensor) -> str:
    """Of these numbers, to the bit."""
    every = hashlib.sha256()
    for tensor in tensors:
        every.update(tensor.detach().float().contiguous().numpy().tobytes())
    return every.hexdigest()


def fingerprint(pipe: AudioLDM2Pipeline, times: int) -> str:
    """Of what the UNet computes at this length."""
    draw = torch.Generator().manual_seed(0)
    latent = torch.randn(2, 8, times * NATIVE, 16, generator=draw)
    text = {"encoder_hidden_states": torch.randn(2, 8, 32, generator=draw)}
    text |= {"encoder_hidden_states_1": torch.randn(2, 6, 64, generator=draw)}
    torch.manual_seed(0)  # the published arithmetic draws from the global generator
    with torch.inference_mode():
        return digest(pipe.unet(latent, 500, **text, return_dict=False)[0])


def kept_file(args: argparse.Namespace, *key: Any) -> Path:
    """Where --work keeps what was made from `key`."""
    return Path(args.work) / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.pt"


def keep(mels: Tensor, file: Path) -> Tensor:
    """Write `mels`, whole or not at all, and return them."""
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    torch.save(mels, temporary)
    temporary.replace(file)
    return mels


def generate(pipe: AudioLDM2Pipeline, name: str, times: int, args: argparse.Namespace) -> Tensor:
    """Mel spectrograms (clips, times * 512, 64) of a method at a length, from --work if they were made before."""
    method = METHODS[name]
    count = args.clips or CLIPS[times]
    labels = labels_of(count)
    rng = np.random.default_rng(args.seed)
    texts = {pair: options[rng.integers(len(options))] for pair in labels_of(36) for options in [prompts(*pair)]}
    with method.on(pipe) as callback:
        does, decodes = fingerprint(pipe, times), digest(*pipe.vae.parameters())
        sampling = (args.steps, args.guidance, args.seed, args.dtype)
        file = kept_file(args, does, decodes, method.fresh, times, count, *sampling)
        if file.exists():
            return torch.load(file, weights_only=True).float()
        batch = max(1, 24 // times)
        parts = []
        for start in tqdm(range(0, count, batch), desc=f"{name}, {times}x", mininterval=10):
            rows = range(start, min(start + batch, count))
            torch.manual_seed(start)
            if method.fresh:
                litefocus.patch(pipe, **(method.settings or {}))
            latents = pipe(
                [texts[labels[i]] for i in rows],
                audio_length_in_s=times * CLIP_SECONDS,
                num_inference_steps=args.steps,
                guidance_scale=args.guidance,
                generator=[torch.Generator().manual_seed(1000 * args.seed + i) for i in rows],
                output_type="latent",
                callback=callback,
            ).audios
            with torch.inference_mode():
                for latent in latents:
                    decoded = pipe.vae.decode(latent[None] / pipe.vae.config.scaling_factor).sample
                    parts.append(decoded[0, 0].half())
    return keep(torch.stack(parts), file).float()


def real(pipe: AudioLDM2Pipeline, count: int, times: int, seed: int, args: argparse.Namespace) -> Tensor:
    """Mel spectrograms of real scenes, through the VAE as the generated ones are; kept in --work too."""
    file = kept_file(args, "real", digest(*pipe.vae.parameters()), count, times, seed)
    if file.exists():
        return torch.load(file, weights_only=True).float()
    bank, mel, parts, labels = Bank(Path(args.samples)), LogMel(), [], labels_of(count)
    for i in tqdm(range(count), desc=f"real scenes, {times}x", mininterval=10):
        wave = scene(bank, *labels[i], np.random.default_rng([seed, i]), times * CLIP_SECONDS)
        with torch.inference_mode():
            code = pipe.vae.encode(mel(torch.from_numpy(wave)[None])).latent_dist.mean
            parts.append(pipe.vae.decode(code).sample[0, 0].half())
    return keep(torch.stack(parts), file).float()


# --------------------------------------------------------------------------------------------------- listening


@dataclass(frozen=True)
class Heard:
    """What the judge and the embedder make of clips.

    classes (clips, windows, 12), tempi (clips, windows, 3): probabilities. embeddings (clips, windows, 48), halves
    (clips, 2 * windows, 48): of whole and half windows. beat: (clips,).
    """

    classes: Array
    tempi: Array
    embeddings: Array
    halves: Array
    beat: Array


def listen(mels: Tensor) -> Heard:
    """Judge and embed the windows of mels (clips, frames, 64), side by side."""
    judge, embedder = load_judge()[0], load_embedder()
    clips, frames, bins = mels.shape

    def over(model: Callable[[Tensor], tuple[Tensor, ...]], length: int) -> list[Array]:
        parts = [model(part) for part in mels.reshape(-1, 1, length, bins).split(96)]
        found = (torch.cat(column).double().numpy() for column in zip(*parts, strict=True))
        return [x.reshape(clips, frames // length, -1) for x in found]

    with torch.inference_mode():
        classes, tempi = over(lambda x: tuple(logits.softmax(dim=1) for logits in judge(x)), CLIP_FRAMES)
        (embeddings,) = over(lambda x: (embedder.embed(x),), CLIP_FRAMES)
        (halves,) = over(lambda x: (embedder.embed(x),), CLIP_FRAMES // 2)
        onsets = mels.diff(dim=1).clamp(min=0).mean(dim=2)
        onsets = onsets - onsets.mean(dim=1, keepdim=True)
        power = torch.fft.rfft(onsets, n=2 * onsets.shape[1]).abs().square()
        echo = torch.fft.irfft(power)[:, :201] / torch.arange(onsets.shape[1], onsets.shape[1] - 201, -1)
        beat = (echo[:, 20:].amax(dim=1) / echo[:, 0].clamp(min=1e-9)).double().numpy()
    return Heard(classes, tempi, embeddings, halves, beat)


class Reference:
    """What real scenes sound like to the judge and the embedder."""

    def __init__(self, heard: Heard, labels: list[tuple[str, str]]) -> None:
        sounds = np.array([CLASS_NAMES.index(sound) for sound, _ in labels])
        points = heard.embeddings.reshape(-1, heard.embeddings.shape[-1])
        self.scale = points.std(axis=0)
        self.mean = (points / self.scale).mean(axis=0)
        values, vectors = np.linalg.eigh(np.cov(points / self.scale, rowvar=False))
        self.root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
        self.trace = values.sum()
        self.posterior = np.stack([heard.classes[sounds == i].mean(axis=(0, 1)) for i in range(len(CLASS_NAMES))])
        self.unrelated = heard.halves.reshape(-1, heard.halves.shape[-1]).var(axis=0)

    def frechet(self, embeddings: Array) -> float:
        """Squared Fréchet distance of embeddings (points, dims) to the real ones, in real standard deviations."""
        points = embeddings / self.scale
        covariance = np.cov(points, rowvar=False)
        cross = np.linalg.eigvalsh(self.root @ covariance @ self.root).clip(min=0)
        shift = points.mean(axis=0) - self.mean
        return float(shift @ shift + np.trace(covariance) + self.trace - 2 * np.sqrt(cross).sum())


METRICS = {  # name: whether more is better
    "frechet": False,
    "class": True,
    "tempo": True,
    "kl": False,
    "inception": True,
    "beat": True,
    "drift": False,
}
RESAMPLES = 500


def measures(heard: Heard, labels: list[tuple[str, str]], reference: Reference) -> Callable[[Any], dict[str, float]]:
    """The metrics as a function of which clips to count, some perhaps twice."""
    sounds = np.array([CLASS_NAMES.index(sound) for sound, _ in labels])
    tempi = np.array([TEMPO_NAMES.index(tempo) for _, tempo in labels])
    logs = np.log(heard.classes.clip(min=1e-6))
    real_posterior = reference.posterior[sounds][:, None].clip(min=1e-6)
    by_clip = {
        "class": (heard.classes.argmax(axis=2) == sounds[:, None]).mean(axis=1),
        "tempo": (heard.tempi.argmax(axis=2) == tempi[:, None]).mean(axis=1),
        "kl": (real_posterior * (np.log(real_posterior) - logs)).sum(axis=2).mean(axis=1),
        "beat": heard.beat,
        "drift": (heard.halves.var(axis=1, ddof=1) / reference.unrelated).mean(axis=1),
    }
    negative_entropy = (heard.classes * logs).sum(axis=2).mean(axis=1)

    def of(clips: Any) -> dict[str, float]:
        found = {name: float(values[clips].mean()) for name, values in by_clip.items()}
        found["frechet"] = reference.frechet(heard.embeddings[clips].reshape(-1, heard.embeddings.shape[-1]))
        mean = heard.classes[clips].mean(axis=(0, 1)).clip(min=1e-6)
        found["inception"] = math.exp(negative_entropy[clips].mean() - (mean * np.log(mean)).sum())
        return {name: found[name] for name in METRICS}

    return of


def compare(
    methods: dict[str, Callable[[Any], dict[str, float]]], count: int
) -> dict[str, dict[str, dict[str, float]]]:
    """{method: {metric: value, its standard error, difference to dense, its standard error}}, by bootstrap over clips.

    The same clips are drawn for all methods, which share prompts and noise: differences are paired.
    """
    rng = np.random.default_rng(0)
    draws = [rng.integers(count, size=count) for _ in range(RESAMPLES)]
    resampled = {name: [of(draw) for draw in draws] for name, of in methods.items()}
    everything = np.arange(count)
    values = {name: of(everything) for name, of in methods.items()}
    table: dict[str, dict[str, dict[str, float]]] = {}
    for name in methods:
        table[name] = {}
        for metric in METRICS:
            drawn = np.array([of[metric] for of in resampled[name]])
            cell = {"value": values[name][metric], "se": float(drawn.std(ddof=1))}
            if "dense" in methods and not name.startswith("real"):
                base = np.array([of[metric] for of in resampled["dense"]])
                cell["diff"] = values[name][metric] - values["dense"][metric]
                cell["diff_se"] = float((drawn - base).std(ddof=1))
            table[name][metric] = cell
    return table


def verdict(cell: dict[str, float], more_is_better: bool) -> str:
    """'+' or '-' where a method is better or worse than dense by more than three standard errors."""
    if cell.get("diff_se", 0.0) <= 0 or abs(cell["diff"]) <= 3 * cell["diff_se"]:
        return " "
    return "+" if (cell["diff"] > 0) == more_is_better else "-"


def show(table: dict[str, dict[str, dict[str, float]]], times: int, count: int) -> str:
    """One length's table: value, and difference to dense with its standard error."""
    lines = [f"{times}x: {count} clips, {count * times} windows; difference to dense ± its standard error"]
    width = max(len(name) for name in table)
    lines.append(" " * width + "".join(f"  {metric:<24}" for metric in METRICS))
    for name, cells in table.items():
        row = name.ljust(width)
        for metric, more in METRICS.items():
            cell = cells[metric]
            text = f"{cell['value']:.3f}"
            if name != "dense" and "diff" in cell:
                text += f" {cell['diff']:+.3f}±{cell['diff_se']:.3f}{verdict(cell, more)}"
            else:
                text += f" ±{cell['se']:.3f}"
            row += f"  {text:<24}"
        lines.append(row.rstrip())
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- files


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Metrics against length, a line for every method, with one standard error."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = ("frechet", "class", "tempo", "beat", "drift", "kl")
    figure = Figure(figsize=(15, 8.5), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(row["method"] for row in rows))
    for axes, metric in zip(figure.subplots(2, 3).flat, shown, strict=True):
        for i, name in enumerate(names):
            points = sorted(
                (row["times"], row[metric]["value"], row[metric]["se"]) for row in rows if row["method"] == name
            )
            lengths, values, errors = zip(*points, strict=True)
            style = {"color": COLOURS[i % 8], "marker": MARKERS[i % 8], "linestyle": ("-", "--", ":")[i // 8]}
            axes.errorbar(
                [x * (1 + 0.012 * (i - len(names) / 2)) for x in lengths], values, errors, label=name, **style
            )
        better = "more" if METRICS[metric] else "less"
        axes.set(title=f"{metric} ({better} is better)", xlabel="length of the clip (s)", xscale="log")
        lengths = sorted({row["times"] for row in rows})
        axes.set_xticks(lengths, [f"{CLIP_SECONDS * x:g}" for x in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=70)


def write_wavs(pipe: AudioLDM2Pipeline, mels: dict[str, Tensor], args: argparse.Namespace) -> None:
    """The first 12 clips of every method through the vocoder, and pictures that compare them, into --work."""
    labels = labels_of(12)
    folder = Path(args.work) / "wavs"
    for i, (sound, tempo) in enumerate(labels):
        clips = {}
        for name, of in mels.items():
            with torch.inference_mode():
                clips[name] = pipe.vocoder(of[i]).float().numpy()
            target = folder / name
            target.mkdir(parents=True, exist_ok=True)
            soundfile.write(target / f"{i:02} {tempo} {sound}.wav", clips[name], 16000)
        save_spectrograms(clips, 16000, folder / f"{i:02} {tempo} {sound}.png")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", required=True, help="folder with the flac files of sonic-pi-samples")
    parser.add_argument(
        "--unet", default=str(HERE / "embedded" / "unet_attentive"), help="its folder (default: %(default)s)"
    )
    parser.add_argument("--label", default="seed 1", help="its name in the JSON (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--lengths", nargs="+", type=int, choices=CLIPS, default=list(CLIPS))
    parser.add_argument("--clips", type=int, help="clips at every length (default: 288, 144, 72, 48)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", help="of the UNet (default: %(default)s)")
    parser.add_argument("--work", default="evaluation", help="where generated mels are kept (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write NAME.json, where other rows stay, and NAME.png")
    parser.add_argument("--wavs", action="store_true", help="12 clips of every method as wavs, at the last length")
    parser.add_argument("--quick", action="store_true", help="12 clips, 4 steps, three methods, 1x and 2x")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    if args.quick:
        args.methods, args.lengths = ["dense", "litefocus", "self only"], [1, 2]
        args.clips, args.steps = args.clips or 12, min(args.steps, 4)
    if args.clips is not None and (args.clips < 12 or args.clips % 12):
        parser.error(f"--clips must be a multiple of 12, so that classes and tempi are balanced, got {args.clips}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Generate what is missing, listen, print."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    Path(args.work).mkdir(parents=True, exist_ok=True)
    pipe = load(args)
    count = REFERENCE if not args.quick else 144
    reference = Reference(listen(real(pipe, count, 1, 880_001, args)), labels_of(count))
    for times in args.lengths:
        clips = args.clips or CLIPS[times]
        labels = labels_of(clips)
        mels = {name: generate(pipe, name, times, args) for name in args.methods}
        heard = {name: listen(of) for name, of in mels.items()}
        heard["real"] = listen(real(pipe, clips, times, 880_002, args))
        table = compare({name: measures(of, labels, reference) for name, of in heard.items()}, clips)
        print(show(table, times, clips), flush=True)
        rows = [
            {"model": args.label, "method": name, "times": times, "clips": clips, **cells}
            for name, cells in table.items()
        ]
        if args.output:
            record(rows, args)
        if args.wavs and times == args.lengths[-1]:
            write_wavs(pipe, mels, args)


def record(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Add rows to the JSON, in place of older ones of the same model, method and length, and draw the plot."""
    file = args.output.with_suffix(".json")
    kept = json.loads(file.read_text())["rows"] if file.exists() else []
    new = {(row["model"], row["method"], row["times"]) for row in rows}
    kept = [row for row in kept if (row["model"], row["method"], row["times"]) not in new]
    measured = (
        f"{platform.machine()}, torch {torch.__version__}, diffusers {diffusers.__version__}, transformers "
        f"{transformers.__version__}, {args.steps} steps, guidance {args.guidance}, seed {args.seed}, UNet in "
        f"{args.dtype}, {RESAMPLES} resamples, {date.today()}"
    )
    rows = kept + [{**row, "measured": measured} for row in rows]
    file.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    plot([row for row in rows if row["model"] == args.label], args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
