"""Which of a layer's samples a step uses: a pure function of its timestep. The errors of the steps then average out."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from speed import captured
from support.oracle import install_oracle
from support.pipelines import build, generate, minimal_unet
from support.settings import hand_in, one_sample
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import litefocus
from litefocus import FocusSet, LiteFocusConfig, focus_attention, focus_set
from litefocus._context import Call, _hash, _thread
from litefocus._context import sample_index as draw_of
from litefocus._grid import NUM_SAMPLES as DRAWS
from litefocus._grid import Grid

CONFIG = LiteFocusConfig(min_sampled=2, sparse_ratio=0.05)  # few keys, so that two samples differ by much
BINS, FRAMES = 8, 50


def timestep_of(draw: int) -> int:
    """The first timestep that uses a sample."""
    with torch.no_grad():
        return next(t for t in range(1000) if draw_of(t) % DRAWS == draw)


def patched(config: LiteFocusConfig = CONFIG) -> UNet2DConditionModel:
    unet = minimal_unet()
    litefocus.patch(unet, config, freq_bins=BINS)
    return unet


def run(unet: nn.Module, timestep: Any, frames: int = FRAMES, batch: int = 2) -> Tensor:
    sample = torch.randn(batch, 2, frames, BINS, generator=torch.Generator().manual_seed(frames))
    return unet(sample.to(next(unet.parameters()).device), timestep, encoder_hidden_states=None).sample


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FocusSet]]:
    """The focus sets of all calls, in order."""
    sets: list[FocusSet] = []

    def spy(query: Tensor, key: Tensor, value: Tensor, focus: FocusSet) -> Tensor:
        sets.append(focus)
        return focus_attention(query, key, value, focus)

    monkeypatch.setattr("litefocus._processor.focus_attention", spy)
    return sets


# --- from the timestep to the draw ------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_draw_is_a_pure_function_of_the_timestep_however_it_is_given() -> None:
    for t in (0, 1, 7, 20, 981, 999):
        draw = draw_of(t)
        assert isinstance(draw, int)
        assert draw >= 0
        dtypes = (torch.int32, torch.int64, torch.float32, torch.float64)
        tensors = [make(t, dtype) for dtype in dtypes for make in (scalar, vector, guided)]
        for same in (t, float(t), np.float64(t), *tensors):
            assert draw_of(same) == draw, repr(same)


def scalar(t: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(t, dtype=dtype)


def vector(t: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor([t], dtype=dtype)


def guided(t: float, dtype: torch.dtype) -> Tensor:
    """Both halves of classifier-free guidance."""
    return torch.tensor([t, t], dtype=dtype)


@torch.no_grad()
def test_what_tells_no_timestep_is_the_first_sample() -> None:
    for nothing in (None, "late", float("nan"), float("inf"), torch.empty(0)):
        assert draw_of(nothing) == 0


@pytest.mark.parametrize("pipeline", ["AudioLDM", "AudioLDM 2"])
@pytest.mark.parametrize("steps", [10, 50, 200])
@torch.no_grad()
def test_regular_steps_use_every_draw(pipeline: str, steps: int) -> None:
    """As published: `steps_offset` of 1, of which the tiny pipelines have none."""
    scheduler = type(build(pipeline).scheduler).from_config({"steps_offset": 1})
    scheduler.set_timesteps(steps)
    draws = [draw_of(t) % DRAWS for t in scheduler.timesteps]
    counts = [draws.count(draw) for draw in range(DRAWS)]
    assert min(counts) >= max(1, steps // 8)
    assert max(counts) <= steps // 2


@torch.no_grad()
def test_a_draw_on_a_device_is_that_of_the_number(device: torch.device) -> None:
    """Where a timestep lies on a GPU it is not read: the same arithmetic runs there."""
    values = [0, 1, 999, 2**31, 2**32 - 1, *range(5, 10**6, 7919)]
    hashed = _hash(torch.tensor(values, device=device))
    assert isinstance(hashed, Tensor)
    assert hashed.tolist() == [_hash(value) for value in values]
    assert int(hashed.min()) >= 0
    assert int(hashed.max()) < 2**32


@torch.no_grad()
def test_steps_on_a_device_use_the_samples_of_the_cpu(device: torch.device) -> None:
    unet, moved = patched(), patched().to(device)
    outputs = []
    for draw in range(DRAWS):
        t = torch.tensor(timestep_of(draw))
        outputs.append(run(unet, t))
        there = run(moved, t.to(device))
        assert there.device.type == device.type
        torch.testing.assert_close(there.cpu(), outputs[-1])
    assert all((one - other).abs().max() > 1e-3 for i, one in enumerate(outputs) for other in outputs[:i])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.inference_mode()
def test_a_step_never_waits_for_the_gpu_and_a_captured_one_is_right_after_other_lengths() -> None:
    unet = patched().to("cuda")
    t = torch.tensor(timestep_of(0), device="cuda")
    samples = [torch.randn(2, 2, FRAMES + 8 * more, BINS, device="cuda") for more in range(6)]

    def step(i: int = 0) -> Any:
        return unet(samples[i], t, encoder_hidden_states=None)

    for i in range(6):  # builds the focus sets
        step(i)
    step()  # those of the first length were evicted
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    replay = captured(step, torch.device("cuda"))
    for draw in (1, 2, 3):
        t.fill_(timestep_of(draw))
        for other in range(1, 6):
            step(other)
        torch.testing.assert_close(replay(), step().sample)


# --- where no timestep is to be known ---------------------------------------------------------------------------------


def test_while_gradients_are_recorded_it_is_the_first() -> None:
    t = timestep_of(2)
    assert draw_of(t) == draw_of(torch.tensor(t)) == 0
    with torch.no_grad():
        assert draw_of(t) % DRAWS == 2
        with torch.enable_grad():
            assert draw_of(t) == 0
    with torch.inference_mode():
        assert draw_of(torch.tensor(t)) % DRAWS == 2


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@torch.no_grad()
def test_while_something_traces_it_is_the_first() -> None:
    t = torch.tensor([float(timestep_of(2))])
    assert draw_of(t) % DRAWS == 2

    def shifted(timestep: Tensor) -> Tensor:
        return timestep + draw_of(timestep)

    assert torch.equal(torch.compile(shifted, fullgraph=True, backend="eager")(t), t)
    assert torch.equal(torch.jit.trace(shifted, t)(t), t)
    for mode in ("real", "fake", "symbolic"):
        assert torch.equal(make_fx(shifted, tracing_mode=mode)(t)(t), t)
    assert torch.equal(torch.vmap(shifted)(t), t)


def test_gradients_of_a_checkpointed_unet_are_those_of_one_that_is_not() -> None:
    """The backward pass runs its layers again, when no step is known."""
    grads = []
    for checkpointed in (False, True):
        unet = patched()
        if checkpointed:
            unet.enable_gradient_checkpointing()
            unet.train()
        run(unet, timestep_of(3)).square().sum().backward()
        grads.append({name: p.grad for name, p in unet.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=lambda message, name=name: f"{name}: {message}")


# --- what a UNet does with it -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_layer_of_a_unet_uses_its_own_sample_of_the_step(used: list[FocusSet]) -> None:
    unet = patched()
    names = [layer.name for layer in litefocus.status(unet).layers]
    first_sample = patched()
    one_sample(first_sample)
    for draw in range(DRAWS):
        t = timestep_of(draw)
        difference = (run(first_sample, t) - run(unet, t)).abs().max()
        assert difference > 1e-3 if draw else difference == 0
        used.clear()
        run(unet, t)
        assert len(used) == len(names) == 2
        for focus, name in zip(used, names, strict=True):
            expected = focus_set(FRAMES, BINS, CONFIG, layer=name, draw=draw)
            assert torch.equal(focus.keys, expected.keys)
            assert torch.equal(focus.inverse, expected.inverse)
            assert torch.equal(focus.log_weights, expected.log_weights)


@torch.no_grad()
def test_a_step_that_comes_twice_is_the_same(used: list[FocusSet]) -> None:
    unet, t = patched(), timestep_of(2)
    first = run(unet, t)
    run(unet, timestep_of(1))
    for again in (t, float(t), torch.tensor(t), torch.tensor([t, t])):
        assert torch.equal(run(unet, again), first)
    assert torch.equal(run(unet, t, batch=1), run(unet, torch.tensor([t]), batch=1))
    with torch.inference_mode():
        assert torch.equal(run(unet, t), first)
    assert {id(focus) for focus in used[:2]} == {id(focus) for focus in used[4:6]}  # nothing is built anew
    # both halves of guidance: the same sets as each of them alone
    halves = torch.cat([run(unet, t)[:1], run(unet, t)[1:]])
    assert torch.equal(halves, first)


@torch.no_grad()
def test_the_timestep_is_found_wherever_it_stands(used: list[FocusSet]) -> None:
    unet, t = patched(), timestep_of(3)
    sample = torch.zeros(1, 2, FRAMES, BINS)
    unet(sample, t, None)
    unet(sample, timestep=t, encoder_hidden_states=None)
    unet(sample=sample, timestep=torch.tensor(t), encoder_hidden_states=None)
    first, second, *_ = used
    assert first.keys is not second.keys
    for focus, expected in zip(used, [first, second] * 3, strict=True):
        assert focus is expected
    assert torch.equal(first.keys, focus_set(FRAMES, BINS, CONFIG, layer=first_name(unet), draw=3).keys)


def first_name(unet: nn.Module) -> str:
    return litefocus.status(unet).layers[0].name


@torch.no_grad()
def test_the_published_method_never_rotates(used: list[FocusSet]) -> None:
    unet = patched(LiteFocusConfig.paper())
    for draw in range(DRAWS):
        run(unet, timestep_of(draw))
    assert len(used) == 2 * DRAWS
    assert len({id(focus) for focus in used}) == 2  # one for every layer


@torch.no_grad()
def test_outside_of_a_unets_call_it_is_the_first(used: list[FocusSet]) -> None:
    unet = patched()
    run(unet, timestep_of(2))
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    layer(torch.zeros(1, FRAMES * BINS, 8))
    assert torch.equal(used[-1].keys, focus_set(FRAMES, BINS, CONFIG, layer=first_name(unet)).keys)


@torch.no_grad()
def test_a_failing_call_leaves_no_step_behind(used: list[FocusSet]) -> None:
    unet = patched()
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    hook = layer.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(unet, timestep_of(2))
    hook.remove()
    assert layer._litefocus.context.call is None
    layer(torch.zeros(1, FRAMES * BINS, 8))
    assert torch.equal(used[-1].keys, focus_set(FRAMES, BINS, CONFIG, layer=first_name(unet)).keys)


@pytest.mark.parametrize("name", ["AudioLDM", "AudioLDM 2"])
def test_a_pipeline_is_that_of_masked_dense_attention_with_the_samples_of_its_steps(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_in(monkeypatch, min_keys_saved=1)
    config = LiteFocusConfig(min_sampled=4)
    pipe = build(name)
    oracle = copy.deepcopy(pipe)
    grids = install_oracle(oracle.unet, config)
    draws = []

    def rotate(unet: nn.Module, args: Any, kwargs: Any) -> None:
        grids.draw = draw_of(kwargs["timestep"] if "timestep" in kwargs else args[1]) % DRAWS
        draws.append(grids.draw)

    oracle.unet.register_forward_pre_hook(rotate, with_kwargs=True)
    expected = generate(oracle, 1.32, steps=4)
    assert len(set(draws)) > 1
    litefocus.patch(pipe, config)
    np.testing.assert_allclose(generate(pipe, 1.32, steps=4), expected, atol=1e-4, rtol=1e-3)
    hand_in(monkeypatch, num_samples=1)
    litefocus.patch(pipe, config)
    assert np.abs(generate(pipe, 1.32, steps=4) - expected).max() > 1e-3


def test_threads_with_other_steps_and_lengths_on_one_unet_do_not_mix() -> None:
    """Every layer waits until all threads have come to it, so that their calls interleave at each of them."""
    unet = patched()
    calls = [(timestep_of(draw), frames) for draw, frames in ((0, 50), (1, 50), (2, 40), (3, 60))]
    with torch.no_grad():
        alone = [run(unet, t, frames) for t, frames in calls]
    litefocus.patch(unet, CONFIG, freq_bins=BINS)  # anew: the threads build the focus sets
    barrier = threading.Barrier(len(calls))

    def wait(module: nn.Module, args: Any) -> None:
        barrier.wait(timeout=60)

    for module in unet.modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(wait)
    together: list[Tensor | None] = [None] * len(calls)

    def work(i: int) -> None:
        with torch.no_grad():  # of a thread of its own
            together[i] = run(unet, *calls[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, expected in zip(together, alone, strict=True):
        assert got is not None
        assert torch.equal(got, expected)


# --- the samples ------------------------------------------------------------------------------------------------------


class NoReading(TorchDispatchMode):
    """Fails where a tensor's value becomes a number of Python, for which a GPU would be waited."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", [CONFIG, LiteFocusConfig.paper()], ids=["rotates", "paper"])
