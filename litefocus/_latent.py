"""The geometry of a pipeline's latent: how many frequency bins it has, and how many frames a second."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from litefocus.config import positive_integer


@dataclass(frozen=True)
class LatentGeometry:
    """The grid of a model's latent.

    freq_bins: at the UNet's input. hop_seconds: of the mel spectrogram, None if the model does not say.
    vae_scale_factor: mel frames, and mel bins, that a VAE makes one of.
    """

    freq_bins: int
    hop_seconds: float | None
    vae_scale_factor: int

    def num_frames(self, seconds: float) -> int:
        """Frames of the latent for a clip, rounded as the pipelines of diffusers round them.

        Raises TypeError for what is no number, ValueError for a length that is not finite or below a mel frame.
        """
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
            raise TypeError(f"seconds must be a number, got {seconds!r} ({type(seconds).__name__})")
        if not (math.isfinite(seconds) and seconds > 0):
            raise ValueError(f"seconds must be finite and above 0, got {seconds!r}")
        assert self.hop_seconds is not None
        mel_frames = int(seconds / self.hop_seconds)
        if not mel_frames:
            raise ValueError(f"seconds must be at least one mel frame, {self.hop_seconds:g}, got {seconds!r}")
        return math.ceil(mel_frames / self.vae_scale_factor)


def latent_geometry(pipe: Any) -> LatentGeometry | None:
    """Frequency bins and frame rate of a pipeline's latent; None where it does not say.

    Read from the VAE and the vocoder, which in the original AudioLDM code, and in Tango's, is a part of the VAE;
    `LatentDiffusion` of the original code knows its `latent_f_size`.
    """
    if hasattr(pipe, "latent_f_size"):
        return LatentGeometry(pipe.latent_f_size, None, 1)
    vae: Any = getattr(pipe, "vae", None)
    vae_config: Any = getattr(vae, "config", None)
    vocoder: Any = getattr(getattr(pipe, "vocoder", None), "config", None)
    if hasattr(vocoder, "model_in_dim") and hasattr(vae_config, "block_out_channels"):
        vae_scale_factor = 2 ** (len(vae_config.block_out_channels) - 1)
        mel_bins, rates, sampling_rate = vocoder.model_in_dim, vocoder.upsample_rates, vocoder.sampling_rate
    elif hasattr(getattr(vae, "encoder", None), "num_resolutions") and hasattr(getattr(vae, "vocoder", None), "h"):
        hifigan = vae.vocoder.h
        vae_scale_factor = 2 ** (vae.encoder.num_resolutions - 1)
        mel_bins, rates, sampling_rate = hifigan.num_mels, hifigan.upsample_rates, hifigan.sampling_rate
    else:
        return None
    return LatentGeometry(mel_bins // vae_scale_factor, math.prod(rates) / sampling_rate, vae_scale_factor)


def input_freq_bins(owner: str, geometry: LatentGeometry | None, freq_bins: int | None) -> int:
    """`freq_bins` as given, or as the pipeline says. Never a guess.

    owner: class name of what was handed in, for messages.
    """
    if freq_bins is None:
        if geometry is None:
            raise ValueError(
                f"freq_bins cannot be read from {owner}, which has no vocoder and VAE; pass freq_bins=... (mel bins / "
                "VAE scale factor: 16 for AudioLDM-style models, or their whole pipeline; for latents of frequency x "
                'time, as in Riffusion or Auffusion, also freq_axis="height", with 64 or 32 bins)'
            )
        return geometry.freq_bins
    freq_bins = positive_integer("freq_bins", freq_bins)
    if geometry is not None and geometry.freq_bins != freq_bins:
        raise ValueError(
            f"freq_bins={freq_bins} contradicts the pipeline, whose latent has {geometry.freq_bins} frequency bins; "
            "leave freq_bins out"
        )
    return freq_bins
