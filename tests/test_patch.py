"""patch, unpatch and status on complete pipelines, against diffusers' own attention under a mask."""

import copy
import gc
import io
import subprocess
import sys
import types
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, SlicedAttnProcessor
from support.oracle import install_oracle
from support.pipelines import BUILDERS, audioldm2_unet, audioldm_unet, build, generate
from support.settings import hand_in
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import litefocus
import litefocus.__main__ as report
from litefocus import LiteFocusAttnProcessor, LiteFocusConfig

PAPER = LiteFocusConfig.paper()


@pytest.fixture
def one_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle does not know timesteps: one sample for all of them."""
    hand_in(monkeypatch, num_samples=1)


@pytest.fixture(params=BUILDERS)
def pipe(request: pytest.FixtureRequest, device: torch.device) -> Any:
    return build(request.param).to(device)


def attentions(unet: nn.Module) -> dict[str, Attention]:
    return {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}


def processors(unet: nn.Module) -> dict[str, Any]:
    return {name: module.processor for name, module in attentions(unet).items()}


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return before.keys() == after.keys() and all(before[name] is after[name] for name in before)


@pytest.mark.parametrize("seconds", [1.0, 1.32, 2.6])  # 25, 33 and 65 latent frames: odd at several levels
@pytest.mark.parametrize(
    "config",
    [LiteFocusConfig(min_sampled=4), PAPER, LiteFocusConfig.paper(sparse_ratio=0.3, seed=5, min_freq_bins=2)],
    ids=["weighted", "paper", "paper, every level"],
)
@pytest.mark.usefixtures("one_draw")
def test_audio_is_that_of_masked_dense_attention(pipe, seconds, config, monkeypatch) -> None:
    hand_in(monkeypatch, min_keys_saved=1)  # the deepest grids focus too, small as they are
    dense = generate(pipe, seconds)
    oracle = copy.deepcopy(pipe)
    install_oracle(oracle.unet, config)
    expected = generate(oracle, seconds)
    litefocus.patch(pipe, config)
    np.testing.assert_allclose(generate(pipe, seconds), expected, atol=1e-4, rtol=1e-3)
    assert np.abs(expected - dense).max() > 5e-3  # so that doing nothing would not pass


@pytest.mark.usefixtures("one_draw")
@pytest.mark.parametrize(("far", "more"), [(0, 0), (3, 8 * 3)])
def test_time_windows_are_those_of_masked_dense_attention(far, more, device) -> None:
    pipe = build("AudioLDM 2").to(device)
    config = LiteFocusConfig.paper(time_window=21, far_sampled=far, reweight=far > 0)
    oracle = copy.deepcopy(pipe)
    install_oracle(oracle.unet, config)
    expected = generate(oracle, 7.0, steps=1)
    litefocus.patch(pipe, config)
    assert litefocus.status(pipe, seconds=7).layers[0].keys_kept == pytest.approx((64 + 12 + 7 * 8 + more) / (88 * 8))
    np.testing.assert_allclose(generate(pipe, 7.0, steps=1), expected, atol=1e-5, rtol=1e-4)
    litefocus.patch(pipe, PAPER)
    assert np.abs(generate(pipe, 7.0, steps=1) - expected).max() > 1e-3


def test_ratio_one_is_dense(pipe) -> None:
    dense = generate(pipe)
    litefocus.patch(pipe, sparse_ratio=1.0, time_window=None)
    assert {layer.state for layer in litefocus.status(pipe).layers} == {"dense"}
    assert np.array_equal(generate(pipe), dense)


def test_unpatch_restores_the_objects_and_the_audio(pipe) -> None:
    before, dense, modules = processors(pipe.unet), generate(pipe), [set(vars(m)) for m in pipe.unet.modules()]
    litefocus.patch(pipe, PAPER)
    assert not np.array_equal(generate(pipe), dense)
    litefocus.unpatch(pipe)
    assert same(before, processors(pipe.unet))
    assert np.array_equal(generate(pipe), dense)
    assert [set(vars(module)) for module in pipe.unet.modules()] == modules


def test_patched_audio_repeats(pipe) -> None:
    litefocus.patch(pipe, PAPER)
    first = generate(pipe)
    torch.manual_seed(99)
    assert np.array_equal(generate(pipe), first)


def test_unpatch_is_harmless_when_nothing_is_patched(pipe) -> None:
    before = processors(pipe.unet)
    litefocus.unpatch(pipe)
    assert same(before, processors(pipe.unet))


def test_context_manager_restores_after_an_exception(pipe) -> None:
    before = processors(pipe.unet)
    with pytest.raises(ValueError, match="`prompt` has to be"), litefocus.patch(pipe, PAPER):
        pipe(prompt=object(), audio_length_in_s=1.0)
    assert same(before, processors(pipe.unet))


def test_nested_contexts_restore_the_outer_configuration(pipe) -> None:
    before = processors(pipe.unet)
    with litefocus.patch(pipe, PAPER, sparse_ratio=0.2) as outer:
        during = processors(pipe.unet)
        with litefocus.patch(pipe, outer.config, seed=3):
            assert litefocus.status(pipe).config == LiteFocusConfig.paper(sparse_ratio=0.2, seed=3)
        assert same(during, processors(pipe.unet))
        litefocus.patch(pipe, seed=4)  # replaced inside, and still undone outside
    assert same(before, processors(pipe.unet))


def test_a_removed_patch_does_not_come_back(pipe) -> None:
    before = processors(pipe.unet)
    outer = litefocus.patch(pipe, PAPER)
    with litefocus.patch(pipe, seed=1):
        outer.remove()
    assert same(before, processors(pipe.unet))
    with pytest.raises(RuntimeError, match="this patch was taken off, or was entered before"), outer:
        pass


def test_what_was_overwritten_inside_a_context_is_still_shown_outside(pipe) -> None:
    litefocus.patch(pipe, PAPER)
    with litefocus.patch(pipe, seed=1):
        pipe.enable_attention_slicing()
    assert {layer.state for layer in litefocus.status(pipe).layers} == {"overwritten by SlicedAttnProcessor"}


def test_unpatch_inside_a_context_is_final(pipe) -> None:
    before = processors(pipe.unet)
    litefocus.patch(pipe, PAPER)
    with litefocus.patch(pipe, seed=1):
        litefocus.unpatch(pipe)
    assert same(before, processors(pipe.unet))


def test_patching_again_replaces_and_never_stacks(pipe) -> None:
    before, dense = processors(pipe.unet), generate(pipe)
    first = litefocus.patch(pipe, sparse_ratio=0.5)
    second = litefocus.patch(pipe, PAPER)
    originals = [p.original for p in processors(pipe.unet).values() if isinstance(p, LiteFocusAttnProcessor)]
    assert originals
    assert not any(isinstance(original, LiteFocusAttnProcessor) for original in originals)
    first.remove()  # its processors are gone already
    assert litefocus.status(pipe).config == PAPER
    second.remove()
    assert same(before, processors(pipe.unet))
    assert np.array_equal(generate(pipe), dense)


def test_what_something_else_overwrote_is_shown_and_left(pipe) -> None:
    before = processors(pipe.unet)
    litefocus.patch(pipe, PAPER)
    name, attn = next(item for item in attentions(pipe.unet).items() if item[0].endswith("attn1"))
    other = SlicedAttnProcessor(1)
    attn.set_processor(other)
    states = {layer.name: layer.state for layer in litefocus.status(pipe).layers}
    assert states.pop(name) == "overwritten by SlicedAttnProcessor"
    assert "focus" in states.values()
    assert not any(state.startswith("overwritten") for state in states.values())
    litefocus.unpatch(pipe)
    after = processors(pipe.unet)
    assert after.pop(name) is other
    before.pop(name)
    assert same(before, after)


def test_attention_slicing_overwrites_everything_and_is_shown(pipe) -> None:
    litefocus.patch(pipe, PAPER)
    pipe.enable_attention_slicing()
    status = litefocus.status(pipe)
    assert {layer.state for layer in status.layers} == {"overwritten by SlicedAttnProcessor"}
    assert f"{len(status.layers)} overwritten since they were patched" in repr(status)
    litefocus.patch(pipe, PAPER)
    assert "overwritten" not in repr(litefocus.status(pipe))
    litefocus.unpatch(pipe)
    assert {layer.state for layer in litefocus.status(pipe).layers} == {"dense"}


def test_a_failure_midway_leaves_the_pipeline_as_it_was(pipe, monkeypatch) -> None:
    modules = [set(vars(module)) for module in pipe.unet.modules()]
    before = processors(pipe.unet)
    last = list(attentions(pipe.unet).values())[-2]
    set_processor = Attention.set_processor

    def fail_at_last(self: Attention, processor: Any) -> None:
        if self is last:
            raise RuntimeError("full")
        set_processor(self, processor)

    monkeypatch.setattr(Attention, "set_processor", fail_at_last)
    with pytest.raises(RuntimeError, match="full"):
        litefocus.patch(pipe, seed=2)
    assert same(before, processors(pipe.unet))
    assert [set(vars(module)) for module in pipe.unet.modules()] == modules


def test_a_copy_is_independent(pipe) -> None:
    dense = generate(pipe)
    litefocus.patch(pipe, PAPER)
    patched = generate(pipe)
    other = copy.deepcopy(pipe)
    litefocus.unpatch(pipe)
    assert np.array_equal(generate(pipe), dense)
    assert np.array_equal(generate(other), patched)
    litefocus.unpatch(other)
    assert np.array_equal(generate(other), dense)


def test_a_patched_unet_pickles(pipe) -> None:
    litefocus.patch(pipe, PAPER)
    patched = generate(pipe)
    buffer = io.BytesIO()
    torch.save(pipe.unet, buffer)
    buffer.seek(0)
    pipe.unet = torch.load(buffer, weights_only=False)
    assert np.array_equal(generate(pipe), patched)
    assert litefocus.status(pipe).config == PAPER


def test_a_patched_unet_can_be_freed() -> None:
    unet = audioldm_unet()
    handle = litefocus.patch(unet, freq_bins=16)
    alive = weakref.ref(unet)
    del unet
    gc.collect()
    assert alive() is None
    assert "gone" in repr(handle)


def test_saving_a_patched_pipeline_saves_nothing_of_ours(pipe, tmp_path) -> None:
    litefocus.patch(pipe, PAPER)
    pipe.unet.save_pretrained(tmp_path)
    assert "litefocus" not in (tmp_path / "config.json").read_text().lower()
    assert not any(
        "LiteFocus" in type(p).__name__ for p in processors(type(pipe.unet).from_pretrained(tmp_path)).values()
    )


def test_a_unet_alone_is_patched_like_its_pipeline(pipe) -> None:
    litefocus.patch(pipe, PAPER)
    expected = generate(pipe)
    litefocus.unpatch(pipe)
    litefocus.patch(pipe.unet, PAPER, freq_bins=16)
    assert np.array_equal(generate(pipe), expected)
    litefocus.unpatch(pipe.unet)
    assert litefocus.status(pipe).config is None


def test_a_pipeline_with_a_compiled_unet_is_patched_like_another(pipe) -> None:
    plain = [(layer.name, layer.freq_bins) for layer in litefocus.status(pipe).layers]
    inner = pipe.unet
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    litefocus.patch(pipe, PAPER)
    assert [(layer.name, layer.freq_bins) for layer in litefocus.status(pipe).layers] == plain
    assert litefocus.status(inner).config == PAPER
    litefocus.unpatch(pipe)
    assert litefocus.status(inner).config is None


def test_height_axis() -> None:
    """A frequency-major UNet is the same as a time-major one with its grid transposed."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    x, text = torch.randn(1, 4, 8, 24), torch.randn(1, 3, 12)  # 8 frequency bins x 24 frames
    litefocus.patch(unet, PAPER, freq_bins=8, freq_axis="height", min_freq_bins=4)
    with torch.no_grad():
        got = unet(x, 1, text).sample
        for module in unet.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_(module.weight.transpose(2, 3).clone())
        litefocus.patch(unet, PAPER, freq_bins=8, min_freq_bins=4)
        expected = unet(x.transpose(2, 3), 1, text).sample.transpose(2, 3)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


