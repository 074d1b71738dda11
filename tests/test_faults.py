"""Whatever moves, copies, wraps, re-creates, traces or shares the parts of a patched UNet: never silently wrong.

Small UNets of the real classes; what is expected comes from fresh ones on which nothing else was done.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import operator
import pickle
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import tomesd
import torch
import torch.distributed as dist
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.loaders import IPAdapterMixin
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from support.authors import authors
from support.pipelines import build, generate, minimal_unet, sharpen
from support.settings import hand_in
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import litefocus
from litefocus import LiteFocusAttnProcessor, LiteFocusConfig

FRAMES, BINS = 24, 16
FEW = {"sparse_ratio": 0.05, "min_sampled": 2}  # so few keys that every other sample, and dense attention, is far away
APART = 1e-3  # what other samples change at least; rounding changes less than a hundredth of it


def small_unet(levels: int = 1, **overrides: Any) -> UNet2DConditionModel:
    """With cross-attention to a text, 16 bins at the input, as in Tango: 1 self-attention layer, or 4 on 2 levels."""
    settings: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    if levels == 2:
        settings |= {
            "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }
    unet = minimal_unet(**{**settings, **overrides})
    sharpen(unet)
    return unet


def attention(unet: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}


def self_attention(unet: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in attention(unet).items() if name.endswith("attn1")}


def latent(batch: int = 2, frames: int = FRAMES, bins: int = BINS) -> Tensor:
    return torch.randn(batch, 4, frames, bins, generator=torch.Generator().manual_seed(1))


def text(batch: int = 2) -> Tensor:
    return torch.randn(batch, 5, 12, generator=torch.Generator().manual_seed(2))


def step(unet: Callable[..., Any], sample: Tensor | None = None, timestep: int = 3, **conditions: Any) -> Tensor:
    sample = latent() if sample is None else sample
    output: Tensor = unet(sample, torch.tensor(timestep), text(len(sample)).to(sample.dtype), **conditions).sample
    return output


def run(unet: Callable[..., Any], sample: Tensor | None = None, timestep: int = 3, **conditions: Any) -> Tensor:
    with torch.no_grad():
        return step(unet, sample, timestep, **conditions)


def patch(unet: Any, seed: int = 1, **options: Any) -> litefocus.Patch:
    return litefocus.patch(unet, freq_bins=BINS, seed=seed, **{**FEW, **options})


@functools.cache
def dense(levels: int = 1) -> Tensor:
    return run(small_unet(levels))


@functools.cache
def focus(seed: int = 1, levels: int = 1) -> Tensor:
    """The output of a fresh UNet that was patched."""
    unet = small_unet(levels)
    patch(unet, seed)
    return run(unet)


def assert_same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=APART / 100, rtol=0)


def assert_off(unet: Any, levels: int = 1) -> None:
    """No call goes through a focus set, and `status` says so."""
    assert_same(run(unet), dense(levels))
    status = litefocus.status(unet)
    assert status.config is None
    assert not [row for row in status.layers if not row.state.startswith("dense")]


def leftovers(unet: nn.Module) -> list[str]:
    ours = [name for module in unet.modules() for name in vars(module) if "litefocus" in name]
    hooked = [repr(module) for module in unet.modules() if module._forward_hooks or module._forward_pre_hooks]
    return ours + hooked


def test_the_references_are_apart() -> None:
    for levels in (1, 2):
        outputs = [dense(levels), *(focus(seed, levels) for seed in (1, 2, 3))]
        for one, other in itertools.combinations(outputs, 2):
            assert (one - other).abs().max() > APART


# --- 1. handles that are used after their patch was taken off, or replaced


def leave(handle: litefocus.Patch) -> None:
    with handle:
        pass


def unpatch_inside(unet: nn.Module, handle: litefocus.Patch) -> None:
    with handle:
        litefocus.unpatch(unet)


def replace_and_unpatch(unet: nn.Module, handle: litefocus.Patch) -> None:
    patch(unet, 2)
    litefocus.unpatch(unet)


def replace_remove_and_unpatch(unet: nn.Module, handle: litefocus.Patch) -> None:
    patch(unet, 2).remove()
    patch(unet, 3)
    litefocus.unpatch(unet)


@pytest.mark.parametrize(
    "take_off",
    [
        lambda unet, handle: handle.remove(),
        lambda unet, handle: litefocus.unpatch(unet),
        lambda unet, handle: leave(handle),
        unpatch_inside,
        replace_and_unpatch,
        replace_remove_and_unpatch,
    ],
    ids=["remove", "unpatch", "leave", "unpatch inside", "replace, unpatch", "replace, remove, unpatch"],
)
def test_a_patch_that_was_taken_off_cannot_be_entered(take_off: Callable[..., None]) -> None:
    unet = small_unet()
    handle = patch(unet)
    take_off(unet, handle)
    with pytest.raises(RuntimeError, match="was taken off, or was entered before"), handle:
        pass
    assert_off(unet)
    assert not leftovers(unet)


def test_a_block_has_its_own_settings_and_then_those_before_are_in_force() -> None:
    unet = small_unet()
    first = patch(unet, 1)
    second = patch(unet, 2)
    with first:
        assert_same(run(unet), focus(1))
    assert_same(run(unet), focus(2))
    with patch(unet, 3):
        assert_same(run(unet), focus(3))
    assert_same(run(unet), focus(2))
    second.remove()
    assert_off(unet)


def test_a_block_of_an_old_handle_leaves_what_was_patched_meanwhile() -> None:
    unet = small_unet()
    old = patch(unet, 1)
    patch(unet, 2).remove()
    assert_off(unet)
    with old:
        assert_same(run(unet), focus(1))
    old = patch(unet, 1)
    patch(unet, 2).remove()
    patch(unet, 3)
    with old:
        assert_same(run(unet), focus(1))
    assert_same(run(unet), focus(3))
    litefocus.unpatch(unet)
    assert_off(unet)
    assert not leftovers(unet)


# --- 2. requests in threads: blocks that overlap


def interleavings(*threads: str) -> list[tuple[tuple[int, str], ...]]:
    """Every order of events, (thread, event), that keeps each thread's own order."""
    orders = []
    for order in sorted(set(itertools.permutations([i for i, events in enumerate(threads) for _ in events]))):
        left = [list(events) for events in threads]
        orders.append(tuple((i, left[i].pop(0)) for i in order))
    return orders


