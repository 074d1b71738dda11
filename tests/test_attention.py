"""focus_attention against dense attention with a mask, in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.memory import PeakMemory
from support.oracle import allowed, bias, biased_attention, masked_attention
from torch import Tensor

from litefocus import FocusSet, LiteFocusConfig, focus_attention, focus_set


def qkv(
    batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype = torch.float64, projected: bool = False
) -> Tensor:
    """projected: in the layout in which a UNet's projections come, heads within each token."""
    drawn = torch.randn(3, batch, heads, tokens, dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    return drawn.transpose(2, 3).contiguous().transpose(2, 3) if projected else drawn


def attend(device: torch.device, q: Tensor, k: Tensor, v: Tensor, focus: FocusSet) -> Tensor:
    """`focus_attention` on a device, its result on the CPU. The layout of the heads in memory is kept."""
    return focus_attention(q.to(device), k.to(device), v.to(device), focus.to(device)).cpu()


@given(
    grid=st.tuples(st.integers(1, 12), st.integers(1, 6)),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    dim=st.sampled_from([1, 4, 8]),
    ratio=st.sampled_from([0.0, 0.1, 0.4, 1.0]),
    floor=st.integers(0, 4),
    weighted=st.booleans(),
    same=st.booleans(),
    axis=st.sampled_from(["width", "height"]),
    projected=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_equals_biased_dense_attention(
    device, grid, batch, heads, dim, ratio, floor, weighted, same, axis, projected
) -> None:
    options = {"same_frequency": same or ratio == 0, "sparse_ratio": ratio, "min_sampled": floor}
    focus = focus_set(*grid, LiteFocusConfig(**options, reweight=weighted), freq_axis=axis)
    q, k, v = qkv(batch, heads, focus.tokens, dim, projected=projected)
    rounding = 1e-6 if weighted else 1e-10  # weights are in float32
    expected = biased_attention(q, k, v, bias(focus))
    torch.testing.assert_close(attend(device, q, k, v, focus), expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("axis", ["width", "height"])
@pytest.mark.parametrize(("same", "cross"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("far", [0, 3])
def test_time_windows_equal_biased_dense_attention(device, axis, same, cross, far, monkeypatch) -> None:
    settings = {"same_frequency": same, "cross_frequency": cross, "time_window": 20, "min_sampled": 8}
    config = LiteFocusConfig(**settings, far_sampled=far, reweight=far > 0)
    focus = focus_set(150, 3, config, freq_axis=axis)
    keys = {(True, True): 84 + 2 * 8 + 3 * far, (False, True): 3 * (8 + far), (True, False): 84 + far}
    assert focus.keys_per_query == (keys[same, cross] if cross or far else 84)
    assert len(focus.queries) == (9 if same else 3)
    q, k, v = qkv(2, 2, focus.tokens, 4)
    expected = biased_attention(q, k, v, bias(focus))
    rounding = dict.fromkeys(["rtol", "atol"], 1e-6 if far else 1e-10)  # weights in float32
    torch.testing.assert_close(attend(device, q, k, v, focus), expected, **rounding)
    monkeypatch.setattr("litefocus.attention.SLICE_BYTES", 1)  # one group at a time
    torch.testing.assert_close(attend(device, q, k, v, focus), expected, **rounding)


def test_weights_bring_the_output_nearer_to_dense_attention() -> None:
    """Where attention is uniform the published sets give the own bin more than half of the mass; weights mend it."""
    q, k, v = qkv(1, 2, 400 * 8, 16)
    v = v + 2 * qkv(1, 2, 8, 16)[0].repeat(1, 1, 400, 1)  # every bin has values of its own
    dense = F.scaled_dot_product_attention(q * 0.1, k, v)

    def error(config: LiteFocusConfig) -> float:
        difference = focus_attention(q * 0.1, k, v, focus_set(400, 8, config)) - dense
        return float(difference.norm() / dense.norm())

    assert error(LiteFocusConfig(sparse_ratio=1, time_window=None)) < 1e-12
    weighted, paper = error(LiteFocusConfig(time_window=None)), error(LiteFocusConfig.paper())
    assert weighted < 0.5 * paper


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [True, False])
def test_is_as_exact_as_dense_attention_in_every_precision(device, dtype, weighted) -> None:
    focus = focus_set(64, 8, LiteFocusConfig.paper(reweight=weighted))
    q, k, v = qkv(1, 2, focus.tokens, 16, dtype)
    output = attend(device, q, k, v, focus)
    dense = F.scaled_dot_product_attention(q.to(device), k.to(device), v.to(device)).cpu()
    error = (output - biased_attention(q, k, v, bias(focus))).abs().max()
    dense_error = (dense - biased_attention(q, k, v, torch.zeros(()))).abs().max()
    assert output.dtype == dtype
    # fewer keys average out less of the values' own rounding: sqrt(512 / 106) = 2.2
    assert error < 3 * dense_error


@pytest.mark.parametrize("weighted", [True, False])
def test_gradients_are_those_of_masked_dense_attention(device, weighted) -> None:
    focus = focus_set(10, 4, LiteFocusConfig.paper(sparse_ratio=0.3, reweight=weighted))
    inputs = [x.clone().requires_grad_() for x in qkv(2, 2, focus.tokens, 4)]
    weight = torch.randn(2, 2, focus.tokens, 4, dtype=torch.float64)
    got = torch.autograd.grad((attend(device, *inputs, focus) * weight).sum(), inputs)
    expected = torch.autograd.grad((biased_attention(*inputs, bias(focus)) * weight).sum(), inputs)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)  # weights in float32


def test_values_may_have_another_width(device) -> None:
    focus = focus_set(6, 4, LiteFocusConfig.paper())
    q, k, _ = qkv(1, 2, focus.tokens, 8)
    _, _, v = qkv(1, 2, focus.tokens, 5)
    torch.testing.assert_close(attend(device, q, k, v, focus), masked_attention(q, k, v, allowed(focus)))


def test_same_frequency_branch_is_the_published_arithmetic() -> None:
    """The published code folds the bins into the batch and attends over time."""
    batch, heads, frames, bins, dim = 2, 3, 20, 8, 4
    q, k, v = qkv(batch, heads, frames * bins, dim)
    folded = [x.view(batch, heads, frames, bins, dim).permute(0, 1, 3, 2, 4) for x in (q, k, v)]
    weights = (folded[0] @ folded[1].transpose(-1, -2) * dim**-0.5).softmax(-1)
    expected = (weights @ folded[2]).permute(0, 1, 3, 2, 4).reshape(q.shape)
    config = LiteFocusConfig.paper(cross_frequency=False)
    torch.testing.assert_close(focus_attention(q, k, v, focus_set(frames, bins, config)), expected)


def test_same_keys_with_duplicates_are_the_published_arithmetic() -> None:
    """The published code concatenates a sample of all tokens to the own bin, so that own-bin keys can count twice."""
    frames, bins, dim = 20, 8, 4
    tokens = frames * bins
    q, k, v = qkv(1, 2, tokens, dim)
    sample = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))[: tokens // 4]
    union = focus_set(frames, bins, LiteFocusConfig.paper())
    keys = torch.cat([union.queries, sample.expand(bins, -1)], dim=1)
    assert any(len(set(row)) < len(row) for row in keys.tolist())
    got = focus_attention(q, k, v, FocusSet(union.queries, keys, union.inverse))

    exp = (torch.einsum("bhid,bhjd->bhij", q, k) * dim**-0.5).exp()  # materialised scores, counted
    times = (torch.arange(tokens)[:, None] % bins == torch.arange(tokens) % bins).double()
    times[:, sample] += 1
    expected = (exp * times) @ v / (exp * times).sum(-1, keepdim=True)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    once = masked_attention(q, k, v, times > 0)
    assert (got - once).norm() / once.norm() > 0.05  # which is why litefocus takes the union


@pytest.mark.parametrize("time_window", [None, 128])
@pytest.mark.parametrize("projected", [False, True])
def test_one_call_needs_at_most_three_times_the_memory_of_its_inputs(projected, time_window) -> None:
    focus = focus_set(512, 8, LiteFocusConfig.paper(time_window=time_window))
    q, k, v = qkv(2, 8, focus.tokens, 32, torch.float32, projected)
    with PeakMemory() as memory, torch.no_grad():
        focus_attention(q, k, v, focus)
    inputs = sum(x.nbytes for x in (q, k, v))
    assert q.nbytes < memory.peak <= 3 * inputs  # it did count, and no more than the bound


@pytest.mark.parametrize("projected", [False, True])
def test_with_time_windows_a_call_moves_memory_in_proportion_to_the_clip(projected) -> None:
    moved = []
    for frames in (1024, 2048):
        focus = focus_set(frames, 8, LiteFocusConfig.paper(time_window=128))
        q, k, v = qkv(1, 4, focus.tokens, 16, torch.float32, projected)
        with PeakMemory() as memory, torch.no_grad():
            focus_attention(q, k, v, focus)
        moved.append(memory.total)
    assert moved[1] == pytest.approx(2 * moved[0], rel=0.05)


@pytest.mark.parametrize("config", [LiteFocusConfig(), LiteFocusConfig(time_window=1)])
def test_an_empty_batch_is_an_empty_result(device, config) -> None:
    q, k, v = qkv(0, 2, 300 * 4, 8)
    assert attend(device, q, k, v, focus_set(300, 4, config)).shape == (0, 2, 1200, 8)


def test_refuses_another_grid() -> None:
    q, k, v = qkv(1, 1, 24, 4)
    with pytest.raises(ValueError, match="the focus set is for 32 tokens, query has 24"):
        focus_attention(q, k, v, focus_set(8, 4, LiteFocusConfig.paper()))


def test_refuses_shapes_that_do_not_fit() -> None:
    q, k, v = qkv(1, 1, 24, 4)
    focus = focus_set(6, 4, LiteFocusConfig.paper())
    for bad in [(q[0], k, v), (q, k[:, :, :12], v), (q, k, v[:, :, :12])]:
        with pytest.raises(ValueError, match="and value too but for head_dim; got"):
            focus_attention(*bad, focus)


def test_refuses_a_focus_set_on_another_device() -> None:
    q, k, v = qkv(1, 1, 24, 4).to("meta")
    with pytest.raises(ValueError, match=r"on cpu, query on meta; use focus.to\(query.device\)"):
        focus_attention(q, k, v, focus_set(6, 4, LiteFocusConfig.paper()))
