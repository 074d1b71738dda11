"""The log-mel spectrogram of AudioLDM and HiFi-GAN: 16 kHz, 64 Slaney mels from 0 to 8000 Hz, 100 frames per second."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

SAMPLE_RATE = 16_000
HOP = 160
N_FFT = 1024
N_MELS = 64
LOG_FLOOR = 1e-5
CLIP_SECONDS = 5.12  # the model's native length: 512 mel frames, 128 latent frames
CLIP_SAMPLES = 81_920


def mel_filters() -> Tensor:
    """Slaney-style triangular mel filters of unit area, 0-8000 Hz: (N_MELS, N_FFT // 2 + 1)."""

    def to_mel(hz: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        above = 15.0 + np.log(np.maximum(hz, 1.0) / 1000.0) * (27.0 / np.log(6.4))
        return np.where(hz < 1000.0, hz * 3.0 / 200.0, above)

    def to_hz(mel: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.where(mel < 15.0, mel * 200.0 / 3.0, 1000.0 * np.exp((mel - 15.0) * (np.log(6.4) / 27.0)))

    bins = np.linspace(0.0, SAMPLE_RATE / 2, N_FFT // 2 + 1)
    top = to_mel(np.array([SAMPLE_RATE / 2.0]))[0]
    edges = to_hz(np.linspace(0.0, top, N_MELS + 2))
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    shape = np.maximum(0.0, np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)))
    return torch.from_numpy((shape * 2.0 / (high - low)).astype(np.float32))


class LogMel(torch.nn.Module):
    """Natural log of the clamped mel magnitude: wave (batch, samples) -> (batch, 1, samples / HOP, N_MELS)."""

    filters: Tensor
    window: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filters", mel_filters())
        self.register_buffer("window", torch.hann_window(N_FFT))

    def forward(self, wave: Tensor) -> Tensor:
        pad = (N_FFT - HOP) // 2
        padded = torch.nn.functional.pad(wave[:, None], (pad, pad), mode="reflect")[:, 0]
        spectrum = torch.stft(padded, N_FFT, HOP, window=self.window, center=False, return_complex=True)
        power = spectrum.real.square() + spectrum.imag.square()
        mel = self.filters @ (power + 1e-12).sqrt()
        return mel.clamp(min=LOG_FLOOR).log().transpose(1, 2)[:, None]


def log_mels(waves: npt.NDArray[np.float32]) -> Tensor:
    """(count, samples) -> (count, 1, frames, N_MELS), in small batches."""
    mel = LogMel()
    with torch.inference_mode():
        out = torch.cat([mel(torch.from_numpy(waves[i : i + 32])) for i in range(0, len(waves), 32)])
    return out.clone()
