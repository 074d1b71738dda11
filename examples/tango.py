"""A long clip from Tango or Tango 2, whose own code makes clips of 10.24 seconds only.

    git clone https://github.com/declare-lab/tango && cd tango       # and what its audioldm folder imports: librosa
    python .../examples/tango.py "rain on a tin roof" --seconds 60

Run it in a clone of declare-lab/tango, on current diffusers. Weights (5 GB) come from the hub.
"""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

import soundfile
import torch

import litefocus


def mend_imports() -> None:
    """Let Tango's code, written for diffusers 0.18 and librosa 0.9, run on current ones, once it is imported."""
    import diffusers.utils
    import diffusers.utils.torch_utils
    import librosa.filters
    import librosa.util

    # models.py: `from diffusers.utils import randn_tensor`, which has moved
    diffusers.utils.randn_tensor = diffusers.utils.torch_utils.randn_tensor

    # audioldm/audio/stft.py passes by position what librosa 0.10 takes by keyword alone
    def by_position(function: Any, taken: int, *names: str) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*args[:taken], **dict(zip(names, args[taken:], strict=False)), **kwargs)

        return call

    librosa.filters.mel = by_position(librosa.filters.mel, 0, "sr", "n_fft", "n_mels", "fmin", "fmax")
    librosa.util.pad_center = by_position(librosa.util.pad_center, 1, "size")


def main() -> None:
    """Load Tango, set the length, patch, generate, write the wav."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--seconds", type=float, default=60.0, help="default: %(default)s")
    parser.add_argument("--model", default="declare-lab/tango2", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--time-window", type=int, help="latent frames (25 a second) around a query, for minutes")
    parser.add_argument("--output", default="tango.wav", help="default: %(default)s")
    args = parser.parse_args()

    mend_imports()
    sys.path.insert(0, "")  # the clone of Tango that this is run in
    from tango import Tango

    tango = Tango(args.model, device="cuda:0" if torch.cuda.is_available() else "cpu")
    litefocus.set_duration(tango, args.seconds)
    print(litefocus.patch(tango, time_window=args.time_window))
    torch.manual_seed(args.seed)  # Tango draws from the global generator
    soundfile.write(args.output, tango.generate(args.prompt, steps=args.steps), 16000)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
