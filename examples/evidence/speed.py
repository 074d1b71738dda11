"""Time and memory of LiteFocus beside dense attention, the paper's settings, time tiles and token merging.

    python examples/evidence/speed.py                       # one self-attention call of AudioLDM 2, 80 s
    python examples/evidence/speed.py step --models audioldm2 --seconds 10 80
    python examples/evidence/speed.py step --quick          # in about a minute
    python examples/evidence/speed.py gpu --output gpu      # what only a GPU shows, in one call of under ten minutes

Models have their published widths and random weights: speed does not depend on the weights. A step is one call of the
UNet with classifier-free guidance (batch 2). Methods alternate within a round, since machines drift; ratios are of the
medians of one run. On a CPU, seconds are CPU seconds with one thread and wall time with several; on CUDA, the device's
own, between events. `DeepCache N` is the mean of a full step and N - 1 cached ones. `--output NAME` adds the figures
to NAME.json, in place of older ones of the same thing, and writes NAME.md and NAME.png anew.

A bare machine with torch still needs `pip install diffusers transformers tomesd tqdm matplotlib scipy soundfile`, this
repository: `pip install --no-deps -e .`, and for DeepCache `pip install DeepCache==0.1.1`. `gpu` leaves out, and says
so, what there is no time for; `gpu --quick --device cpu` runs all of it in small, to see that it works. The tests run
on the device that LITEFOCUS_TEST_DEVICE names, a GPU where there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import math
import shlex
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from report import Row, by, interruptible, measured, merged, read, table, write

METHODS = ("dense", "litefocus", "paper", "time tiles", "token merging", "published arithmetic")
# {name: (method of the full steps, one of how many is full)}
CACHED = {
    f"{name}DeepCache {interval}": (method, interval)
    for interval in (2, 3)
    for name, method in (("", "dense"), ("litefocus + ", "litefocus"))
}
MODELS = ("audioldm2", "tango", "small")  # the last to see that everything works
HOWS = ("eager", "compiled", "CUDA graph")
PUBLISHED_SECONDS = 40.0  # above, the published arithmetic is left out: its scores take gigabytes a layer
PUBLISHED_TOKENS = 4096  # of a call of 8 bins at that length
BATCH = 2  # classifier-free guidance
WIDTHS = {8: 256, 4: 384, 2: 640}  # channels of AudioLDM 2's attention layers, by their frequency bins
KEY = ("model", "seconds", "method", "device", "dtype")  # what a row is about


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="?", choices=("call", "step", "gpu"), default="call")
    add("--models", nargs="+", choices=MODELS, default=["audioldm2"], help="of step (default: audioldm2)")
    add("--seconds", nargs="+", type=float, help="default: 80; of step: 10 20 40 80 160 320 600")
    methods = (*METHODS, *CACHED)
    add(
        "--methods",
        nargs="+",
        choices=methods,
        default=METHODS,
        metavar="METHOD",
        help=f"of step: {', '.join(methods)}",
    )
    add("--bins", nargs="+", type=int, choices=WIDTHS, default=[8], help="of call (default: %(default)s)")
    add("--how", choices=HOWS, default="eager", help="of step (default: %(default)s)")
    add("--sum-above", type=float, default=160.0, help="on a CPU, longer steps are summed up from layers")
    add("--rounds", type=int, default=3, help="default: %(default)s")
    add("--threads", type=int, help="default: torch's")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one; gpu: cuda")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float32, on CUDA float16")
    add("--minutes", type=float, default=9.5, help="gpu: how long it may take (default: %(default)s)")
    add("--quick", action="store_true", help="one round, of 20 s; gpu: a small model, two lengths")
    add("--output", type=Path, metavar="NAME", help="write NAME.json, NAME.md and NAME.png")
    args = parser.parse_args(argv)
    words = shlex.join(sys.argv[1:] if argv is None else argv)
    args.command = "python examples/evidence/speed.py " + words.replace(f" --output {args.output}", "")
    if args.quick:
        args.rounds, args.seconds = 1, args.seconds or [20.0]
    args.seconds = args.seconds or ([10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 600.0] if args.what == "step" else [80.0])
    if args.rounds < 1 or min(args.seconds) < 0.5:
        parser.error("--rounds must be at least 1, and --seconds at least 0.5")
    bases = [CACHED[name][0] for name in args.methods if name in CACHED]
    args.methods = list(dict.fromkeys(["dense", *bases, *args.methods]))  # dense: what the others are compared with
    return args


if __name__ == "__main__":
    parse()  # `--help` and mistakes are answered before the imports below, which take seconds

with interruptible():
    import _cli
    import torch
    import torch.nn.functional as F
    from diffusers import AudioLDM2UNet2DConditionModel, AutoencoderKL, UNet2DConditionModel
    from methods import PUBLISHED_BINS, Merged, Method, Peer, Published, Tiles, flop_ratio, install, published
    from plots import label_points, log_axis, panels, save, styles
    from torch import Tensor, nn
    from torch.utils._python_dispatch import TorchDispatchMode
    from tqdm import tqdm
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    import litefocus
    from litefocus import LiteFocusConfig, focus_attention, focus_set
    from litefocus._grid import halved
    from litefocus._probe import NATIVE_FRAMES

WAYS: dict[str, Method] = {
    "dense": None,
    "litefocus": LiteFocusConfig(),
    "paper": LiteFocusConfig.paper(),
    "time tiles": Tiles,
    "token merging": Merged,
    "published arithmetic": Published,
}


# ----------------------------------------------------------------------------------------------------- measuring

WARM_ENOUGH = 10.0  # seconds, after which warming up and counting memory no longer matter
QUEUED = 0.05  # seconds of work between two events, so that starting it does not count


class PeakMemory(TorchDispatchMode):
    """Counts how many bytes of tensors allocated inside live at once (`peak`), on any device, also of fake tensors."""

    live = peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        outputs = func(*args, **(kwargs or {}))
        for x in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in inputs:
                self.live += x.untyped_storage().nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(x.untyped_storage(), self._free, x.untyped_storage().nbytes())
        return outputs

    def _free(self, size: int) -> None:
        self.live -= size


def clock() -> float:
    """CPU seconds of this process with one thread, wall time with several."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run by `clock`; on CUDA the device's, the mean over as many runs as fill QUEUED."""
    if device.type != "cuda":
        started = clock()
        run()
        return clock() - started

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


