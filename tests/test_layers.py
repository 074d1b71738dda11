"""Which layers are patched and which stay as they are, what is said of these, and what others do to layers since.

Expected outputs come from fresh UNets on which nothing else was done, or which had the same done to them and no patch.
"""

from __future__ import annotations

import copy
import functools
import operator
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel
from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from diffusers.hooks.layerwise_casting import apply_layerwise_casting_hook
from diffusers.loaders import IPAdapterMixin
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
)
from support.pipelines import PUBLISHED, published_unet
from support.recorder import Recorder
from support.small import (
    BOTH,
    FEW,
    FRAMES,
    Distributed,
    assert_apart,
    assert_off,
    assert_same,
    attention,
    authors_unet,
    dense,
    first_sample,
    focus,
    latent,
    leftovers,
    patch,
    run,
    same_processors,
    self_attention,
    small_unet,
    states,
    step,
    text,
    two_levels,
)
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import litefocus
from litefocus import LiteFocusAttnProcessor, LiteFocusConfig
from litefocus._layers import named_modules

MAKERS = {"diffusers": two_levels, "authors": authors_unet}
both_kinds = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
either_first = pytest.mark.parametrize("patched_first", [False, True], ids=["change first", "patch first"])


def warned(unet: Any, count: int, reason: str) -> None:
    """Patch, which warns of so many layers, once."""
    message = rf"{count} of \d+ self-attention layers stay dense and run their own code \({count}: {reason}\)"
    with pytest.warns(UserWarning, match=message) as caught:
        litefocus.patch(unet, seed=1, **FEW)
    assert len(caught) == 1
    assert caught[0].filename == __file__


# --- which layers are self-attention ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_all_self_attention_of_the_published_unets_is_found(name: str) -> None:
    unet = published_unet(name)
    found, everything = PUBLISHED[name][2:]
    litefocus.patch(unet, LiteFocusConfig.paper(), freq_bins=16)
    layers = litefocus.status(unet).layers
    assert (len(layers), len(attention(unet))) == (found, everything)
    assert {layer.name.split(".attentions")[0]: layer.freq_bins for layer in layers} == {
        "down_blocks.1": 8,
        "down_blocks.2": 4,
        "down_blocks.3": 2,
        "mid_block": 2,
        "up_blocks.0": 2,
        "up_blocks.1": 4,
        "up_blocks.2": 8,
    }
    assert {(layer.freq_bins, layer.state) for layer in layers} == {(8, "focus"), (4, "dense"), (2, "dense")}


# --- layers whose forward is another ---------------------------------------------------------------------------------


def own_attention(attn: Any, x: Tensor) -> Tensor:
    """Of normalised queries and keys: far from plain attention."""
    q, k, v = (f(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v))
    q, k = 10 * F.normalize(q, dim=-1), 10 * F.normalize(k, dim=-1)
    return attn.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def on_the_instance(attn: Any) -> None:
    def control(x: Tensor, *others: Any, **named: Any) -> Tensor:
        return own_attention(attn, x)

    attn.forward = control


def by_a_subclass(attn: Any) -> None:
    kind: Any = type(attn)

    class Normed(kind):
        def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
            return own_attention(self, x)

    attn.__class__ = Normed


REPLACED = {"its forward is replaced by control": on_the_instance, "Normed has a forward of its own": by_a_subclass}


@both_kinds
@pytest.mark.parametrize("reason", REPLACED)
def test_a_layer_with_another_forward_stays_as_it_is_and_is_named(make: Callable[[], Any], reason: str) -> None:
    unet, later = make(), make()
    first = next(iter(self_attention(unet).values()))
    REPLACED[reason](first)
    own = run(unet)
    assert_apart(own, dense(make))
    before = dict(vars(first)), type(first)
    assert {row.state for row in litefocus.status(unet).layers} == {"dense"}

    warned(unet, 1, reason)
    for _ in range(2):  # before a call and after one
        row, *others = litefocus.status(unet).layers
        assert row.state == f"dense: {reason}"
        assert {other.state for other in others} == {"focus"}
        got = run(unet)
    patch(later)
    REPLACED[reason](next(iter(self_attention(later).values())))
    assert litefocus.status(later).layers[0].state == f"not known before a call; {reason}"
    assert_same(got, run(later))
    row, *others = litefocus.status(later).layers
    assert row.state == f"not reached by the last call; {reason}"
    assert {other.state for other in others} == {"focus"}

    litefocus.unpatch(unet)
    assert (dict(vars(first)), type(first)) == before
    assert torch.equal(run(unet), own)
    with pytest.warns(UserWarning, match=rf"1 of .*1: {reason}"):  # what the last call did not reach
        patch(later, 2)
    litefocus.unpatch(later)
    assert torch.equal(run(later), own)
    with litefocus.probe(unet) as probe:
        run(unet)
    assert len(probe.layers) == len(others)
    assert f"left out, as they would stay dense: 1: {reason}" in repr(probe)


