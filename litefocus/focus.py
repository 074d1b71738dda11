"""Which keys each query sees.

The latent of an AudioLDM-style model is a grid of `num_frames` time frames x `freq_bins` frequency bins, flattened to
tokens. Query i attends to its focus set F_i = S_i ∪ C: every token S_i of its own frequency bin, and a random sample
C of the tokens of all bins (LiteFocus, arXiv 2407.10468). This file builds that set as indices, pure torch; what is
done with them is in `attention.py`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from litefocus.config import LiteFocusConfig, positive_integer, suggestion

FreqAxis = Literal["width", "height"]


@dataclass(frozen=True, eq=False)
class FocusSet:
    """The focus sets of all tokens, as int64 indices into the tokens. Queries with equal keys form a group.

    queries: (groups, queries_per_group). Together the groups hold every token.
    keys: (groups, keys_per_query). The tokens that every query of the group attends to, each once.
    inverse: (tokens,). Where token i stands in `queries.flatten()`: undoes the grouping.
    """

    queries: Tensor
    keys: Tensor
    inverse: Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens of the grid, num_frames * freq_bins."""
        return self.inverse.shape[0]

    @property
    def keys_per_query(self) -> int:
        """Number of keys in every query's focus set."""
        return self.keys.shape[1]

    def to(self, device: torch.device | str) -> FocusSet:
        """The same sets with their indices on `device`."""
        return FocusSet(self.queries.to(device), self.keys.to(device), self.inverse.to(device))


def frames_sampled(num_frames: int, config: LiteFocusConfig) -> int:
    """c, the number of frames that the sample takes from each frequency bin."""
    if not config.cross_frequency or config.sparse_ratio == 0:
        return 0
    return max(1, round(config.sparse_ratio * num_frames))


def keys_per_query(num_frames: int, freq_bins: int, config: LiteFocusConfig) -> int:
    """Size of every focus set: T + (F - 1) c, or F c without the same-frequency branch. Builds no index."""
    sampled = frames_sampled(num_frames, config)
    return num_frames + (freq_bins - 1) * sampled if config.same_frequency else freq_bins * sampled


def focus_set(
    num_frames: int,
    freq_bins: int,
    config: LiteFocusConfig = LiteFocusConfig(),  # noqa: B008  (immutable)
    *,
    layer: str = "",
    freq_axis: FreqAxis = "width",
) -> FocusSet:
    """The focus sets of a grid of `num_frames` x `freq_bins` tokens, on the CPU.

    layer: name of the attention layer; layers of different names draw different samples.
    freq_axis: "width" if frequency varies fastest (token = frame * freq_bins + bin: AudioLDM, AudioLDM 2, MusicLDM,
        Tango), "height" if time does (token = bin * num_frames + frame: Riffusion, Auffusion).

    The sample takes c = max(1, round(sparse_ratio * num_frames)) frames of every bin, without replacement, so all
    sets have T + (F - 1) c keys and every token of another bin is in the set with the same probability. It is a pure
    function of (config.seed, layer, num_frames) and leaves the global random state alone.

    Raises TypeError or ValueError for sizes that are not positive integers and for an unknown `freq_axis`.
    Source: LiteFocus, arXiv 2407.10468; as an exact set union, where the published code counts a sampled key of the
    query's own bin twice.

    >>> focus = focus_set(num_frames=10, freq_bins=4, config=LiteFocusConfig(sparse_ratio=0.2))
    >>> focus.queries.shape, focus.keys.shape, focus.inverse.shape
    (torch.Size([4, 10]), torch.Size([4, 16]), torch.Size([40]))
    """
    num_frames = positive_integer("num_frames", num_frames)
    freq_bins = positive_integer("freq_bins", freq_bins)
    check_freq_axis(freq_axis)

    tokens = torch.arange(num_frames * freq_bins, device="cpu")
    # bins[f, t] is the token of bin f at frame t
    bins = tokens.view(num_frames, freq_bins).t() if freq_axis == "width" else tokens.view(freq_bins, num_frames)
    sample = bins.gather(1, _sampled_frames(num_frames, freq_bins, config, layer))  # (freq_bins, c)
    if config.same_frequency:
        queries = bins.contiguous()
        bin_numbers = torch.arange(freq_bins, device="cpu")
        others = bin_numbers[:-1] + (bin_numbers[:-1] >= bin_numbers[:, None])  # row f: every bin but f
        keys = torch.cat([bins, sample.index_select(0, others.flatten()).view(freq_bins, -1)], dim=1)
    else:  # all queries share one set
        queries, keys = tokens[None], sample.flatten()[None]
    return FocusSet(queries, keys, inverse=queries.flatten().argsort())


def check_freq_axis(freq_axis: str) -> None:
    """Raise ValueError unless `freq_axis` is "width" or "height"."""
    if freq_axis not in ("width", "height"):
        hint = suggestion(str(freq_axis), ("width", "height"))
        raise ValueError(f"freq_axis must be 'width' or 'height', got {freq_axis!r}.{hint}")


def _sampled_frames(num_frames: int, freq_bins: int, config: LiteFocusConfig, layer: str) -> Tensor:
    """(freq_bins, c) frame numbers, ascending, a draw without replacement for every bin."""
    # crc32, since hash() of a string differs between processes
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{config.seed}/{layer}/{num_frames}".encode()))
    draw = torch.rand(freq_bins, num_frames, generator=generator, dtype=torch.float64, device="cpu")
    order = draw.argsort(dim=1)
    return order[:, : frames_sampled(num_frames, config)].sort(dim=1).values
