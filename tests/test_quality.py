"""examples/evidence/quality.py: its methods, its measures, and a small run of all of it on made-up recordings."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator

import numpy as np
import pytest
import quality
import scipy.linalg
import soundfile
import torch
from data import CLASS_NAMES, CLASSES, TEMPO_NAMES
from diffusers import AudioLDM2Pipeline
from support.embedded import embedded, step

import litefocus
from litefocus import LiteFocusConfig


@pytest.fixture(autouse=True)
def denormals() -> Iterator[None]:
    """The script flushes denormal numbers to zero, for the whole process."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def pipe() -> AudioLDM2Pipeline:
    return embedded()


def test_every_method_changes_the_unet_and_is_taken_off_again(pipe) -> None:
    dense = {frames: step(pipe, frames) for frames in (128, 512)}
    seen = {}
    for name in quality.METHODS:
        with quality.WAYS[name].on(pipe):
            found = {frames: step(pipe, frames) for frames in (128, 512)}
        assert torch.equal(step(pipe, 128), dense[128]), name
        assert litefocus.status(pipe).config is None, name
        close = torch.allclose(found[128], dense[128], atol=1e-4)
        assert close == (name in ("dense", "time tiles")), name
        seen[name] = found[512]
    assert len({quality.digest(output) for output in seen.values()}) == len(quality.METHODS) - 1
    assert torch.equal(seen["litefocus"], seen["litefocus, one sample"])  # the step at 500 takes the first of four


def test_the_fingerprint_tells_methods_apart(pipe) -> None:
    """And only those: at native length no window is in force, and tiles are dense attention."""

    def of(method: quality.Method) -> str:
        with method.on(pipe):
            return quality.fingerprint(pipe, 1)

    found = {name: of(quality.WAYS[name]) for name in quality.METHODS}
    assert found["time tiles"] == found["dense"]
    assert of(quality.Method(LiteFocusConfig(time_window=128, sparse_ratio=0.2))) == found["litefocus"]
    assert found["litefocus, window 2x"] == found["litefocus"]
    assert len(set(found.values())) == len(quality.METHODS) - 2
    by_samples = [of(quality.Method(LiteFocusConfig(), samples)) for samples in (1, 4, 8)]
    assert by_samples[0] == found["litefocus, one sample"]
    assert by_samples[1] == found["litefocus"]
    assert len(set(by_samples)) == 3


def test_deepcache_is_on_for_its_methods_alone(pipe, tmp_path) -> None:
    args = quality.parse(["--samples", ".", "--work", str(tmp_path), "--steps", "4"])
    names = ["dense", "DeepCache 2", "DeepCache 3", "litefocus", "litefocus + DeepCache 2"]
    made = {name: quality.generate(pipe, name, quality.WAYS[name], 1, 1, args)["latents"] for name in names}
    for one, other in itertools.combinations(names, 2):
        assert not torch.equal(made[one], made[other]), (one, other)
    assert len(list(tmp_path.iterdir())) == len(names)


def test_self_only_is_attention_over_one_token(pipe) -> None:
    """The value of a token is what attention over that token alone returns."""
    name, attn = next((n, m) for n, m in pipe.unet.named_modules() if n.endswith("attn1"))
    x = torch.randn(1, 5, attn.to_q.in_features)
    alone = torch.cat([attn(x[:, i : i + 1]) for i in range(5)], dim=1)
    with quality.WAYS["self only"].on(pipe):
        torch.testing.assert_close(dict(pipe.unet.named_modules())[name](x), alone)


