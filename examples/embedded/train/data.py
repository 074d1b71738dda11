"""Labelled sound scenes from CC0 recordings, and their prompts.

A scene is one steady pattern: a class (`CLASSES`), a tempo (`TEMPI`), one to four recordings, one event per
beat (two in a breakbeat), nothing off the grid. Sounds that have no hits carry their tempo as swells (drone)
or pulses (vinyl hiss). The recordings are those of manifest.csv, which Debian's package sonic-pi-samples marks CC0.
"""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
from mel import CLIP_SECONDS, HOP, SAMPLE_RATE
from scipy import signal

Wave = npt.NDArray[np.float32]

LATENT_HOP = 4 * HOP  # samples per latent frame (40 ms): the VAE shrinks time by 4

# Beat lengths in latent frames of 40 ms: 62.5, 93.75 and 187.5 beats per minute. All are multiples of GRID, the
# stride of the UNet's deepest level, and training scenes start on the grid, like a sequencer's: a model this
# small then keeps its beat.
TEMPI = {"slow": 24, "medium": 16, "fast": 8}
GRID = 8


@dataclass(frozen=True)
class SoundClass:
    """Recordings of one class. Where `held_out` is empty, held-out scenes differ by seed or segment only."""

    nouns: tuple[str, ...]
    train: tuple[str, ...]
    held_out: tuple[str, ...] = ()

    def recordings(self, split: str) -> tuple[str, ...]:
        return self.held_out if split == "held_out" and self.held_out else self.train


NOUNS = {  # what the prompts call a class
    "kick": ("kick drum", "kick"),
    "snare": ("snare drum", "snare"),
    "cymbal": ("cymbal", "cymbals"),
    "tom": ("tom drum", "tom", "toms"),
    "tabla": ("tabla", "tabla drum"),
    "drone": ("drone", "ambient drone"),
    "bass line": ("bass line", "bass"),
    "guitar phrase": ("guitar phrase", "guitar", "electric guitar"),
    "bell": ("bell", "bells"),
    "breakbeat": ("breakbeat", "drum break"),
    "vinyl hiss": ("vinyl hiss", "record hiss"),
    "robot voice": ("robot voice", "robot", "robotic voice"),
}
with Path(__file__).with_name("manifest.csv").open() as _file:
    MANIFEST = list(csv.DictReader(_file))


def _recordings(*splits: str, sound: str = "") -> tuple[str, ...]:
    """Names in the manifest, of a class or of all."""
    rows = [row for row in MANIFEST if row["split"] in splits and sound in ("", row["class"])]
    return tuple(row["file"].removesuffix(".flac") for row in rows)


CLASSES = {
    sound: SoundClass(nouns, _recordings("train", "both", sound=sound), _recordings("held_out", sound=sound))
    for sound, nouns in NOUNS.items()
}
CLASS_NAMES = tuple(CLASSES)

# Recordings that no training scene of the pipeline, or of the judge, holds: those held out, and others marked CC0.
STRANGERS = tuple(sorted(_recordings("held_out", "embedder")))
TEMPO_NAMES = tuple(TEMPI)

TEMPO_WORDS = {"slow": ("slow", "calm"), "medium": ("medium", "moderate"), "fast": ("fast", "quick")}
TEMPLATES = (
    "a {tempo} {noun}",
    "{tempo} {noun}",
    "a {tempo} {noun} beat",
    "a {tempo} {noun} rhythm",
    "{tempo} {noun} rhythm",
    "{noun} at a {tempo} tempo",
    "a {noun} playing at a {tempo} tempo",
    "the sound of a {tempo} {noun}",
    "{tempo} {noun} loop",
)
# Words outside the vocabulary reach the model as <unk>: a few prompts carry some, so that they do no harm.
ASIDES = ("", "", "", " recorded outdoors yesterday", " , clear studio recording", " in some big old hall")


def prompts(sound: str, tempo: str) -> list[str]:
    """Every prompt of the grammar that names this class and this tempo (without asides)."""
    return [
        template.format(tempo=word, noun=noun)
        for template in TEMPLATES
        for noun in CLASSES[sound].nouns
        for word in TEMPO_WORDS[tempo]
    ]


