"""Time and memory of LiteFocus beside dense attention, the paper's settings, time tiles and token merging.

    python examples/benchmark.py                            # one self-attention call of AudioLDM 2, 80 s
    python examples/benchmark.py step --models audioldm2 --seconds 10 80
    python examples/benchmark.py step --quick               # in about a minute
    python examples/benchmark.py stages --seconds 80        # the whole pipeline, stage by stage
    python examples/benchmark.py gpu --output gpu           # everything about a GPU, in one call of under ten minutes

Models have their published widths and random weights: speed does not depend on the weights. A step is one call of the
UNet with classifier-free guidance (batch 2). Methods alternate within a round, since machines drift; ratios are of the
medians of one run. On a CPU, seconds are CPU seconds; on CUDA, the device's own, between events. `--output NAME` adds
the figures to NAME.json, in place of older ones of the same thing, and writes NAME.md in capitals and NAME.png anew.

A bare machine with torch still needs `pip install diffusers transformers tomesd tqdm matplotlib`, for `gpu --tests`
also `pytest hypothesis scipy peft einops`, and this repository: `pip install --no-deps -e .`. `gpu` leaves out, and
says so, what is not there; `gpu --quick --device cpu` runs all of it in small, to see that it works.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.util
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from datetime import date
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import AudioLDM2UNet2DConditionModel, AutoencoderKL, UNet2DConditionModel
from kernels import by_flex_attention, by_merging, on_backend, own_bins_as_views, through
from methods import Merged, Method, Peer, Published, Tiles, flop_ratio, install, published
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import litefocus
from litefocus import LiteFocusConfig, focus_attention, focus_set

METHODS: dict[str, Method] = {
    "dense": None,
    "litefocus": LiteFocusConfig(),
    "paper": LiteFocusConfig.paper(),
    "native window": LiteFocusConfig(time_window=256),
    "time tiles": Tiles,
    "token merging": Merged,
    "published arithmetic": Published,
}
PUBLISHED_SECONDS = 40.0  # above, it is left out: its scores take gigabytes a layer
COMPILED = ", compiled"  # at the end of a method's name
FLEX = ", FlexAttention"  # likewise
BATCH = 2  # classifier-free guidance


# ----------------------------------------------------------------------------------------------------- measuring

WARM_ENOUGH = 10.0  # seconds, after which warming up and counting memory no longer matter
QUEUED = 0.05  # seconds of work between two events, so that starting it does not count


class PeakMemory(TorchDispatchMode):
    """Counts how many bytes of tensors allocated inside live at once (`peak`), on any device."""

    live = peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        outputs = func(*args, **(kwargs or {}))
        for x in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in inputs:
                self.live += x.untyped_storage().nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(x.untyped_storage(), self._free, x.untyped_storage().nbytes())
        return outputs

    def _free(self, size: int) -> None:
        self.live -= size


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """CPU seconds of one run; on CUDA the device's, the mean over as many runs as fill QUEUED."""
    if device.type != "cuda":
        started = time.process_time()
        run()
        return time.process_time() - started

    def between_events(times: int) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(times):
            run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / times

    once = between_events(1)
    return once if once > QUEUED else between_events(min(50, math.ceil(QUEUED / once)))


def first_run(run: Callable[[], Any], device: torch.device, *, compiled: bool = False) -> tuple[float, int]:
    """Seconds of a first run, and bytes at its peak above what was there before.

    On a CPU the peak of what is compiled cannot be counted, since tensors inside are the compiler's: 0.
    """
    if device.type == "cuda":
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        spent = seconds_of(run, device)
        return spent, torch.cuda.max_memory_allocated() - before
    with contextlib.nullcontext(PeakMemory()) if compiled else PeakMemory() as memory:
        spent = seconds_of(run, device)
    return spent, memory.peak


