"""The probe, on attention whose mass is known by construction, and on whole models."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from support.authors import original_unet, run_original
from support.oracle import Grids, biased_attention, bin_and_frame
from support.pipelines import JOINT, build, generate
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import litefocus
from litefocus import LiteFocusConfig, focus_set
from litefocus._probe import QUERIES

FRAMES, BINS = 8, 8  # as many tokens as the probe looks at: no query is left out


pytestmark = pytest.mark.usefixtures("small_grids_focus")


@pytest.fixture
def every_query(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litefocus._probe.QUERIES", 10**6)


class Halving(nn.Module):
    """A block of a UNet that only halves the grid."""

    downsamplers = ()


class OneLayer(nn.Module):
    """A UNet, as far as the probe looks: one attention layer that scores `sharpness` where two tokens are equal, and
    whose values are its tokens. level: how often the grid was halved before.
    """

    def __init__(self, channels: int, sharpness: float, level: int = 0, freq_axis: str = "width") -> None:
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(1, 1, 1), nn.Identity()
        self.level, self.freq_axis = level, freq_axis
        self.attn = Attention(channels, heads=1, dim_head=channels)
        self.down_blocks = nn.ModuleList([*(Halving() for _ in range(level)), nn.ModuleList([self.attn])])
        self.up_blocks = nn.ModuleList()
        with torch.no_grad():
            for weight in (self.attn.to_q.weight, self.attn.to_k.weight):
                weight.copy_(torch.eye(channels) * math.sqrt(sharpness * math.sqrt(channels)))
            self.attn.to_v.weight.copy_(torch.eye(channels))

    def forward(self, tokens: Tensor, **others: Tensor) -> Tensor:
        grid = tokens.shape[1] // BINS << self.level, BINS << self.level
        self.conv_in(torch.zeros(1, 1, *(grid if self.freq_axis == "width" else grid[::-1])))
        return self.conv_out(self.attn(tokens, **others))


def tokens_that_tell(what: int, freq_axis: str = "width", frames: int = FRAMES) -> Tensor:
    """(2, tokens, channels): one-hot of each token's bin (0) or frame (1)."""
    place = [bin_and_frame(token, frames, BINS, freq_axis)[what] for token in range(frames * BINS)]
    return nn.functional.one_hot(torch.tensor(place)).float().expand(2, -1, -1)


@pytest.mark.parametrize("freq_axis", ["width", "height"])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 3.0])
def test_attention_to_the_own_bin_is_measured(sharpness: float, freq_axis: Any) -> None:
    unet = OneLayer(BINS, sharpness, freq_axis=freq_axis)
    with litefocus.probe(unet, freq_bins=BINS, freq_axis=freq_axis, sparse_ratio=0.25, min_sampled=0) as probe:
        unet(tokens_that_tell(0, freq_axis))
    (row,) = probe.layers
    own = math.exp(sharpness)
    assert (row.freq_bins, row.frames, row.calls) == (BINS, FRAMES, 1)
    assert row.same_frequency == pytest.approx(own / (own + BINS - 1), rel=1e-5)


@pytest.mark.parametrize("freq_axis", ["width", "height"])
@pytest.mark.parametrize("level", [0, 2])
def test_attention_to_the_own_frame_lies_on_all_bins_alike(freq_axis: Any, level: int) -> None:
    unet = OneLayer(FRAMES, 2.0, level, freq_axis)
    with litefocus.probe(unet, freq_bins=BINS * 2**level, freq_axis=freq_axis) as probe:
        unet(tokens_that_tell(1, freq_axis))
    (row,) = probe.layers
    assert row.same_frequency == pytest.approx(1 / BINS, rel=1e-5)
    assert str(probe).splitlines()[-1].split()[-2:] == [f"{1 / BINS:.1%}"] * 2


def off(own: float, sampled: float) -> float:
    """Relative error of published sets where the own bin scores log(own), all others 0: values are one-hot bins."""
    dense = torch.tensor([own, *[1.0] * (BINS - 1)])
    focused = torch.tensor([own, *[sampled] * (BINS - 1)])
    dense, focused = dense / dense.sum(), focused / focused.sum()
    return ((focused - dense).norm() / dense.norm()).item()


