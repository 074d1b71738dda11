"""The authors' packages audioldm, audioldm2 and audiosr: their UNets, and the whole of AudioSR. The real classes, small
random weights.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import RobertaTokenizer, T5EncoderModel  # noqa: F401  # looks for packages that have placeholders below


def authors(package: str, module: str) -> Any:
    """A module of the authors' packages, without the package's own __init__, which loads their whole pipelines."""
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise ModuleNotFoundError(f"pip install einops progressbar && pip install --no-deps {package}")
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = list(spec.submodule_search_locations or ())
    return importlib.import_module(f"{package}.{module}")


def original_unet(variant: str) -> nn.Module:
    """The authors' UNet with the settings of their configurations, at a quarter of the width. Their output
    layers start at zero, which would hide everything.
    """
    package, module = variant.split()[0], "latent_diffusion.modules.diffusionmodules.openaimodel"
    if package == "audioldm":
        module = "latent_diffusion.openaimodel"
    settings = {
        "image_size": 64,
        "in_channels": 8,
        "out_channels": 8,
        "model_channels": 32,
        "attention_resolutions": [8, 4, 2],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 3, 5],
        "num_head_channels": 32,
        "use_spatial_transformer": True,
        **VARIANTS[variant][0],
    }
    torch.manual_seed(0)
    unet = authors(package, module).UNetModel(**settings).eval()
    random_weights(unet)
    return unet


def random_weights(unet: nn.Module) -> None:
    """Where weights start at zero."""
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)


VARIANTS: dict[str, tuple[dict[str, Any], int, int, int]] = {  # settings, bins at the input, self-attention, all
    "audioldm": ({"extra_film_condition_dim": 24, "extra_film_use_concat": True}, 16, 32, 32),
    "audioldm2 full": ({"context_dim": [28, 20]}, 16, 64, 96),
    "audioldm2 large": ({"context_dim": [28, 20, None], "transformer_depth": 2}, 16, 192, 256),
    "audioldm2 speech": ({"context_dim": [28]}, 16, 48, 64),
    "audioldm2 T5": ({"context_dim": [20]}, 16, 48, 64),
    "audioldm2 48k": (
        {"in_channels": 16, "out_channels": 16, "extra_film_condition_dim": 24, "context_dim": [None]},
        32,
        64,
        64,
    ),
    # the latent of the clip to be mended comes on top of the noise
    "audiosr": ({"in_channels": 32, "out_channels": 16, "extra_sa_layer": True}, 32, 64, 64),
}


def run_original(unet: Any, frames: int = 24, bins: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    conditions: dict[str, Any] = {}
    if unet.extra_film_condition_dim:
        conditions["y"] = draw(2, unet.extra_film_condition_dim)
    if not type(unet).__module__.startswith("audioldm."):
        widths = [layer.to_k.in_features for name, layer in cross_attention(unet).items() if "input_blocks.4." in name]
        widths = list(dict.fromkeys(width for width in widths if width != 64))
        conditions["context_list"] = [draw(2, 5, width) for width in widths]
        conditions["context_attn_mask_list"] = [torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])] * len(widths)
    with torch.no_grad():
        return unet(draw(2, unet.in_channels, frames, bins), timesteps=torch.tensor([7, 7]), **conditions)


def cross_attention(unet: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in unet.named_modules() if type(layer).__name__ == "CrossAttention"}


class Placeholder(ModuleType):
    """A package that is imported, and none of whose functions is called."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


# audiosr imports them, and `super_resolution` calls none once it has read its file
NOT_CALLED = (
    *("librosa", "librosa.filters", "librosa.util", "torchaudio", "torchvision", "torchvision.utils"),
    *("audiosr.utilities.data", "audiosr.utilities.tools", "audiosr.clap.open_clip", "audiosr.clap.training.data"),
    "audiosr.latent_diffusion.modules.audiomae.AudioMAE",
    "audiosr.latent_diffusion.modules.phoneme_encoder.encoder",
    *("unidecode", "phonemizer"),
)


@contextlib.contextmanager
def placeholders() -> Iterator[None]:
    """For the block, `import` finds a placeholder where it would look for these."""
    made = {name: Placeholder(name) for name in NOT_CALLED if name not in sys.modules}
    sys.modules.update(made)
    yield
    for name in made:
        del sys.modules[name]


class Librosa:
    """Two functions of librosa with its defaults, by torch."""

    settings: dict[str, Any] = {"n_fft": 2048, "hop_length": 512, "window": torch.hann_window(2048)}  # noqa: RUF012

    @classmethod
    def stft(cls, wave: Any) -> Any:
        return torch.stft(torch.as_tensor(wave), **cls.settings, pad_mode="constant", return_complex=True).numpy()

    @classmethod
    def istft(cls, spectrum: Any, length: int) -> Any:
        return torch.istft(torch.as_tensor(spectrum), **cls.settings, length=length).numpy()


def audiosr() -> Any:
    """AudioSR 0.0.7's `LatentDiffusion` as its `build_model` makes it, from its own configuration at small widths.

    Its two VAEs have weights of their own. Without CLAP, which it loads from the hub and does not call.
    """
    with placeholders():
        ddpm = authors("audiosr", "latent_diffusion.models.ddpm")
        authors("audiosr", "latent_encoder.autoencoder"), authors("audiosr", "pipeline")
        config = authors("audiosr", "utils").get_basic_config()["model"]["params"]
        vocoders = authors("audiosr", "utilities.model")
    ddpm.librosa = Librosa
    stage = config["cond_stage_config"]["concat_lowpass_cond"]["params"]["first_stage_config"]
    for first_stage in (config["first_stage_config"], stage):
        first_stage["params"]["ddconfig"] |= {"ch": 32, "num_res_blocks": 1}
    config["unet_config"]["params"] |= {"model_channels": 32, "num_res_blocks": 1}
    vocoder = vocoders.get_vocoder_config_48k() | {"upsample_initial_channel": 32}
    torch.manual_seed(0)
    with (
        mock.patch.object(ddpm, "CLAPAudioEmbeddingClassifierFreev2", return_value=None),
        mock.patch.object(vocoders, "get_vocoder_config_48k", return_value=vocoder),
    ):
        model = ddpm.LatentDiffusion(**config, device="cpu", use_ema=False).eval()
    random_weights(model.model)
    for parameter in model.first_stage_model.vocoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def audiosr_batch(frames: int, bins: int = 256, hop: int = 480) -> dict[str, Any]:
    """What its `make_batch_for_super_resolution` makes of a file: of noise in bursts, half its band."""
    generator = torch.Generator().manual_seed(1)
    loudness = 3 * torch.sin(torch.arange(frames) / 4)[:, None] - 6
    mel = loudness + torch.randn(1, frames, bins, generator=generator)
    wave = torch.randn(1, 1, frames * hop, generator=generator)
    spectrum = torch.fft.rfft(wave)
    spectrum[..., spectrum.shape[-1] // 2 :] = 0
    return {
        "waveform": wave,
        "stft": torch.zeros(1, frames, 1024),
        "log_mel_spec": mel,
        "sampling_rate": 48000,
        "waveform_lowpass": torch.fft.irfft(spectrum, wave.shape[-1]),
        "lowpass_mel": torch.where(torch.arange(bins) < bins // 2, mel, -11.5),
    }
