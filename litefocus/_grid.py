"""The grid of one self-attention layer: its frames and frequency bins, and the focus sets that belong to it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from litefocus._call import Watched
from litefocus._tracing import assume_constant_result, mark_static
from litefocus.config import LiteFocusConfig, checked_config, positive_integer
from litefocus.focus import FocusSet, FreqAxis, check_freq_axis, focus_set, keys_per_query

# Keys that every query must save for a focus call to be cheaper than the dense one, which it is not where gathering
# takes longer than what it saves: at 2 bins, 29 saved keys cost 18 % more time and 57 take 16 % less (one CPU thread).
MIN_KEYS_SAVED = 48

LENGTHS_KEPT = 4  # clip lengths whose focus sets a layer keeps, so that a few can alternate without rebuilding

# Samples that a layer draws: with weights, the errors of steps with different samples average out.
DRAWS = 4


class Grid:
    """One self-attention layer's grid of num_frames x freq_bins tokens.

    Args:
        name: of the layer in its UNet, for messages and for the layer's own samples.
        freq_bins: frequency bins of the grid at this layer.
        level: how often the grid was halved on the way from the UNet's input to this layer.
        config: settings, `time_window` in frames of the UNet's input.
        freq_axis: "width" or "height", see `focus_set`.

    `mismatch` says why the last call that could have focused did not: other tokens than the grid, or a mask. `reached`
    is the number of the UNet's last call that came to the layer, infinite once it was compiled, as no more shows then.
    """

    def __init__(
        self,
        name: str,
        freq_bins: int,
        *,
        level: int = 0,
        config: LiteFocusConfig = LiteFocusConfig(),  # noqa: B008  (immutable)
        freq_axis: FreqAxis = "width",
    ) -> None:
        check_freq_axis(freq_axis)
        self.name = name
        self.freq_bins = positive_integer("freq_bins", freq_bins)
        self.level = level
        self.config = checked_config(config)
        self.freq_axis: FreqAxis = freq_axis
        self.local_config = config  # with the time window in frames of this grid
        if config.time_window is not None:
            self.local_config = replace(config, time_window=halved(config.time_window, level))
        self.mismatch: str | None = None
        self.reached: float = 0
        self._drawn: dict[tuple[int, torch.device], _Drawn] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, freq_bins={self.freq_bins}, config={self.config})"

    def __getstate__(self) -> dict[str, Any]:
        # copies and pickles rebuild their focus sets where they are used
        return {**self.__dict__, "_drawn": {}}

    def num_frames(self, tokens: int, lengths: Sequence[int]) -> int | None:
        """Frames of a call of `tokens` tokens; None, with a `mismatch`, where they are not the grid of the UNet's call.

        lengths: frames that the UNet's input may have had.
        Raises ValueError for tokens that are no grid of this many bins where nothing is known of its input.
        """
        for length in reversed(lengths):
            if halved(length, self.level) * self.freq_bins == tokens:
                self.mismatch = None
                return halved(length, self.level)
        if lengths:
            frames = halved(lengths[-1], self.level)
            self.mismatch = f"{tokens} tokens are not its grid of {frames} frames x {self.freq_bins} bins"
            return None
        if tokens % self.freq_bins or not tokens:
            raise ValueError(
                f"layer {self.name!r}: {tokens} tokens cannot be laid out as frames x {self.freq_bins} frequency bins; "
                "pass the freq_bins of this UNet's latent (mel bins / VAE scale factor; 16 for AudioLDM-style models)"
            )
        return tokens // self.freq_bins

    def keys_kept(self, num_frames: int) -> float:
        """Share of keys that self-attention over `num_frames` frames keeps, in (0, 1]; 1 where it stays dense."""
        if self.freq_bins < self.config.min_freq_bins:
            return 1.0
        tokens = num_frames * self.freq_bins
        keys = keys_per_query(num_frames, self.freq_bins, self.local_config)
        return keys / tokens if tokens - keys >= MIN_KEYS_SAVED else 1.0

    def focus_set(self, num_frames: int, device: torch.device, draw: int | Tensor = 0) -> FocusSet:
        """The layer's focus set on `device`, one of its samples; built at the first call for a length."""
        drawn = self._drawn.get((num_frames, device))
        if drawn is None:
            with torch.inference_mode(False):  # made in inference mode, they could not serve a later backward pass
                drawn = _Drawn(tuple(self._build(num_frames, device)))
            if type(drawn.sets[0].inverse) is not torch.Tensor:
                return drawn.sets[0]  # made while a tracer looks on: of no use outside
            free = [key for key, others in list(self._drawn.items()) if not others.captured]
            for oldest in free[: 1 - LENGTHS_KEPT]:
                self._drawn.pop(oldest, None)  # default: another thread may have been faster
            self._drawn[num_frames, device] = drawn
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            drawn.captured = True
        return drawn.choose(draw)

    def _build(self, num_frames: int, device: torch.device) -> Iterator[FocusSet]:
        """The layer's samples, which share everything but their keys."""
        first: FocusSet | None = None
        for draw in range(DRAWS if self.config.reweight else 1):
            focus = focus_set(
                num_frames,
                self.freq_bins,
                self.local_config,
                layer=self.name,
                freq_axis=self.freq_axis,
                draw=draw,
            )
            if first is not None:
                focus = replace(first, keys=focus.keys)
            focus = focus.to(device)
            first = first or focus
            for constant in (focus.queries, focus.keys, focus.inverse, focus.log_weights):
                if constant is not None:
                    mark_static(constant)
            yield focus


class _Drawn:
    """The samples of one grid on one device."""

    def __init__(self, sets: tuple[FocusSet, ...]) -> None:
        self.sets = sets
        self.captured = False  # by a CUDA graph, which reads their memory as long as it lives: never to be evicted
        self._keys: Tensor | None = None  # (samples, groups, keys_per_query), where the sample is chosen on a GPU

    def choose(self, draw: int | Tensor) -> FocusSet:
        if len(self.sets) == 1:
            return self.sets[0]
        if isinstance(draw, int):
            return self.sets[draw % len(self.sets)]
        if self._keys is None:
            self._keys = torch.stack([focus.keys for focus in self.sets])
        index = draw.to(self._keys.device).view(1) % len(self.sets)
        return replace(self.sets[0], keys=self._keys.index_select(0, index)[0])


def halved(size: int, level: int) -> int:
    """A size of the grid at a level of the UNet: halved `level` times, rounded up."""
    return -(-size >> level)


@assume_constant_result
def focus_set_for(
    grid: Grid, tokens: int, device: torch.device, watched: Watched | None, traced: bool
) -> FocusSet | None:
    """The focus set of a call of `tokens` tokens at a layer; None where it stays dense.

    A constant to the compiler, which so needs neither to look into the cache nor to guard it. watched: of the patched
    UNet, if the layer is one of its. traced: whether the compiler asks; its graph keeps the layer's first sample for
    all steps.
    """
    call = None if watched is None else watched.call
    grid.reached = max(grid.reached, math.inf if traced else call.number if call else 0)
    if grid.freq_bins < grid.config.min_freq_bins:
        return None
    num_frames = grid.num_frames(tokens, watched.lengths if watched else ())
    if num_frames is None or grid.keys_kept(num_frames) == 1:
        return None
    return grid.focus_set(num_frames, device, call.draw if call and not traced else 0)