@pytest.mark.parametrize("threads", [("pel", "pel"), ("bl", "bl", "bl")], ids=["two", "three"])
def test_every_block_sees_its_own_or_a_newer_patch_and_the_last_exit_restores(threads: tuple[str, ...]) -> None:
    """p: patch, e: enter, l: leave; b: patch and enter."""
    unet = small_unet()
    before = unet.attn_processors
    for order in interleavings(*threads):
        handles: dict[int, Any] = {}
        newest: list[int] = []  # threads by their last patch or entry
        inside: set[int] = set()
        for thread, event in order:
            if event in "pb":
                handles[thread] = patch(unet, thread)
            if event in "eb":
                handles[thread].__enter__()
                inside.add(thread)
            if event == "l":
                handles[thread].__exit__(None, None, None)
                inside.remove(thread)
            else:
                newest = [*(other for other in newest if other != thread), thread]
            for reader in inside:
                config = litefocus.status(unet).config
                assert config is not None, order
                assert config.seed in newest[newest.index(reader) :], order
        after = unet.attn_processors
        assert all(map(operator.is_, after.values(), before.values())), order
        assert not leftovers(unet), order
    assert torch.equal(run(unet), dense())


# --- 3. processors, and what holds them, that come back


def fuse(unet: Any) -> Callable[[], Any]:
    with torch.no_grad():
        unet.fuse_qkv_projections()
    return unet.unfuse_qkv_projections


def save(unet: Any) -> Callable[[], Any]:
    saved = unet.attn_processors
    return lambda: unet.set_attn_processor(saved)


def copy_processors(unet: Any) -> Callable[[], Any]:
    saved = copy.deepcopy(unet.attn_processors)
    return lambda: unet.set_attn_processor(saved)


def pickle_processors(unet: Any) -> Callable[[], Any]:
    saved = pickle.dumps(unet.attn_processors)
    return lambda: unet.set_attn_processor(pickle.loads(saved))


def save_in_a_block(unet: Any) -> Callable[[], Any]:
    with patch(unet, 2):
        saved = unet.attn_processors
    return lambda: unet.set_attn_processor(saved)


def move_a_block_out(unet: Any) -> Callable[[], Any]:
    block = unet.down_blocks[0]
    unet.down_blocks[0] = copy.deepcopy(block)
    return lambda: operator.setitem(unet.down_blocks, 0, block)


def move_a_layer_out(unet: Any) -> Callable[[], Any]:
    transformer = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    attn, transformer.attn1 = transformer.attn1, nn.Identity()
    return lambda: setattr(transformer, "attn1", attn)


BRING_BACK = [fuse, save, copy_processors, pickle_processors, save_in_a_block, move_a_block_out, move_a_layer_out]


@pytest.mark.parametrize("take_off", ["remove", "unpatch", "leave"])
@pytest.mark.parametrize("keep", BRING_BACK)
def test_a_removed_patch_does_not_come_back(keep: Callable[[Any], Callable[[], Any]], take_off: str) -> None:
    unet = small_unet()
    handle = patch(unet)
    if take_off == "leave":
        handle.__enter__()
    bring_back = keep(unet)
    if take_off == "leave":
        handle.__exit__(None, None, None)
    elif take_off == "remove":
        handle.remove()
    else:
        litefocus.unpatch(unet)
    bring_back()
    assert_off(unet)
    patch(unet, 2)  # and does not stand in the way of another
    assert_same(run(unet), focus(2))
    litefocus.unpatch(unet)
    assert_off(unet)
    assert not any(isinstance(processor, LiteFocusAttnProcessor) for processor in unet.attn_processors.values())
    assert not leftovers(unet)


