"""Does it sound as good? Dense attention, LiteFocus and its peers on a small trained model, judged by numbers.

    python examples/evidence/quality.py --samples DIR           # every method at 1x, 2x, 4x and 8x the native length
    python examples/evidence/quality.py --samples DIR --screen  # many settings, by two measures that need no judge
    python examples/evidence/quality.py --samples DIR --quick   # a few clips, to see it work
    python examples/evidence/quality.py --samples DIR --methods dense litefocus "self only" --lengths 1

DIR holds the flac files of Debian's sonic-pi-samples, for real scenes to compare with. Every method gets the same
prompts and the same noise, class and tempo balanced alike at every length. What is generated lies in --work, so a run
goes on where it stopped. A file there is named by what the UNet computes for a fixed input with the method in
place: a method that changes nothing at some length shares the file of dense attention, and no stale file can be taken
for another. Judge and embedder hear decoded mel spectrograms; the vocoder, the same for all, is left out.

Of every 5.12 s window: `class` and `tempo` right; `kl` of the judge's class posterior from that of real windows of the
class; `inception`, the judge's inception score; `frechet`, the squared Fréchet distance of embeddings to those of 720
real windows. Of every clip: `beat`, the highest autocorrelation of its onset envelope at lags of 0.2 to 2 s; `drift`,
the mean squared distance between embeddings of its 2.56 s windows, where windows of unrelated real clips have 1; and
its level in dB, whole (`loudness`) and of its quietest and loudest second.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from report import EXAMPLES, Row, by, interruptible, measured, merged, read, table, write

METHODS = (
    "dense",
    "litefocus",
    "litefocus, one sample",
    "litefocus, window 2x",
    "shared sample",
    "paper",
    "time tiles",
    "token merging",
    "self only",
)
CACHED = ("DeepCache 2", "litefocus + DeepCache 2", "DeepCache 3", "litefocus + DeepCache 3")
CLIPS = {1: 288, 2: 144, 4: 72, 8: 48, 16: 24, 32: 12}  # by length: 288 windows, 384 from 8x on
SCREEN_CLIPS = {1: 12, 4: 8, 8: 4}
POOLED_FROM = 4  # times the native length


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--samples", type=Path, required=True, help="folder with the flac files of sonic-pi-samples")
    add("--unet", type=Path, default=EXAMPLES / "embedded" / "unet_attentive", help="its folder (default: %(default)s)")
    add("--label", default="seed 1", help="its name in the JSON (default: %(default)s)")
    methods = (*METHODS, *CACHED)
    add("--methods", nargs="+", choices=methods, default=METHODS, metavar="METHOD", help=", ".join(methods))
    lengths = "multiples of 5.12 s (default: 1 2 4 8; of the screen 1 4 8)"
    add("--lengths", nargs="+", type=int, choices=CLIPS, help=lengths)
    add("--clips", type=int, help=f"clips at every length (default, by length: {CLIPS})")
    add("--steps", type=int, default=10)
    add("--guidance", type=float, default=5.0)
    add("--seed", type=int, default=1)
    add("--work", type=Path, default="evaluation", help="where generated mels are kept (default: %(default)s)")
    add("--output", type=Path, help="write NAME.json, where other rows stay, NAME.md, and its pictures")
    add("--screen", action="store_true", help="cheap measures for many settings, at 1x, 4x and 8x")
    add("--settings", nargs="+", metavar="SETTING", help="of the screen, these alone")
    add("--attention-only", action="store_true", help="of the screen, the error of attention alone")
    add("--quick", action="store_true", help="12 clips, 4 steps, three methods, native length")
    add("--threads", type=int, default=1)
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


if __name__ == "__main__":
    parse()  # `--help` and mistakes are answered before the imports below, which take seconds

with interruptible():
    import _cli
    import numpy as np
    import numpy.typing as npt
    import torch
    from data import CLASS_NAMES, TEMPO_NAMES, Bank, prompts, scene
    from diffusers import AudioLDM2Pipeline, AudioLDM2UNet2DConditionModel
    from judge import load_embedder, load_judge
    from matplotlib.lines import Line2D
    from mel import CLIP_SECONDS, LogMel
    from methods import Merged, Peer, SelfOnly, Tiles, running
    from plots import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION, label_points, log_axis, panels, save, styles
    from torch import Tensor
    from tqdm import tqdm

    import litefocus
    from litefocus import LiteFocusConfig
    from litefocus._probe import NATIVE_FRAMES

Array = npt.NDArray[np.float64]
CLIP_FRAMES = 512  # mel frames of a window
NATIVE = 128  # latent frames of the native length
REFERENCE = 720  # real windows
TIMESTEPS = (500, 901)


# ----------------------------------------------------------------------------------------------------- methods


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to run self-attention.

    how: LiteFocus with these settings, a peer, or None for dense attention.
    samples: with LiteFocus, how many a layer has, of which every step takes one; None leaves it to the library.
    interval: DeepCache computes the deep layers at one of so many steps.
    """

    how: LiteFocusConfig | type[Peer] | None = None
    samples: int | None = None
    interval: int = 1

    def on(self, pipe: AudioLDM2Pipeline) -> AbstractContextManager[None]:
        """The pipeline with the method in place but for DeepCache, in a `with` block."""
        return running(pipe, self.how, NATIVE, self.samples)

    @contextlib.contextmanager
    def cached(self, pipe: AudioLDM2Pipeline) -> Iterator[None]:
        """The pipeline with DeepCache, which takes no timestep but those of a pipeline's call, in a `with` block."""
        if self.interval == 1:
            yield
            return
        helper = _cli.cache_steps(pipe, self.interval)
        try:
            yield
        finally:
            helper.disable()


