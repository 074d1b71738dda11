"""Which keys each query attends to, and with which weights.

The latent of an AudioLDM-style model is a grid of `num_frames` time frames x `freq_bins` frequency bins, flattened to
tokens. Query i attends to its focus set F_i = S_i ∪ C: every token S_i of its own frequency bin, and a random sample
C of the tokens of all other bins (LiteFocus, arXiv 2407.10468). A sampled key is weighted by the inverse of its
sampling probability, so that sums over the sample estimate sums over all keys (Horvitz and Thompson 1952). This file
builds the sets as indices; `attention.py` attends over them.

The indices are computed in NumPy, which torch's tracers do not record: indices and weights are constants of a graph.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from litefocus.config import LiteFocusConfig, checked_config, positive_integer, suggestion

FreqAxis = Literal["width", "height"]
Index = NDArray[np.int32]

MAX_UINT32 = 2**32 - 1
MIN_BLOCK = 64  # queries that share a time window: with fewer, fused attention on a CPU runs at a third of its speed


@dataclass(frozen=True, eq=False, repr=False)
class FocusSet:
    """The focus sets of all tokens, as int32 indices into the tokens. Queries with equal keys form a group.

    queries: (groups, queries_per_group). Together the groups hold every token, some twice if the last blocks overlap.
    keys: (groups, keys_per_query). The tokens that every query of the group attends to, each once.
    inverse: (tokens,). Where in `queries.flatten()` the output of token i is read: undoes the grouping.
    log_weights: (keys_per_query,) in float32, what is added to the logits of every group's keys; None where all are 0.

    >>> focus = focus_set(num_frames=3, freq_bins=2, config=LiteFocusConfig(sparse_ratio=0))
    >>> focus.queries.tolist()  # a group for every bin
    [[0, 2, 4], [1, 3, 5]]
    >>> torch.equal(focus.queries.flatten()[focus.inverse], torch.arange(6))
    True
    """

    queries: Tensor
    keys: Tensor
    inverse: Tensor
    log_weights: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens of the grid, num_frames * freq_bins."""
        return self.inverse.shape[0]

    @property
    def keys_per_query(self) -> int:
        """Number of keys in every query's focus set."""
        return self.keys.shape[1]

    def __repr__(self) -> str:
        groups, queries = self.queries.shape
        weights = "equal weights" if self.log_weights is None else f"weights up to {self.log_weights.max().exp():.3g}"
        return (
            f"FocusSet({self.tokens} tokens in {groups} groups of {queries}, {self.keys_per_query} keys each "
            f"({self.keys_per_query / self.tokens:.1%}), {weights}, {self.keys.device})"
        )

    def to(self, device: torch.device | str) -> FocusSet:
        """The same sets with their indices on `device`."""
        weights = self.log_weights
        return FocusSet(
            self.queries.to(device),
            self.keys.to(device),
            self.inverse.to(device),
            None if weights is None else weights.to(device),
        )


class _Sizes(NamedTuple):
    block: int  # frames of the queries that share a window
    window: int  # n: frames of the window around a block
    sampled: int  # c: frames sampled inside of the window, of every other bin
    far: int  # m: frames sampled outside of the window, of every bin


