"""LiteFocus attention behind diffusers' attention-processor protocol."""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from litefocus.attention import focus_attention
from litefocus.config import LiteFocusConfig, positive_integer
from litefocus.focus import FocusSet, FreqAxis, check_freq_axis, focus_set, keys_per_query

# Keys that every query must save for a focus call to be cheaper than the dense one, which it is not where gathering
# takes longer than what it saves: at 2 bins, 29 saved keys cost 18 % more time and 57 take 16 % less (one CPU thread).
MIN_KEYS_SAVED = 48

LENGTHS_KEPT = 4  # focus sets kept per layer, so that a few clip lengths can alternate without rebuilding


class LiteFocusAttnProcessor:
    """Runs a layer's self-attention over focus sets, and hands every other call to the processor it replaced.

    original: the processor that was on the layer. It gets, unchanged, all calls that are not plain self-attention
        (cross-attention, a mask), all calls if `freq_bins` < `config.min_freq_bins`, and grids so small that
        focus sets would not be cheaper than dense attention (fewer than 48 keys saved).
    layer: name of the layer in its UNet, for messages and for the layer's own sample.
    freq_bins: frequency bins F of the grid at this layer. The number of frames is tokens / F, read at every call.
    config: settings, its `time_window` in frames of the UNet's input.
    level: how often the grid was halved on the way from the UNet's input to this layer.
    freq_axis: "width" or "height", see `focus_set`.

    Calls take and return what diffusers' `AttnProcessor2_0` does: hidden_states (batch, tokens, channels), or
    (batch, channels, height, width). Raises ValueError if the tokens of a call are no multiple of `freq_bins`.
    Source of the protocol: `AttnProcessor2_0.__call__` in diffusers/models/attention_processor.py.

    >>> import torch
    >>> from diffusers.models.attention_processor import Attention
    >>> attn = Attention(query_dim=16, heads=2, dim_head=8)
    >>> attn.set_processor(LiteFocusAttnProcessor(attn.processor, layer="attn1", freq_bins=8))
    >>> attn(torch.randn(1, 100 * 8, 16)).shape  # 100 frames x 8 bins
    torch.Size([1, 800, 16])
    """

    def __init__(
        self,
        original: Any,
        *,
        layer: str,
        freq_bins: int,
        config: LiteFocusConfig = LiteFocusConfig(),  # noqa: B008  (immutable)
        level: int = 0,
        freq_axis: FreqAxis = "width",
    ) -> None:
        check_freq_axis(freq_axis)
        self.original = original
        self.layer = layer
        self.freq_bins = positive_integer("freq_bins", freq_bins)
        self.config = config
        self.grid_config = config
        if config.time_window is not None:
            self.grid_config = replace(config, time_window=math.ceil(config.time_window / 2**level))
        self.freq_axis: FreqAxis = freq_axis
        self.removed = False  # by the patch's handle, which no surrounding `with` block may undo
        self._focus_sets: dict[tuple[int, torch.device], FocusSet] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layer={self.layer!r}, freq_bins={self.freq_bins}, config={self.config})"

    def __getstate__(self) -> dict[str, Any]:
        # copies and pickles rebuild their focus sets where they are used
        return {**self.__dict__, "_focus_sets": {}}

    def num_frames(self, tokens: int) -> int:
        """Frames of a grid of `tokens` tokens at this layer. Raises ValueError where they are no whole number."""
        if not tokens or tokens % self.freq_bins:
            raise ValueError(
                f"layer {self.layer!r}: {tokens} tokens cannot be laid out as frames x {self.freq_bins} frequency "
                "bins; unpatch, and patch again with the freq_bins of this UNet's latent (mel bins / VAE scale "
                "factor, 16 for AudioLDM-style pipelines)"
            )
        return tokens // self.freq_bins

    def keys_kept(self, num_frames: int) -> float:
        """Share of keys that self-attention over `num_frames` frames keeps, in (0, 1]; 1 where it stays dense."""
        if self.freq_bins < self.config.min_freq_bins:
            return 1.0
        tokens = num_frames * self.freq_bins
        keys = keys_per_query(num_frames, self.freq_bins, self.grid_config)
        return keys / tokens if tokens - keys >= MIN_KEYS_SAVED else 1.0

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        num_frames = None
        plain = encoder_hidden_states is None and attention_mask is None
        if plain and self.freq_bins >= self.config.min_freq_bins:
            tokens = hidden_states.shape[1] if hidden_states.ndim == 3 else hidden_states.shape[2:].numel()
            # operator.index: a plain int under torch.compile's dynamic shapes too, as the index needs one
            num_frames = self.num_frames(operator.index(tokens))
        if num_frames is None or self.keys_kept(num_frames) == 1:
            output: Tensor
            if args:  # further positional arguments keep their places
                call = (hidden_states, encoder_hidden_states, attention_mask, temb, *args)
                output = self.original(attn, *call, **kwargs)
                return output
            # by keyword, and only what was given: some processors take fewer arguments
            given = {
                "encoder_hidden_states": encoder_hidden_states,
                "attention_mask": attention_mask,
                "temb": temb,
                **kwargs,
            }
            given = {name: value for name, value in given.items() if value is not None}
            output = self.original(attn, hidden_states, **given)
            return output

        residual, input_shape = hidden_states, hidden_states.shape
        query, key, value = attention_inputs(attn, hidden_states, temb)
        focus = cached_focus_set(self, num_frames, query.device)
        hidden_states = focus_attention(query, key, value, focus)

        hidden_states = hidden_states.transpose(1, 2).flatten(2).to(query.dtype)
        hidden_states = attn.to_out[0](hidden_states)
        hidden_states = attn.to_out[1](hidden_states)
        if len(input_shape) == 4:
            hidden_states = hidden_states.transpose(1, 2).reshape(input_shape)
        if getattr(attn, "residual_connection", False):
            hidden_states = hidden_states + residual
        rescale: float = getattr(attn, "rescale_output_factor", 1.0)
        return hidden_states / rescale