# --- which layers, at the published shapes (no weights: the meta device) ---------------------------------------------

PUBLISHED = {
    "audioldm-s": (audioldm_unet, {"channels": (128, 256, 384, 640)}, 32, 32),
    "audioldm-m": (audioldm_unet, {"channels": (192, 384, 576, 960)}, 32, 32),
    "audioldm-l": (audioldm_unet, {"channels": (256, 512, 768, 1280)}, 32, 32),
    "audioldm2": (audioldm2_unet, {"channels": (128, 256, 384, 640), "slots": (None, 768, 1024)}, 64, 96),
    "audioldm2-large": (
        audioldm2_unet,
        {
            "channels": (128, 256, 384, 640),
            "slots": (None, 768, 1024, None),
            "transformer_layers_per_block": 2,
        },
        192,
        256,
    ),
}


def published_unet(name: str) -> nn.Module:
    maker, settings, _, _ = PUBLISHED[name]
    with torch.device("meta"):
        return maker(**settings, layers_per_block=2, norm_num_groups=32, attention_head_dim=8)  # type: ignore[operator]


@pytest.mark.parametrize("name", PUBLISHED)
def test_finds_all_self_attention_of_the_published_unets(name) -> None:
    unet = published_unet(name)
    litefocus.patch(unet, PAPER, freq_bins=16)
    layers = litefocus.status(unet).layers
    assert (len(layers), len(attentions(unet))) == PUBLISHED[name][2:]
    by_block = {layer.name.split(".attentions")[0]: layer.freq_bins for layer in layers}
    assert by_block == {
        "down_blocks.1": 8,
        "down_blocks.2": 4,
        "down_blocks.3": 2,
        "mid_block": 2,
        "up_blocks.0": 2,
        "up_blocks.1": 4,
        "up_blocks.2": 8,
    }
    assert {layer.state for layer in layers if layer.freq_bins == 8} == {"focus"}
    assert {layer.state for layer in layers if layer.freq_bins != 8} == {"dense"}


