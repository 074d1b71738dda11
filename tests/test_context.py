"""What a call of a UNet tells its layers, whoever calls it: the grid of the latent, and the sample of the step."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tomesd
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from speed import captured
from support.memory import NoReading
from support.pipelines import build, minimal_unet
from support.small import (
    APART,
    BINS,
    BOTH,
    FRAMES,
    assert_apart,
    assert_same,
    assert_same_gradients,
    attention,
    authors_unet,
    compiled,
    compiled_in_place,
    dense,
    first_sample,
    focus,
    latent,
    leftovers,
    patch,
    run,
    self_attention,
    small_unet,
    states,
    step,
    text,
    two_levels,
)
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import litefocus
from litefocus import FocusSet, LiteFocusAttnProcessor, LiteFocusConfig, focus_attention, focus_set
from litefocus._context import Call, _hash, _thread, timestep_hash
from litefocus._grid import NUM_SAMPLES

CONFIG = LiteFocusConfig(min_sampled=2, sparse_ratio=0.05)  # few keys, so that two samples differ by much
SHORT = 50  # frames of the smallest UNet, at 8 bins
both_kinds = pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)


def timestep_of(sample: int) -> int:
    """The first timestep that uses a sample."""
    with torch.no_grad():
        return next(t for t in range(1000) if timestep_hash(t) % NUM_SAMPLES == sample)


def patched(config: LiteFocusConfig = CONFIG) -> Any:
    unet = minimal_unet()
    litefocus.patch(unet, config)
    return unet


def call(unet: nn.Module, timestep: Any, frames: int = SHORT, batch: int = 2) -> Tensor:
    sample = torch.randn(batch, 2, frames, 8, generator=torch.Generator().manual_seed(frames))
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


# --- from the timestep to the sample ---------------------------------------------------------------------------------


@torch.no_grad()
def test_a_sample_is_a_pure_function_of_the_timestep_however_it_is_given() -> None:
    for t in (0, 1, 7, 20, 981, 999):
        sample = timestep_hash(t)
        assert isinstance(sample, int)
        assert sample >= 0
        dtypes = (torch.int32, torch.int64, torch.float32, torch.float64)
        tensors = [torch.tensor(shape, dtype=dtype) for dtype in dtypes for shape in (t, [t], [t, t])]
        for same in (t, float(t), np.float64(t), *tensors):
            assert timestep_hash(same) == sample, repr(same)
    for nothing in (None, "late", float("nan"), float("inf"), torch.empty(0)):
        assert timestep_hash(nothing) == 0


@pytest.mark.parametrize("steps", [10, 50, 200])
@torch.no_grad()
def test_regular_steps_use_every_sample(steps: int) -> None:
    """As published: `steps_offset` of 1, of which the tiny pipelines have none."""
    scheduler = type(build("AudioLDM").scheduler).from_config({"steps_offset": 1})
    scheduler.set_timesteps(steps)
    samples = [timestep_hash(t) % NUM_SAMPLES for t in scheduler.timesteps]
    counts = [samples.count(sample) for sample in range(NUM_SAMPLES)]
    assert min(counts) >= max(1, steps // 8)
    assert max(counts) <= steps // 2


@torch.no_grad()
def test_a_sample_on_a_device_is_that_of_the_number(device: torch.device) -> None:
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
    for sample in range(NUM_SAMPLES):
        t = torch.tensor(timestep_of(sample))
        outputs.append(call(unet, t))
        there = call(moved, t.to(device))
        assert there.device.type == device.type
        torch.testing.assert_close(there.cpu(), outputs[-1])
    assert all((one - other).abs().max() > APART for i, one in enumerate(outputs) for other in outputs[:i])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.inference_mode()
def test_a_step_never_waits_for_the_gpu_and_a_captured_one_is_right_after_other_lengths() -> None:
    unet = patched().to("cuda")
    t = torch.tensor(timestep_of(0), device="cuda")
    samples = [torch.randn(2, 2, SHORT + 8 * more, 8, device="cuda") for more in range(6)]

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
    for sample in (1, 2, 3):
        t.fill_(timestep_of(sample))
        for other in range(1, 6):
            step(other)
        torch.testing.assert_close(replay(), step().sample)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_where_gradients_are_recorded_or_an_exporter_traces_it_is_the_first() -> None:
    t = timestep_of(2)
    assert timestep_hash(t) == timestep_hash(torch.tensor(t)) == 0
    with torch.inference_mode():
        assert timestep_hash(torch.tensor(t)) % NUM_SAMPLES == 2
    with torch.no_grad():
        assert timestep_hash(t) % NUM_SAMPLES == 2
        with torch.enable_grad():
            assert timestep_hash(t) == 0

    def shifted(timestep: Tensor) -> Tensor:
        return timestep + timestep_hash(timestep)

    t = torch.tensor([float(t)])
    with torch.no_grad():
        compiled_shift = torch.compile(shifted, fullgraph=True, backend="eager")  # which has it in the graph
        assert torch.equal(compiled_shift(t), shifted(t))
        assert torch.equal(torch.jit.trace(shifted, t)(t), t)
        for mode in ("real", "fake", "symbolic"):
            assert torch.equal(make_fx(shifted, tracing_mode=mode)(t)(t), t)
        assert torch.equal(torch.vmap(shifted)(t), t)


# --- the sample of a step, in every layer ----------------------------------------------------------------------------


def expected_set(unet: nn.Module, layer: int, sample: int = 0) -> FocusSet:
    return focus_set(SHORT, 8, CONFIG, layer=litefocus.status(unet).layers[layer].name, sample=sample)


@torch.no_grad()
def test_every_layer_of_a_unet_uses_its_own_sample_of_the_step(used: list[FocusSet]) -> None:
    unet = patched()
    for sample in range(NUM_SAMPLES):
        used.clear()
        call(unet, timestep_of(sample))
        for i, focused in enumerate(used):
            expected = expected_set(unet, i, sample)
            assert torch.equal(focused.keys, expected.keys)
            assert torch.equal(focused.inverse, expected.inverse)
            assert torch.equal(focused.log_weights, expected.log_weights)
        assert len(used) == 2


@torch.no_grad()
def test_the_authors_timestep_is_read_from_its_embedding(used: list[FocusSet]) -> None:
    unet = authors_unet()
    patch(unet)
    for t in (0, 1, 3, 7, 481, 999):
        used.clear()
        run(unet, timestep=t)
        sample = timestep_hash(t) % NUM_SAMPLES
        expected = focus_set(
            FRAMES, BINS, litefocus.status(unet).config, layer=litefocus.status(unet).layers[0].name, sample=sample
        )
        assert torch.equal(used[0].keys, expected.keys), t


@torch.no_grad()
def test_a_step_that_comes_twice_is_the_same(used: list[FocusSet]) -> None:
    unet, t = patched(), timestep_of(2)
    first = call(unet, t)
    call(unet, timestep_of(1))
    for again in (t, float(t), torch.tensor(t), torch.tensor([t, t])):
        assert torch.equal(call(unet, again), first)
    assert torch.equal(call(unet, t, batch=1), call(unet, torch.tensor([t]), batch=1))
    with torch.inference_mode():
        assert torch.equal(call(unet, t), first)
    assert {id(each) for each in used[:2]} == {id(each) for each in used[4:6]}  # nothing is built anew


@torch.no_grad()
def test_the_timestep_is_found_wherever_it_stands(used: list[FocusSet]) -> None:
    unet, t = patched(), timestep_of(3)
    sample = torch.zeros(1, 2, SHORT, 8)
    unet(sample, t, None)
    unet(sample, timestep=t, encoder_hidden_states=None)
    unet(sample=sample, timestep=torch.tensor(t), encoder_hidden_states=None)
    unet.forward(sample, t, None)
    assert len({id(each) for each in used}) == 2
    for i, each in enumerate(used):
        assert torch.equal(each.keys, expected_set(unet, i % 2, 3).keys)


@torch.no_grad()
def test_the_papers_settings_change_the_sample_too_as_the_published_code_does(used: list[FocusSet]) -> None:
    unet = patched(LiteFocusConfig.paper())
    for sample in range(NUM_SAMPLES):
        call(unet, timestep_of(sample))
    assert len(used) == 2 * NUM_SAMPLES
    for layer in (0, 1):
        assert len({tuple(each.keys.flatten().tolist()) for each in used[layer::2]}) == NUM_SAMPLES


@torch.no_grad()
@pytest.mark.parametrize("fails", [False, True])
def test_outside_of_a_unets_call_it_is_the_first(used: list[FocusSet], fails: bool) -> None:
    unet = patched()
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    hook = layer.register_forward_hook(lambda *_: 1 / 0) if fails else None
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        call(unet, timestep_of(2))
    if hook is not None:
        hook.remove()
    assert layer._litefocus.context.call is None
    layer(torch.zeros(1, SHORT * 8, 8))
    assert torch.equal(used[-1].keys, expected_set(unet, 0).keys)


@pytest.mark.parametrize("timestep", [249.99999999999997, 332.9999999999999, 0.3, -7.5, 999])
def test_numbers_and_tensors_of_every_precision_have_one_hash(timestep: float) -> None:
    """Single precision is all that GPUs and compiled code agree on."""
    with torch.no_grad():
        hashes = [timestep_hash(t) for t in (timestep, torch.tensor(timestep), torch.tensor([timestep]).double())]
    assert len(set(hashes)) == 1


@torch.no_grad()
def test_a_layer_whose_sample_is_a_tensor_computes_the_same(used: list[FocusSet]) -> None:
    unet = patched()
    layer = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    states = torch.randn(2, SHORT * 8, 8)

    def output(sample: Any) -> Tensor:
        context = layer._litefocus.context
        _thread.calls[context] = Call((SHORT, 8), sample, context.grids, 1)
        try:
            return layer(states)
        finally:
            _thread.calls.clear()

    for sample in range(NUM_SAMPLES):
        with NoReading():
            found = output(torch.tensor(sample))
        assert torch.equal(found, output(sample))
        assert torch.equal(used[-1].keys, expected_set(unet, 0, sample).keys)
    assert_apart(output(0), output(1))


def test_threads_with_other_steps_and_lengths_on_one_unet_do_not_mix() -> None:
    """Every layer waits until all threads have come to it, so that their calls interleave at each of them."""
    unet = patched()
    calls = [(timestep_of(sample), frames) for sample, frames in ((0, 50), (1, 50), (2, 40), (3, 60))]
    with torch.no_grad():
        alone = [call(unet, t, frames) for t, frames in calls]
    litefocus.patch(unet, CONFIG)  # anew: the threads build the focus sets
    barrier = threading.Barrier(len(calls))

    def wait(module: nn.Module, args: Any) -> None:
        barrier.wait(timeout=60)

    for module in attention(unet).values():
        module.register_forward_pre_hook(wait)

    @torch.no_grad()  # of a thread of its own
    def work(arguments: Any) -> Tensor:
        return call(unet, *arguments)

    with ThreadPoolExecutor(len(calls)) as workers:
        together = list(workers.map(work, calls))
    assert all(map(torch.equal, together, alone))


# --- whoever calls the UNet ------------------------------------------------------------------------------------------


def walk(unet: Any, sample: Tensor, timestep: Tensor, states: Tensor) -> Any:
    """A client's own way through diffusers' blocks, as AudioEditingCode's `unet_forward`."""
    embedding = unet.time_embedding(unet.time_proj(timestep.expand(len(sample))).to(sample.dtype))
    sample = unet.conv_in(sample)
    residuals = [sample]
    for block in unet.down_blocks:
        others = {"encoder_hidden_states": states} if hasattr(block, "attentions") else {}
        sample, outputs = block(hidden_states=sample, temb=embedding, **others)
        residuals += outputs
    if unet.mid_block is not None:
        sample = unet.mid_block(sample, embedding, encoder_hidden_states=states)
    for block in unet.up_blocks:
        count = len(block.resnets)
        residuals, here = residuals[:-count], tuple(residuals[-count:])
        others = {"encoder_hidden_states": states} if hasattr(block, "attentions") else {}
        sample = block(hidden_states=sample, temb=embedding, res_hidden_states_tuple=here, **others)
    return SimpleNamespace(sample=unet.conv_out(unet.conv_act(unet.conv_norm_out(sample))))


