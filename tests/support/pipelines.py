"""Complete AudioLDM, AudioLDM 2 and MusicLDM pipelines, built without a hub: real classes, tiny random weights.

The layout is that of the published checkpoints (latents of 8 channels at 25 frames a second, 16 frequency bins, block
types, where attention sits); only widths and depths are reduced. Shared by all tests.
"""

from __future__ import annotations

import json
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AudioLDMPipeline,
    AutoencoderKL,
    DDIMScheduler,
    MusicLDMPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    ClapTextConfig,
    ClapTextModelWithProjection,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaTokenizerFast,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

JOINT = 32  # width of CLAP's joint space, of T5 and of AudioLDM's class embedding
UNET: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 8,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
}


def audioldm_unet(channels: tuple[int, ...] = (8, 16, 24, 40), **overrides: Any) -> UNet2DConditionModel:
    """AudioLDM's and MusicLDM's UNet: the prompt comes as a class embedding, so every attention is self-attention."""
    settings = {
        "block_out_channels": channels,
        "cross_attention_dim": channels,
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": JOINT,
        "class_embeddings_concat": True,
    }
    return UNet2DConditionModel(**{**UNET, **settings, **overrides}).eval()


def minimal_unet(**overrides: Any) -> UNet2DConditionModel:
    """As small as they come, of one level unless told otherwise, always of the same weights: a call takes milliseconds.

    Its two attention layers are self-attention both; with another `cross_attention_dim`, one of them.
    """
    settings: dict[str, Any] = {
        "in_channels": 2,
        "out_channels": 2,
        "block_out_channels": (8,),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",),
        "mid_block_type": None,
        "up_block_types": ("UpBlock2D",),
        "norm_num_groups": 2,
        "attention_head_dim": 4,
        "cross_attention_dim": 8,
    }
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**settings, **overrides}).eval()


def sharpen(unet: nn.Module) -> None:
    """Make attention count, and look at few keys: with other samples the output is another."""
    for module in unet.modules():
        if isinstance(module, Attention):
            module.to_q.weight.data *= 4
            module.to_v.weight.data *= 4


def audioldm2_unet(
    channels: tuple[int, ...] = (8, 16, 24, 40), slots: tuple[int | None, ...] = (None, 18, JOINT), **overrides: Any
) -> AudioLDM2UNet2DConditionModel:
    """AudioLDM 2's UNet. `slots` are the cross-attention widths of each layer's transformers, None: self-attention."""
    settings = {"block_out_channels": channels, "cross_attention_dim": (slots,) * 4}
    return AudioLDM2UNet2DConditionModel(**{**UNET, **settings, **overrides}).eval()


PUBLISHED: dict[str, tuple[Any, dict[str, Any], int, int]] = {  # maker, settings, self-attention layers, all
    "audioldm-s": (audioldm_unet, {"channels": (128, 256, 384, 640)}, 32, 32),
    "audioldm-l": (audioldm_unet, {"channels": (256, 512, 768, 1280)}, 32, 32),
    "audioldm2": (audioldm2_unet, {"channels": (128, 256, 384, 640), "slots": (None, 768, 1024)}, 64, 96),
    "audioldm2-large": (
        audioldm2_unet,
        {"channels": (128, 256, 384, 640), "slots": (None, 768, 1024, None), "transformer_layers_per_block": 2},
        192,
        256,
    ),
}


def published_unet(name: str) -> nn.Module:
    """Of the published shapes, without weights."""
    maker, settings, *_ = PUBLISHED[name]
    with torch.device("meta"):
        unet: nn.Module = maker(**settings, layers_per_block=2, norm_num_groups=32, attention_head_dim=8)
    return unet


def _load(tokenizer: Tokenizer, kind: Any, **config: Any) -> Any:
    """`tokenizer` as the class that the pipelines test for; both versions of transformers load it from a folder."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/tokenizer.json")
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config))
        return kind.from_pretrained(folder, model_max_length=16)


def _roberta_tokenizer() -> Any:
    """Byte-level, without merges: a token for every byte."""
    alphabet = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "<mask>"]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return _load(tokenizer, RobertaTokenizerFast, tokenizer_class="RobertaTokenizer")


def t5_tokenizer() -> Any:
    """A token for every letter."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in string.ascii_letters)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return _load(tokenizer, T5TokenizerFast, tokenizer_class="T5Tokenizer", extra_ids=0, pad_token="<pad>")


