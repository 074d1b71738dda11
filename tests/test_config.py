"""LiteFocusConfig refuses what it cannot mean, and says why."""

import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest
from support.small import small_unet

import litefocus
from litefocus import LiteFocusConfig

DEFAULTS = {
    "same_frequency": True,
    "cross_frequency": True,
    "sparse_ratio": 0.05,
    "min_sampled": 16,
    "reweight": True,
    "time_window": 256,
    "far_sampled": 16,
    "min_freq_bins": 2,
    "seed": 0,
}


def test_defaults() -> None:
    assert dataclasses.asdict(LiteFocusConfig()) == DEFAULTS


def test_the_published_settings() -> None:
    paper = {
        "sparse_ratio": 0.1,
        "min_sampled": 0,
        "reweight": False,
        "time_window": None,
        "far_sampled": 0,
        "min_freq_bins": 8,
    }
    assert dataclasses.asdict(LiteFocusConfig.paper()) == {**DEFAULTS, **paper}
    assert LiteFocusConfig.paper(seed=2, min_freq_bins=4) == LiteFocusConfig(**{**paper, "seed": 2, "min_freq_bins": 4})
    with pytest.raises(TypeError, match=r"no option 'sead'. Did you mean 'seed'"):
        LiteFocusConfig.paper(sead=2)


def test_is_frozen_hashable_and_picklable() -> None:
    config = LiteFocusConfig(sparse_ratio=0.2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sparse_ratio = 0.3  # type: ignore[misc]
    assert config == LiteFocusConfig(sparse_ratio=0.2)
    assert hash(config) == hash(LiteFocusConfig(sparse_ratio=0.2))
    assert pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, seed=3) == LiteFocusConfig(sparse_ratio=0.2, seed=3)


def test_numbers_of_numpy_become_plain_ones() -> None:
    config = LiteFocusConfig(sparse_ratio=np.float32(0.5), seed=np.int64(7), min_freq_bins=np.int32(4))
    assert (config.sparse_ratio, config.seed, config.min_freq_bins) == (0.5, 7, 4)
    assert [type(value) for value in (config.sparse_ratio, config.seed, config.min_freq_bins)] == [float, int, int]
    assert type(LiteFocusConfig(sparse_ratio=1).sparse_ratio) is float


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparse_ratio": -0.1}, ValueError, r"sparse_ratio must be a finite number in \[0, 1\], got -0.1"),
        ({"sparse_ratio": 1.5}, ValueError, r"sparse_ratio .* \[0, 1\], got 1.5"),
        ({"sparse_ratio": math.nan}, ValueError, "sparse_ratio must be a finite number .* got nan"),
        ({"sparse_ratio": math.inf}, ValueError, "sparse_ratio must be a finite number .* got inf"),
        ({"sparse_ratio": "0.1"}, TypeError, r"sparse_ratio must be a number .* got '0.1' \(str\)"),
        ({"sparse_ratio": True}, TypeError, r"sparse_ratio must be a number .* got True \(bool\)"),
        ({"sparse_ratio": None}, TypeError, "sparse_ratio must be a number .* got None"),
        ({"sparse_ratio": np.zeros(2)}, TypeError, "sparse_ratio must be a number"),
        ({"sparse_ratio": 10**400}, ValueError, "sparse_ratio must be a finite number"),
        ({"seed": 1.0}, TypeError, r"seed must be an integer of at least 0, got 1.0 \(float\)"),
        ({"seed": -1}, ValueError, "seed must be an integer of at least 0, got -1"),
        ({"seed": True}, TypeError, "seed must be an integer"),
        ({"min_freq_bins": 0}, ValueError, "min_freq_bins must be an integer of at least 1, got 0"),
        ({"min_freq_bins": 8.0}, TypeError, "min_freq_bins must be an integer"),
        ({"min_sampled": -1}, ValueError, "min_sampled must be an integer of at least 0, got -1"),
        ({"far_sampled": 1.5}, TypeError, r"far_sampled must be an integer of at least 0, got 1.5 \(float\)"),
        ({"reweight": None}, TypeError, r"reweight must be True or False, got None \(NoneType\)"),
        ({"time_window": 0}, ValueError, "time_window must be an integer of at least 1, got 0"),
        ({"time_window": 25.6}, TypeError, r"time_window must be an integer .* got 25.6 \(float\)"),
        ({"same_frequency": 1}, TypeError, r"same_frequency must be True or False, got 1 \(int\)"),
        ({"cross_frequency": "no"}, TypeError, "cross_frequency must be True or False, got 'no'"),
        ({"same_frequency": False, "cross_frequency": False}, ValueError, "both False.*nothing to attend to"),
        ({"same_frequency": False, "sparse_ratio": 0}, ValueError, "nothing to attend to; set sparse_ratio above 0"),
        ({"sparse_ration": 0.1}, TypeError, "no option 'sparse_ration'. Did you mean 'sparse_ratio'?"),
        ({"zzz": 1}, TypeError, "no option 'zzz'. Options: same_frequency, cross_frequency, sparse_ratio"),
    ],
)
def test_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LiteFocusConfig(**options)


@pytest.mark.parametrize(
    "function",
    [
        lambda config: litefocus.patch(small_unet(), config),
        lambda config: litefocus.probe(small_unet(), config),
        lambda config: litefocus.focus_set(8, 8, config),
        lambda config: litefocus.LiteFocusAttnProcessor(freq_bins=8, config=config),
    ],
    ids=["patch", "probe", "focus_set", "processor"],
)
def test_a_config_of_another_type_is_refused_wherever_it_is_asked_for(function: Any) -> None:
    for config in ({"seed": 1}, LiteFocusConfig, "paper", 0.1):
        message = rf"config must be a LiteFocusConfig, got {type(config).__name__}; pass LiteFocusConfig\(\.\.\.\)"
        with pytest.raises(TypeError, match=message):
            function(config)