def run_with_peak(run: Callable[[], Any], device: torch.device, *, compiled: bool = False) -> tuple[float, int]:
    """Seconds of a run, on CUDA of the second, and bytes at its peak above what was there before.

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


def page_faults() -> int:
    """Of this process so far: pages that the system had to map, mostly for new memory."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@dataclass
class Timed:
    """Runs of one thing. seconds, faults: of every round. peak: bytes."""

    seconds: list[float] = field(default_factory=list)
    faults: list[int] = field(default_factory=list)
    peak: int = 0


def measure(runs: dict[str, Callable[[], Any]], args: argparse.Namespace, bar: Any) -> dict[str, Timed]:
    """Time `runs`, which alternate.

    The first round warms up and counts memory. It is timed as well if it took longer than WARM_ENOUGH and compiled
    nothing.
    """
    timed = {name: Timed() for name in runs}
    for warm_up in (True, *[False] * args.rounds):
        for name, run in runs.items():
            of = timed[name]
            if len(of.seconds) == args.rounds:
                continue
            bar.set_postfix_str(name)
            compiled, before = name.endswith("compiled"), page_faults()
            if warm_up:
                spent, of.peak = run_with_peak(run, args.device, compiled=compiled)
            else:
                spent = seconds_of(run, args.device)
            if not warm_up or (spent > WARM_ENOUGH and not compiled):
                of.seconds.append(spent)
                of.faults.append(page_faults() - before)
            bar.update()
    return timed


