"""The grid of one layer: its samples, which sizes stay dense, and what is kept."""

import pytest
import torch
import torch.nn.functional as F
from support.memory import NoReading
from torch import Tensor

from litefocus import LiteFocusConfig, focus_attention, focus_set
from litefocus._grid import KEPT_BYTES, NUM_SAMPLES, Grid

CONFIG = LiteFocusConfig(min_sampled=2, sparse_ratio=0.05)
CPU = torch.device("cpu")


@pytest.mark.parametrize("config", [CONFIG, LiteFocusConfig.paper()], ids=["weights", "paper"])
def test_a_sample_that_is_a_tensor_is_that_of_the_same_number(config: LiteFocusConfig) -> None:
    grid = Grid("mid", config=config)
    for sample in (*range(2 * NUM_SAMPLES), 2**32 - 1):
        expected = grid.focus_set(50, 8, CPU, sample)
        with NoReading():
            picked = grid.focus_set(50, 8, CPU, torch.tensor(sample))
        assert torch.equal(picked.keys, expected.keys)
        assert picked.queries is expected.queries
        assert picked.inverse is expected.inverse
        assert picked.log_weights is expected.log_weights
        assert torch.equal(expected.keys, focus_set(50, 8, config, layer="mid", sample=sample % NUM_SAMPLES).keys)


def test_the_mean_over_samples_is_nearer_to_dense_attention_than_any_of_them() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 4, 400 * 8, 16, dtype=torch.float64)
    dense = F.scaled_dot_product_attention(query, key, value)
    grid = Grid("mid", config=LiteFocusConfig(min_sampled=16, sparse_ratio=0.04, time_window=None))
    outputs = [focus_attention(query, key, value, grid.focus_set(400, 8, CPU, i)) for i in range(NUM_SAMPLES)]

    def off(output: Tensor) -> float:
        return float((output - dense).norm() / dense.norm())

    assert off(torch.stack(outputs).mean(dim=0)) < 0.6 * min(map(off, outputs))  # independent errors: half


def test_samples_of_short_clips_are_kept_and_of_a_long_one_the_newest_alone() -> None:
    grid = Grid("mid", config=CONFIG)
    first = [grid.focus_set(30, 8, CPU, sample) for sample in range(NUM_SAMPLES)]
    assert all(grid.focus_set(30, 8, CPU, sample) is focus for sample, focus in enumerate(first))
    longest = 0
    for frames in range(31, 400):
        longest = max(longest, grid.focus_set(frames, 8, CPU).keys.nbytes)
        assert sum(built.nbytes for built in grid._built.values()) <= max(KEPT_BYTES, longest)
    assert 4 < len(grid._built) < 300
    again = grid.focus_set(30, 8, CPU)
    assert again is not first[0]
    assert torch.equal(again.keys, first[0].keys)
    long = [grid.focus_set(30_000, 8, CPU, sample) for sample in range(2)]
    assert long[0].keys.nbytes > KEPT_BYTES
    assert [built.focus for built in grid._built.values()] == long[1:]
    assert long[0].queries is long[1].queries


@pytest.mark.parametrize(("frames", "kept"), [(32, 1.0), (63, (63 + 6) / 126)])  # 29 and 57 keys saved
def test_small_grids_stay_dense_as_a_focus_call_would_not_be_cheaper(frames: int, kept: float) -> None:
    config = LiteFocusConfig.paper(min_freq_bins=2)
    assert Grid("mid", config=config).keys_kept(frames, 2) == kept
    assert Grid("mid", config=config).keys_kept(frames, 1) == 1
    assert Grid("mid", config=config, min_keys_saved=1).keys_kept(32, 2) == (32 + 3) / 64


def test_a_time_window_is_counted_at_the_input_and_halved_level_by_level() -> None:
    config = LiteFocusConfig.paper(min_freq_bins=1, time_window=75)
    at_level_2, of_19 = Grid("mid", level=2, config=config), Grid("mid", config=LiteFocusConfig.paper(time_window=19))
    assert torch.equal(at_level_2.focus_set(200, 4, CPU).keys, of_19.focus_set(200, 4, CPU).keys)
    assert at_level_2.keys_kept(200, 4) == (64 + 20 + 3 * 8) / 800
    assert at_level_2.config is config
