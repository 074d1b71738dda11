"""Generate a clip with an AudioLDM-style pipeline and LiteFocus attention, and write it as a wav file.

python examples/generate.py                                     # 20 s from the embedded pipeline
python examples/generate.py "a slow bell" --seconds 60 --compare
python examples/generate.py "rain on a tin roof" --model cvssp/audioldm2 --steps 200
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from diffusers import DiffusionPipeline
from transformers import GPT2LMHeadModel

import litefocus

EMBEDDED = Path(__file__).parent / "embedded" / "pipeline"
PROMPT = "a fast tabla rhythm"
LONGEST = 3600  # seconds


def load_pipeline(model: str, device: Any = None) -> Any:
    """The pipeline of a folder or a hub id, on `device`: by default on the GPU where there is one."""
    if not Path(model).is_dir() and not re.fullmatch(r"[\w-]+/[\w.-]+", model):
        raise OSError("no such folder, and hub ids look like owner/name")
    index = DiffusionPipeline.load_config(model)
    parts = {}
    if (index.get("language_model") or ("", ""))[1] == "GPT2Model":
        # The published AudioLDM 2 names GPT2Model, which transformers 4.52 and newer cannot generate with. The class
        # with the language-model head reads the same weights and gives identical output.
        parts["language_model"] = GPT2LMHeadModel.from_pretrained(model, subfolder="language_model")
    pipe = DiffusionPipeline.from_pretrained(model, **parts)
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def guidance_for(model: str, guidance: float | None) -> float | None:
    """`guidance` as given, else what suits the model; None leaves it to the pipeline."""
    if guidance is None and model == str(EMBEDDED):
        return 5.0  # its judge names 92 % of clips rightly then, 86 % at 3 (examples/embedded/README.md)
    return guidance


def generate(pipe: Any, args: argparse.Namespace) -> tuple[np.ndarray, float]:
    """Samples of one clip, and the seconds that it took."""
    started = time.perf_counter()
    audio = pipe(
        args.prompt,
        audio_length_in_s=args.seconds,
        num_inference_steps=args.steps,
        **({} if args.guidance is None else {"guidance_scale": args.guidance}),
        generator=torch.Generator("cpu").manual_seed(args.seed),
    ).audios[0]
    return np.asarray(audio, dtype=np.float32), time.perf_counter() - started


def save(path: Path, write: Any, quiet: bool = False) -> None:
    """Call `write` with a temporary path beside `path`, then move the file there: whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        whole = Path(folder, path.name)
        write(whole)
        whole.replace(path)
    if not quiet:
        print(f"wrote {path}")


def save_spectrograms(clips: dict[str, np.ndarray], rate: int, path: Path) -> None:
    """One picture, a spectrogram for every clip, over seconds and Hz."""
    from matplotlib import mlab
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3 * len(clips)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, clip) in zip(np.atleast_1d(figure.subplots(len(clips), sharex=True)), clips.items(), strict=True):
        power, frequencies, times = mlab.specgram(clip, NFFT=1024, Fs=rate, noverlap=512)
        picture = axes.pcolormesh(
            times, frequencies, 10 * np.log10(power + 1e-12), vmin=-110, vmax=-30, cmap="cividis", rasterized=True
        )
        axes.set(title=title, ylabel="frequency (Hz)", xlabel="time (s)")
        axes.label_outer()
        figure.colorbar(picture, ax=axes, label="dB")
    figure.savefig(path, dpi=100)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Exits with code 2 and one line for everything that can be seen to fail before the work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default=PROMPT, help="what should sound (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of the clip (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("clip.wav"), help="wav to write (default: %(default)s)")
    parser.add_argument("--model", default=str(EMBEDDED), help="folder or hub id (default: the embedded pipeline)")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (default: %(default)s)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's; 5 if embedded)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--no-patch", action="store_true", help="dense attention, without litefocus")
    mode.add_argument("--compare", action="store_true", help="dense and patched: times, two wavs and one png")
    args = parser.parse_args(argv)

    def fail(message: str) -> None:
        parser.exit(2, f"{parser.prog}: error: {message}\n")

    if not (math.isfinite(args.seconds) and 0.5 <= args.seconds <= LONGEST):
        fail(f"--seconds must be between 0.5 and {LONGEST}, got {args.seconds:g}")
    if args.steps < 1:
        fail(f"--steps must be at least 1, got {args.steps}")
    args.guidance = guidance_for(args.model, args.guidance)
    if args.guidance is not None and not (math.isfinite(args.guidance) and args.guidance >= 0):
        fail(f"--guidance must be finite and at least 0, got {args.guidance:g}")
    if not 0 <= args.seed < 2**63:
        fail(f"--seed must be at least 0 and below 2**63, got {args.seed}")
    if args.output.suffix.lower() != ".wav":
        fail(f"--output must end in .wav, got {args.output}")
    if args.output.is_dir():
        fail(f"--output {args.output} is a folder")
    try:
        with tempfile.TemporaryFile(dir=args.output.parent):
            pass
    except OSError as error:
        fail(f"cannot write into {args.output.parent}: {error.strerror}")
    try:
        args.pipe = load_pipeline(args.model)
        litefocus.patch(args.pipe).remove()
    except Exception as error:  # whatever a hub, a folder or a file in it can get wrong
        fail(f"cannot use {args.model}: {(str(error).strip() or type(error).__name__).splitlines()[0]}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`."""
    args = parse(argv)
    pipe = args.pipe
    unknown = {"input_ids": []} if getattr(pipe, "tokenizer_2", None) is None else pipe.tokenizer_2(args.prompt)
    if getattr(getattr(pipe, "tokenizer_2", None), "unk_token_id", None) in unknown["input_ids"]:
        print("note: some words of the prompt are not in this model's vocabulary", file=sys.stderr)

    clips: dict[str, np.ndarray] = {}
    took: dict[str, float] = {}
    if args.no_patch or args.compare:
        clips["dense"], took["dense"] = generate(pipe, args)
    if not args.no_patch:
        with litefocus.patch(pipe):
            clips["litefocus"], took["litefocus"] = generate(pipe, args)

    rate = pipe.vocoder.config.sampling_rate
    for name, clip in clips.items():
        path = (
            args.output if name == "litefocus" or args.no_patch else args.output.with_stem(args.output.stem + "_dense")
        )
        save(path, lambda whole, clip=clip: soundfile.write(whole, clip, rate))
    for name, seconds in took.items():
        print(f"{name}: {len(clips[name]) / rate:.2f} s of audio in {seconds:.1f} s")
    if args.compare:
        print(f"speed-up of the whole pipeline: {took['dense'] / took['litefocus']:.2f}x")
        save(args.output.with_suffix(".png"), lambda whole: save_spectrograms(clips, rate, whole))


if __name__ == "__main__":
    main()