def walk_authors(unet: Any, x: Tensor, timesteps: Tensor, context_list: Any, context_attn_mask_list: Any) -> Tensor:
    """The same through the authors' blocks."""
    half = unet.model_channels // 2
    angles = timesteps[:, None] * torch.exp(-np.log(10000) * torch.arange(half) / half)
    embedding = unet.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1))
    conditions, outputs = (embedding, context_list, context_attn_mask_list), []
    for block in unet.input_blocks:
        x = block(x, *conditions)
        outputs.append(x)
    x = unet.middle_block(x, *conditions)
    for block in unet.output_blocks:
        x = block(torch.cat([x, outputs.pop()], dim=1), *conditions)
    return unet.out(x)


def called(unet: Any) -> Callable[..., Any]:
    return unet


def forward(unet: Any) -> Callable[..., Any]:
    return unet.forward


def walked(unet: Any) -> Callable[..., Any]:
    return functools.partial(walk_authors if hasattr(unet, "input_blocks") else walk, unet)


CLIENTS = {"call": called, "forward": forward, "walk": walked}


@pytest.mark.parametrize("make", [two_levels, authors_unet])
@pytest.mark.parametrize("bins", [{}, {"freq_bins": None}], ids=["freq_bins", "none given"])
def test_every_client_gets_the_same_at_every_length_in_every_order(make: Callable[[], Any], bins: Any) -> None:
    unet, other_frames = make(), latent(frames=40)
    patch(unet, **bins)
    longer = run(unet, other_frames)
    shown = [row.freq_bins for row in litefocus.status(unet).layers]
    assert shown == ([16, 8, 16, 16] if make is two_levels else [16] * 12)
    litefocus.unpatch(unet)
    patch(unet, **bins)
    for first in CLIENTS.values():
        for second in CLIENTS.values():
            assert_same(run(unet, call=first(unet)), focus(1, make))
            assert_same(run(unet, other_frames, call=second(unet)), longer)
            assert states(unet) == {"focus"}
    for client in CLIENTS.values():
        for timestep in (3, 4, 5):
            assert_same(run(unet, timestep=timestep, call=client(unet)), run(unet, timestep=timestep))
    litefocus.unpatch(unet)
    assert_same(run(unet, call=walked(unet)), dense(make))
    assert not leftovers(unet)