@pytest.mark.parametrize("how", [lambda p: p, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_processors_on_another_unet_are_under_its_patches_alone(how: Callable[[Any], Any]) -> None:
    unet, other = small_unet(), small_unet()
    patch(unet)
    other.set_attn_processor(how(unet.attn_processors))
    assert_off(other)
    patch(other, 2)
    assert_same(run(other), focus(2))
    assert_same(run(unet), focus(1))
    litefocus.unpatch(other)
    assert_off(other)
    assert_same(run(unet), focus(1))


def test_what_unfusing_brought_back_is_what_unpatching_leaves() -> None:
    """Patched once more while fused: the fused processor was there then, and is gone when the patch goes."""
    unet = small_unet()
    before = unet.attn_processors
    patch(unet, 1)
    unfuse = fuse(unet)
    patch(unet, 2)
    assert_same(run(unet), focus(2))
    unfuse()
    assert_same(run(unet), focus(2))
    litefocus.unpatch(unet)
    assert all(map(operator.is_, unet.attn_processors.values(), before.values()))


# --- 4. wrappers around what is installed


class Attribute:
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, attn: Attention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.inner(attn, hidden_states, *args, **kwargs)

    def method(self, attn: Attention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.inner(attn, hidden_states, *args, **kwargs)


class Slotted:
    __slots__ = ("inner",)

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    __call__ = Attribute.__call__


class SlottedToo(Slotted):
    __slots__ = ()


class Listed:
    def __init__(self, inner: Any) -> None:
        self.chain = {"all": [inner]}

    def __call__(self, attn: Attention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.chain["all"][0](attn, hidden_states, *args, **kwargs)


class WrappingModule(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, attn: Attention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.inner(attn, hidden_states, *args, **kwargs)


def closure(inner: Any) -> Any:
    def call(attn: Attention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return inner(attn, hidden_states, *args, **kwargs)

    return call


def decorated(inner: Any) -> Any:
    return functools.wraps(inner.__call__)(closure(inner))


def partial(inner: Any) -> Any:
    return functools.partial(lambda inner, *args, **kwargs: inner(*args, **kwargs), inner)


def method(inner: Any) -> Any:
    return Attribute(inner).method


def three(inner: Any) -> Any:
    return Attribute(closure(partial(inner)))


WRAPPERS = [Attribute, Slotted, SlottedToo, Listed, WrappingModule, closure, decorated, partial, method, three]


def wrap(unet: Any, wrapper: Callable[[Any], Any]) -> None:
    for attn in attention(unet).values():
        attn.set_processor(wrapper(attn.processor))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_processor_is_patched_and_unpatched_inside_of_its_wrapper(wrapper: Callable[[Any], Any]) -> None:
    unet, seen = small_unet(), []
    handle = patch(unet, 1)
    wrap(unet, lambda inner: wrapper(lambda *args, **kwargs: (seen.append(inner), inner(*args, **kwargs))[1]))
    wrap(unet, wrapper)
    assert_same(run(unet), focus(1))
    calls = len(seen)
    (row,) = litefocus.status(unet).layers
    (attn,) = self_attention(unet).values()
    assert row.state == f"focus, wrapped by {type(attn.processor).__name__}"
    handle.remove()
    assert_off(unet)
    with patch(unet, 2):
        assert_same(run(unet), focus(2))
        with patch(unet, 3):
            assert_same(run(unet), focus(3))
    assert_off(unet)
    assert len(seen) == 5 * calls  # every call still passes the wrapper, once
    assert not leftovers(unet)


def test_a_wrapper_that_was_taken_off_stays_off() -> None:
    unet = small_unet()
    patch(unet, 1)
    wrap(unet, Attribute)
    litefocus.unpatch(unet)
    handle = patch(unet, 2)
    for attn in attention(unet).values():
        attn.set_processor(attn.processor.inner)
    handle.remove()
    assert_off(unet)
    assert not any(isinstance(processor, Attribute) for processor in unet.attn_processors.values())


@pytest.mark.parametrize("options", [{}, {"min_freq_bins": 16}], ids=["focus", "dense on one level"])
def test_made_anew_inside_of_a_wrapper(options: dict[str, int]) -> None:
    """What diffusers' adapters do to a processor, and then a recorder comes."""
    unet, expected = small_unet(2), small_unet(2)
    patch(unet, 1)
    for attn in self_attention(unet).values():
        attn.set_processor(Attribute(type(attn.processor)()))
    litefocus.unpatch(unet)
    assert_off(unet, 2)
    patch(unet, 2, **options)
    patch(expected, 2, **options)
    assert_same(run(unet), run(expected))
    litefocus.unpatch(unet)
    assert_off(unet, 2)


def test_what_remembers_a_processor_without_calling_it_is_no_wrapper() -> None:
    """As attention controllers do, to put back later what they have overwritten."""

    class Controller(AttnProcessor2_0):
        def __init__(self, before: Any) -> None:
            self.before = before

    unet = small_unet()
    patch(unet, 1)
    wrap(unet, Controller)
    assert_same(run(unet), dense())
    (row,) = litefocus.status(unet).layers
    assert not row.state.startswith("focus")


# --- 5. grids that are not those of the patch


def merge_tokens(unet: Any) -> None:
    tomesd.apply_patch(unet, ratio=0.5, max_downsample=1)


def run_merged(unet: Callable[..., Any]) -> Tensor:
    torch.manual_seed(5)  # of which tokens are merged
    return run(unet)


def compiled(unet: Any) -> Any:
    return torch.compile(unet, backend="eager")


def compiled_in_place(unet: Any) -> Any:
    unet.compile(backend="eager")
    return unet


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch's compiler warns of what it cannot trace in the code of others."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("compiler", "order"),
    [
        (None, (merge_tokens, patch)),
        (None, (patch, merge_tokens)),
        (compiled, (merge_tokens, patch)),
        (compiled_in_place, (patch, merge_tokens)),
    ],
    ids=["merged first", "patched first", "compiled, merged first", "compiled in place, patched first"],
)
def test_merged_tokens_are_no_grid(
    compiler: Callable[[Any], Any] | None, order: tuple[Callable[[Any], Any], ...]
) -> None:
    """They stay dense: the output is that of merging alone."""
    unet = small_unet()
    merge_tokens(unet)
    expected = run_merged(unet)
    assert (expected - dense()).abs().max() > APART
    unet = small_unet()
    for change in order:
        change(unet)
    assert_same(run_merged(unet if compiler is None else compiler(unet)), expected)
    (row,) = litefocus.status(unet).layers
    assert row.state == f"dense: {FRAMES * BINS // 2} tokens are not its grid of {FRAMES} frames x {BINS} bins"


@pytest.mark.parametrize("merged_first", [True, False])
def test_merged_tokens_of_a_pipeline(merged_first: bool) -> None:
    """The level where tokens are merged stays dense; the others focus."""

    def generated(pipe: Any) -> Any:
        torch.manual_seed(5)
        return torch.from_numpy(generate(pipe, 2.0, steps=1))

    def merge(pipe: Any) -> None:
        tomesd.apply_patch(pipe, ratio=0.5, max_downsample=2)

    def keep_dense(pipe: Any) -> None:
        for name, attn in self_attention(pipe.unet).items():
            if "down_blocks.1." in name or "up_blocks.2." in name:
                attn.set_processor(AttnProcessor2_0())

    pipe = build("AudioLDM 2")
    sharpen(pipe.unet)
    only_merged, expected = copy.deepcopy(pipe), copy.deepcopy(pipe)
    merge(only_merged)
    merge(expected)
    litefocus.patch(expected, **FEW)
    keep_dense(expected)
    steps = [lambda: merge(pipe), lambda: litefocus.patch(pipe, **FEW)]
    for change in steps if merged_first else reversed(steps):
        change()
    audio = generated(pipe)
    torch.testing.assert_close(audio, generated(expected), atol=1e-5, rtol=0)
    assert (audio - generated(only_merged)).abs().max() > 1e-4
    states = {row.state for row in litefocus.status(pipe).layers if row.freq_bins == 8 and row.name.endswith("attn1")}
    assert states == {"dense: 100 tokens are not its grid of 25 frames x 8 bins"}
    assert {row.state for row in litefocus.status(pipe).layers if row.freq_bins == 4} == {"focus"}


GRIDS = pytest.mark.parametrize(
    ("patched_for", "sample"),
    [
        ({"freq_bins": 16}, (24, 8)),
        ({"freq_bins": 16}, (24, 64)),
        ({"freq_bins": 16}, (16, 24)),
        ({"freq_bins": 16, "freq_axis": "height"}, (24, 16)),
        ({"freq_bins": 16, "freq_axis": "height"}, (8, 64)),
    ],
)


def assert_refused(call: Callable[..., Any], patched_for: dict[str, Any], sample: tuple[int, int]) -> None:
    axis = patched_for.get("freq_axis", "width")
    bins = sample[1] if axis == "width" else sample[0]
    with pytest.raises(ValueError, match=rf"patched for 16 frequency bins on the {axis} axis, .* has {bins} there"):
        run(call, latent(1, *sample))


@GRIDS
@pytest.mark.parametrize("by_keyword", [False, True])
def test_an_input_on_another_grid_is_refused(
    patched_for: dict[str, Any], sample: tuple[int, int], by_keyword: bool
) -> None:
    unet = small_unet()
    call: Callable[..., Any] = unet
    if by_keyword:
        call = lambda x, t, states: unet(sample=x, timestep=t, encoder_hidden_states=states)  # noqa: E731
    with litefocus.patch(unet, **patched_for, **FEW):
        assert_refused(call, patched_for, sample)
    assert run(call, latent(1, *sample)).shape == (1, 4, *sample)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("compiler", "called_before"), [(compiled, True), (compiled_in_place, False)])
def test_an_input_on_another_grid_is_refused_by_a_compiled_unet(
    compiler: Callable[[Any], Any], called_before: bool
) -> None:
    unet = small_unet()
    call = compiler(unet)
    if called_before:
        assert run(call, latent(bins=8)).shape == (2, 4, FRAMES, 8)
    patch(unet)
    assert_same(run(call), run_without_rotation(1))
    assert_refused(call, {}, (FRAMES, 8))


def test_a_refused_call_changes_nothing() -> None:
    unet = small_unet()
    patch(unet)
    with pytest.raises(ValueError, match="has 8 there"):
        run(unet, latent(bins=8))
    assert_same(run(unet), focus())
    layer = Attention(query_dim=16, heads=2, dim_head=8)
    layer.set_processor(LiteFocusAttnProcessor(freq_bins=8))
    assert layer(torch.randn(1, 40 * 8, 16)).shape == (1, 320, 16)
    assert layer.processor.grid.mismatch is None


def interrupt(unet: nn.Module) -> None:
    raise KeyboardInterrupt


EARLY = pytest.mark.parametrize("end", [litefocus.unpatch, interrupt])


def run_to_its_middle(unet: Any, end: Callable[[Any], Any]) -> None:
    hook = unet.conv_in.register_forward_hook(lambda *_: end(unet))
    with contextlib.suppress(KeyboardInterrupt):
        run(unet)
    hook.remove()


@EARLY
def test_a_layer_that_is_called_after_a_call_ended_early_has_its_own_grid(end: Callable[[Any], Any]) -> None:
    unet = small_unet()
    patch(unet)
    run_to_its_middle(unet, end)
    layer = Attention(query_dim=16, heads=2, dim_head=8)
    layer.set_processor(LiteFocusAttnProcessor(freq_bins=8, config=LiteFocusConfig(**FEW)))
    alone = copy.deepcopy(layer)
    alone.set_processor(AttnProcessor2_0())
    states = torch.randn(1, 40 * 8, 16, generator=torch.Generator().manual_seed(0))
    assert (layer(states) - alone(states)).abs().max() > 1e-4
    assert layer.processor.grid.mismatch is None


@EARLY
def test_gradients_after_a_call_that_ended_early(end: Callable[[Any], Any]) -> None:
    """Checkpointed layers run once more in the backward pass: on the first sample, not on that of a call long gone."""
    unet, expected = small_unet(), small_unet()
    for each in (unet, expected):
        patch(each)
    unet.enable_gradient_checkpointing()
    run_to_its_middle(unet, end)
    patch(unet)
    assert_same_gradients(unet, expected)


def assert_same_gradients(unet: Any, expected: Any) -> None:
    for each in (unet, expected):
        each.train()
        torch.manual_seed(5)
        step(each).square().sum().backward()
    compared = 0
    for one, other in zip(unet.parameters(), expected.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-5)
            compared += bool(other.grad.any())
    assert compared > 30


@EARLY
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fresh_compiler")
def test_status_and_compiled_code_after_a_call_that_ended_early(end: Callable[[Any], Any]) -> None:
    unet, expected = small_unet(), small_unet()
    patch(unet, 1)
    run_to_its_middle(unet, end)
    patch(unet, 2)
    assert litefocus.status(unet).config.seed == 2
    with pytest.MonkeyPatch.context() as context:
        hand_in(context, num_samples=1)
        patch(expected, 2)
        focused = run(expected, latent(frames=48))
    assert_same(run(torch.compile(unet, backend="eager"), latent(frames=48)), focused)
    assert {row.state for row in litefocus.status(unet).layers} == {"focus"}


def test_a_mask_is_shown() -> None:
    unet = small_unet()
    patch(unet)
    mask = torch.ones(2, FRAMES * BINS)
    assert torch.equal(run(unet, attention_mask=mask), run(small_unet(), attention_mask=mask))
    assert {row.state for row in litefocus.status(unet).layers} == {"dense: its calls bring a mask"}
    assert_same(run(unet), focus())
    assert {row.state for row in litefocus.status(unet).layers} == {"focus"}


# --- what is handed on, or computed, where layers were changed


class Strength(AttnProcessor2_0):
    """Takes a keyword of its own, as processors of editing methods do."""

    def __call__(self, attn, hidden_states, *args, strength=1.0, **kwargs):
        return strength * super().__call__(attn, hidden_states, *args, **kwargs)


@pytest.mark.parametrize("how", [lambda unet: unet, copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))])
@pytest.mark.filterwarnings("ignore:layers that are to focus")
def test_keywords_reach_the_processor_of_a_call_that_stays_dense(how: Callable[[Any], Any]) -> None:
    def run_with(unet: Any) -> Tensor:
        return run(unet, cross_attention_kwargs={"strength": 0.5})

    unet = small_unet()
    unet.set_attn_processor(Strength())
    expected = run_with(unet)
    assert (expected - run(unet)).abs().max() > APART
    before = unet.attn_processors
    patch(unet, sparse_ratio=1.0, time_window=None)
    patched = how(unet)
    assert torch.equal(run_with(patched), expected)
    litefocus.unpatch(patched)
    assert torch.equal(run_with(patched), expected)
    litefocus.unpatch(unet)
    assert all(map(operator.is_, unet.attn_processors.values(), before.values()))


@pytest.mark.parametrize("unfused", [False, True])
def test_the_projections_that_dense_attention_uses(unfused: bool) -> None:
    """Trained after fusing, the two kinds of projections differ; after unfusing, the fused ones lie idle."""

    def change(unet: Any) -> None:
        for attn in self_attention(unet).values():
            for name in ("to_q", "to_k", "to_v") if unfused else ("to_qkv",):
                getattr(attn, name).weight.data.mul_(1.1)

    unet, twin = small_unet(), small_unet()
    for each in (unet, twin):
        unfuse = fuse(each)
        if unfused:
            unfuse()
        change(each)
    for attn in self_attention(twin).values():  # fused weights where unfused ones are looked for
        if not unfused:
            for part, weight in zip((attn.to_q, attn.to_k, attn.to_v), attn.to_qkv.weight.chunk(3), strict=True):
                part.weight.data = weight.detach().clone()
    twin.set_attn_processor(AttnProcessor2_0())
    assert_same(run(unet), run(twin))
    patch(unet)
    patch(twin)
    assert_same(run(unet), run(twin))
    assert (run(unet) - focus()).abs().max() > APART


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
    assert_off(other)


# --- 6. what makes processors anew: image adapters


def image_adapter(unet: Any) -> list[dict[str, Any]]:
    """An IP adapter of random weights, as its file holds it."""
    torch.manual_seed(7)
    cross = [attn for name, attn in attention(unet).items() if name.endswith("attn2")]
    adapter = {
        f"{2 * i + 1}.to_{kind}_ip.weight": torch.randn(attn.to_k.out_features, 12)
        for i, attn in enumerate(cross)
        for kind in "kv"
    }
    projection = {
        "proj.weight": torch.randn(48, 6),
        "proj.bias": torch.zeros(48),
        "norm.weight": torch.ones(12),
        "norm.bias": torch.zeros(12),
    }
    return [{"image_proj": projection, "ip_adapter": adapter}]


def run_with_image(unet: Any) -> Tensor:
    image = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(3))
    return run(unet, added_cond_kwargs={"image_embeds": [image]})


def load_adapter(unet: Any) -> None:
    unet._load_ip_adapter_weights(image_adapter(unet))  # what pipe.load_ip_adapter calls


def unload_adapter(unet: Any) -> None:
    IPAdapterMixin.unload_ip_adapter(SimpleNamespace(unet=unet))


def test_an_image_adapter_is_loaded_and_unloaded_while_patched() -> None:
    adapted = small_unet(2)
    before = adapted.attn_processors
    load_adapter(adapted)
    dense_with_image = run_with_image(adapted)
    patch(adapted)
    focus_with_image = run_with_image(adapted)
    assert (focus_with_image - dense_with_image).abs().max() > APART

    unet = small_unet(2)
    patch(unet)
    load_adapter(unet)
    assert_same(run_with_image(unet), focus_with_image)
    assert {row.state for row in litefocus.status(unet).layers} == {"focus"}
    litefocus.unpatch(unet)
    assert_same(run_with_image(unet), dense_with_image)
    patch(unet)
    unload_adapter(unet)
    assert_same(run(unet), focus(1, 2))
    litefocus.unpatch(unet)
    assert_off(unet, 2)
    assert [type(p) for p in unet.attn_processors.values()] == [type(p) for p in before.values()]
    assert not leftovers(unet)


def test_an_adapter_that_fails_to_load_leaves_the_patch() -> None:
    unet = small_unet()
    patch(unet)
    with pytest.raises(KeyError):
        unet._load_ip_adapter_weights([{"image_proj": image_adapter(unet)[0]["image_proj"], "ip_adapter": {}}])
    assert_same(run(unet), focus())


# --- 7. processors that are modules, with weights


class Trained(nn.Module):
    """A processor with a weight, two buffers of which one is not saved, dropout, and a state of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.extra = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("passing", torch.ones(1), persistent=False)

    def forward(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states=None, attention_mask=None, temb=None
    ) -> Tensor:
        output = AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return output + self.dropout(self.extra(hidden_states)) * self.scale * self.passing


def trained_unet() -> UNet2DConditionModel:
    unet = small_unet(2)
    for attn in self_attention(unet).values():
        attn.set_processor(Trained(attn.to_q.in_features))
    return unet.eval()


over_trained = pytest.mark.filterwarnings("ignore:layers that are to focus go through Trained")
ON_ONE_LEVEL = {"min_freq_bins": 16}  # the level of 8 bins goes through its own processors, patched or not


@over_trained
def test_weights_of_processors_stay_where_they_are() -> None:
    unet = trained_unet()
    before = {name: id(value) for name, value in unet.state_dict(keep_vars=True).items()}
    parameters = {name: id(value) for name, value in unet.named_parameters()}
    modes = {name: module.training for name, module in unet.named_modules()}
    expected, originals = run(unet), unet.attn_processors
    with patch(unet, **ON_ONE_LEVEL):
        assert {name: id(value) for name, value in unet.state_dict(keep_vars=True).items()} == before
        assert {name: id(value) for name, value in unet.named_parameters()} == parameters
        assert {name: module.training for name, module in unet.named_modules()} == modes
        trained_unet().load_state_dict(unet.state_dict())
        unet.load_state_dict(trained_unet().state_dict())
        assert not torch.equal(run(unet), expected)
    assert torch.equal(run(unet), expected)
    assert all(map(operator.is_, unet.attn_processors.values(), originals.values()))


@over_trained
def test_weights_of_processors_move_and_change_mode_with_the_unet() -> None:
    unet = trained_unet()
    originals = [attn.processor for attn in self_attention(unet).values()]
    with patch(unet, **ON_ONE_LEVEL):
        unet.to(torch.float64).train().requires_grad_(False)
        for original in originals:
            assert original.extra.weight.dtype == original.scale.dtype == original.passing.dtype == torch.float64
            assert original.training
            assert original.dropout.training
            assert not original.extra.weight.requires_grad
        with pytest.raises(AssertionError):
            assert_same(run(unet, latent().double()), run(unet, latent().double()))  # dropout
        unet.eval()
        assert not any(original.training or original.dropout.training for original in originals)
        assert run(unet, latent().double()).dtype == torch.float64


@over_trained
@pytest.mark.parametrize("how", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))], ids=["copy", "pickle"])
def test_weights_of_processors_are_copied_with_the_unet(how: Callable[[Any], Any]) -> None:
    unet = trained_unet()
    plain = run(unet)
    handle = patch(unet, **ON_ONE_LEVEL)
    patched, other = run(unet), how(unet)
    with torch.no_grad():
        for attn in self_attention(unet).values():
            attn.processor.extra.weight.zero_()
            attn.processor.extra.bias.zero_()
    assert torch.equal(run(other), patched)
    assert not torch.equal(run(unet), patched)
    litefocus.unpatch(other)
    assert torch.equal(run(other), plain)
    assert {type(attn.processor) for attn in self_attention(other).values()} == {Trained}
    handle.remove()
    assert_same(run(unet), dense(2))


@over_trained
def test_weights_of_processors_are_trained() -> None:
    """A step of gradient descent through a patched UNet changes the weights of the processors that it still goes by."""
    unet = trained_unet()
    patch(unet, **ON_ONE_LEVEL)
    originals = {attn.to_q.in_features: attn.processor.original for attn in self_attention(unet).values()}
    before = {width: original.extra.weight.clone() for width, original in originals.items()}
    optimizer = torch.optim.SGD(unet.parameters(), lr=1.0)
    step(unet).square().sum().backward()
    optimizer.step()
    changed = {width: not torch.equal(original.extra.weight, before[width]) for width, original in originals.items()}
    assert changed == {8: False, 16: True}
    litefocus.unpatch(unet)
    assert {id(attn.processor) for attn in self_attention(unet).values()} >= {id(p) for p in originals.values()}


# --- 8. wrappers around the UNet's own modules: names and samples stay


def checkpoint_blocks(unet: Any) -> None:
    apply_activation_checkpointing(unet, check_fn=lambda module: isinstance(module, BasicTransformerBlock))


def checkpoint_attention(unet: Any) -> None:
    apply_activation_checkpointing(unet, check_fn=lambda module: isinstance(module, Attention))


def compile_blocks(unet: Any) -> None:
    for i, block in enumerate(unet.down_blocks):
        unet.down_blocks[i] = torch.compile(block, backend="eager")


def compile_attention(unet: Any) -> None:
    for module in list(unet.modules()):
        if isinstance(module, BasicTransformerBlock):
            module.attn1 = torch.compile(module.attn1, backend="eager")


class Distributed(nn.Module):
    """What DistributedDataParallel looks like."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def distribute_blocks(unet: Any) -> None:
    for i, block in enumerate(unet.up_blocks):
        unet.up_blocks[i] = Distributed(block)
        for name in ("resnets", "has_cross_attention", "upsamplers"):  # what the UNet asks its blocks
            if hasattr(block, name):
                object.__setattr__(unet.up_blocks[i], name, getattr(block, name))


def distribute_transformers(unet: Any) -> None:
    for module in list(unet.modules()):
        if hasattr(module, "transformer_blocks"):
            for i, block in enumerate(module.transformer_blocks):
                module.transformer_blocks[i] = Distributed(Distributed(block))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("wrap_modules", "patched_first"),
    [
        (checkpoint_blocks, True),
        (checkpoint_blocks, False),
        (checkpoint_attention, True),
        (checkpoint_attention, False),
        (compile_blocks, False),
        (compile_attention, True),
        (distribute_blocks, True),
        (distribute_blocks, False),
        (distribute_transformers, True),
        (distribute_transformers, False),
    ],
)
def test_names_and_samples_are_free_of_wrappers(wrap_modules: Callable[[Any], None], patched_first: bool) -> None:
    unet = small_unet(2)
    names = [row.name for row in litefocus.status(unet).layers]
    without_rotation = run_without_rotation(2)
    if patched_first:
        patch(unet)
    wrap_modules(unet)
    if not patched_first:
        patch(unet)
    assert [row.name for row in litefocus.status(unet).layers] == names
    assert {row.state for row in litefocus.status(unet).layers} == {"focus"}
    assert_same(step(unet).detach(), without_rotation)  # gradients are recorded, as in training
    litefocus.unpatch(unet)
    assert_off(unet, 2)
    assert not leftovers(unet)


