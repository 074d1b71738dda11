"""Tango, Tango 2 and Mustango (declare-lab/tango, declare-lab/mustango): clips of another length than 10.24 seconds.

`AudioDiffusion.prepare_latents` in their models.py draws latents of (256, 16) whatever is asked for; its callers, the
UNet, the VAE and the vocoder take any length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from litefocus._latent import LatentGeometry, latent_geometry
from litefocus._layers import unwrapped


class PrepareLatents:
    """Stands for `prepare_latents` on one model: the same draw, of `num_frames` frames."""

    def __init__(self, num_frames: int, freq_bins: int) -> None:
        self.num_frames, self.freq_bins = num_frames, freq_bins

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


def set_duration(tango: Any, seconds: float | None) -> None:
    """Make `tango.generate(prompt)` produce clips of `seconds` seconds, on this object only.

    Independent of `patch`; but it is the long clips that get faster by it. Mustango's own code
    drops every beat that it predicts at 10 seconds or later, and predicts chords for the beats that are left: longer
    clips, like its own of 10.24 s, go without beats from there on.

    Args:
        tango: a Tango, Tango 2 or Mustango object. Its own code has no argument for the length.
        seconds: rounded up to whole latent frames, of which a second has 25. None restores the 10.24 seconds of the
            original code, as `unpatch` does.

    Raises:
        TypeError: for any other object and for what is no number.
        ValueError: for a length that is not above 0.

    >>> from types import SimpleNamespace
    >>> tango = SimpleNamespace(model=SimpleNamespace(prepare_latents=print))  # stands for a loaded one
    >>> set_duration(tango, 80)
    >>> tango.model.prepare_latents.num_frames
    2000
    """
    model: Any = unwrapped(getattr(tango, "model", None))
    if not callable(getattr(model, "prepare_latents", None)):
        raise TypeError(
            f"got an object of type {type(tango).__name__}; set_duration takes a Tango, Tango 2 or Mustango object "
            "(one with model.prepare_latents). The pipelines of diffusers take audio_length_in_s=... at every call"
        )
    if seconds is None:
        restore_duration(tango)
        return
    published = LatentGeometry(freq_bins=16, hop_seconds=0.01, vae_scale_factor=4)  # every checkpoint's
    geometry = latent_geometry(tango) or published
    model.prepare_latents = PrepareLatents(geometry.num_frames(seconds), geometry.freq_bins)


def restore_duration(tango: Any) -> None:
    """Undo `set_duration`. Harmless for every object."""
    attributes = getattr(unwrapped(getattr(tango, "model", None)), "__dict__", {})
    if isinstance(attributes.get("prepare_latents"), PrepareLatents):
        del attributes["prepare_latents"]
