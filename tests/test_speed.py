"""examples/evidence/speed.py: methods compute what their names say, and what is measured is written down."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import compare
import methods
import pytest
import report
import speed
import torch
from diffusers import AudioLDM2Pipeline
from support.embedded import embedded, step
from support.recorder import Recorder
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import litefocus
from litefocus import LiteFocusConfig

FRAMES, BINS = 40, 4
FEW = LiteFocusConfig(min_sampled=4)  # on short clips the default floor keeps all keys


def recorder() -> Recorder:
    """In place of a layer's processor: returns what it is called with."""
    return Recorder(lambda attn, x: x)


@pytest.fixture(scope="module")
def pipe() -> AudioLDM2Pipeline:
    return embedded()


def qkv(tokens: int) -> Tensor:
    return torch.randn(3, 2, 3, tokens, 8, generator=torch.Generator().manual_seed(0))


def test_published_arithmetic_is_one_softmax_over_own_bin_and_sample() -> None:
    q, k, v = qkv(FRAMES * BINS).double()
    sample = torch.tensor([3, 17, 17 + BINS, 80])
    found = methods.published(q, k, v, sample, BINS)
    token = 22  # bin 2
    keys = [*range(token % BINS, FRAMES * BINS, BINS), *sample.tolist()]  # a sampled key of the own bin counts twice
    weights = (q[:, :, token, None] * k[:, :, keys]).sum(-1).div(math.sqrt(8)).softmax(-1)
    torch.testing.assert_close(found[:, :, token], (weights[..., None] * v[:, :, keys]).sum(2))


def test_tiles_run_the_layer_on_every_tile_and_the_rest() -> None:
    inner = recorder()
    tiles = methods.Tiles(inner, freq_bins=BINS, native_frames=64)  # 16 frames where there are 4 bins
    x = torch.arange(FRAMES * BINS).float().view(1, -1, 1)
    assert torch.equal(tiles(None, x), x)
    assert [tuple(tile.shape) for (_, tile), _ in inner.calls] == [(2, 64, 1), (1, 32, 1)]
    assert tiles.kept(FRAMES) == pytest.approx((2 * 16**2 + 8**2) / 40**2)


