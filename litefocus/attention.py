"""Attention of every query over its focus set: gather, fused attention, gather back. Pure torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from litefocus.focus import FocusSet

# Bytes of keys gathered at once on a CPU. Larger tensors leave the processor's cache and cost page faults, smaller ones
# cost more calls: of AudioLDM 2's attention at 80 s and 8 bins, 16 MiB take a third longer.
SLICE_BYTES = 2 * 2**20


def focus_attention(query: Tensor, key: Tensor, value: Tensor, focus: FocusSet) -> Tensor:
    """softmax(q k^T / sqrt(head_dim) + log w) v, every query over the keys of its focus set alone.

    out_i = Σ_j w_j exp(s_ij) v_j / Σ_j w_j exp(s_ij), j in the focus set of i: with the weights of `focus_set`, an
    estimate of dense attention whose error shrinks with the number of sampled keys. Differentiable.

    Args:
        query: (batch, heads, tokens, head_dim), tokens = num_frames * freq_bins, in any dtype and on any device that
            `F.scaled_dot_product_attention` takes.
        key: as `query`.
        value: as `query`, or with another head_dim.
        focus: from `focus_set`, on the device of `query`; every batch element has the same focus sets.

    Returns:
        (batch, heads, tokens, head_dim of value).

    Raises:
        ValueError: where the shapes do not fit each other, or `focus` is for another grid or on another device.

    Source: LiteFocus, arXiv 2407.10468: attention restricted to F_i = S_i ∪ C, one softmax. The weights are an
    addition of this library.

    >>> import torch
    >>> from litefocus import focus_set
    >>> q, k, v = torch.randn(3, 2, 4, 80, 16)  # batch 2, 4 heads, 20 frames x 4 bins, head_dim 16
    >>> focus_attention(q, k, v, focus_set(num_frames=20, freq_bins=4)).shape
    torch.Size([2, 4, 80, 16])
    """
    if query.ndim != 4 or key.shape != query.shape or value.shape[:-1] != query.shape[:-1]:
        raise ValueError(
            "query and key must have one shape (batch, heads, tokens, head_dim), and value too but for head_dim; got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    batch, heads, tokens, _ = query.shape
    if focus.inverse.shape[0] != tokens:
        raise ValueError(
            f"the focus set is for {focus.tokens} tokens, query has {tokens}; "
            "build it with focus_set(num_frames, freq_bins) for this grid"
        )
    if focus.inverse.device != query.device:
        raise ValueError(
            f"the focus set is on {focus.inverse.device}, query on {query.device}; use focus.to(query.device)"
        )

    def in_batch(index: Tensor, size: int) -> Tensor:
        """Rows of one batch element, of `size`, as rows of all of them: (groups, n) to (batch, groups, n)."""
        starts = torch.arange(0, batch * size, size, dtype=torch.int32, device=index.device)
        return starts.view(-1, 1, 1) + index

    def gather(rows: Tensor, index: Tensor) -> Tensor:
        """(batch * tokens, heads * dim) and (batch, groups, n) to (batch * groups, heads, n, dim)."""
        picked = rows.index_select(0, index.flatten())
        return picked.view(batch * index.shape[1], index.shape[2], heads, rows.shape[1] // heads).transpose(1, 2)

    # Gather whole tokens, all heads at once: 3x faster than head by head (AudioLDM 2 at 80 s), and free of a copy here
    # where the heads come from a projection, as they do in a UNet. And of all batch elements at once, since torch
    # copies the rows of a matrix in all threads, those of anything else in one.
    query_rows, key_rows, value_rows = (x.transpose(1, 2).flatten(2).flatten(0, 1) for x in (query, key, value))
    mask = None if focus.log_weights is None else focus.log_weights.to(query.dtype).view(1, 1, 1, -1)
    # one tensor filled slice by slice: collected and concatenated, slices cost a tenth more, in page faults
    output = value_rows.new_empty(batch, focus.queries.numel(), value_rows.shape[1])
    step = _groups_at_once(key, focus)
    slices = (torch.split(in_batch(index, tokens), step, dim=1) for index in (focus.queries, focus.keys))
    done = 0
    for queries, keys in zip(*slices, strict=True):
        part = F.scaled_dot_product_attention(
            gather(query_rows, queries), gather(key_rows, keys), gather(value_rows, keys), attn_mask=mask
        )
        end = done + queries.shape[1] * queries.shape[2]
        output[:, done:end] = part.transpose(1, 2).reshape(batch, end - done, output.shape[2])
        done = end
    output = output.flatten(0, 1).index_select(0, in_batch(focus.inverse.unsqueeze(0), done).flatten())
    return output.view(batch, tokens, heads, value.shape[-1]).transpose(1, 2)


def _groups_at_once(key: Tensor, focus: FocusSet) -> int:
    """Groups of a slice: their keys are at most twice the number of tokens, and on a CPU at most SLICE_BYTES.

    The second limit does not hold under a compiler, which would unroll every slice, nor where gradients are recorded:
    the backward pass adds up a gradient of all tokens for every slice. Without it, forward and backward pass of one
    call (AudioLDM 2, 80 s, 8 bins, CPU) take 0.6 of their time.
    """
    tokens = focus.inverse.shape[0]
    keys = 2 * tokens
    if key.device.type == "cpu" and not (torch.compiler.is_compiling() or key.requires_grad):
        size = key.shape.numel() * key.element_size()  # not key.nbytes, which is unknown to tracers of symbolic shapes
        keys = min(keys, SLICE_BYTES * tokens // max(1, size))  # an empty batch has none
    return max(1, keys // focus.keys.shape[1])