def test_an_encoder_as_wide_as_a_layer_is_not_taken_for_self_attention() -> None:
    apart, equal = (audioldm2_unet(slots=(None, 18, width)) for width in (32, 16))
    assert [a.name for a in litefocus.status(apart).layers] == [b.name for b in litefocus.status(equal).layers]


def with_published_unet(name: str) -> Any:
    pipe = build("AudioLDM")
    pipe.unet = published_unet(name)
    return pipe


def test_estimate_agrees_with_a_count_of_every_operation() -> None:
    pipe = with_published_unet("audioldm2")
    frames = 1000
    inputs = {
        "sample": torch.empty(1, 8, frames, 16, device="meta"),
        "timestep": torch.empty((), device="meta"),
        "encoder_hidden_states": torch.empty(1, 8, 768, device="meta"),
        "encoder_hidden_states_1": torch.empty(1, 8, 1024, device="meta"),
    }
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pipe.unet(**inputs)
    flops = litefocus.status(pipe, seconds=40).flops
    assert flops is not None
    assert flops.dense == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(("name", "ratio"), [("audioldm-s", 1.65), ("audioldm2", 1.78), ("audioldm2-large", 2.08)])
def test_estimated_saving_at_80_seconds(name, ratio) -> None:
    """The limits were counted by hand, layer by layer, at 1024 frames where F = 8."""
    pipe = with_published_unet(name)
    litefocus.patch(pipe, PAPER, min_freq_bins=2)
    status = litefocus.status(pipe, seconds=81.92)
    assert status.flops is not None
    assert status.flops.ratio == pytest.approx(ratio, abs=0.02)
    kept = {layer.freq_bins: layer.keys_kept for layer in status.layers}
    assert kept == {8: 1738 / 8192, 4: (512 + 3 * 51) / 2048, 2: (256 + 26) / 512}
    assert f"at most {status.flops.ratio:.2f}x faster" in repr(status)


