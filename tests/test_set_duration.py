"""Tango, Tango 2 and Mustango: their clips, and `set_duration`."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.oracle import install_oracle
from support.pipelines import build
from support.settings import hand_in
from support.small import Distributed, compiled, compiled_in_place, small_unet
from support.tango import AudioDiffusion, Tango, tango_unet

import litefocus
from litefocus import LiteFocusConfig

ALL = LiteFocusConfig(min_sampled=0)  # clips this short would be dense with the floor


@pytest.fixture
def tango() -> Tango:
    torch.manual_seed(0)
    return Tango(tango_unet())


TAIL = 32  # samples that the vocoder adds, whatever the length


def clip(tango: Tango, **settings: Any) -> np.ndarray:
    torch.manual_seed(1)  # Tango draws from the global generator
    return tango.generate("a hammer", **settings)


@pytest.mark.parametrize("seconds", [1.32, 2.6])  # 33 and 65 latent frames: odd at several levels
def test_tango_is_that_of_masked_dense_attention(tango: Tango, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    hand_in(monkeypatch, min_keys_saved=1, num_samples=1)  # the oracle masks grids of any size, and knows no timesteps
    litefocus.set_duration(tango, seconds)
    dense = clip(tango)
    oracle = copy.deepcopy(tango)
    install_oracle(oracle.model.unet, ALL)
    expected = clip(oracle)
    handle = litefocus.patch(tango, ALL)
    got = clip(tango)
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-3)
    assert np.abs(expected - dense).max() > 1e-3
    status = litefocus.status(tango)
    assert [layer.freq_bins for layer in status.layers] == [16, 16, 8, 8, 4, 4, 2, 4, 4, 4, 8, 8, 8, 16, 16, 16]
    assert repr(handle) == repr(status)


@pytest.mark.parametrize(("seconds", "frames"), [(20, 500), (9.95, 249)])
def test_tango_generates_the_length_that_was_set(tango: Tango, seconds: float, frames: int) -> None:
    usual = clip(tango)
    assert len(usual) == 256 * 640 + TAIL
    litefocus.patch(tango)
    litefocus.set_duration(tango, seconds)
    assert litefocus.status(tango, seconds=seconds).layers[0].frames == frames
    long = clip(tango)
    assert len(long) == frames * 640 + TAIL
    assert np.isfinite(long).all()
    litefocus.unpatch(tango)
    assert np.array_equal(clip(tango), usual)
    assert "prepare_latents" not in tango.model.__dict__


def test_a_set_duration_is_of_one_object_and_can_be_taken_back(tango: Tango) -> None:
    usual, other = clip(tango), copy.deepcopy(tango)
    litefocus.set_duration(tango, 10.24)
    assert np.array_equal(clip(tango), usual)  # the same draw as the original code's
    litefocus.set_duration(tango, 1)
    twin = copy.deepcopy(tango)
    assert len(clip(tango)) == len(clip(twin)) == 16000 + TAIL
    assert len(clip(other)) == len(usual)
    for _ in range(2):
        litefocus.set_duration(tango, None)
        assert np.array_equal(clip(tango), usual)
    assert len(clip(twin)) == 16000 + TAIL


@pytest.mark.parametrize(
    ("seconds", "error"),
    [(0, ValueError), (-1, ValueError), (float("nan"), ValueError), (0.001, ValueError), ("8", TypeError)],
)
def test_a_bad_duration_changes_nothing(tango: Tango, seconds: Any, error: type[Exception]) -> None:
    litefocus.set_duration(tango, 1)
    with pytest.raises(error, match="seconds must be"):
        litefocus.set_duration(tango, seconds)
    assert len(clip(tango)) == 16000 + TAIL


def test_a_duration_needs_tango() -> None:
    with pytest.raises(TypeError, match=r"got an object of type AudioLDMPipeline; .* take audio_length_in_s"):
        litefocus.set_duration(build("AudioLDM"), 10)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("restore", [lambda tango: litefocus.set_duration(tango, None), litefocus.unpatch])
@pytest.mark.parametrize("wrapped_first", [True, False])
@pytest.mark.parametrize(
    "wrapper", [compiled, compiled_in_place, Distributed, lambda model: compiled(Distributed(model))]
)
def test_the_length_of_a_wrapped_tango_is_taken_back(
    wrapper: Callable[[Any], Any], wrapped_first: bool, restore: Callable[[Any], None]
) -> None:
    model = AudioDiffusion(small_unet())
    arguments = (1, types.SimpleNamespace(init_noise_sigma=1.0), 8, torch.float32, "cpu")
    tango = types.SimpleNamespace(model=wrapper(model) if wrapped_first else model)
    litefocus.set_duration(tango, 80)
    tango.model = tango.model if wrapped_first else wrapper(model)

    def frames() -> int:
        (length,) = {call(*arguments).shape[2] for call in (model.prepare_latents, model, tango.model)}
        return length

    assert frames() == 2000
    litefocus.set_duration(tango, 20)
    assert frames() == 500
    restore(tango)
    assert frames() == 256
    assert "prepare_latents" not in vars(model)
    assert "prepare_latents" not in vars(tango.model)


def test_what_somebody_had_set_on_the_model_comes_back() -> None:
    """As users do who edit Tango's length by hand."""
    model = AudioDiffusion(small_unet())
    mine = model.prepare_latents = lambda *arguments: torch.zeros(1, 8, 100, 16)
    tango = types.SimpleNamespace(model=model)
    for seconds in (10, 20):
        litefocus.set_duration(tango, seconds)
    assert model.prepare_latents.num_frames == 500
    litefocus.unpatch(tango)
    assert model.prepare_latents is mine
    litefocus.set_duration(tango, 20)
    model.prepare_latents = mine  # theirs is theirs
    litefocus.set_duration(tango, None)
    assert model.prepare_latents is mine
