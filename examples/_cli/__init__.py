"""What the programs of this folder share: their command line, and loading and saving.

Importing this takes no time: torch, diffusers and litefocus are imported where they are needed, so that a program can
answer `--help` and a mistake in its arguments first.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import ctypes
import errno
import functools
import importlib.util
import inspect
import io
import itertools
import math
import numbers
import platform
import re
import shutil
import signal
import sys
import tempfile
import threading
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

EMBEDDED = Path(__file__).parents[1] / "embedded" / "pipeline"
PROMPT = "a fast tabla rhythm"
# what the embedded pipeline was trained on
SOUNDS = ("kick drum", "snare drum", "cymbal", "tom drum", "tabla", "drone", "bass line", "guitar phrase", "bell")
SOUNDS += ("breakbeat", "vinyl hiss", "robot voice")
FORMATS = (".wav", ".flac", ".mp3")
DTYPES = ("float32", "float16", "bfloat16")

# What is checked before any work: (type, whether a value is accepted, what is accepted). A guidance of None is the
# model's own, None runs are those of `generate.py`.
SETTINGS: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "prompt": (str, lambda text: bool(text.strip()) and not re.search("[\ud800-\udfff]", text), "text, and not empty"),
    "seconds": (numbers.Real, lambda seconds: 0.5 <= seconds <= 3600, "a number between 0.5 and 3600"),
    "steps": (int, lambda steps: 1 <= steps <= 1000, "an integer between 1 and 1000"),
    "guidance": (numbers.Real, lambda scale: 0 <= scale < math.inf, "a finite number of at least 0"),
    "seed": (int, lambda seed: 0 <= seed < 2**63, "an integer of at least 0 and below 2**63"),
    "runs": (int, lambda runs: runs >= 1, "an integer of at least 1"),
    "batch_size": (int, lambda size: size >= 1, "an integer of at least 1"),
}


# ------------------------------------------------------------------------------------------------------- errors


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C inside is one line and exit code 130, a disk that fills up one line and 1. Imports are put inside too.

    Ctrl-C ends the block also where code of others swallows the exception, as some do while they are imported.
    """
    pressed = []

    def press(*_: Any) -> None:
        pressed.append(True)
        raise KeyboardInterrupt

    mine = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # and not an outer block's
    if mine:
        signal.signal(signal.SIGINT, press)
    try:
        yield
    except OSError as error:
        if not disk_full(error):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {first_line(error)}", file=sys.stderr)
        sys.exit(1)
    finally:
        if mine:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if pressed:
            print("\ninterrupted", file=sys.stderr)
            sys.exit(130)


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Everything that can fail before the work is put inside: an error is one line and exit code 2."""
    try:
        yield
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {first_line(error)}", file=sys.stderr)
        sys.exit(2)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    if disk_full(error):
        return f"disk full: cannot write {getattr(error, 'filename', None) or 'any more'}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk, or a quota of it, is used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


# ----------------------------------------------------------------------------------------------------- arguments


class Parser(argparse.ArgumentParser):
    """The options that all programs share: of the clip, of the pipeline, and every field of `LiteFocusConfig`.

    A mistake is one line and exit code 2. `parse_args` checks all that can be checked without torch, and sets
    `config`, the settings of attention.

    description: shown by `--help`. sound: where a program that makes one clip writes it, unless told otherwise.
    """

    def __init__(self, description: str | None, *, sound: str = "", **options: Any) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        add = self.add_argument
        add("--seconds", type=float, default=20.0, help="length of a clip (default: %(default)s)")
        add("--model", default=str(EMBEDDED), help="folder or hub id (default: %(default)s)")
        add("--steps", type=int, default=50, help="denoising steps (default: %(default)s)")
        add(
            "--guidance",
            type=float,
            help="guidance scale (default: the pipeline's own; 5 for the embedded one, 3 for Tango)",
        )
        add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
        add("--dtype", choices=DTYPES, help="default: float16 on a GPU, float32 on a CPU")
        add("--offload", action="store_true", help="keep on the GPU only the model that is at work")
        tiles = "VAE and vocoder in tiles of time, in the memory of one (default: %(default)s)"
        add("--tile-decoding", action=argparse.BooleanOptionalAction, default=True, help=tiles)
        self.sound = sound
        if sound:
            add("--output", type=Path, default=sound, help="wav, flac or mp3 to write (default: %(default)s)")
            at = "a prompt that begins at these seconds of the clip; may be repeated"
            add("--at", nargs=2, action="append", default=[], metavar=("SECONDS", "PROMPT"), help=at)
            add("--fade", type=float, default=2.0, help="seconds from a prompt to the next (default: %(default)s)")
        about = "fields of litefocus.LiteFocusConfig; the defaults fit any length"
        attention = self.add_argument_group("attention", about)
        self.config_class = config_class()
        for name, option in config_options(self.config_class).items():
            attention.add_argument(name, **option)

    def parse_args(self, *given: Any, **others: Any) -> argparse.Namespace:
        """Parse and check."""
        args, rest = self.parse_known_args(*given, **others)
        if "prompt" in args and rest and not any(word.startswith("-") for word in rest):
            self.error(f'a prompt of several words needs quotes: "{" ".join([args.prompt, *rest])}"')
        elif rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        with refusing():
            check(vars(args))
            names = [field.name for field in fields(self.config_class)]
            if "runs" in args and args.runs and not args.compare:
                raise ValueError("--runs needs --compare")
            if vars(args).get("step_cache") is not None and (args.compare or args.step_cache < 2):
                raise ValueError("--step-cache must be at least 2, and --compare makes clips without it")
            if self.sound:
                args.at = check_later(args.at, args.seconds, args.fade)
                check_output(args.output)
                if args.output.suffix.lower() == ".wav":
                    check_space(args.output.parent, args.seconds * (1 + vars(args).get("compare", False)))
            args.config = self.config_class(**{name: getattr(args, f"focus_{name}") for name in names})
            on_hub(args.model)
        return args

    def error(self, message: str) -> NoReturn:
        """Exit."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def config_class() -> Any:
    """`litefocus.LiteFocusConfig`, from its file alone: importing the package imports torch, which takes seconds."""
    package = importlib.util.find_spec("litefocus")
    if package is None or package.origin is None:
        sys.exit("litefocus is not installed: pip install -e '.[examples]' in a clone of its repository")
    spec = importlib.util.spec_from_file_location("_litefocus_config", Path(package.origin).with_name("config.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LiteFocusConfig


def config_options(config: Any) -> dict[str, dict[str, Any]]:
    """An option for every field of `LiteFocusConfig`, with the help that its documentation has."""
    types = typing.get_type_hints(config)
    documented = dict(re.findall(r"^    (\w+): (.*?)(?=^    \w+: |^\S|\Z)", inspect.getdoc(config) or "", re.M | re.S))
    options = {}
    for field in fields(config):
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


def check(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for the first value of `settings` that its row of SETTINGS does not accept."""
    for name, (kind, accepts, wanted) in SETTINGS.items():
        if name not in settings or (name in ("guidance", "runs") and settings[name] is None):
            continue
        value = settings[name]
        if not isinstance(value, kind) or isinstance(value, bool) or not accepts(value):
            raise ValueError(f"{name} must be {wanted}, got {value!r}")


def check_later(prompts: Iterable[Sequence[str]], seconds: float, fade: float = 2.0) -> list[tuple[float, str]]:
    """Pairs of times, as text, and prompts, with the times as numbers. Raises ValueError where they fit in no clip."""
    if not 0 <= fade < math.inf:
        raise ValueError(f"fade must be a finite number of at least 0, got {fade!r}")
    pairs = []
    for time, prompt in prompts:
        try:
            pairs.append((float(time), prompt))
        except ValueError:
            raise ValueError(f"a later prompt needs the seconds at which it begins, got {time!r}") from None
        check({"prompt": prompt})
        if not 0 < pairs[-1][0] < seconds:
            raise ValueError(f"a later prompt must begin above 0 and below {seconds:g} s, the clip's end, got {time}")
    times = sorted(time for time, _ in pairs)
    if any(after - before < fade or after == before for before, after in itertools.pairwise(times)):
        raise ValueError(f"later prompts must begin at least {fade:g} s apart, the time from one to the next")
    return pairs


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


def check_space(folder: Path, seconds: float) -> None:
    """Raise ValueError where a disk has no room for wavs of so many seconds at 16 kHz, the least that models make."""
    needed, free = 2 * 16000 * seconds, shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"disk full: {needed / 1e6:.1f} MB are needed in {folder}, and {free / 1e6:.1f} MB are free")


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Number and text of every line that is not empty. Raises ValueError for one that is not UTF-8, and for none."""
    lines = []
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError:
            raise ValueError(f"{path}, line {number}: not UTF-8: {line!r}; save the file as UTF-8") from None
        if text:
            lines.append((number, text))
    if not lines:
        raise ValueError(f"{path} holds no prompt")
    return lines


def complete(args: argparse.Namespace) -> None:
    """Fill in what depends on the machine and the model. Raises ValueError.

    Sets `args.device`, `args.dtype` and `args.guidance`, and makes `args.config` a `litefocus.LiteFocusConfig`.
    """
    import torch

    import litefocus

    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.offload and args.device.type == "cpu":
        raise ValueError("offload needs a GPU; without one, all models are in main memory anyway")
    if args.dtype == "float16" and args.device.type == "cpu":
        raise ValueError("float16 needs a GPU; on a CPU use float32 or bfloat16")
    args.dtype = args.dtype or ("float32" if args.device.type == "cpu" else "float16")
    if args.guidance is None and args.model == str(EMBEDDED):
        args.guidance = 5.0  # its judge names 92 % of clips rightly then, 86 % at 3 (examples/embedded/README.md)
    args.config = litefocus.LiteFocusConfig(**asdict(args.config))


# ------------------------------------------------------------------------------------------- loading, telling, saving


@functools.cache
def on_hub(model: str) -> bool:
    """Whether a model is to be looked for on the hub: not a folder, nor without a network a copy that is here.

    Raises ValueError where it is neither, and the hub does not answer within four seconds.
    """
    if Path(model).is_dir():
        return False
    if not re.fullmatch(r"[\w-]+/[\w.-]+", model):
        raise ValueError(f"cannot use {model}: no such folder, and hub ids look like owner/name")
    import huggingface_hub
    from huggingface_hub import constants, utils

    answers = []

    def ask() -> None:
        with contextlib.suppress(Exception):
            answers.append(utils.get_session().head(constants.ENDPOINT, timeout=3))

    asking = threading.Thread(target=ask, daemon=True)  # a name server may take longer than any timeout
    asking.start()
    asking.join(4)
    if answers:
        return True
    with contextlib.suppress(Exception):
        huggingface_hub.snapshot_download(model, local_files_only=True)
        return False
    raise ValueError(f"cannot use {model}: no network: {constants.ENDPOINT} does not answer, and no copy is here")


def load_pipeline(model: str, device: Any, dtype: str = "float32", offload: bool = False) -> Any:
    """The pipeline of a folder or a hub id, on `device`; with `offload`, each of its models only while it is at work.

    Raises ValueError, with one line, where a hub, a folder or a file in it cannot be used.
    """
    import diffusers
    import torch
    import transformers

    diffusers.utils.logging.disable_progress_bar()  # of reading files; that of downloads stays
    transformers.utils.logging.disable_progress_bar()
    # transformers 5.24 has renamed an argument that diffusers 0.42 passes to the language model, with the same result
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
    kind = getattr(torch, dtype)
    options: dict[str, Any] = {"local_files_only": not on_hub(model)}
    try:
        index = diffusers.DiffusionPipeline.load_config(model, **options)
        if (index.get("language_model") or ("", ""))[1] == "GPT2Model":
            # The published AudioLDM 2 names GPT2Model, which transformers 4.52 and newer cannot generate with. The
            # class with the language-model head reads the same weights and gives identical output.
            language_model = transformers.GPT2LMHeadModel.from_pretrained(model, subfolder="language_model", **options)
            options["language_model"] = language_model.to(kind)
        pipe = diffusers.DiffusionPipeline.from_pretrained(model, dtype=kind, **options)
        if offload:
            pipe.enable_model_cpu_offload(device=device)
            return pipe
        return pipe.to(device)
    except Exception as error:
        raise ValueError(f"cannot use {model}: {first_line(error)}") from error


def cache_steps(pipe: Any, interval: int) -> Any:
    """Have DeepCache compute the deep layers of the UNet at one of `interval` steps. Returns its helper, to disable."""
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe)
    helper.set_params(cache_interval=interval)
    helper.enable()
    return helper


def unknown_words(pipe: Any, *prompts: str) -> list[str]:
    """The words of prompts that are not in the vocabulary of the pipeline's T5, in their order, each once."""
    tokenizer = getattr(pipe, "tokenizer_2", None)
    unknown = getattr(tokenizer, "unk_token_id", None)
    words = dict.fromkeys(word for prompt in prompts for word in re.findall(r"[^\s.,;:!?\"()]+", prompt))
    return [word for word in words if unknown is not None and unknown in tokenizer(word)["input_ids"]]


def note_unknown_words(pipe: Any, *prompts: str) -> None:
    """Print a note that names the words of prompts that the model does not know, and what the embedded one knows."""
    if words := unknown_words(pipe, *prompts):
        more = f" and {len(words) - 10} more" * (len(words) > 10)
        print(f"note: words that this model does not know: {', '.join(words[:10])}{more}", file=sys.stderr)
        if pipe.name_or_path == str(EMBEDDED):
            print(f"it knows, slow, medium or fast: {', '.join(SOUNDS)}", file=sys.stderr)


def machine(device: str) -> str:
    """The GPU, or the CPU with its instruction set and the threads in use."""
    import torch

    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.*)", info.read_text(), re.M) if info.exists() else None
    name = named[1].strip() if named else platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} thread(s)"


