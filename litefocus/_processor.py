"""LiteFocus attention of a layer: behind diffusers' processor protocol, and in the layers of the authors' code."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor, nn

from litefocus._compile import assume_constant_result
from litefocus._context import PatchedLayer, focus_set_for
from litefocus._grid import Grid, choose
from litefocus.attention import focus_attention
from litefocus.config import LiteFocusConfig, positive_integer
from litefocus.focus import FocusSet, FreqAxis


class LiteFocusAttnProcessor:
    """Runs a layer's self-attention over focus sets, and leaves every other call to the processor it replaced.

    The replaced processor gets cross-attention, calls with a mask, and self-attention on grids with fewer frequency
    bins than `config.min_freq_bins`, on grids so small that a focus set would save fewer than 48 keys, and of tokens
    that are not the grid of the UNet's latent (merged tokens).

    `litefocus.patch` installs a processor on every plain layer, and keeps the grid on the layer itself; all arguments
    below but `original` are then ignored. A processor that another one still wraps after `unpatch` calls the original.

    Args:
        original: the processor that was on the layer; `AttnProcessor2_0` of diffusers by default.
        layer: name of the layer in its UNet, for messages and for the layer's own samples.
        freq_bins: frequency bins F of this layer's grid; the number of frames is tokens / F. Without it, a layer that
            is not patched calls `original`.
        config: settings, `time_window` in frames of the UNet's input.
        level: how often the grid was halved on the way from the UNet's input to this layer.
        freq_axis: "width" or "height", see `focus_set`.

    Calls take and return what diffusers' `AttnProcessor2_0` does: hidden_states (batch, tokens, channels), or
    (batch, channels, height, width).

    Raises:
        TypeError: if `original` cannot be called.
        ValueError: at a call on a layer that is not patched, if the tokens are no multiple of `freq_bins`, or if
            neither `freq_bins` nor `original` was given.

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
        original: Any = None,
        *,
        layer: str = "",
        freq_bins: int | None = None,
        config: LiteFocusConfig = LiteFocusConfig(),  # noqa: B008  (immutable)
        level: int = 0,
        freq_axis: FreqAxis = "width",
    ) -> None:
        if original is not None and not callable(original):
            raise TypeError(
                f"original must be an attention processor, got {original!r} ({type(original).__name__}); the frequency "
                "bins of a layer are freq_bins=..."
            )
        self.original = original
        self.freq_bins = None if freq_bins is None else positive_integer("freq_bins", freq_bins)
        # on a patched layer, the layer has the grid
        self.grid = None if freq_bins is None else Grid(layer, level=level, config=config, freq_axis=freq_axis)

    def __repr__(self) -> str:
        grid = "" if self.grid is None else f"{self.grid}, freq_bins={self.freq_bins}, "
        return f"{type(self).__name__}({grid}original={type(self.original).__name__})"

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
        layer: PatchedLayer | None = getattr(attn, "_litefocus", None)
        original = layer.original if self.original is None and layer is not None else self.original
        focus = None
        if encoder_hidden_states is None:
            focus = focus_set_of_call(attn, hidden_states, attention_mask is not None, self)
        if focus is not None:
            fused = type(original).__name__.startswith("Fused")
            return attend(attn, hidden_states, focus, temb, fused)
        if original is None:
            original = default_processor()
        output: Tensor
        if args:  # further positional arguments keep their places
            output = original(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
            return output
        # by keyword, and only what was given: older processors take fewer arguments
        given = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask, "temb": temb}
        given = {name: value for name, value in given.items() if value is not None}
        output = original(attn, hidden_states, **given, **kwargs)
        return output


def focus_set_of_call(
    attn: Any, hidden_states: Tensor, masked: bool, processor: LiteFocusAttnProcessor | None = None
) -> FocusSet | None:
    """The focus set of a self-attention call of a layer; None where it stays dense."""
    compiling = torch.compiler.is_compiling()
    layer: PatchedLayer | None = getattr(attn, "_litefocus", None)
    grid = None if layer is None else layer.grid
    if masked:
        if layer is not None and grid is not None and not compiling:
            layer.context.record_call(grid)
            grid.why_dense = "its calls bring a mask"
        return None
    # operator.index: a plain int under torch.compile's dynamic shapes too, as the index needs one
    tokens = hidden_states.shape[1] if hidden_states.ndim == 3 else hidden_states.shape[2:].numel()
    if layer is not None:
        if grid is None:
            return None
        focus = focus_set_for(grid, layer.context, operator.index(tokens), hidden_states.device, compiling)
        if focus is None or focus.keys.ndim == 2:
            return focus
        hashed = layer.context.hashed  # None once the call of the UNet is over
        return choose(focus, 0 if hashed is None else hashed)
    return None if processor is None else _own_focus_set(processor, operator.index(tokens), hidden_states.device)


