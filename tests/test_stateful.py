"""Sequences of everything that patches, unpatches, wraps, overwrites or copies, against a model of the rules.

`Places` says which patch counts, `On` what stands on a layer: by the docstrings of `patch`, `unpatch` and `Patch`.
"""

from __future__ import annotations

import copy
import itertools
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, SlicedAttnProcessor
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from support import small
from support.pipelines import minimal_unet, sharpen
from support.recorder import Recorder
from support.small import attention, leftovers, same_processors
from support.tango import Tango, tango_unet
from torch import Tensor, nn

import litefocus
from litefocus import LiteFocusAttnProcessor, LiteFocusConfig

BINS = 8
FEW = {"sparse_ratio": 0.1, "min_sampled": 2}  # so few keys that two samples differ by much
CONFIGS = (
    LiteFocusConfig(seed=0, **FEW),
    LiteFocusConfig(seed=1, **FEW),
    LiteFocusConfig.paper(seed=2),
    LiteFocusConfig(seed=3, sparse_ratio=0.0),
)
# a timestep of which patched UNets draw the sample that compiled blocks have at every step
TIMESTEP = 4
COPIES = 2  # UNets that are watched at once


def tiny_unet() -> UNet2DConditionModel:
    """One level of 8 bins with two self-attention layers: a call takes milliseconds."""
    unet = minimal_unet(transformer_layers_per_block=2, cross_attention_dim=12, attention_head_dim=2, norm_num_groups=4)
    sharpen(unet)
    return unet


