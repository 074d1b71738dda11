"""What `patch` and its kin accept, what they read of it, and what they say of everything else."""

from __future__ import annotations

import copy
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from peft import LoraConfig, get_peft_model
from support.authors import authors, original_unet
from support.pipelines import audioldm_unet, build, generate
from support.small import (
    BOTH,
    FEW,
    assert_off,
    assert_same,
    compiled,
    dense,
    first_sample,
    focus,
    latent,
    leftovers,
    patch,
    run,
    small_unet,
    states,
    step,
)
from support.tango import TangoVAE, tango_unet
from torch import nn
from transformers import SpeechT5HifiGan

import litefocus
from litefocus._target import latent_geometry

both = pytest.mark.parametrize("function", [litefocus.patch, litefocus.probe])


# --- a UNet that is wrapped ------------------------------------------------------------------------------------------


def fully_sharded(unet: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({BasicTransformerBlock})
    return FSDP(unet, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True)


def fully_sharded_2(unet: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for module in list(unet.modules()):
        if isinstance(module, BasicTransformerBlock):
            fully_shard(module, mesh=mesh)
    return fully_shard(unet, mesh=mesh)


def checkpointed(unet: Any) -> Any:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(unet)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "DDP": nn.parallel.DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "FSDP": fully_sharded,
    "FSDP2": fully_sharded_2,
    "checkpoint": checkpointed,
    "average": torch.optim.swa_utils.AveragedModel,
    "DDP of checkpoint": lambda unet: nn.parallel.DistributedDataParallel(checkpointed(unet)),
    "compiled": compiled,
}


@pytest.mark.filterwarnings("ignore")  # FSDP of one process shards nothing
@pytest.mark.usefixtures("process_group", "fresh_compiler")
@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_unet_is_patched_like_another(wrapper: Callable[[Any], Any]) -> None:
    unet = small_unet()
    names = [row.name for row in litefocus.status(unet).layers]
    patch(unet, 2)
    wrapped = wrapper(unet)
    assert litefocus.status(wrapped).config.seed == 2
    patch(wrapped)
    pipe = types.SimpleNamespace(unet=wrapped)
    for shown in (wrapped, pipe):
        assert [row.name for row in litefocus.status(shown).layers] == names
        assert states(shown) == {"focus"}
    assert_same(step(wrapped).detach(), first_sample())
    litefocus.unpatch(pipe)
    assert litefocus.status(wrapped).config is None
    assert_same(step(wrapped).detach(), dense())


def adapted(unet: Any) -> Any:
    """peft's models pass on the attributes of what they wrap."""
    return get_peft_model(unet, LoraConfig(r=2, target_modules=["to_q"]))


def test_an_adapted_unet_has_one_set_of_patches() -> None:
    unet = small_unet()
    outer = adapted(unet)
    for one, other in ((outer, unet), (unet, outer)):
        patch(one)
        assert_same(run(outer), focus())
        assert_same(run(unet), focus())
        assert litefocus.status(other).layers[0].state == "focus"
        litefocus.unpatch(other)
        assert_off(one)
        assert_off(other)
        assert run(one, latent(bins=8)).shape[3] == 8


def test_one_unet_under_several_names_is_one() -> None:
    unet = small_unet()
    pipe = types.SimpleNamespace(unet=unet, adapter=adapted(unet), model=types.SimpleNamespace(unet=unet))
    patch(pipe)
    assert len(litefocus.status(unet).layers) == 1
    pipe.adapter = adapted(small_unet())
    with pytest.raises(TypeError, match=r"holds 2 UNets \(unet, adapter\)"):
        litefocus.status(pipe)


class AudioLCM(nn.Module):
    """ConsistencyTTA's training class, which infers with one of two copies of the UNet that it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher_unet, self.student_unet = small_unet(), small_unet()
        self.student_target_unet = copy.deepcopy(self.student_unet)
        self.student_ema_unet = copy.deepcopy(self.student_unet)


@pytest.mark.parametrize("call", [litefocus.patch, litefocus.status, litefocus.unpatch])
@pytest.mark.parametrize("held", [lambda model: model, lambda model: types.SimpleNamespace(model=model)])
def test_an_object_with_several_unets_is_refused_and_each_of_them_accepted(call: Any, held: Callable[..., Any]) -> None:
    model = AudioLCM()
    unets = r"teacher_unet, (model\.)?student_unet, (model\.)?student_target_unet, (model\.)?student_ema_unet"
    with pytest.raises(TypeError, match=rf"holds 4 UNets \((model\.)?{unets}\).*litefocus\.patch\(pipe\."):
        call(held(model))
    patch(model.student_ema_unet)
    assert_same(run(model.student_ema_unet), focus())
    assert_same(run(model.student_target_unet), dense())


@pytest.mark.parametrize("name", ["unet", "student_unet"])
def test_consistency_tta(name: str) -> None:
    model = types.SimpleNamespace(**{name: tango_unet()}, vae=TangoVAE())
    litefocus.patch(model, litefocus.LiteFocusConfig.paper())
    found = [(layer.freq_bins, layer.state) for layer in litefocus.status(getattr(model, name)).layers]
    assert {state: found.count(state) for state in found} == {
        (16, "focus"): 5,
        (8, "focus"): 5,
        (4, "dense"): 5,
        (2, "dense"): 1,
    }
    assert litefocus.status(model, seconds=10).layers[0].frames == 250


# --- the geometry of the latent --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["AudioLDM", "AudioLDM 2"])
def test_a_vocoder_of_other_bins_that_came_after_the_patch_works(name: str) -> None:
    """As diffusers' own `test_audioldm2_vocoder_model_in_dim` exchanges it: 128 mel bins are 32 of a latent."""
    pipe, fresh = build(name), build(name)
    litefocus.patch(pipe)
    before = generate(pipe, 1.0)
    for each in (pipe, fresh):
        config = copy.deepcopy(each.vocoder.config)
        config.model_in_dim = 128
        torch.manual_seed(0)
        each.vocoder = SpeechT5HifiGan(config).eval()
    litefocus.patch(fresh)
    audio = generate(pipe, 1.0)
    assert (audio == generate(fresh, 1.0)).all()
    assert audio.shape == before.shape
    assert {row.freq_bins for row in litefocus.status(pipe).layers} == {16, 8, 4}
    assert {row.state for row in litefocus.status(pipe).layers if row.freq_bins == 16} == {"focus"}


def test_a_bare_unet_shows_its_bins_when_it_is_called() -> None:
    unet = small_unet()
    litefocus.patch(unet, seed=1, **FEW)
    assert {row.freq_bins for row in litefocus.status(unet).layers} == {None}
    assert_same(run(unet), focus())
    assert {row.freq_bins for row in litefocus.status(unet).layers} == {16}
    run(unet, latent(bins=8))
    assert {row.freq_bins for row in litefocus.status(unet).layers} == {8}
    assert_same(run(unet), focus())


# --- options ---------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"freq_bins": 0}, ValueError, "at least 1, got 0"),
        ({"freq_bins": 16.0}, TypeError, "freq_bins must be an integer"),
        ({"freq_axis": "widht"}, ValueError, "Did you mean 'width'"),
        ({"sparse_ration": 1}, TypeError, r"(patch|probe)\(\) has no option .* Did you mean 'sparse_ratio'"),
        ({"freq_bin": 16}, TypeError, r"(patch|probe)\(\) has no option 'freq_bin'. Did you mean 'freq_bins'?"),
        ({"sparse_ratio": 2}, ValueError, r"sparse_ratio must be a finite number in \[0, 1\], got 2"),
    ],
)
def test_bad_options_change_nothing(function: Any, make: Any, arguments: Any, error: Any, message: str) -> None:
    unet = make()
    with pytest.raises(error, match=message):
        function(unet, **arguments)
    assert not leftovers(unet)


