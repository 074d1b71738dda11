"""Generate a clip with an AudioLDM-style pipeline and LiteFocus attention, and write it as a wav file.

python examples/generate.py                                     # 20 s from the embedded pipeline
python examples/generate.py "a slow bell" --seconds 300         # attention and memory both grow linearly
python examples/generate.py "a slow drone" --seconds 60 --compare
python examples/generate.py "rain on a tin roof" --model cvssp/audioldm2 --steps 200 --offload
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import math
import numbers
import re
import statistics
import sys
import tempfile
import time
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C inside is one line and exit code 130. The imports below take seconds."""
    try:
        yield
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


with interruptible():
    import diffusers
    import numpy as np
    import soundfile
    import torch
    import transformers
    from diffusers import DiffusionPipeline
    from transformers import GPT2LMHeadModel

    import litefocus
    from litefocus import LiteFocusConfig

EMBEDDED = Path(__file__).parent / "embedded" / "pipeline"
PROMPT = "a fast tabla rhythm"
FORMATS = (".wav", ".flac", ".mp3")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# What every example checks before any work: (type, whether a value will do, what will do). A guidance of None is the
# model's own.
SETTINGS: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "prompt": (str, lambda text: bool(text.strip()) and not re.search("[\ud800-\udfff]", text), "text, and not empty"),
    "seconds": (numbers.Real, lambda seconds: 0.5 <= seconds <= 3600, "a number between 0.5 and 3600"),
    "steps": (int, lambda steps: 1 <= steps <= 1000, "an integer between 1 and 1000"),
    "guidance": (numbers.Real, lambda scale: 0 <= scale < math.inf, "a finite number of at least 0"),
    "seed": (int, lambda seed: 0 <= seed < 2**63, "an integer of at least 0 and below 2**63"),
    "runs": (int, lambda runs: runs >= 1, "an integer of at least 1"),
}


class Parser(argparse.ArgumentParser):
    """Knows the options that all examples share, and tells a mistake in one line, with exit code 2."""

    def __init__(self, description: str | None, **options: Any) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        add_options(self)

    def error(self, message: str) -> NoReturn:
        """Exit."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Around everything that can be seen to fail before the work: what is raised is told and exits."""
        try:
            yield
        except (ImportError, OSError, TypeError, ValueError) as error:
            self.error(first_line(error))


def first_line(error: BaseException) -> str:
    """What the error says, or is, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that all examples share: of the clip, of the pipeline, and every field of `LiteFocusConfig`."""
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a clip (default: %(default)s)")
    parser.add_argument("--model", default=str(EMBEDDED), help="folder or hub id (default: the embedded pipeline)")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (default: %(default)s)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the model's; 5 for the embedded one)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: float16 on a GPU, float32 on a CPU")
    parser.add_argument("--offload", action="store_true", help="keep on the GPU only the model that is at work")
    parser.add_argument(
        "--tile-decoding",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="VAE and vocoder in tiles of time, in the memory of one (default: %(default)s)",
    )
    attention = parser.add_argument_group(
        "attention", "fields of litefocus.LiteFocusConfig; the defaults fit any length"
    )
    for name, options in focus_options().items():
        attention.add_argument(name, **options)


def focus_options() -> dict[str, dict[str, Any]]:
    """An option for every field of `LiteFocusConfig`, with the help that its documentation has."""
    types = typing.get_type_hints(LiteFocusConfig)
    documented = dict(
        re.findall(r"^    (\w+): (.*?)(?=^    \w+: |^\S|\Z)", inspect.getdoc(LiteFocusConfig) or "", re.M | re.S)
    )
    options = {}
    for field in fields(LiteFocusConfig):
        option = {
            "dest": f"focus_{field.name}",
            "default": field.default,
            "help": " ".join(documented[field.name].split()).replace("%", "%%") + " (default: %(default)s)",
        }
        if types[field.name] is bool:
            option["action"] = argparse.BooleanOptionalAction
        else:
            kind = next(t for t in (float, int) if t in (types[field.name], *typing.get_args(types[field.name])))
            optional = type(None) in typing.get_args(types[field.name])
            option |= {"type": or_none(kind) if optional else kind, "metavar": "N or none" if optional else "N"}
        options["--focus-seed" if field.name == "seed" else "--" + field.name.replace("_", "-")] = option
    return options


