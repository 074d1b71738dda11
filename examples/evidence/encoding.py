"""Peak memory of AudioSR's encoder at its published widths, by the length of the clip: encoding.json.

python examples/evidence/encoding.py           # in about a minute

Counted on tensors that have shapes and no numbers, so the machine does not matter. It takes the package audiosr 0.0.7,
installed with --no-deps.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from types import ModuleType
from typing import Any
from unittest import mock

from report import HERE, Row, interruptible, write

SECONDS = (10.0, 30.0, 80.0, 600.0)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", nargs="+", type=float, default=SECONDS, help="lengths of the clip")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse()  # `--help` and mistakes are answered before the imports below, which take seconds

with interruptible():
    import torch
    from speed import PeakMemory
    from torch import Tensor, nn
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    import litefocus
    from litefocus import _decoding


def audiosr(module: str) -> Any:
    """A module of the package, without the package's own __init__, which imports far more."""
    if "audiosr" not in sys.modules:
        spec = importlib.util.find_spec("audiosr")
        if spec is None:
            sys.exit("pip install einops && pip install --no-deps audiosr==0.0.7")
        sys.modules["audiosr"] = ModuleType("audiosr")
        sys.modules["audiosr"].__path__ = list(spec.submodule_search_locations or ())
    return importlib.import_module(f"audiosr.latent_diffusion.modules.{module}")


class VAE(nn.Module):
    """The encoding half of AudioSR's `AutoencoderKL`."""

    decode = None  # `tile_decoding` looks for it

    def __init__(self) -> None:
        super().__init__()
        widths = {"ch": 128, "ch_mult": (1, 2, 4, 8), "num_res_blocks": 2, "z_channels": 16, "out_ch": 1}
        kind = audiosr("diffusionmodules.model").Encoder
        self.encoder = kind(**widths, in_channels=1, attn_resolutions=[], resolution=256)
        self.quant_conv = nn.Conv2d(32, 32, 1)

    def encode(self, x: Tensor) -> Any:
        """x: (batch, 1, frames, 256)."""
        return audiosr("distributions.distributions").DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))


class Model:
    """What `tile_decoding` reads of a `LatentDiffusion`: a VAE, and the rates of a vocoder of 48 kHz."""

    def __init__(self) -> None:
        self.first_stage_model = VAE().eval()
        rates = {"upsample_rates": (6, 5, 4, 2, 2), "upsample_kernel_sizes": (12, 10, 8, 4, 4)}
        self.vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig(model_in_dim=256, sampling_rate=48000, **rates))

    def mel_spectrogram_to_waveform(self, mels: Tensor) -> Tensor:
        """Not called here."""
        raise NotImplementedError


def count(seconds: float, tiled: bool) -> Row:
    """Bytes that encoding a clip allocates beside input and weights, in float32.

    In two passes over the tiles, since there are no numbers that could tell whether moments change in the second.
    """
    two_passes = mock.patch.object(_decoding._ClipNorms, "_changed", return_value=False)
    with FakeTensorMode(), torch.no_grad(), two_passes:
        pipe, mels = Model(), torch.zeros(1, 1, round(100 * seconds), 256)
        if tiled:
            litefocus.tile_decoding(pipe)
        with PeakMemory() as memory:
            pipe.first_stage_model.encode(mels)
    return {"model": "AudioSR", "seconds": seconds, "tiled": tiled, "bytes": memory.peak}


def main(argv: list[str] | None = None) -> None:
    """Count every length, whole and tiled."""
    rows = []
    for seconds in parse(argv).seconds:
        for tiled in (False, True):
            rows.append(count(seconds, tiled))
            print(rows[-1], flush=True)
    write(HERE / "encoding.json", {"rows": rows})


if __name__ == "__main__":
    with interruptible():
        main()
