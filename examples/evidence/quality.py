"""Does it sound as good? Dense attention, LiteFocus and its peers on a small trained model, judged by numbers.

    python examples/evaluate.py --samples DIR               # every method at 1x, 2x, 4x and 8x the native length
    python examples/evaluate.py --samples DIR --screen      # many settings, by two measures that need no judge
    python examples/evaluate.py --samples DIR --quick       # a few clips, to see it work
    python examples/evaluate.py --samples DIR --methods dense litefocus "self only" --lengths 1
    python examples/evaluate.py --samples DIR --wavs        # and 12 clips of every method as wavs

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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import soundfile
import torch
import transformers
from diffusers import AudioLDM2Pipeline, AudioLDM2UNet2DConditionModel
from matplotlib.lines import Line2D
from methods import Merged, Peer, Tiles, installed
from plots import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION, label_points, log_axis, panels, save, styles
from torch import Tensor
from tqdm import tqdm

import litefocus
from litefocus import LiteFocusConfig, _grid

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "embedded"))

from data import CLASS_NAMES, TEMPO_NAMES, Bank, prompts, scene  # noqa: E402
from judge import load_embedder, load_judge  # noqa: E402
from mel import CLIP_SECONDS, LogMel  # noqa: E402

Array = npt.NDArray[np.float64]
CLIP_FRAMES = 512  # mel frames of a window
NATIVE = 128  # latent frames of the native length
CLIPS = {1: 288, 2: 144, 4: 72, 8: 48, 16: 24, 32: 12}  # by length: 288 windows, 384 from 8x on
REFERENCE = 720  # real windows
TIMESTEPS = (500, 901)


# ----------------------------------------------------------------------------------------------------- methods


class SelfOnly(Peer):
    """The control: every token attends to itself alone."""

    def own(self, attn: Any, x: Tensor) -> Tensor:
        """Values go straight to the output projection."""
        return attn.to_out[0](attn.to_v(x))


@dataclass(frozen=True)
class Method:
    """A way to run self-attention.

    how: LiteFocus with these settings, a peer, or None for dense attention.
    draws: with LiteFocus, how many samples a layer has, of which every step takes one; None leaves it to the library.
    """

    how: LiteFocusConfig | type[Peer] | None = None
    draws: int | None = None

    @contextlib.contextmanager
    def on(self, pipe: AudioLDM2Pipeline) -> Iterator[None]:
        """The pipeline with the method in place."""
        with rotation(self.draws), installed(pipe, self.how, NATIVE):
            yield


@contextlib.contextmanager
def rotation(draws: int | None) -> Iterator[None]:
    """Layers that are patched inside have so many samples, of which every step takes that of its timestep."""
    usual = _grid.DRAWS
    _grid.DRAWS = usual if draws is None else draws
    try:
        yield
    finally:
        _grid.DRAWS = usual


DEFAULT = LiteFocusConfig()
METHODS: dict[str, Method] = {
    "dense": Method(),
    "litefocus": Method(DEFAULT),
    "litefocus, one sample": Method(DEFAULT, draws=1),
    "window": Method(LiteFocusConfig(time_window=NATIVE, sparse_ratio=0.2)),
    "window, none far": Method(LiteFocusConfig(time_window=NATIVE, sparse_ratio=0.2, far_sampled=0)),
    "shared sample": Method(LiteFocusConfig(same_frequency=False, time_window=None)),
    "paper": Method(LiteFocusConfig.paper()),
    "time tiles": Method(Tiles),
    "token merging": Method(Merged),
    "self only": Method(SelfOnly),
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
    pipe.to(args.device)
    if args.dtype != "float32":
        half_precision(pipe, getattr(torch, args.dtype))
    return pipe


def digest(*tensors: Tensor) -> str:
    """Of these numbers, to the bit."""
    every = hashlib.sha256()
    for tensor in tensors:
        every.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return every.hexdigest()


def fingerprint(pipe: AudioLDM2Pipeline, times: int) -> str:
    """Of what the UNet computes at this length, at two timesteps that take different samples."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(pipe.unet.device)

    latent = normal(2, 8, times * NATIVE, 16)
    text = {"encoder_hidden_states": normal(2, 8, 32), "encoder_hidden_states_1": normal(2, 6, 64)}
    with torch.inference_mode():
        return digest(*(pipe.unet(latent, timestep, **text, return_dict=False)[0] for timestep in TIMESTEPS))


