"""Clips of minutes end to end: attention in time windows, and VAE and vocoder in windows too, where memory goes.

    python examples/minutes.py "a slow bell" --seconds 300 --output bell.wav    # also prints time and peak memory
    python examples/minutes.py --measure                                        # what decoding in windows changes

A vocoder is convolutions alone: in windows that overlap by its reach, it is the same to rounding. A VAE decoder has
group norms over the whole clip (in published checkpoints also one attention layer), so windows change its output a
little: `--measure` prints how much, for several windows and overlaps, and what happens at the seams, beside diffusers'
own tiling, which cuts the frequency axis too.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from generate import EMBEDDED, guidance_for, load_pipeline, save
from torch import Tensor

import litefocus

WINDOW, OVERLAP = 1024, 16  # latent frames of 40 ms: 41 s, and 0.64 s on either side, decoded and thrown away
REACH = 32  # mel frames of 10 ms that a HiFi-GAN vocoder sees on either side: more than it does


def windows(frames: int, window: int, overlap: int) -> Iterator[tuple[slice, slice]]:
    """(what to put in, what of its output to keep) for every window of `frames` frames."""
    for start in range(0, frames, window):
        first, last = max(0, start - overlap), min(frames, start + window + overlap)
        yield slice(first, last), slice(start - first, min(start + window, frames) - first)


def in_windows(run: Callable[[Tensor], Tensor], x: Tensor, scale: int, window: int, overlap: int) -> Tensor:
    """`run` over windows of dim 2 of x (batch, channels, frames, ...), its outputs `scale` times as long, joined."""
    parts = []
    for put_in, keep in windows(x.shape[2], window, overlap):
        parts.append(run(x[:, :, put_in])[:, :, scale * keep.start : scale * keep.stop])
    return torch.cat(parts, dim=2)


@torch.inference_mode()
def decode(pipe: Any, latents: Tensor, window: int = WINDOW, overlap: int = OVERLAP) -> np.ndarray:
    """Waveforms (batch, samples) of latents (batch, channels, frames, bins), in memory of one window.

    pipe: AudioLDM, AudioLDM 2 or MusicLDM of diffusers; latents: what it returns for output_type="latent".
    window, overlap: in latent frames.
    """
    scale = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    mels = in_windows(
        lambda x: pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample, latents, scale, window, overlap
    )
    return vocode(pipe, mels, scale * window)


@torch.inference_mode()
def vocode(pipe: Any, mels: Tensor, window: int, overlap: int = REACH) -> np.ndarray:
    """Waveforms (batch, samples) of mels (batch, 1, frames, bins); `window` and `overlap` in mel frames."""
    hop = int(np.prod(pipe.vocoder.config.upsample_rates))
    waves = in_windows(lambda x: pipe.vocoder(x[:, 0])[:, None], mels, hop, window, overlap)
    return waves[:, 0].float().cpu().numpy()


def measure(pipe: Any) -> None:
    """What decoding in windows changes, on 41 s of four sounds, dense attention in time windows, 10 steps."""
    prompts = ["a fast tabla rhythm", "a slow drone", "a medium breakbeat", "a slow bell"]
    with litefocus.patch(pipe, min_freq_bins=2, time_window=256):
        latents = pipe(
            prompts,
            audio_length_in_s=40.96,
            num_inference_steps=10,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).audios
    scaling = pipe.vae.config.scaling_factor

    def decoded(x: Tensor) -> Tensor:
        return torch.cat([pipe.vae.decode(one / scaling).sample for one in x.split(1)])

    with torch.inference_mode():
        whole = decoded(latents)
        rows = {}
        for window, overlap in [(w, o) for w in (128, 256, 512) for o in (0, 8, 32)]:
            rows[f"windows of {window}, overlap {overlap}"] = (
                in_windows(decoded, latents, 4, window, overlap),
                range(4 * window, whole.shape[2], 4 * window),
            )
        pipe.vae.enable_tiling()
        rows["diffusers' tiling"] = (decoded(latents), range(0))
        pipe.vae.disable_tiling()
        print("log-mel error (nats), mean and at seams; step across a seam, and there without one")
        for name, (mels, seams) in rows.items():
            error = (mels - whole).abs()
            text = f"{name:<28} {error.mean():.4f}"
            if len(seams):
                at = torch.tensor(list(seams))
                steps = [(x[:, :, at] - x[:, :, at - 1]).abs().mean() for x in (mels, whole)]
                text += f"  {error[:, :, torch.cat([at - 1, at])].mean():.4f}  {steps[0]:.4f}  {steps[1]:.4f}"
            print(text)
        exact = vocode(pipe, whole, whole.shape[2])
        joined = vocode(pipe, rows["windows of 512, overlap 8"][0], whole.shape[2])
        at = range(2048 * 160, exact.shape[1], 2048 * 160)
        jumps = [max(np.abs(np.diff(wave[:, i - 160 : i + 160])).max() for i in at) for wave in (joined, exact)]
        print(f"largest step between samples at those seams: {jumps[0]:.3f}, {jumps[1]:.3f} without one")
        for reach in (0, 8, 16, 32):
            waves = vocode(pipe, whole, 512, reach)
            print(f"vocoder in windows of 512 mel frames, overlap {reach}: {np.abs(waves - exact).max():.2e} at most")


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a fast tabla rhythm")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--output", type=Path, default=Path("minutes.wav"))
    parser.add_argument(
        "--model", default=str(EMBEDDED), help="folder or hub id of an AudioLDM, AudioLDM 2 or MusicLDM"
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", action="store_true")
    args = parser.parse_args(argv)
    pipe = load_pipeline(args.model)
    if args.measure:
        measure(pipe)
        return
    started = time.perf_counter()
    guidance = guidance_for(args.model, args.guidance)
    with litefocus.patch(pipe, min_freq_bins=2, time_window=256):
        latents = pipe(
            args.prompt,
            audio_length_in_s=args.seconds,
            num_inference_steps=args.steps,
            **({} if guidance is None else {"guidance_scale": guidance}),
            generator=torch.Generator().manual_seed(args.seed),
            output_type="latent",
        ).audios
    wave = decode(pipe, latents)[0, : round(args.seconds * pipe.vocoder.config.sampling_rate)]
    save(args.output, lambda whole: soundfile.write(whole, wave, pipe.vocoder.config.sampling_rate))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{args.seconds:g} s of audio in {time.perf_counter() - started:.0f} s, {peak:.2f} GiB of memory at most")


if __name__ == "__main__":
    main()