@pytest.mark.parametrize("count", [12, 48, 72, 144, 288, 720])
def test_prompts_are_balanced_alike_at_every_length(count: int) -> None:
    sounds, tempi = zip(*quality.labels_of(count), strict=True)
    assert {sounds.count(name) for name in CLASS_NAMES} == {count // 12}
    assert {tempi.count(name) for name in TEMPO_NAMES} == {count // 3}
    assert quality.labels_of(288)[:count] == quality.labels_of(count)[:288]


def heard_of(rng: np.random.Generator, clips: int, windows: int = 2, shift: float = 0.0) -> quality.Heard:
    classes = rng.dirichlet(np.ones(12), (clips, windows))
    tempi = rng.dirichlet(np.ones(3), (clips, windows))
    mix = rng.normal(size=(48, 48))
    points = rng.normal(size=(clips, windows, 48)) @ mix + shift
    halves, levels = rng.normal(size=(clips, 2 * windows, 48)), rng.normal(size=(clips, 3))
    return quality.Heard(classes, tempi, points, halves, rng.uniform(size=clips), levels)


def test_frechet_distance_is_that_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    real, made = heard_of(rng, 60), heard_of(rng, 40, shift=0.5)
    reference = quality.Reference(real, quality.labels_of(60))
    scale = real.embeddings.reshape(-1, 48).std(axis=0)
    a, b = (x.embeddings.reshape(-1, 48) / scale for x in (real, made))
    one, two = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(one @ two)
    expected = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + np.trace(one + two - 2 * root.real)
    assert reference.frechet(made.embeddings.reshape(-1, 48)) == pytest.approx(expected, rel=1e-3)
    assert reference.frechet(real.embeddings.reshape(-1, 48)) == pytest.approx(0, abs=1e-6)


def test_measures_of_what_is_perfect_and_of_what_is_not() -> None:
    labels = quality.labels_of(36)
    rng = np.random.default_rng(1)
    sounds = np.array([CLASS_NAMES.index(s) for s, _ in labels])
    tempi = np.array([TEMPO_NAMES.index(t) for _, t in labels])
    real = heard_of(rng, 36)
    right_classes, right_tempi = np.eye(12)[sounds][:, None].repeat(2, 1), np.eye(3)[tempi][:, None].repeat(2, 1)
    right = quality.Heard(right_classes, right_tempi, real.embeddings, real.halves, np.ones(36), real.levels)
    reference = quality.Reference(right, labels)
    everything = np.arange(36)
    found = quality.measures(right, labels, reference)(everything)
    assert (found["class"], found["tempo"], found["beat"]) == (1, 1, 1)
    assert found["kl"] == pytest.approx(0, abs=1e-3)
    assert found["inception"] == pytest.approx(12, rel=1e-3)
    assert found["drift"] == pytest.approx(1, abs=0.1)  # halves that have nothing to do with each other
    wrong = dataclasses.replace(right, classes=right.classes[::-1], halves=right.halves * 0)
    found = quality.measures(wrong, labels, reference)(everything)
    assert found["class"] == np.mean(sounds == sounds[::-1]) < 0.2
    assert found["kl"] == pytest.approx(-math.log(1e-6), rel=0.2)
    assert found["drift"] == 0


def test_levels_are_those_of_the_clip_and_of_its_quietest_and_loudest_second() -> None:
    mels = torch.full((1, 512, 64), -3.0)
    mels[:, 100:200] += math.log(10)  # ten times the amplitude, 20 dB
    loudness, quietest, loudest = quality.listen(mels).levels[0]
    assert loudest - quietest == pytest.approx(20)
    assert loudness - quietest == pytest.approx(10 * math.log10((412 + 100 * 100) / 512))


def test_differences_are_paired() -> None:
    """Two methods that differ by the same amount on every clip: the difference has no error, the values have."""
    rng = np.random.default_rng(2)
    values = rng.uniform(size=50)

    def of(shift: float):
        return lambda clips: dict.fromkeys((*quality.METRICS, *quality.LEVELS), float(values[clips].mean() + shift))

    table = quality.compare({"dense": of(0.0), "other": of(0.25), "real": of(0.5)}, 50)
    cell = table["other"]["class"]
    assert cell["se"] == pytest.approx(values.std(ddof=1) / math.sqrt(50), rel=0.15)
    assert cell["diff"] == pytest.approx(0.25)
    assert cell["diff_se"] == pytest.approx(0, abs=1e-9)
    assert "diff" not in table["real"]["class"]
    assert quality.cell_text({"value": 1, "diff": 0.31, "diff_se": 0.1}) == "1.000 (**+0.310 ± 0.100**)"
    assert quality.cell_text({"value": 1, "diff": -0.29, "diff_se": 0.1}) == "1.000 (*-0.290 ± 0.100*)"
    assert quality.cell_text({"value": 1, "diff": 0.19, "diff_se": 0.1}) == "1.000 (+0.190 ± 0.100)"


def test_cells_are_counted_by_side_and_size() -> None:
    def row(method: str, times: int, **off: float) -> dict:
        cells = {
            name: {"value": 1.0, "se": 0.1, "diff": 0.1 * off.get(name, 0.0), "diff_se": 0.1}
            for name in quality.METRICS
        }
        return {"model": "seed 1", "method": method, "times": times, **cells}

    dense = row("dense", 1)
    for metric in quality.METRICS:
        dense[metric] |= {"diff": 0.0, "diff_se": 0.0}
    real = {"model": "seed 1", "method": "real", "times": 1, **{m: {"value": 1.0, "se": 0.1} for m in quality.METRICS}}
    rows = [dense, real, row("paper", 1, frechet=3.5, beat=-2.5, tempo=2.5), row("paper", 2, drift=1.9, kl=-3.5)]
    (count,) = quality.count_cells(rows)
    assert count == {
        **{"model": "seed 1", "method": "paper", "lengths": [1, 2], "cells": 14},
        **{"worse_2": 2, "worse_3": 1, "better_2": 2, "better_3": 1},
    }


def test_rows_are_pooled_by_inverse_variance() -> None:
    def row(times: int, diff: float, error: float, model: str = "seed 1") -> dict:
        same = {name: {"value": 1.0, "diff": 0.0, "diff_se": 0.0} for name in (*quality.METRICS, *quality.LEVELS)}
        return {"model": model, "method": "paper", "times": times, **same, "beat": {"diff": diff, "diff_se": error}}

    rows = [row(4, 1.0, 1.0), row(8, 6.0, 2.0, "seed 2"), row(1, 50.0, 0.1), row(4, 50.0, 0.1, "seed 1, 50 steps")]
    (pool,) = quality.pooled(rows)
    assert pool == {"method": "paper", "rows": 2, "beat": {"diff": 2.0, "diff_se": pytest.approx(math.sqrt(0.8))}}
    assert quality.pooled(rows[1:]) == []  # one row is none to pool


def test_the_screen_measures_errors_costs_and_distances(pipe) -> None:
    args = quality.parse(["--samples", "", "--steps", "2", "--screen"])
    inputs = quality.layer_inputs(pipe, 2, args)
    layers = quality.Layers(pipe, 2, inputs)
    assert len(inputs) == sum("attn1" in name for name in inputs) + sum("attn2" in name for name in inputs)
    name, x = next(iter(inputs.items()))
    assert x.shape == (8, 128 * 8, pipe.unet.get_submodule(name).to_q.in_features)  # 2 clips, guidance, 2 steps
    assert set(layers.errors(quality.Method()).values()) == {0.0}
    assert layers.cost(quality.Method()) == 1
    assert layers.cost(quality.WAYS["token merging"]) == 0.25
    assert layers.cost(quality.WAYS["time tiles"]) == 0.5
    alone = layers.errors(quality.WAYS["self only"])[name]
    with torch.no_grad():
        value = pipe.unet.get_submodule(name).to_v(x)
    assert alone == pytest.approx(float((value - layers.dense[name]).norm() / layers.dense[name].norm()), rel=1e-5)
    errors = [np.mean(list(layers.errors(quality.WAYS[how]).values())) for how in ("litefocus", "paper")]
    assert 0 < errors[0] < errors[1] < 1

    latents = torch.randn(3, 8, 128, 16)
    apart = quality.distances(latents + 0.1, latents, latents - 0.2)
    assert apart == pytest.approx([0.5] * 3, rel=1e-4)


def test_what_is_recorded_replaces_what_was(tmp_path) -> None:
    args = quality.parse(["--samples", "", "--screen", "--output", str(tmp_path / "e")])
    row = {"model": "seed 1", "family": "peers", "setting": "paper", "times": 4, "clips": 8, "cost": 0.25}
    row |= {"attention": 0.3, "worst": 0.5, "worst_layer": "a", "layers": {"a": 0.5, "b": 0.1}}
    row |= {"latents": 0.2, "latents_se": 0.01}
    quality.add("screen", [row, {**row, "times": 8}], args)
    quality.add("screen", [{**row, "latents": 0.1}], args)
    rows = json.loads((tmp_path / "e.json").read_text())["screen"]
    assert {(row["times"], row["latents"]) for row in rows} == {(4, 0.1), (8, 0.2)}
    assert f"torch {torch.__version__}" in rows[0]["measured"]
    report = (tmp_path / "e.md").read_text()
    assert "| paper | 25.0% | 0.300 (0.500) | 0.100 ± 0.010 | 25.0% | 0.300 (0.500) | 0.200 ± 0.010 |" in report
    assert (tmp_path / "e_cost.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "e.png").exists()


def test_beat_and_drift_of_made_up_spectrograms() -> None:
    frames = torch.arange(1024)
    steady = torch.full((1024, 64), -10.0)
    steady[frames % 32 == 0] = -2.0
    draw = torch.Generator().manual_seed(0)
    jittered = torch.full((1024, 64), -10.0)
    jittered[torch.randperm(1024, generator=draw)[:32]] = -2.0
    changing = steady.clone()
    changing[512:, :32] = -11.0
    heard = quality.listen(torch.stack([steady, jittered, changing]))
    assert heard.beat[0] > 0.9
    assert heard.beat[1] < 0.6
    assert heard.halves[2].var(axis=0).sum() > 5 * heard.halves[0].var(axis=0).sum()


@pytest.mark.slow
def test_the_whole_evaluation_runs_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys) -> None:
    rng = np.random.default_rng(3)
    samples = tmp_path / "samples"
    samples.mkdir()
    for name in {name for spec in CLASSES.values() for name in spec.train}:
        noise = rng.normal(size=16000) * np.exp(-np.arange(16000) / 4000)
        soundfile.write(samples / f"{name}.flac", 0.1 * noise, 16000)
    work = tmp_path / "work"
    common = [
        "--samples",
        str(samples),
        "--quick",
        "--steps",
        "1",
        "--work",
        str(work),
        "--output",
        str(tmp_path / "e"),
    ]
    monkeypatch.setattr(quality, "RESAMPLES", 20)
    quality.main(common)
    printed = capsys.readouterr().out
    assert "1x: 12 clips, 12 windows" in printed
    rows = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert "worse by over 2" in printed
    methods = {"dense", "litefocus", "self only", "real"}
    assert {row["method"] for row in rows} == methods
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")
    report = (tmp_path / "e.md").read_text()
    found = {row["method"]: row for row in rows}
    assert f"| self only | {quality.cell_text(found['self only']['frechet'])} |" in report
    assert "### seed 1, 5.12 s (1x), 12 clips" in report
    assert json.loads((tmp_path / "e.json").read_text())["counts"] == quality.count_cells(rows)

    files = {path: path.stat().st_mtime_ns for path in work.glob("*.pt")}
    assert len(files) == 5  # three methods, real scenes, the reference

    def no_more(*_: object, **__: object) -> None:
        raise AssertionError("this was generated before")

    monkeypatch.setattr(AudioLDM2Pipeline, "__call__", no_more)
    quality.main(common)
    assert capsys.readouterr().out == printed
    assert {path: path.stat().st_mtime_ns for path in work.glob("*.pt")} == files
    assert len(json.loads((tmp_path / "e.json").read_text())["rows"]) == len(rows)
    with pytest.raises(AssertionError, match="generated before"):  # another number of steps is another clip
        quality.main([*common, "--steps", "2"])
