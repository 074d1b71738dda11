"""What was handed in, asked once: its UNet, the geometry of its latent, its self-attention layers and their grids."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import jit, nn

from litefocus import _compvis
from litefocus._grid import Grid, halved
from litefocus._latent import LatentGeometry, input_freq_bins, latent_geometry
from litefocus._layers import Layer, self_attention_layers, unwrapped
from litefocus.config import ConfigOptions, LiteFocusConfig, merged_config
from litefocus.focus import FreqAxis, check_freq_axis

ACCEPTED = (
    "an AudioLDM, AudioLDM 2, MusicLDM, Tango, Mustango or ConsistencyTTA pipeline, a LatentDiffusion of the original "
    "AudioLDM code, or the 2-D UNet of such a model (compiled or wrapped for distributed training or not)"
)
# children of a UNet, of diffusers and of the authors
UNET_PARTS = {"conv_in", "input_blocks"}
# where a model keeps its UNet, tried in this order
UNET_PATHS = ("", "unet", "student_unet", "model.unet", "model.student_unet", "model.diffusion_model")


@dataclass(frozen=True)
class Target:
    """A model that can be patched.

    owner: its class name, for messages. unet: without wrappers. geometry: of its latent, None where it does not say.
    """

    owner: str
    unet: nn.Module
    geometry: LatentGeometry | None

    @property
    def layers(self) -> list[Layer]:
        """Its self-attention layers, in the UNet's order."""
        return list(self_attention_layers(self.unet))


@dataclass(frozen=True)
class Plan:
    """A target with settings that fit it: `grids` are those of its `layers`, in order.

    freq_bins, freq_axis: of the UNet's input.
    """

    target: Target
    config: LiteFocusConfig
    freq_bins: int
    freq_axis: FreqAxis
    layers: tuple[Layer, ...]
    grids: tuple[Grid, ...]


def resolve(pipe: Any) -> Target:
    """The UNet of a pipeline, or `pipe` itself if it is one. Raises TypeError where there is none, or several."""
    pipe = unwrapped(pipe)
    _check_not_several(pipe)
    seen = []
    for path in UNET_PATHS:
        candidate = pipe
        for name in filter(None, path.split(".")):
            candidate = unwrapped(getattr(candidate, name, None))
        if candidate is None:
            continue
        unet = _unet_in(candidate)
        if unet is not None:
            return Target(type(pipe).__name__, unet, latent_geometry(pipe))
        seen.append((path, candidate))
    raise TypeError(_why_not(pipe, seen))


def plan(
    caller: str,
    pipe: Any,
    config: LiteFocusConfig | None,
    freq_bins: int | None,
    freq_axis: FreqAxis,
    overrides: ConfigOptions,
) -> Plan:
    """What `patch` and `probe` have in common: the same rules, the same messages. Changes nothing.

    caller: name of the public function, for messages. Raises what `patch` says that it raises.
    """
    config = merged_config(f"{caller}()", config, overrides)
    check_freq_axis(freq_axis)
    target = resolve(pipe)
    if freq_axis != "width" and target.geometry is not None:
        raise ValueError(
            f"freq_axis={freq_axis!r} contradicts {target.owner}, whose latent is (time, frequency); "
            "leave freq_axis out"
        )
    if freq_axis == "width" and _makes_images(pipe):
        raise ValueError(
            f"{target.owner} makes pictures of spectrograms, whose height is frequency; pass "
            'freq_axis="height", with freq_bins=64 (Riffusion) or 32 (Auffusion). For others, pass the UNet alone'
        )
    bins = input_freq_bins(target.owner, target.geometry, freq_bins)
    layers = tuple(target.layers)
    if not layers:
        raise ValueError(
            f"no self-attention layer of {type(target.unet).__name__} qualifies: its down, mid and up blocks hold no "
            "attention layer with a settable processor; there is nothing for litefocus to speed up in this UNet"
        )
    grids = tuple(
        Grid(layer.name, halved(bins, layer.level), level=layer.level, config=config, freq_axis=freq_axis)
        for layer in layers
    )
    return Plan(target, config, bins, freq_axis, layers, grids)


