"""Time and memory of one self-attention call: dense, published LiteFocus arithmetic, and litefocus.

    python examples/benchmark.py                       # 80 s at F = 8 in AudioLDM 2's shapes
    python examples/benchmark.py --step --rounds 3     # a whole step of AudioLDM 2's UNet, minutes a round

Methods alternate within a round, since machines drift; seconds are CPU seconds, ratios are of medians of one run.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AudioLDM2UNet2DConditionModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import litefocus
from litefocus import LiteFocusConfig, focus_attention, focus_set

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
    batch, heads, _, dim = query.shape
    rows = [x.view(batch, heads, -1, FREQ_BINS, dim).transpose(2, 3) for x in (query, key, value)]
    own = rows[0] @ rows[1].transpose(-1, -2)  # (batch, heads, bins, frames, frames)
    cross = (query @ key[:, :, sample].transpose(-1, -2)).view(batch, heads, -1, FREQ_BINS, len(sample)).transpose(2, 3)
    weights = (torch.cat([own, cross], dim=-1) * dim**-0.5).softmax(dim=-1)
    own, cross = weights.split([own.shape[-1], len(sample)], dim=-1)
    return (own @ rows[2] + cross @ value[:, :, None, sample]).transpose(2, 3).reshape(query.shape)


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
    return title + f"{sum(x.nbytes for x in (q, k, v)) / 1e6:.0f} MB", {
        "dense SDPA": Call(lambda: F.scaled_dot_product_attention(q, k, v), 1.0),
        "published arithmetic": Call(lambda: published(q, k, v, sample), tokens / (frames + len(sample))),
        "litefocus": Call(lambda: focus_attention(q, k, v, focus), tokens / focus.keys_per_query),
        "litefocus, time_window=256": Call(
            lambda: focus_attention(q, k, v, windowed), tokens / windowed.keys_per_query
        ),
    }


def unet_step(seconds: float) -> tuple[str, dict[str, Call]]:
    """One step of AudioLDM 2's UNet at its published widths. The weights are random: speed does not depend on them."""
    unet = AudioLDM2UNet2DConditionModel(
        in_channels=8,
        out_channels=8,
        block_out_channels=(128, 256, 384, 640),
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
        cross_attention_dim=((None, 768, 1024),) * 4,
    ).eval()
    # what status() reads of a pipeline: 64 mel bins, 100 mel frames a second, VAE scale factor 4
    pipe = SimpleNamespace(
        unet=unet,
        vae=SimpleNamespace(config=SimpleNamespace(block_out_channels=(128, 256, 512))),
        vocoder=SimpleNamespace(
            config=SimpleNamespace(model_in_dim=64, sampling_rate=16000, upsample_rates=(5, 4, 2, 2, 2))
        ),
    )
    inputs = {
        "sample": torch.randn(BATCH, 8, math.ceil(25 * seconds), 16),
        "timestep": torch.tensor(1),
        "encoder_hidden_states": torch.randn(BATCH, 8, 768),
        "encoder_hidden_states_1": torch.randn(BATCH, 16, 1024),
    }

    def dense() -> Tensor:
        return unet(**inputs).sample

    def patched(**options: Any) -> Call:
        def run() -> Tensor:
            with litefocus.patch(pipe, **options):
                return dense()

        with litefocus.patch(pipe, **options):
            flops = litefocus.status(pipe, seconds).flops
        assert flops is not None
        return Call(run, flops.ratio)

    calls = {
        "dense SDPA": Call(dense, 1.0),
        "litefocus": patched(),
        "litefocus, min_freq_bins=2": patched(min_freq_bins=2),
        "litefocus, min_freq_bins=2, time_window=256": patched(min_freq_bins=2, time_window=256),
    }
    return f"one step of AudioLDM 2's UNet, batch {BATCH}", calls


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=80.0, help="length of the clip (default: %(default)s)")
    parser.add_argument("--step", action="store_true", help="a whole step of AudioLDM 2's UNet instead of one call")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    title, methods = (unet_step if args.step else attention_call)(args.seconds)
    took: dict[str, list[float]] = {name: [] for name in methods}
    peak: dict[str, int] = {}
    with torch.inference_mode():
        for name, call in methods.items():  # also warms up
            with PeakMemory() as memory:
                call.run()
            peak[name] = memory.peak
        for _ in tqdm(range(args.rounds), desc="rounds"):
            for name, call in methods.items():
                started = time.process_time()
                call.run()
                took[name].append(time.process_time() - started)

    print(
        f"{args.seconds:g} s of audio, {title}; {platform.machine()}, {args.threads} threads, "
        f"torch {torch.__version__}, {args.rounds} rounds, {date.today()}"
    )
    print("| method | CPU s, median | minimum | ratio to dense | FLOP ratio | share reached | peak memory, MB |")
    print("|---|---|---|---|---|---|---|")
    dense = statistics.median(took["dense SDPA"])
    for name, call in methods.items():
        ratio = dense / statistics.median(took[name])
        print(
            f"| {name} | {dense / ratio:.3f} | {min(took[name]):.3f} | {ratio:.2f} | {call.flop_ratio:.2f} "
            f"| {ratio / call.flop_ratio:.0%} | {peak[name] / 1e6:.0f} |"
        )


if __name__ == "__main__":
    main()
