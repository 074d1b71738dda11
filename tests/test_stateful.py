"""Sequences of everything that patches, unpatches, moves, wraps or copies, against a model of what each layer must do.

The model knows no processors of ours. `Places` says which patch is in force, by the rules in the docstrings of `patch`,
`unpatch` and `Patch`; a twin of the UNet, to which the same was done but for the patches, says what else is installed.
"""

from __future__ import annotations

import copy
import pickle
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, SlicedAttnProcessor
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.pipelines import minimal_unet, sharpen
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
# a timestep of which patched UNets draw the sample that compiled ones have at every step
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


def attention(unet: nn.Module) -> dict[str, Attention]:
    return {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}


def self_attention(unet: nn.Module) -> list[Attention]:
    return [module for name, module in attention(unet).items() if name.endswith("attn1")]


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


class Recorder:
    """What attention recorders do: wrap whatever is installed."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, attn: Attention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.inner(attn, hidden_states, *args, **kwargs)
        return output


def shape(processor: Any) -> Any:
    """What is installed, without anything of ours: class and tag, through wrappers."""
    if isinstance(processor, Recorder):
        return ["Recorder", shape(processor.inner)]
    if isinstance(processor, LiteFocusAttnProcessor):
        return shape(processor.original) if processor.original is not None else ["AttnProcessor2_0", None]
    return [type(processor).__name__, getattr(processor, "tag", None)]


@dataclass(eq=False)
class Made:
    """A patch that was made. `over`: taken off, left, or unpatched. `replaced`: the plain patches that it replaced."""

    config: LiteFocusConfig
    handle: litefocus.Patch | None
    over: bool = False
    entered: bool = False
    replaced: list[Made] = field(default_factory=list)


class Places:
    """Which patches are in place, the newest last: (patch, whether a block has entered it)."""

    def __init__(self) -> None:
        self.places: list[tuple[Made, bool]] = []
        self.made: list[Made] = []

    @property
    def in_force(self) -> Made | None:
        return self.places[-1][0] if self.places else None

    def patch(self, made: Made) -> None:
        """One made outside of any block replaces those before; one made inside of a block those made inside of it."""
        since = max((i + 1 for i, (_, block) in enumerate(self.places) if block), default=0)
        made.replaced = [old for old, _ in self.places[since:]]
        self.places[since:] = [(made, False)]
        self.made.append(made)

    def enter(self, made: Made) -> None:
        """A block puts its own in force; what it had replaced when it was made is below it again."""
        if (made, False) in self.places:
            i = self.places.index((made, False))
            self.places[i : i + 1] = [(old, False) for old in made.replaced if not (old.over or old.entered)]
        made.entered = True
        self.places.append((made, True))

    def leave(self, made: Made) -> None:
        """Its block ends, and what was made inside of it; newer blocks stay."""
        if (made, True) not in self.places:
            return
        first = len(self.places) - 1 - self.places[::-1].index((made, True))
        last = first + 1
        while last < len(self.places) and not self.places[last][1]:
            last += 1
        del self.places[first:last]
        made.over = (made, True) not in self.places

    def remove(self, made: Made) -> None:
        made.over = True
        self.places = [place for place in self.places if place[0] is not made]

    def unpatch(self) -> None:
        self.places = []
        for made in self.made:
            made.over = True


class World:
    """A UNet, its twin that is never patched, and what the model knows of it."""

    def __init__(self, unet: nn.Module, twin: nn.Module, places: Places) -> None:
        self.unet, self.twin, self.places = unet, twin, places
        self.blocks: list[Made] = []  # entered and not left, in any order
        self.saved: tuple[dict[str, Any], dict[str, Any]] | None = None
        self.fused = self.compiled = False
        self.brought_back = False  # others have put processors of ours back where no patch was in force

    @property
    def ours(self) -> list[bool]:
        """Of every self-attention layer: whether calls reach a processor of ours."""
        return [holds_ours(attn.processor) for attn in self_attention(self.unet)]

    def duplicate(self, how: Callable[[Any], Any]) -> World:
        """Another UNet with the same patches in place; no handle and no block of the first concerns it."""
        new = {made: Made(made.config, None, made.over, made.entered) for made in self.places.made}
        for made in new:
            new[made].replaced = [new[old] for old in made.replaced]
        places = Places()
        places.made = list(new.values())
        places.places = [(new[made], block) for made, block in self.places.places]
        world = World(how(self.unet), copy.deepcopy(self.twin), places)
        world.fused, world.brought_back = self.fused, self.brought_back
        return world

    def installed(self) -> None:
        """A patch was made, or a block has begun."""
        assert all(self.ours)

    def taken_off(self) -> None:
        """A patch was removed, or a block has ended."""
        if self.places.in_force is None and not self.brought_back:
            assert not any(isinstance(attn.processor, LiteFocusAttnProcessor) for attn in attention(self.unet).values())

    def others_were_here(self) -> None:
        if self.places.in_force is None:
            self.brought_back = True

    def both(self, layers: list[int], change: Callable[[Any], Any]) -> None:
        """Change processors on both UNets."""
        for unet in (self.unet, self.twin):
            for i, attn in enumerate(self_attention(unet)):
                if i in layers:
                    attn.set_processor(change(attn.processor))
        self.others_were_here()

    def check(self) -> None:
        made = self.places.in_force
        config = None if made is None else made.config
        focusing = tuple(config is not None and ours for ours in self.ours)
        expected = reference(config if any(focusing) else None, focusing)
        output = run(self.unet)
        assert (output - expected).abs().max() < TOLERANCE
        status = litefocus.status(self.unet)
        assert status.config == config
        for row, focuses, attn in zip(status.layers, focusing, self_attention(self.unet), strict=True):
            kind = type(attn.processor).__name__
            if config is None:
                assert row.state in ("dense", "dense: its patch was removed")
            elif not focuses:
                assert row.state == f"overwritten by {kind}"
            else:
                assert row.state == ("focus, wrapped by Recorder" if kind == "Recorder" else "focus")

        # what else is installed is what would be without us
        untouched = config is None
        for attn, twin in zip(attention(self.unet).values(), attention(self.twin).values(), strict=True):
            got, wanted = shape(attn.processor), shape(twin.processor)
            got, wanted = flat(got), flat(wanted)
            if wanted[-1] == "anew":  # it does not know any more what it has replaced
                got[-2:] = wanted[-2:]
            assert got == wanted
            untouched = untouched and wanted == ["AttnProcessor2_0", "original"]
            untouched = untouched and not isinstance(attn.processor, LiteFocusAttnProcessor)
        if config is not None:
            with pytest.raises(ValueError, match=f"patched for {BINS} frequency bins"):
                run(self.unet, BINS // 2)
        else:
            for module in self.unet.modules():
                assert not [name for name in vars(module) if "litefocus" in name]
                assert not {**module._forward_pre_hooks, **module._forward_hooks}
        if untouched and not self.compiled:
            assert torch.equal(output, reference(None, DENSE))


def holds_ours(processor: Any) -> bool:
    return isinstance(processor, LiteFocusAttnProcessor) or (
        isinstance(processor, Recorder) and holds_ours(processor.inner)
    )


def flat(nested: Any) -> list[Any]:
    return [leaf for part in nested for leaf in (flat(part) if isinstance(part, list) else [part])]


def depth(processor: Any) -> int:
    return 1 + depth(processor.inner) if isinstance(processor, Recorder) else 0


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
        self.worlds = [World(unet, copy.deepcopy(unet), Places())]
        self.first = self.worlds[0]
        self.tags = 0

    def world(self, which: int) -> World:
        return self.worlds[which % len(self.worlds)]

    # --- patches

    @rule(which=ANY, config=st.integers(0, len(CONFIGS) - 1))
    def patch(self, which: int, config: int) -> None:
        world = self.world(which)
        world.places.patch(Made(CONFIGS[config], litefocus.patch(world.unet, CONFIGS[config], freq_bins=BINS)))
        world.installed()

    @rule(which=ANY)
    def unpatch(self, which: int) -> None:
        world = self.world(which)
        litefocus.unpatch(world.unet)
        world.places.unpatch()
        world.brought_back = False
        world.taken_off()

    def handles(self, which: int) -> list[Made]:
        return [made for made in self.world(which).places.made if made.handle is not None]

    @precondition(lambda self: any(self.handles(which) for which in range(len(self.worlds))))
    @rule(which=ANY, handle=ANY)
    def enter(self, which: int, handle: int) -> None:
        world, handles = self.world(which), self.handles(which)
        if not handles:
            return
        made = handles[-1 - handle % min(len(handles), 4)]
        if made.over:
            with pytest.raises(RuntimeError, match="no longer in place; patch again"):
                made.handle.__enter__()
            return
        made.handle.__enter__()
        world.places.enter(made)
        world.installed()
        world.blocks.append(made)

    @precondition(lambda self: any(world.blocks for world in self.worlds))
    @rule(which=ANY, block=ANY)
    def leave(self, which: int, block: int) -> None:
        """In any order, as threads do."""
        world = self.world(which)
        if world.blocks:
            made = world.blocks.pop(block % len(world.blocks))
            made.handle.__exit__(None, None, None)
            world.places.leave(made)
            world.taken_off()

    @precondition(lambda self: any(self.handles(which) for which in range(len(self.worlds))))
    @rule(which=ANY, handle=ANY)
    def remove(self, which: int, handle: int) -> None:
        world, handles = self.world(which), self.handles(which)
        if handles:
            made = handles[-1 - handle % min(len(handles), 4)]
            made.handle.remove()
            world.places.remove(made)
            world.taken_off()

    # --- what others do

    @rule(which=ANY, layers=LAYERS, off=st.booleans())
    def wrap(self, which: int, layers: list[int], off: bool) -> None:
        world = self.world(which)
        if off:
            outermost = [i for i in layers if isinstance(self_attention(world.unet)[i].processor, Recorder)]
            world.both(outermost, lambda processor: processor.inner)
        elif max(depth(attn.processor) for attn in self_attention(world.twin)) < 2:
            world.both(layers, Recorder)

    @rule(which=ANY, layers=LAYERS, sliced=st.booleans())
    def overwrite(self, which: int, layers: list[int], sliced: bool) -> None:
        world = self.world(which)
        self.tags += 1

        def other(_: Any) -> Any:
            processor = SlicedAttnProcessor(1) if sliced else AttnProcessor2_0()
            processor.tag = self.tags
            return processor

        world.both(layers, other)

    @rule(which=ANY)
    def fuse_or_unfuse(self, which: int) -> None:
        world = self.world(which)
        world.fused = not world.fused
        for unet in (world.unet, world.twin):
            with torch.no_grad():
                unet.fuse_qkv_projections() if world.fused else unet.unfuse_qkv_projections()
        world.others_were_here()

    @rule(which=ANY, save=st.booleans())
    def save_or_set_back(self, which: int, save: bool) -> None:
        world = self.world(which)
        if save or world.saved is None:
            world.saved = world.unet.attn_processors, world.twin.attn_processors
        else:
            world.unet.set_attn_processor(dict(world.saved[0]))
            world.twin.set_attn_processor(dict(world.saved[1]))
            world.others_were_here()

    @rule(which=ANY)
    def make_anew(self, which: int) -> None:
        """As load_ip_adapter and unload_ip_adapter: another instance of whatever class is installed."""
        world = self.world(which)
        if all(type(attn.processor) is AttnProcessor2_0 for attn in self_attention(world.twin)):
            world.both([0, 1], lambda processor: type(processor)())
            for attn in self_attention(world.twin):
                attn.processor.tag = "anew"

    @rule(which=ANY, pickled=st.booleans())
    def duplicate(self, which: int, pickled: bool) -> None:
        world = self.world(which)
        self.worlds.append(world.duplicate(by_pickle if pickled and not world.compiled else copy.deepcopy))
        del self.worlds[:-COPIES]

    # --- what must hold

    @invariant()
    def holds(self) -> None:
        for world in self.worlds:
            world.check()

    def teardown(self) -> None:
        """However it went: unpatched, with nothing else installed, all is as it was."""
        world = self.first
        litefocus.unpatch(world.unet)
        for attn, original in zip(attention(world.unet).values(), self.originals, strict=True):
            if shape(attn.processor) == ["AttnProcessor2_0", "original"]:
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


@pytest.mark.filterwarnings("ignore:layers that are to focus go through Recorder")
def test_sequences() -> None:
    explore(Sequences, examples=60, steps=25)


@pytest.mark.filterwarnings("ignore:layers that are to focus go through Recorder")
def test_sequences_with_a_compiler() -> None:
    torch._dynamo.reset()
    explore(CompiledSequences, examples=3, steps=20)
    torch._dynamo.reset()


# --- threads


def own_or_newer(unet: nn.Module, outputs: list[Tensor], threads: int, rounds: int) -> list[str]:
    """What was wrong when each of several threads ran in a block of its own, again and again.

    `outputs`: of every thread's settings. A patch is newer if it was made, or its block begun, after the own block.
    """
    barrier, lock = threading.Barrier(threads), threading.Lock()
    events: list[int] = []  # threads, in the order in which they patched and entered
    wrong: list[str] = []

    def work(thread: int) -> None:
        jitter = random.Random(thread)
        for _ in range(rounds):
            barrier.wait()
            time.sleep(jitter.random() * 2e-3)
            try:
                with lock:  # of the log alone: so that it tells the order in which they came
                    handle = litefocus.patch(unet, CONFIGS[thread], freq_bins=BINS)
                    events.append(thread)
                time.sleep(jitter.random() * 1e-3)
                with lock:
                    handle.__enter__()
                    begun = len(events)
                    events.append(thread)
                try:
                    time.sleep(jitter.random() * 1e-3)
                    output = run(unet)
                finally:
                    handle.__exit__(None, None, None)
                with lock:  # whoever has put another patch in force has logged it then
                    allowed = set(events[begun:])
                if not any(torch.equal(output, outputs[other]) for other in allowed):
                    known = [other for other in range(threads) if torch.equal(output, outputs[other])]
                    wrong.append(f"thread {thread} saw {known or 'a mixture'}, not one of {sorted(allowed)}")
            except Exception as error:
                wrong.append(f"thread {thread}: {type(error).__name__}: {error}")

    workers = [threading.Thread(target=work, args=(thread,)) for thread in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return wrong


@pytest.fixture
def _many_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_many_switches")
def test_blocks_in_threads() -> None:
    """Every call goes by the settings of one patch, its own or a newer one, and in the end all is as it was."""
    unet, threads = tiny_unet(), 4
    before = [attn.processor for attn in attention(unet).values()]
    wrong = own_or_newer(unet, [reference(config, (True, True)) for config in CONFIGS[:threads]], threads, rounds=25)
    assert not wrong
    assert all(attn.processor is old for attn, old in zip(attention(unet).values(), before, strict=True))
    for module in unet.modules():
        assert not [name for name in vars(module) if "litefocus" in name]
        assert not {**module._forward_pre_hooks, **module._forward_hooks}
    assert torch.equal(run(unet), reference(None, DENSE))