GRIDS = pytest.mark.parametrize(
    ("patched_for", "sample"),
    [
        ({"freq_bins": 16}, (24, 8)),
        ({"freq_bins": 16}, (16, 24)),
        ({"freq_bins": 16, "freq_axis": "height"}, (24, 16)),
        ({"freq_bins": 16, "freq_axis": "height"}, (8, 64)),
    ],
)


@GRIDS
@pytest.mark.parametrize("client", CLIENTS.values(), ids=CLIENTS)
@both_kinds
def test_an_input_on_another_grid_is_refused(
    patched_for: dict[str, Any], sample: tuple[int, int], client: Any, make: Callable[[], Any]
) -> None:
    unet = make()
    axis = patched_for.get("freq_axis", "width")
    bins = sample[1] if axis == "width" else sample[0]
    with patch(unet, **patched_for):
        with pytest.raises(ValueError, match=rf"patched for 16 frequency bins on the {axis} axis, .* has {bins} there"):
            run(unet, latent(1, *sample), call=client(unet))
        if axis == "width":
            assert_same(run(unet), focus(1, make))  # a refused call changes nothing
    assert run(unet, latent(1, *sample), call=client(unet)).shape == (1, 4, *sample)


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it cannot trace in the code of others
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("compiler", "called_before"), [(compiled, True), (compiled_in_place, False)])
def test_an_input_on_another_grid_is_refused_by_a_compiled_unet(compiler: Any, called_before: bool) -> None:
    unet = small_unet()
    call = compiler(unet)
    if called_before:
        assert run(call, latent(bins=8)).shape == (2, 4, FRAMES, 8)
    patch(unet)
    assert_same(run(call), focus())
    with pytest.raises(ValueError, match=r"patched for 16 frequency bins .* has 8 there"):
        run(call, latent(1, bins=8))


