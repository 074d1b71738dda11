"""Hooks that tell a UNet's attention layers the size of the latent and the timestep.

A layer itself gets a tensor (batch, tokens, channels), which shows neither. Clients call `unet(...)`,
`unet.forward(...)`, or walk over the blocks themselves; all of them pass the modules that are hooked here. The
first convolution gets the latent, which shows the grid; the modules of the time embedding get the timestep; the last
convolution ends the call.
"""

from __future__ import annotations

import math
import operator
import threading
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from litefocus._compile import assume_constant_result, current_trace
from litefocus._grid import Grid, halved
from litefocus.focus import FocusSet, FreqAxis

SIZES_KEPT = 8  # sizes of past calls, by which a layer that runs again in a backward pass finds its grid


class Call(NamedTuple):
    """A call of a UNet that runs in this thread.

    size: (num_frames, freq_bins) of the latent. sample: hash of the timestep, a scalar tensor on a GPU, where reading
    it would wait for the device. grids: those of the patch in force when it began. number: of the call, counted from 1.
    near: whether layers leave out the far samples of their focus sets.
    """

    size: tuple[int, int]
    sample: int | Tensor
    grids: Mapping[str, Grid]
    number: int
    near: bool = False


class _Thread(threading.local):
    """Of one thread: the running call of every context, and what its hooks have noted for the next one."""

    def __init__(self) -> None:
        self.calls: weakref.WeakKeyDictionary[Context, Call] = weakref.WeakKeyDictionary()
        self.samples: weakref.WeakKeyDictionary[Context, int | Tensor] = weakref.WeakKeyDictionary()
        self.requires_grad: weakref.WeakSet[Context] = weakref.WeakSet()
        self.near: weakref.WeakSet[Context] = weakref.WeakSet()
        self.traces: weakref.WeakKeyDictionary[Context, object] = weakref.WeakKeyDictionary()


_thread = _Thread()


