"""Name the class and the tempo of a waveform: a small CNN trained on real scenes only, never on generated ones.

from judge import classify
classify(waveform)      # ("tabla", "fast")
"""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from mel import CLIP_SAMPLES, LogMel
from safetensors import safe_open
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("classifier.safetensors")


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

    def forward(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        early = self.early((mel + 6.5) / 3.3)  # (B, 24, 256, 16)
        late = self.late(early)  # (B, 96, 32, 4)
        pooled = torch.cat([late.mean(dim=2), late.amax(dim=2)], dim=1).flatten(1)
        curves = self.curves(early.transpose(2, 3).flatten(1, 2))  # (B, curves, 256)
        curves = curves - curves.mean(dim=2, keepdim=True)
        power = torch.fft.rfft(curves, n=2 * curves.shape[2]).abs().square()
        echo = torch.fft.irfft(power)[:, :, : self.lags]
        echo = echo / (echo[:, :, :1] + 1e-4)
        return self.class_head(pooled), self.tempo_head(echo.flatten(1))


@lru_cache(maxsize=1)
def load_judge(weights: Path = WEIGHTS) -> tuple[Judge, tuple[str, ...], tuple[str, ...]]:
    """The trained judge with its class names and tempo names."""
    with safe_open(weights, framework="pt") as file:
        names = json.loads(file.metadata()["names"])
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    judge = Judge(len(names["classes"]), len(names["tempi"]))
    judge.load_state_dict({key: v.float() if v.is_floating_point() else v for key, v in state.items()})
    return judge.eval(), tuple(names["classes"]), tuple(names["tempi"])


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