@both
def test_options_that_contradict_the_pipeline(function: Any) -> None:
    pipe = build("AudioLDM")
    for options, message in (
        ({"freq_bins": 8}, "freq_bins=8 contradicts the pipeline, whose latent has 16 frequency bins"),
        ({"freq_axis": "height"}, r"freq_axis='height' contradicts AudioLDMPipeline, .* latent is \(time, frequency\)"),
    ):
        with pytest.raises(ValueError, match=message):
            function(pipe, **options)
    assert not leftovers(pipe.unet)


def test_a_patch_that_would_focus_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"would focus: the .* have 8, 4, 2 frequency bins, .* set min_freq_bins to 8"):
        litefocus.patch(build("AudioLDM"), min_freq_bins=9)
    with pytest.raises(ValueError, match=r"all 20 have a single frequency bin.*check freq_bins"):
        litefocus.patch(audioldm_unet(), freq_bins=2, min_freq_bins=1)


# --- what is refused -------------------------------------------------------------------------------------------------


def latent_diffusion_over_a_transformer() -> Any:
    """As of OpenMusic's QA-MDT."""
    kind = type("Transformer", (nn.Module,), {})
    return types.SimpleNamespace(latent_f_size=16, model=types.SimpleNamespace(diffusion_model=kind()))