@both_kinds
def test_a_forward_replaced_on_the_class_leaves_every_layer_as_it_is(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a patch that would raise, a client's own forward would be skipped, or its layers taken for focused."""
    unet = make()
    kind = type(next(iter(self_attention(unet).values())))
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: 0.5 * original(self, *args, **kwargs))
    own = run(unet)
    assert_apart(own, dense(make))
    for function in (litefocus.patch, litefocus.probe):
        with pytest.raises(ValueError, match=rf"no self-attention layer .*: {kind.__name__} has a forward of its own"):
            function(unet)
    assert torch.equal(run(unet), own)
    assert not leftovers(unet)
    monkeypatch.undo()
    assert_same(run(unet), dense(make))
    patch(unet)
    assert_same(run(unet), focus(1, make))
    monkeypatch.setattr(kind, "forward", lambda self, x, *others, **named: torch.zeros_like(x))
    run(unet)
    found = "focus" if make is authors_unet else "not reached by the last call"
    assert states(unet) == {f"{found}; {kind.__name__} has a forward of its own"}


def own_hook(unet: Any) -> None:
    for attn in attention(unet).values():
        accelerate.hooks.add_hook_to_module(attn, accelerate.hooks.ModelHook())


def two_hooks(unet: Any) -> None:
    for _ in range(2):
        for attn in self_attention(unet).values():
            accelerate.hooks.add_hook_to_module(attn, accelerate.hooks.ModelHook(), append=True)


def offload(unet: Any) -> None:
    accelerate.cpu_offload(unet, torch.device("cpu"))


def broadcast(unet: Any) -> None:
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 0),
        spatial_attention_block_identifiers=("attentions",),
        current_timestep_callback=lambda: 3,
    )
    apply_pyramid_attention_broadcast(unet, config)


def cast(unet: Any) -> None:
    """To float64 and back, which changes no weight."""
    for attn in attention(unet).values():
        apply_layerwise_casting_hook(attn, torch.float64, torch.float32, non_blocking=False)


def broadcast_and_offload(unet: Any) -> None:
    broadcast(unet)
    offload(unet)


@either_first
@pytest.mark.parametrize("hook", [own_hook, two_hooks, offload, broadcast, cast, broadcast_and_offload])
def test_hooks_that_end_in_the_processor_focus(hook: Callable[[Any], None], patched_first: bool) -> None:
    unet = two_levels()
    for change in (patch, hook) if patched_first else (hook, patch):
        change(unet)
    hooked = ["forward" in vars(attn) for attn in self_attention(unet).values()]
    assert all(hooked) or hook is offload  # which hooks the modules that have weights: those inside
    assert states(unet) == {"focus"}
    assert_same(run(unet), focus(1, two_levels))
    assert states(unet) == {"focus"}
    litefocus.unpatch(unet)
    assert_same(run(unet), dense(two_levels))
    assert states(unet) == {"dense"}


@pytest.mark.parametrize("hook", [own_hook, cast])
def test_hooks_on_the_authors_layers_focus_if_they_came_later(hook: Callable[[Any], None]) -> None:
    unet = authors_unet()
    hook(unet)
    with pytest.raises(ValueError, match="no self-attention layer of UNetModel can be patched"):
        patch(unet)
    assert_same(run(unet), dense(authors_unet))
    unet = authors_unet()
    patch(unet)
    hook(unet)
    assert_same(run(unet), focus(1, authors_unet))
    assert states(unet) == {"focus"}
    litefocus.unpatch(unet)
    assert_same(run(unet), dense(authors_unet))  # the hooks hand on
    with pytest.raises(ValueError, match="12: its forward is replaced by forward"):
        patch(unet)
    assert_same(run(unet), dense(authors_unet))


