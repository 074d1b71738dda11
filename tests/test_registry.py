"""Handles: what is in force on a module, by what its calls do. The same rules for `patch` and for `tile_decoding`."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.decoding import Holder, NormVAE, speecht5
from support.recorder import frames_of, record
from support.small import assert_off, dense, focus, leftovers, patch, run, small_unet

import litefocus
from litefocus._decoding import tiles_of


class Patched:
    """A UNet with settings 1, 2, 3: seeds of the samples."""

    name = "patch"

    def __init__(self) -> None:
        self.thing: Any = small_unet()

    def put(self, setting: int) -> Any:
        return patch(self.thing, setting)

    def shown(self) -> int | None:
        """What `status` says to be in force."""
        config = litefocus.status(self.thing).config
        return None if config is None else config.seed

    def acts(self) -> int | None:
        """What a call does."""
        output = run(self.thing)
        known = {None: dense(), **{seed: focus(seed) for seed in (1, 2, 3)}}
        (found,) = [setting for setting, expected in known.items() if torch.allclose(output, expected, atol=1e-5)]
        return found

    def leftovers(self) -> list[str]:
        return leftovers(self.thing)


class Tiled:
    """A VAE with settings 1, 2, 3: tiles of so many tenths of a second, of a clip of 0.6 s."""

    name = "tile_decoding"

    def __init__(self) -> None:
        self.thing: Any = Holder(speecht5(), NormVAE())
        self.before = dict(vars(self.thing)), dict(vars(self.thing.vae))

    def put(self, setting: int) -> Any:
        return litefocus.tile_decoding(self.thing, seconds=setting / 10, overlap=0)

    def shown(self) -> int | None:
        tiles = tiles_of(self.thing)
        return None if tiles is None else round(10 * tiles.seconds)

    def acts(self) -> int | None:
        recorder = record(self.thing.vae.norm, "forward")
        with torch.no_grad():
            self.thing.vae.decode(torch.randn(1, 8, 60, 2))
        del self.thing.vae.norm.forward
        (frames,) = set(frames_of(recorder))
        return {60: None}.get(frames, frames // 10)

    def leftovers(self) -> list[str]:
        return [] if (vars(self.thing), vars(self.thing.vae)) == self.before else ["tiles"]


@pytest.fixture(params=[Patched, Tiled])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param()


def assert_in_force(kind: Any, setting: int | None) -> None:
    assert kind.shown() == kind.acts() == setting
    assert setting is not None or not kind.leftovers()


def leave(kind: Any, handle: Any) -> None:
    with handle:
        pass


def unpatch_inside(kind: Any, handle: Any) -> None:
    with handle:
        litefocus.unpatch(kind.thing)


def replace_and_unpatch(kind: Any, handle: Any) -> None:
    kind.put(2)
    litefocus.unpatch(kind.thing)


def remove_its_block(kind: Any, handle: Any) -> None:
    with kind.put(2) as block:
        handle.__enter__()
        block.remove()
        handle.__exit__(None, None, None)


@pytest.mark.parametrize(
    "take_off",
    [
        lambda kind, handle: handle.remove(),
        lambda kind, handle: litefocus.unpatch(kind.thing),
        leave,
        unpatch_inside,
        replace_and_unpatch,
        remove_its_block,
    ],
    ids=["remove", "unpatch", "leave", "unpatch inside", "replace, unpatch", "remove its block"],
)
def test_a_handle_that_was_taken_off_cannot_be_entered(kind: Any, take_off: Callable[..., None]) -> None:
    handle = kind.put(1)
    take_off(kind, handle)
    message = rf"this {kind.name} was taken off, or was entered before; make another: with litefocus\.{kind.name}\("
    with pytest.raises(RuntimeError, match=message), handle:
        pass
    assert_in_force(kind, None)
    handle.remove()  # harmless
    litefocus.unpatch(kind.thing)
    assert_in_force(kind, None)


def test_a_handle_is_entered_once(kind: Any) -> None:
    with kind.put(1) as handle:
        with pytest.raises(RuntimeError, match="entered before"), handle:
            pass
        assert_in_force(kind, 1)
    assert_in_force(kind, None)


def test_a_handle_whose_module_is_gone_cannot_be_entered(kind: Any) -> None:
    handle = kind.put(1)
    kind.thing = kind.before = None
    gc.collect()
    with pytest.raises(RuntimeError, match="make another"), handle:
        pass
    handle.remove()


def test_the_newest_is_in_force_and_what_is_left_after_it_is_removed(kind: Any) -> None:
    first, second, third = kind.put(1), kind.put(2), kind.put(3)
    assert_in_force(kind, 3)
    second.remove()
    assert_in_force(kind, 3)
    third.remove()
    assert_in_force(kind, 1)
    first.remove()
    assert_in_force(kind, None)


def test_of_those_that_nobody_can_remove_the_last_comes_back(kind: Any) -> None:
    for setting in (1, 2, 3, 2):
        kind.put(setting)
    handle = kind.put(3)
    handle.remove()
    assert_in_force(kind, 2)
    kind.put(1)
    handle = kind.put(3)
    litefocus.unpatch(kind.thing)
    assert_in_force(kind, None)


def test_after_a_block_what_counted_before_counts_again(kind: Any) -> None:
    kind.put(1)
    with kind.put(2):
        with kind.put(3):
            assert_in_force(kind, 3)
        assert_in_force(kind, 2)
        kind.put(1)
        inner = kind.put(3)
        assert_in_force(kind, 3)
        inner.remove()
        assert_in_force(kind, 1)
        kind.put(3)  # ends with the block
    assert_in_force(kind, 1)
    with pytest.raises(KeyError), kind.put(3):
        raise KeyError
    assert_in_force(kind, 1)


def test_a_block_may_begin_with_an_older_handle(kind: Any) -> None:
    first, second = kind.put(1), kind.put(2)
    with first:
        assert_in_force(kind, 1)
    assert_in_force(kind, 2)
    old = kind.put(1)
    kind.put(3).remove()
    second.remove()
    with old:
        assert_in_force(kind, 1)
    assert_in_force(kind, None)


def test_what_was_removed_inside_of_a_block_does_not_come_back(kind: Any) -> None:
    outer = kind.put(1)
    with kind.put(2):
        outer.remove()
        assert_in_force(kind, 2)
    assert_in_force(kind, None)
    kind.put(1)
    with kind.put(2):
        litefocus.unpatch(kind.thing)
        kind.put(3)
    assert_in_force(kind, 3)


def interleavings(*threads: str) -> list[tuple[tuple[int, str], ...]]:
    """Every order of events, (thread, event), that keeps each thread's own order. Threads are numbered from 1."""
    orders = []
    for order in sorted(set(itertools.permutations([i for i, events in enumerate(threads) for _ in events]))):
        left = [list(events) for events in threads]
        orders.append(tuple((i + 1, left[i].pop(0)) for i in order))
    return orders