def test_a_shallow_copy_is_patched_like_another() -> None:
    unet = small_unet()
    patch(unet)
    other = copy.copy(unet)
    litefocus.unpatch(unet)
    patch(other)
    with pytest.raises(ValueError, match="has 8 there"):
        run(other, latent(bins=8))
    assert_same(run(other), focus())
    litefocus.unpatch(other)
    assert_same(run(other), dense())


# --- calls whose tokens are no grid ----------------------------------------------------------------------------------


def merge_tokens(unet: Any) -> None:
    tomesd.apply_patch(unet, ratio=0.5, max_downsample=1)


def run_merged(unet: Callable[..., Any]) -> Tensor:
    torch.manual_seed(5)  # of which tokens are merged
    return run(unet)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("compiler", "order"),
    [
        (called, (merge_tokens, patch)),
        (called, (patch, merge_tokens)),
        (compiled, (merge_tokens, patch)),
        (compiled_in_place, (patch, merge_tokens)),
    ],
    ids=["merged first", "patched first", "compiled, merged first", "compiled in place, patched first"],
)
def test_merged_tokens_are_no_grid(compiler: Callable[[Any], Any], order: tuple[Callable[[Any], Any], ...]) -> None:
    """They stay dense: the output is that of merging alone."""
    unet = small_unet()
    merge_tokens(unet)
    expected = run_merged(unet)
    assert_apart(expected, dense())
    unet = small_unet()
    for change in order:
        change(unet)
    assert_same(run_merged(compiler(unet)), expected)
    assert states(unet) == {f"dense: {FRAMES * BINS // 2} tokens are not its grid of {FRAMES} frames x {BINS} bins"}


