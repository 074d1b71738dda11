"""The comparison on a checkpoint of one's own: a small run of all of it, its arithmetic, and what it refuses."""

import base64
import io
import json
import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import compare
import numpy as np
import pytest
import scipy.linalg
import soundfile
import torch
from judge import load_embedder
from mel import LogMel
from support.embedded import embedded

import litefocus
from litefocus import LiteFocusConfig

TEXTS = ("a fast tabla rhythm", 'a slow <drone> & "more"')
LENGTHS = (1.0, 1.5)
STEPS, WINDOW, RATE = 2, 0.5, 16000
EMBEDDER = """
import numpy as np
calls = []
def embed(waveforms, sampling_rate):
    found = np.stack([waveforms.std(axis=1), np.abs(np.diff(waveforms)).mean(axis=1), waveforms.mean(axis=1)], axis=1)
    calls.append((waveforms, sampling_rate, found))
    return found
def one_number(waveforms, sampling_rate):
    return waveforms.mean()
def nothing_finite(waveforms, sampling_rate):
    return np.full((len(waveforms), 2), np.nan)
name = "no callable"
"""


def by_roots(one: np.ndarray, other: np.ndarray) -> float:
    """The Fréchet distance as it is usually written, with the root of a matrix."""
    a, b = (np.cov(points, rowvar=False) for points in (one, other))
    root = scipy.linalg.sqrtm(a @ b).real
    return float(np.sum((one.mean(axis=0) - other.mean(axis=0)) ** 2) + np.trace(a + b - 2 * root))


def noise(seconds: float, rate: int, seed: int) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).normal(size=(round(seconds * rate), 1)).astype(np.float32)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with an embedder, reference sounds, prompts, and sounds and prompts that cannot be used."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    fill(tmp_path)
    yield tmp_path
    sys.modules.pop("own_ears", None)


def fill(folder: Path) -> None:
    (folder / "own_ears.py").write_text(EMBEDDER)
    for name in ("sounds/below", "low", "empty", "broken", "short"):
        (folder / name).mkdir(parents=True)
    soundfile.write(folder / "sounds" / "a.wav", noise(2.3, RATE, 0), RATE)
    soundfile.write(folder / "sounds" / "below" / "b.flac", noise(1.0, 2 * RATE, 1).repeat(2, axis=1), 2 * RATE)
    (folder / "sounds" / "c.txt").write_text("no sound")
    soundfile.write(folder / "low" / "a.wav", noise(2, 8000, 2), 8000)
    soundfile.write(folder / "short" / "a.wav", noise(0.6, RATE, 3), RATE)
    (folder / "broken" / "a.wav").write_text("no sound")
    (folder / "prompts.txt").write_text(f"{TEXTS[0]}\n\n  {TEXTS[1]}\n")
    (folder / "taken").write_text("")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """All of it, small: what it wrote, printed and asked of the embedder."""
    folder = tmp_path_factory.mktemp("compare")
    fill(folder)
    printed, progress = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(printed), redirect_stderr(progress):
        patched.setattr(sys, "path", [*sys.path])
        patched.chdir(folder)
        arguments = ["--prompts", "prompts.txt", "--seconds", *map(str, LENGTHS), "--steps", str(STEPS), "--seed", "5"]
        heard = ["--reference", "sounds", "--embedder", "own_ears:embed", "--window", str(WINDOW)]
        compare.main([*arguments, *heard, "--native", "0.6", "--min-sampled", "4", "--output", "o.1"])
        calls = sys.modules.pop("own_ears").calls
    record = json.loads((folder / "o.1.json").read_text())
    return SimpleNamespace(
        folder=folder,
        calls=calls,
        printed=printed.getvalue(),
        record=record,
        rows=record["rows"],
        progress=progress.getvalue(),
    )


@pytest.fixture(scope="module")
def pipe() -> Any:
    return embedded()


def of(rows: list[dict[str, Any]], seconds: float, method: str) -> dict[str, Any]:
    (row,) = (row for row in rows if (row["seconds"], row["method"]) == (seconds, method))
    return row


