"""litefocus beside everything else that people do to a pipeline: the numbers, against masked dense attention."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from DeepCache import DeepCacheSDHelper
from diffusers.models.attention_processor import SlicedAttnProcessor
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from support.oracle import install_oracle
from support.pipelines import build, generate, unet_step
from support.settings import hand_in
from torch import Tensor

import litefocus
from litefocus import LiteFocusConfig

CONFIG = LiteFocusConfig(sparse_ratio=0.2, min_sampled=0)  # clips this short would be dense with the floor
pytestmark = pytest.mark.usefixtures("small_grids_focus", "one_sample")


@pytest.fixture(params=["AudioLDM", "AudioLDM 2"])
def pipe(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


def oracle_of(pipe: Any, prepare: Callable[[Any], Any] = lambda pipe: None) -> Any:
    """A copy with masked dense attention, to which the same was done."""
    oracle = copy.deepcopy(pipe)
    prepare(oracle)
    install_oracle(oracle.unet, CONFIG)
    return oracle


def assert_same_audio(got: np.ndarray, expected: np.ndarray, **tolerance: float) -> None:
    np.testing.assert_allclose(got, expected, **{"atol": 1e-4, "rtol": 1e-3, **tolerance})


def add_lora(pipe: Any) -> None:
    torch.manual_seed(3)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    if hasattr(pipe.unet, "add_adapter"):
        pipe.unet.add_adapter(config)
    else:  # diffusers gives AudioLDM 2's UNet no adapters of its own
        inject_adapter_in_model(config, pipe.unet)


def adapters(pipe: Any) -> list[BaseTunerLayer]:
    return [module for module in pipe.unet.modules() if isinstance(module, BaseTunerLayer)]


@pytest.mark.parametrize("first", ["adapter", "patch"])
def test_lora(pipe: Any, first: str) -> None:
    litefocus.patch(pipe, CONFIG)
    without = generate(pipe)
    litefocus.unpatch(pipe)
    expected = generate(oracle_of(pipe, add_lora))
    assert np.abs(expected - without).max() > 1e-3
    if first == "adapter":
        add_lora(pipe)
    litefocus.patch(pipe, CONFIG)
    if first == "patch":
        add_lora(pipe)
    assert {layer.state for layer in litefocus.status(pipe).layers} == {"focus"}
    assert_same_audio(generate(pipe), expected)
    for adapter in adapters(pipe):
        adapter.merge()
    assert_same_audio(generate(pipe), expected)
    for adapter in adapters(pipe):
        adapter.unmerge()
        adapter.enable_adapters(False)
    assert_same_audio(generate(pipe), without)


def model_offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def test_attention_slicing_before(pipe: Any) -> None:
    """What litefocus leaves dense stays sliced."""
    expected = generate(oracle_of(pipe))
    pipe.enable_attention_slicing(1)
    litefocus.patch(pipe, CONFIG)
    assert_same_audio(generate(pipe), expected)
    litefocus.unpatch(pipe)
    assert {type(p) for p in pipe.unet.attn_processors.values()} == {SlicedAttnProcessor}


def set_backend(pipe: Any) -> None:
    pipe.unet.set_attention_backend("native")


def cast_layerwise(pipe: Any) -> None:
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def channels_last(pipe: Any) -> None:
    pipe.unet.to(memory_format=torch.channels_last)


def free_u(pipe: Any) -> None:
    if not hasattr(pipe.unet, "enable_freeu"):
        pytest.skip(f"{type(pipe.unet).__name__} has no FreeU")
    pipe.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


@pytest.mark.parametrize("change", [set_backend, cast_layerwise, channels_last, free_u, model_offload])
@pytest.mark.parametrize("first", ["change", "patch"])
def test_changes_of_the_unet(pipe: Any, change: Callable[[Any], None], first: str) -> None:
    expected = generate(oracle_of(pipe, change))
    if first == "patch":
        litefocus.patch(pipe, CONFIG)
    change(pipe)
    if first == "change":
        litefocus.patch(pipe, CONFIG)
    assert_same_audio(generate(pipe), expected)
    litefocus.unpatch(pipe)
    assert np.abs(generate(pipe) - expected).max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_dense_attention_does(pipe: Any, dtype: torch.dtype) -> None:
    oracle = oracle_of(pipe)
    exact = unet_step(oracle.unet)
    error = (unet_step(oracle.unet.to(dtype)).float() - exact).abs().mean()
    litefocus.patch(pipe, CONFIG)
    assert (unet_step(pipe.unet.to(dtype)).float() - exact).abs().mean() < 1.2 * error
    assert error > 0


def test_gradients(pipe: Any) -> None:
    oracle = oracle_of(pipe)
    litefocus.patch(pipe, CONFIG)
    for unet in (pipe.unet, oracle.unet):
        unet_step(unet, grad=True).square().sum().backward()
    compared = 0
    for (name, got), expected in zip(pipe.unet.named_parameters(), oracle.unet.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(got.grad, expected.grad, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
            compared += expected.grad.abs().max() > 1e-3
    assert compared > 100


def test_pipelines_from_one_another_share_the_patch(pipe: Any) -> None:
    expected = generate(oracle_of(pipe))
    other = type(pipe).from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    litefocus.patch(pipe, CONFIG)
    assert litefocus.status(other).config == CONFIG
    assert_same_audio(generate(other), expected)
    litefocus.unpatch(other)
    assert litefocus.status(pipe).config is None


def test_a_saved_pipeline_loads_clean(pipe: Any, tmp_path: Any) -> None:
    dense = generate(pipe)
    litefocus.patch(pipe, CONFIG)
    pipe.save_pretrained(tmp_path)
    assert not any(b"litefocus" in path.read_bytes().lower() for path in tmp_path.rglob("*.json"))
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert litefocus.status(loaded).config is None
    assert_same_audio(generate(loaded), dense)


def test_two_pipelines_in_two_threads(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hand_in(monkeypatch, num_samples=4)  # each has its own timestep at hand
    other = copy.deepcopy(pipe)
    litefocus.patch(pipe, CONFIG)
    litefocus.patch(other, sparse_ratio=0.05, min_sampled=0, seed=9, min_freq_bins=4)
    alone = [generate(each, steps=4) for each in (pipe, other)]
    assert np.abs(alone[0] - alone[1]).max() > 1e-3
    for each in (pipe, other):  # anew: their threads build the focus sets
        litefocus.patch(each, litefocus.status(each).config)
    with ThreadPoolExecutor(2) as workers:
        together = list(workers.map(lambda each: generate(each, steps=4), (pipe, other)))
    assert np.array_equal(together, alone)


def test_toggled_halfway_through_the_steps(pipe: Any) -> None:
    """The audio pipelines of diffusers have `callback`; `callback_on_step_end` never reached them."""

    def run(each: Any, at_half: Callable[[], None], steps: int = 8) -> np.ndarray:
        def callback(i: int, t: Tensor, latents: Tensor) -> None:
            if i == steps // 2 - 1:
                at_half()

        settings = {"audio_length_in_s": 1.0, "num_inference_steps": steps, "callback": callback}
        return each("a hammer", generator=torch.Generator().manual_seed(0), **settings).audios

    pipe.to(torch.float64)  # late steps change little: rounding must not hide it
    dense, oracle = run(pipe, lambda: None), copy.deepcopy(pipe)
    short = run(pipe, lambda: None, steps=4)
    expected = run(oracle, lambda: install_oracle(oracle.unet, CONFIG))
    assert np.abs(expected - dense).max() > 1e-6
    got = run(pipe, lambda: litefocus.patch(pipe, CONFIG))
    assert_same_audio(got, expected, atol=1e-7, rtol=1e-7)
    litefocus.unpatch(pipe)
    assert np.array_equal(run(pipe, lambda: None, steps=4), short)


# --- what is broken without litefocus, and the mend that the README gives
# (where one of these stops failing, the mend and its line in the README can go)


def test_audioldm2_as_published_fails_and_its_mend_works() -> None:
    pipe = build("AudioLDM 2")
    expected, mended = generate(pipe), pipe.language_model
    pipe.language_model = mended.transformer  # the GPT2Model that cvssp/audioldm2 names, with the same weights
    with pytest.raises(AttributeError):
        generate(pipe)
    with pytest.warns(UserWarning, match="language_model=GPT2LMHeadModel.from_pretrained") as caught:
        litefocus.patch(pipe)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.raises(AttributeError):
        generate(pipe)
    litefocus.unpatch(pipe)
    pipe.language_model = mended
    assert np.array_equal(generate(pipe), expected)


def test_musicldm_fails_for_text_and_its_mend_works() -> None:
    pipe = build("MusicLDM")
    with pytest.raises(AttributeError):
        pipe("a hammer", audio_length_in_s=1.0, num_inference_steps=1)
    litefocus.patch(pipe)
    assert np.isfinite(generate(pipe)).all()  # with prompt_embeds


def test_fused_projections_crash_audioldm() -> None:
    pipe = build("AudioLDM")
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(AttributeError, match="to_qkv"):
        generate(pipe)


def test_fused_projections_of_audioldm2() -> None:
    pipe = build("AudioLDM 2")
    expected = generate(oracle_of(pipe))
    pipe.unet.fuse_qkv_projections()
    litefocus.patch(pipe, CONFIG)
    assert_same_audio(generate(pipe), expected)


def test_sequential_offload_to_the_cpu_fails(pipe: Any) -> None:
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(TypeError, match="new"):
        generate(pipe)


# --- DeepCache, which skips blocks of the UNet at some steps ---------------------------------------------------------

SWITCHES = ("enable", "patch", "disable", "unpatch")
ORDERS = [
    order
    for order in itertools.permutations(SWITCHES)
    if order.index("enable") < order.index("disable") and order.index("patch") < order.index("unpatch")
]


def deep_cache(pipe: Any) -> DeepCacheSDHelper:
    helper = DeepCacheSDHelper(pipe)
    helper.set_params(cache_interval=2)
    return helper


@functools.cache
def clip_of(cached: bool, patched: bool, seconds: float) -> np.ndarray:
    """From a new pipeline on which nothing else was done."""
    pipe = build("AudioLDM 2")
    if patched:
        litefocus.patch(pipe, CONFIG)
    if cached:
        deep_cache(pipe).enable()
    return generate(pipe, seconds, steps=2)


@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
def test_deepcache_composes_in_every_order_and_at_changing_lengths(order: tuple[str, ...]) -> None:
    clips = [clip_of(cached, patched, 2.0) for cached in (False, True) for patched in (False, True)]
    for one, other in itertools.combinations(clips, 2):
        assert not np.allclose(one, other, rtol=0, atol=1e-6)
    pipe = build("AudioLDM 2")
    helper, cached, patched = deep_cache(pipe), False, False
    for switch in order:
        if "patch" in switch:
            getattr(litefocus, switch)(pipe, *([CONFIG] if switch == "patch" else []))
            patched = switch == "patch"
        else:
            getattr(helper, switch)()
            cached = switch == "enable"
        for seconds in (1.0, 2.0):
            assert (generate(pipe, seconds, steps=2) == clip_of(cached, patched, seconds)).all(), (switch, seconds)


@pytest.mark.parametrize("cached_first", [False, True])
def test_deepcache_composes_with_prompts_over_time(cached_first: bool) -> None:
    pipe = build("AudioLDM 2")
    helper = deep_cache(pipe)
    switches = [helper.enable, lambda: litefocus.schedule_prompts(pipe, {1.0: "rain"}, fade=0.5)]
    for switch in switches if cached_first else reversed(switches):
        switch()
    both = generate(pipe, 2.0, steps=2)
    helper.disable()
    scheduled = generate(pipe, 2.0, steps=2)
    helper.enable()
    assert (generate(pipe, 2.0, steps=2) == both).all()
    litefocus.unpatch(pipe)
    assert (generate(pipe, 2.0, steps=2) == clip_of(True, False, 2.0)).all()
    assert not np.allclose(both, scheduled, rtol=0, atol=1e-6)