def or_none(kind: type) -> Callable[[str], Any]:
    """A reader of `kind` that takes "none" for None."""

    def read(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    read.__name__ = kind.__name__  # argparse names it in its message
    return read


def complete(args: argparse.Namespace) -> None:
    """Check what the shared options say, and fill in what hangs on the machine and the model. Raises ValueError.

    Sets `args.device`, `args.dtype`, `args.guidance` and `args.config`, the settings of attention.
    """
    check(vars(args))
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.offload and args.device.type == "cpu":
        raise ValueError("offload needs a GPU; without one, all models are in main memory anyway")
    if args.dtype == "float16" and args.device.type == "cpu":
        raise ValueError("float16 needs a GPU; on a CPU use float32 or bfloat16")
    args.dtype = args.dtype or ("float32" if args.device.type == "cpu" else "float16")
    if args.guidance is None and args.model == str(EMBEDDED):
        args.guidance = 5.0  # its judge names 92 % of clips rightly then, 86 % at 3 (examples/embedded/README.md)
    args.config = LiteFocusConfig(
        **{field.name: getattr(args, f"focus_{field.name}") for field in fields(LiteFocusConfig)}
    )


def check(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for the first value of `settings` that its row of SETTINGS does not let pass."""
    for name, (kind, fits, wanted) in SETTINGS.items():
        if name not in settings or (name == "guidance" and settings[name] is None):
            continue
        value = settings[name]
        if not isinstance(value, kind) or isinstance(value, bool) or not fits(value):
            raise ValueError(f"{name} must be {wanted}, got {value!r}")


def check_output(path: Path) -> None:
    """Raise ValueError where no sound can be written to `path`."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"output must end in {', '.join(FORMATS)}, got {path}")
    if path.is_dir():
        raise ValueError(f"output {path} is a folder")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"cannot write into {path.parent}: {error.strerror}") from error


def load_pipeline(model: str, device: Any, dtype: str = "float32", offload: bool = False) -> Any:
    """The pipeline of a folder or a hub id, on `device`; with `offload`, each of its models only while it is at work.

    Raises ValueError with one line about whatever a hub, a folder or a file in it got wrong.
    """
    diffusers.utils.logging.disable_progress_bar()  # of reading files; that of downloads stays
    transformers.utils.logging.disable_progress_bar()
    # transformers 5.24 has renamed an argument that diffusers 0.42 passes to the language model, with the same result
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
    try:
        if not Path(model).is_dir() and not re.fullmatch(r"[\w-]+/[\w.-]+", model):
            raise OSError("no such folder, and hub ids look like owner/name")
        index = DiffusionPipeline.load_config(model)
        parts = {}
        if (index.get("language_model") or ("", ""))[1] == "GPT2Model":
            # The published AudioLDM 2 names GPT2Model, which transformers 4.52 and newer cannot generate with. The
            # class with the language-model head reads the same weights and gives identical output.
            parts["language_model"] = GPT2LMHeadModel.from_pretrained(model, subfolder="language_model")
            parts["language_model"].to(DTYPES[dtype])
        pipe = DiffusionPipeline.from_pretrained(model, dtype=DTYPES[dtype], **parts)
        if offload:
            pipe.enable_model_cpu_offload(device=device)
            return pipe
        return pipe.to(device)
    except Exception as error:
        raise ValueError(f"cannot use {model}: {first_line(error)}") from error


def load(args: argparse.Namespace) -> tuple[Any, litefocus.Patch]:
    """The pipeline that the completed options ask for, decoding in tiles and patched, and the patch."""
    pipe = load_pipeline(args.model, args.device, args.dtype, args.offload)
    if args.tile_decoding:
        litefocus.tile_decoding(pipe)
    return pipe, litefocus.patch(pipe, args.config)


def generate(pipe: Any, settings: Mapping[str, Any], **options: Any) -> tuple[np.ndarray, float]:
    """Samples of one clip in float32, and the seconds that it took; `options` go to the pipeline.

    settings: prompt, seconds, steps, guidance and seed.
    """
    started = time.perf_counter()
    if settings["guidance"] is not None:
        options["guidance_scale"] = settings["guidance"]
    audio = pipe(
        settings["prompt"],
        audio_length_in_s=settings["seconds"],
        num_inference_steps=settings["steps"],
        generator=torch.Generator("cpu").manual_seed(settings["seed"]),
        **options,
    ).audios[0]
    return np.asarray(audio, dtype=np.float32), time.perf_counter() - started


def peak_memory() -> str:
    """The most memory that was in use so far: of the GPU where there is one, else of the process; "" on Windows."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of GPU memory at most"
    try:
        import resource
    except ModuleNotFoundError:  # Unix has it
        return ""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB of memory at most"


def save(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` with a temporary path beside `path`, then move the file there: whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        whole = Path(folder, path.name)
        write(whole)
        whole.replace(path)


def spectrograms(clips: Mapping[str, np.ndarray], rate: int) -> Any:
    """A matplotlib figure with a spectrogram for every clip, over seconds and Hz."""
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
    return figure


def compare(
    pipe: Any, config: LiteFocusConfig, settings: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, list[float]]]:
    """Clips and seconds of dense attention and of LiteFocus, turn by turn, `settings["runs"]` times each."""
    clips: dict[str, np.ndarray] = {}
    took: dict[str, list[float]] = {"dense": [], "litefocus": []}
    for _ in range(settings["runs"]):
        for name, seconds in took.items():
            with litefocus.patch(pipe, config) if name == "litefocus" else contextlib.nullcontext():
                generate(pipe, {**settings, "steps": 1})  # warm: focus sets, kernels and memory are there
                clips[name], last = generate(pipe, settings)
                seconds.append(last)
    return clips, took


def speed_up(dense: Sequence[float], patched: Sequence[float], bound: float) -> str:
    """A line about how much faster the patched pipeline was; a figure above the bound comes with the reason.

    Args:
        dense: seconds of the dense runs.
        patched: seconds of the patched runs.
        bound: how many times less arithmetic a patched step of the UNet needs.
    """
    ratio = statistics.median(dense) / statistics.median(patched)
    line = f"speed-up of the whole pipeline: {ratio:.2f}x"
    if ratio <= bound:
        return f"{line}, where arithmetic alone allows at most {bound:.2f}x"
    line += f", above the {bound:.2f}x that arithmetic allows: "
    if min(dense) <= bound * max(patched):
        return f"{line}the timings scatter by more than that (dense {spread(dense)}, litefocus {spread(patched)})"
    return f"{line}an operation of dense attention takes longer on this machine than one of the rest of the UNet"


def spread(seconds: Sequence[float]) -> str:
    """The range of the timings."""
    return f"{min(seconds):.1f} to {max(seconds):.1f} s"


def note_unknown_words(pipe: Any, prompt: str) -> None:
    """Say so where a model that was trained on few words does not know one of the prompt."""
    tokenizer = getattr(pipe, "tokenizer_2", None)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if tokenizer is not None and unknown in tokenizer(prompt)["input_ids"]:
        print("note: some words of the prompt are not in this model's vocabulary", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`."""
    parser = Parser(__doc__)
    parser.add_argument("prompt", nargs="?", default=PROMPT, help="what should sound (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("clip.wav"), help="wav, flac or mp3 to write (default: %(default)s)"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--no-patch", action="store_true", help="dense attention, without litefocus")
    mode.add_argument("--compare", action="store_true", help="dense and patched: times, two clips and one png")
    parser.add_argument("--runs", type=int, default=3, help="of --compare, for its medians (default: %(default)s)")
    args = parser.parse_args(argv)
    with parser.refusing():
        complete(args)
        check_output(args.output)
        pipe, patch = load(args)
        bound = litefocus.status(pipe, seconds=args.seconds).flops.ratio
    note_unknown_words(pipe, args.prompt)

    if args.no_patch or args.compare:
        patch.remove()
    if args.compare:
        clips, took = compare(pipe, args.config, vars(args))
    else:
        name = "dense" if args.no_patch else "litefocus"
        clip, seconds = generate(pipe, vars(args))
        clips, took = {name: clip}, {name: [seconds]}

    rate = pipe.vocoder.config.sampling_rate
    files = dict.fromkeys(clips, args.output)
    if args.compare:
        files["dense"] = args.output.with_stem(args.output.stem + "_dense")
    for name, path in files.items():
        save(path, lambda whole, clip=clips[name]: soundfile.write(whole, clip, rate))
        print(
            f"{name}: {len(clips[name]) / rate:.2f} s of audio in {statistics.median(took[name]):.1f} s, wrote {path}"
        )
    if args.compare:
        print(speed_up(took["dense"], took["litefocus"], bound))
        path = args.output.with_suffix(".png")
        save(path, lambda whole: spectrograms(clips, rate).savefig(whole, dpi=100))
        print(f"wrote {path}")
    if memory := peak_memory():
        print(memory)


if __name__ == "__main__":
    with interruptible():
        main()