@either_first
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler, of what it cannot trace in the code of others
def test_a_compiled_forward_focuses(patched_first: bool) -> None:
    def compile_forward(unet: Any) -> None:
        for attn in self_attention(unet).values():
            attn.forward = torch.compile(attn.forward, backend="eager")

    unet = small_unet()
    for change in (patch, compile_forward) if patched_first else (compile_forward, patch):
        change(unet)
    assert_same(run(unet), first_sample())
    assert states(unet) == {"focus"}
    litefocus.unpatch(unet)
    assert_same(run(unet), dense())


# --- layers whose processor does more than attend ---------------------------------------------------------------------


class Strength(AttnProcessor2_0):
    """Takes a keyword of its own, as processors of editing methods do."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, strength: float = 1.0, **kwargs: Any) -> Tensor:
        return strength * super().__call__(attn, hidden_states, *args, **kwargs)


class Trained(nn.Module):
    """A processor with weights of its own."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.extra = nn.Linear(width, width)

    def forward(self, attn: Any, hidden_states: Tensor, *args: Any, strength: float = 1.0, **kwargs: Any) -> Tensor:
        return AttnProcessor2_0()(attn, hidden_states, *args, **kwargs) + strength * self.extra(hidden_states)


def recorder() -> Recorder:
    return Recorder(Strength())


@pytest.mark.parametrize("make", [Strength, Trained, recorder])
def test_a_layer_whose_processor_does_more_than_attend_stays_as_it_is_and_is_named(make: Callable[[], Any]) -> None:
    unet, later = two_levels(), two_levels()
    patch(later)
    for each in (unet, later):
        next(iter(self_attention(each).values())).set_processor(make())
    plain = attention(unet)["down_blocks.0.attentions.0.transformer_blocks.0.attn2"]
    plain.set_processor(recorder())  # of cross-attention: no reason to warn
    before, modules = unet.attn_processors, set(unet.state_dict())
    own = run(unet, cross_attention_kwargs={"strength": 0.5})
    reason = f"its processor is {type(make()).__name__}"
    warned(unet, 1, reason)
    row, *others = litefocus.status(unet).layers
    assert row.state == f"dense: {reason}"
    assert {other.state for other in others} == {"focus"}
    assert set(unet.state_dict()) == modules
    assert_same(run(unet), run(later))
    assert litefocus.status(unet).layers[0].state == f"dense: {reason}"
    assert litefocus.status(later).layers[0].state == f"not reached by the last call; {reason}"
    assert unet.attn_processors[f"{row.name}.processor"] is before[f"{row.name}.processor"]
    litefocus.unpatch(unet)
    assert same_processors(before, unet)
    assert torch.equal(run(unet, cross_attention_kwargs={"strength": 0.5}), own)


def test_where_all_processors_do_more_than_attend_nothing_is_patched() -> None:
    unet = two_levels()
    unet.set_attn_processor(recorder())
    before = unet.attn_processors
    for function in (litefocus.patch, litefocus.probe):
        with pytest.raises(ValueError, match=r"no self-attention layer .* \(4: its processor is Recorder\)"):
            function(unet)
    assert same_processors(before, unet)
    assert not leftovers(unet)


@pytest.mark.parametrize(
    "processor", [AttnProcessor, AttnProcessor2_0, functools.partial(SlicedAttnProcessor, 1), FusedAttnProcessor2_0]
)
def test_plain_processors_are_patched_and_their_copies_of_the_same_name(processor: Callable[[], Any]) -> None:
    unet = small_unet()
    if processor is FusedAttnProcessor2_0:
        unet.fuse_qkv_projections()
    kind = type(processor())
    theirs = type(kind.__name__, (kind,), {"__module__": "theirs"})
    for attn in self_attention(unet).values():
        attn.processor.__class__ = theirs
    patch(unet)
    assert_same(run(unet), focus())
    litefocus.unpatch(unet)
    assert {type(attn.processor) for attn in self_attention(unet).values()} == {theirs}