@pytest.mark.usefixtures("every_query")
def test_errors_where_all_tokens_of_a_bin_are_alike() -> None:
    """There the published sets give the own bin too much, and every weighted sample is exact."""
    unet = OneLayer(BINS, 1.0)
    with litefocus.probe(unet, LiteFocusConfig.paper(sparse_ratio=0.25), freq_bins=BINS) as probe:
        unet(tokens_that_tell(0, frames=80))
    (row,) = probe.layers
    assert row.errors == {
        "given": pytest.approx(off(math.e, 0.25), rel=1e-4),
        "default": pytest.approx(0, abs=1e-5),
        "paper": pytest.approx(off(math.e, 0.1), rel=1e-4),
        "shared sample": pytest.approx(0, abs=1e-5),
        "window alone": pytest.approx(0, abs=1e-5),
    }
    keys = {"given": 80 + 7 * 20, "default": 80 + 7 * 16, "paper": 80 + 7 * 8, "shared sample": 8 * 16}
    for name, expected in keys.items():
        assert row.keys_kept[name] == pytest.approx(expected / 640)


class Recorder:
    """Dense attention that adds up where its mass lies, from diffusers' own scores, and how far off others are."""

    def __init__(self, name: str, grids: Grids, configs: dict[str, LiteFocusConfig]) -> None:
        self.name, self.grids, self.configs = name, grids, configs
        self.same_frequency: list[float] = []
        self.norm = 0.0
        self.off = dict.fromkeys(configs, 0.0)

    def __call__(
        self, attn: Attention, x: Tensor, encoder_hidden_states=None, attention_mask=None, temb=None
    ) -> Tensor:
        if encoder_hidden_states is None and attention_mask is None:
            query, key, value = (attn.head_to_batch_dim(f(x), 4) for f in (attn.to_q, attn.to_k, attn.to_v))
            weights = attn.get_attention_scores(query.flatten(0, 1), key.flatten(0, 1))
            frames, bins = self.grids.found[self.name.split(".transformer_blocks")[0]]
            same = torch.arange(frames * bins) % bins
            self.same_frequency.append((weights * (same[:, None] == same)).sum(dim=-1).mean().item())
            dense = weights.double() @ value.flatten(0, 1).double()
            self.norm += dense.square().sum().item()
            for which, config in self.configs.items():
                added = self.grids.bias(self.name, config, freq_bins=16)
                if added is not None:
                    focused = biased_attention(query, key, value, added).flatten(0, 1)
                    self.off[which] += (focused - dense).square().sum().item()
        return AttnProcessor2_0()(attn, x, encoder_hidden_states, attention_mask, temb)


@pytest.mark.usefixtures("every_query")
def test_every_layer_of_a_pipeline_is_measured_and_its_audio_stays() -> None:
    pipe = build("AudioLDM 2")
    expected = generate(pipe, 1.0)
    asked = LiteFocusConfig(sparse_ratio=0.3, min_sampled=0, min_freq_bins=4)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with litefocus.probe(pipe, asked) as probe:
        audio = generate(pipe, 1.0)
    assert (audio == expected).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert [row.name for row in probe.layers] == [row.name for row in litefocus.status(pipe).layers]

    recorders, grids = {}, Grids(pipe.unet)
    configs = {"given": asked, "default": LiteFocusConfig(), "paper": LiteFocusConfig.paper()}
    for name, module in pipe.unet.named_modules():
        if isinstance(module, Attention):
            recorders[name] = Recorder(name, grids, configs)
            module.set_processor(recorders[name])
    generate(pipe, 1.0)
    for row in probe.layers:
        recorder = recorders[row.name]
        assert row.calls == len(recorder.same_frequency) == 2
        assert row.same_frequency == pytest.approx(sum(recorder.same_frequency) / 2, rel=1e-4)
        for name in configs:
            error = (recorder.off[name] / recorder.norm) ** 0.5
            assert row.errors[name] == pytest.approx(error, rel=1e-3, abs=1e-5), (row.name, name)
        assert (row.errors["given"] > 0.01) == (row.freq_bins >= 4)  # others stay dense


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
    assert mode.elements == QUERIES * frames * BINS  # the scores that are looked at; all would be 125 times as many


