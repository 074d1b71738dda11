"""Query, key and value of an attention layer, as its own code makes them."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def attention_inputs(
    attn: Any, hidden_states: Tensor, temb: Tensor | None = None, processor: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of a layer's self-attention as diffusers makes them: norms, projections, norms.

    hidden_states: (batch, tokens, channels) or (batch, channels, height, width). processor: that of dense attention.
    """
    # getattr, hasattr: the layers of early diffusers and of the original AudioLDM code lack some of these
    if getattr(attn, "spatial_norm", None) is not None:
        hidden_states = attn.spatial_norm(hidden_states, temb)
    if hidden_states.ndim == 4:
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
    if getattr(attn, "group_norm", None) is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
    # after unfusing, layers keep their fused projection, but their processors do not use it
    query, key, value = project(attn, hidden_states, fused=type(processor).__name__.startswith("Fused"))
    if getattr(attn, "norm_q", None) is not None:
        query = attn.norm_q(query)
    if getattr(attn, "norm_k", None) is not None:
        key = attn.norm_k(key)
    return query, key, value


def project(attn: Any, hidden_states: Tensor, fused: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of a layer's self-attention, each (batch, heads, tokens, head_dim)."""
    heads = attn.heads if hasattr(attn, "heads") else attn.n_heads
    if fused:
        rows = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        rows = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in rows)
    return query, key, value