# --- bad input -------------------------------------------------------------------------------------------------------


def latent_diffusion_over_a_transformer() -> Any:
    """As of OpenMusic's QA-MDT."""
    kind = type("Transformer", (nn.Module,), {})
    return types.SimpleNamespace(latent_f_size=16, model=types.SimpleNamespace(diffusion_model=kind()))


def bad_targets() -> Iterator[tuple[Any, str]]:
    yield None, "got None; litefocus accepts an AudioLDM, AudioLDM 2, MusicLDM, Tango"
    yield "pipe", "got an object of type str; litefocus accepts"
    yield object(), "got an object of type object; litefocus accepts"
    yield nn.Linear(2, 2), "got an object of type Linear; litefocus accepts"
    yield AutoencoderKL(), "got an object of type AutoencoderKL; litefocus accepts"
    yield (
        types.SimpleNamespace(unet=nn.Linear(2, 2)),
        r"SimpleNamespace cannot be patched: its unet \(Linear\) is no 2-D",
    )
    yield types.SimpleNamespace(unet=None), "its unet is None: load it with one"
    yield latent_diffusion_over_a_transformer(), r"its model.diffusion_model \(Transformer\) is no 2-D UNet"


@pytest.mark.parametrize("call", [litefocus.patch, litefocus.probe, litefocus.status])
def test_refuses_what_has_no_unet(call) -> None:
    for target, message in bad_targets():
        litefocus.unpatch(target)  # harmless
        with pytest.raises(TypeError, match=message):
            call(target)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"freq_bins": 8}, ValueError, "freq_bins=8 contradicts the pipeline, whose latent has 16 frequency bins"),
        ({"freq_bins": 16.0}, TypeError, "freq_bins must be an integer"),
        ({"freq_axis": "height"}, ValueError, r"freq_axis='height' contradicts .* latent is \(time, frequency\)"),
        ({"freq_axis": "hight"}, ValueError, "got 'hight'. Did you mean 'height'?"),
        ({"freq_bin": 16}, TypeError, r"patch\(\) has no option 'freq_bin'. Did you mean 'freq_bins'?"),
        ({"sparse_ration": 0.2}, TypeError, r"patch\(\) has no option 'sparse_ration'. Did you mean 'sparse_ratio'?"),
        ({"sparse_ratio": 2}, ValueError, r"sparse_ratio must be a finite number in \[0, 1\], got 2"),
        ({"config": {"seed": 1}}, TypeError, "config must be a LiteFocusConfig, got dict"),
        (
            {"min_freq_bins": 9},
            ValueError,
            "would focus: the .* have 8, 4, 2 frequency bins, .* set min_freq_bins to 8",
        ),
    ],
)
def test_refuses_bad_options_and_changes_nothing(pipe, options, error, message) -> None:
    before = processors(pipe.unet)
    with pytest.raises(error, match=message):
        litefocus.patch(pipe, **options)
    assert same(before, processors(pipe.unet))