def inputs(bins: int = BINS) -> tuple[Tensor, int, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(1, 2, 16, bins, generator=draw), TIMESTEP, torch.randn(1, 3, 12, generator=draw)


def run(unet: Callable[..., Any], bins: int = BINS) -> Tensor:
    with torch.no_grad():
        output: Tensor = unet(*inputs(bins)).sample
    return output


def self_attention(unet: nn.Module) -> list[Attention]:
    return list(small.self_attention(unet).values())


@cache
def reference(config: LiteFocusConfig | None, focusing: tuple[bool, ...]) -> Tensor:
    """The output of a fresh UNet on which these layers focus and all others are dense."""
    unet = tiny_unet()
    if config is not None:
        litefocus.patch(unet, config, freq_bins=BINS)
    for attn, focuses in zip(self_attention(unet), focusing, strict=True):
        if not focuses:
            attn.set_processor(AttnProcessor2_0())
    return run(unet)


DENSE = (False, False)


def test_the_references_differ() -> None:
    """Otherwise nothing below would tell one state from another."""
    outputs = [reference(None, DENSE)]
    outputs += [reference(config, focusing) for config in CONFIGS for focusing in ((True, True), (True, False))]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert (one - other).abs().max() > 20 * TOLERANCE


TOLERANCE = 1e-5  # other kinds of dense attention, and compiled code, round in another way


# --- the model: which patch counts, and what stands on a layer


@dataclass(eq=False)
class Made:
    """A patch, or a schedule, that was made."""

    config: Any  # its settings, or the number of a schedule
    handle: Any
    entered: bool = False
    over: bool = False


class Places:
    """Patches in place, the newest last, which is in force."""

    def __init__(self) -> None:
        self.places: list[Made] = []

    def put(self, made: Made) -> None:
        self.places = [*(old for old in self.places if old is not made), made]

    def enter(self, made: Made) -> None:
        self.put(made)
        made.entered = True

    def remove(self, made: Made) -> None:
        """One that a block has entered goes with all that came after it, up to the next block."""
        made.over = True
        if made in self.places:
            first = self.places.index(made)
            others = self.places[first + 1 :]
            while made.entered and others and not others[0].entered:
                others.pop(0)
            self.places[first:] = others


@dataclass
class On:
    """What stands on a layer: so many recorders around one of ours or not, which stands for the plain processor `tag`.

    patched: by a patch in place, which replaced the plain processor `replaced`. anew: ours was made anew by others, and
    knows no other than that.
    """

    tag: Any = "original"
    recorders: int = 0
    ours: bool = False
    anew: bool = False
    patched: bool = False
    replaced: Any = None

    def install(self) -> None:
        if not self.recorders:
            self.ours = self.patched = True
            self.replaced = self.tag

    def uninstall(self) -> None:
        self.patched = False
        if not self.recorders:
            self.ours = self.anew = False


class World:
    """A UNet, and what the model knows of it."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet
        self.places = Places()
        self.layers = [On(), On()]
        self.made: list[Made] = []
        self.blocks: list[Made] = []  # entered and not left, in any order
        self.saved: tuple[dict[str, Any], list[On]] | None = None
        self.fused: list[On] | None = None
        self.compiled = False

    def copy(self, how: Callable[[Any], Any]) -> World:
        """Another UNet with the same patches in place; no handle and no block of the first concerns it."""
        world = copy.deepcopy({name: value for name, value in vars(self).items() if name in ("layers", "fused")})
        twin = World(how(self.unet))
        twin.layers, twin.fused, twin.compiled = world["layers"], world["fused"], self.compiled
        twin.places.places = [Made(made.config, None, made.entered) for made in self.places.places]
        return twin

    def put_back(self, before: list[On]) -> None:
        """Others have put back processors that they had kept."""
        for layer, old in zip(self.layers, before, strict=True):
            layer.tag, layer.recorders, layer.ours, layer.anew = old.tag, old.recorders, old.ours, old.anew

    def remove(self, made: Made) -> None:
        was_in_place = made in self.places.places
        self.places.remove(made)
        if was_in_place and not self.places.places:
            self.uninstall()

    def uninstall(self) -> None:
        for layer in self.layers:
            layer.uninstall()

    def check(self) -> None:
        config = self.places.places[-1].config if self.places.places else None
        focusing = tuple(config is not None and layer.patched and layer.ours for layer in self.layers)
        if any(layer.anew and layer.ours and not layer.patched for layer in self.layers):
            with pytest.raises(ValueError, match="has no freq_bins, and its layer is not patched"):
                run(self.unet)
            return
        output = run(self.unet)
        assert (output - reference(config if any(focusing) else None, focusing)).abs().max() < TOLERANCE
        status = litefocus.status(self.unet)
        assert status.config == config
        for row, layer, attn in zip(status.layers, self.layers, self_attention(self.unet), strict=True):
            assert row.state == expected_state(layer, config is not None, attn), row.name
            assert layer.anew or plain_at_the_bottom(attn.processor, layer) == layer.tag
        if config is None:
            assert not leftovers(self.unet)
            if not self.compiled and all(layer.tag == "original" and not layer.recorders for layer in self.layers):
                assert torch.equal(output, reference(None, DENSE))


def expected_state(layer: On, is_patched: bool, attn: Attention) -> str:
    kind = type(attn.processor).__name__
    wrapped = "; its processor is Recorder" if layer.recorders else ""
    if not is_patched:
        return "dense"
    if not layer.patched:
        return "dense: its processor is Recorder" if layer.recorders else "dense: patch again, to include it"
    if layer.ours:
        return f"focus{wrapped}"
    return f"not reached by the last call{wrapped}" if layer.recorders else f"overwritten by {kind}"


def plain_at_the_bottom(processor: Any, layer: On) -> Any:
    """The tag of the plain processor below all others."""
    for _ in range(layer.recorders):
        processor = processor.inner
    assert isinstance(processor, LiteFocusAttnProcessor) == layer.ours
    return getattr(processor.original if layer.ours else processor, "tag", None)


LAYERS = st.sampled_from([[0], [1], [0, 1]])
ANY = st.integers(0, 99)


class Sequences(RuleBasedStateMachine):
    """Rules draw an integer and take it modulo what there is: examples stay valid while they are shrunk."""

    @initialize()
    def begin(self) -> None:
        unet = tiny_unet()
        for attn in attention(unet).values():
            attn.processor.tag = "original"
        self.originals = [attn.processor for attn in attention(unet).values()]
        self.worlds = [World(unet)]
        self.first = self.worlds[0]
        self.tags = 0

    def world(self, which: int) -> World:
        return self.worlds[which % len(self.worlds)]

    # --- patches

    @rule(which=ANY, config=st.integers(0, len(CONFIGS) - 1))
    def patch(self, which: int, config: int) -> None:
        world = self.world(which)
        if all(layer.recorders and not (layer.patched and layer.ours) for layer in world.layers):
            with pytest.raises(ValueError, match="its processor is Recorder"):
                litefocus.patch(world.unet, CONFIGS[config])
            return
        made = Made(CONFIGS[config], litefocus.patch(world.unet, CONFIGS[config]))
        world.places.put(made)
        world.made.append(made)
        for layer in world.layers:
            layer.install()

    @rule(which=ANY)
    def unpatch(self, which: int) -> None:
        world = self.world(which)
        litefocus.unpatch(world.unet)
        world.places.places = []
        for made in world.made:
            made.over = True
        world.uninstall()

    @rule(which=ANY, handle=ANY)
    def enter(self, which: int, handle: int) -> None:
        world = self.world(which)
        if not world.made:
            return
        made = world.made[-1 - handle % min(len(world.made), 4)]
        if made.over or made.entered:
            with pytest.raises(RuntimeError, match="was taken off, or was entered before"):
                made.handle.__enter__()
            return
        made.handle.__enter__()
        world.places.enter(made)
        world.blocks.append(made)
        for layer in world.layers:
            layer.install()

    @rule(which=ANY, block=ANY)
    def leave(self, which: int, block: int) -> None:
        """In any order, as threads do."""
        world = self.world(which)
        if world.blocks:
            made = world.blocks.pop(block % len(world.blocks))
            made.handle.__exit__(None, None, None)
            world.remove(made)

    @rule(which=ANY, handle=ANY)
    def remove(self, which: int, handle: int) -> None:
        world = self.world(which)
        if world.made:
            made = world.made[-1 - handle % min(len(world.made), 4)]
            made.handle.remove()
            world.remove(made)

    # --- what others do

    @rule(which=ANY, layers=LAYERS, off=st.booleans())
    def wrap(self, which: int, layers: list[int], off: bool) -> None:
        world = self.world(which)
        for i in layers:
            attn, layer = self_attention(world.unet)[i], world.layers[i]
            if off and layer.recorders:
                attn.set_processor(attn.processor.inner)
                layer.recorders -= 1
            elif not off and layer.recorders < 2:
                attn.set_processor(Recorder(attn.processor))
                layer.recorders += 1

    @rule(which=ANY, layers=LAYERS, sliced=st.booleans())
    def overwrite(self, which: int, layers: list[int], sliced: bool) -> None:
        world = self.world(which)
        for i in layers:
            layer = world.layers[i]
            self.tags += 1
            processor = SlicedAttnProcessor(1) if sliced else AttnProcessor2_0()
            processor.tag = self.tags
            self_attention(world.unet)[i].set_processor(processor)
            world.layers[i] = On(self.tags, patched=layer.patched, replaced=layer.replaced)

    @rule(which=ANY)
    def fuse_or_unfuse(self, which: int) -> None:
        world = self.world(which)
        with torch.no_grad():
            if world.fused is None:
                world.fused = copy.deepcopy(world.layers)
                world.unet.fuse_qkv_projections()
                for i, layer in enumerate(world.layers):
                    world.layers[i] = On(None, patched=layer.patched, replaced=layer.replaced)
            else:
                world.unet.unfuse_qkv_projections()
                world.put_back(world.fused)
                world.fused = None

    @rule(which=ANY, save=st.booleans())
    def save_or_set_back(self, which: int, save: bool) -> None:
        world = self.world(which)
        if save or world.saved is None:
            world.saved = world.unet.attn_processors, copy.deepcopy(world.layers)
        else:
            world.unet.set_attn_processor(dict(world.saved[0]))
            world.put_back(world.saved[1])

    @rule(which=ANY)
    def make_anew(self, which: int) -> None:
        """As load_ip_adapter and unload_ip_adapter: another instance of whatever class is installed."""
        world = self.world(which)
        for attn, layer in zip(self_attention(world.unet), world.layers, strict=True):
            if not layer.recorders and not isinstance(attn.processor, SlicedAttnProcessor):
                attn.set_processor(type(attn.processor)())
                layer.anew = layer.ours
                layer.tag = layer.replaced if layer.ours and layer.patched else None

    @rule(which=ANY, pickled=st.booleans())
    def duplicate(self, which: int, pickled: bool) -> None:
        world = self.world(which)
        self.worlds.append(world.copy(by_pickle if pickled and not world.compiled else copy.deepcopy))
        del self.worlds[:-COPIES]

    # --- what must hold

    @invariant()
    def holds(self) -> None:
        for world in self.worlds:
            world.check()

    def teardown(self) -> None:
        """However it went: unpatched, with nothing else installed, all is as it was."""
        litefocus.unpatch(self.first.unet)
        for attn, original in zip(attention(self.first.unet).values(), self.originals, strict=True):
            if getattr(attn.processor, "tag", None) == "original":
                assert attn.processor is original


def by_pickle(unet: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(unet))


class CompiledSequences(Sequences):
    """The same where the transformer blocks are compiled in place, at any time."""

    @rule(which=ANY)
    def compile(self, which: int) -> None:
        world = self.world(which)
        if not world.compiled:
            world.compiled = True
            for module in world.unet.modules():
                if isinstance(module, BasicTransformerBlock):
                    module.compile(backend="eager")


def explore(machine: type[RuleBasedStateMachine], examples: int, steps: int) -> None:
    """The same examples in every run."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],  # shrinking takes minutes: add Phase.shrink to look into a failure
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.filterwarnings("ignore:.*stay dense and run their own code")
def test_sequences() -> None:
    explore(Sequences, examples=45, steps=25)


@pytest.mark.filterwarnings("ignore:.*stay dense and run their own code")
def test_sequences_with_a_compiler() -> None:
    torch._dynamo.reset()
    explore(CompiledSequences, examples=3, steps=20)
    torch._dynamo.reset()


# --- prompts over time, while others wrap what they wrap


SCHEDULES = ({0.24: "rain"}, {0.24: "wind"}, {0.12: "rain", 0.44: "wind"})
ENCODER = "encode_text_classifier_free"


def tiny_tango() -> Tango:
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "layers_per_block": 1}
    torch.manual_seed(2)
    tango = Tango(
        tango_unet(
            block_out_channels=(8, 16),
            attention_head_dim=(1, 2),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            **blocks,
        )
    )
    litefocus.set_duration(tango, 0.64)
    return tango


