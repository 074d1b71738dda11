"""The parts of the embedded AudioLDM 2 pipeline: real diffusers / transformers classes, real layout, small widths.

The layout of every part is in its `config.json` in `../pipeline`; only the weights that are trained are made here.
Latents are (batch, 8, frames, 16) at 25 frames per second; self-attention runs at 8, 4 and 2 frequency bins.
The text side (CLAP, T5, GPT-2) is random and frozen; T5 has one token per word of the prompt grammar, however
capitalised, and its spellings share one embedding; CLAP has one per byte.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AudioLDM2Pipeline, AudioLDM2UNet2DConditionModel, AutoencoderKL
from torch import nn
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

PIPELINE = Path(__file__).parents[1] / "pipeline"
MEL_MEAN, MEL_STD = -6.5, 3.3  # of the scenes' log-mels; used to initialise layers that see or emit them
T5_DIM, GPT_DIM = 64, 32


def new_vae() -> AutoencoderKL:
    """Log-mel (B, 1, T, 64) <-> latent (B, 8, T / 4, 16). No attention: any length costs its length."""
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(PIPELINE / "vae"))
    with torch.no_grad():
        first, last = vae.encoder.conv_in, vae.decoder.conv_out
        first.weight /= MEL_STD
        first.bias -= MEL_MEAN * first.weight.sum(dim=(1, 2, 3))
        last.weight *= MEL_STD
        last.bias.fill_(MEL_MEAN)
        vae.quant_conv.weight *= 3.0
        vae.quant_conv.bias[8:] = -6.0  # little noise at first: else the decoder learns to ignore the latents
    return vae


def new_vocoder() -> SpeechT5HifiGan:
    """Log-mel (B, T, 64) -> waveform (B, 160 T) at 16 kHz."""
    vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig.from_pretrained(PIPELINE / "vocoder"))
    with torch.no_grad():  # the default, std 0.01 everywhere, starts with hardly any signal
        for module in vocoder.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.normal_(module.weight, std=(module.in_channels * module.kernel_size[0]) ** -0.5)
            elif isinstance(module, nn.ConvTranspose1d):
                taps = module.kernel_size[0] / module.stride[0]
                nn.init.normal_(module.weight, std=(module.in_channels * taps) ** -0.5)
        for block in vocoder.resblocks:
            for conv in block.convs2:
                conv.weight *= 0.3
        first = vocoder.conv_pre
        first.weight /= MEL_STD
        first.bias -= MEL_MEAN * first.weight.sum(dim=(1, 2))
        vocoder.conv_post.weight *= 0.1
    return vocoder


def new_unet(widths: Sequence[int] = (32, 48, 64, 96), heads: int = 2) -> AudioLDM2UNet2DConditionModel:
    """Noisy latent (B, 8, T, 16) -> v (B, 8, T, 16), told by GPT-2's and T5's token embeddings.

    widths: channels of every level; all but the first have attention.
    """
    lower = len(widths) - 1
    return AudioLDM2UNet2DConditionModel(
        sample_size=128,
        in_channels=8,
        out_channels=8,
        block_out_channels=tuple(widths),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=heads,  # diffusers' name for the number of heads
        cross_attention_dim=((None, GPT_DIM, T5_DIM),) * len(widths),
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * lower,
        up_block_types=("CrossAttnUpBlock2D",) * lower + ("UpBlock2D",),
    )


def new_pipeline(
    vae: AutoencoderKL, vocoder: SpeechT5HifiGan, unet: AudioLDM2UNet2DConditionModel
) -> AudioLDM2Pipeline:
    """The embedded pipeline's text side, tokenizers and scheduler, which are not trained, with these parts."""
    pipe = AudioLDM2Pipeline.from_pretrained(PIPELINE)
    pipe.register_modules(vae=vae.eval(), vocoder=vocoder.eval(), unet=unet.eval())
    return pipe
