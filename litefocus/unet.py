"""Find the UNet of a pipeline, the grid of its latent, and its self-attention layers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import jit, nn

from litefocus.clients import compvis
from litefocus.config import positive_integer

ACCEPTED = (
    "an AudioLDM, AudioLDM 2, MusicLDM, Tango, Mustango or ConsistencyTTA pipeline, a LatentDiffusion of the original "
    "AudioLDM code, or the 2-D UNet of such a model (compiled or not)"
)
# where a model keeps its UNet, tried in this order
UNET_PATHS = ("", "unet", "student_unet", "model.unet", "model.student_unet", "model.diffusion_model")


@dataclass(frozen=True)
class Geometry:
    """The grid of a model's latent.

    freq_bins: at the UNet's input. mel_frame: seconds, None if the model does not say. scale: mel frames, and mel
    bins, that a VAE makes one of.
    """

    freq_bins: int
    mel_frame: float | None
    scale: int

    def num_frames(self, seconds: float) -> int:
        """Frames of the latent for a clip, rounded as the pipelines of diffusers round them.

        Raises TypeError for what is no number, ValueError for a length that is not finite or below a mel frame.
        """
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
            raise TypeError(f"seconds must be a number, got {seconds!r} ({type(seconds).__name__})")
        if not (math.isfinite(seconds) and seconds > 0):
            raise ValueError(f"seconds must be finite and above 0, got {seconds!r}")
        assert self.mel_frame is not None
        mel_frames = int(seconds / self.mel_frame)
        if not mel_frames:
            raise ValueError(f"seconds must be at least one mel frame, {self.mel_frame:g}, got {seconds!r}")
        return math.ceil(mel_frames / self.scale)


@dataclass(frozen=True)
class Layer:
    """A self-attention layer: its path in the UNet, and the grid that it sees."""

    name: str
    attn: Any
    level: int
    freq_bins: int


def uncompiled(module: Any) -> Any:
    """The module inside `torch.compile`'s wrapper."""
    return getattr(module, "_orig_mod", module)


def find_unet(pipe: Any) -> nn.Module:
    """The 2-D UNet of a pipeline, or `pipe` itself if it is one. Raises TypeError where there is none."""
    seen = []
    for path in UNET_PATHS:
        candidate = uncompiled(pipe)
        for name in filter(None, path.split(".")):
            candidate = uncompiled(getattr(candidate, name, None))
        if candidate is None:
            continue
        if isinstance(candidate, nn.Module) and (_is_diffusers_unet(candidate) or compvis.is_unet(candidate)):
            return candidate
        seen.append((path, candidate))
    raise TypeError(_why_not(pipe, seen))


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


def geometry_of(pipe: Any) -> Geometry | None:
    """Frequency bins and frame rate of a pipeline's latent; None where it does not say.

    Read from the VAE and the vocoder, which in the original AudioLDM code, and in Tango's, is a part of the VAE;
    `LatentDiffusion` of the original code knows its `latent_f_size`.
    """
    if hasattr(pipe, "latent_f_size"):
        return Geometry(pipe.latent_f_size, None, 1)
    vae: Any = getattr(pipe, "vae", None)
    vae_config: Any = getattr(vae, "config", None)
    vocoder: Any = getattr(getattr(pipe, "vocoder", None), "config", None)
    if hasattr(vocoder, "model_in_dim") and hasattr(vae_config, "block_out_channels"):
        scale = 2 ** (len(vae_config.block_out_channels) - 1)
        mel_bins, rates, sampling_rate = vocoder.model_in_dim, vocoder.upsample_rates, vocoder.sampling_rate
    elif hasattr(getattr(vae, "encoder", None), "num_resolutions") and hasattr(getattr(vae, "vocoder", None), "h"):
        hifigan = vae.vocoder.h
        scale = 2 ** (vae.encoder.num_resolutions - 1)
        mel_bins, rates, sampling_rate = hifigan.num_mels, hifigan.upsample_rates, hifigan.sampling_rate
    else:
        return None
    return Geometry(mel_bins // scale, math.prod(rates) / sampling_rate, scale)


def input_freq_bins(pipe: Any, freq_bins: int | None) -> int:
    """`freq_bins` as given, or as the pipeline says. Never a guess."""
    geometry = geometry_of(pipe)
    if freq_bins is None:
        if geometry is None:
            raise ValueError(
                f"freq_bins cannot be read from {type(uncompiled(pipe)).__name__}, which has no vocoder and VAE; pass "
                "freq_bins=... (mel bins / VAE scale factor, 16 for AudioLDM-style models), or the whole pipeline"
            )
        return geometry.freq_bins
    freq_bins = positive_integer("freq_bins", freq_bins)
    if geometry is not None and geometry.freq_bins != freq_bins:
        raise ValueError(
            f"freq_bins={freq_bins} contradicts the pipeline, whose latent has {geometry.freq_bins} frequency bins; "
            "leave freq_bins out"
        )
    return freq_bins


def blocks(unet: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """(name, block, level) of a UNet; the grid at level l is halved l times, rounded up."""
    if compvis.is_unet(unet):
        yield from compvis.blocks(unet)
        return
    level = 0
    for i, block in enumerate(unet.down_blocks):  # type: ignore[arg-type]
        yield f"down_blocks.{i}", block, level
        level += getattr(block, "downsamplers", None) is not None
    if getattr(unet, "mid_block", None) is not None:
        yield "mid_block", unet.mid_block, level  # type: ignore[misc]
    for i, block in enumerate(unet.up_blocks):  # type: ignore[arg-type]
        yield f"up_blocks.{i}", block, level
        level -= getattr(block, "upsamplers", None) is not None


def self_attention_layers(unet: nn.Module, freq_bins: int | None) -> Iterator[Layer]:
    """The attention layers that are called without encoder states.

    Whether a call is self-attention shows only when it comes, and the processor decides then. Here the layers are
    told that can be: keys are projected from as many channels as queries are. `is_cross_attention` alone does not
    tell: AudioLDM's attn2 says True and is self-attention, as its UNet sets cross_attention_dim to its own widths.
    Where the encoder's width equals a layer's by chance, other layers of the same UNet show that it is the encoder's.
    """
    found = []
    for prefix, block, level in blocks(unet):
        for name, module in block.named_modules():
            if get_processor(module) is not None:
                full_name = f"{prefix}.{name}".replace("_orig_mod.", "")
                found.append(Layer(full_name, module, level, math.ceil(freq_bins / 2**level) if freq_bins else 0))

    def own_width(layer: Layer) -> bool:
        return getattr(layer.attn.to_q, "in_features", None) == getattr(layer.attn.to_k, "in_features", None)

    has_encoder = not all(own_width(layer) for layer in found)
    for layer in found:
        if own_width(layer) and not (has_encoder and getattr(layer.attn, "is_cross_attention", False)):
            yield layer


def get_processor(module: nn.Module) -> Any:
    """The attention processor of a layer; None for every other module."""
    if "to_q" not in module._modules or "to_k" not in module._modules:  # most: in a UNet of thousands this counts
        return None
    if hasattr(module, "set_processor"):
        return getattr(module, "processor", None)
    return compvis.get_processor(module) if compvis.is_attention(module) else None


def set_processor(attn: Any, processor: Any) -> None:
    """Install `processor` on a layer."""
    if hasattr(attn, "set_processor"):
        attn.set_processor(processor)
    else:
        compvis.set_processor(attn, processor)


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
