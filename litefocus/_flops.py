"""How much arithmetic a step of a UNet needs, by its modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from litefocus._grid import halved
from litefocus._layers import blocks, named_modules


@dataclass(frozen=True)
class StepFlops:
    """Estimated floating-point operations of one UNet step for one batch element.

    attention: those of every self-attention layer's scores and values, patched, in the UNet's order.
    """

    dense: float
    patched: float
    attention: tuple[float, ...] = ()

    @property
    def ratio(self) -> float:
        """How many times less arithmetic the patched step needs; the most that it can be faster."""
        return self.dense / self.patched


def step_flops(unet: nn.Module, keys_kept: Mapping[Any, float], num_frames: int, freq_bins: int) -> StepFlops:
    """Arithmetic of one UNet step: convolutions, projections and self-attention, 2 FLOPs a multiplication.

    Cross-attention over the prompt's tokens, embeddings and norms are left out; they are below 2 % from 10 s on.

    Args:
        unet: without wrappers.
        keys_kept: share of keys for every self-attention layer, by the layer itself.
        num_frames: of the grid at the UNet's input.
        freq_bins: of the grid at the UNet's input.
    """
    dense = saved = 0.0
    attention = dict.fromkeys(keys_kept, 0.0)
    # keys and values of cross-attention are made of the prompt's tokens, which are few
    of_prompt = set()
    module: Any
    for module in unet.modules():
        if hasattr(module, "to_q") and module not in keys_kept:
            of_prompt |= {
                id(part) for name in ("to_k", "to_v") for part in getattr(module, name, nn.Module()).modules()
            }
    for prefix, block, level in blocks(unet):
        for name, module in named_modules(block, prefix):
            at = level + (".downsamplers." in name) - (".upsamplers." in name)
            tokens = halved(num_frames, at) * halved(freq_bins, at)
            if module in keys_kept:
                scores = 4 * tokens**2 * module.to_q.out_features
                attention[module] = scores * keys_kept[module]
                dense += scores
                saved += scores - attention[module]
            in_transformer = ".attentions" in name or ".transformer_blocks." in name
            per_token = isinstance(module, nn.Conv2d) or (isinstance(module, nn.Linear) and in_transformer)
            if per_token and id(module) not in of_prompt:
                dense += 2 * module.weight.numel() * tokens
    return StepFlops(dense, dense - saved, tuple(attention.values()))
