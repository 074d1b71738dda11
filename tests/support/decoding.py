"""What `tile_decoding` takes, small: a pipeline of nothing but a VAE and a vocoder."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from support.pipelines import shared_parts


def speecht5(**settings: Any) -> SpeechT5HifiGan:
    """The published vocoder's kernels and rates, at a fraction of its width."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "model_in_dim": 64,
        "upsample_initial_channel": 32,
        "upsample_rates": (5, 4, 2, 2, 2),
        "upsample_kernel_sizes": (16, 16, 8, 4, 4),
    }
    return SpeechT5HifiGan(SpeechT5HifiGanConfig(**{**config, **settings})).eval()


class NormVAE(nn.Module):
    """A VAE of one group norm, whose mel frames, of 0.01 s, are `scale` to a latent frame.

    tokens: whether the norm's input is (batch, channels, frames * bins).
    """

    def __init__(self, tokens: bool = False, scale: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = types.SimpleNamespace(block_out_channels=(1,) * scale.bit_length())
        self.norm, self.tokens = nn.GroupNorm(2, 8, eps=1e-6), tokens
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def decode(self, z: Tensor) -> Tensor:
        return self.norm(z.flatten(2)).view_as(z) if self.tokens else self.norm(z)

    def encode(self, x: Tensor) -> Tensor:
        """The last frame of as many as are a latent frame."""
        scale = 2 ** (len(self.config.block_out_channels) - 1)
        return self.norm(x)[:, :, scale - 1 :: scale]


class Holder:
    """The pipeline. By default its VAE is AudioLDM's, as small as they come."""

    def __init__(self, vocoder: nn.Module, vae: nn.Module | None = None) -> None:
        self.vae, self.vocoder = vae or shared_parts()["vae"], vocoder

    def mel_spectrogram_to_waveform(self, mels: Tensor) -> Tensor:
        """As the pipelines of diffusers do; the authors' vocoders have frames last."""
        mels = mels.squeeze(1) if mels.ndim == 4 else mels
        return self.vocoder(mels if isinstance(self.vocoder, SpeechT5HifiGan) else mels.mT)