@pytest.mark.parametrize("threads", [("pel", "pel"), ("bl", "bl", "bl")], ids=["two", "three"])
def test_every_block_sees_its_own_or_a_newer_one_and_the_last_exit_restores(kind: Any, threads: tuple[str]) -> None:
    """p: put, e: enter, l: leave; b: put and enter."""
    for order in interleavings(*threads):
        handles: dict[int, Any] = {}
        newest: list[int] = []  # threads by their last entry
        inside: set[int] = set()
        for thread, event in order:
            if event in "pb":
                handles[thread] = kind.put(thread)
            if event in "eb":
                handles[thread].__enter__()
                inside.add(thread)
            if event == "l":
                handles[thread].__exit__(None, None, None)
                inside.remove(thread)
            else:
                newest = [*(other for other in newest if other != thread), thread]
            for reader in inside:
                assert kind.shown() in newest[newest.index(reader) :], order
        assert not kind.leftovers(), order
    assert_in_force(kind, None)


@pytest.mark.parametrize("how", [pickle.dumps, copy.copy, lambda handle: copy.deepcopy({"kept": [handle]})])
def test_a_handle_is_not_copied(kind: Any, how: Callable[[Any], Any]) -> None:
    handle = kind.put(1)
    for _ in range(2):
        with pytest.raises(TypeError, match=rf"the handle that {kind.name} returned .* cannot be copied or pickled"):
            how(handle)
        handle.remove()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_copies_have_settings_of_their_own(kind: Any, how: Callable[[Any], Any]) -> None:
    handle = kind.put(1)
    with kind.put(2):
        other = copy.copy(kind)
        other.thing = how(kind.thing)
        assert other.acts() == other.shown() == 2
    assert_in_force(kind, 1)
    assert other.acts() == 2
    other.put(3)
    handle.remove()
    assert_in_force(kind, None)
    assert other.acts() == 3
    litefocus.unpatch(other.thing)
    assert other.acts() is other.shown() is None


def test_a_handle_that_is_removed_inside_of_its_block_takes_with_it_what_the_block_had_inside() -> None:
    unet = small_unet()
    with patch(unet, 1) as handle:
        patch(unet, 2)
        handle.remove()
        assert_off(unet)
    assert_off(unet)
    assert not leftovers(unet)
