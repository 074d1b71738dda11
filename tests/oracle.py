"""Slow, obvious attention that the tests hold the library to. Nothing here is built the way the library builds it."""

from __future__ import annotations

import torch
from torch import Tensor

from litefocus import FocusSet


def allowed(focus: FocusSet) -> Tensor:
    """(tokens, tokens) booleans: may query i see key j? Token by token, from the group where its output is read."""
    mask = torch.zeros(focus.tokens, focus.tokens, dtype=torch.bool)
    keys = focus.keys.tolist()
    for token, place in enumerate(focus.inverse.tolist()):
        for key in keys[place // focus.queries.shape[1]]:
            mask[token, key] = True
    return mask


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Dense attention over (batch, heads, tokens, head_dim), in float64, with scores outside of `mask` at -inf."""
    query, key, value = query.double(), key.double(), value.double()
    scores = torch.einsum("bhid,bhjd->bhij", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("bhij,bhjd->bhid", scores.masked_fill(~mask, -torch.inf).softmax(dim=-1), value)


def bin_and_frame(token: int, num_frames: int, freq_bins: int, freq_axis: str) -> tuple[int, int]:
    """Where a token lies in the grid, by the definition of the two layouts."""
    if freq_axis == "width":
        return token % freq_bins, token // freq_bins
    return token // num_frames, token % num_frames