# The default in proportion: the trained models' native length is shorter than that of published ones.
PUBLISHED = LiteFocusConfig()
DEFAULT = dataclasses.replace(PUBLISHED, time_window=(PUBLISHED.time_window or 0) * NATIVE // NATIVE_FRAMES)
WAYS: dict[str, Method] = {
    "dense": Method(),
    "litefocus": Method(DEFAULT),
    "litefocus, one sample": Method(DEFAULT, samples=1),
    "litefocus, window 2x": Method(PUBLISHED),
    "shared sample": Method(LiteFocusConfig(same_frequency=False, time_window=None, sparse_ratio=0.1)),
    "paper": Method(LiteFocusConfig.paper()),
    "time tiles": Method(Tiles),
    "token merging": Method(Merged),
    "self only": Method(SelfOnly),
    "DeepCache 2": Method(interval=2),
    "litefocus + DeepCache 2": Method(DEFAULT, interval=2),
    "DeepCache 3": Method(interval=3),
    "litefocus + DeepCache 3": Method(DEFAULT, interval=3),
}


# -------------------------------------------------------------------------------------------------- generation


def labels_of(count: int) -> list[tuple[str, str]]:
    """`count` pairs of class and tempo: classes alike, and tempi alike, for every multiple of 12 divisible by 3."""
    return [(CLASS_NAMES[i % 12], TEMPO_NAMES[(i + i // 12) % 3]) for i in range(count)]


def load(args: argparse.Namespace) -> AudioLDM2Pipeline:
    """The embedded pipeline, with the UNet to judge."""
    pipe = AudioLDM2Pipeline.from_pretrained(EXAMPLES / "embedded" / "pipeline")
    pipe.register_modules(unet=AudioLDM2UNet2DConditionModel.from_pretrained(args.unet).eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def digest(*tensors: Tensor) -> str:
    """Of these numbers, to the bit."""
    every = hashlib.sha256()
    for tensor in tensors:
        every.update(tensor.detach().float().contiguous().numpy().tobytes())
    return every.hexdigest()


def call(pipe: AudioLDM2Pipeline, times: int, timestep: int) -> Tensor:
    """What the UNet computes for a fixed input of this length."""
    draw = torch.Generator().manual_seed(0)
    latent, gpt, t5 = (torch.randn(2, *of, generator=draw) for of in ((8, times * NATIVE, 16), (8, 32), (6, 64)))
    with torch.inference_mode():
        return pipe.unet(latent, timestep, gpt, encoder_hidden_states_1=t5, return_dict=False)[0]


def fingerprint(pipe: AudioLDM2Pipeline, times: int) -> str:
    """Of what the UNet computes at this length, at two timesteps that take different samples."""
    return digest(*(call(pipe, times, timestep) for timestep in TIMESTEPS))


def kept_file(args: argparse.Namespace, *key: Any) -> Path:
    """Where --work keeps what was made from `key`."""
    return args.work / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.pt"


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
        key = (does, decodes, times, count, args.steps, args.guidance, args.seed)
        others = [noise] * bool(noise) + [f"DeepCache {method.interval}"] * (method.interval > 1)
        file = kept_file(args, *key, *others)
        if file.exists():
            return torch.load(file, weights_only=True)
        batch = max(1, 24 // times)
        mels, latents = [], []
        for start in tqdm(range(0, count, batch), desc=f"{name}, {times}x", mininterval=10):
            rows = range(start, min(start + batch, count))
            with method.cached(pipe):
                made = pipe(
                    [texts[labels[i]] for i in rows],
                    audio_length_in_s=times * CLIP_SECONDS,
                    num_inference_steps=args.steps,
                    guidance_scale=args.guidance,
                    generator=[torch.Generator().manual_seed(1000 * (args.seed + noise) + i) for i in rows],
                    output_type="latent",
                ).audios
            latents.append(made.half())
            with torch.inference_mode():
                for latent in made:
                    decoded = pipe.vae.decode(latent[None] / pipe.vae.config.scaling_factor).sample
                    mels.append(decoded[0, 0].half())
    return keep({"mels": torch.stack(mels), "latents": torch.cat(latents)}, file)


def real(pipe: AudioLDM2Pipeline, count: int, times: int, seed: int, args: argparse.Namespace) -> Tensor:
    """Mel spectrograms of real scenes, through the VAE as the generated ones are; kept in --work too."""
    file = kept_file(args, "real", digest(*pipe.vae.parameters()), count, times, seed)
    if file.exists():
        return torch.load(file, weights_only=True)["mels"].float()
    bank, mel, parts, labels = Bank(args.samples), LogMel(), [], labels_of(count)
    for i in tqdm(range(count), desc=f"real scenes, {times}x", mininterval=10):
        wave = scene(bank, *labels[i], np.random.default_rng([seed, i]), times * CLIP_SECONDS)
        with torch.inference_mode():
            code = pipe.vae.encode(mel(torch.from_numpy(wave)[None])).latent_dist.mean
            parts.append(pipe.vae.decode(code).sample[0, 0].half())
    return keep({"mels": torch.stack(parts)}, file)["mels"].float()


# --------------------------------------------------------------------------------------------------- listening


@dataclasses.dataclass(frozen=True)
class Heard:
    """What the judge and the embedder make of clips.

    classes (clips, windows, 12), tempi (clips, windows, 3): probabilities. embeddings (clips, windows, 48), halves
    (clips, 2 * windows, 48): of whole and half windows. beat: (clips,). levels: (clips, 3), in dB, by LEVELS.
    """

    classes: Array
    tempi: Array
    embeddings: Array
    halves: Array
    beat: Array
    levels: Array


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
        energy = (2 * mels.double()).exp().sum(dim=2)  # of frames of 10 ms, up to a factor: mels are logs of amplitudes
        seconds = energy[:, : frames // 100 * 100].unflatten(1, (-1, 100)).mean(dim=2)
        levels = 10 * torch.stack([energy.mean(dim=1), seconds.amin(dim=1), seconds.amax(dim=1)], dim=1).log10()
    return Heard(classes, tempi, embeddings, halves, beat, levels.numpy())


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
LEVELS = ("loudness", "quietest", "loudest")  # neither more nor less is better, so no cell of them is counted
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
        **dict(zip(LEVELS, heard.levels.T, strict=True)),
    }
    negative_entropy = (heard.classes * logs).sum(axis=2).mean(axis=1)

    def of(clips: Any) -> dict[str, float]:
        found = {name: float(values[clips].mean()) for name, values in by_clip.items()}
        found["frechet"] = reference.frechet(heard.embeddings[clips].reshape(-1, heard.embeddings.shape[-1]))
        mean = heard.classes[clips].mean(axis=(0, 1)).clip(min=1e-6)
        found["inception"] = math.exp(negative_entropy[clips].mean() - (mean * np.log(mean)).sum())
        return {name: found[name] for name in (*METRICS, *LEVELS)}

    return of


def compare(methods: dict[str, Callable[[Any], dict[str, float]]], count: int) -> dict[str, Row]:
    """{method: {metric: value, its standard error, difference to dense, its standard error}}, by bootstrap over clips.

    The same clips are drawn for all methods, which share prompts and noise: differences are paired.
    """
    rng = np.random.default_rng(0)
    draws = [rng.integers(count, size=count) for _ in range(RESAMPLES)]
    resampled = {name: [of(draw) for draw in draws] for name, of in methods.items()}
    everything = np.arange(count)
    values = {name: of(everything) for name, of in methods.items()}
    cells: dict[str, Row] = {name: {} for name in methods}
    for name, metric in itertools.product(methods, (*METRICS, *LEVELS)):
        drawn = np.array([of[metric] for of in resampled[name]])
        cells[name][metric] = {"value": values[name][metric], "se": float(drawn.std(ddof=1))}
        if "dense" in methods and name != "real":
            base = np.array([of[metric] for of in resampled["dense"]])
            cells[name][metric]["diff"] = values[name][metric] - values["dense"][metric]
            cells[name][metric]["diff_se"] = float((drawn - base).std(ddof=1))
    return cells


# ------------------------------------------------------------------------------------------------------ screen

WHOLE = {"time_window": None}  # the whole clip in view, as with the default up to half a minute


def screened() -> dict[str, dict[str, Method]]:
    """{family: {setting: method}}: what is cheap to try."""

    def focus(samples: int | None = None, **settings: Any) -> Method:
        return Method(LiteFocusConfig(**settings), samples)

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
        "near and far": {
            f"window 1x, {near} near, {far} far": focus(time_window=NATIVE, min_sampled=near, far_sampled=far)
            for near in (12, 16, 24)
            for far in (8, 16, 24)
        },
        "rotation": {
            f"{name}, {samples} sample{'s' if samples > 1 else ''}": focus(samples, **settings)
            for name, settings in {
                "r = 0.1, floor 32": {**WHOLE, "sparse_ratio": 0.1, "min_sampled": 32},
                "r = 0.025, floor 16": {**WHOLE, "sparse_ratio": 0.025, "min_sampled": 16},
                "window 1x, 16 far": {"time_window": NATIVE},
                "shared, r = 0.1": {**WHOLE, "same_frequency": False, "sparse_ratio": 0.1},
            }.items()
            for samples in (1, 4, 8)
        },
        "shared sample": {
            f"shared, r = {ratio:g}": focus(**WHOLE, same_frequency=False, sparse_ratio=ratio)
            for ratio in (0.05, 0.1, 0.2)
        },
        "peers": {name: WAYS[name] for name in ("paper", "time tiles", "token merging", "self only")},
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

    def __init__(self, pipe: AudioLDM2Pipeline, times: int, inputs: dict[str, Tensor]) -> None:
        self.pipe, self.times, self.inputs = pipe, times, inputs
        self.dense = self.outputs()

    def outputs(self) -> dict[str, Tensor]:
        """What the attention of every layer returns for its input, without the projection that follows.

        Inside of a call of the UNet, from which a patched layer knows its grid.
        """
        found: dict[str, Tensor] = {}

        def attend(name: str, layer: Any, *_: Any) -> None:
            projection, layer.to_out[0] = layer.to_out[0], torch.nn.Identity()
            found[name] = layer.forward(self.inputs[name])
            layer.to_out[0] = projection

        layers = [(name, self.pipe.unet.get_submodule(name)) for name in self.inputs]
        hooks = [layer.register_forward_pre_hook(functools.partial(attend, name)) for name, layer in layers]
        call(self.pipe, self.times, TIMESTEPS[0])
        for hook in hooks:
            hook.remove()
        return found

    def errors(self, method: Method) -> dict[str, float]:
        """|method - dense| / |dense| of every layer's attention output, on the same input."""
        with method.on(self.pipe):
            outputs = self.outputs()
        return {name: float((outputs[name] - dense).norm() / dense.norm()) for name, dense in self.dense.items()}

    def cost(self, method: Method) -> float:
        """The share of dense self-attention's arithmetic that is left."""
        dense = kept = 0.0
        with method.on(self.pipe):
            for row in litefocus.status(self.pipe, seconds=self.times * CLIP_SECONDS).layers:
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


def screen(pipe: AudioLDM2Pipeline, times: int, args: argparse.Namespace) -> Iterator[Row]:
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


# ------------------------------------------------------------------------------------------------------- files


def cells_of(row: dict[str, Any]) -> list[tuple[float, str]]:
    """(standard errors, metric) by which a row is better than dense, or, where negative, worse. Empty for dense."""
    if all(row[metric].get("diff_se", 0.0) == 0 for metric in METRICS):
        return []
    found = []
    for metric, more in METRICS.items():
        cell = row[metric]
        off = cell["diff"] / cell["diff_se"] if cell["diff_se"] else 0.0
        found.append((off if more else -off, metric))
    return found


def count_cells(rows: list[Row]) -> list[Row]:
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


def of_usual_steps(row: Row) -> bool:
    """Whether a row or a count is of the default number of steps: others say theirs in --label."""
    return " steps" not in row["model"]


def pooled(rows: list[Row]) -> list[Row]:
    """Of every method, the mean difference to dense over its rows from 4x on, weighted by inverse variance.

    It shows small effects that no single cell shows. Rows of more steps than the default are left out.
    """
    found = []
    for (method,), of in by(rows, "method").items():
        of = [row for row in of if row["times"] >= POOLED_FROM and of_usual_steps(row) and cells_of(row)]
        pool: dict[str, Any] = {"method": method, "rows": len(of)}
        for metric in (*METRICS, *LEVELS):
            cells = [row[metric] for row in of if metric in row and row[metric]["diff_se"]]
            weight = sum(cell["diff_se"] ** -2 for cell in cells)
            if weight:
                mean = sum(cell["diff"] * cell["diff_se"] ** -2 for cell in cells) / weight
                pool[metric] = {"diff": mean, "diff_se": weight**-0.5}
        if len(of) > 1:
            found.append(pool)
    return found


def add(kind: str, rows: list[Row], args: argparse.Namespace) -> None:
    """Add rows to "rows" or "screen" of the JSON, in place of older ones, and write page and pictures anew."""
    where = measured("cpu", f"{args.steps} steps, guidance {args.guidance}, seed {args.seed}, {RESAMPLES} resamples")
    file = args.output.with_suffix(".json")
    tables = read(file, "rows", "screen")
    names = "model", "method" if kind == "rows" else "setting", "times"
    tables[kind] = merged(tables[kind], [{**row, "measured": where} for row in rows], *names)
    record = {"counts": count_cells(tables["rows"]), **tables}
    write(file, record)
    file.with_suffix(".md").write_text(page(record, args.output.name))
    for name, draw, shown in (("", plot_forest, tables["rows"]), ("_cost", plot_cost, tables["screen"])):
        if shown:  # of the first model
            of = [row for row in shown if row["model"] == shown[0]["model"]]
            draw(of, args.output.with_name(f"{args.output.name}{name}.png"))


def cell_text(cell: dict[str, float]) -> str:
    """A value with its difference to dense."""
    if "diff" not in cell:
        return f"{cell['value']:.3f} ± {cell['se']:.3f}"
    return f"{cell['value']:.3f} ({difference_text(cell)})"


def difference_text(cell: dict[str, float], digits: int = 3) -> str:
    """In italics beyond two standard errors, in bold beyond three."""
    errors = abs(cell["diff"]) / cell["diff_se"] if cell["diff_se"] else 0.0
    marks = "**" if errors > 3 else "*" if errors > 2 else ""
    return f"{marks}{cell['diff']:+.{digits}f} ± {cell['diff_se']:.{digits}f}{marks}"


def counts_table(counts: list[Row]) -> str:
    """How many cells are beyond two and three standard errors."""
    header = ("model", "method", "lengths", "cells", "worse by over 2", "over 3", "better by over 2", "over 3")
    numbers = ("cells", "worse_2", "worse_3", "better_2", "better_3")
    rows = []
    for count in counts:
        lengths = ", ".join(f"{times}x" for times in sorted(count["lengths"]))
        rows.append([count["model"], count["method"], lengths, *(str(count[name]) for name in numbers)])
    return table(header, rows)


def pooled_table(rows: list[Row]) -> str:
    """Small effects."""
    names = (*METRICS, *LEVELS)
    cells = [
        [row["method"], str(row["rows"]), *(difference_text(row[name], 4) if name in row else "-" for name in names)]
        for row in pooled(rows)
    ]
    return table(("method", "rows", *names), cells)


def sound_table(rows: list[Row]) -> str:
    """The metrics of every method at one length."""
    order = {method: place for place, method in enumerate((*METHODS, *CACHED))}
    rows = sorted(rows, key=lambda row: order.get(row["method"], len(order)))
    names = [name for name in (*METRICS, *LEVELS) if any(name in row for row in rows)]
    cells = [[row["method"], *(cell_text(row[name]) if name in row else "-" for name in names)] for row in rows]
    return table(("method", *names), cells)


def screen_table(rows: list[Row]) -> str:
    """Cost and errors of every setting, of all lengths side by side."""
    lengths = sorted({row["times"] for row in rows})
    header = [f"{times}x {what}" for times in lengths for what in ("cost", "attention", "latents")]
    lines = []
    for (setting,), found in by(rows, "setting").items():
        cells = {row["times"]: row for row in found}
        line = [setting]
        for times in lengths:
            row = cells.get(times)
            if row is None:
                line += ["", "", ""]
                continue
            line += [f"{row['cost']:.1%}", f"{row['attention']:.3f} ({row['worst']:.3f})"]
            line.append(f"{row['latents']:.3f} ± {row['latents_se']:.3f}" if "latents" in row else "")
        lines.append(line)
    return table(("setting", *header), lines)


def sources(rows: list[Row]) -> list[str]:
    """A line for every run that rows come from."""
    return [f"{measured}.\n" for measured in dict.fromkeys(row["measured"] for row in rows)]


def page(record: dict[str, list[Row]], name: str) -> str:
    """All tables of the JSON `name`, in Markdown."""
    lines = [
        "# Evaluation",
        "",
        f"Written by `python examples/evidence/quality.py --samples DIR --output examples/evidence/{name}`; the",
        f"figures are those of `{name}.json`. How they are measured is in the docstring of `quality.py`, what the",
        "model is in `../embedded/README.md`. More is better of class, tempo, inception and beat, less of frechet, kl",
        "and drift. `litefocus` is the default with a time window of the model's native length, as on published",
        "models; `litefocus, window 2x` is the default as it stands, whose window is twice as long here; `DeepCache N`",
        "computes the deep layers at one of N steps. `litefocus, independent samples` is the default before, with 24",
        "and 8 sampled frames for 16 and 16, where bins, blocks and steps drew theirs independently, as in the rows of",
        "`paper` up to 2026-11-28.",
        "`litefocus, before` is the default of 2026-11-27, with 4 times the window. Its samples, and those of",
        "`paper, one sample`, which are the same at every step, were not even stratified.",
        "",
        "## Sound",
        "",
        "Values, and differences to dense attention, paired by prompt and noise, with bootstrap standard errors: in",
        "*italics* beyond two of them, in **bold** beyond three. How many cells are beyond, of all lengths (by chance",
        "alone 2.3 % are worse by over two, and 0.1 % by over three):",
        "",
        counts_table(record["counts"]),
        f"Mean differences to dense of all rows of 10 steps from {POOLED_FROM}x on, weighted by inverse variance,",
        "which show small effects that no single row shows:",
        "",
        pooled_table(record["rows"]),
    ]
    for (model, times), rows in sorted(by(record["rows"], "model", "times").items()):
        lines += [f"### {model}, {times * CLIP_SECONDS:g} s ({times}x), {rows[0]['clips']} clips", ""]
        generated = [row for row in rows if row["method"] != "real"]
        lines += [sound_table(generated), *sources(generated)]
    lines += [f"![differences to dense by method and metric]({name}.png)", ""]
    if record["screen"]:
        lines += [
            "## Screen",
            "",
            "No judge: `cost`, the share of dense self-attention's arithmetic; `attention`, the relative error of a",
            "layer's attention output against dense on the same input, on average over all layers and, in brackets,",
            "in the worst; `latents`, the distance of final latents to those of dense attention from the same noise,",
            "where dense attention from other noise has 1. Samples of 2026-11-25 were drawn independently and not",
            "stratified yet.",
            "",
        ]
    for (model,), rows in by(record["screen"], "model").items():
        clips = {row["times"]: row["clips"] for row in rows}
        lines += [f"### {model}: " + ", ".join(f"{times}x ({clips[times]} clips)" for times in sorted(clips)), ""]
        lines += [screen_table(rows), *sources(rows)]
    if record["screen"]:
        lines += [f"![error of attention against cost]({name}_cost.png)", ""]
    return "\n".join(lines)


def plot_forest(rows: list[Row], path: Path) -> None:
    """Differences to dense, method by metric, a panel for every length."""
    lengths = sorted({row["times"] for row in rows})
    there = {row["method"] for row in rows}
    names = [name for name in (*METHODS, "litefocus, before") if name in there and name not in ("dense", "self only")]
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


MEASURES = {
    "latents": "distance of final latents to dense\n(1: dense from other noise)",
    "attention": "relative error of the attention output",
}


def plot_cost(rows: list[Row], path: Path) -> None:
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
        axes.set_ylabel(MEASURES[measure])
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


def main(argv: list[str] | None = None) -> None:
    """Generate what is missing, listen, print."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    args.work.mkdir(parents=True, exist_ok=True)
    pipe = load(args)
    if args.screen:
        for times in args.lengths:
            rows = list(screen(pipe, times, args))
            print(screen_table(rows), flush=True)
            if args.output:
                add("screen", rows, args)
        return
    count = 36 if args.quick else REFERENCE
    reference = Reference(listen(real(pipe, count, 1, 880_001, args)), labels_of(count))
    every: list[Row] = []
    for times in args.lengths:
        clips = args.clips or CLIPS[times]
        labels = labels_of(clips)
        mels = {name: generate(pipe, name, WAYS[name], times, clips, args)["mels"].float() for name in args.methods}
        heard = {name: listen(of) for name, of in mels.items()}
        heard["real"] = listen(real(pipe, clips, times, 880_002, args))
        cells = compare({name: measures(of, labels, reference) for name, of in heard.items()}, clips)
        about = {"times": times, "clips": clips}
        rows = [{"model": args.label, "method": name, **about, **of} for name, of in cells.items()]
        print(f"{times}x: {clips} clips, {clips * times} windows\n\n{sound_table(rows)}", flush=True)
        every += rows
        if args.output:
            add("rows", rows, args)
    print(counts_table(count_cells(every)))


if __name__ == "__main__":
    with interruptible():
        main()