def latents(pipe: Any, text: str, seconds: float, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "latent"}
    return pipe(text, audio_length_in_s=seconds, generator=draw, **options).audios


def test_every_method_has_a_row_at_every_length(run) -> None:
    names = ["dense", "litefocus", "paper", "time tiles", "token merging", "other noise"]
    assert [(row["seconds"], row["method"]) for row in run.rows] == [(s, name) for s in LENGTHS for name in names]
    for row in run.rows:
        dense = of(run.rows, row["seconds"], "dense")
        if row["method"] != "other noise":
            assert len(row["times"]) == len(TEXTS)
            assert row["median"] == pytest.approx(np.median(row["times"]))
            assert row["ratio"] == pytest.approx(dense["median"] / row["median"])
        assert len(row["distances"]) == len(TEXTS)
        assert row["distance"] == pytest.approx(np.mean(row["distances"]))
        assert ("attention" in row) == (row["method"] in ("litefocus", "paper"))
    assert {of(run.rows, s, "dense")["distance"] for s in LENGTHS} == {0}
    assert of(run.rows, 1.0, "dense")["flop_ratio"] == 1 < of(run.rows, 1.5, "paper")["flop_ratio"]
    assert run.record["prompts"] == list(TEXTS)
    assert run.record["versions"]["torch"] == torch.__version__
    assert run.record["litefocus"]["min_sampled"] == 4
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", run.record["date"])
    assert "1 s\n\n| method | time | speed-up |" in run.printed


def test_distances_are_those_of_the_final_latents(run, pipe) -> None:
    found = {name: [] for name in ("paper", "other noise")}
    for i, text in enumerate(TEXTS):
        dense = latents(pipe, text, 1.0, 5 + i).numpy()
        with litefocus.patch(pipe, LiteFocusConfig.paper()):
            others = {"paper": latents(pipe, text, 1.0, 5 + i)}
        others["other noise"] = latents(pipe, text, 1.0, 5 + len(TEXTS) + i)
        for name, other in others.items():
            found[name].append(np.sqrt(np.sum((other.numpy() - dense) ** 2) / np.sum(dense**2)))
    for name, distances in found.items():
        assert of(run.rows, 1.0, name)["distances"] == pytest.approx(distances, rel=1e-3)
    assert 0 < of(run.rows, 1.0, "paper")["distance"] < of(run.rows, 1.0, "other noise")["distance"]


def test_errors_of_attention_are_those_of_the_probe(run, pipe) -> None:
    with litefocus.probe(pipe, min_sampled=4) as probe:
        for i, text in enumerate(TEXTS):
            latents(pipe, text, 1.5, 5 + len(TEXTS) + i)
    for method, setting in (("litefocus", next(iter(probe.layers[0].errors))), ("paper", "paper")):
        errors = [layer.errors[setting] for layer in probe.layers]
        row = of(run.rows, 1.5, method)
        assert row["attention"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)
        assert row["worst"] == pytest.approx(max(errors), rel=1e-4)
        assert row["worst_layer"] == probe.layers[int(np.argmax(errors))].name


def test_the_embedder_gets_what_it_was_promised(run) -> None:
    assert {(waves.dtype.name, waves.ndim, rate) for waves, rate, _ in run.calls} == {("float32", 2, RATE)}
    assert {waves.shape[1] for waves, _, _ in run.calls} == {round(WINDOW * RATE)}
    sounds, *_ = soundfile.read(run.folder / "sounds" / "a.wav", dtype="float32")
    assert np.array_equal(run.calls[0][0], sounds[: 4 * 8000].reshape(4, 8000))  # the rest of 0.3 s is left out
    assert len(run.calls[1][0]) == 2  # 1 s at twice the rate, in stereo
    assert run.record["reference"] == {"folder": "sounds", "windows": 6, "seconds": WINDOW}
    assert run.record["embedder"] == {"callable": "own_ears:embed", "features": 3}