def _sizes(num_frames: int, config: LiteFocusConfig) -> _Sizes:
    """Sizes of blocks, windows and samples. Without `time_window`, or if it spans the clip, there is one block."""
    block = window = num_frames
    if config.time_window is not None:
        half = -(-config.time_window // 2)
        wanted = max(MIN_BLOCK, half)
        if wanted + 2 * half < num_frames:
            block, window = wanted, wanted + 2 * half
    far = min(config.far_sampled, num_frames - window)
    if not config.cross_frequency or config.sparse_ratio == 0:
        return _Sizes(block, window, 0, far)
    return _Sizes(block, window, min(window, max(1, config.min_sampled, round(config.sparse_ratio * window))), far)


def keys_per_query(num_frames: int, freq_bins: int, config: LiteFocusConfig) -> int:
    """Size of every focus set. Builds no index."""
    _, window, sampled, far = _sizes(num_frames, config)
    if not config.same_frequency:
        return freq_bins * (sampled + far)
    return window + (freq_bins - 1) * sampled + far * (freq_bins if sampled else 1)


def focus_set(
    num_frames: int,
    freq_bins: int,
    config: LiteFocusConfig = LiteFocusConfig(),  # noqa: B008  (immutable)
    *,
    layer: str = "",
    freq_axis: FreqAxis = "width",
    sample: int = 0,
    **options: Any,
) -> FocusSet:
    """The focus sets of a grid of `num_frames` x `freq_bins` tokens, on the CPU.

    Of every other bin c = max(1, min_sampled, round(sparse_ratio * T)) frames are sampled, at most all T = num_frames:
    the clip is cut into c stretches of equal length, or one frame more, and a random frame of each is taken (stratified
    sampling). Within a stretch, each of the F bins draws from its own F-th part, dealt at random, and sample number 0,
    1, 2, 3, 4, ... of a bin is 0, 1/2, 1/4, 3/4, 1/8, ... of the stretch after the first, wrapping around at its end
    (van der Corput's sequence): where attention changes little within a stretch, errors of bins, and of steps, cancel
    in part. So all sets have T + (F - 1) c keys. A key of the own bin weighs 1, a sampled one the length of its
    stretch, about T / c: numerator and denominator of the softmax are then unbiased estimates of dense attention's,
    whatever the attention looks like.

    With a time window, h = ceil(time_window / 2), frames are cut into blocks of b = max(64, h). The queries of a block
    share a window of n = b + 2 h frames, which extends at least h to either side of every query, clamped at the ends of
    the clip; a clip of up to n frames has none. A set then has three parts: the n frames of the own bin (weight 1), c
    frames of the window of every other bin, with c computed from n instead of T (about n / c), and m = `far_sampled` of
    the T - n frames outside of the window of every bin, the own included (about (T - n) / m). All blocks use one draw
    of far frames, counted without the window, so that blocks near each other have nearly the same. The last block ends
    with the clip, and overlaps the one before where the clip is no multiple of a block.

    Without other bins (`cross_frequency=False` or `sparse_ratio=0`) the far sample is of the own bin alone; with
    `same_frequency=False` the own bin is sampled like all others.

    Args:
        num_frames: time frames of the grid.
        freq_bins: frequency bins of the grid.
        config: settings; `time_window` is in frames of this grid.
        layer: name of the attention layer; layers of different names draw different samples.
        freq_axis: "width" if frequency varies fastest (token = frame * freq_bins + bin: AudioLDM, AudioLDM 2,
            MusicLDM, Tango), "height" if time does (token = bin * num_frames + frame: Riffusion, Auffusion).
        sample: number of the layer's sample, at least 0.

    Returns:
        The sets. They are a pure function of all arguments; no global random state is read or changed.

    Raises:
        TypeError: for sizes and samples that are no integers, for a `config` that is no `LiteFocusConfig`, and for any
            `options`: unlike `patch`, this function takes settings in `config` alone.
        ValueError: for sizes below 1, a sample below 0 and an unknown `freq_axis`.

    Source: LiteFocus, arXiv 2407.10468. The published code samples tokens of all bins at once, and counts those of the
    query's own bin twice; this is an exact set union. `LiteFocusConfig.paper()` has its settings. Stratified samples,
    weights, time windows and far samples are additions of this library.

    >>> focus = focus_set(num_frames=100, freq_bins=4, config=LiteFocusConfig(sparse_ratio=0.2, min_sampled=0))
    >>> focus.queries.shape, focus.keys.shape, focus.inverse.shape
    (torch.Size([4, 100]), torch.Size([4, 160]), torch.Size([400]))
    >>> focus.log_weights.exp().unique()  # the own bin, and 100 / 20
    tensor([1., 5.])
    """
    if options:
        fields = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise TypeError(f"focus_set() takes settings as one object: focus_set(..., config=LiteFocusConfig({fields}))")
    num_frames = positive_integer("num_frames", num_frames)
    freq_bins = positive_integer("freq_bins", freq_bins)
    sample = positive_integer("sample", sample, 0)
    config = checked_config(config)
    check_freq_axis(freq_axis)
    frame_step, bin_step = (freq_bins, 1) if freq_axis == "width" else (1, num_frames)
    block, window, sampled, far = _sizes(num_frames, config)

    # token = frame * frame_step + bin * bin_step, by broadcasting over (block, bin, frame), so that groups that follow
    # each other share a window, whose keys are then still in the processor's cache
    bins = np.arange(freq_bins, dtype=np.int32)[:, None]
    starts = np.arange(0, num_frames, block, dtype=np.int32).clip(max=num_frames - block)  # first frame of every block
    windows = (starts - (window - block) // 2).clip(0, num_frames - window)  # and of its window
    queries = (starts[:, None, None] + np.arange(block, dtype=np.int32)) * frame_step + bins * bin_step
    own = (windows[:, None, None] + np.arange(window, dtype=np.int32)) * frame_step + bins * bin_step
    # crc32, since hash() of a string differs between processes
    generator = np.random.PCG64(zlib.crc32(f"{config.seed}/{layer}/{num_frames}".encode()))
    inside, near = _sample_frames(generator, (len(starts), freq_bins, sampled), window, sample)
    # one draw for all blocks: errors of their own would set those near each other apart, and clips would drift
    outside, distant = _sample_frames(generator, (1, freq_bins, far), num_frames - window, sample)
    outside = outside + np.int32(window) * (outside >= windows[:, None, None])
    inside, outside = (x * frame_step + bins * bin_step for x in (inside + windows[:, None, None], outside))

    if config.same_frequency:  # a group for every block and bin
        others = np.array([[g for g in range(freq_bins) if g != f] for f in range(freq_bins)], dtype=np.intp)
        everywhere = np.tile(np.arange(freq_bins), (freq_bins, 1))
        strata = [own, _of_bins(inside, others), _of_bins(outside, everywhere) if sampled else outside]
        times = (freq_bins - 1, freq_bins if sampled else 1)
        weights = np.concatenate([np.ones(window), np.tile(near, times[0]), np.tile(distant, times[1])])
    else:  # a group for every block: all its bins share one set
        queries, *strata = (x.reshape(len(starts), 1, -1) for x in (queries, inside, outside))
        weights = np.concatenate([np.tile(near, freq_bins), np.tile(distant, freq_bins)])
    keys = np.concatenate(strata, axis=2)
    # where frame t of bin f stands: its block, and its place in there
    in_block = (np.arange(num_frames, dtype=np.int32) // block).clip(max=len(starts) - 1)
    position = (in_block * freq_bins + bins) * block + np.arange(num_frames, dtype=np.int32) - starts[in_block]
    inverse = (position.T if freq_axis == "width" else position).reshape(-1)
    weighted = config.reweight and np.ptp(weights) > 0  # equal weights cancel in the softmax
    return FocusSet(
        _tensor(queries.reshape(-1, queries.shape[2])),
        _tensor(keys.reshape(-1, keys.shape[2])),
        _tensor(inverse),
        _tensor(np.log(weights).astype(np.float32)) if weighted else None,
    )


def check_freq_axis(freq_axis: str) -> None:
    """Raise ValueError unless `freq_axis` is "width" or "height"."""
    if freq_axis not in ("width", "height"):
        hint = suggestion(str(freq_axis), ("width", "height"))
        raise ValueError(f"freq_axis must be 'width' or 'height', got {freq_axis!r}.{hint}")


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _of_bins(tokens: Index, others: NDArray[np.intp]) -> Index:
    """For every bin, the sampled tokens of `others` (bins, n) one after the other: (blocks, bins, n * sampled)."""
    blocks, bins, sampled = tokens.shape
    joined: Index = tokens[:, others].reshape(blocks, bins, others.shape[1] * sampled)
    return joined


def _sample_frames(
    generator: np.random.PCG64, shape: tuple[int, int, int], frames: int, sample: int
) -> tuple[Index, Index]:
    """A random frame of every stratum of `frames` frames, for every block and bin, and the lengths of the strata.

    generator: its raw stream is the same in every release of NumPy and on every machine. shape: (blocks, freq_bins,
    strata). Returns frames of that shape, ascending, and lengths (strata,), the inverse sampling probabilities.
    """
    _, freq_bins, strata = shape
    bounds = np.arange(strata + 1, dtype=np.uint64) * frames // max(strata, 1)
    lengths = np.diff(bounds)
    raw = generator.random_raw(shape)
    order, jitter = raw >> 32, raw & MAX_UINT32
    # the part of a stratum that each bin draws from: a random permutation of the bins
    part = order.argsort(axis=1, kind="stable").astype(np.uint64)
    place = ((part << 32) + jitter) // freq_bins  # in the stratum, in units of 2^-32 of its length
    shift = int(f"{sample & MAX_UINT32:032b}"[::-1], 2)  # 0, 1/2, 1/4, 3/4, ...: the bits of `sample`, reversed
    place = (place + shift) & MAX_UINT32
    return (bounds[:-1] + (place * lengths >> 32)).astype(np.int32), lengths.astype(np.int32)
