"""The parts of the embedded AudioLDM 2 pipeline: real diffusers / transformers classes, real layout, small widths.

The layout of every part is in its `config.json` in `../pipeline`; only the weights are made here, and the tokenizers.
Latents are (batch, 8, frames, 16) at 25 frames per second; self-attention runs at 8, 4 and 2 frequency bins.
The text side (CLAP, T5, GPT-2) is random and frozen; T5 has one token per word of the prompt grammar.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from data import vocabulary
from diffusers import (
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AutoencoderKL,
    DDIMScheduler,
)
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from torch import nn
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaTokenizerFast,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

PIPELINE = Path(__file__).parents[1] / "pipeline"
MEL_MEAN, MEL_STD = -6.5, 3.3  # of the scenes' log-mels; used to initialise layers that see or emit them
CLAP_DIM, T5_DIM, GPT_DIM = 32, 64, 32
GPT_TOKENS = 8
MAX_WORDS = 77


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


def new_scheduler() -> DDIMScheduler:
    """AudioLDM's noise schedule, scaled so that the last step is pure noise; v-prediction."""
    return DDIMScheduler.from_pretrained(PIPELINE / "scheduler")


def _saved_tokenizer(tokenizer: Tokenizer, config: dict[str, object], extra: dict[str, str]) -> str:
    """A folder that holds `tokenizer` the way both transformers 4 and 5 read it."""
    folder = Path(tempfile.mkdtemp(prefix="tokenizer_"))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in extra.items():
        (folder / name).write_text(text)
    return str(folder)


def spellings() -> list[tuple[str, ...]]:
    """Per word of the grammar: lower case, capitalised, upper case (one letter: two spellings)."""
    return [tuple(dict.fromkeys((word, word.capitalize(), word.upper()))) for word in vocabulary()]


def t5_tokenizer() -> T5TokenizerFast:
    """One token per word of the prompt grammar, however capitalised; all else becomes <unk>.

    transformers 5 rebuilds a T5 tokenizer from its vocabulary alone and drops a lower-casing step, so every
    spelling is a token of its own here and `new_pipeline` gives the spellings of a word one embedding.
    """
    words = [("▁" + word, -1.0) for group in spellings() for word in group]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words]
    tokenizer = Tokenizer(tokenizer_models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    config: dict[str, object] = {
        "tokenizer_class": "T5Tokenizer",
        "extra_ids": 0,
        "model_max_length": MAX_WORDS,
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    }
    folder = _saved_tokenizer(tokenizer, config, {})
    return T5TokenizerFast.from_pretrained(folder, extra_ids=0, model_max_length=MAX_WORDS)


def clap_tokenizer() -> RobertaTokenizerFast:
    """Byte-level RoBERTa without merges: one token per byte, so any text can be encoded."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "<mask>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    config: dict[str, object] = {"tokenizer_class": "RobertaTokenizer", "model_max_length": MAX_WORDS}
    extra = {"vocab.json": json.dumps(vocab), "merges.txt": "#version: 0.2\n"}
    folder = _saved_tokenizer(tokenizer, config, extra)
    return RobertaTokenizerFast.from_pretrained(folder, model_max_length=MAX_WORDS)


def new_pipeline(
    vae: AutoencoderKL, vocoder: SpeechT5HifiGan, unet: AudioLDM2UNet2DConditionModel
) -> AudioLDM2Pipeline:
    """All parts together. The text side is the same at every call: random from a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        clap = ClapModel(ClapConfig.from_pretrained(PIPELINE / "text_encoder"))
        t5 = T5EncoderModel(T5Config.from_pretrained(PIPELINE / "text_encoder_2"))
        row = 3  # after <pad>, </s>, <unk>
        with torch.no_grad():
            for group in spellings():
                t5.shared.weight[row + 1 : row + len(group)] = t5.shared.weight[row].clone()
                row += len(group)
        language_model = GPT2LMHeadModel(GPT2Config.from_pretrained(PIPELINE / "language_model"))
        language_model.config.max_new_tokens = GPT_TOKENS
        projection = AudioLDM2ProjectionModel(
            text_encoder_dim=CLAP_DIM, text_encoder_1_dim=T5_DIM, langauge_model_dim=GPT_DIM
        )
    for module in (vae, clap, t5, language_model, unet, vocoder):
        module.eval()
    return AudioLDM2Pipeline(
        vae=vae,
        text_encoder=clap,
        text_encoder_2=t5,
        projection_model=projection,
        language_model=language_model,
        tokenizer=clap_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        feature_extractor=ClapFeatureExtractor(feature_size=8, hop_length=7900),
        unet=unet,
        scheduler=new_scheduler(),
        vocoder=vocoder,
    )
