"""Tango, Tango 2 and Mustango (declare-lab/tango, declare-lab/mustango): clips of another length than 10.24 seconds.

`AudioDiffusion.prepare_latents` in their models.py draws latents of (256, 16) whatever is asked for; its callers, the
UNet, the VAE and the vocoder take any length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from litefocus._registry import Setting, clear, put
from litefocus._target import LatentGeometry, latent_geometry, tango_model

PUBLISHED_FRAMES = 256


class Duration(Setting):
    """Stands for `prepare_latents` on one model: the same draw, of `num_frames` frames."""

    kind = "duration"

    def __init__(self, num_frames: int, freq_bins: int) -> None:
        self.num_frames, self.freq_bins = num_frames, freq_bins
        self.original: Any = None  # what was set on the model itself

    def __call__(
        self,
        batch_size: int,
        inference_scheduler: Any,
        num_channels_latents: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> Tensor:
        """(batch_size, num_channels_latents, num_frames, freq_bins), from torch's global random state as upstream."""
        shape = (batch_size, num_channels_latents, self.num_frames, self.freq_bins)
        sigma: float = inference_scheduler.init_noise_sigma
        return torch.randn(shape, dtype=dtype, device=device) * sigma

    def install(self, module: Any) -> None:
        """Remember what was set on the model itself, if anything was."""
        before = vars(module).get("prepare_latents")
        self.original = before.original if isinstance(before, Duration) else before

    def activate(self, module: Any) -> None:
        """Draw this length."""
        module.prepare_latents = self

    def uninstall(self, module: Any) -> None:
        """Draw the length of the original code."""
        if isinstance(vars(module).get("prepare_latents"), Duration):
            del module.prepare_latents
            if self.original is not None:
                module.prepare_latents = self.original


def drawn_frames(model: Any) -> int | None:
    """Latent frames of the clips of a Tango model; None if its way to draw them is neither the original nor ours."""
    draws = vars(model).get("prepare_latents")
    return PUBLISHED_FRAMES if draws is None else getattr(draws, "num_frames", None)


def set_duration(tango: Any, seconds: float | None) -> None:
    """Make `tango.generate(prompt)` produce clips of `seconds` seconds, on this object only.

    Independent of `patch`, which makes the long ones faster. Mustango's own code drops the beats that it predicts from
    10 seconds on, and predicts chords for the rest: every clip, also one of its own length of 10.24 s, has no
    beats after 10 seconds.

    Args:
        tango: a Tango, Tango 2 or Mustango object. Its own code has no argument for the length.
        seconds: rounded down to mel frames of 10 ms, then up to latent frames of 40 ms. None restores the 10.24 seconds
            of the original code, as `unpatch` does.

    Raises:
        TypeError: for any other object and for what is no number.
        ValueError: for a length that is not finite, or below one mel frame.

    >>> from types import SimpleNamespace
    >>> tango = SimpleNamespace(model=SimpleNamespace(prepare_latents=print))  # stands for a loaded one
    >>> set_duration(tango, 80)
    >>> tango.model.prepare_latents.num_frames
    2000
    """
    model = tango_model(tango)
    if model is None:
        raise TypeError(
            f"got an object of type {type(tango).__name__}; set_duration takes a Tango, Tango 2 or Mustango object "
            "(one with model.prepare_latents). The pipelines of diffusers take audio_length_in_s=... at every call"
        )
    if seconds is None:
        clear(model, "duration")
        return
    geometry = latent_geometry(tango)
    if geometry is None or geometry.mel_frame is None:
        geometry = LatentGeometry(freq_bins=16, mel_frame=0.01, vae_scale_factor=4)  # of every published checkpoint
    put(model, Duration(geometry.num_frames(seconds), geometry.freq_bins))
