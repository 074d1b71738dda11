"""UNets of the original AudioLDM, AudioLDM 2 and AudioSR code: CompVis' block layout, attention without processors.

Layout: `UNetModel` in audioldm/latent_diffusion/openaimodel.py (audioldm 0.1.1) and
audioldm2/latent_diffusion/modules/diffusionmodules/openaimodel.py (audioldm2 0.1.0), `CrossAttention` in attention.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from litefocus._projection import project


def is_unet(module: Any) -> bool:
    """Whether `module` is a CompVis-style 2-D UNet."""
    parts: list[Any] = [getattr(module, name, None) for name in ("input_blocks", "middle_block", "output_blocks")]
    if not all(isinstance(part, nn.Module) for part in parts):
        return False
    first = next(parts[0].children(), None)
    return first is not None and any(isinstance(layer, nn.Conv2d) for layer in first.modules())


def blocks(unet: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """(name, block, level) of a UNet; the grid at level l is halved l times, rounded up."""
    level = 0
    for i, block in enumerate(unet.input_blocks):  # type: ignore[arg-type]
        for j, layer in enumerate(block):
            level += _holds(layer, "Downsample")
            yield f"input_blocks.{i}.{j}", layer, level
    yield "middle_block", unet.middle_block, level  # type: ignore[misc]
    for i, block in enumerate(unet.output_blocks):  # type: ignore[arg-type]
        for j, layer in enumerate(block):
            level -= _holds(layer, "Upsample")
            yield f"output_blocks.{i}.{j}", layer, level


def _holds(layer: nn.Module, name: str) -> bool:
    """Whether one of the modules of `layer` is of a class called `name`: the two packages share no classes."""
    return any(type(module).__name__ == name for module in layer.modules())


def is_attention(module: nn.Module) -> bool:
    """Whether `module` is a CompVis-style attention layer, which is called as layer(x, context, mask)."""
    return (
        all(hasattr(module, name) for name in ("to_q", "to_k", "to_v", "to_out", "scale"))
        and (hasattr(module, "heads") or hasattr(module, "n_heads"))
        and not hasattr(module, "set_processor")
    )


class OriginalAttention:
    """What a layer did before it was patched, behind diffusers' processor protocol.

    forward: the `forward` that was set on the layer itself, None for that of its class.

    Self-attention that is left dense goes through fused attention too, since that of the class materialises all scores;
    the result is the same but for rounding. Every other call is the layer's own.
    """

    def __init__(self, forward: Callable[..., Tensor] | None) -> None:
        self.forward = forward

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        output: Tensor
        if self.forward is not None:
            output = self.forward(hidden_states, encoder_hidden_states, attention_mask)
        elif encoder_hidden_states is None and attention_mask is None:
            attended = F.scaled_dot_product_attention(*project(attn, hidden_states))
            output = attn.to_out(attended.transpose(1, 2).flatten(2))
        else:
            own: Any = super(_ThroughProcessor, attn) if isinstance(attn, _ThroughProcessor) else attn
            output = own.forward(hidden_states, encoder_hidden_states, attention_mask)
        return output


class _ThroughProcessor:
    """Comes before a layer's class as long as the layer goes through a processor, which the layer itself keeps.

    So nothing knows the layer but the layer: its copies and its replicas for data parallelism go through the same
    processor with weights of their own.
    """

    _litefocus_processor: Any

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        output: Tensor = self._litefocus_processor(self, x, encoder_hidden_states=context, attention_mask=mask)
        return output

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # pickle finds classes by their names, and that of ours is the original's
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        return _new, (type(self).__bases__[1],), *reduced[2:]


@functools.cache
def _through_processor(kind: Any) -> Any:
    """`kind` with a processor, under the same name, by which others tell an attention layer."""
    return type(kind.__name__, (_ThroughProcessor, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _new(kind: Any) -> Any:
    """An empty layer that goes through a processor, for a copy to be filled."""
    return nn.Module.__new__(_through_processor(kind))


def get_processor(attn: nn.Module) -> Any:
    """The processor that the layer goes through, or its own attention as one."""
    forward = attn.__dict__.get("forward")
    if forward is not None and getattr(forward, "__func__", None) is not _ThroughProcessor.forward:
        return OriginalAttention(forward)
    return attn.__dict__.get("_litefocus_processor", OriginalAttention(None))


def set_processor(attn: Any, processor: Any) -> None:
    """Make the layer go through `processor`; an `OriginalAttention` restores what it stands for."""
    attn.__dict__.pop("forward", None)
    attn.__dict__.pop("_litefocus_processor", None)
    kind = type(attn).__bases__[1] if isinstance(attn, _ThroughProcessor) else type(attn)
    if isinstance(processor, OriginalAttention):
        attn.__class__ = kind
        if processor.forward is not None:
            attn.forward = processor.forward
    else:
        attn.__class__ = _through_processor(kind)
        attn.__dict__["_litefocus_processor"] = processor  # not as an attribute: a module would become one below it