def test_frechet_distances_are_of_generated_and_reference_windows(run) -> None:
    reference = np.concatenate([found for _, _, found in run.calls[:2]]).astype(np.float64)
    calls = run.calls[2:]
    assert len(calls) == len(run.rows) * len(TEXTS)
    for i, row in enumerate(run.rows):
        own = calls[i * len(TEXTS) : (i + 1) * len(TEXTS)]
        generated = np.concatenate([found for _, _, found in own]).astype(np.float64)
        assert row["windows"] == len(generated) == len(TEXTS) * row["seconds"] / WINDOW
        assert row["frechet"] == pytest.approx(by_roots(generated, reference), rel=1e-3, abs=1e-8)
        clip = soundfile.read(run.folder / "o.1" / row["wavs"][1], dtype="float32")[0]
        assert np.abs(own[1][0].ravel() - clip).max() < 1e-4
    (note,) = run.rows[0]["notes"]
    assert note.startswith("4 generated and 6 reference windows for 3 features: with fewer than twice")
    assert f"Note: {note}." in run.printed
    assert of(run.rows, 1.5, "dense")["notes"] == []


def test_the_page_holds_every_wav_and_every_wav_has_its_length(run) -> None:
    page = (run.folder / "o.1.html").read_text()
    sounds = re.findall(r"<audio [^>]*src=data:audio/flac;base64,([^ >]+)>", page)
    names = [row["wavs"][i] for s in LENGTHS for i in range(len(TEXTS)) for row in run.rows if row["seconds"] == s]
    assert len(set(names)) == len(run.rows) * len(TEXTS)
    assert set(names) == {path.name for path in (run.folder / "o.1").iterdir()}
    for name, sound in zip(names, sounds, strict=True):
        played, rate = soundfile.read(io.BytesIO(base64.b64decode(sound)), dtype="int16")
        assert rate == RATE
        assert np.array_equal(played, soundfile.read(run.folder / "o.1" / name, dtype="int16")[0])
    for row in run.rows:
        for name in row["wavs"]:
            info = soundfile.info(run.folder / "o.1" / name)
            assert (info.samplerate, info.frames) == (RATE, row["seconds"] * RATE)
    pictures = re.findall(r"data:image/png;base64,([^ >\"]+)", page)
    assert len(pictures) == 1 + len(sounds)
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert (run.folder / "o.1.png").read_bytes().startswith(b"\x89PNG")
    without = re.sub(r"base64,[^ >\"]+", "", page)
    assert not re.search(r"http|<link|url\(|src=[^d\"]|src=\"[^d]", without)  # it needs no other file


def test_the_page_says_what_was_compared_and_what_figures_mean(run) -> None:
    page = re.sub(r"base64,[^ >\"]+", "", (run.folder / "o.1.html").read_text())
    assert "made clips of 1, 1.5 s in 2 steps, from 2 prompts" in " ".join(page.split())
    assert page.count("a slow &lt;drone&gt; &amp; &quot;more&quot;") == len(LENGTHS)
    assert "<drone>" not in page
    assert "$" not in page
    for row in run.rows:
        of_noise = row["distance"] / of(run.rows, row["seconds"], "other noise")["distance"]
        line = f"<td>{row['distance']:.3f}<td>{of_noise:.0%}"
        assert re.search(rf"<tr><td>{row['method']}<td>.*?{re.escape(line)}", page)
        if row["method"] != "dense":
            assert all(f"latents differ from dense by {far:.3f} of their norm" in page for far in row["distances"])
    heads = re.findall(r"<th>([^<]+)<small>([^<]+)</small>", page)
    assert [name for name, words in heads if len(words) > 10] == 2 * list(compare.COLUMNS)


@pytest.mark.parametrize("width", [1280, 390])
def test_players_can_be_used(width: int, run, browser) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto((run.folder / "o.1.html").as_uri())
    page.wait_for_function("[...document.querySelectorAll('audio')].every(sound => sound.readyState >= 1)")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    found = page.locator("article").evaluate_all(
        "all => all.map(one => [one.querySelector('audio').duration, one.querySelector('audio').clientWidth,"
        " one.querySelector('figure').clientWidth, one.querySelector('figure span:last-of-type').textContent])"
    )
    assert [(duration, end) for duration, _, _, end in found] == [
        (s, f"{s:g} s") for s in LENGTHS for _ in range(6 * len(TEXTS))
    ]
    assert min(player for _, player, _, _ in found) >= 300
    assert len({picture for _, _, picture, _ in found}) == 1  # one time axis
    assert found[0][2] > (800 if width > 1000 else 300)

    first, second = (page.locator("article").nth(i) for i in (0, 1))
    for clip in (first, second):
        clip.locator("figure").click(position={"x": 0.8 * found[0][2], "y": 40})
        at = "clip => clip.querySelector('audio').currentTime >= 0.79 * clip.querySelector('audio').duration"
        assert clip.evaluate(at)
    assert first.locator("audio").evaluate("sound => sound.paused")
    page.close()


