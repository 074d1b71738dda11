"""Objects of the shape of Tango's and Mustango's (declare-lab), of tiny parts of diffusers and transformers."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from support.pipelines import JOINT, shared_parts, t5_tokenizer


def tango_unet(**overrides: Any) -> UNet2DConditionModel:
    """diffusion_model_config.json of declare-lab/tango at a fortieth of the width."""
    settings: dict[str, Any] = {
        "in_channels": 8,
        "out_channels": 8,
        "block_out_channels": (8, 16, 32, 32),
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "attention_head_dim": (1, 2, 4, 4),
        "cross_attention_dim": JOINT,
        "use_linear_projection": True,
        "upcast_attention": True,
        "sample_size": [32, 2],
    }
    return UNet2DConditionModel(**{**settings, **overrides}).eval()


class TangoVAE(nn.Module):
    """What Tango calls of AudioLDM's VAE, around the VAE and the vocoder of diffusers and transformers."""

    def __init__(self) -> None:
        super().__init__()
        parts = shared_parts()
        self.inner, self.vocoder = parts["vae"], parts["vocoder"]
        self.encoder = self.inner.encoder
        self.decoder = types.SimpleNamespace(up=[types.SimpleNamespace(block=self.inner.decoder.up_blocks[-1].resnets)])
        self.encoder.num_resolutions = len(self.inner.config.block_out_channels)
        config = self.vocoder.config
        self.vocoder.h = types.SimpleNamespace(
            num_mels=config.model_in_dim, upsample_rates=config.upsample_rates, sampling_rate=config.sampling_rate
        )

    def decode(self, z: Tensor) -> Tensor:
        return self.inner.decode(z).sample

    def decode_first_stage(self, z: Tensor) -> Tensor:
        return self.decode(z)

    def decode_to_waveform(self, mel: Tensor) -> np.ndarray:
        return self.vocoder(mel.squeeze(1)).numpy()


class AudioDiffusion(nn.Module):
    """Tango's model: attribute and argument names of declare-lab/tango, models.py."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.tokenizer = t5_tokenizer()
        config = T5Config(vocab_size=64, d_model=JOINT, d_ff=16, d_kv=8, num_heads=1, num_layers=1)
        self.text_encoder = T5EncoderModel(config).eval()

    def prepare_latents(self, batch_size, inference_scheduler, num_channels_latents, dtype, device) -> Tensor:
        shape = (batch_size, num_channels_latents, 256, 16)
        return torch.randn(shape, dtype=dtype, device=device) * inference_scheduler.init_noise_sigma

    def forward(self, *arguments: Any) -> Tensor:
        """Of the original a training step; here what a wrapper around the model passes."""
        return self.prepare_latents(*arguments)

    def encode_text(self, prompt) -> tuple[Tensor, Tensor]:
        """For calls without guidance."""
        batch = self.tokenizer(prompt, padding=True, truncation=True, return_tensors="pt")
        embeds = self.text_encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]
        return embeds, batch.attention_mask == 1

    def encode_text_classifier_free(self, prompt, num_samples_per_prompt) -> tuple[Tensor, Tensor]:
        """For calls with guidance: no prompt first."""
        embeds, mask = self.encode_text(prompt)
        padding = {"max_length": embeds.shape[1], "padding": "max_length", "truncation": True}
        batch = self.tokenizer([""] * len(prompt), **padding, return_tensors="pt")
        nothing = self.text_encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]
        both = zip((nothing, batch.attention_mask == 1), (embeds, mask), strict=True)
        return tuple(torch.cat([x.repeat_interleave(num_samples_per_prompt, 0) for x in pair]) for pair in both)

    def inference(
        self, prompt, inference_scheduler, num_steps, guidance_scale, num_samples_per_prompt=1, disable_progress=True
    ) -> Tensor:
        guided = guidance_scale > 1
        if guided:
            embeds, mask = self.encode_text_classifier_free(prompt, num_samples_per_prompt)
        else:
            embeds, mask = (x.repeat_interleave(num_samples_per_prompt, 0) for x in self.encode_text(prompt))
        inference_scheduler.set_timesteps(num_steps)
        latents = self.prepare_latents(
            len(prompt) * num_samples_per_prompt,
            inference_scheduler,
            self.unet.config.in_channels,
            embeds.dtype,
            embeds.device,
        )
        for t in inference_scheduler.timesteps:
            noise = self.unet(
                torch.cat([latents] * 2) if guided else latents,
                t,
                encoder_hidden_states=embeds,
                encoder_attention_mask=mask,
            ).sample
            if guided:
                unconditional, conditional = noise.chunk(2)
                noise = unconditional + guidance_scale * (conditional - unconditional)
            latents = inference_scheduler.step(noise, t, latents).prev_sample
        return latents


class Tango:
    """A plain object, as `tango.Tango` is."""

    def __init__(self, unet: nn.Module) -> None:
        self.vae, self.model, self.scheduler = TangoVAE(), AudioDiffusion(unet), DDPMScheduler()

    @torch.no_grad()
    def generate(
        self, prompt: str, steps: int = 1, guidance: float = 3, samples: int = 1, disable_progress: bool = True
    ) -> np.ndarray:
        latents = self.model.inference([prompt], self.scheduler, steps, guidance, samples, disable_progress)
        return self.vae.decode_to_waveform(self.vae.decode_first_stage(latents))[0]
