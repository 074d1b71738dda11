"""The processor against diffusers' own, which takes the focus set as an additive mask."""

import copy
import pickle
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, SlicedAttnProcessor
from support.oracle import allowed
from support.recorder import Recorder
from torch import Tensor

from litefocus import LiteFocusAttnProcessor, LiteFocusConfig, focus_set

FRAMES, BINS = 10, 4
pytestmark = pytest.mark.usefixtures("small_grids_focus")


def recorder() -> Recorder:
    return Recorder(lambda attn, hidden_states, *args, **kwargs: hidden_states + 1)


def processor(original: Any = None, **options: Any) -> LiteFocusAttnProcessor:
    freq_bins = options.pop("freq_bins", BINS)
    config = LiteFocusConfig.paper(**{"min_freq_bins": 1, "sparse_ratio": 0.3, **options})
    return LiteFocusAttnProcessor(original or recorder(), layer="here", freq_bins=freq_bins, config=config)


def attention(**settings: Any) -> Attention:
    torch.manual_seed(0)
    return Attention(**{"query_dim": 16, "heads": 2, "dim_head": 8, **settings}).eval()


def masked(attn: Attention, x: Tensor, **others: Any) -> Tensor:
    """What diffusers' processor makes of x where the focus set is a mask."""
    focus = focus_set(FRAMES, BINS, LiteFocusConfig.paper(sparse_ratio=0.3), layer="here")
    mask = torch.zeros(2, focus.tokens, focus.tokens).masked_fill(~allowed(focus), -torch.inf)
    output: Tensor = AttnProcessor2_0()(attn, x, attention_mask=mask, **others)
    return output


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": True, "out_bias": False},
        {"qk_norm": "layer_norm"},
        {"upcast_attention": True},
        {"rescale_output_factor": 2.0},
        {"norm_num_groups": 4, "residual_connection": True, "bias": True},
        {"heads": 3, "dim_head": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("spatial", [False, True])
def test_equals_diffusers_processor_with_a_mask(settings, spatial, device) -> None:
    attn = attention(**settings)
    x = torch.randn(2, 16, FRAMES, BINS) if spatial else torch.randn(2, FRAMES * BINS, 16)
    expected = masked(attn, x)
    attn.set_processor(processor())
    torch.testing.assert_close(attn.to(device)(x.to(device)).cpu(), expected)


def test_spatial_norm_gets_the_time_embedding() -> None:
    attn = attention(query_dim=32, spatial_norm_dim=6)
    x, temb = torch.randn(2, 32, FRAMES, BINS), torch.randn(2, 6, FRAMES, BINS)
    torch.testing.assert_close(processor()(attn, x, temb=temb), masked(attn, x, temb=temb))


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({}, {"encoder_hidden_states": torch.randn(2, 7, 16)}),
        ({}, {"attention_mask": torch.zeros(2, 1, FRAMES * BINS)}),
        ({}, {"encoder_hidden_states": torch.randn(2, 7, 16), "attention_mask": torch.zeros(2, 1, 7)}),
        ({"min_freq_bins": 5}, {}),
        ({"sparse_ratio": 1.0}, {}),
        ({"freq_bins": 1}, {}),
        ({"min_freq_bins": 5}, {"temb": torch.randn(2, 3), "scale": 0.5}),
    ],
    ids=["cross-attention", "mask", "masked cross-attention", "few bins", "ratio 1", "one bin", "keywords"],
)
def test_hands_on_unchanged(options, call) -> None:
    theirs, attn, x = recorder(), attention(), torch.randn(2, FRAMES * BINS, 16)
    output = processor(theirs, **options)(attn, x, **call)
    (((got_attn, got_x), keywords),) = theirs.calls
    assert got_attn is attn
    assert got_x is x
    assert keywords.keys() == call.keys()
    assert all(keywords[name] is call[name] for name in call)
    assert torch.equal(output, x + 1)


def test_positional_arguments_are_handed_on() -> None:
    theirs, attn, x, text = recorder(), attention(), torch.randn(2, FRAMES * BINS, 16), torch.randn(2, 7, 16)
    processor(theirs)(attn, x, text)
    processor(theirs)(attn, x, text, None, None, 0.5)  # further ones keep their places
    assert theirs.calls == [((attn, x), {"encoder_hidden_states": text}), ((attn, x, text, None, None, 0.5), {})]


def test_original_may_take_fewer_arguments() -> None:
    attn, x, text = attention(), torch.randn(2, FRAMES * BINS, 16), torch.randn(2, 7, 16)
    expected = AttnProcessor2_0()(attn, x, encoder_hidden_states=text)
    torch.testing.assert_close(processor(SlicedAttnProcessor(1))(attn, x, encoder_hidden_states=text), expected)


@pytest.mark.parametrize("tokens", [3, 41])
def test_refuses_tokens_that_are_no_grid(tokens) -> None:
    with pytest.raises(ValueError, match=rf"'here': {tokens} tokens cannot .* 4 frequency bins; .* freq_bins"):
        processor()(attention(), torch.randn(2, tokens, 16))


def test_inference_mode_first_does_not_spoil_gradients_later() -> None:
    ours, attn = processor(), attention()
    x = torch.randn(1, FRAMES * BINS, 16)
    with torch.inference_mode():
        expected = ours(attn, x)
    x.requires_grad_()
    output = ours(attn, x)
    output.sum().backward()
    assert torch.equal(output.detach(), expected)
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_and_pickles_without_its_index(duplicate) -> None:
    ours, attn, x = processor(AttnProcessor2_0()), attention(), torch.randn(1, FRAMES * BINS, 16)
    expected = ours(attn, x)
    other = duplicate(ours)
    assert other.grid._built == {}
    assert other.original is not ours.original
    assert torch.equal(other(attn, x), expected)


def test_refuses_an_unknown_axis() -> None:
    with pytest.raises(ValueError, match="freq_axis must be 'width' or 'height', got 'depth'"):
        LiteFocusAttnProcessor(None, layer="here", freq_bins=4, freq_axis="depth")  # type: ignore[arg-type]


def test_what_is_no_processor_is_refused() -> None:
    with pytest.raises(TypeError, match=r"original must be an attention processor, got 8 \(int\).* are freq_bins="):
        LiteFocusAttnProcessor(8)
    for freq_bins, error in ((0, ValueError), (8.0, TypeError), ("8", TypeError)):
        with pytest.raises(error, match="freq_bins must be an integer"):
            LiteFocusAttnProcessor(freq_bins=freq_bins)


def test_on_a_layer_that_is_not_patched_it_needs_its_bins() -> None:
    """Without them, and without another processor to hand on to, it would run dense without a word."""
    attn, x = attention(), torch.randn(1, FRAMES * BINS, 16)
    with pytest.raises(ValueError, match="has no freq_bins, and its layer is not patched; pass freq_bins"):
        LiteFocusAttnProcessor()(attn, x)
    text = torch.randn(1, 7, 16)
    assert torch.equal(LiteFocusAttnProcessor()(attn, x, text), AttnProcessor2_0()(attn, x, text))
    assert torch.equal(LiteFocusAttnProcessor(AttnProcessor2_0())(attn, x), AttnProcessor2_0()(attn, x))


def test_an_empty_batch() -> None:
    attn = attention()
    attn.set_processor(LiteFocusAttnProcessor(freq_bins=8, config=LiteFocusConfig(sparse_ratio=0.05, min_sampled=2)))
    empty = torch.zeros(0, 40 * 8, 16, requires_grad=True)
    output = attn(empty)
    assert output.shape == (0, 320, 16)
    output.sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == empty.shape