# ------------------------------------------------------------------------------------------- recordings


@dataclass
class Bank:
    """The recordings, read once, mono at 16 kHz, shifted in pitch by resampling."""

    folder: Path
    _cache: dict[tuple[str, float], Wave] = field(default_factory=dict)

    def get(self, name: str, semitones: float = 0.0) -> Wave:
        key = (name, round(semitones, 2))
        if key not in self._cache:
            raw, rate = soundfile.read(self.folder / f"{name}.flac", dtype="float32", always_2d=True)
            ratio = Fraction(SAMPLE_RATE / rate * 2.0 ** (-semitones / 12.0)).limit_denominator(160)
            wave = signal.resample_poly(raw.mean(axis=1), ratio.numerator, ratio.denominator)
            loud = np.flatnonzero(np.abs(wave) > 0.02 * np.abs(wave).max())
            wave = wave[loud[0] :] if name.split("_")[0] != "loop" else wave
            self._cache[key] = (wave / (np.abs(wave).max() + 1e-9)).astype(np.float32)
        return self._cache[key]


def _fade(wave: Wave, attack: int = 16, release: int = 160) -> Wave:
    """A copy with linear ramps at both ends (in samples)."""
    out = wave.copy()
    attack, release = min(attack, len(out)), min(release, len(out))
    out[:attack] *= np.linspace(0.0, 1.0, attack, dtype=np.float32)
    out[len(out) - release :] *= np.linspace(1.0, 0.0, release, dtype=np.float32)
    return out


def _hit(wave: Wave, beat: int, decay: float) -> Wave:
    """One event no longer than a beat, damped to exp(-1 / decay) at its end."""
    wave = wave[:beat]
    return _fade(wave * np.exp(-np.arange(len(wave), dtype=np.float32) / (decay * beat)))


