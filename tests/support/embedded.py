"""The pipeline that was trained for this repository, for tests that need weights that mean something."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AudioLDM2Pipeline
from torch import Tensor

EMBEDDED = Path(__file__).parents[2] / "examples" / "embedded" / "pipeline"


def embedded() -> AudioLDM2Pipeline:
    """The pipeline, without a progress bar."""
    pipe = AudioLDM2Pipeline.from_pretrained(EMBEDDED)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def step(pipe: AudioLDM2Pipeline, frames: int) -> Tensor:
    """What its UNet makes of the same noise and text, at timestep 500."""
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    latent, text, words = (torch.randn(1, *shape, generator=draw) for shape in ((8, frames, 16), (8, 32), (6, 64)))
    with torch.no_grad():
        return pipe.unet(latent, 500, encoder_hidden_states=text, encoder_hidden_states_1=words).sample