class Context:
    """What the layers of one UNet have in common. Each layer refers to it, also where it is moved out of the UNet.

    Attributes:
        grids: of the patch in force, by the layers' names; empty where there is none.
        freq_bins: that the latent must have; None where any number will do.
        freq_axis: "width" or "height".
        verb: "patched" or "probed", for messages.
        started, finished: number of the last call that began, and of the last that came to its end.
        sizes: (num_frames, freq_bins) of the calls so far, the newest last.
        reentrant: whether an input of the last call required gradients while grad mode was off, as in a reentrant
            checkpoint. Compiled code then keeps the first sample.
        hashed: in compiled code, the hash of the timestep, set by `_note_timestep` and cleared by `_end`. Only layers
            of the trace that set it read it: after a graph break, another thread may have replaced it.
    """

    def __init__(self, freq_axis: FreqAxis = "width", freq_bins: int | None = None, verb: str = "patched") -> None:
        self.grids: Mapping[str, Grid] = {}
        self.freq_axis: FreqAxis = freq_axis
        self.freq_bins = freq_bins
        self.verb = verb
        self.started = self.finished = 0
        self.sizes: list[tuple[int, int]] = []
        self.reentrant = False
        self.hashed: int | Tensor | None = None
        self._hooks: list[RemovableHandle] = []

    @property
    def call(self) -> Call | None:
        """The UNet's call that runs in this thread."""
        return _thread.calls.get(self)

    def hook(self, unet: Any) -> None:
        """Register the hooks on a UNet, unless they are there."""
        if self._hooks:
            return
        compvis = hasattr(unet, "input_blocks")
        first, last = (unet.input_blocks[0][0], unet.output_blocks[-1]) if compvis else (unet.conv_in, unet.conv_out)
        time = getattr(unet, "time_embed" if compvis else "time_proj", None)
        self._hooks = [
            unet.register_forward_pre_hook(self._note_gradients, with_kwargs=True),
            unet.register_forward_hook(self._abandon, always_call=True),
            first.register_forward_pre_hook(self._begin),
            last.register_forward_hook(self._end),
        ]
        if time is not None:
            self._hooks.append(time.register_forward_pre_hook(self._note_embedding if compvis else self._note_timestep))

    def unhook(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def attend_near(self, near: bool) -> None:
        """In the next call of this thread, layers leave out their far samples or not. Compiled ones do not."""
        (_thread.near.add if near else _thread.near.discard)(self)

    def _note_gradients(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note whether an input requires gradients: a reentrant checkpoint runs twice, first without grad mode."""
        requires_grad = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves((args, kwargs)))
        if self.reentrant != (reentrant := requires_grad and not torch.is_grad_enabled()):
            self.reentrant = reentrant  # a side effect, of which exporters warn
        if not torch.compiler.is_compiling():
            (_thread.requires_grad.add if requires_grad else _thread.requires_grad.discard)(self)

    def _note_timestep(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            if args:
                _thread.samples[self] = timestep_hash(args[0])
        elif _note_trace(self, bool(args) and not torch.is_grad_enabled() and not self.reentrant):
            self.hashed = timestep_hash(args[0])

    def _note_embedding(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Read the timestep from what the authors' UNets embed it in: sinusoids (batch, channels), cosines first."""
        if args and args[0].numel():
            cosines, sines = args[0].detach()[0].float().chunk(2)
            timestep = torch.atan2(sines[-1], cosines[-1]) * 10000 ** (1 - 1 / len(cosines))  # by the lowest frequency
            self._note_timestep(module, ((timestep * 8).round() / 8,))

    def _begin(self, convolution: nn.Module, args: tuple[Any, ...]) -> None:
        """A call begins. Raises ValueError for another number of bins than asked for."""
        height, width = args[0].shape[2:]
        num_frames, freq_bins = (height, width) if self.freq_axis == "width" else (width, height)
        if self.freq_bins is not None and freq_bins != self.freq_bins:
            raise ValueError(
                f"this UNet was {self.verb} for {self.freq_bins} frequency bins on the {self.freq_axis} axis, and its "
                f"input (batch, channels, height, width) = {tuple(args[0].shape)} has {freq_bins} there; pass the "
                f'freq_bins and freq_axis of its latent: (time, frequency) is freq_axis="width", freq_bins={width}; '
                f'(frequency, time) is freq_axis="height", freq_bins={height}'
            )
        size = (operator.index(num_frames), operator.index(freq_bins))  # plain ints under dynamic shapes too
        _remember(self, *size)
        if torch.compiler.is_compiling():
            if self.hashed is not None and args[0].requires_grad:  # of `unet.forward`, which calls no hook of the UNet
                self.hashed = 0
            return
        sample, near = _thread.samples.pop(self, 0), self in _thread.near
        if torch.is_grad_enabled() or args[0].requires_grad or self in _thread.requires_grad:
            sample, near = 0, False  # a layer that runs again in a backward pass knows neither
        _thread.requires_grad.discard(self)
        _thread.near.discard(self)
        self.started += 1
        _thread.calls[self] = Call(size, sample, self.grids, self.started, near)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            if self.hashed is not None:
                self.hashed = None
            return
        call = _thread.calls.pop(self, None)
        if call is not None and call.grids is self.grids:  # not under a patch that has been replaced meanwhile
            self.finished = max(self.finished, call.number)

    def _abandon(self, unet: nn.Module, args: Any, output: Any) -> None:
        """A call that failed has not reached the last convolution."""
        if not torch.compiler.is_compiling():
            _thread.calls.pop(self, None)

    def record_call(self, grid: Grid, compiling: bool = False) -> Call | None:
        """Note that the call that runs has come to a layer, and return it."""
        call = self.call
        grid.last_call = max(grid.last_call, math.inf if compiling else call.number if call else 0)
        return call

    def layer_size(self, tokens: int, grid: Grid) -> tuple[int, int] | None:
        """(num_frames, freq_bins) of a layer's call; None, and the reason in `grid.why_dense`, for other tokens."""
        call = self.call
        known = self.sizes[::-1] if call is None else [call.size]
        for size in known:
            num_frames, freq_bins = (halved(each, grid.level) for each in size)
            if num_frames * freq_bins == tokens:
                grid.why_dense = None
                return num_frames, freq_bins
        grid.why_dense = f"{tokens} tokens came, and no call of the UNet has shown their grid"
        if known:
            num_frames, freq_bins = (halved(each, grid.level) for each in known[0])
            grid.why_dense = f"{tokens} tokens are not its grid of {num_frames} frames x {freq_bins} bins"
        return None


@assume_constant_result
def _remember(context: Context, num_frames: int, freq_bins: int) -> None:
    """Record the size of a call. A compiler runs this while it traces the UNet, before it reaches the layers."""
    _thread.calls.pop(context, None)  # a call that was interrupted is not this one
    size = (num_frames, freq_bins)
    context.sizes = [*(each for each in context.sizes if each != size), size][-SIZES_KEPT:]


@assume_constant_result
def _note_trace(context: Context, rotates: bool) -> bool:
    """Note in which trace a compiler comes to a timestep by which it rotates; False where it does not."""
    trace = _thread.traces[context] = current_trace() if rotates else None
    return trace is not None


class PatchedLayer(NamedTuple):
    """What a patch keeps on an attention layer, as its attribute `_litefocus`.

    name: of the layer in its UNet. context: of the UNet. original: the processor that the patch replaced.
    """

    name: str
    context: Context
    original: Any

    @property
    def grid(self) -> Grid | None:
        """Of the patch in force when the running call began, else of the present one; None where none is in force."""
        grids = self.context.grids
        call = self.context.call if grids and not torch.compiler.is_compiling() else None
        return (grids if call is None else call.grids).get(self.name)


@assume_constant_result
def focus_set_for(grid: Grid, context: Context, tokens: int, device: torch.device, compiling: bool) -> FocusSet | None:
    """The focus set of a layer's call of `tokens` tokens; None where it stays dense.

    The compiler takes it as a constant, and neither traces nor guards the cache. It is a set of all samples, for
    `choose`, if the timestep has come in the same trace. Layers that are compiled without their UNet, or behind a graph
    break, and exported ones have their first sample at every step.
    """
    call = context.record_call(grid, compiling)
    size = context.layer_size(tokens, grid)
    if size is None or grid.keys_kept(*size) == 1:
        return None
    if compiling:
        trace = current_trace()
        rotates = trace is not None and trace is _thread.traces.get(context)
        return grid.focus_set(*size, device, None if rotates else 0)
    return grid.focus_set(*size, device, call.sample, call.near) if call else grid.focus_set(*size, device)


def timestep_hash(timestep: Any) -> int | Tensor:
    """A hash of the timestep; modulo the number of samples, it selects a layer's sample. Even steps reach all samples.

    timestep: a number, or a tensor, whose first element counts. The hash is an int; for a tensor on a GPU, which would
    have to be waited for, and in compiled code, a scalar tensor. It is 0 in traced code, for subclasses of tensors, for
    what is not finite, and while gradients are recorded: a checkpointed layer runs again in the backward pass, where
    the timestep is unknown.
    """
    traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if torch.is_grad_enabled() or traced:
        return 0
    if isinstance(timestep, Tensor):
        if not timestep.numel() or type(timestep) is not Tensor:
            return 0
        timestep = timestep.detach().reshape(-1)[0].float()  # MPS has no float64
        if timestep.device.type == "cpu" and not torch.compiler.is_compiling():
            try:
                timestep = timestep.item()
            except RuntimeError:  # under vmap or make_fx
                return 0
    if isinstance(timestep, Tensor):
        return _hash((timestep * 1024).long() & 0xFFFFFFFF)
    if isinstance(timestep, (int, float)) and math.isfinite(timestep):
        return _hash(int(float(np.float32(timestep)) * 1024) & 0xFFFFFFFF)
    return 0


def _hash(x: Any) -> int | Tensor:
    """An integer hash of 32 bits (lowbias32 of Chris Wellons' hash-prospector), of ints and of tensors alike."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    hashed: int | Tensor = x ^ (x >> 16)
    return hashed
