"""Models that are no AudioLDM, AudioLDM 2 or MusicLDM pipeline of diffusers: the authors' own code (the real classes of
the packages audioldm, audioldm2 and audiosr), objects of the shape of Tango's, Mustango's and ConsistencyTTA's,
frequency-major pipelines, and what must be refused.
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
import types
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
)
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D
from support.authors import VARIANTS, authors, cross_attention, original_unet, run_original
from support.oracle import Grids, biased_attention, install_oracle
from support.pipelines import JOINT, audioldm2_unet, audioldm_unet, build, shared_parts, t5_tokenizer
from support.settings import hand_in
from torch import Tensor, nn
from transformers import GPT2Model, T5Config, T5EncoderModel

import litefocus
from litefocus import LiteFocusConfig
from litefocus._target import latent_geometry

ALL = LiteFocusConfig(min_sampled=0)  # clips this short would be dense with the floor


@pytest.fixture(autouse=True)
def as_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle masks grids of any size; and it knows no timesteps, so one sample serves all."""
    hand_in(monkeypatch, min_keys_saved=1)
    hand_in(monkeypatch, num_samples=1)


# --- the original AudioLDM, AudioLDM 2 and AudioSR code --------------------------------------------------------------


def install_original_oracle(unet: nn.Module, config: LiteFocusConfig, freq_bins: int) -> None:
    transformer = next(type(module) for module in unet.modules() if type(module).__name__ == "SpatialTransformer")
    grids = Grids(unet, transformer)
    for name, layer in cross_attention(unet).items():

        def forward(x: Tensor, context: Any = None, mask: Any = None, name: str = name, layer: Any = layer) -> Tensor:
            added = grids.bias(name, config, freq_bins) if context is None else None
            if added is None:
                return type(layer).forward(layer, x, context, mask)
            head_dim = round(layer.scale**-2)
            q, k, v = (f(x).unflatten(2, (-1, head_dim)).transpose(1, 2) for f in (layer.to_q, layer.to_k, layer.to_v))
            return layer.to_out(biased_attention(q, k, v, added).to(x.dtype).transpose(1, 2).flatten(2))

        layer.forward = forward