def test_prints_a_table() -> None:
    unet = OneLayer(BINS, 1.0)
    probe = litefocus.probe(unet, LiteFocusConfig.paper(sparse_ratio=0.25), freq_bins=BINS)
    assert probe.layers[0].same_frequency is None
    assert repr(probe).splitlines()[-1].split() == ["8", "1"] + ["-"] * 8
    assert "nothing measured yet" in repr(probe)
    with probe:
        unet(tokens_that_tell(0))
    errors = [f"{off(math.e, 0.25):.1%}", "dense", f"{off(math.e, 0.125):.1%}", "dense", "dense"]
    cells = ["8", "1", "8", *errors, "28.0%", "12.5%"]
    assert repr(probe).splitlines()[-1].split() == cells
    assert probe.advice in repr(probe)
    for cell in cells:
        assert f"<td>{cell}</td>" in probe._repr_html_()
    with probe:  # a second block adds to the first
        unet(tokens_that_tell(0))
    assert probe.layers[0].calls == 2


# --- the advice ------------------------------------------------------------------------------------------------------


def test_the_default_is_advised_where_what_was_asked_about_is_biased() -> None:
    """Attention that is nearly even: published sets give the own bin ten times its due; one sample for all would do."""
    unet, tokens = OneLayer(BINS, 0.5), tokens_that_tell(0, frames=300)
    torch.manual_seed(0)
    tokens = tokens + 0.3 * torch.randn(tokens.shape)
    with litefocus.probe(unet, LiteFocusConfig.paper(), freq_bins=BINS) as probe:
        unet(tokens)
    errors = probe.layers[0].errors
    assert errors["given"] == errors["paper"] == pytest.approx(off(math.exp(0.5), 0.1), rel=0.1)
    assert 0.05 < errors["default"] < errors["shared sample"] < 0.2
    assert probe.advice == (
        f"default: {errors['default']:.0%} from dense on average, at most {errors['default']:.0%} (down_blocks.0.0): "
        f"use it; shared sample would do too ({errors['shared sample']:.0%}), with fewer keys"
    )


