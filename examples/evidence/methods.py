"""Other ways to run self-attention, to compare LiteFocus with, and how to put them on a pipeline and off again."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import litefocus
from litefocus import LiteFocusConfig

NATIVE_FRAMES = 256  # latent frames of the length that the published checkpoints were trained on, 10.24 s
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
        from tomesd.merge import bipartite_soft_matching_random2d

        tokens = x.shape[1]
        draw = torch.Generator(x.device).manual_seed(0)
        merge, unmerge = bipartite_soft_matching_random2d(
            x, self.freq_bins, tokens // self.freq_bins, 2, 2, tokens // 2, generator=draw
        )
        return unmerge(self.original(attn, merge(x)))

    def kept(self, frames: int) -> float:
        """Half the queries, half the keys; the matching's own arithmetic is not counted."""
        return 0.25


Method = LiteFocusConfig | type[Peer] | None
"""LiteFocus with these settings, a peer, or dense attention."""


def install(pipe: Any, peer: type[Peer], native_frames: int = NATIVE_FRAMES) -> list[tuple[Any, Any]]:
    """Put a peer on every self-attention layer of a pipeline, which has to be unpatched.

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
    if isinstance(method, LiteFocusConfig):
        with litefocus.patch(pipe, method):
            flops = litefocus.status(pipe, seconds=seconds).flops
        assert flops is not None
        return flops.ratio
    if method is None:
        return 1.0
    status = litefocus.status(pipe, seconds=seconds)
    assert status.flops is not None
    saved = 0.0
    for row in status.layers:
        frames, freq_bins = row.frames or 0, row.freq_bins or 0
        dense = 4 * (frames * freq_bins) ** 2 * pipe.unet.get_submodule(row.name).to_q.out_features
        saved += dense * (1 - method(None, freq_bins, native_frames).kept(frames))
    return status.flops.dense / (status.flops.dense - saved)
