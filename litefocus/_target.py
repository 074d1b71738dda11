"""What a pipeline consists of: its UNet, the geometry of its latent, VAE and vocoder, and Tango's model."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

from torch import jit, nn

from litefocus._layers import is_compvis, unwrapped
from litefocus.config import positive_integer
from litefocus.focus import FreqAxis, check_freq_axis

ACCEPTED = (
    "an AudioLDM, AudioLDM 2, MusicLDM, Tango, Mustango or ConsistencyTTA pipeline, a LatentDiffusion of the original "
    "AudioLDM code, or the 2-D UNet of such a model (compiled or wrapped for distributed training or not)"
)
# children of a UNet, of diffusers and of the authors
UNET_PARTS = {"conv_in", "input_blocks"}
# where a model keeps its UNet, tried in this order
UNET_PATHS = ("", "unet", "student_unet", "model.unet", "model.student_unet", "model.diffusion_model")
# where the pipelines of diffusers, LatentDiffusion, and the VAEs of Tango and of LatentDiffusion make sound of a mel
WAVEFORM_METHODS = ("mel_spectrogram_to_waveform", "decode_to_waveform")


@dataclass(frozen=True)
class LatentGeometry:
    """The grid of a model's latent, and what its VAE and vocoder make of it.

    freq_bins: frequency bins of the latent. mel_frame: seconds of a mel frame; None if only `freq_bins` is known.
    vae_scale_factor: mel frames in a latent frame, and mel bins in a frequency bin. hop: samples of a mel frame. reach:
    mel frames on either side that a sample depends on.
    """

    freq_bins: int
    mel_frame: float | None = None
    vae_scale_factor: int = 1
    hop: int = 0
    reach: int = 0

    @property
    def latent_frame(self) -> float:
        """Seconds of a latent frame."""
        assert self.mel_frame is not None
        return self.mel_frame * self.vae_scale_factor

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
        return math.ceil(mel_frames / self.vae_scale_factor)


@dataclass(frozen=True)
class Target:
    """A model that can be patched.

    owner: its class name, for messages. unet: without wrappers. geometry: of its latent, None where it does not say.
    makes_images: whether its VAE decodes to pictures in colour, as those of Stable Diffusion's kin do.
    """

    owner: str
    unet: nn.Module
    geometry: LatentGeometry | None
    makes_images: bool = False

    def check_axes(self, freq_bins: int | None, freq_axis: FreqAxis) -> tuple[int | None, int | None]:
        """Check both against the model's own latent. Returns `freq_bins`, and the bins to expect. Raises as `patch`."""
        check_freq_axis(freq_axis)
        if freq_bins is not None:
            freq_bins = positive_integer("freq_bins", freq_bins)
        if freq_axis != "width" and self.geometry is not None:
            raise ValueError(
                f"freq_axis={freq_axis!r} contradicts {self.owner}, whose latent is (time, frequency); "
                "leave freq_axis out"
            )
        if freq_bins is not None and self.geometry is not None and self.geometry.freq_bins != freq_bins:
            raise ValueError(
                f"freq_bins={freq_bins} contradicts the pipeline, whose latent has {self.geometry.freq_bins} frequency "
                "bins; leave freq_bins out"
            )
        if freq_axis == "width" and self.makes_images:
            raise ValueError(
                f"{self.owner} makes pictures; if they are spectrograms whose height is frequency, as Riffusion's and "
                'Auffusion\'s are, pass freq_axis="height", else pass the UNet alone'
            )
        return freq_bins, freq_bins if self.geometry is None else self.geometry.freq_bins


class UnsupportedError(TypeError):
    """There is no 2-D UNet in what was handed in."""


def resolve(pipe: Any) -> Target:
    """The UNet of a pipeline, or `pipe` itself if it is one. Raises TypeError where there is none, or several."""
    pipe = unwrapped(pipe)
    seen = []
    for path in UNET_PATHS:
        candidate = pipe
        for name in filter(None, path.split(".")):
            candidate = unwrapped(getattr(candidate, name, None))
        if candidate is None:
            continue
        unet = _unet_in(candidate)
        if unet is not None:
            config = getattr(getattr(pipe, "vae", None), "config", None)
            return Target(type(pipe).__name__, unet, latent_geometry(pipe), getattr(config, "in_channels", None) == 3)
        if not path:
            _check_not_several(pipe)
        seen.append((path, candidate))
    raise UnsupportedError(_unsupported_reason(pipe, seen))


