"""The probe, on attention whose mass is known by construction, and on whole models."""

import math
import sys
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from support.authors import original_unet, run_original
from support.oracle import Grids, allowed, bin_and_frame
from support.pipelines import build, generate
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import litefocus
from litefocus import LiteFocusConfig, focus_set
from litefocus._probe import QUERIES

FRAMES, BINS = 8, 8  # as many tokens as the probe looks at: no query is left out


class OneLayer(nn.Module):
    """A UNet, as far as the probe looks: one attention layer that scores `sharpness` where two tokens are equal."""

    def __init__(self, channels: int, sharpness: float) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(1, 1, 1)
        self.down_blocks = nn.ModuleList([nn.ModuleList([Attention(channels, heads=1, dim_head=channels)])])
        self.up_blocks = nn.ModuleList()
        with torch.no_grad():
            for weight in (self.attn.to_q.weight, self.attn.to_k.weight):
                weight.copy_(torch.eye(channels) * math.sqrt(sharpness * math.sqrt(channels)))

    @property
    def attn(self) -> Attention:
        return self.down_blocks[0][0]

    def forward(self, tokens: Tensor) -> Tensor:
        return self.attn(tokens)


def tokens_that_tell(what: int, freq_axis: str) -> Tensor:
    """(2, tokens, channels): one-hot of each token's bin (0) or frame (1)."""
    place = [bin_and_frame(token, FRAMES, BINS, freq_axis)[what] for token in range(FRAMES * BINS)]
    return nn.functional.one_hot(torch.tensor(place)).float().expand(2, -1, -1)


@pytest.mark.parametrize("freq_axis", ["width", "height"])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 3.0])
def test_attention_to_the_own_bin_is_measured(sharpness: float, freq_axis: Any) -> None:
    unet = OneLayer(BINS, sharpness)
    with litefocus.probe(unet, freq_bins=BINS, freq_axis=freq_axis, sparse_ratio=0.25) as probe:
        unet(tokens_that_tell(0, freq_axis))
    (row,) = probe.layers
    own = math.exp(sharpness)
    assert (row.freq_bins, row.frames, row.calls) == (BINS, FRAMES, 1)
    assert row.same_frequency.mass == pytest.approx(own / (own + BINS - 1), rel=1e-5)
    assert row.same_frequency.uniform == pytest.approx(1 / BINS)
    sampled = 2 / FRAMES  # of every other bin
    assert row.focus.mass == pytest.approx((own + (BINS - 1) * sampled) / (own + BINS - 1), rel=1e-5)
    assert row.focus.uniform == pytest.approx((1 + (BINS - 1) * sampled) / BINS)
    assert row.window.mass == row.window.uniform == pytest.approx(1)  # 256 frames: longer than the clip


@pytest.mark.parametrize("freq_axis", ["width", "height"])
def test_attention_to_the_own_frame_is_measured(freq_axis: Any) -> None:
    unet = OneLayer(FRAMES, 2.0)
    with litefocus.probe(unet, freq_bins=BINS, freq_axis=freq_axis, time_window=4) as probe:
        unet(tokens_that_tell(1, freq_axis))
    (row,) = probe.layers
    near = [sum(abs(t - u) <= 2 for u in range(FRAMES)) for t in range(FRAMES)]
    own = math.exp(2.0)
    expected = sum((own + n - 1) / (own + FRAMES - 1) for n in near) / FRAMES
    assert row.window.mass == pytest.approx(expected, rel=1e-5)
    assert row.window.uniform == pytest.approx(sum(near) / FRAMES**2)
    assert row.same_frequency.mass == pytest.approx(1 / BINS, rel=1e-5)


class Recorder:
    """Dense attention that adds up where its mass lies, from diffusers' own scores."""

    def __init__(self, name: str, grids: Grids, config: LiteFocusConfig) -> None:
        self.name, self.grids, self.config = name, grids, config
        self.own_bin: list[float] = []
        self.focus: list[float] = []

    def __call__(
        self, attn: Attention, x: Tensor, encoder_hidden_states=None, attention_mask=None, temb=None
    ) -> Tensor:
        if encoder_hidden_states is None and attention_mask is None:
            weights = attn.get_attention_scores(*(attn.head_to_batch_dim(f(x)) for f in (attn.to_q, attn.to_k)))
            frames, bins = self.grids.found[self.name.split(".transformer_blocks")[0]]
            same = torch.arange(frames * bins) % bins
            inside = allowed(focus_set(frames, bins, self.config, layer=self.name))
            self.own_bin.append((weights * (same[:, None] == same)).sum(dim=-1).mean().item())
            self.focus.append((weights * inside).sum(dim=-1).mean().item())
        return AttnProcessor2_0()(attn, x, encoder_hidden_states, attention_mask, temb)


