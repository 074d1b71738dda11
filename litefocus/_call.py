"""What the call of a UNet shows before its attention runs: the grid of its latent, and the step's timestep.

Attention layers see (batch, tokens, channels) alone. The hooks here watch the UNet, and tell them the rest.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from litefocus._tracing import assume_constant_result
from litefocus.focus import FreqAxis

if TYPE_CHECKING:
    from litefocus._grid import Grid


class Call(NamedTuple):
    """A call of a UNet that runs.

    num_frames: of the latent, at the UNet's input.
    draw: which of every layer's samples the step uses: an int, or a scalar tensor where reading it would stall a GPU.
    grids: of the patch in force when it began, to its end. number: of the UNet's calls. watched: of the UNet.
    """

    num_frames: int
    draw: int | Tensor
    grids: Mapping[str, Grid]
    number: int
    watched: Watched


# The calls of watched UNets that run in this thread.
_running: ContextVar[tuple[Call, ...]] = ContextVar("litefocus_running", default=())


class Watched:
    """What the layers of one watched UNet have in common. Each keeps it, also where it is moved out of the UNet.

    grids: of the patch in force, by the layers' names; empty where there is none.
    started, finished: number of the last call that began, and of the last that came to its end.
    """

    def __init__(self) -> None:
        self.grids: Mapping[str, Grid] = {}
        self.started = self.finished = 0
        self._seen: dict[int, None] = {}  # frames of all calls so far, the newest last

    @property
    def call(self) -> Call | None:
        """The UNet's call that runs in this thread. One that was interrupted counts until the next."""
        return next((call for call in _running.get() if call.watched is self), None)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Frames, at the UNet's input, of the call that runs; outside of one, as in a backward pass, of all so far."""
        call = self.call
        return tuple(self._seen) if call is None else (call.num_frames,)

    def see(self, num_frames: int) -> None:
        """Remember a length."""
        self._seen.pop(num_frames, None)
        self._seen[num_frames] = None

    def begin(self, num_frames: int, draw: int | Tensor) -> None:
        """A call of the UNet begins in this thread."""
        self.see(num_frames)
        self.started += 1
        _running.set((*self._others(), Call(num_frames, draw, self.grids, self.started, self)))

    def end(self, finished: bool) -> None:
        """It has ended, well or not."""
        call = self.call
        if call is not None and finished:
            self.finished = max(self.finished, call.number)
        _running.set(self._others())

    def _others(self) -> tuple[Call, ...]:
        return tuple(call for call in _running.get() if call.watched is not self)


@assume_constant_result
def _see(watched: Watched, num_frames: int) -> None:
    """What a compiler runs when it traces the UNet, before it comes to its layers."""
    watched.see(num_frames)
    watched.end(finished=False)  # a call that was interrupted is not this one


class Watch:
    """Hooks on a UNet that refuse a grid which it was not patched or probed for, and tell its layers of theirs.

    watched: of its layers. done: "patched" or "probed", for the message. freq_bins, freq_axis: of the UNet's input.
    """

    def __init__(self, unet: nn.Module, watched: Watched, done: str, freq_bins: int, freq_axis: FreqAxis) -> None:
        self.watched, self.done, self.freq_bins, self.freq_axis = watched, done, freq_bins, freq_axis
        self.handles: list[RemovableHandle] = [
            unet.register_forward_pre_hook(self.enter, with_kwargs=True),
            unet.register_forward_hook(self.leave, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def enter(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise ValueError for another grid. Names of arguments: diffusers' UNets, then the authors'."""
        sample = kwargs.get("sample", kwargs.get("x", args[0] if args else None))
        if not isinstance(sample, Tensor) or sample.ndim != 4:
            return
        height, width = sample.shape[2:]
        num_frames, bins = (height, width) if self.freq_axis == "width" else (width, height)
        if bins != self.freq_bins:
            raise ValueError(
                f"this UNet was {self.done} for {self.freq_bins} frequency bins on the {self.freq_axis} axis, and its "
                f"input (batch, channels, height, width) = {tuple(sample.shape)} has {bins} there; pass the freq_bins "
                f'and freq_axis of its latent: (time, frequency) is freq_axis="width", freq_bins={width}; (frequency, '
                f'time) is freq_axis="height", freq_bins={height}'
            )
        if torch.compiler.is_compiling():
            _see(self.watched, operator.index(num_frames))  # a plain int under dynamic shapes too
            return
        timestep = kwargs.get("timestep", kwargs.get("timesteps", args[1] if len(args) > 1 else None))
        self.watched.begin(int(num_frames), draw_of(timestep))

    def leave(self, unet: nn.Module, args: Any, output: Any) -> None:
        """The call has ended; without an output, by an exception."""
        if not torch.compiler.is_compiling():
            self.watched.end(finished=output is not None)


def draw_of(timestep: Any) -> int | Tensor:
    """Which of a layer's samples belongs to a step: the hash of its timestep, so that regular steps use all of them.

    timestep: a number, or a tensor of which the first element counts. On a GPU it is not read, which would wait for the
    device: the hash is then a scalar tensor there. One sample, the first, serves all steps where the timestep is not to
    be known (a tracer's or a compiler's) and while gradients are recorded, since a checkpointed layer is run again in
    the backward pass, when no step is known.
    """
    traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or traced:
        return 0
    if isinstance(timestep, Tensor):
        if not timestep.numel() or type(timestep) is not Tensor:
            return 0
        timestep = timestep.detach().reshape(-1)[0]
        if timestep.device.type == "cpu":
            try:
                timestep = timestep.item()
            except RuntimeError:  # under vmap or make_fx
                return 0
    if isinstance(timestep, Tensor):
        return _hash((timestep.double() * 1024).long() & 0xFFFFFFFF)
    if isinstance(timestep, (int, float)) and math.isfinite(timestep):
        return _hash(int(timestep * 1024) & 0xFFFFFFFF)
    return 0


def _hash(x: Any) -> int | Tensor:
    """An integer hash of 32 bits (lowbias32 of Chris Wellons' hash-prospector), of ints and of tensors alike."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    hashed: int | Tensor = x ^ (x >> 16)
    return hashed