def rows_of(
    model: str,
    seconds: float,
    timed: dict[str, Timed],
    flop_ratios: dict[str, float],
    args: argparse.Namespace,
    summed: bool = False,
) -> list[Row]:
    """A row for every method of `timed`, the first of which is dense.

    seconds: of audio. median, minimum: seconds of a run. ratio, flop_ratio: dense / this, in time and in arithmetic,
    which is not counted where steps differ. faults: median of a run, None where runs are not whole. summed: from single
    layers and the rest of a step. measured: on what, when, and by which command.
    """
    medians = {method: statistics.median(of.seconds) for method, of in timed.items()}
    dense = next(iter(medians.values()))
    common = {"device": args.device.type, "dtype": args.dtype, "summed": summed}
    where = f"{measured(args.device.type, f'{args.rounds} rounds')}: `{args.command}`"
    several = (
        f", {torch.get_num_threads()} threads" if args.device.type == "cpu" and torch.get_num_threads() > 1 else ""
    )
    rows = []
    for method, of in timed.items():
        row: Row = {"model": model, "seconds": seconds, "method": method + several, **common}
        row |= {"median": medians[method], "minimum": min(of.seconds), "ratio": dense / medians[method]}
        row |= {"flop_ratio": flop_ratios.get(method), "peak_mb": of.peak / 1e6, "measured": where}
        row |= {"faults": statistics.median(of.faults) if of.faults else None}
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------- one attention call

HEADS = 8
CALL = "attention call, {} bins"