def test_every_layer_of_a_pipeline_is_measured_and_its_audio_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["litefocus._probe"], "QUERIES", 10**6)  # all, as the recorder does
    pipe = build("AudioLDM 2")
    expected = generate(pipe, 1.0)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with litefocus.probe(pipe, sparse_ratio=0.3) as probe:
        audio = generate(pipe, 1.0)
    assert (audio == expected).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert [row.name for row in probe.layers] == [row.name for row in litefocus.status(pipe).layers]

    recorders, grids = {}, Grids(pipe.unet)
    for name, module in pipe.unet.named_modules():
        if isinstance(module, Attention):
            recorders[name] = Recorder(name, grids, LiteFocusConfig.paper(sparse_ratio=0.3))
            module.set_processor(recorders[name])
    generate(pipe, 1.0)
    for row in probe.layers:
        recorder = recorders[row.name]
        assert row.calls == len(recorder.own_bin) == 2
        assert row.same_frequency.mass == pytest.approx(sum(recorder.own_bin) / 2, rel=1e-4)
        assert row.focus.mass == pytest.approx(sum(recorder.focus) / 2, rel=1e-4)


def test_the_authors_code_is_measured_and_unchanged() -> None:
    unet = original_unet("audioldm2 full")
    expected = run_original(unet)
    with litefocus.probe(unet, freq_bins=16) as probe:
        found = run_original(unet)
    assert torch.equal(found, expected)
    assert {row.calls for row in probe.layers} == {1}
    assert {row.freq_bins for row in probe.layers} == {8, 4, 2}
    assert "forward" not in {name for module in unet.modules() for name in module.__dict__}


class Largest(TorchDispatchMode):
    """The largest tensor made inside."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for x in output if isinstance(output, (tuple, list)) else [output]:
            self.elements = max(self.elements, x.numel() if isinstance(x, Tensor) else 0)
        return output


def test_memory_is_bounded() -> None:
    unet = OneLayer(BINS, 1.0)
    frames = 1000
    states = torch.randn(2, frames * BINS, BINS)
    with Largest() as mode, litefocus.probe(unet, freq_bins=BINS):
        unet(states)
    assert mode.elements == 3 * QUERIES * frames * BINS  # the three sets of keys; all scores would be 42 times as many


def test_prints_a_table() -> None:
    unet = OneLayer(BINS, 1.0)
    probe = litefocus.probe(unet, freq_bins=BINS)
    assert probe.layers[0].same_frequency is None
    assert repr(probe).splitlines()[-1].split() == ["down_blocks.0.0", "8"] + ["-"] * 7
    with probe:
        unet(tokens_that_tell(0, "width"))
    cells = ["down_blocks.0.0", "8", "8", "28.0%", "12.5%", "37.0%", "23.4%", "100.0%", "100.0%"]
    assert repr(probe).splitlines()[-1].split() == cells
    for cell in cells:
        assert f"<td>{cell}</td>" in probe._repr_html_()
    with probe:  # a second block adds to the first
        unet(tokens_that_tell(0, "width"))
    assert probe.layers[0].calls == 2


def test_a_failing_block_ends_the_measurement() -> None:
    unet = OneLayer(BINS, 1.0)
    with pytest.raises(KeyError, match="mine"), litefocus.probe(unet, freq_bins=BINS):
        raise KeyError("mine")
    assert not unet.attn._forward_pre_hooks


def test_refusals() -> None:
    unet = OneLayer(BINS, 1.0)
    with pytest.raises(RuntimeError, match="saw no self-attention call"), litefocus.probe(unet, freq_bins=BINS):
        pass
    with litefocus.patch(unet, freq_bins=BINS), pytest.raises(ValueError, match=r"is patched.*unpatch\(pipe\) first"):
        litefocus.probe(unet, freq_bins=BINS)
    with pytest.raises(TypeError, match=r"probe\(\) has no option 'sparse_ration'. Did you mean 'sparse_ratio'"):
        litefocus.probe(unet, freq_bins=BINS, sparse_ration=0.2)
    with pytest.raises(ValueError, match="freq_bins cannot be read"):
        litefocus.probe(unet)
    with pytest.raises(ValueError, match="freq_axis must be"):
        litefocus.probe(unet, freq_bins=BINS, freq_axis="depth")
    unet.down_blocks = nn.ModuleList()
    with pytest.raises(ValueError, match="no self-attention layer"):
        litefocus.probe(unet, freq_bins=BINS)