@assume_constant_result
def _own_focus_set(processor: LiteFocusAttnProcessor, tokens: int, device: torch.device) -> FocusSet | None:
    """Of a layer that is not patched, on the grid that its processor was made for."""
    grid, freq_bins = processor.grid, processor.freq_bins
    if grid is None or freq_bins is None:
        if processor.original is None:
            raise ValueError(
                "this LiteFocusAttnProcessor has no freq_bins, and its layer is not patched; pass freq_bins=..., or "
                "patch the whole UNet with litefocus.patch"
            )
        return None
    if tokens % freq_bins or not tokens:
        raise ValueError(
            f"layer {grid.name!r}: {tokens} tokens cannot be laid out as frames x {freq_bins} frequency bins; pass the "
            "freq_bins of this layer (mel bins / VAE scale factor, halved level by level)"
        )
    size = tokens // freq_bins, freq_bins
    return None if grid.keys_kept(*size) == 1 else grid.focus_set(*size, device)


def attend(
    attn: Any, hidden_states: Tensor, focus: FocusSet, temb: Tensor | None = None, fused: bool = False
) -> Tensor:
    """Self-attention of a layer over focus sets, around which everything is as in diffusers' AttnProcessor2_0."""
    residual = hidden_states
    query, key, value = attention_inputs(attn, hidden_states, temb, fused)
    hidden_states = focus_attention(query, key, value, focus)
    hidden_states = hidden_states.transpose(1, 2).flatten(2).to(query.dtype)
    del query, key, value
    hidden_states = attn.to_out[0](hidden_states)
    hidden_states = attn.to_out[1](hidden_states)
    if residual.ndim == 4:
        hidden_states = hidden_states.transpose(1, 2).reshape(residual.shape)
    if getattr(attn, "residual_connection", False):
        hidden_states = hidden_states + residual
    rescale: float = getattr(attn, "rescale_output_factor", 1.0)
    return hidden_states / rescale


def attention_inputs(
    attn: Any, hidden_states: Tensor, temb: Tensor | None = None, fused: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of a layer's self-attention as diffusers makes them: norms, projections, norms.

    hidden_states: (batch, tokens, channels) or (batch, channels, height, width). fused: by the layer's `to_qkv`.
    Returns three of (batch, heads, tokens, head_dim).
    """
    # getattr, hasattr: the layers of early diffusers and of the authors' code lack some of these
    if getattr(attn, "spatial_norm", None) is not None:
        hidden_states = attn.spatial_norm(hidden_states, temb)
    if hidden_states.ndim == 4:
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
    if getattr(attn, "group_norm", None) is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
    heads = attn.heads if hasattr(attn, "heads") else attn.n_heads
    if fused:  # after unfusing, layers keep their fused projection, but their processors do not use it
        rows = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        rows = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in rows)
    if getattr(attn, "norm_q", None) is not None:
        query = attn.norm_q(query)
    if getattr(attn, "norm_k", None) is not None:
        key = attn.norm_k(key)
    return query, key, value


def default_processor() -> Any:
    """What diffusers puts on a layer by itself."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    return AttnProcessor2_0()  # type: ignore[no-untyped-call]


class FocusedForward:
    """Mixin that is put before the class of a CompVis attention layer, which has no processor, while it is patched.

    It is stateless, so copies and DataParallel replicas work.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor
        if not isinstance(self, FocusedForward):  # unpatched since, and called by a hook that has kept this
            output = type(self).forward(self, x, *args, **kwargs)
            return output
        others = [value for value in (*args, *kwargs.values()) if value is not None]
        focus = None if others else focus_set_of_call(self, x, masked=False)
        if focus is not None:
            return attend(self, x, focus)
        output = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return output

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # pickle finds classes by their names, and that of ours is the original's
        kind: Any = type(self)
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        return _empty_layer, (without_focus(kind),), *reduced[2:]


@functools.cache
def with_focus(kind: Any) -> Any:
    """A subclass of FocusedForward and `kind` under the name of `kind`, by which others recognise attention layers."""
    return type(kind.__name__, (FocusedForward, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


@functools.cache
def without_focus(kind: Any) -> Any:
    """`kind` without FocusedForward. A class derived from it later, as FSDP2 does, is rebuilt on the original."""
    if FocusedForward in kind.__bases__:
        return kind.__bases__[1]
    if not issubclass(kind, FocusedForward):
        return kind
    namespace = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind.__name__, tuple(without_focus(base) for base in kind.__bases__), namespace)


def _empty_layer(kind: Any) -> Any:
    """For a copy, to be filled."""
    return nn.Module.__new__(with_focus(kind))