@functools.cache
def run_without_rotation(levels: int) -> Tensor:
    """The first sample of every layer at a timestep that has another: counted at one that has it."""
    with pytest.MonkeyPatch.context() as context:
        hand_in(context, num_samples=1)
        unet = small_unet(levels)
        patch(unet)
        return run(unet)


def test_where_gradients_are_recorded_the_first_sample_serves() -> None:
    unet = small_unet(2)
    patch(unet)
    assert (run(unet) - run_without_rotation(2)).abs().max() > APART
    assert_same(step(unet).detach(), run_without_rotation(2))


@pytest.mark.parametrize(
    "checkpoint", [checkpoint_blocks, checkpoint_attention, lambda unet: unet.enable_gradient_checkpointing()]
)
def test_checkpointed_gradients_are_those_without(checkpoint: Callable[[Any], None]) -> None:
    expected, unet = small_unet(2), small_unet(2)
    checkpoint(unet)
    for each in (expected, unet):
        patch(each)
    assert_same_gradients(unet, expected)


def test_checkpointed_gradients_of_merged_tokens() -> None:
    """Run again in the backward pass, outside of the UNet's call, merged tokens are no grid either."""
    expected, unet = small_unet(), small_unet()
    for each in (expected, unet):
        merge_tokens(each)
        each.enable_gradient_checkpointing()
    patch(unet)
    assert_same_gradients(unet, expected)


