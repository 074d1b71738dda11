"""Time and memory of one self-attention call: dense, published LiteFocus arithmetic, and litefocus.

    python examples/benchmark.py                 # 80 s at F = 8 in AudioLDM 2's shapes
    python examples/benchmark.py --seconds 40 --rounds 9

Methods alternate within a round, since machines drift; seconds are CPU seconds, ratios are of medians of one run.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import weakref
from collections.abc import Callable
from datetime import date
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from litefocus import focus_attention, focus_set

BATCH, HEADS, HEAD_DIM, FREQ_BINS = 2, 8, 32, 8  # AudioLDM 2 with classifier-free guidance, where most time goes
FRAMES_PER_SECOND = 12.8  # at that level, in the paper's count: 1024 frames at 80 s


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors allocated inside that live at the same time; `peak` is the most."""

    live = peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        outputs = func(*args, **(kwargs or {}))
        for x in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in inputs:
                storage = x.untyped_storage()
                self.live += storage.nbytes()
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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=80.0, help="length of the clip (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    frames = round(args.seconds * FRAMES_PER_SECOND)
    tokens = frames * FREQ_BINS
    # as a UNet's projections come: heads within each token
    q, k, v = (torch.randn(BATCH, tokens, HEADS, HEAD_DIM).transpose(1, 2) for _ in range(3))
    focus = focus_set(frames, FREQ_BINS)
    sample = torch.randperm(tokens)[: tokens // 10]
    methods: dict[str, tuple[Callable[[], Tensor], int]] = {  # the call, and how many keys a query sees
        "dense SDPA": (lambda: F.scaled_dot_product_attention(q, k, v), tokens),
        "published arithmetic": (lambda: published(q, k, v, sample), frames + len(sample)),
        "litefocus": (lambda: focus_attention(q, k, v, focus), focus.keys_per_query),
    }
    took: dict[str, list[float]] = {name: [] for name in methods}
    peak: dict[str, int] = {}
    with torch.inference_mode():
        for name, (call, _) in methods.items():
            with PeakMemory() as memory:
                call()
            peak[name] = memory.peak
        for _ in tqdm(range(args.rounds), desc="rounds"):
            for name, (call, _) in methods.items():
                started = time.process_time()
                call()
                took[name].append(time.process_time() - started)

    inputs = sum(x.nbytes for x in (q, k, v))
    print(
        f"one attention call at {args.seconds:g} s: B={BATCH} H={HEADS} d={HEAD_DIM} T={frames} F={FREQ_BINS} r=0.1; "
        f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}, {date.today()}"
    )
    print("| method | CPU s, median | minimum | ratio to dense | FLOP ratio | share reached | memory / (q, k, v) |")
    print("|---|---|---|---|---|---|---|")
    dense = statistics.median(took["dense SDPA"])
    for name, (_, keys) in methods.items():
        median = statistics.median(took[name])
        print(
            f"| {name} | {median:.3f} | {min(took[name]):.3f} | {dense / median:.2f} | {tokens / keys:.2f} "
            f"| {dense / median / (tokens / keys):.0%} | {peak[name] / inputs:.1f} |"
        )


if __name__ == "__main__":
    main()