# --- what is put around ours afterwards ------------------------------------------------------------------------------


class WrappingModule(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def closure(inner: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    return call


@pytest.mark.parametrize("wrapper", [Recorder, WrappingModule, closure], ids=["Recorder", "WrappingModule", "call"])
def test_a_wrapper_around_ours_stays_and_hands_on(wrapper: Callable[[Any], Any]) -> None:
    unet = two_levels()
    patch(unet, 1)
    attn = next(iter(self_attention(unet).values()))
    inside = Recorder(attn.processor)
    ours = wrapper(wrapper(inside))
    attn.set_processor(ours)
    name = {"Recorder": "Recorder", "WrappingModule": "WrappingModule"}.get(type(ours).__name__, "call")
    assert litefocus.status(unet).layers[0].state == f"not known before a call; its processor is {name}"
    assert_same(run(unet), focus(1, two_levels))
    assert litefocus.status(unet).layers[0].state == f"focus; its processor is {name}"
    patch(unet, 2)
    assert_same(run(unet), focus(2, two_levels))
    with patch(unet, 3):
        assert_same(run(unet), focus(3, two_levels))
    assert_same(run(unet), focus(2, two_levels))
    assert litefocus.status(unet).layers[0].state == f"focus; its processor is {name}"
    litefocus.unpatch(unet)
    assert_off(unet, two_levels)
    assert attn.processor is ours
    assert len(inside.calls) == 5  # every call passed the wrapper, once
    assert not leftovers(unet)


def test_what_remembers_a_processor_without_calling_it_is_not_taken_for_focus() -> None:
    """As attention controllers do, to put back later what they have overwritten."""

    class Controller(AttnProcessor2_0):
        def __init__(self, before: Any) -> None:
            self.before = before

    unet = small_unet()
    patch(unet)
    for attn in self_attention(unet).values():
        attn.set_processor(Controller(attn.processor))
    assert_same(run(unet), dense())
    assert states(unet) == {"not reached by the last call; its processor is Controller"}


# --- processors of ours, and what holds them, that come back ----------------------------------------------------------


def fuse(unet: Any) -> Callable[[], Any]:
    with torch.no_grad():
        unet.fuse_qkv_projections()
    return unet.unfuse_qkv_projections


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


BRING_BACK = [fuse, pickle_processors, save_in_a_block, move_a_block_out, move_a_layer_out]


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


@pytest.mark.parametrize("how", [lambda p: p, copy.deepcopy])
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


def test_a_layer_that_came_after_the_patch_is_named() -> None:
    unet = two_levels()
    patch(unet)
    transformer = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    transformer.attn1 = Attention(8, heads=2, dim_head=4)
    run(unet)
    assert litefocus.status(unet).layers[0].state == "dense: patch again, to include it"


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
    assert same_processors(before, unet)


@pytest.mark.parametrize("unfused", [False, True])
def test_the_projections_that_dense_attention_uses(unfused: bool) -> None:
    """Trained after fusing, the two kinds of projections differ; after unfusing, the fused ones lie idle."""
    unet, twin = small_unet(), small_unet()
    for each in (unet, twin):
        unfuse = fuse(each)
        if unfused:
            unfuse()
        for attn in self_attention(each).values():
            for name in ("to_q", "to_k", "to_v") if unfused else ("to_qkv",):
                getattr(attn, name).weight.data.mul_(1.1)
    for attn in self_attention(twin).values():  # fused weights where unfused ones are looked for
        if not unfused:
            for part, weight in zip((attn.to_q, attn.to_k, attn.to_v), attn.to_qkv.weight.chunk(3), strict=True):
                part.weight.data = weight.detach().clone()
    twin.set_attn_processor(AttnProcessor2_0())
    assert_same(run(unet), run(twin))
    patch(unet)
    patch(twin)
    assert_same(run(unet), run(twin))
    assert_apart(run(unet), focus())


# --- what makes processors anew: image adapters -----------------------------------------------------------------------


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


def test_an_image_adapter_is_loaded_and_unloaded_while_patched() -> None:
    image = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(3))
    with_image = functools.partial(run, added_cond_kwargs={"image_embeds": [image]})
    unet, adapted = two_levels(), two_levels()
    before = adapted.attn_processors
    adapted._load_ip_adapter_weights(image_adapter(adapted))  # what pipe.load_ip_adapter calls
    dense_with_image = with_image(adapted)
    patch(adapted)
    focus_with_image = with_image(adapted)
    assert_apart(focus_with_image, dense_with_image)

    patch(unet)
    with pytest.raises(KeyError):
        unet._load_ip_adapter_weights([{**image_adapter(unet)[0], "ip_adapter": {}}])
    assert_same(run(unet), focus(1, two_levels))
    unet._load_ip_adapter_weights(image_adapter(unet))
    assert_same(with_image(unet), focus_with_image)
    assert states(unet) == {"focus"}
    litefocus.unpatch(unet)
    assert_same(with_image(unet), dense_with_image)
    patch(unet)
    IPAdapterMixin.unload_ip_adapter(SimpleNamespace(unet=unet))
    assert_same(run(unet), focus(1, two_levels))
    litefocus.unpatch(unet)
    assert_off(unet, two_levels)
    assert [type(p) for p in unet.attn_processors.values()] == [type(p) for p in before.values()]
    assert not leftovers(unet)


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
    unet = two_levels()
    controlnet = ControlNetModel.from_unet(unet, conditioning_channels=3)
    before = controlnet.attn_processors
    patch(SimpleNamespace(unet=unet, controlnet=controlnet))
    assert same_processors(before, controlnet)
    made_of_patched = ControlNetModel.from_unet(unet, conditioning_channels=3)
    assert not any(isinstance(p, LiteFocusAttnProcessor) for p in made_of_patched.attn_processors.values())
    assert not leftovers(controlnet) + leftovers(made_of_patched)


# --- wrappers around the UNet's own modules: names and samples stay ---------------------------------------------------


def checkpoint_blocks(unet: Any) -> None:
    apply_activation_checkpointing(unet, check_fn=lambda module: isinstance(module, BasicTransformerBlock))


def compile_blocks(unet: Any) -> None:
    for i, block in enumerate(unet.down_blocks):
        unet.down_blocks[i] = torch.compile(block, backend="eager")


def compile_attention(unet: Any) -> None:
    for module in list(unet.modules()):
        if isinstance(module, BasicTransformerBlock):
            module.attn1 = torch.compile(module.attn1, backend="eager")


def distribute_transformers(unet: Any) -> None:
    for module in list(unet.modules()):
        if hasattr(module, "transformer_blocks"):
            for i, block in enumerate(module.transformer_blocks):
                module.transformer_blocks[i] = Distributed(Distributed(block))


@either_first
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("wrap", "make"),
    [
        (checkpoint_blocks, two_levels),
        (compile_blocks, small_unet),
        (compile_attention, small_unet),
        (distribute_transformers, two_levels),
    ],
)
def test_names_and_samples_are_free_of_wrappers(wrap: Any, make: Callable[[], Any], patched_first: bool) -> None:
    unet = make()
    names = [row.name for row in litefocus.status(unet).layers]
    for change in (patch, wrap) if patched_first else (wrap, patch):
        change(unet)
    assert [row.name for row in litefocus.status(unet).layers] == names
    assert states(unet) == {"focus"}
    assert_same(step(unet).detach(), first_sample(make))  # gradients are recorded, as in training
    litefocus.unpatch(unet)
    assert_off(unet, make)
    assert not leftovers(unet)