@pytest.mark.parametrize("variant", VARIANTS)
def test_original_code_is_that_of_masked_dense_attention(variant: str) -> None:
    _, bins, self_attention, everything = VARIANTS[variant]
    unet = original_unet(variant)
    dense = run_original(unet, bins=bins)
    oracle = copy.deepcopy(unet)
    install_original_oracle(oracle, ALL, bins)
    expected = run_original(oracle, bins=bins)
    litefocus.patch(unet, ALL, freq_bins=bins)
    torch.testing.assert_close(run_original(unet, bins=bins), expected, atol=1e-4, rtol=1e-3)
    assert (expected - dense).abs().max() > 1e-3
    status = litefocus.status(unet)
    assert (len(status.layers), len(cross_attention(unet))) == (self_attention, everything)
    assert {layer.freq_bins for layer in status.layers} == {bins // 2, bins // 4, bins // 8}
    assert {layer.state for layer in status.layers} == {"focus"}


@pytest.mark.parametrize("variant", ["audioldm", "audioldm2 full", "audiosr"])
def test_original_code_is_restored_and_its_dense_layers_are_the_same(variant: str) -> None:
    unet, bins = original_unet(variant), VARIANTS[variant][1]
    before = run_original(unet, bins=bins)
    with litefocus.patch(unet, freq_bins=bins, sparse_ratio=1.0):  # every self-attention call left dense
        torch.testing.assert_close(run_original(unet, bins=bins), before, atol=1e-5, rtol=1e-4)
        assert litefocus.status(unet).layers[0].name == "input_blocks.4.1.transformer_blocks.0.attn1"
        with litefocus.patch(unet, ALL, freq_bins=bins, sparse_ratio=0.2):
            assert not torch.allclose(run_original(unet, bins=bins), before, atol=1e-4)
        torch.testing.assert_close(run_original(unet, bins=bins), before, atol=1e-5, rtol=1e-4)
    assert torch.equal(run_original(unet, bins=bins), before)
    litefocus.patch(unet, ALL, freq_bins=bins)
    litefocus.unpatch(unet)
    assert torch.equal(run_original(unet, bins=bins), before)
    assert not any("forward" in layer.__dict__ for layer in cross_attention(unet).values())


def test_original_code_keeps_a_forward_that_was_set_on_a_layer() -> None:
    unet = original_unet("audioldm2 full")
    layer = unet.input_blocks[4][1].transformer_blocks[0].attn1
    mine = layer.forward = lambda x, context=None, mask=None: torch.zeros_like(x)
    with pytest.warns(UserWarning, match=r"1 of 64 self-attention layers stay dense .*1: its forward is replaced by"):
        litefocus.patch(unet, freq_bins=16)
    assert layer.forward is mine
    assert litefocus.status(unet).layers[0].state == "dense: its forward is replaced by <lambda>"
    litefocus.unpatch(unet)
    assert layer.forward is mine


def test_what_overwrote_an_original_layer_is_shown() -> None:
    unet = original_unet("audioldm")
    litefocus.patch(unet, freq_bins=16)
    unet.input_blocks[4][1].transformer_blocks[0].attn1.forward = lambda x, context=None, mask=None: x
    assert "its forward is replaced by <lambda>" in litefocus.status(unet).layers[0].state
    run_original(unet)
    assert litefocus.status(unet).layers[0].state.startswith("not reached by the last call")
    assert {row.state for row in litefocus.status(unet).layers[1:]} == {"focus"}


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        lambda unet: torch.load(io.BytesIO(saved(unet)), weights_only=False),
    ],
    ids=["deepcopy", "pickle"],
)
def test_copies_of_original_code_are_independent(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    unet = original_unet("audioldm2 full")
    dense = run_original(unet)
    litefocus.patch(unet, ALL, freq_bins=16)
    patched = run_original(unet)
    assert (patched - dense).abs().max() > 1e-3
    other = duplicate(unet)
    assert torch.equal(run_original(other), patched)
    with torch.no_grad():
        unet.input_blocks[4][1].transformer_blocks[0].attn1.to_q.weight.zero_()
    assert torch.equal(run_original(other), patched)
    litefocus.unpatch(other)
    assert torch.equal(run_original(other), dense)
    assert litefocus.status(unet).config == ALL


def saved(module: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(module, file)
    return file.getvalue()


def test_latent_diffusion_of_the_original_code_tells_its_bins() -> None:
    unet = original_unet("audioldm2 48k")
    latent_diffusion = types.SimpleNamespace(model=types.SimpleNamespace(diffusion_model=unet), latent_f_size=32)
    litefocus.patch(latent_diffusion)
    assert litefocus.status(latent_diffusion).layers[0].freq_bins == 16
    with pytest.raises(ValueError, match="does not say how many latent frames a second has"):
        litefocus.status(latent_diffusion, seconds=10)
    litefocus.unpatch(latent_diffusion)
    with pytest.raises(ValueError, match="freq_bins=16 contradicts the pipeline, whose latent has 32"):
        litefocus.patch(latent_diffusion, freq_bins=16)


# --- Tango, Mustango, ConsistencyTTA ---------------------------------------------------------------------------------


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
        self.encoder.num_resolutions = len(self.inner.config.block_out_channels)
        config = self.vocoder.config
        self.vocoder.h = types.SimpleNamespace(
            num_mels=config.model_in_dim, upsample_rates=config.upsample_rates, sampling_rate=config.sampling_rate
        )

    def decode_first_stage(self, z: Tensor) -> Tensor:
        return self.inner.decode(z).sample

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

    def inference(self, prompt, inference_scheduler, num_steps, guidance_scale) -> Tensor:
        batch = self.tokenizer(["", *prompt], padding="max_length", max_length=8, truncation=True, return_tensors="pt")
        embeds = self.text_encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]
        inference_scheduler.set_timesteps(num_steps)
        latents = self.prepare_latents(
            len(prompt), inference_scheduler, self.unet.config.in_channels, embeds.dtype, embeds.device
        )
        for t in inference_scheduler.timesteps:
            noise = self.unet(
                torch.cat([latents] * 2),
                t,
                encoder_hidden_states=embeds,
                encoder_attention_mask=batch.attention_mask == 1,
            ).sample
            unconditional, conditional = noise.chunk(2)
            noise = unconditional + guidance_scale * (conditional - unconditional)
            latents = inference_scheduler.step(noise, t, latents).prev_sample
        return latents


class Tango:
    """A plain object, as `tango.Tango` is."""

    def __init__(self, unet: nn.Module) -> None:
        self.vae, self.model, self.scheduler = TangoVAE(), AudioDiffusion(unet), DDPMScheduler()

    @torch.no_grad()
    def generate(self, prompt: str, steps: int = 1, guidance: float = 3) -> np.ndarray:
        mel = self.vae.decode_first_stage(self.model.inference([prompt], self.scheduler, steps, guidance))
        return self.vae.decode_to_waveform(mel)[0]


@pytest.fixture
def tango() -> Tango:
    torch.manual_seed(0)
    return Tango(tango_unet())


TAIL = 32  # samples that the vocoder adds, whatever the length


def clip(tango: Tango, **settings: Any) -> np.ndarray:
    torch.manual_seed(1)  # Tango draws from the global generator
    return tango.generate("a hammer", **settings)


@pytest.mark.parametrize("seconds", [1.32, 2.6])  # 33 and 65 latent frames: odd at several levels
def test_tango_is_that_of_masked_dense_attention(tango: Tango, seconds: float) -> None:
    litefocus.set_duration(tango, seconds)
    dense = clip(tango)
    oracle = copy.deepcopy(tango)
    install_oracle(oracle.model.unet, ALL)
    expected = clip(oracle)
    handle = litefocus.patch(tango, ALL)
    got = clip(tango)
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-3)
    assert np.abs(expected - dense).max() > 1e-3
    status = litefocus.status(tango)
    assert [layer.freq_bins for layer in status.layers] == [16, 16, 8, 8, 4, 4, 2, 4, 4, 4, 8, 8, 8, 16, 16, 16]
    assert repr(handle) == repr(status)