def test_one_labelled_progress_bar(run) -> None:
    shown = [line for line in re.split(r"[\r\n]+", run.progress) if "%|" in line]
    total = len(run.rows) * len(TEXTS)
    assert {re.search(r"/(\d+) \[", line)[1] for line in shown} == {str(total)}
    assert {re.match(r"(.*?): +\d+%", line)[1] for line in shown} == {
        "clips",
        *(f"{row['seconds']:g} s clips, {row['method']}" for row in run.rows),
    }


def test_prompts_of_the_command_line(own: Path) -> None:
    assert compare.parse(["a slow bell", "a drone", "--seconds", "1"]).texts == ["a slow bell", "a drone"]
    assert compare.parse(["--prompts", "prompts.txt"]).texts == list(TEXTS)
    assert compare.parse([]).texts == list(compare.PROMPTS)


def test_the_default_run_is_short() -> None:
    """Under five minutes on two cores: 2,400 s of sound times steps took 118 s of CPU, on one thread."""
    args = compare.parse([])
    assert sum(args.lengths) * len(args.texts) * (len(args.methods) + 1) * args.steps <= 3000


def test_the_frechet_distance_against_the_root_of_a_matrix() -> None:
    draw = np.random.default_rng(0)
    one, other = draw.normal(size=(60, 5)) @ draw.normal(size=(5, 5)), draw.normal(size=(40, 5)) + 0.3
    assert compare.frechet(one, other) == pytest.approx(by_roots(one, other), rel=1e-6)
    assert compare.frechet(one, other) == pytest.approx(compare.frechet(other, one))
    assert compare.frechet(one, one[::-1]) == pytest.approx(0, abs=1e-9)
    assert compare.frechet(one, one + 2) == pytest.approx(5 * 2**2)
    few = draw.normal(size=(3, 5))  # fewer points than features
    assert compare.frechet(few, few) == pytest.approx(0, abs=1e-9)
    assert compare.frechet(few, 3 * few) == pytest.approx(
        np.sum(4 * few.mean(axis=0) ** 2) + 4 * few.var(0, ddof=1).sum()
    )


def test_the_embedded_embedder_is_marked_as_what_it_is(own: Path) -> None:
    args = Namespace(embedder="judge:embed", window=1.0, sounds=[own / "sounds" / "a.wav"], reference=own)
    args.embed = compare.find_embedder(args.embedder)
    embedder = compare.Embedder(args, RATE)
    sound = torch.from_numpy(soundfile.read(args.sounds[0], dtype="float32")[0])
    with torch.inference_mode():
        expected = load_embedder().embed(LogMel()(sound[: 2 * RATE].reshape(2, RATE)))
    assert embedder.reference == pytest.approx(expected.double().numpy(), rel=1e-4, abs=1e-5)
    marked, few = embedder.notes(1000)
    assert "twelve small synthetic classes" in marked
    assert "1000 generated and 2 reference windows for 48 features" in few
    with pytest.raises(ValueError, match="at least 1 s at 16000 Hz, got 48000 samples at 48000 Hz"):
        embedder.call(np.zeros((1, 48000), np.float32), 48000)


