"""A long clip from Tango 2 (or Tango: --model declare-lab/tango), whose own code makes clips of 10.24 seconds only.

    git clone https://github.com/declare-lab/tango && cd tango
    pip install einops librosa progressbar pyyaml scipy torchaudio tqdm    # what its code imports; not its requirements
    python .../examples/tango.py "rain on a tin roof" --seconds 60

Run it in a clone of declare-lab/tango, on current diffusers. Weights (5 GB) come from the hub.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import _cli

# what Tango's code imports beside torch, diffusers and transformers: module, and package where the name is another
NEEDS = {"einops": "", "librosa": "", "progressbar": "", "scipy": "", "torchaudio": "", "tqdm": "", "yaml": "pyyaml"}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked."""
    parser = _cli.Parser(__doc__, sound="tango.wav")
    parser.add_argument("prompt", help="what should sound")
    parser.set_defaults(seconds=60.0, model="declare-lab/tango2", steps=100, guidance=3.0)
    args = parser.parse_args(argv)
    if not Path("audioldm").is_dir() or not Path("tango.py").is_file():
        parser.error("run this in a clone of declare-lab/tango: git clone https://github.com/declare-lab/tango")
    if missing := [package or name for name, package in NEEDS.items() if not importlib.util.find_spec(name)]:
        parser.error(f"Tango's code needs more: pip install {' '.join(missing)}")
    return args


if __name__ == "__main__":
    parse()  # `--help` and mistakes are answered before the imports below, which take seconds

with _cli.interruptible():
    import torch

    import litefocus


def adapt_imports() -> None:
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


def place(tango: Any, device: torch.device, dtype: torch.dtype, offload: bool) -> None:
    """Let the UNet of `tango` run in `dtype` and, if it is to offload, keep on the device only what is at work.

    Text encoder, VAE and vocoder stay in float32: the encoder is a T5, and those overflow in half precision.
    """

    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    tango.model.unet.to(dtype).register_forward_pre_hook(
        lambda _, args, kwargs: (tuple(map(cast, args)), {name: cast(x) for name, x in kwargs.items()}),
        with_kwargs=True,
    )
    denoise = tango.model.inference

    @functools.wraps(denoise)
    def inference(*args: Any, **kwargs: Any) -> torch.Tensor:
        if offload:
            tango.vae.to("cpu")
            tango.model.to(device)
        latents = denoise(*args, **kwargs).float()
        if offload:
            tango.model.to("cpu")
            tango.vae.to(device)
        return latents

    tango.model.inference = inference


def main(argv: list[str] | None = None) -> None:
    """Load Tango, set the length, patch, generate, write the clip."""
    args = parse(argv)
    with _cli.refusing():
        _cli.complete(args)
        sys.path.insert(0, "")  # the clone of Tango that this is run in
        adapt_imports()
        from tango import Tango

        tango = Tango(args.model, device=str(torch.device("cpu") if args.offload else args.device))
        place(tango, args.device, getattr(torch, args.dtype), args.offload)
        litefocus.set_duration(tango, args.seconds)
        litefocus.patch(tango, args.config)
        if args.at:
            litefocus.schedule_prompts(tango, args.at, fade=args.fade)
        if args.tile_decoding:
            litefocus.tile_decoding(tango)

    torch.manual_seed(args.seed)  # Tango draws from the global generator
    wave = tango.generate(args.prompt, steps=args.steps, guidance=args.guidance, disable_progress=False)
    _cli.save_sound(args.output, wave, 16000)
    print(f"wrote {args.output}")
    if memory := _cli.peak_memory():
        print(memory)


if __name__ == "__main__":
    with _cli.interruptible():
        main()