def test_a_draw_that_is_a_tensor_picks_the_sample_of_the_same_number(config: LiteFocusConfig) -> None:
    grid = Grid("mid", config=config)
    for draw in (*range(2 * DRAWS), 2**32 - 1):
        expected = grid.focus_set(FRAMES, BINS, torch.device("cpu"), draw)
        with NoReading():
            picked = grid.focus_set(FRAMES, BINS, torch.device("cpu"), torch.tensor(draw))
        assert torch.equal(picked.keys, expected.keys)
        assert picked.queries is expected.queries
        assert picked.inverse is expected.inverse
        assert picked.log_weights is expected.log_weights


@torch.no_grad()
def test_a_layer_whose_draw_is_a_tensor_computes_the_same(used: list[FocusSet]) -> None:
    unet = patched()
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    states = torch.randn(2, FRAMES * BINS, 8)

    def output(draw: Any) -> Tensor:
        context = layer._litefocus.context
        _thread.calls[context] = Call((FRAMES, BINS), draw, context.grids, 1)
        try:
            return layer(states)
        finally:
            _thread.calls.clear()

    for draw in range(DRAWS):
        with NoReading():
            found = output(torch.tensor(draw))
        assert torch.equal(found, output(draw))
        assert torch.equal(used[-1].keys, focus_set(FRAMES, BINS, CONFIG, layer=first_name(unet), draw=draw).keys)
    assert (output(0) - output(1)).abs().max() > 1e-3


def test_the_mean_over_draws_is_nearer_to_dense_attention_than_any_of_them() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 4, 400 * BINS, 16, dtype=torch.float64)
    dense = F.scaled_dot_product_attention(query, key, value)
    config = LiteFocusConfig(min_sampled=16, sparse_ratio=0.04, time_window=None)
    outputs = [
        focus_attention(query, key, value, focus_set(400, BINS, config, layer="mid", draw=draw))
        for draw in range(DRAWS)
    ]
    errors = [off(output, dense) for output in outputs]
    mean = off(torch.stack(outputs).mean(dim=0), dense)
    assert mean < 0.6 * min(errors)  # independent errors: half


def off(output: Tensor, dense: Tensor) -> float:
    return float((output - dense).norm() / dense.norm())