def kept_file(args: argparse.Namespace, *key: Any) -> Path:
    """Where --work keeps what was made from `key`."""
    return Path(args.work) / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.pt"


def keep(made: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Write what was made, whole or not at all, and return it."""
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    torch.save(made, temporary)
    temporary.replace(file)
    return made


def texts_of(seed: int) -> dict[tuple[str, str], str]:
    """A prompt for every class and tempo."""
    rng = np.random.default_rng(seed)
    return {pair: options[rng.integers(len(options))] for pair in labels_of(36) for options in [prompts(*pair)]}


def generate(
    pipe: AudioLDM2Pipeline,
    name: str,
    method: Method,
    times: int,
    count: int,
    args: argparse.Namespace,
    *,
    noise: int = 0,
) -> dict[str, Tensor]:
    """Clips of a method at a length, from --work if they were made before.

    `noise`: another number starts the same prompts from other noise.

    Returns "mels" (count, times * 512, 64), "latents" (count, 8, times * 128, 16), both in half precision.
    """
    labels, texts = labels_of(count), texts_of(args.seed)
    with method.on(pipe):
        does, decodes = fingerprint(pipe, times), digest(*pipe.vae.parameters())
        key = (does, decodes, times, count, args.steps, args.guidance, args.seed, args.dtype)
        file = kept_file(args, *key, *([noise] if noise else []))
        if file.exists():
            return torch.load(file, weights_only=True)
        batch = max(1, 24 // times)
        mels, latents = [], []
        for start in tqdm(range(0, count, batch), desc=f"{name}, {times}x", mininterval=10):
            rows = range(start, min(start + batch, count))
            made = pipe(
                [texts[labels[i]] for i in rows],
                audio_length_in_s=times * CLIP_SECONDS,
                num_inference_steps=args.steps,
                guidance_scale=args.guidance,
                generator=[torch.Generator().manual_seed(1000 * (args.seed + noise) + i) for i in rows],
                output_type="latent",
            ).audios
            latents.append(made.half().cpu())
            with torch.inference_mode():
                for latent in made:
                    decoded = pipe.vae.decode(latent[None] / pipe.vae.config.scaling_factor).sample
                    mels.append(decoded[0, 0].half().cpu())
    return keep({"mels": torch.stack(mels), "latents": torch.cat(latents)}, file)


def real(pipe: AudioLDM2Pipeline, count: int, times: int, seed: int, args: argparse.Namespace) -> Tensor:
    """Mel spectrograms of real scenes, through the VAE as the generated ones are; kept in --work too."""
    file = kept_file(args, "real", digest(*pipe.vae.parameters()), count, times, seed)
    if file.exists():
        return torch.load(file, weights_only=True)["mels"].float()
    bank, mel, parts, labels = Bank(Path(args.samples)), LogMel(), [], labels_of(count)
    for i in tqdm(range(count), desc=f"real scenes, {times}x", mininterval=10):
        wave = scene(bank, *labels[i], np.random.default_rng([seed, i]), times * CLIP_SECONDS)
        with torch.inference_mode():
            code = pipe.vae.encode(mel(torch.from_numpy(wave)[None]).to(pipe.vae.device)).latent_dist.mean
            parts.append(pipe.vae.decode(code).sample[0, 0].half().cpu())
    return keep({"mels": torch.stack(parts)}, file)["mels"].float()


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


# ------------------------------------------------------------------------------------------------------ screen

SCREEN_CLIPS = {1: 12, 4: 8, 8: 4}
WHOLE = {"time_window": None}  # the whole clip in view, as with the default up to half a minute


def screened() -> dict[str, dict[str, Method]]:
    """{family: {setting: method}}: what is cheap to try."""

    def focus(draws: int | None = None, **settings: Any) -> Method:
        return Method(LiteFocusConfig(**settings), draws)

    return {
        "ratio and floor": {
            f"r = {ratio:g}, floor {floor}": focus(**WHOLE, sparse_ratio=ratio, min_sampled=floor)
            for ratio in (0.025, 0.05, 0.1, 0.2)
            for floor in (0, 16, 32, 64)
        },
        "window": {
            f"window {width}x, {far} far": focus(time_window=width * NATIVE, far_sampled=far)
            for width in (1, 2, 4)
            for far in (0, 8, 16, 32)
        },
        "rotation": {
            f"{name}, {draws} sample{'s' if draws > 1 else ''}": focus(draws, **settings)
            for name, settings in {
                "r = 0.1, floor 32": WHOLE,
                "r = 0.025, floor 16": {**WHOLE, "sparse_ratio": 0.025, "min_sampled": 16},
                "window 1x, 16 far": {"time_window": NATIVE},
                "shared, r = 0.1": {**WHOLE, "same_frequency": False},
            }.items()
            for draws in (1, 4, 8)
        },
        "shared sample": {
            f"shared, r = {ratio:g}": focus(**WHOLE, same_frequency=False, sparse_ratio=ratio)
            for ratio in (0.05, 0.1, 0.2)
        },
        "peers": {name: METHODS[name] for name in ("paper", "time tiles", "token merging", "self only")},
    }


def layer_inputs(pipe: AudioLDM2Pipeline, times: int, args: argparse.Namespace) -> dict[str, Tensor]:
    """What enters every self-attention layer: (samples, tokens, channels), from two clips at three steps."""
    wanted, step = {args.steps * part // 6 for part in (1, 3, 5)}, -1
    taken: dict[str, list[Tensor]] = {}

    def count(*_: Any) -> None:
        nonlocal step
        step += 1

    def take(name: str, _: Any, given: tuple[Any, ...], others: dict[str, Any]) -> None:
        if step in wanted and others.get("encoder_hidden_states") is None:
            taken.setdefault(name, []).append(given[0].clone())

    hooks = [pipe.unet.register_forward_pre_hook(count)]
    for row in litefocus.status(pipe).layers:
        layer = pipe.unet.get_submodule(row.name)
        hooks.append(layer.register_forward_pre_hook(functools.partial(take, row.name), with_kwargs=True))
    try:
        pipe(
            [texts_of(args.seed)[pair] for pair in labels_of(2)],
            audio_length_in_s=times * CLIP_SECONDS,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            generator=[torch.Generator().manual_seed(1000 * args.seed + i) for i in range(2)],
            output_type="latent",
        )
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in taken.items()}


class Layers:
    """The self-attention layers of a UNet, what enters them at a length, and what dense attention makes of it.

    inputs: {layer: (samples, tokens, channels)}.
    """

    @torch.inference_mode()
    def __init__(self, pipe: AudioLDM2Pipeline, times: int, inputs: dict[str, Tensor]) -> None:
        self.pipe, self.seconds, self.inputs = pipe, times * CLIP_SECONDS, inputs
        self.dense = {name: self.attention(name) for name in inputs}

    def attention(self, name: str) -> Tensor:
        """What a layer's attention returns for its input, without the projection that follows."""
        layer = self.pipe.unet.get_submodule(name)
        projection, layer.to_out[0] = layer.to_out[0], torch.nn.Identity()
        try:
            return layer(self.inputs[name])
        finally:
            layer.to_out[0] = projection

    @torch.inference_mode()
    def errors(self, method: Method) -> dict[str, float]:
        """|method - dense| / |dense| of every layer's attention output, on the same input."""
        found = {}
        with method.on(self.pipe):
            for name in self.inputs:
                found[name] = float((self.attention(name) - self.dense[name]).norm() / self.dense[name].norm())
        return found

    def cost(self, method: Method) -> float:
        """The share of dense self-attention's arithmetic that is left."""
        dense = kept = 0.0
        with method.on(self.pipe):
            for row in litefocus.status(self.pipe, seconds=self.seconds).layers:
                if row.name not in self.inputs:
                    continue
                layer = self.pipe.unet.get_submodule(row.name)
                arithmetic = (row.frames * row.freq_bins) ** 2 * layer.to_q.out_features
                peer = isinstance(layer.processor, Peer)
                dense += arithmetic
                kept += arithmetic * (layer.processor.kept(row.frames) if peer else row.keys_kept)
        return kept / dense


def distances(latents: Tensor, dense: Tensor, other: Tensor) -> Array:
    """Of every clip: its distance to dense attention's from the same noise; 1 is that of dense from other noise."""
    apart, noise = ((x.float() - dense.float()).flatten(1).norm(dim=1) for x in (latents, other))
    return (apart / noise).double().numpy()


def screen(pipe: AudioLDM2Pipeline, times: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every setting's cost, error of attention, and distance of final latents to dense, one after the other."""
    layers = Layers(pipe, times, layer_inputs(pipe, times, args))
    count = args.clips or SCREEN_CLIPS[times]
    dense = generate(pipe, "dense", Method(), times, count, args)["latents"]
    other = generate(pipe, "other noise", Method(), times, count, args, noise=100)["latents"]
    for family, settings in screened().items():
        for name, method in settings.items():
            window = getattr(method.how, "time_window", None)
            if args.settings and name not in args.settings:
                continue
            if family != "peers" and window is not None and window >= times * NATIVE:
                continue  # not in force
            errors = layers.errors(method)
            worst = max(errors, key=lambda layer: errors[layer])
            row = {"model": args.label, "family": family, "setting": name, "times": times, "clips": count}
            row |= {"cost": layers.cost(method), "attention": float(np.mean(list(errors.values())))}
            row |= {"worst": errors[worst], "worst_layer": worst}
            row["layers"] = {layer: round(error, 4) for layer, error in errors.items()}
            if not args.attention_only:
                apart = distances(generate(pipe, name, method, times, count, args)["latents"], dense, other)
                row |= {"latents": float(apart.mean()), "latents_se": float(apart.std(ddof=1) / math.sqrt(count))}
            yield row


def show_screen(rows: list[dict[str, Any]]) -> str:
    """One length's table of the screen."""
    lines = [f"{rows[0]['times']}x: share of dense arithmetic, error of attention, distance of final latents"]
    for row in rows:
        line = f"{row['setting']:<30}{row['cost']:8.1%}{row['attention']:8.3f} (at most {row['worst']:.3f})"
        lines.append(line + (f"{row['latents']:9.3f} ± {row['latents_se']:.3f}" if "latents" in row else ""))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- files


def cells_of(row: dict[str, Any]) -> list[tuple[float, str]]:
    """(standard errors, metric) by which a row is better than dense, or, where negative, worse. None if it is dense."""
    if all(row[metric].get("diff_se", 0.0) == 0 for metric in METRICS):
        return []
    found = []
    for metric, more in METRICS.items():
        cell = row[metric]
        off = cell["diff"] / cell["diff_se"] if cell["diff_se"] else 0.0
        found.append((off if more else -off, metric))
    return found


def count_cells(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every model and method, how many cells are worse or better than dense by over two and three errors.

    By chance alone, 2.3 % are worse by over two and 0.1 % by over three.
    """
    counts: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        found = cells_of(row)
        if not found:
            continue
        key = row["model"], row["method"]
        names = ("cells", "worse_2", "worse_3", "better_2", "better_3")
        count = counts.setdefault(key, {"model": key[0], "method": key[1], "lengths": [], **dict.fromkeys(names, 0)})
        count["lengths"].append(row["times"])
        count["cells"] += len(found)
        for errors in (2, 3):
            count[f"worse_{errors}"] += sum(off < -errors for off, _ in found)
            count[f"better_{errors}"] += sum(off > errors for off, _ in found)
    return list(counts.values())


def show_counts(counts: list[dict[str, Any]]) -> str:
    """The table of `count_cells`."""
    lines = ["cells worse than dense by over 2 (3) standard errors, better by over 2 (3), of all"]
    for count in counts:
        worse, better = ("{} ({})".format(*(count[f"{way}_{n}"] for n in (2, 3))) for way in ("worse", "better"))
        lines.append(f"{count['model']:<20}{count['method']:<24}{worse:>9}{better:>9}{count['cells']:>6}")
    return "\n".join(lines)


def machine(device: str) -> str:
    """What ran this."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model} ({torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores)"


def record(kind: str, rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Add rows to "rows" or "screen" of the JSON, in place of older ones, and write report and pictures anew."""
    file = args.output.with_suffix(".json")
    kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    measured = (
        f"{machine(args.device)}, torch {torch.__version__}, diffusers {diffusers.__version__}, transformers "
        f"{transformers.__version__}, litefocus {litefocus.__version__}, {args.steps} steps, guidance {args.guidance}, "
        f"seed {args.seed}, UNet in {args.dtype}, {RESAMPLES} resamples, {date.today()}"
    )

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["model"], row.get("method", row.get("setting")), row["times"]

    new = {key(row) for row in rows}
    tables = {name: kept.get(name, []) for name in ("rows", "screen")}
    tables[kind] = [row for row in tables[kind] if key(row) not in new] + [
        {**row, "measured": measured} for row in rows
    ]
    record = {"counts": count_cells(tables["rows"]), **tables}
    file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    args.output.with_name("EVALUATION.md").write_text(report(record, args.output.name))
    for name, draw, table in (("", plot_forest, "rows"), ("_cost", plot_cost, "screen")):
        shown = [row for row in tables[table] if row["model"] == tables[table][0]["model"]]
        if shown:  # of the first model
            draw(shown, args.output.with_name(f"{args.output.name}{name}.png"))


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A table, line by line."""
    header = list(header)
    return ["", *("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)), ""]


def cell_text(cell: dict[str, float]) -> str:
    """A value with its difference to dense: in italics beyond two standard errors, in bold beyond three."""
    if "diff" not in cell:
        return f"{cell['value']:.3f} ± {cell['se']:.3f}"
    difference = f"{cell['diff']:+.3f} ± {cell['diff_se']:.3f}"
    errors = abs(cell["diff"]) / cell["diff_se"] if cell["diff_se"] else 0.0
    marks = "**" if errors > 3 else "*" if errors > 2 else ""
    return f"{cell['value']:.3f} ({marks}{difference}{marks})"


def by(rows: list[dict[str, Any]], *names: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Rows by the values of some of their fields, in order of appearance."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def report(record: dict[str, Any], name: str) -> str:
    """EVALUATION.md: all tables of the JSON `name`."""
    lines = [
        "# Evaluation",
        "",
        f"Written by `python examples/evaluate.py --samples DIR --output examples/{name}`; the figures are those of",
        f"`{name}.json`. How they are measured is in the docstring of `evaluate.py`, what the model is in",
        "`embedded/README.md`. More is better of class, tempo, inception and beat, less of frechet, kl and drift.",
        "",
        "## Sound",
        "",
        "Values, and differences to dense attention, paired by prompt and noise, with bootstrap standard errors: in",
        "*italics* beyond two of them, in **bold** beyond three. How many cells are beyond, of all lengths (by chance",
        "alone 2.3 % are worse by over two, and 0.1 % by over three):",
    ]
    lines += markdown(
        ("model", "method", "lengths", "cells", "worse by over 2", "over 3", "better by over 2", "over 3"),
        (
            [
                count["model"],
                count["method"],
                ", ".join(f"{times}x" for times in sorted(count["lengths"])),
                *(str(count[key]) for key in ("cells", "worse_2", "worse_3", "better_2", "better_3")),
            ]
            for count in record["counts"]
        ),
    )
    order = [*METHODS, "real"]
    for (model, times), rows in sorted(by(record["rows"], "model", "times").items()):
        lines += [f"### {model}, {times * CLIP_SECONDS:g} s ({times}x), {rows[0]['clips']} clips"]
        rows = sorted(rows, key=lambda row: order.index(row["method"]) if row["method"] in order else len(order))
        lines += markdown(
            ("method", *METRICS),
            (
                [row["method"], *(cell_text(row[metric]) for metric in METRICS)]
                for row in rows
                if row["method"] != "real"
            ),
        )
        lines += [f"{measured}.\n" for measured in dict.fromkeys(row["measured"] for row in rows)]
    lines += [f"![differences to dense by method and metric]({name}.png)", ""]
    if record["screen"]:
        lines += [
            "## Screen",
            "",
            "No judge: `cost`, the share of dense self-attention's arithmetic; `attention`, the relative error of a",
            "layer's attention output against dense on the same input, on average over all layers and, in brackets,",
            "in the worst; `latents`, the distance of final latents to those of dense attention from the same noise,",
            "where dense attention from other noise has 1.",
            "",
        ]
    for (model,), rows in by(record["screen"], "model").items():
        lengths = sorted({row["times"] for row in rows})
        clips = {row["times"]: row["clips"] for row in rows}
        lines += [f"### {model}: " + ", ".join(f"{n}x ({clips[n]} clips)" for n in lengths)]
        header = [f"{n}x {what}" for n in lengths for what in ("cost", "attention", "latents")]
        table = []
        for (setting,), found in by(rows, "setting").items():
            cells = {row["times"]: row for row in found}
            line = [setting]
            for n in lengths:
                row = cells.get(n)
                line += (
                    ["", "", ""]
                    if row is None
                    else [f"{row['cost']:.1%}", f"{row['attention']:.3f} ({row['worst']:.3f})"]
                )
                if row is not None:
                    line.append(f"{row['latents']:.3f} ± {row['latents_se']:.3f}" if "latents" in row else "")
            table.append(line)
        lines += markdown(("setting", *header), table)
        lines += [f"{measured}.\n" for measured in dict.fromkeys(row["measured"] for row in rows)]
    if record["screen"]:
        lines += [f"![error of attention against cost]({name}_cost.png)", ""]
    return "\n".join(lines)


def plot_forest(rows: list[dict[str, Any]], path: Path) -> None:
    """Differences to dense, method by metric, a panel for every length."""
    lengths = sorted({row["times"] for row in rows})
    names = [name for name in METHODS if name not in ("dense", "self only") and any(r["method"] == name for r in rows)]
    look, limit = styles(names), 3.5
    columns = min(len(lengths), 3)  # two rows of three, at the six lengths there are
    figure, every = panels(columns, -(-len(lengths) // columns), width=4.2, height=9.0)
    for axes, times in zip(every, lengths, strict=False):
        cells = {row["method"]: row for row in rows if row["times"] == times}
        for place, (metric, more) in enumerate(METRICS.items()):
            for i, name in enumerate(names):
                if name not in cells or not cells[name][metric].get("diff_se"):
                    continue
                cell = cells[name][metric]
                # every clip of dense attention may be right, which leaves no error of its own
                unit = (cells["dense"][metric]["se"] or cell["diff_se"]) * (1 if more else -1)
                x, error = cell["diff"] / unit, cell["diff_se"] / abs(unit)
                y = place + 0.8 * ((i + 0.5) / len(names) - 0.5)
                colour, marker = look[name]
                if abs(x) > limit:  # outside of the panel, with its value
                    edge = math.copysign(limit, x)
                    axes.plot(edge, y, color=colour, marker="<" if x < 0 else ">", clip_on=False)
                    axes.annotate(f"{x:.0f} ", (edge, y), va="center", ha="left" if x < 0 else "right", fontsize=8)
                else:
                    axes.errorbar(x, y, xerr=error, color=colour, marker=marker, markersize=6, capsize=0)
            if place:
                axes.axhline(place - 0.5, color="0.8", linewidth=0.8)
        axes.axvline(0, color="black", linewidth=1)
        axes.set(xlim=(-limit, limit), ylim=(len(METRICS) - 0.5, -0.5))
        axes.set_title(f"{times * CLIP_SECONDS:g} s ({times}x), {next(iter(cells.values()))['clips']} clips")
        axes.set_yticks(range(len(METRICS)), list(METRICS) if axes.get_subplotspec().is_first_col() else [])
        axes.tick_params(axis="y", length=0, labelsize=12)
        axes.grid(visible=False, axis="y")
    for axes in every[len(lengths) :]:
        axes.set_visible(False)
    marks = [Line2D([], [], color=look[name][0], marker=look[name][1], markersize=8, label=name) for name in names]
    figure.legend(handles=marks, loc="outside upper center", ncols=2 * columns, fontsize=12, frameon=False)
    figure.supxlabel("worse  ←  difference to dense  →  better\n(in standard errors of dense's own value)", fontsize=12)
    save(figure, path)


FAMILIES = {  # colour and marker of the screen's families
    "ratio and floor": (BLUE, "s"),
    "window": (ORANGE, "o"),
    "shared sample": (SKY, "v"),
    "paper": (VERMILLION, "^"),
    "time tiles": (GREEN, "D"),
    "token merging": (PURPLE, "P"),
}


def plot_cost(rows: list[dict[str, Any]], path: Path) -> None:
    """The screen: how far from dense, against cost, with the Pareto front, a panel for every length.

    By final latents where they were generated, else by the attention output.
    """
    lengths = sorted({row["times"] for row in rows})
    figure, every = panels(len(lengths), width=5.6, height=5.4)
    for axes, times in zip(every, lengths, strict=True):
        every_row = [row for row in rows if row["times"] == times]
        measure = "latents" if all("latents" in row for row in every_row) else "attention"
        shown = [row for row in every_row if row[measure] > 0]
        points: dict[str, tuple[float, float]] = {}
        colours: dict[str, str] = {}
        drawn = []
        for row in shown:
            name = row["setting"] if row["family"] == "peers" else row["family"]
            if name not in FAMILIES:
                continue
            colour, marker = FAMILIES[name]
            point = row["cost"], row[measure]
            drawn.append(point)
            axes.plot(*point, color=colour, marker=marker, markersize=7, linestyle="none")
            label = LABELLED.get(row["setting"])
            if label == "no window" and not any(row["setting"] == DEFAULT_WINDOW for row in shown):
                label = "litefocus"
            if label:
                points[label], colours[label] = point, colour
        front = sorted(
            point for point in drawn if not any(p != point and p[0] <= point[0] and p[1] <= point[1] for p in drawn)
        )
        axes.plot(*zip(*front, strict=True), color="0.6", linewidth=1.2, zorder=0)
        log_axis(axes, "x", (0.05, 0.1, 0.2, 0.4, 0.7, 1.0))
        log_axis(axes, "y", (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0))
        axes.set(xlim=(0.05, 1.05), xlabel="share of dense self-attention's arithmetic")
        axes.set_title(f"{times * CLIP_SECONDS:g} s ({times}x)")
        axes.set_ylabel(
            "distance of final latents to dense\n(1: dense from other noise)"
            if measure == "latents"
            else "relative error of the attention output"
        )
        label_points(axes, points, colours, others=drawn)
    marks = [Line2D([], [], color=c, marker=m, linestyle="none", label=name) for name, (c, m) in FAMILIES.items()]
    marks.append(Line2D([], [], color="0.6", label="Pareto front"))
    figure.legend(handles=marks, loc="outside upper center", ncols=3 * len(lengths), frameon=False)
    save(figure, path)


DEFAULT_WINDOW = f"window {(DEFAULT.time_window or 0) // NATIVE}x, {DEFAULT.far_sampled} far"
LABELLED = {  # points with a name, of the screen's settings
    DEFAULT_WINDOW: "litefocus",
    "r = 0.1, floor 32": "no window",  # but on clips that are shorter than the default's
    "window 1x, 0 far": "window 1x, none far",
    "shared, r = 0.1": "shared",
    "paper": "paper",
    "time tiles": "time tiles",
    "token merging": "token merging",
}

PICTURED = "drone"  # a tone that lasts, so that a mel axis shows it


def plot_spectrograms(mels: dict[str, Tensor], times: int, path: Path, args: argparse.Namespace) -> None:
    """One clip on a mel axis: dense, LiteFocus, and how far it and the paper's method are from dense."""
    labels = labels_of(len(mels["dense"]))
    clip = next(i for i, (sound, _) in enumerate(labels) if sound == PICTURED)
    dense = mels["dense"][clip]
    shown = {name: mels[name][clip] for name in ("dense", "litefocus")}
    shown |= {f"{name} - dense": mels[name][clip] - dense for name in ("litefocus", "paper") if name in mels}
    figure, every = panels(1, len(shown), width=11, height=2.4)
    for axes, (title, values) in zip(every, shown.items(), strict=True):
        difference = title not in mels
        scale = {"cmap": "PuOr", "vmin": -3, "vmax": 3} if difference else {"cmap": "cividis", "vmin": -11, "vmax": 1}
        extent = (0, times * CLIP_SECONDS, 0, values.shape[1])
        picture = axes.imshow(values.T.numpy(), origin="lower", aspect="auto", extent=extent, **scale)
        figure.colorbar(picture, ax=axes, label="nats")
        axes.set(title=title, ylabel="mel bin")
        axes.grid(visible=False)
    every[-1].set_xlabel("time (s)")
    figure.suptitle(f"“{texts_of(args.seed)[labels[clip]].strip()}”, {args.steps} steps")
    save(figure, path)


def write_wavs(pipe: AudioLDM2Pipeline, mels: dict[str, Tensor], args: argparse.Namespace) -> None:
    """The first 12 clips of every method through the vocoder, into --work."""
    for name, of in mels.items():
        folder = Path(args.work) / "wavs" / name
        folder.mkdir(parents=True, exist_ok=True)
        for i, (sound, tempo) in enumerate(labels_of(12)):
            with torch.inference_mode():
                wave = pipe.vocoder(of[i].to(pipe.vocoder.device)).float().cpu().numpy()
            soundfile.write(folder / f"{i:02} {tempo} {sound}.wav", wave, 16000)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", required=True, help="folder with the flac files of sonic-pi-samples")
    parser.add_argument(
        "--unet", default=str(HERE / "embedded" / "unet_attentive"), help="its folder (default: %(default)s)"
    )
    parser.add_argument("--label", default="seed 1", help="its name in the JSON (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        choices=CLIPS,
        help="multiples of 5.12 s (default: 1 2 4 8; of the screen 1 4 8)",
    )
    parser.add_argument("--clips", type=int, help=f"clips at every length (default, by length: {CLIPS})")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument("--dtype", default="float32", help="of the UNet (default: %(default)s)")
    parser.add_argument("--work", default="evaluation", help="where generated mels are kept (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, help="write NAME.json, where other rows stay, its pictures, and EVALUATION.md"
    )
    parser.add_argument("--screen", action="store_true", help="cheap measures for many settings, at 1x, 4x and 8x")
    parser.add_argument("--settings", nargs="+", metavar="SETTING", help="of the screen, these alone")
    parser.add_argument("--attention-only", action="store_true", help="of the screen, the error of attention alone")
    parser.add_argument("--wavs", action="store_true", help="12 clips of every method as wavs, at the last length")
    parser.add_argument("--quick", action="store_true", help="12 clips, 4 steps, three methods, native length")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    if args.quick:
        args.methods, args.lengths = ["dense", "litefocus", "self only"], [1]
        args.clips, args.steps = args.clips or 12, min(args.steps, 4)
    if args.lengths is None:
        args.lengths = list(SCREEN_CLIPS) if args.screen else [1, 2, 4, 8]
    if args.screen and not set(args.lengths) <= SCREEN_CLIPS.keys():
        parser.error(f"--screen takes lengths of {list(SCREEN_CLIPS)}, got {args.lengths}")
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
    if args.screen:
        for times in args.lengths:
            rows = list(screen(pipe, times, args))
            print(show_screen(rows), flush=True)
            if args.output:
                record("screen", rows, args)
        return
    count = 72 if args.quick else REFERENCE
    reference = Reference(listen(real(pipe, count, 1, 880_001, args)), labels_of(count))
    every = []
    for times in args.lengths:
        clips = args.clips or CLIPS[times]
        labels = labels_of(clips)
        mels = {name: generate(pipe, name, METHODS[name], times, clips, args)["mels"].float() for name in args.methods}
        heard = {name: listen(of) for name, of in mels.items()}
        heard["real"] = listen(real(pipe, clips, times, 880_002, args))
        table = compare({name: measures(of, labels, reference) for name, of in heard.items()}, clips)
        print(show(table, times, clips), flush=True)
        rows = [
            {"model": args.label, "method": name, "times": times, "clips": clips, **cells}
            for name, cells in table.items()
        ]
        every += rows
        if args.output:
            record("rows", rows, args)
            if {"dense", "litefocus"} <= mels.keys() and times == max(
                n for n in args.lengths if n <= max(4, args.lengths[0])
            ):
                plot_spectrograms(mels, times, args.output.with_name(f"{args.output.name}_spectrograms.png"), args)
        if args.wavs and times == args.lengths[-1]:
            write_wavs(pipe, mels, args)
    print(show_counts(count_cells(every)))


if __name__ == "__main__":
    main()
