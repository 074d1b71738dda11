"""Slow, obvious attention that the tests hold the library to. Nothing here is built the way the library builds it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from litefocus import FocusSet, LiteFocusConfig, focus_set


def bias(focus: FocusSet) -> Tensor:
    """(tokens, tokens) in float64: the log weight of key j for query i, -inf where i may not see j.

    The keys of a token are those of the group where its output is read.
    """
    log_weights = torch.zeros(focus.keys_per_query) if focus.log_weights is None else focus.log_weights
    keys = focus.keys[focus.inverse // focus.queries.shape[1]]
    added = torch.full((focus.tokens, focus.tokens), -torch.inf, dtype=torch.float64)
    return added.scatter_(1, keys, log_weights.double().expand_as(keys))


def allowed(focus: FocusSet) -> Tensor:
    """(tokens, tokens) booleans: may query i see key j?"""
    return bias(focus).isfinite()


def biased_attention(query: Tensor, key: Tensor, value: Tensor, added: Tensor) -> Tensor:
    """Dense attention over (batch, heads, tokens, head_dim), in float64, with `added` on top of the scores."""
    query, key, value = query.double(), key.double(), value.double()
    scores = torch.einsum("bhid,bhjd->bhij", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("bhij,bhjd->bhid", (scores + added).softmax(dim=-1), value)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """The same with scores outside of `mask` at -inf."""
    return biased_attention(
        query, key, value, torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    )


def bin_and_frame(token: int, num_frames: int, freq_bins: int, freq_axis: str) -> tuple[int, int]:
    """Where a token lies in the grid, by the definition of the two layouts."""
    if freq_axis == "width":
        return token % freq_bins, token // freq_bins
    return token // num_frames, token % num_frames


class Grids:
    """Where every transformer of a UNet finds its grid, (height, width), as it is measured at run time."""

    def __init__(self, unet: nn.Module, kind: type[nn.Module] = Transformer2DModel) -> None:
        self.found: dict[str, tuple[int, int]] = {}
        self.sample = 0  # which sample of every layer
        self.biases: dict[tuple[Any, ...], Tensor] = {}
        for name, module in unet.named_modules():
            if isinstance(module, kind):

                def measure(_module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                    states = args[0] if args else kwargs["hidden_states"]
                    self.found[name] = tuple(states.shape[2:])

                module.register_forward_pre_hook(measure, with_kwargs=True)

    def bias(self, layer: str, config: LiteFocusConfig, freq_bins: int, freq_axis: str = "width") -> Tensor | None:
        """`bias` on the grid of a layer; None where the config leaves it dense. `freq_bins`: at the input."""
        grid = self.found[layer.split(".transformer_blocks")[0]]
        frames, bins = grid if freq_axis == "width" else grid[::-1]
        if bins < config.min_freq_bins:
            return None
        if config.time_window is not None:  # halved with the grid
            config = replace(config, time_window=math.ceil(config.time_window * bins / freq_bins))
        drawn = (frames, bins, config, layer, freq_axis, self.sample)
        if drawn not in self.biases:
            focus = focus_set(frames, bins, config, layer=layer, freq_axis=freq_axis, sample=self.sample)
            self.biases[drawn] = bias(focus)
        return self.biases[drawn]


class MaskedDense:
    """The oracle's processor: dense attention, masked to the focus set of the layer's grid, with its weights."""

    def __init__(self, name: str, grids: Grids, *arguments: Any) -> None:
        self.name, self.grids, self.arguments = name, grids, arguments

    def __call__(
        self, attn: Attention, x: Tensor, encoder_hidden_states=None, attention_mask=None, temb=None
    ) -> Tensor:
        if encoder_hidden_states is None and attention_mask is None:
            added = self.grids.bias(self.name, *self.arguments)
            if added is not None:
                return AttnProcessor2_0()(attn, x, attention_mask=added.to(x).expand(len(x), -1, -1))
        return AttnProcessor2_0()(attn, x, encoder_hidden_states, attention_mask, temb)


def install_oracle(unet: nn.Module, config: LiteFocusConfig, freq_bins: int = 16, freq_axis: str = "width") -> Grids:
    """Make every attention layer of a diffusers UNet a masked one. Returns the grids that it measures."""
    grids = Grids(unet)
    for name, module in unet.named_modules():
        if isinstance(module, Attention):
            module.set_processor(MaskedDense(name, grids, config, freq_bins, freq_axis))
    return grids