def peak_memory() -> str:
    """The most memory that was in use so far: of the GPU where there is one, else of the process; "" on Windows."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of GPU memory at most"
    try:
        import resource
    except ModuleNotFoundError:  # Unix has it
        return ""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB of memory at most"


def forget_peak() -> None:
    """What is measured next is of the next clip: without the highest so far, and what the C library has kept of it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # glibc has it


def speed_up(dense: Sequence[float], patched: Sequence[float], bound: float) -> str:
    """A line about how much faster the patched pipeline was; a figure above the bound comes with the reason.

    Args:
        dense: seconds of the dense runs.
        patched: seconds of the patched runs.
        bound: how many times less arithmetic a patched step of the UNet needs.
    """
    ratio = median(dense) / median(patched)
    line = f"speed-up of the whole pipeline: {ratio:.2f}x"
    if ratio <= bound:
        return f"{line}, where {bound:.2f}x is expected from the arithmetic that is saved"
    line += f", above the {bound:.2f}x that the arithmetic saved suggests: "
    if min(dense) <= bound * max(patched):
        spreads = [f"{min(seconds):.1f} to {max(seconds):.1f} s" for seconds in (dense, patched)]
        return f"{line}the timings scatter by more than that (dense {spreads[0]}, litefocus {spreads[1]})"
    return f"{line}an operation of dense attention takes longer on this machine than one of the rest of the UNet"