def noise_of(tango: Tango) -> Tensor:
    """What one step makes."""
    torch.manual_seed(1)
    with torch.no_grad():
        latents: Tensor = tango.model.inference(["a hammer"], tango.scheduler, 1, 3.0)
    return latents


@cache
def scheduled(number: int | None) -> Tensor:
    """Of a fresh model."""
    tango = tiny_tango()
    if number is not None:
        litefocus.schedule_prompts(tango, SCHEDULES[number], fade=0.1)
    return noise_of(tango)


def places_to_wrap(tango: Tango) -> list[tuple[Any, str]]:
    """Of all that `schedule_prompts` wraps: the encoder, a cross-attention layer, a group norm."""
    modules = dict(tango.model.unet.named_modules())
    layer = next(module for name, module in modules.items() if name.endswith("attn2"))
    return [(tango.model, ENCODER), (layer, "forward"), (modules["conv_norm_out"], "forward")]


class Prompted:
    """A model, the schedules on it, and what others had wrapped, newest last: (place, what was there before)."""

    def __init__(self, tango: Tango) -> None:
        self.tango, self.places, self.made, self.blocks = tango, Places(), [], []
        self.wrapped: list[tuple[int, Any]] = []


class PromptSequences(RuleBasedStateMachine):
    """Whatever comes in whichever order: the newest schedule counts, and none where there is none."""

    @initialize()
    def begin(self) -> None:
        self.worlds = [Prompted(tiny_tango())]

    def world(self, which: int) -> Prompted:
        return self.worlds[which % len(self.worlds)]

    @rule(which=ANY, number=st.integers(0, len(SCHEDULES) - 1))
    def schedule(self, which: int, number: int) -> None:
        world = self.world(which)
        made = Made(number, litefocus.schedule_prompts(world.tango, SCHEDULES[number], fade=0.1))
        world.places.put(made)
        world.made.append(made)

    @rule(which=ANY)
    def unpatch(self, which: int) -> None:
        world = self.world(which)
        litefocus.unpatch(world.tango)
        litefocus.set_duration(world.tango, 0.64)
        world.places.places = []
        for made in world.made:
            made.over = True

    @rule(which=ANY, handle=ANY)
    def enter(self, which: int, handle: int) -> None:
        world = self.world(which)
        made = world.made[handle % len(world.made)] if world.made else None
        if made is not None and not (made.over or made.entered):
            made.handle.__enter__()
            world.places.enter(made)
            world.blocks.append(made)

    @rule(which=ANY, handle=ANY, block=st.booleans())
    def remove(self, which: int, handle: int, block: bool) -> None:
        world = self.world(which)
        among = world.blocks if block else world.made
        if among:
            made = among.pop(handle % len(among)) if block else among[handle % len(among)]
            made.handle.remove()
            world.places.remove(made)

    @rule(which=ANY, place=st.integers(0, 2), off=st.booleans())
    def wrap(self, which: int, place: int, off: bool) -> None:
        """As a cache, or accelerate's hooks; off: put back what was there, which may have been ours."""
        world = self.world(which)
        if off and world.wrapped:
            place, before = world.wrapped.pop()
            owner, method = places_to_wrap(world.tango)[place]
            if not isinstance(vars(owner)[method], Recorder):
                return  # ours is around it
            if before is None:
                del vars(owner)[method]
            else:
                vars(owner)[method] = before
        elif len(world.wrapped) < 3:
            owner, method = places_to_wrap(world.tango)[place]
            world.wrapped.append((place, vars(owner).get(method)))
            vars(owner)[method] = Recorder(getattr(owner, method))

    @rule(which=ANY)
    def duplicate(self, which: int) -> None:
        world = self.world(which)
        twin = Prompted(copy.deepcopy(world.tango))
        twin.places.places = [Made(made.config, None, made.entered) for made in world.places.places]
        self.worlds.append(twin)
        del self.worlds[:-COPIES]

    @invariant()
    def holds(self) -> None:
        for world in self.worlds:
            number = world.places.places[-1].config if world.places.places else None
            assert torch.equal(noise_of(world.tango), scheduled(number))
            assert (litefocus.status(world.tango).prompts is None) == (number is None)