def in_tiles(query: Tensor, key: Tensor, value: Tensor, size: int) -> Tensor:
    """Dense attention in tiles of `size` tokens, whole ones side by side in the batch, and the rest."""
    whole = query.shape[2] // size * size
    tiles = (x[:, :, :whole].unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    output = F.scaled_dot_product_attention(*tiles).unflatten(0, (len(query), -1)).transpose(1, 2).flatten(2, 3)
    rest = F.scaled_dot_product_attention(*(x[:, :, whole:] for x in (query, key, value)))
    return torch.cat([output, rest], dim=2)


def attention_calls(frames: int, bins: int, device: torch.device) -> dict[str, tuple[Callable[..., Tensor], float]]:
    """The ways to run one self-attention call, and how many times less arithmetic than dense each needs."""
    tokens, level = frames * bins, int(math.log2(16 // bins))
    calls: dict[str, tuple[Callable[..., Tensor], float]] = {"dense": (F.scaled_dot_product_attention, 1.0)}
    if tokens <= PUBLISHED_TOKENS and bins == PUBLISHED_BINS:
        sample = torch.randperm(tokens, device=device)[: tokens // 10]
        ratio = tokens / (frames + len(sample))
        calls["published arithmetic"] = functools.partial(published, sample=sample, freq_bins=bins), ratio
    settings = {
        name: way for name, way in WAYS.items() if isinstance(way, LiteFocusConfig) and bins >= way.min_freq_bins
    }
    settings["no window"] = LiteFocusConfig.paper(reweight=True)
    for name, config in settings.items():
        if config.time_window is not None:  # it counts frames of the UNet's input
            config = replace(config, time_window=halved(config.time_window, level))
        focus = focus_set(frames, bins, config).to(device)
        calls[name] = functools.partial(focus_attention, focus=focus), tokens / focus.keys_per_query
    native = halved(NATIVE_FRAMES, level)
    if frames > native:
        ratio = 1 / Tiles(None, bins, NATIVE_FRAMES).kept(frames)
        calls["time tiles"] = functools.partial(in_tiles, size=native * bins), ratio
    return calls


def call(seconds: float, bins: int, args: argparse.Namespace, bar: Any) -> list[Row]:
    """Rows of one attention call, of `seconds` by the paper's count, in which 80 s are 1024 frames of 8 bins."""
    frames = round(seconds * 1.6 * bins)
    # as a UNet's projections come: heads within each token; on a GPU not twice the same, which its cache would hold
    copies = 4 if args.device.type == "cuda" else 1
    shape = BATCH, frames * bins, HEADS, WIDTHS[bins] // HEADS
    kind = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    qkvs = [[torch.randn(*shape, **kind).transpose(1, 2) for _ in range(3)] for _ in range(copies)]
    rotating = itertools.cycle(qkvs)
    calls = attention_calls(frames, bins, args.device)
    runs = {name: lambda run=run: run(*next(rotating)) for name, (run, _) in calls.items()}
    ratios = {name: ratio for name, (_, ratio) in calls.items()}
    return rows_of(CALL.format(bins), seconds, measure(runs, args, bar), ratios, args)


# ----------------------------------------------------------------------------------------------------- one step


def unet_of(model: str) -> nn.Module:
    """A UNet with its published widths and random weights."""
    channels = {"in_channels": 8, "out_channels": 8}
    if model == "tango":
        return UNet2DConditionModel(
            **channels,
            block_out_channels=(320, 640, 1280, 1280),
            attention_head_dim=(5, 10, 20, 20),
            cross_attention_dim=1024,
            use_linear_projection=True,
            upcast_attention=True,
        )
    return AudioLDM2UNet2DConditionModel(
        **channels,
        block_out_channels=(32, 32, 64, 64) if model == "small" else (128, 256, 384, 640),
        layers_per_block=1 if model == "small" else 2,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
        cross_attention_dim=((None, 768, 1024),) * 4,
    )


def decoders() -> Any:
    """VAE and vocoder of AudioLDM 2 at their published widths, in half precision; their shapes alone."""
    config = SpeechT5HifiGanConfig(
        model_in_dim=64,
        upsample_initial_channel=1024,
        upsample_rates=(5, 4, 2, 2, 2),
        upsample_kernel_sizes=(16, 16, 8, 4, 4),
    )
    with torch.device("meta"):
        vae = AutoencoderKL(
            in_channels=1,
            out_channels=1,
            block_out_channels=(128, 256, 512),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=8,
        )
        return SimpleNamespace(vae=vae.half(), vocoder=SpeechT5HifiGan(config).half())


def build(model: str, args: argparse.Namespace) -> Any:
    """What litefocus reads of a pipeline: a UNet, and the shapes of VAE and vocoder."""
    return SimpleNamespace(unet=unet_of(model).eval().to(args.device, getattr(torch, args.dtype)), **vars(decoders()))


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
    given: dict[str, Any] = {"sample": draw(8, math.ceil(25 * seconds), 16), "timestep": timestep, "return_dict": False}
    if isinstance(unet, AudioLDM2UNet2DConditionModel):
        return given | {"encoder_hidden_states": draw(8, 768), "encoder_hidden_states_1": draw(16, 1024)}
    return given | {"encoder_hidden_states": draw(16, 1024)}


def step(model: str, seconds: float, args: argparse.Namespace, bar: Any) -> list[Row]:
    """Rows of one step of a model's UNet at one length."""
    pipe = build(model, args)
    uncached = [name for name in args.methods if name not in CACHED]
    methods = [name for name in uncached if WAYS[name] is not Published or seconds <= PUBLISHED_SECONDS]
    given = [inputs(pipe.unet, seconds, args) for _ in range(2 if args.device.type == "cuda" else 1)]
    flop_ratios = {name: flop_ratio(pipe, WAYS[name], seconds) for name in methods}
    pipes = {name: twin(pipe, WAYS[name]) for name in methods}
    if args.device.type == "cpu" and seconds > args.sum_above:
        timed = summed(pipes, seconds, given[0], args, bar)
        add_cached(timed, pipes, given[0], args)
        return rows_of(model, seconds, timed, flop_ratios, args, summed=True)
    rotating = itertools.cycle(given)
    runs: dict[str, Callable[[], Any]] = {}
    for name, other in pipes.items():
        if args.how == "CUDA graph":
            runs[name] = captured(functools.partial(other.unet, **given[0]), args.device)
        else:
            unet = torch.compile(other.unet, dynamic=False) if args.how == "compiled" else other.unet
            runs[name] = lambda unet=unet: unet(**next(rotating))
    if args.how != "eager":
        runs, flop_ratios = ({f"{name}, {args.how}": x for name, x in of.items()} for of in (runs, flop_ratios))
    timed = measure(runs, args, bar)
    if args.how == "eager":
        add_cached(timed, pipes, given[0], args)
    return rows_of(model, seconds, timed, flop_ratios, args)


def add_cached(timed: dict[str, Timed], pipes: dict[str, Any], given: dict[str, Any], args: argparse.Namespace) -> None:
    """Add the methods of CACHED: means of the full steps that were measured, and of steps whose features are kept."""
    wanted = {name: CACHED[name] for name in args.methods if name in CACHED}
    sample, timestep, others = given["sample"], given["timestep"], {**given}
    del others["sample"], others["timestep"]
    for method in dict.fromkeys(method for method, _ in wanted.values()):
        pipe = pipes[method]
        pipe.scheduler = SimpleNamespace(timesteps=[0, 1])
        helper = _cli.cache_steps(pipe, 2)
        full, cached = (functools.partial(pipe.unet, sample, torch.full_like(timestep, i), **others) for i in (0, 1))
        _, peak = run_with_peak(full, args.device)
        cached()
        spent = statistics.median(seconds_of(cached, args.device) for _ in range(args.rounds))
        helper.disable()
        for name, (of, interval) in wanted.items():
            if of == method:
                seconds = [(each + (interval - 1) * spent) / interval for each in timed[method].seconds]
                timed[name] = Timed(seconds, peak=peak)


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


def summed(
    pipes: dict[str, Any], seconds: float, given: dict[str, Any], args: argparse.Namespace, bar: Any
) -> dict[str, Timed]:
    """As `measure`, for steps that take too long: of layers that cost the same, the first counts for all.

    The others do nothing. What is left of a step is the same for every method, so its median is taken over all runs.
    """
    rests: list[float] = []
    timed = {method: Timed() for method in pipes}
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
                spent[layer] = -clock()

            def after(layer: Any, _: Any, __: Any, spent: dict[Any, float] = spent) -> None:
                spent[layer] += clock()

            layer.register_forward_pre_hook(before)
            layer.register_forward_hook(after)
        for _ in range(args.rounds):
            bar.set_postfix_str(method)
            total, timed[method].peak = run_with_peak(functools.partial(pipe.unet, **given), args.device)
            rests.append(total - sum(spent.values()))
            timed[method].seconds.append(sum(counts[layer] * spent[layer] for layer in counts))
            bar.update()
    rest = statistics.median(rests)
    for of in timed.values():
        of.seconds = [rest + each for each in of.seconds]
    return timed


# ------------------------------------------------------------------------------------------------------------ a GPU


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


def gpu(args: argparse.Namespace, add: Callable[..., None], bar: Any) -> None:
    """What only a GPU shows, until `--minutes` are over: half precision, fused kernels, CUDA graphs, compiled steps."""
    ends = time.monotonic() + 60 * args.minutes
    cuda = args.device.type == "cuda"
    model, lengths = ("small", [1.0, 2.0]) if args.quick else ("audioldm2", [10.0, 80.0, 40.0, 300.0])
    dtypes = ["float16", "bfloat16"] if cuda else ["float32", "bfloat16"]

    def check(what: str, result: str) -> None:
        add("checks", [{"check": what, "result": result, "measured": measured(args.device.type)}])

    def part(what: str, run: Callable[[], list[Row]], needs: float) -> None:
        """Run what takes about `needs` seconds. Where it fails, or no time is left, that is its result."""
        if time.monotonic() + needs > ends:
            check(what, f"left out, as {args.minutes:g} minutes are over")
            return
        try:
            add("rows", run())
        except Exception as error:
            check(what, f"{type(error).__name__}: {str(error)[:300]}")

    for args.dtype in dict.fromkeys(["float32", *dtypes]):
        check(f"error of focus_attention in {args.dtype}", f"{exactness(args):.1e}")
    for args.dtype, seconds in itertools.product(dtypes, lengths):
        part(f"call, {args.dtype}, {seconds:g} s", functools.partial(call, seconds, 8, args, bar), needs=30)
    for args.how, args.dtype, seconds in itertools.product(("eager", "CUDA graph", "compiled"), dtypes, lengths):
        if args.how != "eager":
            args.methods = ["dense", "litefocus"]
        what = f"step, {args.how}, {args.dtype}, {seconds:g} s"
        part(what, functools.partial(step, model, seconds, args, bar), needs=90 if args.how == "compiled" else 20)


# ---------------------------------------------------------------------------------------------------------- writing


def in_seconds(value: float) -> str:
    """With three digits that matter, from milliseconds on."""
    return f"{1e3 * value:.3g} ms" if value < 0.1 else f"{value:.3g} s" if value < 100 else f"{value:.0f} s"


def figures(rows: Iterable[Row]) -> str:
    """A table with every figure of some rows."""
    header = (
        "clip",
        "method",
        "median",
        "fastest",
        "ratio to dense",
        "FLOP ratio",
        "share reached",
        "memory",
        "page faults",
    )
    cells = [
        [
            f"{row['seconds']:g} s" + " *" * row["summed"],
            row["method"],
            in_seconds(row["median"]),
            in_seconds(row["minimum"]),
            f"{row['ratio']:.2f}",
            f"{row['flop_ratio']:.2f}" if row["flop_ratio"] else "-",
            f"{row['ratio'] / row['flop_ratio']:.0%}" if row["flop_ratio"] else "-",
            f"{row['peak_mb']:.0f} MB" if row["peak_mb"] else "not counted",
            f"{row['faults'] / 1e3:.0f} thousand" if row.get("faults") is not None else "not counted",
        ]
        for row in rows
    ]
    return table(header, cells)


def page(record: dict[str, list[Row]], picture: str) -> str:
    """All results as a page of Markdown."""
    lines = [
        "# Time and memory",
        "",
        "Written by `examples/evidence/speed.py`, whose first lines say how it measures. `ratio` is the median",
        "time of dense attention in the same run over the method's, `FLOP ratio` the same for the arithmetic.",
        "`paper` is `LiteFocusConfig.paper()`, `published arithmetic` the published code's formula, which materialises",
        "its scores; time tiles have the native length of 10.24 s; token merging takes half of the tokens by tomesd's",
        "functions. `DeepCache N` computes the deep layers at one of N steps; its figures are means of N steps. In",
        "the rows of one attention call, `no window` is the paper's focus sets with weights. Seconds on a CPU are CPU",
        "seconds, with several threads wall time; the memory is what a run allocates at its peak, on top of its",
        "inputs and of the weights. Page faults depend on what the process did before.",
        "",
    ]
    if picture:
        lines += [f"![time of a step against the clip's length]({picture})", ""]
    order = {method: place for place, method in enumerate((*METHODS, *CACHED))}
    rows = sorted(record["rows"], key=lambda row: (row["seconds"], order.get(row["method"], len(order))))
    groups = by(rows, "model", "device", "dtype")
    calls = [CALL.format(bins) for bins in WIDTHS]
    for model, device, dtype in sorted(groups, key=lambda key: [*MODELS, *calls].index(key[0])):
        of = groups[model, device, dtype]
        what = f"One {model} of AudioLDM 2" if model in calls else f"One step of {model}"
        lines += [f"## {what}, {dtype} on {device.upper()}", "", figures(of)]
        if any(row["summed"] for row in of):
            lines += ["\\* summed up: one layer of every kind counts for all of its kind.", ""]
        lines += [*dict.fromkeys(f"- {row['measured']}" for row in of), ""]
    if record["checks"]:
        checks = table(("what", "result"), ((row["check"], row["result"]) for row in record["checks"]))
        lines += ["## Checks", "", checks, *dict.fromkeys(f"- {row['measured']}" for row in record["checks"]), ""]
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> bool:
    """Time of a step for every second of audio against the clip's length; False where there are no lines to see.

    A panel for every model that was measured at three lengths or more, a line for every method that was at two. Flat is
    linear time.
    """
    rows = [row for row in rows if row["model"] in MODELS and row["method"] in METHODS]
    rows = sorted((row for row in rows if row["dtype"] == rows[0]["dtype"]), key=lambda row: row["seconds"])
    lines = by(rows, "model", "method")
    models = [model for model in MODELS if len(lines.get((model, "litefocus"), [])) > 2]
    if not models:
        return False
    figure, every = panels(len(models), width=7.5, height=4.8)
    for axes, model in zip(every, models, strict=True):
        methods = [method for method in METHODS if len(lines.get((model, method), [])) > 1]
        style, ends, costs, taken = styles(methods), {}, [], []
        for method in methods:
            colour, marker = style[method]
            points = [(row["seconds"], row["median"] / row["seconds"]) for row in lines[model, method]]
            axes.plot(
                *zip(*points, strict=True), color=colour, linewidth=2 if method in ("dense", "litefocus") else 1.2
            )
            for row, point in zip(lines[model, method], points, strict=True):
                axes.plot(*point, marker, color=colour, markerfacecolor="white" if row["summed"] else colour)
            ends[method] = points[-1]
            for (x, y), (x_next, y_next) in itertools.pairwise(points):  # places that names are not to cover
                taken += [(x * (x_next / x) ** (i / 40), y * (y_next / y) ** (i / 40)) for i in range(40)]
            costs += [cost for _, cost in points]
        shown = [row for row in rows if row["model"] == model]
        log_axis(axes, "x", {row["seconds"] for row in shown})
        ticks = [digit * 10.0**exponent for exponent in range(-6, 3) for digit in (1, 2, 5)]
        log_axis(axes, "y", [tick for tick in ticks if min(costs) / 1.5 < tick < 1.5 * max(costs)])
        clock = "CPU time" if shown[0]["device"] == "cpu" else "GPU time"
        axes.set(title=f"{model}: one step of the UNet", xlabel="length of the clip (s)")
        axes.set_ylabel(f"{clock} for every second of audio (s)")
        if any(row["summed"] for row in shown):
            axes.text(0.02, 0.97, "hollow: summed up from layers", transform=axes.transAxes, va="top", fontsize=9)
        label_points(axes, ends, {method: colour for method, (colour, _) in style.items()}, others=taken)
    save(figure, path)
    return True


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    args = parse(argv)
    there = torch.cuda.is_available()
    args.device = torch.device(args.device or ("cuda" if there or args.what == "gpu" else "cpu"))
    if args.device.type == "cuda" and not there:
        raise SystemExit("torch finds no CUDA device; --device cpu runs on the CPU, gpu best with --quick")
    args.dtype = args.dtype or ("float16" if args.device.type == "cuda" else "float32")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.manual_seed(0)
    file = args.output.with_suffix(".json") if args.output else None
    record = read(file, "rows", "checks") if file else {"rows": [], "checks": []}

    def add(kind: str, new: list[Row]) -> None:
        """Print new rows or checks, and write them down."""
        tqdm.write("\n".join(f"{row['check']}: {row['result']}" for row in new) if kind == "checks" else figures(new))
        record[kind] = merged(record[kind], new, *(("check",) if kind == "checks" else KEY))
        if file:
            write(file, record)

    print(measured(args.device.type))
    with torch.inference_mode(), tqdm(desc="runs", mininterval=5) as bar:
        if args.what == "gpu":
            gpu(args, add, bar)
        elif args.what == "call":
            for seconds, bins in itertools.product(args.seconds, args.bins):
                tqdm.write(f"one attention call, {bins} bins, {seconds:g} s of audio")
                add("rows", call(seconds, bins, args, bar))
        else:
            for model, seconds in itertools.product(args.models, args.seconds):
                tqdm.write(f"one step of {model}")
                add("rows", step(model, seconds, args, bar))
    if file:
        picture = file.with_suffix(".png")
        drawn = plot(record["rows"], picture)
        file.with_suffix(".md").write_text(page(record, picture.name if drawn else ""))


if __name__ == "__main__":
    with interruptible():
        main()