def attention_inputs(attn: Any, hidden_states: Tensor, temb: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of a layer's self-attention as diffusers makes them: norms, projections, norms.

    hidden_states: (batch, tokens, channels) or (batch, channels, height, width).
    """
    # getattr, hasattr: the layers of early diffusers and of the original AudioLDM code lack some of these
    if getattr(attn, "spatial_norm", None) is not None:
        hidden_states = attn.spatial_norm(hidden_states, temb)
    if hidden_states.ndim == 4:
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
    if getattr(attn, "group_norm", None) is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
    query, key, value = project(attn, hidden_states)
    if getattr(attn, "norm_q", None) is not None:
        query = attn.norm_q(query)
    if getattr(attn, "norm_k", None) is not None:
        key = attn.norm_k(key)
    return query, key, value


def project(attn: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of a layer's self-attention, each (batch, heads, tokens, head_dim)."""
    heads = attn.heads if hasattr(attn, "heads") else attn.n_heads
    rows = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in rows)
    return query, key, value


def cached_focus_set(processor: LiteFocusAttnProcessor, num_frames: int, device: torch.device) -> FocusSet:
    """The layer's focus set on `device`, built at the first call for a length."""
    cache = processor._focus_sets
    focus = cache.get((num_frames, device))
    if focus is None:
        with torch.inference_mode(False):  # an index made in inference mode could not serve a later backward pass
            focus = focus_set(
                num_frames,
                processor.freq_bins,
                processor.grid_config,
                layer=processor.layer,
                freq_axis=processor.freq_axis,
            ).to(device)
        if type(focus.inverse) is not torch.Tensor:
            return focus  # made while torch.export or a FakeTensorMode traces: of no use outside
        for index in (focus.queries, focus.keys, focus.inverse):
            # what torch._dynamo.mark_static does, without loading it: constants have no symbolic sizes to guard
            index._dynamo_static_indices = set(range(index.ndim))  # type: ignore[attr-defined]
        for oldest in list(cache)[: 1 - LENGTHS_KEPT]:
            cache.pop(oldest, None)  # default: another thread may have been faster
        cache[num_frames, device] = focus
    return focus


# What torch.compiler.assume_constant_result does, without loading the compiler at import (2 s): torch.compile then
# takes the index as a constant of the graph, where building it inside would break the graph.
cached_focus_set._dynamo_marked_constant = True  # type: ignore[attr-defined]
