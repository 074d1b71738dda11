"""The UNets of the authors' packages audioldm, audioldm2 and audiosr: the real classes, small random weights."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


def authors(package: str, module: str) -> Any:
    """A module of the authors' packages, without the package's own __init__, which loads their whole pipelines."""
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise ModuleNotFoundError(f"pip install einops progressbar && pip install --no-deps {package}")
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = list(spec.submodule_search_locations or ())
    return importlib.import_module(f"{package}.{module}")


def original_unet(variant: str) -> nn.Module:
    """The authors' UNet with the settings of their configurations, at a quarter of the width. Their output
    layers start at zero, which would hide everything.
    """
    package, module = variant.split()[0], "latent_diffusion.modules.diffusionmodules.openaimodel"
    if package == "audioldm":
        module = "latent_diffusion.openaimodel"
    settings = {
        "image_size": 64,
        "in_channels": 8,
        "out_channels": 8,
        "model_channels": 32,
        "attention_resolutions": [8, 4, 2],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 3, 5],
        "num_head_channels": 32,
        "use_spatial_transformer": True,
        **VARIANTS[variant][0],
    }
    torch.manual_seed(0)
    unet = authors(package, module).UNetModel(**settings).eval()
    random_weights(unet)
    return unet


def random_weights(unet: nn.Module) -> None:
    """Where weights start at zero."""
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)


VARIANTS: dict[str, tuple[dict[str, Any], int, int, int]] = {  # settings, bins at the input, self-attention, all
    "audioldm": ({"extra_film_condition_dim": 24, "extra_film_use_concat": True}, 16, 32, 32),
    "audioldm2 full": ({"context_dim": [28, 20]}, 16, 64, 96),
    "audioldm2 large": ({"context_dim": [28, 20, None], "transformer_depth": 2}, 16, 192, 256),
    "audioldm2 speech": ({"context_dim": [28]}, 16, 48, 64),
    "audioldm2 T5": ({"context_dim": [20]}, 16, 48, 64),
    "audioldm2 48k": (
        {"in_channels": 16, "out_channels": 16, "extra_film_condition_dim": 24, "context_dim": [None]},
        32,
        64,
        64,
    ),
    # the latent of the clip to be mended comes on top of the noise
    "audiosr": ({"in_channels": 32, "out_channels": 16, "extra_sa_layer": True}, 32, 64, 64),
}


def run_original(unet: Any, frames: int = 24, bins: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    conditions: dict[str, Any] = {}
    if unet.extra_film_condition_dim:
        conditions["y"] = draw(2, unet.extra_film_condition_dim)
    if not type(unet).__module__.startswith("audioldm."):
        widths = [layer.to_k.in_features for name, layer in cross_attention(unet).items() if "input_blocks.4." in name]
        widths = list(dict.fromkeys(width for width in widths if width != 64))
        conditions["context_list"] = [draw(2, 5, width) for width in widths]
        conditions["context_attn_mask_list"] = [torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])] * len(widths)
    with torch.no_grad():
        return unet(draw(2, unet.in_channels, frames, bins), timesteps=torch.tensor([7, 7]), **conditions)


def cross_attention(unet: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in unet.named_modules() if type(layer).__name__ == "CrossAttention"}
