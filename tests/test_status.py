"""What `status` tells: rows for the machine, a table by level for the person, a line of advice."""

import inspect
import math
import re
import typing
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import SlicedAttnProcessor
from support.pipelines import BUILDERS, PUBLISHED, build, generate, published_unet
from support.recorder import Recorder
from torch.utils.flop_counter import FlopCounterMode

import litefocus
from litefocus import LiteFocusConfig
from litefocus.config import ConfigOptions

PAPER = LiteFocusConfig.paper()


@pytest.fixture(params=BUILDERS)
def pipe(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


def test_prints_a_row_for_every_level(pipe) -> None:
    handle = litefocus.patch(pipe, PAPER, sparse_ratio=0.2)
    status = litefocus.status(pipe, seconds=20)
    lines = repr(status).splitlines()
    assert lines[0].endswith(f"of {len(status.layers)} self-attention layers focus")
    assert "sparse_ratio=0.2" in lines[1]
    assert lines[2].startswith("at 20 s: ")
    assert lines[3].startswith("decoding: whole, ")
    assert " ".join(lines[4].split()) == "freq bins frames layers state keys kept share of the step"
    level = {bins: sum(layer.freq_bins == bins for layer in status.layers) for bins in (8, 4, 2)}
    rows = [line.split()[:-1] for line in lines[5:]]
    assert rows == [
        ["8", "250", str(level[8]), "focus", "30.0%"],
        ["4", "125", str(level[4]), "dense", "100.0%"],
        ["2", "63", str(level[2]), "dense", "100.0%"],
    ]
    assert repr(handle) == repr(litefocus.status(pipe))
    assert handle._repr_html_() == litefocus.status(pipe)._repr_html_()


def test_shares_of_the_step_are_those_of_attention(pipe) -> None:
    """A layer's scores and values cost 4 tokens^2 channels FLOPs, of which the patch keeps a share."""
    litefocus.patch(pipe)
    status = litefocus.status(pipe, seconds=80)
    for layer, flops in zip(status.layers, status.flops.attention, strict=True):
        width = pipe.unet.get_submodule(layer.name).to_q.out_features
        assert flops == pytest.approx(4 * (layer.frames * layer.freq_bins) ** 2 * width * layer.keys_kept)
    of_level = sum(
        flops for layer, flops in zip(status.layers, status.flops.attention, strict=True) if layer.freq_bins == 8
    )
    assert repr(status).splitlines()[5].split()[-1] == f"{of_level / status.flops.patched:.1%}"


def test_tiled_decoding_is_shown_and_taken_back_by_unpatch() -> None:
    pipe = build("AudioLDM 2")
    litefocus.patch(pipe)
    litefocus.tile_decoding(pipe)
    status = litefocus.status(pipe, seconds=36000)
    assert (status.tiles.seconds, status.advice) == (10.24, None)
    assert re.search(r"^decoding: in tiles of 10.24 s, \d+ MiB \(estimated\)$", repr(status), re.MULTILINE)
    litefocus.unpatch(pipe)
    assert litefocus.status(pipe).tiles is None


def test_irregular_layers_are_named() -> None:
    pipe = build("AudioLDM 2")
    litefocus.patch(pipe)
    names = [layer.name for layer in litefocus.status(pipe).layers if layer.freq_bins == 8]
    for name in names[:4]:
        pipe.unet.get_submodule(name).set_processor(SlicedAttnProcessor(1))
    row = repr(litefocus.status(pipe)).splitlines()[3]
    assert row.split()[:3] == ["8", str(len(names)), "focus;"]
    assert row.endswith(f"{names[2]} overwritten by SlicedAttnProcessor; and 1 more")
    assert names[3] not in row


def test_in_a_notebook(pipe) -> None:
    html = litefocus.status(pipe, seconds=20)._repr_html_()
    rows = re.findall("<tr>(.*?)</tr>", html)
    assert len(rows) == 4
    layers = sum(layer.freq_bins == 8 for layer in litefocus.status(pipe).layers)
    assert rows[1].startswith(f"<td>8</td><td>250</td><td>{layers}</td><td>dense</td><td>100.0%</td>")
    assert "not patched" in html


@pytest.mark.parametrize(
    ("options", "seconds", "advice"),
    [
        ({}, 10, None),
        ({}, 600, None),
        ({"time_window": None}, 20, None),
        ({"time_window": None}, 600, "grows with the square of the length; leave time_window at its default of 256"),
        ({"far_sampled": 0}, 600, "with far_sampled=0 a query attends to nothing outside of its time window"),
        ({"reweight": False}, 600, "without reweight, sampled keys weigh too little; leave it on"),
        ({}, 36000, "litefocus.tile_decoding(pipe) decodes in the memory of one tile"),
    ],
)
def test_advice(options, seconds, advice) -> None:
    pipe = build("AudioLDM 2")
    assert litefocus.status(pipe, seconds=seconds).advice is None  # not patched
    litefocus.patch(pipe, **options)
    status = litefocus.status(pipe, seconds=seconds)
    if advice is None:
        assert status.advice is None
    else:
        assert advice in status.advice
        assert status.advice in repr(status).splitlines()


@pytest.mark.parametrize("seconds", [0.28, 0.57, 1.005, 1.12, 20])
def test_status_counts_frames_as_the_pipeline_does(pipe, seconds) -> None:
    shapes = []
    pipe.unet.register_forward_pre_hook(lambda _module, args: shapes.append(args[0].shape))
    generate(pipe, seconds, steps=1)
    pipe.unet._forward_pre_hooks.clear()
    rows = litefocus.status(pipe, seconds=seconds).layers
    assert {row.frames for row in rows if row.freq_bins == 8} == {math.ceil(shapes[0][2] / 2)}


@pytest.mark.parametrize(("seconds", "error"), [(0, ValueError), (math.nan, ValueError), ("ten", TypeError)])
def test_status_refuses_silly_lengths(seconds, error) -> None:
    with pytest.raises(error, match="seconds must be"):
        litefocus.status(build("AudioLDM"), seconds=seconds)


@pytest.mark.parametrize("function", [litefocus.patch, litefocus.probe])
def test_help_and_type_checkers_show_the_options(function) -> None:
    defaults = LiteFocusConfig()
    shown = inspect.signature(function).parameters
    for name, kind in LiteFocusConfig.__annotations__.items():
        assert shown[name].default == getattr(defaults, name)
        assert shown[name].annotation == kind
    assert set(typing.get_type_hints(ConfigOptions)) == set(LiteFocusConfig.__annotations__)
    assert ConfigOptions.__annotations__.keys() == LiteFocusConfig.__annotations__.keys()


# --- before a patch, what it would gain ------------------------------------------------------------------------------


def with_published_unet(name: str) -> Any:
    """A pipeline whose UNet has the published shapes, and no weights."""
    pipe = build("AudioLDM")
    pipe.unet = published_unet(name)
    return pipe


def test_estimate_agrees_with_a_count_of_every_operation() -> None:
    pipe = with_published_unet("audioldm2")
    frames = 1000
    inputs = {
        "sample": torch.empty(1, 8, frames, 16, device="meta"),
        "timestep": torch.empty((), device="meta"),
        "encoder_hidden_states": torch.empty(1, 8, 768, device="meta"),
        "encoder_hidden_states_1": torch.empty(1, 8, 1024, device="meta"),
    }
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pipe.unet(**inputs)
    flops = litefocus.status(pipe, seconds=40).flops
    assert flops is not None
    assert flops.dense == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(("name", "ratio"), [("audioldm-s", 1.65), ("audioldm2", 1.78), ("audioldm2-large", 2.08)])
def test_estimated_saving_at_80_seconds(name, ratio) -> None:
    """The limits were counted by hand, layer by layer, at 1024 frames where F = 8."""
    pipe = with_published_unet(name)
    litefocus.patch(pipe, PAPER, min_freq_bins=2)
    status = litefocus.status(pipe, seconds=81.92)
    assert status.flops is not None
    assert status.flops.ratio == pytest.approx(ratio, abs=0.02)
    kept = {layer.freq_bins: layer.keys_kept for layer in status.layers}
    assert kept == {8: 1738 / 8192, 4: (512 + 3 * 51) / 2048, 2: (256 + 26) / 512}
    assert f"{status.flops.ratio:.2f}x less arithmetic" in repr(status)


@pytest.mark.parametrize("name", PUBLISHED)
def test_before_a_patch_the_gain_is_that_which_it_has_afterwards(name: str) -> None:
    pipe = with_published_unet(name)
    before = litefocus.status(pipe, seconds=80)
    assert "would become, by litefocus.patch(pipe)," in repr(before)
    litefocus.patch(pipe)
    after = litefocus.status(pipe, seconds=80)
    assert before.flops == after.flops
    assert after.flops.ratio > 1.4
    assert "would" not in repr(after)


def test_layers_that_would_stay_dense_are_no_gain() -> None:
    pipe = build("AudioLDM 2")
    every = litefocus.status(pipe, seconds=80).flops
    first = litefocus.status(pipe).layers[0].name
    pipe.unet.get_submodule(first).set_processor(Recorder(SlicedAttnProcessor(1)))
    before = litefocus.status(pipe, seconds=80).flops
    assert every.patched < before.patched < before.dense == every.dense
    with pytest.warns(UserWarning, match="1: its processor is Recorder"):
        litefocus.patch(pipe)
    assert litefocus.status(pipe, seconds=80).flops == before
