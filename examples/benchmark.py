"""Time and memory of LiteFocus beside dense attention, the published code's arithmetic, time tiles and token merging.

    python examples/benchmark.py                            # one self-attention call, AudioLDM 2, 80 s
    python examples/benchmark.py step --models audioldm2 --seconds 10 80
    python examples/benchmark.py step --quick               # under two minutes
    python examples/benchmark.py road --seconds 80          # the whole pipeline by stage

Models have their published widths and random weights: speed does not depend on the weights. A step is one call of the
UNet with classifier-free guidance (batch 2). Methods alternate within a round, since machines drift; seconds are CPU
seconds, ratios are of medians of one run. `step --output NAME` writes NAME.json, where rows of earlier runs stay, and
the plot NAME.png. The dense row of audioldm2-original is the authors' own attention, which materialises all scores.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import itertools
import json
import math
import platform
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import AudioLDM2UNet2DConditionModel, AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import (
    ClapTextConfig,
    ClapTextModelWithProjection,
    GPT2Config,
    GPT2LMHeadModel,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
)

import litefocus
from litefocus import LiteFocusAttnProcessor, LiteFocusConfig, focus_attention, focus_set
from litefocus.unet import get_processor, set_processor

WARM_ENOUGH = 10.0  # CPU seconds, after which warming up and counting memory (under 0.1 s) no longer matter
BATCH, HEADS, HEAD_DIM, FREQ_BINS = 2, 8, 32, 8  # AudioLDM 2 with classifier-free guidance, where most time goes
FRAMES_PER_SECOND = 12.8  # at that level, in the paper's count: 1024 frames at 80 s


@dataclass(frozen=True)
class Call:
    """One way to do the work, and how many times less arithmetic than dense it needs."""

    run: Callable[[], Tensor]
    flop_ratio: float


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors allocated inside in all (`total`), and how many live at once (`peak`)."""

    live = peak = total = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        outputs = func(*args, **(kwargs or {}))
        for x in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in inputs:
                storage = x.untyped_storage()
                self.live += storage.nbytes()
                self.total += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage.nbytes())
        return outputs

    def _free(self, size: int) -> None:
        self.live -= size


def published(query: Tensor, key: Tensor, value: Tensor, sample: Tensor) -> Tensor:
    """The formula of the published code: scores of own-bin keys and of one sample of all tokens, materialised."""
    dim = query.shape[-1]
    rows = [x.unflatten(2, (-1, FREQ_BINS)).transpose(2, 3) for x in (query, key, value)]
    own = rows[0] @ rows[1].transpose(-1, -2)  # (batch, heads, bins, frames, frames)
    cross = (query @ key[:, :, sample].transpose(-1, -2)).unflatten(2, (-1, FREQ_BINS)).transpose(2, 3)
    weights = (torch.cat([own, cross], dim=-1) * dim**-0.5).softmax(dim=-1)
    own, cross = weights.split([own.shape[-1], len(sample)], dim=-1)
    return (own @ rows[2] + cross @ value[:, :, None, sample]).transpose(2, 3).flatten(2, 3)