@pytest.mark.parametrize(("seconds", "frames"), [(10.24, 256), (80, 2000), (9.95, 249)])
def test_tango_generates_the_length_that_was_set(tango: Tango, seconds: float, frames: int) -> None:
    usual = clip(tango)
    assert len(usual) == 256 * 640 + TAIL
    litefocus.patch(tango)
    litefocus.set_duration(tango, seconds)
    assert litefocus.status(tango, seconds=seconds).layers[0].frames == frames
    long = clip(tango)
    assert len(long) == frames * 640 + TAIL
    assert np.isfinite(long).all()
    litefocus.unpatch(tango)
    assert np.array_equal(clip(tango), usual)
    assert "prepare_latents" not in tango.model.__dict__


def test_a_set_duration_is_of_one_object_and_can_be_taken_back(tango: Tango) -> None:
    usual, other = clip(tango), copy.deepcopy(tango)
    litefocus.set_duration(tango, 10.24)
    assert np.array_equal(clip(tango), usual)  # the same draw as the original code's
    litefocus.set_duration(tango, 1)
    twin = copy.deepcopy(tango)
    assert len(clip(tango)) == len(clip(twin)) == 16000 + TAIL
    assert len(clip(other)) == len(usual)
    for _ in range(2):
        litefocus.set_duration(tango, None)
        assert np.array_equal(clip(tango), usual)
    assert len(clip(twin)) == 16000 + TAIL


