"""The ways to run self-attention that are measured: those of `compare.py`, the published code's, and a control."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from compare import Merged, Method, Peer, Tiles, flop_ratio, install, installed
from torch import Tensor

from litefocus import _patch

__all__ = ["Merged", "Method", "Peer", "Published", "SelfOnly", "Tiles", "flop_ratio", "install", "running"]

PUBLISHED_BINS, PUBLISHED_RATIO = 8, 0.1  # the level that the published code covers, and how many tokens it samples


def published(query: Tensor, key: Tensor, value: Tensor, sample: Tensor, freq_bins: int = PUBLISHED_BINS) -> Tensor:
    """The formula of the published code: scores of own-bin keys and of one sample of all tokens, materialised.

    Args:
        query: (batch, heads, num_frames * freq_bins, head_dim), as key and value.
        key: see query.
        value: see query.
        sample: (sampled,) indices of tokens; a token of the query's own bin among them counts twice.
        freq_bins: frequency bins of the grid.

    Returns:
        (batch, heads, tokens, head_dim).

    Source: the formula of arXiv 2407.10468, section 3, as its published code evaluates it.
    """
    queries, keys, values = (x.unflatten(2, (-1, freq_bins)).transpose(2, 3) for x in (query, key, value))
    own = queries @ keys.transpose(-1, -2)  # (batch, heads, bins, frames, frames)
    cross = (query @ key[:, :, sample].transpose(-1, -2)).unflatten(2, (-1, freq_bins)).transpose(2, 3)
    weights = (torch.cat([own, cross], dim=-1) * query.shape[-1] ** -0.5).softmax(dim=-1)
    own, cross = weights.split([own.shape[-1], len(sample)], dim=-1)
    return (own @ values + cross @ value[:, :, None, sample]).transpose(2, 3).flatten(2, 3)


class Published(Peer):
    """The published code's formula, on the levels that it covers."""

    def own(self, attn: Any, x: Tensor) -> Tensor:
        """See `published`; another sample at every call."""
        if self.freq_bins != PUBLISHED_BINS:
            return self.original(attn, x)
        q, k, v = (f(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v))
        sample = torch.randperm(x.shape[1], device=x.device)[: round(PUBLISHED_RATIO * x.shape[1])]
        return attn.to_out[0](published(q, k, v, sample).transpose(1, 2).flatten(2))

    def kept(self, frames: int) -> float:
        """Keys of the own bin and of the sample."""
        return 1 / self.freq_bins + PUBLISHED_RATIO if self.freq_bins == PUBLISHED_BINS else 1.0


class SelfOnly(Peer):
    """The control: every token attends to itself alone."""

    def own(self, attn: Any, x: Tensor) -> Tensor:
        """Values go straight to the output projection."""
        return attn.to_out[0](attn.to_v(x))


def running(
    pipe: Any, method: Method, native_frames: int, num_samples: int | None = None
) -> contextlib.AbstractContextManager[None]:
    """`compare.installed`; `num_samples`: how many samples a patched layer has, of which every step takes one."""
    if num_samples is None:
        return installed(pipe, method, native_frames)
    return _patch.patch_with(pipe, method, num_samples=num_samples)