def measure(
    runs: dict[str, Callable[[], Any]], rounds: int, device: torch.device, bar: Any
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every round, and bytes at the peak, of each of `runs`, which alternate.

    A first round warms up and counts memory. It is one of the rounds where it takes longer than WARM_ENOUGH, unless
    something was compiled in it.
    """
    took: dict[str, list[float]] = {name: [] for name in runs}
    peak = dict.fromkeys(runs, 0)
    for warm_up in (True, *[False] * rounds):
        for name, run in runs.items():
            if len(took[name]) == rounds:
                continue
            bar.set_postfix_str(name)
            compiled = name.endswith((COMPILED, FLEX))
            if warm_up:
                spent, peak[name] = first_run(run, device, compiled=compiled)
            else:
                spent = seconds_of(run, device)
            if not warm_up or (spent > WARM_ENOUGH and not compiled):
                took[name].append(spent)
            bar.update()
    return took, peak


@dataclass(kw_only=True)
class Row:
    """Figures of one method, for the tables and the JSON.

    seconds: of audio. median, minimum: seconds of a run. ratio, flop_ratio: dense / this, in time and in arithmetic.
    error: relative distance of a call's output to that of the same focus sets through `focus_attention`. summed: from
    single layers and the rest of a step. measured: on what, when, and by which command.
    """

    model: str
    seconds: float
    method: str
    device: str
    dtype: str
    median: float
    minimum: float
    ratio: float
    flop_ratio: float
    peak_mb: float
    error: float | None = None
    summed: bool = False
    measured: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What was measured."""
        return self.model, self.seconds, self.method, self.device, self.dtype


def rows_of(
    model: str,
    seconds: float,
    took: dict[str, list[float]],
    peak: dict[str, int],
    flop_ratios: dict[str, float],
    args: argparse.Namespace,
    **others: Any,
) -> list[Row]:
    """A row for every method of `took`, the first of which is dense."""
    medians = {method: statistics.median(times) for method, times in took.items()}
    dense = next(iter(medians.values()))
    return [
        Row(
            model=model,
            seconds=seconds,
            method=method,
            device=args.device.type,
            dtype=args.dtype,
            median=median,
            minimum=min(took[method]),
            ratio=dense / median,
            flop_ratio=flop_ratios[method],
            peak_mb=peak[method] / 1e6,
            measured=environment(args),
            **others,
        )
        for method, median in medians.items()
    ]


# ------------------------------------------------------------------------------------------------- one attention call

HEADS, HEAD_DIM, FREQ_BINS = 8, 32, 8  # of AudioLDM 2, where most of its time goes
FRAMES_PER_SECOND = 12.8  # at that level, in the paper's count: 1024 frames at 80 s


@dataclass
class Call:
    """One way to do the work, and how many times less arithmetic than dense it needs."""

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    flop_ratio: float
    same_as: str | None = None  # the call that computes the same


def at_this_level(config: LiteFocusConfig) -> LiteFocusConfig:
    """Settings whose time window counts frames of a grid of 8 bins, not of the UNet's input."""
    return config if config.time_window is None else replace(config, time_window=math.ceil(config.time_window / 2))


def attention_calls(seconds: float, args: argparse.Namespace) -> dict[str, Call]:
    """The ways to run one self-attention call where F = 8."""
    frames = round(seconds * FRAMES_PER_SECOND)
    tokens = frames * FREQ_BINS
    calls = {"dense": Call(F.scaled_dot_product_attention, 1.0)}
    if seconds <= PUBLISHED_SECONDS:
        sample = torch.randperm(tokens, device=args.device)[: tokens // 10]
        calls["dense, materialised scores"] = Call(
            lambda q, k, v: (HEAD_DIM**-0.5 * q @ k.transpose(2, 3)).softmax(dim=-1) @ v, 1.0
        )
        calls["published arithmetic"] = Call(
            lambda q, k, v: published(q, k, v, sample), tokens / (frames + len(sample))
        )
    settings = {
        "paper": LiteFocusConfig.paper(),
        "litefocus": LiteFocusConfig(),
        "no window": LiteFocusConfig(time_window=None, min_sampled=0),  # the paper's sets, weighted
        "native window": LiteFocusConfig(time_window=256),
    }
    for name, config in settings.items():
        focus = focus_set(frames, FREQ_BINS, at_this_level(config)).to(args.device)
        ratio = tokens / focus.keys_per_query
        calls[name] = Call(functools.partial(focus_attention, focus=focus), ratio)
        if name in ("litefocus", "no window"):
            calls[f"{name}, merged"] = Call(through(by_merging(focus), focus), ratio, name)
            if len(focus.keys) == FREQ_BINS:
                calls[f"{name}, merged, own bins as views"] = Call(own_bins_as_views(focus, frames), ratio, name)
            if args.flex:
                calls[name + FLEX] = Call(through(by_flex_attention(focus), focus), ratio, name)
    if args.backends:
        for name, backend in itertools.product(("dense", "litefocus"), args.backends):
            run = on_backend(backend, calls[name].run)
            calls[f"{name}, {backend.name}"] = Call(run, calls[name].flop_ratio, name if name != "dense" else None)
    return calls


def call(seconds: float, args: argparse.Namespace, bar: Any) -> tuple[list[Row], list[str]]:
    """Rows of one attention call, and what could not be run and why."""
    tokens = round(seconds * FRAMES_PER_SECOND) * FREQ_BINS
    # as a UNet's projections come: heads within each token; on a GPU not twice the same, which its cache would hold
    copies = 4 if args.device.type == "cuda" else 1
    shape, kind = (BATCH, tokens, HEADS, HEAD_DIM), {"device": args.device, "dtype": getattr(torch, args.dtype)}
    qkvs = [[torch.randn(*shape, **kind).transpose(1, 2) for _ in range(3)] for _ in range(copies)]
    rotating = itertools.cycle(qkvs)
    calls, refused, errors = attention_calls(seconds, args), [], {}
    for name, way in list(calls.items()):
        try:
            output = way.run(*qkvs[0])
            if way.same_as:
                expected = calls[way.same_as].run(*qkvs[0])
                errors[name] = ((output - expected).float().norm() / expected.float().norm()).item()
        except Exception as error:  # a kernel that this device or this shape does not have
            refused.append(f"{args.dtype}, {seconds:g} s, {name}: {type(error).__name__}: {str(error)[:100]}")
            del calls[name]
    runs = {name: lambda way=way: way.run(*next(rotating)) for name, way in calls.items()}
    took, peak = measure(runs, args.rounds, args.device, bar)
    rows = rows_of("attention call", seconds, took, peak, {name: way.flop_ratio for name, way in calls.items()}, args)
    for row in rows:
        row.error = errors.get(row.method)
    return rows, refused


# ----------------------------------------------------------------------------------------------------- one step

AUDIOLDM = {
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": (128, 256, 384, 640),
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
}


def original_audioldm2() -> nn.Module:
    """The UNet of the authors' package audioldm2 0.1.0, without its __init__, which loads their whole pipelines."""
    spec = importlib.util.find_spec("audioldm2")
    if spec is None:
        raise SystemExit("audioldm2 is missing: pip install einops progressbar && pip install --no-deps audioldm2")
    package = sys.modules.setdefault("audioldm2", ModuleType("audioldm2"))
    package.__path__ = list(spec.submodule_search_locations or ())
    from audioldm2.latent_diffusion.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(
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
    "small": lambda: AudioLDM2UNet2DConditionModel(  # to see that everything works
        **{**AUDIOLDM, "block_out_channels": (32, 32, 64, 64)},
        cross_attention_dim=((None, 768, 1024),) * 4,
        layers_per_block=1,
    ),
}


def build(model: str, args: argparse.Namespace) -> Any:
    """What litefocus reads of a pipeline: a UNet, 64 mel bins, 100 mel frames a second, a VAE scale factor of 4."""
    vocoder = {"model_in_dim": 64, "sampling_rate": 16000, "upsample_rates": (5, 4, 2, 2, 2)}
    return SimpleNamespace(
        model=model,
        unet=MODELS[model]().eval().to(args.device, getattr(torch, args.dtype)),
        vae=SimpleNamespace(config=SimpleNamespace(block_out_channels=(128, 256, 512))),
        vocoder=SimpleNamespace(config=SimpleNamespace(**vocoder)),
    )


def twin(pipe: Any, method: Method) -> Any:
    """The pipeline with a UNet of its own that runs `method`. All twins share one set of weights."""
    shared = {id(x): x for x in itertools.chain(pipe.unet.parameters(), pipe.unet.buffers())}
    other = SimpleNamespace(**{**vars(pipe), "unet": copy.deepcopy(pipe.unet, shared)})
    if isinstance(method, LiteFocusConfig):
        litefocus.patch(other, method)
    elif method is not None:
        install(other, method)
    return other


def inputs(unet: nn.Module, seconds: float, args: argparse.Namespace) -> dict[str, Any]:
    """What a pipeline gives the UNet at a step."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, device=args.device, dtype=getattr(torch, args.dtype))

    timestep = torch.tensor(1, device=args.device)
    if hasattr(unet, "input_blocks"):
        context = [draw(8, 768), draw(16, 1024)]
        return {
            "x": draw(8, 8 * math.ceil(25 * seconds / 8), 16),
            "timesteps": timestep.expand(BATCH),
            "context_list": context,
            "context_attn_mask_list": [x.new_ones(x.shape[:2]) for x in context],
        }
    given: dict[str, Any] = {"sample": draw(8, math.ceil(25 * seconds), 16), "timestep": timestep, "return_dict": False}
    if isinstance(unet, AudioLDM2UNet2DConditionModel):
        return given | {"encoder_hidden_states": draw(8, 768), "encoder_hidden_states_1": draw(16, 1024)}
    if unet.config.class_embed_type is not None:
        return given | {"class_labels": draw(512), "encoder_hidden_states": None}
    return given | {"encoder_hidden_states": draw(16, 1024)}


def suits(method: str, model: str, seconds: float) -> bool:
    """Whether a method is run on a model at a length."""
    if METHODS[method] is Published and seconds > PUBLISHED_SECONDS:
        return False
    return not (model.endswith("original") and isinstance(METHODS[method], type))  # peers know diffusers' layers


def step(model: str, seconds: float, args: argparse.Namespace, bar: Any) -> list[Row]:
    """Rows of one step of a model's UNet at one length."""
    pipe = build(model, args)
    methods = [method for method in args.methods if suits(method, model, seconds)]
    flop_ratios = {method: flop_ratio(pipe, METHODS[method], seconds) for method in methods}
    pipes = {method: twin(pipe, METHODS[method]) for method in methods}
    given = [inputs(pipe.unet, seconds, args) for _ in range(2 if args.device.type == "cuda" else 1)]
    if args.device.type == "cpu" and seconds > args.sum_above:
        took, peak = summed(pipes, seconds, given[0], args, bar)
        return rows_of(model, seconds, took, peak, flop_ratios, args, summed=True)
    rotating = itertools.cycle(given)
    unets = {method: other.unet for method, other in pipes.items()}
    if args.compile:
        for method in methods:
            unets[method + COMPILED] = torch.compile(twin(pipe, METHODS[method]).unet)
            flop_ratios[method + COMPILED] = flop_ratios[method]
    runs = {method: lambda unet=unet: unet(**next(rotating)) for method, unet in unets.items()}
    took, peak = measure(runs, args.rounds, args.device, bar)
    return rows_of(model, seconds, took, peak, flop_ratios, args)


def summed(
    pipes: dict[str, Any], seconds: float, given: dict[str, Any], args: argparse.Namespace, bar: Any
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """As `measure`, for steps that take too long: of layers that cost the same, the first counts for all.

    The others do nothing. What is left of a step is the same for every method, so its median is taken over all runs.
    """
    rests: list[float] = []
    attention: dict[str, list[float]] = {method: [] for method in pipes}
    peak = dict.fromkeys(pipes, 0)
    for method, pipe in pipes.items():
        spent: dict[Any, float] = {}
        counts: dict[Any, int] = {}
        firsts: dict[tuple[Any, ...], Any] = {}
        for row in litefocus.status(pipe, seconds=seconds).layers:
            layer = pipe.unet.get_submodule(row.name)
            first = firsts.setdefault((row.freq_bins, layer.to_q.out_features), layer)
            counts[first] = counts.get(first, 0) + 1
            if layer is not first:
                layer.set_processor(Peer(layer.processor, row.freq_bins or 0))
        for layer in counts:

            def before(layer: Any, _: Any, spent: dict[Any, float] = spent) -> None:
                spent[layer] = -time.process_time()

            def after(layer: Any, _: Any, __: Any, spent: dict[Any, float] = spent) -> None:
                spent[layer] += time.process_time()

            layer.register_forward_pre_hook(before)
            layer.register_forward_hook(after)
        for _ in range(args.rounds):
            bar.set_postfix_str(method)
            total, peak[method] = first_run(functools.partial(pipe.unet, **given), args.device)
            rests.append(total - sum(spent.values()))
            attention[method].append(sum(counts[layer] * spent[layer] for layer in counts))
            bar.update()
    rest = statistics.median(rests)
    return {method: [rest + each for each in times] for method, times in attention.items()}, peak


# ------------------------------------------------------------------------------------------------ the whole pipeline


def decoders() -> tuple[nn.Module, nn.Module]:
    """VAE and vocoder of AudioLDM 2 at their published widths."""
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(128, 256, 512),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=8,
    )
    config = SpeechT5HifiGanConfig(
        model_in_dim=64,
        upsample_initial_channel=1024,
        upsample_rates=(5, 4, 2, 2, 2),
        upsample_kernel_sizes=(16, 16, 8, 4, 4),
    )
    return vae, SpeechT5HifiGan(config)


def stages(seconds: float, args: argparse.Namespace, bar: Any) -> Iterator[dict[str, Any]]:
    """Time and peak memory of every stage of AudioLDM 2 at its published widths, random weights, one prompt."""
    from transformers import (
        ClapTextConfig,
        ClapTextModelWithProjection,
        GPT2Config,
        GPT2LMHeadModel,
        T5Config,
        T5EncoderModel,
    )

    frames = math.ceil(25 * seconds)
    kind: dict[str, Any] = {"device": args.device, "dtype": getattr(torch, args.dtype)}

    def stage(name: str, run: Callable[[], Any], times: float = 1.0) -> dict[str, Any]:
        took, peak = measure({name: run}, args.rounds, args.device, bar)
        figures = {"median": times * statistics.median(took[name]), "peak_mb": peak[name] / 1e6}
        where = {"device": args.device.type, "dtype": args.dtype, "measured": environment(args)}
        return {"seconds": seconds, "stage": name, **figures, **where}

    ids = torch.ones(2, 16, dtype=torch.long, device=args.device)
    t5 = T5EncoderModel(
        T5Config(d_model=1024, d_ff=2816, num_layers=24, num_heads=16, d_kv=64, feed_forward_proj="gated-gelu")
    )
    t5, clap, gpt2 = (
        model.eval().to(**kind)
        for model in (t5, ClapTextModelWithProjection(ClapTextConfig()), GPT2LMHeadModel(GPT2Config()))
    )
    prompt = torch.randn(2, 18, 768, **kind)

    def text() -> None:
        t5(ids)
        clap(ids)
        for new in range(8):
            gpt2(inputs_embeds=torch.cat([prompt, prompt[:, :new]], dim=1))

    yield stage("text encoders and GPT-2", text)

    pipe = build("audioldm2", args)
    given = inputs(pipe.unet, seconds, args)
    for method in args.methods:
        if METHODS[method] is None and args.device.type == "cpu" and seconds > args.sum_above:
            continue
        unet = twin(pipe, METHODS[method]).unet
        yield stage(f"UNet, {args.steps} steps, {method}", functools.partial(unet, **given), args.steps)
    del pipe, unet

    vae, vocoder = (model.eval().to(**kind) for model in decoders())
    tokens = 16 * frames
    q, k, v = torch.randn(3, 1, 1, tokens, 512, **kind)
    part = max(1, tokens // 4096)  # its time is proportional to the queries: a part of them tells
    yield stage(
        "of VAE decode: attention of the mid block",
        functools.partial(F.scaled_dot_product_attention, q[:, :, ::part], k, v),
        tokens / len(range(0, tokens, part)),
    )
    vae.decoder.mid_block.attentions = nn.ModuleList([None])  # diffusers skips it
    latents = torch.randn(1, 8, frames, 16, **kind)
    del q, k, v
    yield stage("of VAE decode: everything else", lambda: vae.decode(latents).sample)
    mel = torch.randn(1, 4 * frames, 64, **kind)
    yield stage("vocoder", lambda: vocoder(mel))


# ------------------------------------------------------------------------------------------------------------ a GPU


class Report:
    """What `gpu` does, part by part, until its minutes are over; every part is written down when it ends."""

    def __init__(self, args: argparse.Namespace, results: Results) -> None:
        self.args, self.results = args, results
        self.ends = time.monotonic() + 60 * args.minutes

    @property
    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    def check(self, what: str, result: str) -> None:
        """Note and print one result in words."""
        tqdm.write(f"{what}: {result}")
        self.results.add("checks", [{"check": what, "result": result, "measured": environment(self.args)}])

    def part(self, what: str, run: Callable[[], None], needs: float = 5.0) -> None:
        """Run a part that takes about `needs` seconds. Where it fails, or no time is left, that is its result."""
        if self.left < needs:
            self.check(what, f"left out, as {self.args.minutes:g} minutes are over")
            return
        try:
            run()
        except Exception as error:
            self.check(what, f"{type(error).__name__}: {str(error)[:300]}")
        tqdm.write(f"{what}: {self.left:.0f} s left")


def exactness(args: argparse.Namespace) -> float:
    """Relative error of `focus_attention` in a dtype against masked dense attention in float64."""
    focus = focus_set(num_frames=200, freq_bins=8)
    weights = torch.zeros(focus.keys_per_query) if focus.log_weights is None else focus.log_weights
    mask = torch.full((focus.tokens, focus.tokens), -math.inf, dtype=torch.float64)
    for queries, keys in zip(focus.queries, focus.keys, strict=True):
        mask[queries[:, None], keys] = weights.double()
    q, k, v = torch.randn(3, 2, 4, focus.tokens, 32).to(getattr(torch, args.dtype))
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
    found = focus_attention(*(x.to(args.device) for x in (q, k, v)), focus.to(args.device)).cpu().double()
    return ((found - expected).norm() / expected.norm()).item()


def captured(run: Callable[[], Any], device: torch.device) -> Callable[[], Tensor]:
    """`run` as a CUDA graph: a call replays it and returns its first output. On a CPU, `run` itself."""
    if device.type != "cuda":
        return lambda: run()[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()[0]

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def gpu_calls(seconds: float, report: Report, bar: Any) -> None:
    """Rows of one attention call by every path."""
    rows, refused = call(seconds, report.args, bar)
    report.results.add("rows", rows)
    for line in refused:
        report.check("refused", line)


def gpu_steps(pipe: Any, seconds: float, hows: list[tuple[str, str]], report: Report, bar: Any) -> None:
    """Rows of one length, of (method, how): "eager", "CUDA graph", "compiled" or "compiled, CUDA graph"."""
    args = report.args
    given = inputs(pipe.unet, seconds, args)
    runs: dict[str, Callable[[], Any]] = {"dense": functools.partial(pipe.unet, **given)}
    ratios = {"dense": 1.0}

    def prepare(method: str, how: str, name: str) -> None:
        unet = twin(pipe, METHODS[method]).unet
        if how.startswith("compiled"):
            unet = torch.compile(unet, dynamic=False, mode="reduce-overhead" if how.endswith("graph") else None)
        run = functools.partial(unet, **given)
        run = captured(run, args.device) if how == "CUDA graph" else run
        run()
        runs[name], ratios[name] = run, flop_ratio(pipe, METHODS[method], seconds)

    def time_all() -> None:
        took, peak = measure(runs, args.rounds, args.device, bar)
        rows = rows_of(pipe.model, seconds, took, peak, ratios, args)
        # the dense row stays that of the eager methods
        report.results.add("rows", [row for row in rows if row.method != "dense" or ("litefocus", "eager") in hows])

    for method, how in hows:
        name = method if how == "eager" else f"{method}, {how}"
        preparing = functools.partial(prepare, method, how, name)
        report.part(f"{args.dtype}, {seconds:g} s, {name}", preparing, needs=90 if how.startswith("compiled") else 10)
    report.part(f"{args.dtype}, {seconds:g} s, timing", time_all)


def evicted_index(pipe: Any, lengths: list[float], args: argparse.Namespace) -> str:
    """Whether a captured step still gives the same after others of other lengths, whose indices crowd out its own."""
    unet = twin(pipe, LiteFocusConfig()).unet
    step = captured(functools.partial(unet, **inputs(unet, lengths[0], args)), args.device)
    before = step().clone()
    for seconds in lengths[1:]:
        unet(**inputs(unet, seconds, args))
    # zeros where freed indices lay: other garbage, as an index, could be out of range, which stops the device
    focus_sets = [focus_set(row.frames, row.freq_bins) for row in litefocus.status(pipe, seconds=lengths[0]).layers]
    sizes = [x.numel() for focus in focus_sets for x in (focus.queries, focus.keys, focus.inverse)]
    zeros = [torch.zeros(size, dtype=torch.long, device=args.device) for size in 2 * sizes]
    same = torch.allclose(before, step(), atol=1e-3, equal_nan=True)
    del zeros
    return f"after {len(lengths) - 1} other lengths, a replay gives " + (
        "the same" if same else "something else: a fault"
    )


def run_tests(report: Report) -> None:
    """The test suite on the device, which its fixtures read from LITEFOCUS_TEST_DEVICE."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "LITEFOCUS_TEST_DEVICE": report.args.device.type},
        timeout=max(30.0, report.left - 30),
        capture_output=True,
        text=True,
    )
    lines = (done.stdout + done.stderr).strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    report.check("tests", "; ".join([lines[-1], *failed[:20]]))


def gpu(args: argparse.Namespace, results: Results, bar: Any) -> None:
    """Everything that a CPU cannot show, in one call of about `--minutes`; the dear and the dangerous come last."""
    report = Report(args, results)
    cuda = args.device.type == "cuda"
    model, lengths = ("small", [1.0, 2.0]) if args.quick else ("audioldm2", [10.0, 80.0, 40.0, 300.0])
    dtypes = ["float16", "bfloat16"] if cuda else ["float32", "bfloat16"]
    backends = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION") if cuda else ("FLASH_ATTENTION", "MATH")
    args.backends = [getattr(SDPBackend, name) for name in backends if hasattr(SDPBackend, name)]
    for args.dtype in dict.fromkeys(["float32", *dtypes]):
        what = f"error of focus_attention in {args.dtype}"
        report.part(what, lambda what=what: report.check(what, f"{exactness(args):.1e}"))
    for args.dtype, seconds in itertools.product(dtypes, lengths):
        args.flex = args.dtype == dtypes[0]  # it compiles for every shape
        calls = functools.partial(gpu_calls, seconds, report, bar)
        report.part(f"attention calls in {args.dtype} at {seconds:g} s", calls, needs=30)
    graphs = ["CUDA graph"] if cuda else []
    eager = [(method, "eager") for method in METHODS if method != "published arithmetic"]
    eager = eager[1:] + [(method, how) for how in graphs for method in ("dense", "litefocus")]
    compiled = [
        (method, how)
        for how in ("compiled", *(f"compiled, {graph}" for graph in graphs))
        for method in ("dense", "litefocus")
    ]
    pipes = {}
    for args.dtype in dtypes:
        pipes[args.dtype] = build(model, args)
    for args.dtype, seconds in itertools.product(dtypes, lengths):
        gpu_steps(pipes[args.dtype], seconds, eager, report, bar)
    if args.tests:
        report.part("tests", functools.partial(run_tests, report), needs=60)
    args.dtype = dtypes[0]
    for seconds in lengths[: 1 if args.quick else None]:
        gpu_steps(pipes[args.dtype], seconds, compiled, report, bar)
    others = [lengths[0] + more for more in range(6)]
    what = "index of a captured graph"
    report.part(what, lambda: report.check(what, evicted_index(pipes[args.dtype], others, args)))


# ---------------------------------------------------------------------------------------------------------- writing


class Results:
    """All figures in one JSON, and the page and the picture that are made of it."""

    def __init__(self, output: Path | None) -> None:
        self.file = output.with_suffix(".json") if output else None
        self.found: dict[str, list[Any]] = {"rows": [], "stages": [], "checks": []}
        if self.file and self.file.exists():
            kept = json.loads(self.file.read_text())
            known = {field.name for field in fields(Row)}
            kept["rows"] = [Row(**row) for row in kept["rows"] if set(row) <= known]
            self.found |= kept

    def add(self, kind: str, new: list[Any]) -> None:
        """Add results in place of older ones of the same thing, and write them down."""

        def key(result: Any) -> Any:
            names = {"stages": ("seconds", "stage", "device", "dtype"), "checks": ("check", "result")}
            return result.key if kind == "rows" else tuple(result[name] for name in names[kind])

        replaced = {key(result) for result in new}
        self.found[kind] = [result for result in self.found[kind] if key(result) not in replaced] + new
        if self.file:
            plain = {**self.found, "rows": [vars(row) for row in self.found["rows"]]}
            self.file.write_text(json.dumps(plain, indent=1) + "\n")

    def write(self) -> None:
        """The page and the picture."""
        if self.file is None:
            return
        picture = self.file.with_suffix(".png")
        drawn = plot(self.found["rows"], picture)
        text = page(self.found, picture.name if drawn else None)
        self.file.with_name(self.file.stem.upper() + ".md").write_text(text)


def plot(rows: list[Row], path: Path) -> bool:
    """Time of a step for every second of audio against the clip's length; False where there are no lines to see.

    A panel for every model that was measured at three lengths or more. Flat is linear time.
    """
    from plots import label_ends, log_axis, panels, save, styles

    def line(model: str, method: str) -> list[Row]:
        of = [row for row in rows if (row.model, row.method) == (model, method) and row.dtype == rows[0].dtype]
        return sorted(of, key=lambda row: row.seconds)

    rows = [row for row in rows if row.model in MODELS and row.method in METHODS]
    models = [model for model in MODELS if len(line(model, "litefocus")) > 2]
    if not models:
        return False
    figure, every = panels(len(models), width=7.5, height=4.8)
    for axes, model in zip(every, models, strict=True):
        lines = {method: points for method in METHODS if (points := line(model, method))}
        style = styles(lines)
        for method, points in lines.items():
            colour, marker = style[method]
            xy = [row.seconds for row in points], [row.median / row.seconds for row in points]
            axes.plot(*xy, color=colour, linewidth=2 if method in ("dense", "litefocus") else 1.2)
            for row, x, y in zip(points, *xy, strict=True):
                axes.plot(x, y, marker, color=colour, markerfacecolor="white" if row.summed else colour)
        log_axis(axes, "x", {row.seconds for points in lines.values() for row in points})
        costs = [row.median / row.seconds for points in lines.values() for row in points]
        log_axis(
            axes,
            "y",
            [
                tick
                for e in range(-6, 3)
                for m in (1, 2, 5)
                if min(costs) / 1.5 < (tick := m * 10.0**e) < 1.5 * max(costs)
            ],
        )
        clock = "CPU time" if lines["litefocus"][0].device == "cpu" else "GPU time"
        axes.set(title=f"{model}: one step of the UNet", xlabel="length of the clip (s)")
        axes.set_ylabel(f"{clock} for every second of audio (s)")
        if any(row.summed for points in lines.values() for row in points):
            axes.text(0.02, 0.97, "hollow: summed up from layers", transform=axes.transAxes, va="top", fontsize=9)
        ends = {
            method: (points[-1].seconds, points[-1].median / points[-1].seconds) for method, points in lines.items()
        }
        label_ends(axes, ends, {method: colour for method, (colour, _) in style.items()})
    save(figure, path)
    return True


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """In Markdown."""
    header = tuple(header)
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ("---",) * len(header), *rows)]
    return "\n".join(lines) + "\n"


def in_seconds(value: float) -> str:
    """With three digits that matter, from milliseconds on."""
    return f"{1e3 * value:.3g} ms" if value < 0.1 else f"{value:.3g} s" if value < 100 else f"{value:.0f} s"


def figures(rows: Iterable[Row]) -> str:
    """Every figure of some rows."""
    rows = list(rows)
    header = ["clip", "method", "median", "fastest", "ratio to dense", "FLOP ratio", "share reached", "peak memory"]
    errors = any(row.error is not None for row in rows)
    cells = [
        [
            f"{row.seconds:g} s" + " *" * row.summed,
            row.method,
            in_seconds(row.median),
            in_seconds(row.minimum),
            f"{row.ratio:.2f}",
            f"{row.flop_ratio:.2f}",
            f"{row.ratio / row.flop_ratio:.0%}",
            f"{row.peak_mb:.0f} MB" if row.peak_mb else "not counted",
            *(["" if row.error is None else f"{row.error:.0e}"] if errors else []),
        ]
        for row in rows
    ]
    return table([*header, *(["error"] if errors else [])], cells)


def page(found: dict[str, list[Any]], picture: str | None) -> str:
    """All results as a page of Markdown."""
    order = [*METHODS]
    rows = sorted(found["rows"], key=lambda row: (row.seconds, order.index(row.method) if row.method in order else 99))
    lines = [
        "# Time and memory",
        "",
        "Written by `examples/benchmark.py`, whose first lines say how it measures. `ratio` is dense attention's",
        "median time over the method's, `FLOP ratio` the same for the arithmetic, which is the most that can be",
        "reached. `paper` is `LiteFocusConfig.paper()`, `native window` is `time_window=256`, `published arithmetic`",
        "the published code's formula, which materialises its scores; time tiles have the native length of 10.24 s;",
        "token merging takes half of the tokens by tomesd's functions. In the rows of one attention call, `no window`",
        "is the paper's focus sets with weights, `merged` one unmasked fused call for every weight, merged by their",
        "log-sum-exps. Seconds on a CPU are CPU seconds; the peak of the memory is what a run allocates on top of its",
        "inputs and of the weights.",
        "",
    ]
    if picture:
        lines += [f"![time of a step against the clip's length]({picture})", ""]
    for model in [*MODELS, "attention call"]:
        for device, dtype in dict.fromkeys((row.device, row.dtype) for row in rows if row.model == model):
            of = [row for row in rows if (row.model, row.device, row.dtype) == (model, device, dtype)]
            what = "One attention call of AudioLDM 2 (8 bins)" if model == "attention call" else f"One step of {model}"
            lines += [f"## {what}, {dtype} on {device.upper()}", "", figures(of)]
            if any(row.summed for row in of):
                lines += ["\\* summed up: one layer of every kind counts for all of its kind.", ""]
            lines += [*dict.fromkeys(f"- {row.measured}" for row in of), ""]
    if found["stages"]:
        lines += ["## AudioLDM 2, stage by stage", ""]
        header = ("clip", "stage", "time", "peak memory")
        cells = [
            (f"{row['seconds']:g} s", row["stage"], in_seconds(row["median"]), f"{row['peak_mb']:.0f} MB")
            for row in found["stages"]
        ]
        lines += [table(header, cells), *dict.fromkeys(f"- {row['measured']}" for row in found["stages"]), ""]
    if found["checks"]:
        lines += [
            "## Checks",
            "",
            table(("what", "result"), ((row["check"], row["result"]) for row in found["checks"])),
        ]
        lines += [*dict.fromkeys(f"- {row['measured']}" for row in found["checks"]), ""]
    return "\n".join(lines)


def environment(args: argparse.Namespace) -> str:
    """Where the figures come from."""
    if args.device.type == "cuda":
        hardware = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        names = [
            line.split(":")[1].strip()
            for file in [Path("/proc/cpuinfo")]
            if file.exists()
            for line in file.read_text().splitlines()
            if line.startswith("model name")
        ]
        instructions = torch.backends.cpu.get_cpu_capability()
        hardware = f"{names[0] if names else platform.machine()} ({instructions}), {args.threads} thread(s)"
    allocator = [f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith("MALLOC_")]
    parts = [hardware, f"torch {torch.__version__}", f"diffusers {diffusers.__version__}", f"{args.rounds} rounds"]
    return ", ".join([*parts, str(date.today()), *allocator]) + f": `{args.command}`"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("call", "step", "stages", "gpu"), default="call")
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=["audioldm2"], help="of step (default: audioldm2)"
    )
    parser.add_argument("--seconds", nargs="+", type=float, help="default: 80; of step: 10 20 40 80 160 320 600")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all; of stages: dense litefocus")
    parser.add_argument(
        "--sum-above", type=float, default=160.0, help="on a CPU, longer steps are summed up from layers"
    )
    parser.add_argument("--steps", type=int, default=200, help="of stages (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--device", help="default: cuda where there is one; gpu: cuda")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float32, on CUDA float16")
    parser.add_argument("--compile", action="store_true", help="step: also through torch.compile; not of sums")
    parser.add_argument("--flex", action="store_true", help="call: also by FlexAttention")
    parser.add_argument("--tests", action="store_true", help="gpu: also the test suite on the device")
    parser.add_argument("--minutes", type=float, default=9.5, help="gpu: how long it may take (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="step: at 20 s, one round; gpu: a small model, two lengths"
    )
    parser.add_argument("--output", type=Path, metavar="NAME", help="write NAME.json, NAME.md in capitals and NAME.png")
    args = parser.parse_args(argv)
    words = " ".join(sys.argv[1:] if argv is None else argv)
    args.command = "python examples/benchmark.py " + words.replace(f" --output {args.output}", "")
    there = torch.cuda.is_available()
    args.device = torch.device(args.device or ("cuda" if there or args.what == "gpu" else "cpu"))
    if args.device.type == "cuda" and not there:
        parser.error("torch finds no CUDA device; --device cpu runs on the CPU, gpu best with --quick")
    args.dtype = args.dtype or ("float16" if args.device.type == "cuda" else "float32")
    args.backends = []
    if args.quick:
        args.rounds, args.seconds = 1, args.seconds or [20.0]
    args.seconds = args.seconds or ([10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 600.0] if args.what == "step" else [80.0])
    args.methods = args.methods or (["dense", "litefocus"] if args.what == "stages" else list(METHODS))
    args.methods = list(dict.fromkeys(["dense", *args.methods]))  # what the others are compared with
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results = Results(args.output)
    print(environment(args))
    with torch.inference_mode(), tqdm(desc="runs", mininterval=5) as bar:
        if args.what == "gpu":
            gpu(args, results, bar)
        elif args.what == "stages":
            for seconds in args.seconds:
                for stage in stages(seconds, args, bar):
                    tqdm.write(f"{seconds:g} s, {stage['stage']}: {stage['median']:.1f} s, {stage['peak_mb']:.0f} MB")
                    results.add("stages", [stage])
        elif args.what == "call":
            for seconds in args.seconds:
                rows, refused = call(seconds, args, bar)
                results.add("rows", rows)
                tqdm.write("\n".join([f"one attention call, {seconds:g} s of audio", figures(rows), *refused]))
        else:
            for model, seconds in itertools.product(args.models, args.seconds):
                rows = step(model, seconds, args, bar)
                results.add("rows", rows)
                tqdm.write("\n".join([f"one step of {model}", figures(rows)]))
    results.write()


if __name__ == "__main__":
    main()
