"""The blocks of a UNet and the self-attention layers in them, of diffusers' layout and of the authors'.

diffusers: `down_blocks`, `mid_block`, `up_blocks`; attention layers with processors. The authors' AudioLDM, AudioLDM 2
and AudioSR code has CompVis' layout: `input_blocks`, `middle_block`, `output_blocks`; `CrossAttention` without
processors. Read in audioldm/latent_diffusion/openaimodel.py and attention.py (audioldm 0.1.1), and in audioldm2 0.1.0.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from litefocus._context import Context, PatchedLayer
from litefocus._processor import FocusedForward, LiteFocusAttnProcessor, default_processor, with_focus, without_focus

# Where wrappers keep the module that they wrap: torch.compile, activation checkpointing, FSDP, DDP and DataParallel.
WRAPPED = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"}
# Processors that attend and do nothing else, by name: clients bring copies of them under the same names.
PLAIN_PROCESSORS = {
    "AttnProcessor",
    "AttnProcessor2_0",
    "AttnProcessorNPU",
    "CrossAttnProcessor",
    "FusedAttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
    "XFormersCrossAttnProcessor",
    "XLAFlashAttnProcessor2_0",
}
# Modules whose functions replace a layer's `forward` and call the replaced one.
FORWARD_HOOKS = {"accelerate.hooks", "diffusers.hooks.hooks"}


@dataclass(frozen=True, eq=False)
class Layer:
    """A self-attention layer: its path in the UNet, free of every wrapper's name, and the level of its grid."""

    name: str
    attn: Any
    level: int


def unwrapped(module: Any) -> Any:
    """The module inside of wrappers (torch.compile, activation checkpointing, FSDP, DDP): their only child."""
    while isinstance(module, nn.Module) and len(module._modules) == 1 and not WRAPPED.isdisjoint(module._modules):
        (module,) = module._modules.values()
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


def is_compvis(module: Any) -> bool:
    """Whether `module` is a 2-D UNet of CompVis' layout."""
    parts: list[Any] = [getattr(module, name, None) for name in ("input_blocks", "middle_block", "output_blocks")]
    if not all(isinstance(part, nn.Module) for part in parts):
        return False
    first = next(parts[0].children(), None)
    return first is not None and any(isinstance(layer, nn.Conv2d) for layer in first.modules())


def blocks(unet: Any) -> Iterator[tuple[str, nn.Module, int]]:
    """(name, block, level) of a UNet; the grid at level l is halved l times, rounded up."""
    level = 0
    if is_compvis(unet):
        for i, block in enumerate(unet.input_blocks):
            for j, layer in enumerate(block):
                level += _holds(layer, "Downsample")
                yield f"input_blocks.{i}.{j}", layer, level
        yield "middle_block", unet.middle_block, level
        for i, block in enumerate(unet.output_blocks):
            for j, layer in enumerate(block):
                level -= _holds(layer, "Upsample")
                yield f"output_blocks.{i}.{j}", layer, level
        return
    for i, block in enumerate(unwrapped(unet.down_blocks)):
        yield f"down_blocks.{i}", block, level
        level += getattr(unwrapped(block), "downsamplers", None) is not None
    if getattr(unet, "mid_block", None) is not None:
        yield "mid_block", unet.mid_block, level
    for i, block in enumerate(unwrapped(unet.up_blocks)):
        yield f"up_blocks.{i}", block, level
        level -= getattr(unwrapped(block), "upsamplers", None) is not None


def _holds(layer: nn.Module, name: str) -> bool:
    """Whether one of the modules of `layer` is of a class called `name`: the packages share no classes."""
    return any(type(module).__name__ == name for module in layer.modules())


def self_attention_layers(unet: nn.Module) -> list[Layer]:
    """The attention layers that are called without encoder states, in the UNet's order.

    A layer counts if `to_k` takes as many channels as `to_q`. `is_cross_attention` alone is no criterion: it is True on
    AudioLDM's attn2, which attends to its own input. In a UNet where some layers take encoder states, the encoder's
    width may equal a layer's. Such a layer is recognised by `is_cross_attention`, or by the config of the transformer
    around it (the old diffusers that Mustango ships).
    """
    found, for_encoder = [], set()
    for prefix, block, level in blocks(unet):
        config: Any = None
        for name, module in named_modules(block, prefix):
            if hasattr(module, "transformer_blocks"):
                config = getattr(module, "config", None)
            if _is_attention(module):
                found.append(Layer(name, module, level))
                if _is_for_encoder(module, name, config):
                    for_encoder.add(name)

    def own_width(layer: Layer) -> bool:
        return getattr(layer.attn.to_q, "in_features", None) == getattr(layer.attn.to_k, "in_features", None)

    has_encoder = not all(own_width(layer) for layer in found)
    return [layer for layer in found if own_width(layer) and not (has_encoder and layer.name in for_encoder)]


def _is_attention(module: Any) -> bool:
    """Whether `module` has a processor, or the attributes of CompVis' attention, called as layer(x, context, mask)."""
    if "to_q" not in module._modules or "to_k" not in module._modules:  # cheap test first: most modules are none
        return False
    compvis = all(hasattr(module, name) for name in ("to_v", "to_out", "scale"))
    return hasattr(module, "set_processor") or (compvis and (hasattr(module, "heads") or hasattr(module, "n_heads")))


def _is_for_encoder(attn: nn.Module, name: str, config: Any) -> bool:
    """Whether a layer was built for encoder states. config: of the transformer around it, None where there is none."""
    is_cross_attention: bool | None = getattr(attn, "is_cross_attention", None)
    if is_cross_attention is not None:
        return is_cross_attention
    if getattr(config, "cross_attention_dim", None) is None:
        return False
    if name.endswith("attn2"):
        return not getattr(config, "double_self_attention", False)
    return bool(getattr(config, "only_cross_attention", False))


