"""Candidates for attention over focus sets, to choose among by time: a mask, unmasked calls merged, FlexAttention.

The library uses `focus_attention`, which hands the log weights to fused attention as a mask. Everything here computes
the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from litefocus import FocusSet, focus_attention


def strata(focus: FocusSet) -> tuple[list[int], list[float]]:
    """How many keys, one after the other, have equal weights, and the logarithms of these weights."""
    if focus.log_weights is None:
        return [focus.keys_per_query], [0.0]
    weights, counts = focus.log_weights.unique_consecutive(return_counts=True)
    return counts.tolist(), weights.tolist()


def with_log_sum_exp(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Fused attention (batch, heads, queries, head_dim) and the log-sum-exp (batch, heads, queries) of its logits.

    By operators that are not public: for a CPU, torch 2.13 has none that is.
    """
    if query.device.type == "cuda":
        output, total, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)
        return output, total[..., : query.shape[2]]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)


def merge(parts: Iterable[tuple[Tensor, Tensor, float]]) -> Tensor:
    """Attention over all keys from that over some of them each: (output, log-sum-exp, log weight) of every part."""
    merged: Tensor | None = None
    for output, total, log_weight in parts:
        total = total + log_weight
        if merged is None:
            merged, so_far = output, total
        else:
            share = torch.sigmoid(total - so_far).unsqueeze(-1)
            merged, so_far = torch.lerp(merged, output, share.to(output.dtype)), torch.logaddexp(so_far, total)
    assert merged is not None
    return merged


def by_merging(focus: FocusSet) -> Callable[..., Tensor]:
    """In place of fused attention with a mask: one call without for every stratum of keys, merged."""
    counts, log_weights = strata(focus)

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        pieces = zip(key.split(counts, dim=2), value.split(counts, dim=2), log_weights, strict=True)
        return merge((*with_log_sum_exp(query, k, v), weight) for k, v, weight in pieces)

    return attend


def by_flex_attention(focus: FocusSet) -> Callable[..., Tensor]:
    """In place of fused attention with a mask: FlexAttention with the log weights as its `score_mod`."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    log_weights = focus.log_weights

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        if log_weights is None:
            return compiled(query, key, value)
        return compiled(query, key, value, score_mod=lambda score, b, h, i, j: score + log_weights[j])

    return attend


def through(attend: Callable[..., Tensor], focus: FocusSet) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`focus_attention` with `attend` in place of fused attention: the library's own gathering, another kernel."""

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with mock.patch.object(F, "scaled_dot_product_attention", attend):
            return focus_attention(query, key, value, focus)

    return run


def own_bins_as_views(focus: FocusSet, num_frames: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Own bins without gathering, as (batch, bins * heads, frames, head_dim); the sample gathered, then merged.

    For focus sets without time windows: one group a bin, whose first keys are the bin itself.
    """
    counts, log_weights = strata(focus)
    bins = len(focus.keys)
    sampled = focus.keys[:, num_frames:].T.flatten()

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, tokens, dim = query.shape
        q, k, v = (x.transpose(1, 2).flatten(2) for x in (query, key, value))

        def rows(x: Tensor) -> Tensor:
            return x.reshape(batch, -1, bins * heads, dim).transpose(1, 2)

        pairs = [(rows(k), rows(v))]
        if sampled.numel():
            pairs.append((rows(k.index_select(1, sampled)), rows(v.index_select(1, sampled))))
        weights = log_weights if len(pairs) == len(counts) else [0.0] * len(pairs)
        parts = ((*with_log_sum_exp(rows(q), a, b), weight) for (a, b), weight in zip(pairs, weights, strict=True))
        return merge(parts).transpose(1, 2).reshape(batch, tokens, heads, dim).transpose(1, 2)

    return run


def on_backend(backend: SDPBackend, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`run` with one of torch's fused attention kernels alone."""

    def only(*qkv: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return run(*qkv)

    return only