def _looped(wave: Wave, length: int, rng: np.random.Generator) -> Wave:
    """A sustained texture of `length` samples from any place in `wave`, joined by cross-fades of 0.1 s."""
    cross = min(1600, len(wave) // 4)
    wave = np.concatenate([wave[cross:-cross], wave[-cross:] * 0.0]) + np.concatenate(
        [np.zeros(len(wave) - 2 * cross, np.float32), _ramp(wave[-cross:], wave[:cross])]
    )
    repeats = int(np.ceil(length / len(wave))) + 1
    start = int(rng.integers(len(wave)))
    return np.tile(wave, repeats)[start : start + length].astype(np.float32)


def _ramp(ending: Wave, beginning: Wave) -> Wave:
    up = np.linspace(0.0, 1.0, len(ending), dtype=np.float32)
    return ending * (1.0 - up) + beginning * up


def _segment(wave: Wave, split: str) -> Wave:
    """Long recordings of classes without spare ones: training takes the first 60 %, held-out the rest."""
    cut = int(0.6 * len(wave))
    return wave[cut:] if split == "held_out" else wave[:cut]


VOWELS = {"a": (800, 1200, 2600), "e": (450, 1900, 2600), "i": (300, 2300, 3000), "o": (450, 800, 2600)}


def _syllable(grain: Wave, vowel: str, pitch: float, length: int) -> Wave:
    """A robot's syllable: a recorded voice ring-modulated by a pulse wave, then three vowel formants."""
    grain = np.resize(grain, length)
    time = np.arange(length) / SAMPLE_RATE
    buzz = grain * signal.square(2 * np.pi * pitch * time, 0.2) + 0.4 * signal.sawtooth(2 * np.pi * pitch * time)
    voiced = np.zeros(length)
    for gain, formant in zip((1.0, 0.7, 0.4), VOWELS[vowel], strict=True):
        b, a = signal.iirpeak(formant, 5.0, fs=SAMPLE_RATE)
        voiced += gain * signal.lfilter(b, a, buzz)
    return _fade((voiced / np.abs(voiced).max()).astype(np.float32), 240, 640)


# -------------------------------------------------------------------------------------------------- scenes

ACCENTS = ((1.0, 1.0, 1.0, 1.0), (1.0, 0.7, 0.7, 0.7), (1.0, 0.7, 1.0, 0.7))
BASS_NOTES = ((0, 0, 0, 0), (0, 0, 3, 5), (0, 7, 0, 5), (0, 0, 7, 3))
GUITAR_NOTES = ((0, 3, 5, 3), (0, 5, 7, 5), (0, 0, 3, 5), (0, 7, 5, 3))
SPEECH = (("a", "o", "a", "i"), ("i", "a", "i", "a"), ("o", "e", "a", "e"), ("e", "e", "o", "o"))


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _bar(sound: str, bank: Bank, beat: int, split: str, rng: np.random.Generator) -> list[Wave]:
    """The events of one bar: four, one per beat (breakbeat: eight, two per beat)."""
    names = CLASSES[sound].recordings(split)
    shift = float(rng.integers(-2, 3))
    accents = ACCENTS[int(rng.integers(len(ACCENTS)))]
    if sound == "breakbeat":
        loop = bank.get(_pick(rng, names))
        bars = 4 if len(loop) > 4 * SAMPLE_RATE else 1
        held = split == "held_out" and bars == 4
        which = 2 if held else int(rng.choice([0, 1, 3])) if bars == 4 else 0
        slices = np.array_split(loop, 8 * bars)[8 * which : 8 * which + 8]
        half = beat // 2
        return [_hit(part / np.abs(loop).max(), half, 1.0) for part in slices]
    if sound == "robot voice":
        grain = bank.get(_pick(rng, names), shift)
        pitch = float(rng.choice([82.4, 98.0, 116.5, 130.8]))
        vowels = SPEECH[int(rng.integers(len(SPEECH)))]
        return [g * _syllable(grain, v, pitch, int(0.75 * beat)) for g, v in zip(accents, vowels, strict=True)]
    if sound in ("bass line", "guitar phrase"):
        name = _pick(rng, names)
        figures = BASS_NOTES if sound == "bass line" else GUITAR_NOTES
        figure = figures[int(rng.integers(len(figures)))]
        decay = 0.5 if sound == "bass line" else 0.4
        return [g * _hit(bank.get(name, shift + n), beat, decay) for g, n in zip(accents, figure, strict=True)]
    decay = {"cymbal": 0.3, "bell": 0.35}.get(sound, 0.6)
    if sound == "tom":
        order = ((0, 1, 2, 1), (0, 2, 0, 2), (0, 0, 1, 2), (2, 2, 2, 2))[int(rng.integers(4))]
        chosen = [names[i] for i in order]
    elif sound == "tabla":
        first, second, third = (str(n) for n in rng.choice(names, 3, replace=False))
        chosen = [[first, second, first, second], [first, second, third, second]][int(rng.integers(2))]
    else:
        first, second = _pick(rng, names), _pick(rng, names)
        chosen = [[first] * 4, [first] * 4, [first, second, first, second]][int(rng.integers(3))]
    return [g * _hit(bank.get(name, shift), beat, decay) for g, name in zip(accents, chosen, strict=True)]


def _swell(sound: str, bank: Bank, length: int, beat: int, start: int, split: str, rng: np.random.Generator) -> Wave:
    """A steady texture whose loudness follows the beat: swells for a drone, pulses for hiss."""
    name = _pick(rng, CLASSES[sound].recordings(split))
    texture = _looped(_segment(bank.get(name, float(rng.integers(-2, 3))), split), length, rng)
    texture /= np.abs(texture).max()
    phase = ((np.arange(length) - start) % beat) / beat
    if sound == "drone":
        rise = np.minimum(phase / 0.25, 1.0) * np.minimum((1.0 - phase) / 0.75, 1.0)
        envelope = 0.02 + 0.98 * rise**2
    else:
        ramp = 0.04
        envelope = 0.03 + 0.97 * np.clip(np.minimum(phase / ramp, (0.5 - phase) / ramp + 1.0), 0.0, 1.0)
    return (texture * envelope).astype(np.float32)


def _levelled(wave: Wave, rng: np.random.Generator) -> Wave:
    """The wave with its peak somewhere in the 5 dB below 0.7."""
    loudness = 0.7 * 10.0 ** (rng.uniform(-5.0, 0.0) / 20.0)
    return (wave * (loudness / (np.abs(wave).max() + 1e-9))).astype(np.float32)


def scene(
    bank: Bank,
    sound: str,
    tempo: str,
    rng: np.random.Generator,
    seconds: float = CLIP_SECONDS,
    split: str = "train",
    on_grid: bool = True,
) -> Wave:
    """One scene as mono float32 at 16 kHz, (seconds * 16000,).

    `on_grid`: the beat is exactly `TEMPI[tempo]` and the scene starts on a multiple of `GRID` frames of its bar;
    otherwise the beat is up to 8 % shorter or longer and the scene starts anywhere in it.
    """
    length = round(seconds * SAMPLE_RATE)
    beat = TEMPI[tempo] * LATENT_HOP
    if on_grid:
        start = int(rng.integers(4 * TEMPI[tempo] // GRID)) * GRID * LATENT_HOP
    else:
        beat = int(rng.uniform(0.92, 1.08) * beat)
        start = int(rng.integers(4 * beat))
    if sound in ("drone", "vinyl hiss"):
        out = _swell(sound, bank, length, beat, start, split, rng)
    else:
        bar = _bar(sound, bank, beat, split, rng)
        step = 4 * beat / len(bar)
        out = np.zeros(length + 8 * beat, np.float32)
        for index in range(int(np.ceil((length + 4 * beat) / step))):
            event = bar[index % len(bar)]
            at = round(index * step)
            out[at : at + len(event)] += event[: len(out) - at]
        out = out[4 * beat - start % (4 * beat) :][:length]
    return _levelled(out, rng)


def stranger(bank: Bank, name: str, tempo: str, rng: np.random.Generator, seconds: float = CLIP_SECONDS) -> Wave:
    """Steady hits of one of `STRANGERS`, from any place in a long one, off the grid: mono, (seconds * 16000,)."""
    length = round(seconds * SAMPLE_RATE)
    beat = int(rng.uniform(0.92, 1.08) * TEMPI[tempo] * LATENT_HOP)
    sound = bank.get(name, float(rng.integers(-2, 3)))
    offset = int(rng.integers(max(1, len(sound) - 2 * SAMPLE_RATE)))
    hit = _hit(sound[offset:], beat, rng.uniform(0.3, 1.5))
    accents = ACCENTS[int(rng.integers(len(ACCENTS)))]
    out = np.zeros(length + 8 * beat, np.float32)
    for index in range(length // beat + 5):
        out[index * beat :][: len(hit)] += accents[index % 4] * hit
    out = out[int(rng.integers(4 * beat)) :][:length]
    return _levelled(out, rng)


def balanced(count: int) -> list[tuple[str, str]]:
    """`count` pairs of class and tempo, all 36 in turn."""
    pairs = [(s, t) for s in CLASS_NAMES for t in TEMPO_NAMES]
    return [pairs[i % len(pairs)] for i in range(count)]


def scenes(
    bank: Bank,
    count: int,
    seed: int,
    seconds: float = CLIP_SECONDS,
    split: str = "train",
    on_grid: bool | Callable[[int], bool] = True,
) -> tuple[Wave, list[tuple[str, str]]]:
    """`count` balanced scenes, (count, samples), and their labels. Scene i depends on (seed, i) only."""
    labels = balanced(count)
    out = np.zeros((count, round(seconds * SAMPLE_RATE)), np.float32)
    for i, (sound, tempo) in enumerate(labels):
        grid = on_grid(i) if callable(on_grid) else on_grid
        out[i] = scene(bank, sound, tempo, np.random.default_rng([seed, i]), seconds, split, grid)
    return out, labels
