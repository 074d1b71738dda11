"""The grid of one self-attention layer, and the focus sets that belong to it, by length and device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from litefocus._compile import mark_static
from litefocus.config import LiteFocusConfig, checked_config, positive_integer
from litefocus.focus import FocusSet, FreqAxis, check_freq_axis, focus_set, keys_per_query

# A focus call that saves fewer keys a query than this is slower than a dense one, since gathering costs time too: at 2
# bins, 29 saved keys cost 18 % more time and 57 take 16 % less (one CPU thread).
MIN_KEYS_SAVED = 48

# Samples of a layer. Steps alternate between them, so that their errors average out.
NUM_SAMPLES = 4

LENGTHS_KEPT = 4  # clip lengths whose focus sets a layer keeps, so that a few can alternate without rebuilding


class Grid:
    """One self-attention layer's grid of num_frames x freq_bins tokens.

    Args:
        name: of the layer in its UNet, for messages and for the layer's own samples.
        level: how often the grid was halved on the way from the UNet's input to this layer.
        config: settings, `time_window` in frames of the UNet's input.
        freq_axis: "width" or "height", see `focus_set`.
        num_samples: samples among which the timestep chooses; 1 where `config.reweight` is False.
        min_keys_saved: keys that a focus set must save, else the layer stays dense.

    Attributes:
        why_dense: why the last call that could have focused did not: tokens of another number, or a mask.
        last_call: number of the last UNet call that reached the layer; infinite once the layer is compiled, since
            compiled code does not count calls.
    """

    def __init__(
        self,
        name: str,
        *,
        level: int = 0,
        config: LiteFocusConfig = LiteFocusConfig(),  # noqa: B008  (immutable)
        freq_axis: FreqAxis = "width",
        num_samples: int = NUM_SAMPLES,
        min_keys_saved: int = MIN_KEYS_SAVED,
    ) -> None:
        check_freq_axis(freq_axis)
        self.name = name
        self.level = level
        self.config = checked_config(config)
        self.freq_axis: FreqAxis = freq_axis
        self.num_samples = positive_integer("num_samples", num_samples) if config.reweight else 1
        self.min_keys_saved = min_keys_saved
        self.local_config = config  # with the time window in frames of this grid
        if config.time_window is not None:
            self.local_config = replace(config, time_window=halved(config.time_window, level))
        self.why_dense: str | None = None
        self.last_call: float = 0
        self._built: dict[tuple[int, int, torch.device], _Samples] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, level={self.level}, config={self.config})"

    def __getstate__(self) -> dict[str, Any]:
        # copies and pickles rebuild their focus sets where they are used
        return {**self.__dict__, "_built": {}}

    def keys_kept(self, num_frames: int, freq_bins: int) -> float:
        """Share of keys that self-attention over this grid keeps, in (0, 1]; 1 where it stays dense."""
        if freq_bins < self.config.min_freq_bins:
            return 1.0
        tokens = num_frames * freq_bins
        keys = keys_per_query(num_frames, freq_bins, self.local_config)
        return keys / tokens if tokens - keys >= self.min_keys_saved else 1.0

    def focus_set(self, num_frames: int, freq_bins: int, device: torch.device, sample: int | Tensor = 0) -> FocusSet:
        """One of the layer's focus sets on `device`; built at the first call for a length."""
        key = (num_frames, freq_bins, device)
        built = self._built.get(key)
        if built is None:
            with torch.inference_mode(False):  # made in inference mode, they could not serve a later backward pass
                built = _Samples(tuple(self._build(*key)))
            if type(built.sets[0].inverse) is not torch.Tensor:
                return built.sets[0]  # made while a tracer looks on: of no use outside
            free = [key for key, others in list(self._built.items()) if not others.captured]
            for evicted in free[: 1 - LENGTHS_KEPT]:
                self._built.pop(evicted, None)  # default: another thread may have been faster
            self._built[key] = built
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            built.captured = True
        return built.choose(sample)

    def _build(self, num_frames: int, freq_bins: int, device: torch.device) -> Iterator[FocusSet]:
        """The layer's samples, which share everything but their keys."""
        first: FocusSet | None = None
        for sample in range(self.num_samples):
            focus = focus_set(
                num_frames, freq_bins, self.local_config, layer=self.name, freq_axis=self.freq_axis, sample=sample
            )
            if first is not None:
                focus = replace(first, keys=focus.keys)
            focus = focus.to(device)
            first = first or focus
            for constant in (focus.queries, focus.keys, focus.inverse, focus.log_weights):
                if constant is not None:
                    mark_static(constant)
            yield focus


class _Samples:
    """The samples of one grid on one device."""

    def __init__(self, sets: tuple[FocusSet, ...]) -> None:
        self.sets = sets
        self.captured = False  # by a CUDA graph, which reads their memory as long as it lives: never to be evicted
        self._keys: Tensor | None = None  # (samples, groups, keys_per_query), where the sample is chosen on a GPU

    def choose(self, sample: int | Tensor) -> FocusSet:
        if len(self.sets) == 1:
            return self.sets[0]
        if isinstance(sample, int):
            return self.sets[sample % len(self.sets)]
        if self._keys is None:
            self._keys = torch.stack([focus.keys for focus in self.sets])
        index = sample.to(self._keys.device).view(1) % len(self.sets)
        return replace(self.sets[0], keys=self._keys.index_select(0, index)[0])


def halved(size: int, level: int) -> int:
    """A size of the grid at a level of the UNet: halved `level` times, rounded up."""
    return -(-size >> level)
