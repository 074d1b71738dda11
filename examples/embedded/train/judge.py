"""Those who listen: small CNNs trained on real scenes only, never on generated ones.

from judge import classify
classify(waveform)      # ("tabla", "fast")

The judge names class and tempo. The embedder, for Fréchet distances, was trained to tell recordings apart of which the
pipeline, and the judge, never heard one.
"""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from mel import CLIP_SAMPLES, SAMPLE_RATE, LogMel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("classifier.safetensors")
EMBEDDER_WEIGHTS = Path(__file__).with_name("embedder.safetensors")


class Judge(nn.Module):
    """Log-mel (B, 1, 512, 64) -> logits of class (B, classes) and of tempo (B, tempi).

    The class comes from averaged convolution features; the tempo from the autocorrelation, up to 1 s, of
    curves at 20 ms that the first layers learn to draw (onsets, loudness).
    """

    def __init__(self, classes: int = 12, tempi: int = 3, curves: int = 12) -> None:
        super().__init__()

        def layer(inputs: int, outputs: int, stride: tuple[int, int]) -> nn.Sequential:
            conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

        self.early = nn.Sequential(layer(1, 12, (2, 2)), layer(12, 24, (1, 2)))
        self.late = nn.Sequential(layer(24, 32, (2, 2)), layer(32, 64, (2, 2)), layer(64, 96, (2, 1)))
        self.class_head = nn.Sequential(nn.Dropout(0.2), nn.Linear(2 * 96 * 4, classes))
        self.curves = nn.Conv1d(24 * 16, curves, 3, padding=1)
        self.lags = 56
        self.tempo_head = nn.Sequential(
            nn.Linear(curves * self.lags, 48), nn.ReLU(), nn.Dropout(0.2), nn.Linear(48, tempi)
        )

    def features(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """What the heads see: (B, 768) of timbre, (B, curves * lags) of rhythm. `mel` may have other even lengths."""
        early = self.early((mel + 6.5) / 3.3)  # (B, 24, 256, 16)
        late = self.late(early)  # (B, 96, 32, 4)
        pooled = torch.cat([late.mean(dim=2), late.amax(dim=2)], dim=1).flatten(1)
        curves = self.curves(early.transpose(2, 3).flatten(1, 2))  # (B, curves, 256)
        curves = curves - curves.mean(dim=2, keepdim=True)
        power = torch.fft.rfft(curves, n=2 * curves.shape[2]).abs().square()
        echo = torch.fft.irfft(power)[:, :, : self.lags]
        return pooled, (echo / (echo[:, :, :1] + 1e-4)).flatten(1)

    def forward(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        pooled, echo = self.features(mel)
        return self.class_head(pooled), self.tempo_head(echo)


class Embedder(Judge):
    """Log-mel (B, 1, frames, 64) -> (B, 48): 32 numbers of timbre, 16 of rhythm.

    A judge of recordings and tempi with narrow heads; their first layers' outputs are the embedding.
    """

    def __init__(self, recordings: int, tempi: int = 3) -> None:
        super().__init__(recordings, tempi)
        self.class_head = nn.Sequential(nn.Linear(2 * 96 * 4, 32), nn.ReLU(), nn.Linear(32, recordings))
        self.tempo_head = nn.Sequential(
            nn.Linear(self.curves.out_channels * self.lags, 16), nn.ReLU(), nn.Linear(16, tempi)
        )

    def embed(self, mel: Tensor) -> Tensor:
        """The embedding, before the first non-linearity of either head."""
        pooled, echo = self.features(mel)
        return torch.cat([self.class_head[0](pooled), self.tempo_head[0](echo)], dim=1)


@lru_cache(maxsize=1)
def load_judge(weights: Path = WEIGHTS) -> tuple[Judge, tuple[str, ...], tuple[str, ...]]:
    """The trained judge with its class names and tempo names."""
    with safe_open(weights, framework="pt") as file:
        names = json.loads(file.metadata()["names"])
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    judge = Judge(len(names["classes"]), len(names["tempi"]))
    judge.load_state_dict({key: v.float() if v.is_floating_point() else v for key, v in state.items()})
    return judge.eval(), tuple(names["classes"]), tuple(names["tempi"])


@lru_cache(maxsize=1)
def load_embedder(weights: Path = EMBEDDER_WEIGHTS) -> Embedder:
    """The trained embedder."""
    state = {key: value.float() if value.is_floating_point() else value for key, value in load_file(weights).items()}
    embedder = Embedder(len(state["class_head.2.bias"]))
    embedder.load_state_dict(state)
    return embedder.eval()


@torch.inference_mode()
def embed(waveforms: npt.NDArray[np.float32], sampling_rate: int) -> npt.NDArray[np.float32]:
    """Embeddings (batch, 48) of waveforms (batch, samples) at 16 kHz, 1 s or longer, for `../compare.py`."""
    if sampling_rate != SAMPLE_RATE or waveforms.shape[1] < SAMPLE_RATE:
        raise ValueError(
            f"the embedded embedder hears windows of at least 1 s at {SAMPLE_RATE} Hz, got {waveforms.shape[1]} "
            f"samples at {sampling_rate} Hz; name another"
        )
    return load_embedder().embed(LogMel()(torch.from_numpy(waveforms))).numpy()


def window_probabilities(
    waveform: npt.ArrayLike, hop: int = CLIP_SAMPLES // 2, weights: Path = WEIGHTS
) -> tuple[Tensor, Tensor]:
    """Class (windows, 12) and tempo (windows, 3) probabilities of 5.12 s windows, `hop` samples apart.

    waveform: mono, 16 kHz, float, at least 81,920 samples. A rest shorter than a hop is not looked at.
    """
    sound = torch.from_numpy(np.asarray(waveform, dtype=np.float32).copy())
    if sound.ndim != 1 or len(sound) < CLIP_SAMPLES:
        raise ValueError(f"need a mono waveform of at least {CLIP_SAMPLES} samples, got shape {tuple(sound.shape)}")
    judge, _, _ = load_judge(weights)
    with torch.inference_mode():
        sound_logits, tempo_logits = judge(LogMel()(sound.unfold(0, CLIP_SAMPLES, hop)))
    return sound_logits.softmax(dim=1), tempo_logits.softmax(dim=1)


def classify(waveform: npt.ArrayLike) -> tuple[str, str]:
    """Class and tempo of `waveform`, e.g. ("kick", "slow").

    waveform: mono float samples at 16 kHz, any length from 5.12 s (81,920 samples) on. Longer ones are cut into
    windows of 5.12 s, half overlapping, whose probabilities are averaged.
    """
    sound, tempo = window_probabilities(waveform)
    _, classes, tempi = load_judge()
    return classes[int(sound.mean(dim=0).argmax())], tempi[int(tempo.mean(dim=0).argmax())]