@pytest.mark.parametrize(
    ("seconds", "error"),
    [(0, ValueError), (-1, ValueError), (float("nan"), ValueError), (0.001, ValueError), ("8", TypeError)],
)
def test_a_bad_duration_changes_nothing(tango: Tango, seconds: Any, error: type[Exception]) -> None:
    litefocus.set_duration(tango, 1)
    with pytest.raises(error, match="seconds must be"):
        litefocus.set_duration(tango, seconds)
    assert len(clip(tango)) == 16000 + TAIL


def test_a_duration_needs_tango() -> None:
    with pytest.raises(TypeError, match=r"got an object of type AudioLDMPipeline; .* take audio_length_in_s"):
        litefocus.set_duration(build("AudioLDM"), 10)


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm:FutureWarning")
def test_bins_are_read_from_the_real_vae_of_audioldm() -> None:
    settings = {
        "double_z": True,
        "z_channels": 8,
        "resolution": 256,
        "in_channels": 1,
        "out_ch": 1,
        "ch": 32,
        "ch_mult": [1, 2, 4],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    vae = authors("audioldm", "variational_autoencoder.autoencoder").AutoencoderKL(ddconfig=settings, embed_dim=8)
    geometry = latent_geometry(types.SimpleNamespace(vae=vae))
    assert geometry is not None
    assert (geometry.freq_bins, geometry.num_frames(80)) == (16, 2000)


class OldProcessor:
    """Attention as diffusers 0.15 wrote it: three arguments, and nothing that later versions brought."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states=None, attention_mask=None) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            f(x).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for f, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        scores = q @ k.transpose(2, 3) * attn.scale
        if attention_mask is not None:
            scores = scores + attention_mask[:, None]
        return attn.to_out[1](attn.to_out[0]((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)))


NEWER = ("is_cross_attention", "residual_connection", "rescale_output_factor", "spatial_norm", "norm_q", "norm_k")


def make_old(unet: nn.Module) -> None:
    for module in unet.modules():
        if isinstance(module, Attention):
            for name in NEWER:
                if hasattr(module, name):
                    delattr(module, name)
            module.set_processor(OldProcessor())


# what the plain processor of those versions is called
OldProcessor.__name__ = "AttnProcessor"


class MusicBlock(CrossAttnDownBlock2D):
    """Three transformers after every resnet, for text, beats and chords, under Mustango's names."""

    def forward(self, hidden_states, temb=None, encoder_hidden_states=None, attention_mask=None, **others):
        outputs: tuple[Tensor, ...] = ()
        layers = zip(self.resnets, self.attentions, self.attentions2, self.attentions3, strict=True)
        for resnet, *transformers in layers:
            hidden_states = resnet(hidden_states, temb)
            for transformer in transformers:
                (hidden_states,) = transformer(hidden_states, encoder_hidden_states, return_dict=False)
            outputs += (hidden_states,)
        for downsampler in self.downsamplers:
            hidden_states = downsampler(hidden_states)
        return hidden_states, (*outputs, hidden_states)


@pytest.mark.parametrize("music", [False, True], ids=["Tango's blocks", "Mustango's blocks"])
def test_layers_of_old_diffusers(music: bool) -> None:
    torch.manual_seed(0)
    unet = tango_unet(attention_head_dim=2)
    layers = 16
    if music:
        for block in unet.down_blocks[:3]:
            block.__class__ = MusicBlock
            block.attentions2, block.attentions3 = copy.deepcopy(block.attentions), copy.deepcopy(block.attentions)
        layers += 12
    oracle = copy.deepcopy(unet)
    install_oracle(oracle, ALL)
    make_old(unet)
    x, text = torch.randn(2, 8, 33, 16), torch.randn(2, 5, JOINT)
    mustango = types.SimpleNamespace(model=types.SimpleNamespace(unet=unet), vae=TangoVAE())
    litefocus.patch(mustango, ALL)
    assert len(litefocus.status(mustango).layers) == layers
    with torch.no_grad():
        got, expected = unet(x, 7, text).sample, oracle(x, 7, text).sample
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)
    litefocus.unpatch(mustango)
    assert all(isinstance(m.processor, OldProcessor) for m in unet.modules() if isinstance(m, Attention))