def attention_call(seconds: float) -> tuple[str, dict[str, Call]]:
    """What is measured, and the ways to do it: one self-attention call where F = 8."""
    frames = round(seconds * FRAMES_PER_SECOND)
    tokens = frames * FREQ_BINS
    # as a UNet's projections come: heads within each token
    q, k, v = (torch.randn(BATCH, tokens, HEADS, HEAD_DIM).transpose(1, 2) for _ in range(3))
    focus = focus_set(frames, FREQ_BINS)
    windowed = focus_set(frames, FREQ_BINS, LiteFocusConfig(time_window=128))  # 256 at the UNet's input: 10.24 s
    sample = torch.randperm(tokens)[: tokens // 10]
    title = (
        f"one attention call: B={BATCH} H={HEADS} d={HEAD_DIM} T={frames} F={FREQ_BINS} r=0.1, memory of q, k and v "
    )
    materialised = {
        "dense, materialised scores": Call(lambda: (HEAD_DIM**-0.5 * q @ k.transpose(2, 3)).softmax(dim=-1) @ v, 1.0)
    }
    return title + f"{sum(x.nbytes for x in (q, k, v)) / 1e6:.0f} MB", {
        "dense SDPA": Call(lambda: F.scaled_dot_product_attention(q, k, v), 1.0),
        **(materialised if seconds <= 40 else {}),  # as the authors' AudioLDM code does it: 9 GB at 80 s
        "published arithmetic": Call(lambda: published(q, k, v, sample), tokens / (frames + len(sample))),
        "litefocus": Call(lambda: focus_attention(q, k, v, focus), tokens / focus.keys_per_query),
        "litefocus, time_window=256": Call(
            lambda: focus_attention(q, k, v, windowed), tokens / windowed.keys_per_query
        ),
    }


# ----------------------------------------------------------------------------------------------------- one step

NATIVE = 256  # latent frames, 10.24 s
AUDIOLDM = {
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": (128, 256, 384, 640),
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
}


def authors(package: str, module: str) -> Any:
    """A module of the authors' packages, without the package's own __init__, which loads their whole pipelines."""
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise SystemExit(f"{package} is missing: pip install einops progressbar && pip install --no-deps {package}")
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = list(spec.submodule_search_locations or ())
    return importlib.import_module(f"{package}.{module}")


def original_audioldm2() -> nn.Module:
    """The UNet of the authors' package audioldm2 0.1.0."""
    unet: nn.Module = authors("audioldm2", "latent_diffusion.modules.diffusionmodules.openaimodel").UNetModel(
        image_size=64,
        in_channels=8,
        out_channels=8,
        model_channels=128,
        attention_resolutions=[8, 4, 2],
        num_res_blocks=2,
        channel_mult=[1, 2, 3, 5],
        num_head_channels=32,
        use_spatial_transformer=True,
        context_dim=[768, 1024],
    )
    return unet


MODELS: dict[str, Callable[[], nn.Module]] = {
    "audioldm-s": lambda: UNet2DConditionModel(
        **AUDIOLDM,
        cross_attention_dim=AUDIOLDM["block_out_channels"],
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=512,
        class_embeddings_concat=True,
    ),
    "audioldm2": lambda: AudioLDM2UNet2DConditionModel(**AUDIOLDM, cross_attention_dim=((None, 768, 1024),) * 4),
    "audioldm2-large": lambda: AudioLDM2UNet2DConditionModel(
        **AUDIOLDM, cross_attention_dim=((None, 768, 1024, None),) * 4, transformer_layers_per_block=2
    ),
    "tango": lambda: UNet2DConditionModel(
        in_channels=8,
        out_channels=8,
        block_out_channels=(320, 640, 1280, 1280),
        attention_head_dim=(5, 10, 20, 20),
        cross_attention_dim=1024,
        use_linear_projection=True,
        upcast_attention=True,
    ),
    "audioldm2-original": original_audioldm2,
}


def inputs(unet: nn.Module, seconds: float) -> dict[str, Tensor]:
    """What a pipeline gives the UNet at a step."""
    if hasattr(unet, "input_blocks"):
        latent = torch.randn(BATCH, 8, 8 * math.ceil(25 * seconds / 8), 16)
        context = [torch.randn(BATCH, 8, 768), torch.randn(BATCH, 16, 1024)]
        masks = [torch.ones(x.shape[:2]) for x in context]
        timesteps = torch.ones(BATCH, dtype=torch.long)
        return {"x": latent, "timesteps": timesteps, "context_list": context, "context_attn_mask_list": masks}  # type: ignore[dict-item]
    given = {"sample": torch.randn(BATCH, 8, math.ceil(25 * seconds), 16), "timestep": torch.tensor(1)}
    if isinstance(unet, AudioLDM2UNet2DConditionModel):
        prompt = {"encoder_hidden_states": torch.randn(BATCH, 8, 768)}
        return given | prompt | {"encoder_hidden_states_1": torch.randn(BATCH, 16, 1024)}
    if unet.config.class_embed_type is not None:
        return given | {"class_labels": torch.randn(BATCH, 512), "encoder_hidden_states": None}  # type: ignore[dict-item]
    return given | {"encoder_hidden_states": torch.randn(BATCH, 16, 1024)}


class Peer:
    """A processor that runs self-attention its own way. Cross-attention stays with `original`."""

    def __init__(self, original: Any, freq_bins: int) -> None:
        self.original, self.freq_bins = original, freq_bins
        self.native = math.ceil(NATIVE * freq_bins / 16)  # frames, at this layer's level

    def __call__(self, attn: Any, x: Tensor, encoder_hidden_states: Tensor | None = None, **others: Any) -> Tensor:
        if encoder_hidden_states is not None:
            return self.original(attn, x, encoder_hidden_states, **others)
        return self.own(attn, x)

    def own(self, attn: Any, x: Tensor) -> Tensor:
        """Self-attention over x (batch, tokens, channels)."""
        return x  # none at all: what is left of a step

    def kept(self, frames: int) -> float:
        """Share of dense self-attention's arithmetic."""
        return 0.0


class Published(Peer):
    """The published code's formula, on the levels that it covers."""

    def own(self, attn: Any, x: Tensor) -> Tensor:
        """See `published`."""
        if self.freq_bins != FREQ_BINS:
            return self.original(attn, x)
        q, k, v = (f(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v))
        sample = torch.randperm(x.shape[1])[: x.shape[1] // 10]
        return attn.to_out[0](published(q, k, v, sample).transpose(1, 2).flatten(2))

    def kept(self, frames: int) -> float:
        """Keys of the own bin and of the sample."""
        return 1 / FREQ_BINS + 0.1 if self.freq_bins == FREQ_BINS else 1.0


class Tiles(Peer):
    """Dense attention in time tiles of native length, as HyperTile does."""

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
        from tomesd.merge import bipartite_soft_matching_random2d

        tokens = x.shape[1]
        merge, unmerge = bipartite_soft_matching_random2d(
            x, self.freq_bins, tokens // self.freq_bins, 2, 2, tokens // 2, generator=torch.Generator().manual_seed(0)
        )
        return unmerge(self.original(attn, merge(x)))

    def kept(self, frames: int) -> float:
        """Half the queries, half the keys; the matching's own arithmetic is not counted."""
        return 0.25


METHODS: dict[str, dict[str, Any] | type[Peer]] = {
    "dense SDPA": {},
    "litefocus": {"min_freq_bins": 8},
    "litefocus, all levels": {"min_freq_bins": 2},
    "litefocus, all levels, time_window=256": {"min_freq_bins": 2, "time_window": 256},
    "litefocus, all levels, time_window=512": {"min_freq_bins": 2, "time_window": 512},
    "published arithmetic": Published,
    "time tiles": Tiles,
    "token merging 50 %": Merged,
}
NO_ATTENTION = "without self-attention"
COMPILED = ", compiled"  # at the end of a method's name


Processors = list[tuple[Any, Any]]  # a self-attention layer, and what it gets


def processors(method: str, pipe: Any) -> Processors:
    """Every self-attention layer with the processor of one of METHODS, to swap in and out without building anew."""
    how = Peer if method == NO_ATTENTION else METHODS[method]
    with litefocus.patch(pipe, **(how if isinstance(how, dict) else {})):  # finds the layers
        patched = [
            (layer, get_processor(layer))
            for layer in pipe.unet.modules()
            if isinstance(get_processor(layer), LiteFocusAttnProcessor)
        ]
    if how == {}:
        return [(layer, focus.original) for layer, focus in patched]
    if isinstance(how, dict):
        return patched
    return [(layer, how(focus.original, focus.freq_bins)) for layer, focus in patched]


@dataclass
class Layer:
    """Self-attention layers of one kind, which all take the same time: the first of them, and how many there are."""

    attn: Any
    frames: int
    freq_bins: int
    count: int = 0

    @property
    def tokens(self) -> int:
        """Of the layer's grid."""
        return self.frames * self.freq_bins


def kinds(pipe: Any, seconds: float) -> list[Layer]:
    """Every kind of self-attention layer."""
    with litefocus.patch(pipe):
        found: dict[tuple[int, ...], Layer] = {}
        for row in litefocus.status(pipe, seconds=seconds).layers:
            attn = pipe.unet.get_submodule(row.name)
            key = (row.freq_bins or 0, attn.to_q.out_features)
            found.setdefault(key, Layer(attn, row.frames or 0, row.freq_bins or 0)).count += 1
    return list(found.values())


def flop_ratio(method: str, pipe: Any, seconds: float) -> float:
    """Dense arithmetic of a step / the method's."""
    how = METHODS[method]
    if how == {}:
        return 1.0
    with litefocus.patch(pipe, **(how if isinstance(how, dict) else {})):
        flops = litefocus.status(pipe, seconds=seconds).flops
    assert flops is not None
    if isinstance(how, dict):
        return flops.ratio
    saved = sum(
        layer.count
        * 4
        * layer.tokens**2
        * layer.attn.to_q.out_features
        * (1 - how(None, layer.freq_bins).kept(layer.frames))
        for layer in kinds(pipe, seconds)
    )
    return flops.dense / (flops.dense - saved)


@dataclass
class Row:
    """Figures of one method, for the table and the JSON.

    summed: from single layers and the rest of a step. measured: on what, and when.
    """

    model: str
    seconds: float
    method: str
    cpu_median: float
    cpu_min: float
    ratio: float
    flop_ratio: float
    peak_mb: float
    summed: bool
    measured: str

    @property
    def key(self) -> tuple[str, float, str]:
        """What was measured."""
        return self.model, self.seconds, self.method


def cpu_seconds(run: Callable[[], Any]) -> float:
    """CPU time of one run."""
    started = time.process_time()
    run()
    return time.process_time() - started


def measure(
    runs: dict[str, Callable[[], Any]], rounds: int, bar: Any, prepare: Callable[[str], Any] = lambda name: None
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """CPU seconds of every round, and bytes at the peak, of each of `runs`.

    A first round warms up and counts memory. It is one of the rounds where it takes longer than WARM_ENOUGH.
    `prepare` is called with the name before each run, uncounted. In the first round what is COMPILED gets compiled,
    which never counts, and its memory cannot be counted, as tensors inside are the compiler's.
    """
    took: dict[str, list[float]] = {name: [] for name in runs}
    peak = dict.fromkeys(runs, 0)
    for warm_up in (True, *[False] * rounds):
        for name, run in runs.items():
            if len(took[name]) == rounds:
                continue
            bar.set_postfix_str(name)
            prepare(name)
            compiled = name.endswith(COMPILED)
            if warm_up and not compiled:
                with PeakMemory() as memory:
                    spent = cpu_seconds(run)
                peak[name] = memory.peak
            else:
                spent = cpu_seconds(run)
            if not warm_up or (spent > WARM_ENOUGH and not compiled):
                took[name].append(spent)
            bar.update()
    return took, peak


def rows_of(
    model: str,
    seconds: float,
    took: dict[str, list[float]],
    peak: dict[str, int],
    flop_ratios: dict[str, float],
    args: argparse.Namespace,
    *,
    summed: bool = False,
) -> list[Row]:
    """A row for every method of `took`, the first of which is dense."""
    medians = {method: statistics.median(times) for method, times in took.items()}
    dense = next(iter(medians.values()))
    return [
        Row(
            model=model,
            seconds=seconds,
            method=method,
            cpu_median=median,
            cpu_min=min(took[method]),
            ratio=dense / median,
            flop_ratio=flop_ratios[method],
            peak_mb=peak[method] / 1e6,
            summed=summed,
            measured=environment(args),
        )
        for method, median in medians.items()
    ]


def step(model: str, seconds: float, methods: list[str], args: argparse.Namespace, bar: Any) -> list[Row]:
    """Rows of one model at one length."""
    unet = MODELS[model]().eval()
    # what status() reads of a pipeline: 64 mel bins, 100 mel frames a second, VAE scale factor 4
    pipe = SimpleNamespace(
        unet=unet,
        vae=SimpleNamespace(config=SimpleNamespace(block_out_channels=(128, 256, 512))),
        vocoder=SimpleNamespace(
            config=SimpleNamespace(model_in_dim=64, sampling_rate=16000, upsample_rates=(5, 4, 2, 2, 2))
        ),
    )
    given = inputs(unet, seconds)
    summed = seconds > args.sum_above

    ways = {method: processors(method, pipe) for method in (*methods, NO_ATTENTION)}

    def install(method: str) -> None:
        for layer, processor in ways[method.removesuffix(COMPILED)]:
            set_processor(layer, processor)

    def whole() -> Any:
        return unet(**given)

    if not summed:
        runs: dict[str, Callable[[], Any]] = dict.fromkeys(methods, whole)
        if args.compile:
            compiled = torch.compile(unet)
            runs |= {method + COMPILED: lambda: compiled(**given) for method in methods}
        took, peak = measure(runs, args.rounds, bar, install)
    else:
        install("dense SDPA")
        layers = kinds(pipe, seconds)
        rest, rest_peak = measure({NO_ATTENTION: whole}, args.rounds, bar, install)
        took = dict.fromkeys(methods, rest[NO_ATTENTION])
        peak = dict.fromkeys(methods, rest_peak[NO_ATTENTION])
        for layer in layers:
            x = torch.randn(BATCH, layer.tokens, layer.attn.to_q.in_features)
            alone = functools.partial(layer.attn, x)
            one, one_peak = measure(dict.fromkeys(methods, alone), args.rounds, bar, install)
            for method in methods:
                took[method] = [a + layer.count * b for a, b in zip(took[method], one[method], strict=True)]
                peak[method] = max(peak[method], one_peak[method])
    install("dense SDPA")
    flop_ratios = {name: flop_ratio(name.removesuffix(COMPILED), pipe, seconds) for name in took}
    return rows_of(model, seconds, took, peak, flop_ratios, args, summed=summed)


# ------------------------------------------------------------------------------------------------- the whole road


def road(seconds: float, args: argparse.Namespace, bar: Any) -> Iterator[tuple[str, float, int]]:
    """(stage, CPU seconds, bytes at the peak) of AudioLDM 2 at its published widths, random weights, batch 1 prompt."""
    frames = math.ceil(25 * seconds)

    def stage(name: str, run: Callable[[], Any], times: float = 1.0) -> tuple[str, float, int]:
        took, peak = measure({name: run}, args.rounds, bar)
        return name, times * statistics.median(took[name]), peak[name]

    ids = torch.ones(2, 16, dtype=torch.long)
    t5 = T5EncoderModel(
        T5Config(d_model=1024, d_ff=2816, num_layers=24, num_heads=16, d_kv=64, feed_forward_proj="gated-gelu")
    ).eval()
    clap = ClapTextModelWithProjection(ClapTextConfig()).eval()
    gpt2 = GPT2LMHeadModel(GPT2Config()).eval()
    prompt = torch.randn(2, 18, 768)

    def text() -> None:
        t5(ids)
        clap(ids)
        for new in range(8):
            gpt2(inputs_embeds=torch.cat([prompt, prompt[:, :new]], dim=1))

    yield stage("text encoders and GPT-2", text)

    unet = MODELS["audioldm2"]().eval()
    given = inputs(unet, seconds)
    for name in args.methods:
        options = METHODS[name]
        if not isinstance(options, dict):
            raise SystemExit(f"road takes dense and litefocus, not {name}")
        if options == {} and seconds > args.sum_above:
            continue
        with litefocus.patch(unet, freq_bins=16, **options) if options else contextlib.nullcontext():
            yield stage(f"UNet, {args.steps} steps, {name}", functools.partial(unet, **given), args.steps)
    del unet

    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(128, 256, 512),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=8,
    ).eval()
    tokens = 16 * frames
    q, k, v = torch.randn(3, 1, 1, tokens, 512)
    part = max(1, tokens // 4096)  # its time is proportional to the queries: a part of them tells
    yield stage(
        "of VAE decode: attention of the mid block",
        functools.partial(F.scaled_dot_product_attention, q[:, :, ::part], k, v),
        tokens / len(range(0, tokens, part)),
    )
    vae.decoder.mid_block.attentions = nn.ModuleList([None])  # diffusers skips it
    latents = torch.randn(1, 8, frames, 16)
    del q, k, v
    yield stage("of VAE decode: everything else", lambda: vae.decode(latents).sample)
    vocoder = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=64,
            upsample_initial_channel=1024,
            upsample_rates=(5, 4, 2, 2, 2),
            upsample_kernel_sizes=(16, 16, 8, 4, 4),
        )
    ).eval()
    mel = torch.randn(1, 4 * frames, 64)
    yield stage("vocoder", lambda: vocoder(mel))


# --------------------------------------------------------------------------------------------------------- printing


COLOURS = ("#000000", "#0072B2", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#E69F00")  # Okabe and Ito
MARKERS = "osD^vxP*"


def plot(rows: list[Row], path: Path) -> None:
    """Step cost against clip length, a panel for every model; sums of layers hollow."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    models = list(dict.fromkeys(row.model for row in rows))
    across = min(2, len(models))
    down = math.ceil(len(models) / across)
    figure = Figure(figsize=(6 * across, 4.5 * down), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False).flat
    for axes in panels[len(models) :]:
        axes.set_axis_off()
    for axes, model in zip(panels, models, strict=False):
        of_model = [row for row in rows if row.model == model]
        for (method, colour), marker in zip(zip(METHODS, COLOURS, strict=True), MARKERS, strict=True):
            points = [row for row in of_model if row.method == method]
            if points:
                seconds, costs = [row.seconds for row in points], [row.cpu_median for row in points]
                axes.plot(seconds, costs, label=method, color=colour, marker=marker)
                hollow = [(row.seconds, row.cpu_median) for row in points if row.summed]
                if hollow:
                    axes.plot(*zip(*hollow, strict=True), marker, color=colour, markerfacecolor="white")
        axes.set(
            title=model + " (dense: its own attention)" * model.endswith("original"),
            xlabel="length of the clip (s)",
            ylabel="CPU time of a step (s)",
            xscale="log",
            yscale="log",
        )
        axes.xaxis.set_major_locator(FixedLocator(sorted({row.seconds for row in of_model})))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=80)


def environment(args: argparse.Namespace) -> str:
    """Where the figures come from."""
    return (
        f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}, diffusers {diffusers.__version__}, "
        f"{args.rounds} rounds, {date.today()}"
    )


def print_table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """In Markdown, row by row as they come."""
    for cells in itertools.chain((header, ("---",) * len(header)), rows):
        tqdm.write("| " + " | ".join(cells) + " |")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("call", "step", "road"), default="call")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="of step (default: those of diffusers)")
    parser.add_argument("--seconds", nargs="+", type=float, help="default: 80; of step: 10 20 40 80 160 320 600")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, help="default: all; of road: every level, window of 256"
    )
    parser.add_argument("--sum-above", type=float, default=160.0, help="longer steps are summed up from layers")
    parser.add_argument("--steps", type=int, default=200, help="of road (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="step: also through torch.compile; not of sums")
    parser.add_argument("--quick", action="store_true", help="step: AudioLDM 2 at 20 s, one round")
    parser.add_argument("--output", type=Path, help="step: add to this .json, and plot it as .png")
    args = parser.parse_args(argv)
    if args.quick:
        args.models, args.seconds, args.rounds = ["audioldm2"], args.seconds or [20.0], 1
    args.seconds = args.seconds or ([10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 600.0] if args.what == "step" else [80.0])
    args.models = args.models or [name for name in MODELS if name != "audioldm2-original"]
    few = ["litefocus, all levels", "litefocus, all levels, time_window=256"]
    args.methods = args.methods or (few if args.what == "road" else list(METHODS))
    args.methods = list(dict.fromkeys(["dense SDPA", *args.methods]))  # what the others are compared with
    return args


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    print(environment(args))
    with torch.inference_mode():
        if args.what == "road":
            for seconds in args.seconds:
                print(f"AudioLDM 2, {seconds:g} s of audio, {args.steps} steps")
                with tqdm(desc="runs") as bar:
                    print_table(
                        ("stage", "CPU s", "peak memory, MB"),
                        ((name, f"{cpu:.1f}", f"{peak / 1e6:.0f}") for name, cpu, peak in road(seconds, args, bar)),
                    )
            return
        rows: list[Row] = []
        if args.what == "call":
            for seconds in args.seconds:
                title, calls = attention_call(seconds)
                print(f"{seconds:g} s of audio, {title}")
                with tqdm(total=len(calls) * (args.rounds + 1), desc="runs") as bar:
                    took, peak = measure({name: call.run for name, call in calls.items()}, args.rounds, bar)
                flop_ratios = {name: call.flop_ratio for name, call in calls.items()}
                rows += rows_of("attention call", seconds, took, peak, flop_ratios, args)
        else:
            report = args.output.with_suffix(".json") if args.output else None
            if report and report.exists():
                rows = [Row(**row) for row in json.loads(report.read_text())]
            with tqdm(desc="runs") as bar:
                for model in args.models:
                    for seconds in args.seconds:
                        new = step(model, seconds, args.methods, args, bar)
                        rows = [row for row in rows if row.key not in {row.key for row in new}] + new
                        if report:  # as far as it got
                            report.write_text(json.dumps([vars(row) for row in rows], indent=2) + "\n")
            methods = [*METHODS, *(method + COMPILED for method in METHODS)]
            rows.sort(key=lambda row: (list(MODELS).index(row.model), row.seconds, methods.index(row.method)))
    header = ("model", "s", "method", "CPU s, median", "minimum", "ratio to dense", "FLOP ratio", "share reached")
    print_table(
        (*header, "peak memory, MB"),
        [
            (
                row.model,
                f"{row.seconds:g}" + (" (sum of layers)" if row.summed else ""),
                row.method,
                f"{row.cpu_median:.3f}",
                f"{row.cpu_min:.3f}",
                f"{row.ratio:.2f}",
                f"{row.flop_ratio:.2f}",
                f"{row.ratio / row.flop_ratio:.0%}",
                f"{row.peak_mb:.0f}" if row.peak_mb else "not counted",
            )
            for row in rows
        ],
    )
    if args.output and args.what == "step":
        plot(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