def probed(unet: nn.Module) -> bool:
    """Whether a block of `probe` measures this UNet, not one that it was copied from."""
    measuring = unet.__dict__.get("_litefocus_probe")
    return measuring is not None and measuring() is unet


def warn_of_known_problems(pipe: Any) -> None:
    """Warn where the pipeline at hand is known to fail without litefocus too, and say what mends it."""
    model = getattr(pipe, "language_model", None)
    if type(model).__name__ == "GPT2Model" and not hasattr(model, "_update_model_kwargs_for_generation"):
        warnings.warn(
            "this AudioLDM 2 pipeline holds a GPT2Model, with which it fails on transformers 4.52 and newer, without "
            "litefocus too; load it with language_model=GPT2LMHeadModel.from_pretrained(repo, "
            'subfolder="language_model"), the same weights',
            stacklevel=3,
        )


def _check_not_several(pipe: Any) -> None:
    """Raise TypeError for an object that holds several UNets, as the training classes of ConsistencyTTA do."""
    if _unet_in(pipe) is not None:
        return
    unets: dict[int, str] = {}
    for prefix, owner in (("", pipe), ("model.", unwrapped(getattr(pipe, "model", None)))):
        children = owner._modules if isinstance(owner, nn.Module) else {}
        for name, value in (*getattr(owner, "__dict__", {}).items(), *children.items()):
            unet = _unet_in(unwrapped(value))
            if unet is not None:
                unets.setdefault(id(unet), prefix + name)
    if len(unets) > 1:
        geometry = latent_geometry(pipe)
        raise TypeError(
            f"{type(pipe).__name__} holds {len(unets)} UNets ({', '.join(unets.values())}), and a call decides which "
            f"of them it uses; pass that one, as in litefocus.patch(pipe.{list(unets.values())[-1]}, "
            f"freq_bins={geometry.freq_bins if geometry else '...'})"
        )


def _makes_images(pipe: Any) -> bool:
    """Whether the VAE decodes to pictures in colour, as those of Stable Diffusion's kin do."""
    config = getattr(getattr(unwrapped(pipe), "vae", None), "config", None)
    return getattr(config, "in_channels", None) == 3


def _unet_in(module: Any) -> nn.Module | None:
    """The UNet that `module` is, or that it holds and passes on the attributes of, as adapters do; None for others."""
    if not isinstance(module, nn.Module) or not (_is_diffusers_unet(module) or _compvis.is_unet(module)):
        return None
    holders = (part for part in module.modules() if not UNET_PARTS.isdisjoint(part._modules))
    return next(holders, module)


def _is_diffusers_unet(module: nn.Module) -> bool:
    """Whether `module` is a UNet over images. Those over video start with the same convolution."""
    return (
        isinstance(getattr(module, "conv_in", None), nn.Conv2d)
        and hasattr(module, "down_blocks")
        and hasattr(module, "up_blocks")
        and not _is_video(module)
    )


def _is_video(module: nn.Module) -> bool:
    kinds = {type(part) for part in module.modules()}
    return nn.Conv3d in kinds or any(word in kind.__name__ for kind in kinds for word in ("Temporal", "Motion", "3D"))


def _why_not(pipe: Any, seen: list[tuple[str, Any]]) -> str:
    what = f"an object of type {type(pipe).__name__}" if pipe is not None else "None"
    for path, candidate in seen:
        kind = type(candidate).__name__
        if isinstance(candidate, jit.ScriptModule) or "Traced" in kind:
            return (
                f"the UNet of {type(pipe).__name__} is traced ({kind}), and nothing inside of a traced module can be "
                "patched; load the model without tracing (in Riffusion: use_traced_unet=False)"
            )
        if path.endswith("unet"):
            what += f", whose {path} ({kind}) is no 2-D UNet"
    if getattr(pipe, "transformer", None) is not None and getattr(pipe, "unet", None) is None:
        return (
            f"{type(pipe).__name__} has a transformer and no 2-D UNet, so its latent has no frequency axis to focus "
            f"on; litefocus accepts {ACCEPTED}"
        )
    return f"got {what}; litefocus accepts {ACCEPTED}"