def latent_geometry(pipe: Any) -> LatentGeometry | None:
    """What a pipeline says of its latent; None where it does not.

    Read from the modules of the VAE and of the HiFi-GAN vocoder, of diffusers and transformers or of the authors.
    `LatentDiffusion` of the authors' code knows its `latent_f_size`, also where its VAE is not loaded.
    """
    vae, vocoder = vae_and_vocoder(pipe)
    try:
        levels = len(vae.config.block_out_channels) if hasattr(vae, "config") else vae.encoder.num_resolutions
        is_transformers = hasattr(vocoder, "upsampler")  # SpeechT5HifiGan; the authors' HiFi-GAN has `ups`
        ups, config = (vocoder.upsampler, vocoder.config) if is_transformers else (vocoder.ups, vocoder.h)
        block = max(sum(_reach(conv) for conv in block.modules()) for block in vocoder.resblocks)
        reach = _reach(vocoder.conv_post)
        for up in reversed(ups):
            reach = math.ceil((reach + block + up.kernel_size[0]) / up.stride[0])
        hop, scale = math.prod(up.stride[0] for up in ups), 2 ** (levels - 1)
        freq_bins = getattr(pipe, "latent_f_size", vocoder.conv_pre.in_channels // scale)
        return LatentGeometry(freq_bins, hop / config.sampling_rate, scale, hop, reach + _reach(vocoder.conv_pre))
    except (AttributeError, ValueError):
        freq_bins = getattr(pipe, "latent_f_size", None)
        return None if freq_bins is None else LatentGeometry(freq_bins)


def _reach(conv: Any) -> int:
    """Samples on either side that a convolution depends on; 0 for other modules."""
    return conv.dilation[0] * (conv.kernel_size[0] - 1) // 2 if isinstance(conv, nn.Conv1d) else 0


def owners_of_settings(pipe: Any) -> list[Any]:
    """The objects that settings of this library may be kept on; none where there is nothing of the kind.

    Raises TypeError for an object with several UNets.
    """
    try:
        unet = resolve(pipe).unet
    except UnsupportedError:
        unet = None
    owners = [unet, *vaes(pipe), *waveform_makers(pipe), tango_model(pipe)]
    return list({id(owner): owner for owner in owners if owner is not None}.values())


def tango_model(pipe: Any) -> Any:
    """The model of a Tango, Tango 2 or Mustango object, whose `prepare_latents` draws the noise; None of others."""
    model = unwrapped(getattr(pipe, "model", None))
    return model if callable(getattr(model, "prepare_latents", None)) else None


def vae_and_vocoder(pipe: Any) -> tuple[Any, Any]:
    """The modules that decode; in Tango and in the authors' code the vocoder is a part of the VAE. None where none."""
    vae = next((part for name in ("vae", "first_stage_model") if (part := getattr(pipe, name, None)) is not None), None)
    vae = unwrapped(vae)
    vocoder = getattr(vae, "vocoder", None) if getattr(pipe, "vocoder", None) is None else pipe.vocoder
    return vae, unwrapped(vocoder)


def vaes(pipe: Any) -> list[Any]:
    """The VAE that decodes, None where there is none, and those that encode what AudioSR is conditioned on."""
    found = (unwrapped(getattr(stage, "vae", None)) for stage in getattr(pipe, "cond_stage_models", ()))
    return [vae_and_vocoder(pipe)[0], *(vae for vae in found if vae is not None)]


def waveform_makers(pipe: Any) -> list[Any]:
    """The objects that make sound of a mel spectrogram with the vocoder of `pipe`: itself, its VAE, both or none."""
    owners = (unwrapped(pipe), vae_and_vocoder(pipe)[0])
    return [owner for owner in owners if any(callable(getattr(owner, name, None)) for name in WAVEFORM_METHODS)]


def warn_of_known_problems(pipe: Any, stacklevel: int) -> None:
    """Warn where the pipeline at hand is known to fail without litefocus too, and say how to fix it."""
    model = getattr(pipe, "language_model", None)
    if type(model).__name__ == "GPT2Model" and not hasattr(model, "_update_model_kwargs_for_generation"):
        warnings.warn(
            "this AudioLDM 2 pipeline holds a GPT2Model, with which it fails on transformers 4.52 and newer, without "
            "litefocus too; load it with language_model=GPT2LMHeadModel.from_pretrained(repo, "
            'subfolder="language_model"), the same weights',
            stacklevel=stacklevel,
        )


def _check_not_several(pipe: Any) -> None:
    """Raise TypeError for an object that holds several UNets, as the training classes of ConsistencyTTA do."""
    unets: dict[int, str] = {}
    for prefix, owner in (("", pipe), ("model.", unwrapped(getattr(pipe, "model", None)))):
        children = owner._modules if isinstance(owner, nn.Module) else {}
        for name, value in (*getattr(owner, "__dict__", {}).items(), *children.items()):
            unet = _unet_in(unwrapped(value))
            if unet is not None:
                unets.setdefault(id(unet), prefix + name)
    if len(unets) > 1:
        raise TypeError(
            f"{type(pipe).__name__} holds {len(unets)} UNets ({', '.join(unets.values())}), and a call decides which "
            f"of them it uses; pass that one, as in litefocus.patch(pipe.{list(unets.values())[-1]})"
        )


def _unet_in(module: Any) -> nn.Module | None:
    """The UNet that `module` is, or that it holds and passes on the attributes of, as adapters do; None for others."""
    if not isinstance(module, nn.Module) or not (_is_diffusers_unet(module) or is_compvis(module)):
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


def _unsupported_reason(pipe: Any, seen: list[tuple[str, Any]]) -> str:
    owner = type(pipe).__name__
    if getattr(pipe, "transformer", None) is not None and getattr(pipe, "unet", None) is None:
        return (
            f"{owner} has a transformer and no 2-D UNet, so its latent has no frequency axis to focus "
            f"on; litefocus accepts {ACCEPTED}"
        )
    for _, candidate in seen:
        kind = type(candidate).__name__
        if isinstance(candidate, jit.ScriptModule) or "Traced" in kind:
            return (
                f"the UNet of {owner} is traced ({kind}), and nothing inside of a traced module can be "
                "patched; load the model without tracing (in Riffusion: use_traced_unet=False)"
            )
    parts = [f"its {path} ({type(candidate).__name__}) is no 2-D UNet" for path, candidate in seen if path]
    if not parts and hasattr(pipe, "unet"):
        parts = ["its unet is None: load it with one"]
    if parts:
        return f"{owner} cannot be patched: {', and '.join(parts)}; litefocus accepts {ACCEPTED}"
    what = "None" if pipe is None else f"an object of type {owner}"
    return f"got {what}; litefocus accepts {ACCEPTED}"
