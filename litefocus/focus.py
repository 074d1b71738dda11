"""Which keys each query sees.

The latent of an AudioLDM-style model is a grid of `num_frames` time frames x `freq_bins` frequency bins, flattened to
tokens. Query i attends to its focus set F_i = S_i ∪ C: every token S_i of its own frequency bin, and a random sample
C of the tokens of all bins (LiteFocus, arXiv 2407.10468). This file builds that set as indices, pure torch; what is
done with them is in `attention.py`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from litefocus.config import LiteFocusConfig, positive_integer, suggestion

FreqAxis = Literal["width", "height"]

MIN_BLOCK = 64  # queries that share a time window: with fewer, fused attention runs at a third of its speed


@dataclass(frozen=True, eq=False)
class FocusSet:
    """The focus sets of all tokens, as int64 indices into the tokens. Queries with equal keys form a group.

    queries: (groups, queries_per_group). Together the groups hold every token, some twice where time windows overlap.
    keys: (groups, keys_per_query). The tokens that every query of the group attends to, each once.
    inverse: (tokens,). Where in `queries.flatten()` the output of token i is read: undoes the grouping.

    >>> focus = focus_set(num_frames=3, freq_bins=2, config=LiteFocusConfig(sparse_ratio=0))
    >>> focus.queries.tolist()  # a group for every bin
    [[0, 2, 4], [1, 3, 5]]
    >>> torch.equal(focus.queries.flatten()[focus.inverse], torch.arange(6))
    True
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


class _Sizes(NamedTuple):
    block: int  # frames of a group's queries
    window: int  # frames that they see
    sampled: int  # c: of the window's frames, how many of every other bin


def _sizes(num_frames: int, config: LiteFocusConfig) -> _Sizes:
    """How time is cut up. Without a time window, or on a clip no longer than one, it is not: one block sees all."""
    block = window = num_frames
    if config.time_window is not None:
        half = -(-config.time_window // 2)
        wanted = max(MIN_BLOCK, half)
        if wanted + 2 * half < num_frames:
            block, window = wanted, wanted + 2 * half
    if not config.cross_frequency or config.sparse_ratio == 0:
        return _Sizes(block, window, 0)
    return _Sizes(block, window, max(1, round(config.sparse_ratio * window)))


def keys_per_query(num_frames: int, freq_bins: int, config: LiteFocusConfig) -> int:
    """Size of every focus set: T + (F - 1) c, or F c without the same-frequency branch. Builds no index."""
    _, window, sampled = _sizes(num_frames, config)
    return window + (freq_bins - 1) * sampled if config.same_frequency else freq_bins * sampled


def focus_set(
    num_frames: int,
    freq_bins: int,
    config: LiteFocusConfig = LiteFocusConfig(),  # noqa: B008  (immutable)
    *,
    layer: str = "",
    freq_axis: FreqAxis = "width",
) -> FocusSet:
    """The focus sets of a grid of `num_frames` x `freq_bins` tokens, on the CPU.

    config: its `time_window` is in frames of this grid.
    layer: name of the attention layer; layers of different names draw different samples.
    freq_axis: "width" if frequency varies fastest (token = frame * freq_bins + bin: AudioLDM, AudioLDM 2, MusicLDM,
        Tango), "height" if time does (token = bin * num_frames + frame: Riffusion, Auffusion).

    The sample takes c = max(1, round(sparse_ratio * num_frames)) frames of every bin, without replacement, so all
    sets have T + (F - 1) c keys and every token of another bin is in the set with the same probability. It is a pure
    function of (config.seed, layer, num_frames) and leaves the global random state alone.

    With a time window W, frames are cut into blocks whose queries share the keys of a window: at least W / 2 frames
    on either side of each of them, clamped at the ends of the clip. Both branches then run over the window instead of
    the clip. The last block ends with the clip, and overlaps the one before where the clip is no multiple of a block.

    Raises TypeError or ValueError for sizes that are not positive integers and for an unknown `freq_axis`.
    Source: LiteFocus, arXiv 2407.10468; as an exact set union, where the published code counts a sampled key of the
    query's own bin twice. Time windows are an addition of this library.

    >>> focus = focus_set(num_frames=10, freq_bins=4, config=LiteFocusConfig(sparse_ratio=0.2))
    >>> focus.queries.shape, focus.keys.shape, focus.inverse.shape
    (torch.Size([4, 10]), torch.Size([4, 16]), torch.Size([40]))
    """
    num_frames = positive_integer("num_frames", num_frames)
    freq_bins = positive_integer("freq_bins", freq_bins)
    check_freq_axis(freq_axis)
    frame_step, bin_step = (freq_bins, 1) if freq_axis == "width" else (1, num_frames)
    block, window, sampled = _sizes(num_frames, config)

    def arange(*args: int) -> Tensor:
        return torch.arange(*args, device="cpu")

    # token = frame * frame_step + bin * bin_step, by broadcasting over (bin, block, frame)
    bins = arange(freq_bins)[:, None, None]
    starts = arange(0, num_frames, block).clamp(max=num_frames - block)  # first frame of every block
    windows = (starts - (window - block) // 2).clamp(0, num_frames - window)  # and of its window
    own_queries = (starts[:, None] + arange(block)) * frame_step + bins * bin_step  # (bins, blocks, block)
    own_keys = (windows[:, None] + arange(window)) * frame_step + bins * bin_step  # (bins, blocks, window)
    frames = _draw(len(starts), freq_bins, window, sampled, f"{config.seed}/{layer}/{num_frames}")
    sample = (windows[:, None] + frames) * frame_step + bins * bin_step  # (bins, blocks, sampled)

    # where frame t of bin f stands: its block, and its place in there
    in_block = (arange(num_frames) // block).clamp(max=len(starts) - 1)
    place = arange(num_frames) - starts[in_block]
    if config.same_frequency:  # a group for every bin and block
        others = arange(freq_bins - 1).expand(freq_bins, -1)
        others = others + (others >= bins[:, 0])  # row f: every bin but f
        cross = sample.index_select(0, others.flatten()).view(freq_bins, freq_bins - 1, len(starts), sampled)
        keys = torch.cat([own_keys, cross.transpose(1, 2).flatten(2)], dim=2).flatten(0, 1)
        queries = own_queries.flatten(0, 1)
        position = (bins[:, 0] * len(starts) + in_block) * block + place  # (bins, frames)
    else:  # a group for every block: all its bins share one set
        keys = sample.transpose(0, 1).flatten(1)
        queries = own_queries.transpose(0, 1).flatten(1)
        position = (in_block * freq_bins + bins[:, 0]) * block + place
    inverse = position.t() if freq_axis == "width" else position
    return FocusSet(queries, keys, inverse.flatten())


def check_freq_axis(freq_axis: str) -> None:
    """Raise ValueError unless `freq_axis` is "width" or "height"."""
    if freq_axis not in ("width", "height"):
        hint = suggestion(str(freq_axis), ("width", "height"))
        raise ValueError(f"freq_axis must be 'width' or 'height', got {freq_axis!r}.{hint}")


def _draw(blocks: int, freq_bins: int, window: int, sampled: int, key: str) -> Tensor:
    """(freq_bins, blocks, sampled) numbers below `window`, ascending: a draw without replacement for each of them."""
    # crc32, since hash() of a string differs between processes
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(key.encode()))
    draw = torch.rand(blocks, freq_bins, window, generator=generator, dtype=torch.float64, device="cpu")
    return draw.argsort(dim=2)[..., :sampled].sort(dim=2).values.transpose(0, 1)
