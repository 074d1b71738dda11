"""The blocks of a UNet, and the self-attention layers in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from litefocus import _compvis

# Where wrappers keep the module that they wrap: torch.compile, activation checkpointing, FSDP, DDP and DataParallel.
WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"}


@dataclass(frozen=True)
class Layer:
    """A self-attention layer: its path in the UNet, free of every wrapper's name, and the level of its grid."""

    name: str
    attn: Any
    level: int


def unwrapped(module: Any) -> Any:
    """The module inside of compilers', checkpointing's and distributed training's wrappers."""
    while isinstance(module, nn.Module) and not WRAPPED.isdisjoint(module._modules.keys()):
        module = next(inner for name, inner in module._modules.items() if name in WRAPPED)
    return module


def named_modules(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """As `nn.Module.named_modules`, with names that do not change when something wraps a module on the way."""
    stack = [(prefix, module)]
    while stack:
        prefix, module = stack.pop()
        module = unwrapped(module)
        yield prefix, module
        children = [(f"{prefix}.{name}", child) for name, child in module._modules.items() if child is not None]
        stack += reversed(children)


def blocks(unet: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """(name, block, level) of a UNet; the grid at level l is halved l times, rounded up."""
    if _compvis.is_unet(unet):
        yield from _compvis.blocks(unet)
        return
    level = 0
    for i, block in enumerate(unwrapped(unet.down_blocks)):
        yield f"down_blocks.{i}", block, level
        level += getattr(unwrapped(block), "downsamplers", None) is not None
    if getattr(unet, "mid_block", None) is not None:
        yield "mid_block", unet.mid_block, level  # type: ignore[misc]
    for i, block in enumerate(unwrapped(unet.up_blocks)):
        yield f"up_blocks.{i}", block, level
        level -= getattr(unwrapped(block), "upsamplers", None) is not None


def self_attention_layers(unet: nn.Module) -> Iterator[Layer]:
    """The attention layers that are called without encoder states.

    Whether a call is self-attention shows only when it comes, and the processor decides then. Here the layers are
    told that can be: keys are projected from as many channels as queries are. `is_cross_attention` alone does not
    tell: AudioLDM's attn2 says True and is self-attention, as its UNet sets cross_attention_dim to its own widths.
    Where the encoder's width equals a layer's by chance, other layers of the same UNet show that there is an encoder,
    and the layer, or before diffusers 0.25 the transformer around it, whether it was built for one.
    """
    found, for_encoder = [], set()
    for prefix, block, level in blocks(unet):
        config: Any = None
        for name, module in named_modules(block, prefix):
            if hasattr(module, "transformer_blocks"):
                config = getattr(module, "config", None)
            if get_processor(module) is not None:
                found.append(Layer(name, module, level))
                if _is_for_encoder(module, name, config):
                    for_encoder.add(name)

    def own_width(layer: Layer) -> bool:
        return getattr(layer.attn.to_q, "in_features", None) == getattr(layer.attn.to_k, "in_features", None)

    has_encoder = not all(own_width(layer) for layer in found)
    for layer in found:
        if own_width(layer) and not (has_encoder and layer.name in for_encoder):
            yield layer


def _is_for_encoder(attn: nn.Module, name: str, config: Any) -> bool:
    """Whether a layer was built for encoder states. config: of the transformer around it, None where there is none."""
    said: bool | None = getattr(attn, "is_cross_attention", None)
    if said is not None:
        return said
    if getattr(config, "cross_attention_dim", None) is None:
        return False
    if name.endswith("attn2"):
        return not getattr(config, "double_self_attention", False)
    return bool(getattr(config, "only_cross_attention", False))


def get_processor(module: Any) -> Any:
    """The attention processor of a layer; None for every other module."""
    if "to_q" not in module._modules or "to_k" not in module._modules:  # most: in a UNet of thousands this counts
        return None
    if hasattr(module, "set_processor"):
        return getattr(module, "processor", None)
    return _compvis.get_processor(module) if _compvis.is_attention(module) else None


def set_processor(attn: Any, processor: Any) -> None:
    """Install `processor` on a layer."""
    if hasattr(attn, "set_processor"):
        attn.set_processor(processor)
    else:
        _compvis.set_processor(attn, processor)
