"""Models that are no AudioLDM, AudioLDM 2 or MusicLDM pipeline of diffusers: the authors' own code (the real classes of
the packages audioldm, audioldm2 and audiosr), Mustango and the diffusers of its time, and frequency-major pipelines.
"""

from __future__ import annotations

import copy
import types
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D
from support.authors import VARIANTS, cross_attention, original_unet, run_original
from support.oracle import Grids, biased_attention, install_oracle
from support.pipelines import JOINT, audioldm2_unet, audioldm_unet
from support.tango import TangoVAE, tango_unet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import litefocus
from litefocus import LiteFocusConfig

ALL = LiteFocusConfig(min_sampled=0)  # clips this short would be dense with the floor
pytestmark = pytest.mark.usefixtures("small_grids_focus", "one_sample")


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
    assert status.layers[0].name == "input_blocks.4.1.transformer_blocks.0.attn1"
    litefocus.patch(unet, sparse_ratio=1.0, time_window=None)  # every self-attention call left dense
    assert torch.equal(run_original(unet, bins=bins), dense)
    litefocus.unpatch(unet)
    assert torch.equal(run_original(unet, bins=bins), dense)
    assert not any("forward" in layer.__dict__ for layer in cross_attention(unet).values())


# --- old diffusers, Mustango ---------------------------------------------------------------------------------


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


def with_mustangos_blocks(unet: nn.Module) -> nn.Module:
    for block in unet.down_blocks[:3]:
        block.__class__ = MusicBlock
        block.attentions2, block.attentions3 = copy.deepcopy(block.attentions), copy.deepcopy(block.attentions)
    return unet


@pytest.mark.parametrize("music", [False, True], ids=["Tango's blocks", "Mustango's blocks"])
def test_layers_of_old_diffusers(music: bool) -> None:
    torch.manual_seed(0)
    unet = tango_unet(attention_head_dim=2)
    layers = 16
    if music:
        with_mustangos_blocks(unet)
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
    ("kind", "count"), [("Tango", 16), ("AudioLDM", 20), ("AudioLDM 2", 60), ("AudioLDM 2, widths apart", 60)]
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
    with torch.device("meta"):
        unet = with_mustangos_blocks(tango_unet(block_out_channels=(64, 128, 256, 256), attention_head_dim=2))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(torch.randn(1, 8, 250, 16), 7, torch.randn(1, 5, JOINT))
    mustango = types.SimpleNamespace(model=types.SimpleNamespace(unet=unet), vae=TangoVAE())
    flops = litefocus.status(mustango, seconds=10).flops
    assert flops is not None
    assert flops.dense == pytest.approx(counter.get_total_flops(), rel=0.02)


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
    ("height", "width", "bins"), [(32, 32, {32, 16, 8, 4}), (16, 64, {16, 8, 4, 2})], ids=["Riffusion", "Auffusion"]
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
    message = r'StableDiffusionPipeline makes pictures; .* pass freq_axis="height", else pass the UNet alone'
    with pytest.raises(ValueError, match=message):
        litefocus.patch(pipe, **options)
    litefocus.patch(pipe.unet, freq_bins=12)  # the UNet alone may lie otherwise, which its call tells
    with pytest.raises(ValueError, match=r'\(frequency, time\) is freq_axis="height", freq_bins=32'):
        latent(pipe, 32, 16)


class AttentionStore:
    """A processor in the manner of prompt-to-prompt editing, which attends and keeps what it sees."""

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = AttnProcessor2_0()(attn, *args, **kwargs)
        return output


def layers_of(unet: nn.Module) -> list[Attention]:
    return [module for module in unet.modules() if isinstance(module, Attention)]


class EditingPipeline(StableDiffusionPipeline):
    """As Auffusion's prompt-to-prompt pipeline: it installs its processors at the start of every call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for layer in layers_of(self.unet):
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
    assert all(isinstance(layer.processor, AttentionStore) for layer in layers_of(pipe.unet))