# --- the authors' layers, which have no processors -------------------------------------------------------------------


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


def scaled(weight: Tensor) -> Tensor:
    return weight * 1.3


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("whole", [True, False], ids=["unet", "a module that holds it"])
def test_a_replica_computes_on_its_own_weights(make: Callable[[], Any], whole: bool) -> None:
    unet, other = make(), make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(scaled(parameter))
    patch(unet)
    patch(other)
    replica = replicate(unet if whole else Distributed(unet), scaled)
    expected = run(other)
    assert_apart(expected, focus(1, make))
    torch.testing.assert_close(run(unet, call=replica), expected)
    assert_same(run(unet), focus(1, make))


@pytest.mark.parametrize("how", [copy.copy, lambda layer: replicate(layer, scaled)], ids=["copy", "replica"])
def test_a_copy_of_one_of_the_authors_layers_computes_on_its_own_weights(how: Callable[[Any], Any]) -> None:
    unet = authors_unet()
    patch(unet)
    run(unet)
    layer = next(iter(self_attention(unet).values()))
    x = torch.randn(1, FRAMES * 16, layer.to_q.in_features, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        before = layer(x)
        other = how(layer)
        other._modules = dict(other._modules)
        other._modules["to_v"] = nn.Linear(layer.to_v.in_features, layer.to_v.out_features, bias=False)
        other._modules["to_v"].weight.zero_()
        assert (other(x) - layer.to_out[0].bias * (1.3 if how is not copy.copy else 1)).abs().max() < 1e-5
        assert torch.equal(layer(x), before)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))], ids=["copy", "pickle"])