def test_wrong_freq_bins_show_at_the_first_call() -> None:
    pipe = build("AudioLDM")
    litefocus.patch(pipe.unet, freq_bins=24)
    message = r"patched for 24 frequency bins on the width axis, and its input .* \(2, 8, 25, 16\) has 16 there"
    with pytest.raises(ValueError, match=message):
        generate(pipe, 1.0)


def test_a_unet_without_self_attention_is_refused() -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        mid_block_type=None,
        layers_per_block=1,
    )
    with pytest.raises(ValueError, match="hold none that litefocus knows"):
        litefocus.patch(unet, freq_bins=16)


def test_a_grid_of_one_bin_is_refused() -> None:
    with pytest.raises(ValueError, match=r"all 20 have a single frequency bin.*check freq_bins"):
        litefocus.patch(audioldm_unet(), freq_bins=2, min_freq_bins=1)


def test_importing_is_light() -> None:
    script = (
        "import sys, torch; before = set(sys.modules); import litefocus; new = set(sys.modules) - before; "
        "print(sorted(m for m in new if m.split('.')[0] in ('diffusers', 'transformers') or m == 'torch._dynamo'))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_report_for_bugs(capsys: pytest.CaptureFixture[str]) -> None:
    report.main()
    lines = capsys.readouterr().out
    assert f"torch {torch.__version__.split('+')[0]}" in lines
    assert "diffusers.AudioLDM2Pipeline: supported" in lines