def test_settings_that_are_dense_are_at_distance_zero(own: Path) -> None:
    short = ["--seconds", "1", "--steps", "1", "--methods", "litefocus", "--prompts", "prompts.txt"]
    compare.main([*short, "--sparse-ratio", "1", "--time-window", "none", "--output", "o"])
    rows = json.loads((own / "o.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["dense", "litefocus", "other noise"]
    assert rows[1]["distance"] < 1e-4 < rows[2]["distance"]
    assert rows[1]["attention"] < 1e-4
    assert "frechet" not in rows[1]


@pytest.mark.parametrize("stopped_at", LENGTHS)
def test_an_interrupted_run_leaves_whole_lengths_alone(stopped_at, own: Path, monkeypatch) -> None:
    made = compare.make

    def make(pipe: Any, settings: dict[str, Any], device: torch.device) -> Any:
        if settings["seconds"] == stopped_at:
            raise KeyboardInterrupt
        return made(pipe, settings, device)

    monkeypatch.setattr(compare, "make", make)
    before = {path.name for path in own.iterdir()}
    short = ["--seconds", *map(str, LENGTHS), "--steps", "1", "--methods", "dense"]
    with pytest.raises(KeyboardInterrupt):
        compare.main([*short, "--output", "o"])
    written = {path.name for path in own.iterdir()} - before
    assert written == ({"o"} if stopped_at == LENGTHS[0] else {"o", "o.json", "o.png", "o.html"})
    assert len(list((own / "o").iterdir())) == 4 * LENGTHS.index(stopped_at)  # dense and other noise, two prompts
    if stopped_at == LENGTHS[1]:
        assert {row["seconds"] for row in json.loads((own / "o.json").read_text())["rows"]} == {LENGTHS[0]}


OWN = ["--embedder", "own_ears:embed"]
REFERENCE = ["--reference", "sounds", "--seconds", "1", "--window", "0.5"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (REFERENCE, "hears windows of at least 1 s at 16000 Hz, got 8000 samples at 16000 Hz"),
        (["a bell", "--prompts", "prompts.txt"], "prompts come from the command line or from a file, not from both"),
        ([" "], "prompt must be text, and not empty, got ' '"),
        (["--seconds", "10", "0"], "seconds must be a number between 0.5 and 3600, got 0.0"),
        (["--native", "0"], "native must be at least 0.5 seconds, got 0.0"),
        (["--window", "nan"], "window must be at least 0.5 seconds, got nan"),
        (["--methods", "dense", "sparse"], "argument --methods: invalid choice: 'sparse'"),
        (["--output", "taken"], "output taken is in the way: it is a file"),
        (OWN, "an embedder needs sounds to compare with: add --reference FOLDER"),
        ([*REFERENCE, "--embedder", "no_such_module:embed"], "cannot use embedder no_such_module:embed: No module"),
        ([*REFERENCE, "--embedder", "own_ears:nothing"], "cannot use embedder own_ears:nothing: module 'own_ears' has"),
        ([*REFERENCE, "--embedder", "own_ears:name"], "must be module:callable, and names a str"),
        ([*REFERENCE, "--embedder", "own_ears"], "must be module:callable, and names a module"),
        ([*REFERENCE, "--embedder", "own_ears:one_number"], "must return finite numbers (batch, features)"),
        ([*REFERENCE, "--embedder", "own_ears:nothing_finite"], "must return finite numbers (batch, features)"),
        ([*REFERENCE, "--reference", "empty"], "reference empty is no folder that holds a .wav or .flac"),
        ([*REFERENCE, "--reference", "low"], "a.wav has 8000 Hz, the pipeline 16000: its treble would be missing"),
        ([*REFERENCE, "--reference", "broken"], "cannot read broken/a.wav"),
        ([*REFERENCE, *OWN, "--reference", "short"], "short holds fewer than two windows of 0.5 s"),
        ([*REFERENCE, "--window", "1.5"], "a Fréchet distance needs two windows of 1.5 s or more at every length"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, message, own: Path, pipe, monkeypatch, refused) -> None:
    monkeypatch.setattr(compare._cli, "load_pipeline", lambda *_: pipe)
    monkeypatch.setattr(compare, "make", lambda *_: pytest.fail("work was begun"))
    before = sorted(own.rglob("*"))
    assert message in refused(compare.main, *arguments)
    assert [path for path in sorted(own.rglob("*")) if "__pycache__" not in path.parts] == before
