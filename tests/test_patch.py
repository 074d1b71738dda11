"""patch, unpatch and status on complete pipelines, against diffusers' own attention under a mask."""

import copy
import gc
import subprocess
import sys
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from support.oracle import install_oracle
from support.pipelines import BUILDERS, build, generate
from support.small import BOTH, assert_same, dense, focus, patch, run, same_processors

import litefocus
import litefocus.__main__ as report
from litefocus import LiteFocusConfig, _layers, _patch

PAPER = LiteFocusConfig.paper()


@pytest.fixture(params=BUILDERS)
def pipe(request: pytest.FixtureRequest, device: torch.device) -> Any:
    return build(request.param).to(device)


@pytest.mark.parametrize("seconds", [1.0, 1.32, 2.6])  # 25, 33 and 65 latent frames: odd at several levels
@pytest.mark.parametrize(
    "config",
    [LiteFocusConfig(min_sampled=4), PAPER, LiteFocusConfig.paper(sparse_ratio=0.3, seed=5, min_freq_bins=2)],
    ids=["weighted", "paper", "paper, every level"],
)
@pytest.mark.usefixtures("one_sample", "small_grids_focus")
def test_audio_is_that_of_masked_dense_attention(pipe, seconds, config) -> None:
    dense = generate(pipe, seconds)
    oracle = copy.deepcopy(pipe)
    install_oracle(oracle.unet, config)
    expected = generate(oracle, seconds)
    litefocus.patch(pipe, config)
    np.testing.assert_allclose(generate(pipe, seconds), expected, atol=1e-4, rtol=1e-3)
    assert np.abs(expected - dense).max() > 5e-3  # so that doing nothing would not pass


@pytest.mark.usefixtures("one_sample")
@pytest.mark.parametrize(("far", "more"), [(0, 0), (3, 8 * 3)])
def test_time_windows_are_those_of_masked_dense_attention(far, more, device) -> None:
    pipe = build("AudioLDM 2").to(device)
    config = LiteFocusConfig.paper(time_window=21, far_sampled=far, reweight=far > 0)
    oracle = copy.deepcopy(pipe)
    install_oracle(oracle.unet, config)
    expected = generate(oracle, 7.0, steps=1)
    litefocus.patch(pipe, config)
    assert litefocus.status(pipe, seconds=7).layers[0].keys_kept == pytest.approx((64 + 12 + 7 * 8 + more) / (88 * 8))
    np.testing.assert_allclose(generate(pipe, 7.0, steps=1), expected, atol=1e-5, rtol=1e-4)
    litefocus.patch(pipe, PAPER)
    assert np.abs(generate(pipe, 7.0, steps=1) - expected).max() > 1e-3


def test_ratio_one_is_dense(pipe) -> None:
    dense = generate(pipe)
    litefocus.patch(pipe, sparse_ratio=1.0, time_window=None)
    assert {layer.state for layer in litefocus.status(pipe).layers} == {"dense"}
    assert np.array_equal(generate(pipe), dense)


def test_unpatch_restores_the_objects_and_the_audio(pipe) -> None:
    before, dense, modules = pipe.unet.attn_processors, generate(pipe), [set(vars(m)) for m in pipe.unet.modules()]
    litefocus.patch(pipe, PAPER)
    assert not np.array_equal(generate(pipe), dense)
    litefocus.unpatch(pipe)
    assert same_processors(before, pipe.unet)
    assert np.array_equal(generate(pipe), dense)
    assert [set(vars(module)) for module in pipe.unet.modules()] == modules


def test_patched_audio_repeats(pipe) -> None:
    litefocus.patch(pipe, PAPER)
    first = generate(pipe)
    torch.manual_seed(99)
    assert np.array_equal(generate(pipe), first)


def test_importing_is_light() -> None:
    script = (
        "import sys, torch; before = set(sys.modules); import litefocus; new = set(sys.modules) - before; "
        "print(sorted(m for m in new if m.split('.')[0] in ('diffusers', 'transformers') or m == 'torch._dynamo'))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_report_for_bugs(capsys: pytest.CaptureFixture[str]) -> None:
    report.main()
    lines = capsys.readouterr().out
    assert f"torch {torch.__version__.split('+')[0]}" in lines
    assert "diffusers.AudioLDM2Pipeline: supported" in lines


@pytest.mark.parametrize("already", [False, True], ids=["bare", "patched"])
@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
def test_a_failure_midway_leaves_the_unet_as_it_was(make: Any, already: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = make()
    if already:
        patch(unet)
    modules = [(type(module), dict(vars(module))) for module in unet.modules()]
    calls = []

    def fail_at_last(layer: Any, context: Any) -> None:
        install(layer, context)
        calls.append(layer)
        if len(calls) == len(litefocus.status(unet).layers):
            raise RuntimeError("full")

    install = _layers.install
    monkeypatch.setattr(_patch, "install", fail_at_last)
    with pytest.raises(RuntimeError, match="full"):
        patch(unet, 2)
    assert [(type(module), dict(vars(module))) for module in unet.modules()] == modules
    assert_same(run(unet), focus(1, make) if already else dense(make))


def left(unet: Any) -> Any:
    with patch(unet) as handle:
        run(unet)
    return handle


def unpatched(unet: Any) -> Any:
    handle = patch(unet)
    litefocus.unpatch(unet)
    return handle


def patched_again(unet: Any) -> Any:
    return [patch(unet, 1), patch(unet, 2)]


def status(unet: Any) -> Any:
    patch(unet)
    return litefocus.status(unet)


def probe(unet: Any) -> Any:
    with litefocus.probe(unet) as probe:
        run(unet)
    return probe


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("show", [patch, left, unpatched, patched_again, status, probe, litefocus.probe])
def test_what_is_shown_keeps_no_weights_alive(make: Any, show: Any) -> None:
    unet = make()
    alive = [weakref.ref(parameter) for parameter in unet.parameters()]
    kept = show(unet)
    shown = repr(kept)
    del unet
    gc.collect()
    assert not [ref for ref in alive if ref() is not None]
    assert repr(kept) == shown or "gone" in repr(kept)
    getattr(kept, "_repr_html_", lambda: None)()
