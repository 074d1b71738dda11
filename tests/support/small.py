"""Small UNets of the real classes, calls of them, and what fresh ones yield: dense, and under a patch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

import litefocus
from support.authors import authors, cross_attention, random_weights
from support.pipelines import minimal_unet, sharpen
from support.settings import hand_in

FRAMES, BINS = 24, 16
FEW = {"sparse_ratio": 0.05, "min_sampled": 2}  # so few keys that every other sample, and dense attention, is far away
APART = 1e-3  # what other samples change at least; rounding changes less than a hundredth of it

Make = Callable[[], Any]


def small_unet(levels: int = 1, **overrides: Any) -> UNet2DConditionModel:
    """With cross-attention to a text, 16 bins at the input, as in Tango: 1 self-attention layer, or 4 on 2 levels."""
    settings: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    if levels == 2:
        settings |= {
            "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }
    unet = minimal_unet(**{**settings, **overrides})
    sharpen(unet)
    return unet


def two_levels() -> UNet2DConditionModel:
    return small_unet(2)


def authors_unet() -> Any:
    """AudioLDM 2's UNet in its authors' code, of one level: 12 self-attention layers without processors."""
    torch.manual_seed(0)
    unet = authors("audioldm2", "latent_diffusion.modules.diffusionmodules.openaimodel").UNetModel(
        image_size=64,
        in_channels=4,
        out_channels=4,
        model_channels=32,
        attention_resolutions=[1],
        num_res_blocks=1,
        channel_mult=[1],
        num_head_channels=8,
        use_spatial_transformer=True,
        context_dim=[12],
    )
    random_weights(unet)
    for layer in cross_attention(unet).values():
        layer.to_q.weight.data *= 4
        layer.to_v.weight.data *= 4
    return unet.eval()


BOTH = {"diffusers": small_unet, "authors": authors_unet}


def attention(unet: nn.Module) -> dict[str, Any]:
    """The attention layers of diffusers and of the authors."""
    layers = {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}
    return layers | cross_attention(unet)


def self_attention(unet: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in attention(unet).items() if name.endswith("attn1")}


def latent(batch: int = 2, frames: int = FRAMES, bins: int = BINS) -> Tensor:
    return torch.randn(batch, 4, frames, bins, generator=torch.Generator().manual_seed(1))


def text(batch: int = 2) -> Tensor:
    return torch.randn(batch, 5, 12, generator=torch.Generator().manual_seed(2))


def step(unet: Any, sample: Tensor | None = None, timestep: int = 3, call: Any = None, **conditions: Any) -> Tensor:
    """One call of a UNet, or of `call`, which takes what the UNet takes."""
    sample = latent() if sample is None else sample
    call, states = call or unet, text(len(sample)).to(sample.dtype)
    if hasattr(unet, "input_blocks"):
        masks = [torch.ones(len(sample), 5)]
        timesteps = torch.full((len(sample),), timestep)
        output: Tensor = call(sample, timesteps=timesteps, context_list=[states], context_attn_mask_list=masks)
        return output
    return call(sample, torch.tensor(timestep), states, **conditions).sample


def run(unet: Any, *arguments: Any, **settings: Any) -> Tensor:
    with torch.no_grad():
        return step(unet, *arguments, **settings)


def patch(unet: Any, seed: int = 1, **options: Any) -> litefocus.Patch:
    return litefocus.patch(unet, **{"freq_bins": BINS, **FEW, **options}, seed=seed)


@functools.cache
def dense(make: Make = small_unet) -> Tensor:
    return run(make())


@functools.cache
def focus(seed: int = 1, make: Make = small_unet) -> Tensor:
    """The output of a fresh UNet that was patched."""
    unet = make()
    patch(unet, seed)
    return run(unet)


@functools.cache
def first_sample(make: Make = small_unet) -> Tensor:
    """The same with the first sample of every layer: of layers compiled alone, and where gradients are recorded."""
    import pytest

    with pytest.MonkeyPatch.context() as context:
        hand_in(context, num_samples=1)
        unet = make()
        patch(unet)
        return run(unet)


def assert_same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=APART / 100, rtol=0)


def assert_apart(one: Tensor, other: Tensor) -> None:
    assert (one - other).abs().max() > APART


def assert_off(unet: Any, make: Make = small_unet) -> None:
    """No call goes through a focus set, and `status` says so."""
    assert_same(run(unet), dense(make))
    status = litefocus.status(unet)
    assert status.config is None
    assert {row.state for row in status.layers} == {"dense"}


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


class Distributed(nn.Module):
    """What DistributedDataParallel looks like."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def states(unet: Any) -> set[str]:
    """What `status` says of the layers."""
    return {row.state for row in litefocus.status(unet).layers}


def leftovers(unet: nn.Module) -> list[str]:
    ours = [name for module in unet.modules() for name in vars(module) if "litefocus" in name]
    hooked = [repr(module) for module in unet.modules() if module._forward_hooks or module._forward_pre_hooks]
    return ours + hooked


def same_processors(before: dict[str, Any], unet: Any) -> bool:
    """Whether the processors are the objects that `unet.attn_processors` held before."""
    after = unet.attn_processors
    return before.keys() == after.keys() and all(after[name] is before[name] for name in before)


def assert_same_gradients(unet: Any, expected: Any) -> None:
    for each in (unet, expected):
        each.train()
        torch.manual_seed(5)
        step(each).square().sum().backward()
    compared = 0
    for one, other in zip(unet.parameters(), expected.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-5)
            compared += bool(other.grad.any())
    assert compared > 30