def test_where_tokens_are_merged_on_one_level_the_other_focuses() -> None:
    unet, only_merged, expected = two_levels(), two_levels(), two_levels()
    for each in (unet, only_merged, expected):
        merge_tokens(each)
        if each is not only_merged:
            patch(each)
    merged = [attn for name, attn in self_attention(expected).items() if "mid_block" not in name]
    for attn in merged:
        attn.set_processor(AttnProcessor2_0())
    assert_same(run_merged(unet), run_merged(expected))
    assert_apart(run_merged(unet), run_merged(only_merged))
    assert [row.state.split(":")[0] for row in litefocus.status(unet).layers] == ["dense", "focus", "dense", "dense"]


def test_a_mask_is_shown() -> None:
    unet = small_unet()
    patch(unet)
    mask = torch.ones(2, FRAMES * BINS)
    assert torch.equal(run(unet, attention_mask=mask), run(small_unet(), attention_mask=mask))
    assert states(unet) == {"dense: its calls bring a mask"}
    assert_same(run(unet), focus())
    assert states(unet) == {"focus"}


# --- calls that end early --------------------------------------------------------------------------------------------


def interrupt(unet: nn.Module) -> None:
    raise KeyboardInterrupt


def run_to_its_middle(unet: Any, end: Callable[[Any], Any], client: Callable[[Any], Any]) -> None:
    hook = unet.conv_in.register_forward_hook(lambda *_: end(unet))
    with contextlib.suppress(KeyboardInterrupt):
        run(unet, latent(frames=40), call=client(unet))
    hook.remove()


EARLY = pytest.mark.parametrize("end", [litefocus.unpatch, interrupt])
any_client = pytest.mark.parametrize("client", CLIENTS.values(), ids=CLIENTS)