def layers_to_patch(unet: nn.Module) -> dict[Layer, str | None]:
    """Every self-attention layer, with the reason why it stays dense or None. Raises ValueError if all stay dense."""
    layers = self_attention_layers(unet)
    nothing = f"no self-attention layer of {type(unet).__name__} can be patched"
    if not layers:
        raise ValueError(f"{nothing}: its down, mid and up blocks hold none that litefocus knows")
    reasons = {layer: _left_dense(layer.attn) for layer in layers}
    if None not in reasons.values():
        raise ValueError(f"{nothing} ({count_reasons(reasons.values())})")
    return reasons


def count_reasons(reasons: Iterable[str | None]) -> str:
    """How many layers stay dense, and why: '2: its processor is X; 1: ...'. Empty if none does."""
    return "; ".join(f"{count}: {reason}" for reason, count in Counter(filter(None, reasons)).items())


def _left_dense(attn: Any) -> str | None:
    """Why `patch` leaves a layer dense; None if it does not.

    A patched layer that something has wrapped since counts as patched, unless the UNet's last call did not reach it.
    """
    layer = patched(attn)
    bypassed = layer is not None and layer.grid is not None and layer.grid.last_call < layer.context.finished
    return obstacle(attn) if layer is None or bypassed else None


def obstacle(attn: Any) -> str | None:
    """Why LiteFocus cannot replace a layer's attention; None for a plain layer.

    A plain layer runs the `forward` of its class, maybe behind hooks of accelerate, diffusers or a compiler, and that
    does nothing but attend: by one of PLAIN_PROCESSORS, or as CompVis' CrossAttention.
    """
    compvis = not hasattr(attn, "set_processor")
    forward = _forward_behind_hooks(attn)
    if forward is not None:
        function = getattr(forward, "__func__", None)
        # an instance's forward comes before its class, so hooks on a CompVis layer reach ours only if they came later
        if function is not type(attn).forward or (compvis and function is not FocusedForward.forward):
            return f"its forward is replaced by {_name(forward)}"
    kind = next(kind for kind in type(attn).__mro__ if "forward" in vars(kind) and kind is not FocusedForward)
    own = vars(kind)["forward"]
    named_so = getattr(own, "__qualname__", "") == f"{kind.__qualname__}.forward" and own.__module__ == kind.__module__
    derived = any("forward" in vars(base) for base in kind.__mro__[1:] if base is not nn.Module)
    if not named_so or hasattr(own, "__wrapped__") or derived:
        return f"{kind.__name__} has a forward of its own"
    if compvis:
        plain = kind.__name__ == "CrossAttention" and set(attn._modules) == {"to_q", "to_k", "to_v", "to_out"}
        return None if plain else f"{kind.__name__} is not known to attend as CompVis' CrossAttention does"
    processor = getattr(attn, "processor", None)
    if isinstance(processor, LiteFocusAttnProcessor) or type(processor).__name__ in PLAIN_PROCESSORS:
        return None
    return f"its processor is {_name(processor)}"


def _forward_behind_hooks(attn: Any) -> Any:
    """The `forward` that hooks on a layer end in; None for that of its class."""
    forward = vars(attn).get("forward")
    while forward is not None:
        if hasattr(forward, "_torchdynamo_orig_callable"):
            forward = forward._torchdynamo_orig_callable
        elif isinstance(forward, functools.partial) and forward.func.__module__ in FORWARD_HOOKS:
            before = getattr(forward, "__wrapped__", None)
            if before is forward.func:  # diffusers before 0.40 does not say what it wrapped
                first = attn._diffusers_hook._fn_refs[0]
                before = first.original_forward or first.forward
            forward = before
        else:
            break
    return forward


def _name(thing: Any) -> str:
    """Of a function its own, of other objects that of their class."""
    name: str = getattr(thing, "__name__", type(thing).__name__)
    return name


def install(layer: Layer, context: Context) -> None:
    """Put LiteFocus on a plain layer. A patched layer that was wrapped since keeps its wrapper."""
    attn, before = layer.attn, patched(layer.attn)
    if obstacle(attn) is not None:
        if before is not None:
            vars(attn)["_litefocus"] = before._replace(name=layer.name, context=context)
        return
    processor = getattr(attn, "processor", None)
    original = None if before is None else before.original
    if not hasattr(attn, "set_processor"):
        if not isinstance(attn, FocusedForward):
            kind: Any = type(attn)
            attn.__class__ = with_focus(kind)
    elif not isinstance(processor, LiteFocusAttnProcessor):
        attn.set_processor(LiteFocusAttnProcessor(processor))
        original = processor
    elif processor.original is not None:
        original = processor.original
    vars(attn)["_litefocus"] = PatchedLayer(layer.name, context, original)


def uninstall(attn: Any) -> None:
    """Put back a layer's processor or class as it was before. Does nothing to a module without LiteFocus."""
    layer = vars(attn).pop("_litefocus", None)
    if isinstance(attn, FocusedForward):
        kind: Any = type(attn)
        attn.__class__ = without_focus(kind)
    processor = getattr(attn, "processor", None)
    if isinstance(processor, LiteFocusAttnProcessor) and (layer is not None or processor.original is not None):
        original = processor.original if processor.original is not None else layer.original
        attn.set_processor(default_processor() if original is None else original)


def patched(attn: Any) -> PatchedLayer | None:
    """What a patch keeps on a layer; None where there is none."""
    layer: PatchedLayer | None = vars(attn).get("_litefocus")
    return layer