def called_without_encoder(unet: nn.Module, *arguments: Any, **conditions: Any) -> set[str]:
    """The attention layers that a call of a UNet runs without encoder states."""
    called, handles = set(), []
    for name, module in unet.named_modules():
        if isinstance(module, Attention):

            def note(_module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                if (args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")) is None:
                    called.add(name)

            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    with torch.no_grad():
        unet(*arguments, **conditions)
    for handle in handles:
        handle.remove()
    return called


@pytest.mark.parametrize("old", [False, True], ids=["this diffusers", "before 0.25"])
@pytest.mark.parametrize(
    ("kind", "count"),
    [("Tango", 16), ("AudioLDM", 20), ("AudioLDM 2", 60), ("AudioLDM 2, widths apart", 60)],
)
def test_an_encoder_as_wide_as_a_block_is_not_taken_for_self_attention(kind: str, count: int, old: bool) -> None:
    """Before 0.25 a layer does not say is_cross_attention; the transformer around it says what it was built for."""
    x, conditions = torch.randn(2, 8, 24, 16), {}
    if kind == "Tango":  # ConsistencyTTA's published widths coincide: blocks of 1024, an encoder of 1024
        unet = tango_unet(block_out_channels=(32, 32, 64, 64), cross_attention_dim=32)
        conditions = {"encoder_hidden_states": torch.randn(2, 5, 32)}
    elif kind == "AudioLDM":  # its attn2 says that it is cross-attention, and is not
        unet = audioldm_unet()
        conditions = {"encoder_hidden_states": None, "class_labels": torch.randn(2, JOINT)}
    else:
        first, second = (18, JOINT) if kind.endswith("apart") else (32, 64)
        channels = (8, 16, 24, 40) if kind.endswith("apart") else (32, 32, 64, 64)
        unet = audioldm2_unet(channels, (None, first, second, None))
        conditions = {
            "encoder_hidden_states": torch.randn(2, 4, first),
            "encoder_hidden_states_1": torch.randn(2, 6, second),
        }
    expected = called_without_encoder(unet, x, 7, **conditions)
    assert len(expected) == count
    if old:
        make_old(unet)
    litefocus.patch(unet, freq_bins=16)
    assert {layer.name for layer in litefocus.status(unet).layers} == expected


def test_step_flops_count_every_transformer_of_mustango() -> None:
    """Against a hook on every convolution, projection and attention that runs."""
    unet = tango_unet(attention_head_dim=2)
    for block in unet.down_blocks[:3]:
        block.__class__ = MusicBlock
        block.attentions2, block.attentions3 = copy.deepcopy(block.attentions), copy.deepcopy(block.attentions)
    total, handles = 0, []

    def count(module: Any, args: Any, output: Any) -> None:
        nonlocal total
        tokens = output.shape[2:].numel() if output.ndim == 4 else output.shape[1]
        if isinstance(module, Attention):
            total += 4 * tokens**2 * module.to_q.out_features
        else:
            total += 2 * module.weight.numel() * tokens

    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear):
            counted = "attentions" in name and not name.endswith(("attn2.to_k", "attn2.to_v"))
        else:
            counted = name.endswith("attn1") or (isinstance(module, nn.Conv2d) and name not in ("conv_in", "conv_out"))
        if counted:
            handles.append(module.register_forward_hook(count))
    with torch.no_grad():
        unet(torch.randn(1, 8, 250, 16), 7, torch.randn(1, 5, JOINT))
    assert len(handles) > 200
    mustango = types.SimpleNamespace(model=types.SimpleNamespace(unet=unet), vae=TangoVAE())
    status = litefocus.status(mustango, seconds=10)
    assert status.flops is not None
    assert status.flops.dense == total


def test_set_duration_tells_what_mustango_leaves_out() -> None:
    assert "Mustango" in litefocus.set_duration.__doc__
    assert "10 seconds" in litefocus.set_duration.__doc__


@pytest.mark.parametrize("name", ["unet", "student_unet"])
def test_consistency_tta(name: str) -> None:
    model = types.SimpleNamespace(**{name: tango_unet()}, vae=TangoVAE())
    litefocus.patch(model, LiteFocusConfig.paper())
    states = [(layer.freq_bins, layer.state) for layer in litefocus.status(getattr(model, name)).layers]
    assert {state: states.count(state) for state in states} == {
        (16, "focus"): 5,
        (8, "focus"): 5,
        (4, "dense"): 5,
        (2, "dense"): 1,
    }
    assert litefocus.status(model, seconds=10).layers[0].frames == 250


class AudioLCM(nn.Module):
    """ConsistencyTTA's training class, which infers with one of two copies of the UNet that it trains."""

    def __init__(self, vae: nn.Module | None) -> None:
        super().__init__()
        self.teacher_unet, self.student_unet = tango_unet(), tango_unet()
        self.student_target_unet = copy.deepcopy(self.student_unet)
        self.student_ema_unet = copy.deepcopy(self.student_unet)
        self.vae = vae

    def inference(self, use_ema: bool) -> Tensor:
        unet = self.student_ema_unet if use_ema else self.student_target_unet
        noise = torch.randn(1, 8, 24, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return unet(noise, 7, torch.ones(1, 5, JOINT)).sample


@pytest.mark.parametrize("call", [litefocus.patch, litefocus.status, litefocus.unpatch])
@pytest.mark.parametrize("held", [lambda model: model, lambda model: types.SimpleNamespace(model=model)])
def test_an_object_with_several_unets_is_refused(call: Callable[[Any], Any], held: Callable[[Any], Any]) -> None:
    model = AudioLCM(TangoVAE())
    unets = r"teacher_unet, (model\.)?student_unet, (model\.)?student_target_unet, (model\.)?student_ema_unet"
    with pytest.raises(TypeError, match=rf"holds 4 UNets \((model\.)?{unets}\).*litefocus\.patch\(pipe\."):
        call(held(model))


class Adapter(nn.Module):
    """As image adapters do: holds a UNet and passes on its attributes."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.inner = unet

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["inner"], name)


def test_one_unet_under_several_names_is_one() -> None:
    unet = tango_unet()
    pipe = types.SimpleNamespace(unet=unet, adapter=Adapter(unet), model=types.SimpleNamespace(unet=unet))
    litefocus.patch(pipe, freq_bins=16)
    assert len(litefocus.status(unet).layers) == 16
    pipe.adapter = Adapter(tango_unet())
    with pytest.raises(TypeError, match=r"holds 2 UNets \(unet, adapter\)"):
        litefocus.status(pipe)


@pytest.mark.parametrize(("use_ema", "name"), [(True, "student_ema_unet"), (False, "student_target_unet")])
def test_the_unet_that_it_infers_with_is_accepted(use_ema: bool, name: str) -> None:
    torch.manual_seed(0)
    model = AudioLCM(None)
    with pytest.raises(TypeError, match=rf"holds 4 UNets .*{name}"):
        litefocus.patch(model)
    dense = [model.inference(True), model.inference(False)]
    litefocus.patch(getattr(model, name), freq_bins=16, min_sampled=2, sparse_ratio=0.05)
    changed = [
        not torch.allclose(model.inference(ema), before, atol=1e-4)
        for ema, before in zip((True, False), dense, strict=True)
    ]
    assert changed == [use_ema, not use_ema]


# --- processors that do more than attend -----------------------------------------------------------------------------


class AttentionStore:
    """A recorder in the manner of prompt-to-prompt editing: it counts its calls, and a step is all layers' calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return AttnProcessor2_0()(attn, *args, **kwargs)


def attention_layers(unet: nn.Module) -> list[Any]:
    return [module for module in unet.modules() if isinstance(module, Attention)]


def test_a_processor_that_does_more_than_attend_stays_and_is_named() -> None:
    unet, store = tango_unet(), AttentionStore()
    run = functools.partial(unet, torch.randn(1, 8, 64, 16), 7, torch.randn(1, 5, JOINT))
    for layer in attention_layers(unet.down_blocks):
        layer.set_processor(store)
    with torch.no_grad():
        run()
        calls = store.calls
        message = (
            r"6 of 16 self-attention layers stay dense and run their own code \(6: its processor is AttentionStore\)"
        )
        with pytest.warns(UserWarning, match=message) as caught:
            litefocus.patch(unet, ALL, freq_bins=16)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        states = [row.state for row in litefocus.status(unet).layers]
        assert states == ["dense: its processor is AttentionStore"] * 6 + ["focus"] * 10
        run()
        assert store.calls == 2 * calls
        assert [row.state for row in litefocus.status(unet).layers] == states
        litefocus.unpatch(unet)
        run()
        assert store.calls == 3 * calls


def test_where_all_processors_do_more_than_attend_nothing_is_patched() -> None:
    unet, store = tango_unet(), AttentionStore()
    for layer in attention_layers(unet):
        layer.set_processor(store)
    for call in (litefocus.patch, litefocus.probe):
        with pytest.raises(ValueError, match=r"no self-attention layer .*\(16: its processor is AttentionStore\)"):
            call(unet)
    assert all(layer.processor is store for layer in attention_layers(unet))


def test_processors_of_cross_attention_are_no_reason_to_warn() -> None:
    unet = tango_unet()
    for layer in attention_layers(unet.down_blocks[0]):
        if layer.is_cross_attention:
            layer.set_processor(AttentionStore())
    litefocus.patch(unet, freq_bins=16, min_freq_bins=4)


@pytest.mark.parametrize(
    "processor", [AttnProcessor, AttnProcessor2_0, functools.partial(SlicedAttnProcessor, 1), FusedAttnProcessor2_0]
)
def test_plain_processors_are_no_reason_to_warn(processor: Callable[[], Any]) -> None:
    unet = tango_unet()
    for layer in attention_layers(unet):
        layer.set_processor(processor())
    litefocus.patch(unet, freq_bins=16)


class EditingPipeline(StableDiffusionPipeline):
    """As Auffusion's prompt-to-prompt pipeline: it installs its processors at the start of every call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for layer in attention_layers(self.unet):
            layer.set_processor(AttentionStore())
        return super().__call__(*args, **kwargs)


def test_a_client_that_installs_processors_at_every_call_undoes_the_patch_and_status_says_so() -> None:
    pipe = image_pipeline()
    litefocus.patch(pipe, ALL, freq_axis="height")
    focused = latent(pipe, 32, 16)
    pipe.__class__ = EditingPipeline
    assert {layer.state for layer in litefocus.status(pipe).layers} == {"focus"}
    assert (latent(pipe, 32, 16) - focused).abs().max() > 1e-3
    states = {layer.state for layer in litefocus.status(pipe).layers}
    assert states == {"not reached by the last call; its processor is AttentionStore"}
    litefocus.unpatch(pipe)
    assert all(isinstance(layer.processor, AttentionStore) for layer in attention_layers(pipe.unet))


# --- frequency-major: the latent is an image, frequency along its height ----------------------------------------------


def image_pipeline() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16, 32, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=12,
    ).eval()
    pipe = StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(4, 4, 4, 4), norm_num_groups=2, **VAE_BLOCKS).eval(),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


VAE_BLOCKS: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
}


def latent(pipe: StableDiffusionPipeline, height: int, width: int) -> Tensor:
    embeds = torch.linspace(-1, 1, 36).view(1, 3, 12)
    return pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=-embeds,
        height=8 * height,
        width=8 * width,
        num_inference_steps=1,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images


@pytest.mark.parametrize(
    ("height", "width", "bins"),
    [(64, 64, {64, 32, 16, 8}), (32, 128, {32, 16, 8, 4})],
    ids=["Riffusion", "Auffusion"],
)
def test_frequency_major(height: int, width: int, bins: set[int]) -> None:
    pipe = image_pipeline()
    dense = latent(pipe, height, width)
    oracle = copy.deepcopy(pipe)
    install_oracle(oracle.unet, ALL, freq_bins=height, freq_axis="height")
    expected = latent(oracle, height, width)
    litefocus.patch(pipe, ALL, freq_bins=height, freq_axis="height")
    torch.testing.assert_close(latent(pipe, height, width), expected, atol=1e-4, rtol=1e-3)
    assert (expected - dense).abs().max() > 1e-3
    assert {layer.freq_bins for layer in litefocus.status(pipe).layers} == bins
    litefocus.unpatch(pipe)
    assert torch.equal(latent(pipe, height, width), dense)


@pytest.mark.parametrize("options", [{}, {"freq_bins": 64}, {"freq_bins": 16, "freq_axis": "width"}])
def test_a_forgotten_frequency_axis_is_an_error(options: dict[str, Any]) -> None:
    """Of a square latent, as Riffusion's, no call could tell it."""
    pipe = image_pipeline()
    message = r'StableDiffusionPipeline makes pictures .* freq_axis="height", with freq_bins=64 \(Riffusion\) or 32'
    with pytest.raises(ValueError, match=message):
        litefocus.patch(pipe, **options)
    litefocus.patch(pipe.unet, freq_bins=12)  # the UNet alone may lie otherwise, which its call tells
    with pytest.raises(ValueError, match=r'\(frequency, time\) is freq_axis="height", freq_bins=32'):
        latent(pipe, 32, 16)


class TracedUNet(nn.Module):
    """As Riffusion wraps a traced UNet that it downloads: the traced module itself is out of reach."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_unet_is_refused() -> None:
    for unet in (TracedUNet(), torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))):
        with pytest.raises(TypeError, match=r"is traced .* load the model without tracing .* use_traced_unet=False"):
            litefocus.patch(types.SimpleNamespace(unet=unet), freq_bins=64, freq_axis="height")


# --- what is refused -------------------------------------------------------------------------------------------------

NOT_2D = {
    "unet": [
        "UNet1DModel",
        "UNet3DConditionModel",
        "UNetSpatioTemporalConditionModel",
        "UNetMotionModel",
        "I2VGenXLUNet",
    ],
    "transformer": [
        "StableAudioDiTModel",
        "AceStepTransformer1DModel",
        "FluxTransformer2DModel",
        "DiTTransformer2DModel",
    ],
    "vae": ["AutoencoderKL", "AutoencoderOobleck", "AutoencoderKLLTX2Audio"],
}


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm:FutureWarning")
@pytest.mark.parametrize(("where", "name"), [(where, name) for where, names in NOT_2D.items() for name in names])
def test_refuses_the_real_classes_that_have_no_frequency_axis(where: str, name: str) -> None:
    with torch.device("meta"):
        model = getattr(diffusers, name)()
    pipe = types.SimpleNamespace(**{where: model})
    for target, call in itertools.product((model, pipe), (litefocus.patch, litefocus.status)):
        litefocus.unpatch(target)
        with pytest.raises(TypeError, match=r"litefocus accepts an AudioLDM") as error:
            call(target)
        assert "\n" not in str(error.value)
    assert {
        "unet": "is no 2-D UNet",
        "transformer": "has a transformer and no 2-D UNet, so its latent has no frequency axis to focus on",
        "vae": "got an object",
    }[where] in str(error.value)


# --- known to fail without litefocus too -----------------------------------------------------------------------------


def test_a_pipeline_that_is_known_to_fail_says_how_to_mend_it() -> None:
    pipe = build("AudioLDM 2")
    pipe.language_model = GPT2Model(pipe.language_model.config)
    if hasattr(pipe.language_model, "_update_model_kwargs_for_generation"):
        pytest.fail("this transformers mends it: drop the warning, and the line in the README")
    with pytest.warns(UserWarning, match="language_model=GPT2LMHeadModel.from_pretrained") as caught:
        litefocus.patch(pipe)
    assert len(caught) == 1
    assert caught[0].filename == __file__