@EARLY
@any_client
def test_a_call_that_ended_early_leaves_nothing_behind(end: Callable[[Any], Any], client: Callable[[Any], Any]) -> None:
    """Checkpointed layers run once more in the backward pass: on the first sample, not on that of a call long gone."""
    unet, expected = small_unet(), small_unet()
    patch(unet)
    run_to_its_middle(unet, end, client)
    layer = Attention(query_dim=16, heads=2, dim_head=8)
    layer.set_processor(LiteFocusAttnProcessor(freq_bins=8, config=CONFIG))  # and of nobody else
    states = torch.randn(1, 40 * 8, 16, generator=torch.Generator().manual_seed(0))
    assert (layer(states) - AttnProcessor2_0()(layer, states)).abs().max() > 1e-4
    patch(unet)
    assert_same(run(unet), focus())
    patch(expected)
    unet.enable_gradient_checkpointing()
    run_to_its_middle(unet, end, client)
    patch(unet)
    assert_same_gradients(unet, expected)


@EARLY
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fresh_compiler")
def test_status_and_compiled_code_after_a_call_that_ended_early(end: Callable[[Any], Any]) -> None:
    unet = small_unet()
    patch(unet, 2)
    run_to_its_middle(unet, end, called)
    patch(unet)
    assert litefocus.status(unet).config.seed == 1
    assert_same(run(torch.compile(unet, backend="eager")), focus())
    assert states(unet) == {"focus"}


# --- gradients -------------------------------------------------------------------------------------------------------


@both_kinds
def test_where_gradients_are_recorded_the_first_sample_serves(make: Callable[[], Any]) -> None:
    unet = make()
    patch(unet)
    assert_apart(run(unet), first_sample(make))
    assert_same(step(unet).detach(), first_sample(make))
    assert_same(run(unet, latent().requires_grad_()), first_sample(make))
    assert_same(run(unet), focus(1, make))


@both_kinds
@pytest.mark.parametrize("reentrant", [False, True])  # reentrant: the forward pass runs where gradients are off
def test_a_recomputed_step_has_the_gradients_of_the_loss_that_was_computed(
    make: Callable[[], Any], reentrant: bool
) -> None:
    """Noise optimisation: two steps of a sampling loop, each of which is computed again in the backward pass."""
    unet = make()
    dtype = torch.float32 if make is authors_unet else torch.float64  # the authors' code embeds timesteps in float32
    patch(unet.to(dtype))

    def loss_and_gradient(call: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        x = start = latent(1).to(dtype).requires_grad_()
        for timestep in (timestep_of(1), timestep_of(2)):
            x = call(lambda z, t=timestep: z - 0.9 * step(unet, z, t), x)
        loss = x.square().sum()
        loss.backward()
        return loss.detach(), start.grad

    recomputed = loss_and_gradient(functools.partial(checkpoint, use_reentrant=reentrant))
    torch.testing.assert_close(recomputed, loss_and_gradient(lambda function, x: function(x)))


def test_checkpointed_gradients_are_those_without() -> None:
    """Layers run again in the backward pass, outside of the UNet's call."""
    expected, unet = two_levels(), two_levels()
    patch(expected)
    patch(unet)
    unet.enable_gradient_checkpointing()
    assert_same_gradients(unet, expected)


def test_checkpointed_gradients_of_merged_tokens() -> None:
    """Which are no grid in the backward pass either."""
    expected, unet = small_unet(), small_unet()
    for each in (expected, unet):
        merge_tokens(each)
        each.enable_gradient_checkpointing()
    patch(unet)
    assert_same_gradients(unet, expected)


def test_any_input_that_needs_gradients_keeps_to_the_first_sample() -> None:
    """A conditioning too, wherever it stands."""
    unet = small_unet()
    patch(unet)
    with torch.no_grad():
        output = unet(latent(), torch.tensor(3), text().requires_grad_()).sample
    assert_same(output, first_sample())
    assert_same(run(unet), focus())
    assert_same(run(unet, latent().requires_grad_(), call=unet.forward), first_sample())  # past the UNet's own hooks