def test_merging_runs_the_layer_on_half_of_the_tokens() -> None:
    inner = recorder()
    x = torch.randn(1, FRAMES * BINS, 6, generator=torch.Generator().manual_seed(0))
    merged = methods.Merged(inner, freq_bins=BINS)(None, x)
    assert (inner.calls[0][0][1].shape, merged.shape) == ((1, FRAMES * BINS // 2, 6), x.shape)
    assert not torch.allclose(merged, x)


@pytest.mark.parametrize("frames", [256, 300])
def test_a_call_in_tiles_is_attention_within_them(frames: int) -> None:
    q, k, v = torch.randn(3, 2, 2, frames * 2, 4)
    tile = torch.arange(frames * 2) // 64
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=tile[:, None] == tile)
    torch.testing.assert_close(speed.in_tiles(q, k, v, 64), expected)
    calls = speed.attention_calls(frames, 2, torch.device("cpu"))
    torch.testing.assert_close(calls["time tiles"][0](q, k, v), expected)
    assert (calls["time tiles"][1] == frames / 32) == (frames == 256)


@pytest.mark.parametrize("method", [FEW, methods.Published, methods.Tiles, methods.Merged, methods.Peer])
def test_a_method_is_installed_and_taken_off_again(pipe, method) -> None:
    dense, before = step(pipe, 64), dict(pipe.unet.attn_processors)
    with compare.installed(pipe, method, native_frames=32):
        assert not torch.allclose(step(pipe, 64), dense, atol=1e-4)
    assert pipe.unet.attn_processors == before
    assert torch.equal(step(pipe, 64), dense)


@pytest.mark.parametrize("method", [methods.Published, methods.Tiles, FEW])
def test_flop_ratio_is_what_torch_counts(pipe, method) -> None:
    """But for cross-attention and embeddings, which are left out of the estimate."""
    counts = {}
    for which in (None, method):
        # only attention that is made of matrix products is counted
        with (
            compare.installed(pipe, which, native_frames=64),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            step(pipe, 128)
        counts[which] = counter.get_total_flops()
    counted = counts[None] / counts[method]
    assert methods.flop_ratio(pipe, method, seconds=5.12, native_frames=64) == pytest.approx(counted, rel=0.05)


def test_twins_share_their_weights_and_nothing_else() -> None:
    args = SimpleNamespace(device=torch.device("cpu"), dtype="float32")
    pipe = speed.build("small", args)
    other = speed.twin(pipe, LiteFocusConfig())
    assert all(a is b for a, b in zip(pipe.unet.parameters(), other.unet.parameters(), strict=True))
    assert litefocus.status(pipe).config is None
    assert litefocus.status(other).config == LiteFocusConfig()


def test_results_replace_older_ones_and_are_written_as_a_page_and_a_picture(tmp_path: Path) -> None:
    def row(seconds: float, method: str, median: float) -> dict[str, Any]:
        what = {"model": "audioldm2", "seconds": seconds, "method": method, "device": "cpu", "dtype": "float32"}
        figures = {"median": median, "minimum": median, "ratio": 2.0, "flop_ratio": 4.0, "peak_mb": 7.0}
        return {**what, **figures, "summed": False, "measured": "here"}

    file, rows = tmp_path / "speed.json", []
    for factor in (1, 2):
        new = [row(s, m, factor * s) for s in (10.0, 20.0, 40.0) for m in ("dense", "litefocus")]
        rows = report.merged(rows, new, *speed.KEY)
        report.write(file, {"rows": rows, "checks": []})
    found = report.read(file, "rows", "checks")
    assert [entry["median"] for entry in found["rows"]] == [20.0, 20.0, 40.0, 40.0, 80.0, 80.0]
    page = speed.page(found, "speed.png")
    assert "| 20 s | litefocus | 40 s | 40 s | 2.00 | 4.00 | 50% | 7 MB |" in page
    assert speed.plot(found["rows"], tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_a_call_and_a_step_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--threads", "1", "--rounds", "1", "--device", "cpu", "--output", str(tmp_path / "all")]
    speed.main(["call", "--seconds", "1", *common])
    cached = ["DeepCache 3", "litefocus + DeepCache 2"]
    some = ["dense", "litefocus", "time tiles", *cached]
    speed.main(["step", "--models", "small", "--seconds", "1", "2", "--sum-above", "1", "--methods", *some, *common])
    rows = json.loads((tmp_path / "all.json").read_text())["rows"]
    steps = {(row["seconds"], row["method"]): row for row in rows if row["model"] == "small"}
    assert set(steps) == {(seconds, method) for seconds in (1.0, 2.0) for method in some}
    assert {row["summed"] for row in rows if row["seconds"] == 2.0 and row["model"] == "small"} == {True}
    assert not steps[1.0, "dense"]["summed"]
    assert steps[2.0, "litefocus"]["median"] > 0
    for seconds, method in itertools.product((1.0, 2.0), cached):  # a cached step takes some time too
        base, interval = speed.CACHED[method]
        assert steps[seconds, method]["median"] > steps[seconds, base]["median"] / interval
        assert steps[seconds, method]["flop_ratio"] is None
    assert {row["method"] for row in rows if row["model"] == "attention call, 8 bins"} >= {
        "no window",
        "published arithmetic",
    }
    assert "| 1 s | litefocus |" in (tmp_path / "all.md").read_text()
    assert "one attention call, 8 bins, 1 s of audio" in capsys.readouterr().out


def test_a_gpu_run_goes_on_after_what_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(model: str, seconds: float, args: Any, bar: Any) -> list[dict[str, Any]]:
        if args.how == "compiled":
            raise RuntimeError("no compiler")
        name = {"eager": "litefocus"}.get(args.how, f"litefocus, {args.how}")
        return speed.rows_of(model, seconds, {name: speed.Timed([1.0])}, {name: 1.0}, args)

    monkeypatch.setattr(speed, "step", step)
    speed.main(["gpu", "--quick", "--device", "cpu", "--threads", "1", "--output", str(tmp_path / "gpu")])
    record = json.loads((tmp_path / "gpu.json").read_text())
    checks = {row["check"]: row["result"] for row in record["checks"]}
    assert float(checks["error of focus_attention in float32"]) < 1e-6
    assert 1e-4 < float(checks["error of focus_attention in bfloat16"]) < 1e-1
    assert checks["step, compiled, float32, 1 s"] == "RuntimeError: no compiler"
    assert {row["method"] for row in record["rows"]} >= {"dense", "litefocus", "litefocus, CUDA graph"}
    assert "| step, compiled, float32, 1 s | RuntimeError: no compiler |" in (tmp_path / "gpu.md").read_text()


def test_with_several_threads_the_clock_counts_and_the_name_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(speed.time, "perf_counter", iter(range(1000)).__next__)
    args = speed.parse(["step", "--rounds", "1", "--methods", "litefocus"])
    args.device, args.dtype = torch.device("cpu"), "float32"
    with torch.inference_mode(), tqdm(disable=True) as bar:
        rows = speed.step("small", 1.0, args, bar)
    assert [(row["method"], row["median"]) for row in rows] == [("dense, 2 threads", 1), ("litefocus, 2 threads", 1)]
    assert all(row["faults"] >= 0 for row in rows)


def test_steps_are_captured_and_compiled_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda unet, **_: unet)
    args = speed.parse(["step", "--rounds", "1", "--methods", "litefocus"])
    args.device, args.dtype = torch.device("cpu"), "float32"
    with torch.inference_mode(), tqdm(disable=True) as bar:
        for args.how in ("compiled", "CUDA graph"):
            rows = speed.step("small", 1.0, args, bar)
            assert [row["method"] for row in rows] == [f"dense, {args.how}", f"litefocus, {args.how}"]
            assert rows[1]["flop_ratio"] == pytest.approx(1.0, abs=0.3)


@pytest.mark.parametrize("mistake", [["--rounds", "0"], ["--seconds", "0"], ["--models", "none"]], ids=" ".join)
def test_mistakes_are_refused(mistake: list[str]) -> None:
    with pytest.raises(SystemExit):
        speed.parse(mistake)
