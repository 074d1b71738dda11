"""The grid of one self-attention layer, and the focus sets that belong to it, by length and device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from litefocus._compile import mark_static
from litefocus.config import LiteFocusConfig, checked_config, positive_integer
from litefocus.focus import FocusSet, FreqAxis, check_freq_axis, focus_set, keys_per_query

# A focus call that saves fewer keys a query than this is slower than a dense one, since gathering costs time too: at 2
# bins, 29 saved keys cost 18 % more time and 57 take 16 % less (one CPU thread).
MIN_KEYS_SAVED = 48

# Samples of a layer. Every step takes one, by a hash of its timestep, so that errors average out: the mean of the four
# is .033 off where one is .076 off (attention of seed 1's UNet at 8x).
NUM_SAMPLES = 4

# A layer keeps focus sets up to this many bytes, and always the newest: all samples of a few lengths up to half a
# minute, of longer clips one sample at a time, since building the next takes less than a hundredth of the step.
# Compiled code holds all: in the layers of AudioLDM 2 20 MiB at 80 s and 151 MiB at 600 s, a quarter of which is one
# sample.
KEPT_BYTES = 2**19


class Grid:
    """One self-attention layer's grid of num_frames x freq_bins tokens.

    Args:
        name: of the layer in its UNet, for messages and for the layer's own samples.
        level: how often the grid was halved on the way from the UNet's input to this layer.
        config: settings, `time_window` in frames of the UNet's input.
        freq_axis: "width" or "height", see `focus_set`.
        num_samples: samples among which the timestep chooses.
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
        self.num_samples = positive_integer("num_samples", num_samples)
        self.min_keys_saved = min_keys_saved
        self.local_config = config  # with the time window in frames of this grid
        if config.time_window is not None:
            self.local_config = replace(config, time_window=halved(config.time_window, level))
        self.why_dense: str | None = None
        self.last_call: float = 0
        self._built: dict[tuple[int, int, torch.device, bool, int | None], _Built] = {}

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

    def focus_set(
        self, num_frames: int, freq_bins: int, device: torch.device, sample: Any = 0, near: bool = False
    ) -> FocusSet:
        """One of the layer's focus sets on `device`; built at the first call that needs it.

        sample: a number; a scalar tensor, by which `choose` selects without reading it; or None for all samples, with
            keys (samples, groups, keys_per_query). near: without far samples.
        """
        which: int | None = 0
        if self.num_samples > 1:
            which = sample % self.num_samples if isinstance(sample, int) else None
        key = (num_frames, freq_bins, device, near, which)
        built = self._built.get(key)
        if built is None:
            with torch.inference_mode(False):  # made in inference mode, they could not serve a later backward pass
                built = self._build(*key)
            if type(built.focus.inverse) is not torch.Tensor:
                return built.focus  # made while a tracer looks on: of no use outside
            self._keep(key, built)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            built.captured = True
        return built.focus if which is not None or sample is None else choose(built.focus, sample)

    def _build(self, num_frames: int, freq_bins: int, device: torch.device, near: bool, which: int | None) -> _Built:
        """Sample number `which`, or all. Samples of one length share everything but their keys."""
        here = (num_frames, freq_bins, device, near)
        first = next((built.focus for key, built in list(self._built.items()) if key[:4] == here), None)
        config = replace(self.local_config, far_sampled=0) if near else self.local_config
        sets = [
            focus_set(num_frames, freq_bins, config, layer=self.name, freq_axis=self.freq_axis, sample=sample)
            for sample in (range(self.num_samples) if which is None else [which])
        ]
        keys = torch.stack([each.keys for each in sets]).to(device)
        focus = replace(first or sets[0].to(device), keys=keys if which is None else keys[0])
        for constant in (focus.queries, focus.keys, focus.inverse, focus.log_weights):
            if constant is not None:
                mark_static(constant)
        return _Built(focus)

    def _keep(self, key: tuple[int, int, torch.device, bool, int | None], built: _Built) -> None:
        """Keep the newest, and of the others what fits into KEPT_BYTES, and what CUDA graphs read."""
        size = built.nbytes
        for other, old in reversed(list(self._built.items())):
            size += old.nbytes
            if size > KEPT_BYTES and not old.captured:
                self._built.pop(other, None)  # default: another thread may have been faster
        self._built[key] = built


@dataclass
class _Built:
    """A focus set; of all samples where a GPU or compiled code chooses.

    captured: by a CUDA graph, which reads its memory as long as it lives.
    """

    focus: FocusSet
    captured: bool = False

    @property
    def nbytes(self) -> int:
        """Of the keys, which are nearly all."""
        return self.focus.keys.nbytes


def choose(samples: FocusSet, sample: Any) -> FocusSet:
    """One of `samples`, of keys (samples, groups, keys_per_query), by number; a scalar tensor is not read."""
    index = torch.as_tensor(sample, device=samples.keys.device).view(1) % samples.keys.shape[0]
    # as_strided instead of [0]: Inductor then copies the keys once, and does not look them up anew in every gather
    keys = samples.keys.index_select(0, index).as_strided(samples.keys.shape[1:], samples.keys.stride()[1:])
    return FocusSet(samples.queries, keys, samples.inverse, samples.log_weights)


def halved(size: int, level: int) -> int:
    """A size of the grid at a level of the UNet: halved `level` times, rounded up."""
    return -(-size >> level)