def write(clips: Mapping[str, Any], took: Mapping[str, Sequence[float]], rate: int, bound: float, args: Any) -> None:
    """Write the clips of `generate.py` and, where there are two, their spectrograms, and say what it took."""
    paths = dict.fromkeys(clips, args.output)
    if args.compare:
        paths["dense"] = args.output.with_stem(args.output.stem + "_dense")
    for name, path in paths.items():
        save_sound(path, clips[name], rate)
        print(f"{name}: {len(clips[name]) / rate:.2f} s of audio in {median(took[name]):.1f} s, wrote {path}")
    if args.compare:
        print(speed_up(took["dense"], took["litefocus"], bound))
        path = args.output.with_suffix(".png")
        save(path, lambda whole: spectrograms(clips, rate).savefig(whole, dpi=100))
        print(f"wrote {path}")
    if memory := peak_memory():
        print(memory)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    header = list(header)
    return "".join("| " + " | ".join(cells) + " |\n" for cells in (header, ["---"] * len(header), *rows))


def save(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` with a temporary path beside `path`, then move the file there: whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        whole = Path(folder, path.name)
        write(whole)
        whole.replace(path)


def save_sound(path: Path, samples: Any, rate: int) -> None:
    """Write a sound, whole or not at all. libsndfile calls a full disk "System error"; this calls it what it is."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=path.suffix[1:])
    save(path, lambda whole: whole.write_bytes(buffer.getbuffer()))


def mel(hertz: Any) -> Any:
    """Frequencies on the mel scale."""
    import numpy as np

    return 2595 * np.log10(1 + np.asarray(hertz) / 700)


def mel_levels(clip: Any, rate: int) -> Any:
    """Levels in dB of a clip, (96 rows of mel up to half the rate, at most 800 columns of time)."""
    import numpy as np
    from matplotlib import mlab

    window = min(1024, len(clip))
    power, frequencies, _ = mlab.specgram(clip, NFFT=window, Fs=rate, noverlap=window - min(window, 256))
    rows = np.searchsorted(mel(frequencies), np.linspace(0, mel(rate / 2), 97)[:-1])
    columns = np.unique(np.linspace(0, power.shape[1], 801, dtype=int)[:-1])
    for axis, starts in enumerate((rows, columns)):  # means of the bins of a row, and of the windows of a column
        counts = np.maximum(np.diff(starts, append=power.shape[axis]), 1)
        power = np.add.reduceat(power, starts, axis=axis) / np.expand_dims(counts, 1 - axis)
    return 10 * np.log10(power + 1e-12)


LEVELS = {"vmin": -105, "vmax": -40, "cmap": "magma", "origin": "lower"}  # of their colours, in dB


def spectrograms(clips: Mapping[str, Any], rate: int, size: tuple[float, float] = (12, 3)) -> Any:
    """A matplotlib figure with a spectrogram of `size` inches for every clip, over seconds and mel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0], size[1] * len(clips)), layout="constrained")
    FigureCanvasAgg(figure)
    ticks = [hertz for hertz in (0, 500, 1000, 2000, 4000, 8000, 16000) if hertz <= rate / 2]
    every = figure.subplots(len(clips), sharex=True, squeeze=False)[:, 0]
    for axes, (title, clip) in zip(every, clips.items(), strict=True):
        extent = (0, len(clip) / rate, 0, mel(rate / 2))
        picture = axes.imshow(mel_levels(clip, rate), extent=extent, aspect="auto", **LEVELS)
        axes.set_title(title, parse_math=False, wrap=True)  # a prompt may hold a $
        axes.set_yticks(mel(ticks), [f"{hertz:,}" for hertz in ticks])
        axes.set(ylabel="frequency (Hz)", xlabel="time (s)")
        axes.label_outer()
        figure.colorbar(picture, ax=axes, label="dB")
    return figure