def test_sequences_of_prompts() -> None:
    for one, other in itertools.combinations([None, 0, 1, 2], 2):
        assert not torch.allclose(scheduled(one), scheduled(other), atol=1e-3)
    explore(PromptSequences, examples=10, steps=20)


# --- threads


def own_or_newer(unet: nn.Module, outputs: list[Tensor], threads: int, rounds: int) -> list[str]:
    """What was wrong when each of several threads ran in a block of its own, again and again.

    `outputs`: of every thread's settings. A patch is newer if it was made, or its block begun, after the own block.
    """
    barrier, lock = threading.Barrier(threads, timeout=60), threading.Lock()
    events: list[int] = []  # threads, in the order in which they patched and entered
    wrong: list[str] = []

    def work(thread: int) -> None:
        for _ in range(rounds):
            barrier.wait()
            with lock:  # of the log alone: so that it tells the order in which they came
                handle = litefocus.patch(unet, CONFIGS[thread], freq_bins=BINS)
                events.append(thread)
            with lock:
                handle.__enter__()
                begun = len(events)
                events.append(thread)
            output = run(unet)
            handle.__exit__(None, None, None)
            with lock:  # whoever has put another patch in force has logged it then
                allowed = set(events[begun:])
            if not any(torch.equal(output, outputs[other]) for other in allowed):
                known = [other for other in range(threads) if torch.equal(output, outputs[other])]
                wrong.append(f"thread {thread} saw {known or 'a mixture'}, not one of {sorted(allowed)}")

    with ThreadPoolExecutor(threads) as workers:
        list(workers.map(work, range(threads)))  # which raises what they raise
    return wrong


@pytest.fixture
def many_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("many_switches")
def test_blocks_in_threads() -> None:
    """Every call goes by the settings of one patch, its own or a newer one, and in the end all is as it was."""
    unet, threads = tiny_unet(), 4
    before = unet.attn_processors
    wrong = own_or_newer(unet, [reference(config, (True, True)) for config in CONFIGS[:threads]], threads, rounds=25)
    assert not wrong
    assert same_processors(before, unet)
    assert not leftovers(unet)
    assert torch.equal(run(unet), reference(None, DENSE))