def _clap() -> ClapModel:
    text = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "vocab_size": 300,
        "max_position_embeddings": 32,
        "projection_dim": JOINT,
    }
    audio = {
        "spec_size": 8,
        "window_size": 4,
        "num_mel_bins": 8,
        "intermediate_size": 16,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "num_hidden_layers": 1,
        "hidden_size": 192,
        "projection_dim": JOINT,
        "patch_size": 2,
        "patch_stride": 2,
        "patch_embed_input_channels": 4,
    }
    return ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=JOINT)).eval()


def shared_parts() -> dict[str, Any]:
    return {
        "vae": AutoencoderKL(
            in_channels=1,
            out_channels=1,
            latent_channels=8,
            norm_num_groups=4,
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
        ).eval(),
        "vocoder": SpeechT5HifiGan(
            SpeechT5HifiGanConfig(
                model_in_dim=64,
                sampling_rate=16000,
                upsample_initial_channel=32,
                upsample_rates=[5, 4, 2, 2, 2],
                upsample_kernel_sizes=[16, 16, 8, 4, 4],
                resblock_kernel_sizes=[3],
                resblock_dilation_sizes=[[1, 3]],
                normalize_before=False,
                initializer_range=0.2,
            )
        ).eval(),
        "scheduler": DDIMScheduler(
            beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False
        ),
        "tokenizer": _roberta_tokenizer(),
    }


def audioldm() -> AudioLDMPipeline:
    text = ClapTextConfig(**_clap().config.text_config.to_diff_dict())
    return AudioLDMPipeline(
        text_encoder=ClapTextModelWithProjection(text).eval(), unet=audioldm_unet(), **shared_parts()
    )


def audioldm2(**unet: Any) -> AudioLDM2Pipeline:
    gpt2 = GPT2Config(n_embd=18, n_head=1, n_layer=1, vocab_size=16, n_positions=64, bos_token_id=0, eos_token_id=0)
    language_model = GPT2LMHeadModel(gpt2).eval()
    language_model.config.max_new_tokens = 4
    t5 = T5Config(vocab_size=64, d_model=JOINT, d_ff=16, d_kv=8, num_heads=1, num_layers=1)
    return AudioLDM2Pipeline(
        text_encoder=_clap(),
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=t5_tokenizer(),
        language_model=language_model,
        projection_model=AudioLDM2ProjectionModel(JOINT, JOINT, 18),
        feature_extractor=ClapFeatureExtractor(feature_size=8, hop_length=7900),
        unet=audioldm2_unet(**unet),
        **shared_parts(),
    )


def musicldm() -> MusicLDMPipeline:
    return MusicLDMPipeline(
        text_encoder=_clap(),
        feature_extractor=ClapFeatureExtractor(feature_size=8, hop_length=7900),
        unet=audioldm_unet(),
        **shared_parts(),
    )


BUILDERS: dict[str, Callable[[], Any]] = {"AudioLDM": audioldm, "AudioLDM 2": audioldm2, "MusicLDM": musicldm}


def build(name: str) -> Any:
    """The pipeline of that name with the same weights at every call, without a progress bar."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = BUILDERS[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unet_step(unet: nn.Module, frames: int = 50, grad: bool = False) -> Tensor:
    """One call of the UNet of AudioLDM or AudioLDM 2, or of what was compiled of it, on input of its own dtype."""
    inner = getattr(unet, "_orig_mod", unet)
    like = next(inner.parameters())
    generator = torch.Generator().manual_seed(frames)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(like)  # noqa: E731
    conditions: dict[str, Any] = {"encoder_hidden_states": None, "class_labels": draw(2, JOINT)}
    if "AudioLDM2" in type(inner).__name__:
        conditions = {"encoder_hidden_states": draw(2, 4, 18), "encoder_hidden_states_1": draw(2, 6, JOINT)}
    with torch.set_grad_enabled(grad):
        output: Tensor = unet(draw(2, 8, frames, 16), torch.tensor(7, device=like.device), **conditions).sample
    return output


def generate(pipe: Any, seconds: float = 2.0, steps: int = 2, seed: int = 0) -> np.ndarray:
    """A clip, (1, samples), from the unmodified pipeline call."""
    settings: dict[str, Any] = {"prompt": "a hammer"}
    if isinstance(pipe, MusicLDMPipeline):  # its text branch fails on transformers 5
        embeds = torch.linspace(-1, 1, JOINT)[None]
        settings = {"prompt_embeds": embeds, "negative_prompt_embeds": -embeds}
    generator = torch.Generator().manual_seed(seed)
    audio: np.ndarray = pipe(
        **settings, audio_length_in_s=seconds, num_inference_steps=steps, generator=generator
    ).audios
    return audio