def pipeline_without_a_unet() -> Any:
    """A stage that encodes prompts only."""
    pipe = build("AudioLDM 2")
    pipe.unet = None
    return pipe


def bad_targets() -> Iterator[tuple[Any, str]]:
    yield None, "got None; litefocus accepts an AudioLDM, AudioLDM 2, MusicLDM, Tango"
    yield "pipe", "got an object of type str; litefocus accepts"
    yield object(), "got an object of type object; litefocus accepts"
    yield nn.Linear(2, 2), "got an object of type Linear; litefocus accepts"
    yield AutoencoderKL(), "got an object of type AutoencoderKL; litefocus accepts"
    yield types.SimpleNamespace(unet=nn.Linear(2, 2)), r"SimpleNamespace cannot be .* its unet \(Linear\) is no 2-D"
    yield types.SimpleNamespace(unet=None), "SimpleNamespace cannot be patched: its unet is None: load it with one"
    yield pipeline_without_a_unet(), "AudioLDM2Pipeline cannot be patched: its unet is None: load it with one"
    yield latent_diffusion_over_a_transformer(), r"its model.diffusion_model \(Transformer\) is no 2-D UNet"


@pytest.mark.parametrize("call", [litefocus.patch, litefocus.probe, litefocus.status])
def test_what_has_no_unet_is_refused_and_unpatched_without_harm(call: Callable[[Any], Any]) -> None:
    for target, message in bad_targets():
        litefocus.unpatch(target)
        with pytest.raises(TypeError, match=message):
            call(target)


def test_unpatching_a_pipeline_without_a_unet_takes_its_tiles_off() -> None:
    pipe = pipeline_without_a_unet()
    litefocus.tile_decoding(pipe)
    litefocus.unpatch(pipe)
    assert "decode" not in vars(pipe.vae)


NOT_2D = [
    *(
        ("unet", f"UNet{kind}")
        for kind in ("1DModel", "3DConditionModel", "SpatioTemporalConditionModel", "MotionModel")
    ),
    ("unet", "I2VGenXLUNet"),
    ("transformer", "StableAudioDiTModel"),
    ("transformer", "AceStepTransformer1DModel"),
    ("transformer", "FluxTransformer2DModel"),
    ("transformer", "DiTTransformer2DModel"),
    *(("vae", f"Autoencoder{kind}") for kind in ("KL", "Oobleck", "KLLTX2Audio")),
]


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm:FutureWarning")
@pytest.mark.parametrize(("where", "name"), NOT_2D)
def test_the_real_classes_that_have_no_frequency_axis_are_refused(where: str, name: str) -> None:
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


class TracedUNet(nn.Module):
    """As Riffusion wraps a traced UNet that it downloads: the traced module itself is out of reach."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_unet_is_refused() -> None:
    for unet in (TracedUNet(), torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))):
        with pytest.raises(TypeError, match=r"is traced .* load the model without tracing .* use_traced_unet=False"):
            litefocus.patch(types.SimpleNamespace(unet=unet), freq_bins=64, freq_axis="height")


@both
def test_a_unet_without_self_attention_is_refused(function: Any) -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        mid_block_type=None,
        layers_per_block=1,
    )
    with pytest.raises(ValueError, match=r"of UNet2DConditionModel can be patched: .* hold none that litefocus knows"):
        function(unet)