# --- 9. the authors' layers, which have no processors


def authors_unet() -> Any:
    torch.manual_seed(0)
    unet = authors("audioldm2", "latent_diffusion.modules.diffusionmodules.openaimodel").UNetModel(
        image_size=64,
        in_channels=4,
        out_channels=4,
        model_channels=32,
        attention_resolutions=[1],
        num_res_blocks=1,
        channel_mult=[1],
        num_head_channels=8,
        use_spatial_transformer=True,
        context_dim=[12],
    )
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return unet.eval()


def run_authors(unet: Any) -> Tensor:
    with torch.no_grad():
        conditions = {"context_list": [text()], "context_attn_mask_list": [torch.ones(2, 5)]}
        return unet(latent(), timesteps=torch.tensor([3, 3]), **conditions)


def replicate(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Any:
    """What `torch.nn.parallel.replicate` makes for another device: modules that share all but their weights."""
    replicas = {each: each._replicate_for_data_parallel() for each in module.modules()}
    for each, replica in replicas.items():
        for name, child in each._modules.items():
            replica._modules[name] = None if child is None else replicas[child]
        replica._parameters = {
            name: None if parameter is None else change(parameter.detach())
            for name, parameter in each._parameters.items()
        }
    return replicas[module]


class Holder(nn.Module):
    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.unet(*args, **kwargs)


def scaled(weight: Tensor) -> Tensor:
    return weight * 1.3


@pytest.mark.parametrize("whole", [True, False], ids=["unet", "a module that holds it"])
def test_a_replica_of_the_authors_unet_computes_on_its_own_weights(whole: bool) -> None:
    unet, other = authors_unet(), authors_unet()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(scaled(parameter))
    for each in (unet, other):
        litefocus.patch(each, freq_bins=BINS, **FEW)
    before, expected = run_authors(unet), run_authors(other)
    replica = replicate(unet if whole else Holder(unet), scaled)
    torch.testing.assert_close(run_authors(replica), expected)
    assert (expected - before).abs().max() > APART
    assert torch.equal(run_authors(unet), before)


@pytest.mark.parametrize("how", [copy.copy, lambda layer: replicate(layer, scaled)], ids=["copy", "replica"])
def test_a_copy_of_one_of_the_authors_layers_computes_on_its_own_weights(how: Callable[[Any], Any]) -> None:
    unet = authors_unet()
    litefocus.patch(unet, freq_bins=BINS, **FEW)
    layer = next(module for module in unet.modules() if type(module).__name__ == "CrossAttention")
    states = torch.randn(1, FRAMES * BINS, layer.to_q.in_features, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        before = layer(states)
        other = how(layer)
        other._modules = dict(other._modules)
        other._modules["to_v"] = nn.Linear(layer.to_v.in_features, layer.to_v.out_features, bias=False)
        other._modules["to_v"].weight.zero_()
        assert (other(states) - layer.to_out[0].bias * (1.3 if how is not copy.copy else 1)).abs().max() < 1e-5
        assert torch.equal(layer(states), before)


def test_copies_of_the_authors_unet_compute_on_their_own_weights() -> None:
    unet = authors_unet()
    plain = run_authors(unet)
    litefocus.patch(unet, freq_bins=BINS, **FEW)
    patched = run_authors(unet)
    for other in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert not run_authors(other).any()
        assert torch.equal(run_authors(unet), patched)
    litefocus.unpatch(unet)
    assert torch.equal(run_authors(unet), plain)
    assert not leftovers(unet)


# --- 10. a Tango object whose model is wrapped


class TangoModel(nn.Module):
    """Of the shape of Tango's AudioDiffusion."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = small_unet()

    def prepare_latents(self, batch: int, scheduler: Any, channels: int, dtype: Any, device: Any) -> Tensor:
        return torch.zeros(batch, channels, 256, 16)

    def inference(self) -> int:
        scheduler = SimpleNamespace(init_noise_sigma=1.0)
        return self.prepare_latents(1, scheduler, 8, torch.float32, "cpu").shape[2]

    def forward(self) -> int:
        return self.inference()


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("restore", [lambda tango: litefocus.set_duration(tango, None), litefocus.unpatch])
@pytest.mark.parametrize("wrapped_first", [True, False])
@pytest.mark.parametrize("wrapper", [compiled, in_place, Distributed, lambda model: compiled(Distributed(model))])
def test_the_length_of_a_wrapped_tango_is_taken_back(
    wrapper: Callable[[Any], Any], wrapped_first: bool, restore: Callable[[Any], None]
) -> None:
    model = TangoModel()
    tango = SimpleNamespace(model=wrapper(model) if wrapped_first else model)
    litefocus.set_duration(tango, 80)
    tango.model = tango.model if wrapped_first else wrapper(model)
    assert model.inference() == tango.model() == 2000
    litefocus.set_duration(tango, 20)
    assert model.inference() == tango.model() == 500
    restore(tango)
    assert model.inference() == tango.model() == 256
    assert "prepare_latents" not in vars(model)
    assert "prepare_latents" not in vars(tango.model)


# --- 11. what is still shown keeps no weights alive


def made_by_patch(unet: Any) -> Any:
    handle = patch(unet)
    run(unet)
    return handle


def made_by_patch_and_left(unet: Any) -> Any:
    with patch(unet) as handle:
        run(unet)
    return handle


def made_by_unpatch(unet: Any) -> Any:
    handle = patch(unet)
    litefocus.unpatch(unet)
    return handle


def made_by_patching_again(unet: Any) -> Any:
    return [patch(unet, 1), patch(unet, 2)]


def made_by_status(unet: Any) -> Any:
    patch(unet)
    return litefocus.status(unet)


def made_by_probe(unet: Any) -> Any:
    with litefocus.probe(unet, freq_bins=BINS) as probe:
        run(unet)
    return probe


def made_by_an_unused_probe(unet: Any) -> Any:
    return litefocus.probe(unet, freq_bins=BINS)


@over_trained
@pytest.mark.parametrize(
    "make",
    [
        made_by_patch,
        made_by_patch_and_left,
        made_by_unpatch,
        made_by_patching_again,
        made_by_status,
        made_by_probe,
        made_by_an_unused_probe,
    ],
)
@pytest.mark.parametrize("maker", [small_unet, trained_unet, authors_unet])
def test_what_is_shown_keeps_no_weights_alive(maker: Callable[[], Any], make: Callable[[Any], Any]) -> None:
    if maker is authors_unet:
        make = {made_by_patch: patch, made_by_status: made_by_status}.get(make, made_by_unpatch)
    unet = maker()
    alive = [weakref.ref(parameter) for parameter in unet.parameters()]
    kept = make(unet)
    shown = repr(kept)
    del unet
    gc.collect()
    assert not [ref for ref in alive if ref() is not None]
    assert repr(kept) == shown or "gone" in repr(kept)
    getattr(kept, "_repr_html_", lambda: None)()


# --- 12. probe and patch have the same rules


BOTH = pytest.mark.parametrize("function", [litefocus.patch, litefocus.probe])


@BOTH
def test_both_refuse_an_axis_that_contradicts_the_pipeline(function: Callable[..., Any]) -> None:
    pipe = build("AudioLDM")
    with pytest.raises(ValueError, match="freq_axis='height' contradicts AudioLDMPipeline"):
        function(pipe, freq_axis="height")
    assert not leftovers(pipe.unet)


@BOTH
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "freq_bins cannot be read from UNet2DConditionModel"),
        ({"freq_bins": 0}, ValueError, "at least 1, got 0"),
        ({"freq_bins": 16.0}, TypeError, "freq_bins must be an integer"),
        ({"freq_bins": 16, "freq_axis": "widht"}, ValueError, "Did you mean 'width'"),
        ({"freq_bins": 16, "config": {"seed": 1}}, TypeError, "config must be a LiteFocusConfig, got dict"),
        ({"freq_bins": 16, "sparse_ration": 1}, TypeError, "Did you mean 'sparse_ratio'"),
    ],
)
def test_both_refuse_the_same(
    function: Callable[..., Any], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    unet = small_unet()
    with pytest.raises(error, match=message):
        function(unet, **arguments)
    assert not leftovers(unet)


@BOTH
@pytest.mark.parametrize(("freq_axis", "has"), [("width", 8), ("height", 24)])
def test_both_refuse_another_grid_in_their_own_words(function: Callable[..., Any], freq_axis: Any, has: int) -> None:
    unet = small_unet()
    done = {"patch": "patched", "probe": "probed"}[function.__name__]
    with (
        pytest.raises(ValueError, match=f"this UNet was {done} for 16 frequency bins .* has {has} there"),
        function(unet, freq_bins=16, freq_axis=freq_axis),
    ):
        run(unet, latent(bins=8))
    assert not leftovers(unet)
    assert torch.equal(run(unet), dense())


def test_nothing_is_patched_in_a_block_that_measures() -> None:
    unet = small_unet()
    old = patch(unet, 1)
    patch(unet, 2).remove()
    with litefocus.probe(unet, freq_bins=BINS) as probe:
        run(unet)
        with pytest.raises(ValueError, match=r"litefocus.probe is measuring"):
            patch(unet)
        with pytest.raises(ValueError, match=r"litefocus.probe is measuring"), old:
            pass
        assert torch.equal(run(unet), dense())
    assert probe.layers[0].calls == 2
    assert not leftovers(unet)


def test_one_block_measures_at_a_time() -> None:
    unet = small_unet()
    first = litefocus.probe(unet, freq_bins=BINS)
    with first:
        for probe in (first, litefocus.probe(unet, freq_bins=BINS)):
            with pytest.raises(RuntimeError, match="a probe is measuring this UNet already"), probe:
                pass
        run(unet)
    with first:
        run(unet)
    assert first.layers[0].calls == 2
    assert not leftovers(unet)


def test_what_is_patched_is_not_measured() -> None:
    unet = small_unet()
    probe = litefocus.probe(unet, freq_bins=BINS)
    handle = patch(unet)
    with pytest.raises(ValueError, match=r"litefocus.unpatch\(pipe\) first"):
        litefocus.probe(unet, freq_bins=BINS)
    with pytest.raises(RuntimeError, match=r"litefocus.unpatch\(pipe\) first"), probe:
        pass
    handle.remove()
    with probe:
        run(unet)
    assert probe.layers[0].calls == 1


def test_a_copy_made_in_a_block_that_measures_is_free() -> None:
    unet = small_unet()
    with litefocus.probe(unet, freq_bins=BINS) as probe:
        other = copy.deepcopy(unet)
        run(other)
        run(unet)
    assert probe.layers[0].calls == 1
    patch(other)
    assert_same(run(other), focus())
    litefocus.unpatch(other)
    assert_off(other)


# --- 13. UNets that are wrapped for distributed training


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def distributed(unet: Any) -> Any:
    return nn.parallel.DistributedDataParallel(unet)


def parallel(unet: Any) -> Any:
    return nn.DataParallel(unet)


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


def averaged(unet: Any) -> Any:
    return torch.optim.swa_utils.AveragedModel(unet)


@pytest.mark.filterwarnings("ignore")  # FSDP of one process shards nothing
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    "wrapper",
    [
        distributed,
        parallel,
        fully_sharded,
        fully_sharded_2,
        checkpointed,
        averaged,
        lambda unet: distributed(checkpointed(unet)),
    ],
    ids=["DDP", "DataParallel", "FSDP", "FSDP2", "checkpoint", "average", "DDP of checkpoint"],
)
def test_a_wrapped_unet_is_patched_like_another(wrapper: Callable[[Any], Any]) -> None:
    unet = small_unet()
    names = [row.name for row in litefocus.status(unet).layers]
    patch(unet, 2)
    wrapped = wrapper(unet)
    assert litefocus.status(wrapped).config.seed == 2
    patch(wrapped)
    pipe = SimpleNamespace(unet=wrapped)
    for shown in (wrapped, pipe):
        assert [row.name for row in litefocus.status(shown).layers] == names
        assert {row.state for row in litefocus.status(shown).layers} == {"focus"}
    got = step(wrapped).detach()
    assert_same(got, run_without_rotation(1))
    litefocus.unpatch(pipe)
    assert litefocus.status(wrapped).config is None
    assert_same(step(wrapped).detach(), dense())


def test_an_adapted_unet_has_one_set_of_patches() -> None:
    """peft's models pass on the attributes of what they wrap."""
    from peft import LoraConfig, get_peft_model

    unet = small_unet()
    adapted = get_peft_model(unet, LoraConfig(r=2, target_modules=["to_q"]))
    for one, other in ((adapted, unet), (unet, adapted)):
        patch(one)
        assert_same(run(adapted), focus())
        assert_same(run(unet), focus())
        assert litefocus.status(other).layers[0].state == "focus"
        litefocus.unpatch(other)
        assert_off(one)
        assert_off(other)
        assert run(one, latent(bins=8)).shape[3] == 8


# --- 14. what diffusers refuses, and what stands beside the UNet


def test_the_default_processors_are_refused_and_the_patch_stays() -> None:
    unet = small_unet()
    patch(unet)
    with pytest.raises(ValueError, match="Cannot call `set_default_attn_processor`"):
        unet.set_default_attn_processor()
    assert_same(run(unet), focus())
    litefocus.unpatch(unet)
    unet.set_default_attn_processor()
    assert_off(unet)


def test_a_controlnet_beside_the_unet_is_left_alone() -> None:
    unet = small_unet(2)
    torch.manual_seed(1)
    controlnet = ControlNetModel.from_unet(unet, conditioning_channels=3)
    pipe = SimpleNamespace(unet=unet, controlnet=controlnet)
    before = controlnet.attn_processors
    patch(pipe)
    assert all(map(operator.is_, controlnet.attn_processors.values(), before.values()))
    assert not leftovers(controlnet)
    made_of_patched = ControlNetModel.from_unet(unet, conditioning_channels=3)
    assert not any(isinstance(p, LiteFocusAttnProcessor) for p in made_of_patched.attn_processors.values())
    assert not leftovers(made_of_patched)


# --- 15. odd arguments


@pytest.mark.parametrize(
    "function",
    [
        lambda config: litefocus.patch(small_unet(), config, freq_bins=16),
        lambda config: litefocus.probe(small_unet(), config, freq_bins=16),
        lambda config: litefocus.focus_set(8, 8, config),
        lambda config: LiteFocusAttnProcessor(freq_bins=8, config=config),
    ],
    ids=["patch", "probe", "focus_set", "processor"],
)
@pytest.mark.parametrize("config", [{"seed": 1}, LiteFocusConfig, "paper", 0.1])
def test_a_config_of_another_type_is_refused(function: Callable[[Any], Any], config: Any) -> None:
    message = rf"config must be a LiteFocusConfig, got {type(config).__name__}; pass LiteFocusConfig\(\.\.\.\)"
    with pytest.raises(TypeError, match=message):
        function(config)


def test_an_empty_batch() -> None:
    layer = Attention(query_dim=16, heads=2, dim_head=8)
    layer.set_processor(LiteFocusAttnProcessor(freq_bins=8, config=LiteFocusConfig(**FEW)))
    empty = torch.zeros(0, 40 * 8, 16, requires_grad=True)
    output = layer(empty)
    assert output.shape == (0, 320, 16)
    output.sum().backward()
    assert empty.grad.shape == empty.shape
    q = torch.zeros(0, 2, 320, 8)
    assert litefocus.focus_attention(q, q, q, litefocus.focus_set(40, 8)).shape == (0, 2, 320, 8)


def test_an_empty_batch_through_a_unet() -> None:
    """Self-attention alone: diffusers' own processors fail at an empty batch."""
    unet = small_unet()
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock):
            module.attn2, module.norm2 = None, None
    patch(unet)
    assert run(unet, latent(0)).shape == (0, 4, FRAMES, BINS)
    assert run(unet, latent(2)).shape == (2, 4, FRAMES, BINS)


@pytest.mark.parametrize(
    "how", [pickle.dumps, copy.copy, copy.deepcopy, lambda handle: copy.deepcopy({"kept": [handle]})]
)
@pytest.mark.parametrize("taken_off", [False, True])
def test_a_handle_is_not_copied(how: Callable[[Any], Any], taken_off: bool) -> None:
    unet = small_unet()
    handle = patch(unet)
    if taken_off:
        handle.remove()
    with pytest.raises(TypeError, match=r"the handle of a patch .* cannot be pickled"):
        how(handle)
    status = pickle.loads(pickle.dumps(litefocus.status(unet)))
    assert repr(status) == repr(litefocus.status(unet))
    other = pickle.loads(pickle.dumps(unet))
    assert_same(run(other), dense() if taken_off else focus())