def test_the_default_is_advised_where_attention_is_near() -> None:
    """Scores that fall off with the distance in time: a Gaussian of some 20 frames."""
    frames, channels = 1200, 64
    torch.manual_seed(0)
    phases = torch.arange(frames)[:, None] * torch.randn(channels // 2) / 24
    near = torch.cat([phases.cos(), phases.sin()], dim=1) * (2 / channels) ** 0.5  # of length 1
    unet = OneLayer(channels, 12.0)
    with litefocus.probe(unet, freq_bins=BINS) as probe:
        unet(near.repeat_interleave(BINS, dim=0)[None])
    (row,) = probe.layers
    assert row.errors["window alone"] < 0.2
    assert probe.advice.startswith(f"default: {row.errors['default']:.0%} from dense on average")
    # and not the window alone, which has hardly fewer keys
    shared = f"{row.errors['shared sample']:.0%}"
    assert probe.advice.endswith(f"use it; shared sample would do too ({shared}), with fewer keys")


def needle(frames: int, place: int, share: float) -> tuple[OneLayer, Tensor]:
    """Attention to the own bin, and of `share` of its mass to a single token of bin 0, in frame `place`."""
    tokens = torch.cat([tokens_that_tell(0, frames=frames)[:1], torch.zeros(1, frames * BINS, 2)], dim=2)
    tokens[..., BINS] = 1
    tokens[:, place * BINS, :] = 0
    tokens[:, place * BINS, BINS + 1] = 1
    unet, sharp = OneLayer(BINS + 2, 0.0), 12.0
    scale = (BINS + 2) ** 0.5
    with torch.no_grad():
        for weight in (unet.attn.to_q.weight, unet.attn.to_k.weight):
            weight[:BINS, :BINS] = torch.eye(BINS) * (sharp * scale) ** 0.5
        unet.attn.to_q.weight[BINS, BINS] = 1
        odds = share / (1 - share) * frames
        unet.attn.to_k.weight[BINS, BINS + 1] = scale * (sharp + math.log(odds))
        unet.attn.to_v.weight[BINS, BINS] = 0  # all but bins and needle count as nothing
    return unet, tokens


def frames_sampled(frames: int, config: LiteFocusConfig) -> set[int]:
    """Frames of bin 0 that the queries of other bins see."""
    keys = focus_set(frames, BINS, config, layer="down_blocks.0.0").keys[1]
    return {token // BINS for token in keys.tolist() if token % BINS == 0}


def test_the_paper_is_advised_where_a_weight_overrates_a_single_token() -> None:
    frames = 320
    seen_by_both = frames_sampled(frames, LiteFocusConfig()) & frames_sampled(frames, LiteFocusConfig.paper())
    unet, tokens = needle(frames, min(seen_by_both), share=0.1)
    with litefocus.probe(unet, freq_bins=BINS) as probe:
        unet(tokens)
    (row,) = probe.layers
    assert row.errors["default"] > 0.2
    assert row.errors["paper"] < 0.05
    assert probe.advice.startswith(f"paper: {row.errors['paper']:.0%} from dense on average, at most")
    assert "use it" in probe.advice


def test_more_keys_are_advised_where_single_tokens_are_missed() -> None:
    frames, share = 320, 0.2
    missed = min(set(range(frames)) - frames_sampled(frames, LiteFocusConfig()))
    unet, tokens = needle(frames, missed, share)
    with litefocus.probe(unet, freq_bins=BINS) as probe:
        unet(tokens)
    (row,) = probe.layers
    # the own bin gets all of the mass, not 0.8 of it; of 8 bins one holds the needle, and sees it
    error = share * math.sqrt(2) / math.hypot(1 - share, share)
    assert row.errors["default"] == pytest.approx(error, rel=0.15)
    ratio = 0.05 * (row.errors["default"] / 0.2) ** 2
    assert probe.advice.endswith(
        f"in 1 of 1 layers, such as down_blocks.0.0, few tokens hold most attention; raise sparse_ratio to {ratio:.2g}"
    )


# --- what is looked at, and what is refused --------------------------------------------------------------------------


def test_every_call_looks_at_other_queries_and_every_run_at_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litefocus._probe.QUERIES", 4)
    torch.manual_seed(0)
    unet, states = OneLayer(BINS, 3.0), torch.randn(1, 100 * BINS, BINS)

    def means(calls: int) -> list[float]:
        found = []
        probe = litefocus.probe(unet, freq_bins=BINS)
        for _ in range(calls):
            with probe:
                unet(states)
            found.append(probe.layers[0].same_frequency * probe.layers[0].calls)
        return [now - before for now, before in zip(found, [0.0, *found], strict=False)]

    first = means(4)
    assert len({round(mass, 9) for mass in first}) == 4
    assert means(4) == first


@pytest.mark.parametrize("name", ["encoder_hidden_states", "attention_mask"])
def test_calls_that_a_patch_hands_on_are_not_measured(name: str) -> None:
    other = torch.ones(2, FRAMES * BINS, BINS) if name == "encoder_hidden_states" else torch.zeros(2, 1, FRAMES * BINS)
    unet, states = OneLayer(BINS, 1.0), tokens_that_tell(0)
    with litefocus.probe(unet, freq_bins=BINS) as probe:
        unet(states)
        before = probe.layers
        unet(states, **{name: other})
        unet.attn(hidden_states=states, **{name: other})
        unet.attn(states, *([other] if name == "encoder_hidden_states" else [None, other]))
    assert probe.layers == before
    assert probe.layers[0].calls == 1


def test_masked_calls_of_the_authors_code_are_not_measured() -> None:
    unet = original_unet("audioldm2 full")
    layer = unet.input_blocks[4][1].transformer_blocks[0].attn1
    states, mask = torch.randn(1, 32, layer.to_q.in_features), torch.ones(1, 32, dtype=torch.bool)
    with torch.no_grad(), litefocus.probe(unet) as probe:
        unet.input_blocks[0][0](torch.zeros(1, 8, 8, 16))  # shows the grid: 4 frames x 8 bins at this layer
        layer(states)
        layer(states, mask=mask)
        layer(states, None, mask)
    assert [row.calls for row in probe.layers if row.calls] == [1]


def test_a_bare_unets_input_must_have_its_bins() -> None:
    unet = build("AudioLDM").unet
    inputs: dict[str, Any] = {"encoder_hidden_states": None, "class_labels": torch.zeros(1, JOINT)}
    with torch.no_grad(), litefocus.probe(unet, freq_bins=8) as probe:
        with pytest.raises(
            ValueError, match=r"was probed for 8 frequency bins on the width axis.* has 16 there"
        ) as error:
            unet(torch.zeros(1, 8, 25, 16), 7, **inputs)
        assert "patch" not in str(error.value)
        unet(torch.zeros(1, 8, 25, 8), 7, **inputs)
    assert {(row.freq_bins, row.frames, row.calls) for row in probe.layers} == {(4, 13, 1), (2, 7, 1), (1, 4, 1)}
    unet(torch.zeros(1, 8, 25, 16), 7, **inputs)  # and is free again outside


def test_a_patch_inside_of_a_block_is_refused_and_one_before_it_too() -> None:
    unet = OneLayer(BINS, 1.0)
    probe = litefocus.probe(unet, freq_bins=BINS)
    with probe:
        with pytest.raises(ValueError, match=r"probe is measuring this UNet's dense attention; leave its block"):
            litefocus.patch(unet, freq_bins=BINS)
        unet(tokens_that_tell(0))
    assert probe.layers[0].same_frequency == pytest.approx(math.e / (math.e + BINS - 1), rel=1e-5)
    with (
        litefocus.patch(unet, freq_bins=BINS),
        pytest.raises(RuntimeError, match=r"was patched after the probe"),
        probe,
    ):
        pass
    with probe:
        twin = copy.deepcopy(unet)  # which nobody measures
        twin(tokens_that_tell(0))
        litefocus.patch(twin)
        unet(tokens_that_tell(0))
    assert probe.layers[0].calls == 2


@pytest.mark.parametrize(
    "again", [lambda probe, unet: probe, lambda probe, unet: litefocus.probe(unet, freq_bins=BINS)]
)
def test_a_block_inside_of_a_block_is_refused_and_no_call_counts_twice(again: Callable[..., Any]) -> None:
    unet = OneLayer(BINS, 1.0)
    probe = litefocus.probe(unet, freq_bins=BINS)
    with probe:
        with pytest.raises(RuntimeError, match="measuring this UNet already"), again(probe, unet):
            pass
        unet(tokens_that_tell(0))
    assert probe.layers[0].calls == 1
    assert not unet.attn._forward_pre_hooks
    assert not unet._forward_pre_hooks
    unet(tokens_that_tell(0))
    assert probe.layers[0].calls == 1


def test_a_failing_block_ends_the_measurement() -> None:
    unet = OneLayer(BINS, 1.0)
    with pytest.raises(KeyError, match="mine"), litefocus.probe(unet, freq_bins=BINS):
        raise KeyError("mine")
    assert not unet.attn._forward_pre_hooks
    assert not unet._forward_pre_hooks
    litefocus.patch(unet, freq_bins=BINS)  # it measures no longer


def test_refusals() -> None:
    unet = OneLayer(BINS, 1.0)
    with pytest.raises(RuntimeError, match="saw no self-attention call"), litefocus.probe(unet, freq_bins=BINS):
        pass
    with litefocus.patch(unet, freq_bins=BINS), pytest.raises(ValueError, match=r"is patched.*unpatch\(pipe\) first"):
        litefocus.probe(unet, freq_bins=BINS)