def test_copies_of_the_authors_unet_compute_on_their_own_weights(how: Callable[[Any], Any]) -> None:
    unet = authors_unet()
    patch(unet)
    other = how(unet)
    assert_same(run(other), focus(1, authors_unet))
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.zero_()
    assert not run(unet).any()
    assert_same(run(other), focus(1, authors_unet))
    assert litefocus.status(other).config.seed == 1
    litefocus.unpatch(other)
    assert_off(other, authors_unet)
    assert not leftovers(other)
    assert type(next(iter(self_attention(other).values()))) is type(next(iter(attention(authors_unet()).values())))


@both_kinds
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("order", ["shard, patch", "patch, shard", "patch, shard, patch", "shard, patch, block"])
def test_sharded_layers_are_patched_and_unpatched(make: Callable[[], Any], order: str) -> None:
    """FSDP2 derives a class of its own for a layer; whatever else is above or below it, both are undone rightly."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh("cpu", (1,))
    unet = make()
    layers = list(self_attention(unet).values())
    kind = type(layers[0])
    for change in order.split(", "):
        if change == "shard":
            for layer in layers:
                fully_shard(layer, mesh=mesh)
        elif change == "patch":
            patch(unet)
        else:
            with patch(unet, 2):
                assert_same(run(unet), focus(2, make))
    assert_same(run(unet), focus(1, make))
    assert states(unet) == {"focus"}
    litefocus.unpatch(unet)
    for layer in layers:
        assert isinstance(layer, FSDPModule)
        assert isinstance(layer, kind)
        assert not any("Focus" in base.__name__ for base in type(layer).__mro__)
    assert_same(run(unet), dense(make))
    patch(unet, 3)
    assert_same(run(unet), focus(3, make))


def test_an_empty_batch_through_a_unet() -> None:
    """Self-attention alone: diffusers' own processors fail at an empty batch."""
    unet = small_unet()
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock):
            module.attn2, module.norm2 = None, None
    patch(unet)
    assert run(unet, latent(0)).shape == (0, 4, FRAMES, 16)
    assert run(unet, latent(2)).shape == (2, 4, FRAMES, 16)


def test_the_authors_layers_hand_on_what_is_not_self_attention() -> None:
    unet = authors_unet()
    layer = next(iter(self_attention(unet).values()))
    x = torch.randn(1, FRAMES * 16, layer.to_q.in_features)
    expected = layer(x, context=text(1).repeat(1, 1, 3)[..., :32]), layer(x, None, torch.ones(1, FRAMES * 16) > 0)
    patch(unet)
    run(unet)
    assert torch.equal(layer(x, text(1).repeat(1, 1, 3)[..., :32]), expected[0])
    assert torch.equal(layer(x, mask=torch.ones(1, FRAMES * 16) > 0), expected[1])


def test_a_child_called_module_among_others_is_no_wrapper() -> None:
    block = torch.nn.ModuleDict({"module": torch.nn.Identity(), "attn": torch.nn.Identity()})
    assert [name for name, _ in named_modules(block, "block")] == ["block", "block.module", "block.attn"]
    assert [name for name, _ in named_modules(torch.nn.ModuleDict({"module": block}), "block")][1] == "block.module"
