"""Decoding in tiles of time: VAE and vocoder in the memory of one tile, whatever the length of the clip.

A vocoder is convolutions alone: tiles that overlap by their reach yield what the whole clip yields. A VAE decoder also
has group norms over the whole clip. So its tiles are decoded twice, first to add up the moments of every group norm,
then with them, and neighbours are cross-faded. What is left of the difference is the error of these moments, and
attention in the middle block of published decoders, which sees one tile at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

STATE = "_litefocus_tiles"  # the attribute of a module that keeps its `_Tiled`


def tile_decoding(pipe: Any, seconds: float = 10.24, overlap: float = 0.64) -> TiledDecoding:
    """Decode long clips in tiles of time, in place: memory is that of one tile of one clip.

    Clips of up to one tile are decoded as before, to the bit. Longer ones differ in the vocoder by rounding, in the VAE
    by less than 0.02 nats of log-mel on average, and take the VAE twice as long. Where gradients of the latents are
    asked for, clips are decoded whole. Tiling again replaces the settings, and never stacks; what is tiled inside of a
    `with` block ends with it. Pipelines that share a VAE or a vocoder share its tiles, and so may threads.

    Args:
        pipe: an AudioLDM, AudioLDM 2 or MusicLDM pipeline of diffusers, a Tango, Tango 2 or Mustango object, or a
            `LatentDiffusion` of the authors' audioldm and audioldm2 packages.
        seconds: the longest stretch of a clip that is decoded at once; a clip is shared out evenly. The default is the
            length that the published VAEs were trained on.
        overlap: seconds that the VAE decodes beyond a tile on either side, where neighbours are cross-faded. The
            default is the reach of the published VAEs' convolutions.

    Returns:
        The handle: `handle.remove()` takes the tiles off, as `unpatch` does, and `with litefocus.tile_decoding(pipe):
        ...` does so on leaving.

    Raises:
        TypeError: for an object without such a VAE and vocoder, and for what is no number.
        ValueError: unless both are finite, `overlap` is at least 0, and `seconds` is at least one latent frame and four
            times `overlap`. After an error the pipeline is as it was.

    >>> import litefocus
    >>> from diffusers import AudioLDM2Pipeline
    >>> pipe = AudioLDM2Pipeline.from_pretrained("examples/embedded/pipeline")
    >>> with litefocus.tile_decoding(pipe, seconds=2.56):
    ...     audio = pipe("a slow bell", audio_length_in_s=6.0, num_inference_steps=1).audios[0]
    >>> audio.shape
    (96000,)
    """
    for name, value in (("seconds", seconds), ("overlap", overlap)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    parts = _parts(pipe)
    if not parts:
        raise TypeError(
            f"got {'None' if pipe is None else f'an object of type {type(pipe).__name__}'}, which has no VAE and "
            "HiFi-GAN vocoder that litefocus knows; tile_decoding takes AudioLDM, AudioLDM 2 and MusicLDM pipelines of "
            "diffusers, Tango, Tango 2 and Mustango objects, and the LatentDiffusion of the original AudioLDM code"
        )
    if not (math.isfinite(overlap) and overlap >= 0):
        raise ValueError(f"overlap must be finite and at least 0 seconds, got {overlap!r}")
    frame = parts[0].frame
    if not (math.isfinite(seconds) and round(seconds / frame) >= max(1, 4 * round(overlap / frame))):
        raise ValueError(
            f"seconds must be finite, at least one latent frame ({frame:g} s) and at least four times the overlap "
            f"({overlap:g} s), got {seconds!r}"
        )
    setting = Tiles(float(seconds), float(overlap))
    return TiledDecoding(type(pipe).__name__, setting, [part.place(setting) for part in parts])


def untile(pipe: Any) -> None:
    """Undo every `tile_decoding` of `pipe`. Harmless for every object."""
    for module in _decoders(pipe):
        if STATE in vars(module):
            vars(module)[STATE].keep([])


def tiling_of(pipe: Any) -> Tiles | None:
    """The `seconds` and `overlap` in which `pipe` decodes now; None unless both VAE and vocoder are tiled."""
    parts = [vars(module).get(STATE) for module in _decoders(pipe)]
    settings = [part.in_force for part in parts if part is not None]
    return settings[0] if len(settings) == 2 and None not in settings else None


def decoding_bytes(pipe: Any, seconds: float, tiles: Tiles | None = None) -> int | None:
    """Memory of decoding one clip of `seconds`, whole or in `tiles`, beside the weights; None if `pipe` does not say.

    From the widths of VAE and vocoder: the tensors that live at once where these are widest. What convolutions need
    while they run comes on top.
    """
    parts = _parts(pipe)
    if not parts:
        return None
    (vae, vocoder), frame, mel_frame = cast(list[Any], _decoders(pipe)), parts[0].frame, parts[1].frame
    mels, frames = seconds / mel_frame, seconds / frame
    if tiles is not None and seconds > tiles.seconds:
        share = seconds / math.ceil(seconds / tiles.seconds)
        mels, frames = share / mel_frame + 2 * parts[1].reach, (share + 2 * tiles.overlap) / frame
    bins = vocoder.conv_pre.in_channels
    if hasattr(vae, "config"):
        numbers = 3 * vae.decoder.up_blocks[-1].resnets[0].in_channels * bins * frames * round(frame / mel_frame)
    else:  # the authors' code has x and sigmoid(x) in memory, and all scores of its attention, twice
        numbers = 4 * vae.decoder.up[0].block[0].in_channels * bins * frames * round(frame / mel_frame)
        numbers = max(numbers, 2 * (frames * bins * mel_frame / frame) ** 2)
    samples, widest = 1, 0
    for up in vocoder.upsampler if hasattr(vocoder, "upsampler") else vocoder.ups:
        samples *= up.stride[0]
        widest = max(widest, samples * up.out_channels)
    return int(max(numbers, 5 * widest * mels)) * int(next(vae.parameters()).element_size())


@dataclasses.dataclass(eq=False)
class Tiles:
    """What one `tile_decoding` has set. in_block: inside of its `with` block. removed: for good."""

    seconds: float
    overlap: float
    in_block: bool = dataclasses.field(default=False, repr=False)
    removed: bool = dataclasses.field(default=False, repr=False)


class TiledDecoding:
    """The handle that `tile_decoding` returns, in the manner of `torch.utils.hooks.RemovableHandle`.

    It keeps no weights alive.

    >>> import litefocus
    >>> from diffusers import AudioLDM2Pipeline
    >>> pipe = AudioLDM2Pipeline.from_pretrained("examples/embedded/pipeline")
    >>> handle = litefocus.tile_decoding(pipe)
    >>> handle
    <TiledDecoding of AudioLDM2Pipeline, 10.24 s + 0.64 s on either side: AutoencoderKL, SpeechT5HifiGan>
    >>> handle.remove()
    >>> handle
    <TiledDecoding of AudioLDM2Pipeline, 10.24 s + 0.64 s on either side: not in force>
    """

    def __init__(self, owner: str, setting: Tiles, placed: list[tuple[_Tiled, list[Tiles]]]) -> None:
        self._owner, self._setting = owner, setting
        self._placed = [(weakref.ref(part), replaced) for part, replaced in placed]

    def _where(self) -> Iterator[tuple[_Tiled, list[Tiles]]]:
        """What these tiles are still on, and the settings that they replaced there."""
        for reference, replaced in self._placed:
            part = reference()
            if part is not None and self._setting in part.settings:
                yield part, replaced

    def remove(self) -> None:
        """Take these tiles off. Where others have replaced them, those stay."""
        self._setting.removed = True
        for part, _ in self._where():
            part.keep([setting for setting in part.settings if setting is not self._setting])

    def __enter__(self) -> TiledDecoding:
        """Raise RuntimeError if these tiles are off already: the block would run without them."""
        where = list(self._where())
        if not where or self._setting.in_block:
            raise RuntimeError(f"{self!r} cannot be entered; tile again: with litefocus.tile_decoding(pipe): ...")
        self._setting.in_block = True
        for part, replaced in where:  # below it, so that it is in force again when the block ends
            at = part.settings.index(self._setting)
            part.settings[at:at] = [setting for setting in replaced if not setting.removed]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore what was in force before."""
        self._setting.removed = True
        for part, _ in self._where():
            part.keep(part.settings[: part.settings.index(self._setting)])

    def __repr__(self) -> str:
        names = [part.name for part, _ in self._where() if part.in_force is self._setting]
        return (
            f"<{type(self).__name__} of {self._owner}, {self._setting.seconds:g} s + {self._setting.overlap:g} s on "
            f"either side: {', '.join(names) or 'not in force'}>"
        )


class _Tiled:
    """Stands for one method of one module, and calls it tile by tile.

    The module keeps it, and it refers to the module weakly. Once it has no settings it hands every call on: whoever has
    wrapped or kept it meanwhile can go on calling it.

    argument: name of the method's input. axis: of time in it. frame: seconds of one of its frames. hop, reach:
    of a vocoder, samples of each frame, and frames on either side that a sample depends on.
    """

    def __init__(
        self, module: nn.Module, method: str, argument: str, axis: int, frame: float, hop: int = 0, reach: int = 0
    ) -> None:
        self._module = weakref.ref(module)
        self.name, self.method, self.argument, self.axis = type(module).__name__, method, argument, axis
        self.frame, self.hop, self.reach = frame, hop, reach
        self.original = vars(module).get(method)  # None: the method of the class
        self.settings: list[Tiles] = []  # the last of them is in force

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_module": self._module()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copied or unpickled module has one of its own."""
        vars(self).update(state, _module=weakref.ref(state["_module"]))

    @property
    def in_force(self) -> Tiles | None:
        """The settings of calls that arrive here; None where none can, since somebody has put the original back."""
        here = vars(self._module()).get(self.method)
        return self.settings[-1] if self.settings and here is not None and here is not self.original else None

    def place(self, setting: Tiles) -> tuple[_Tiled, list[Tiles]]:
        """Put `setting` in force on the module. Returns what then stands there, and the settings that it replaced."""
        here = vars(self._module())
        part = self.original if isinstance(self.original, _Tiled) and self.original.settings else self
        if here.get(STATE, part) is not part:  # somebody has wrapped that one, or put it away
            here[STATE].settings = []
        blocks = [i for i, old in enumerate(part.settings) if old.in_block]
        kept = part.settings[: blocks[-1] + 1] if blocks else []
        replaced, part.settings = part.settings[len(kept) :], [*kept, setting]
        here[self.method] = here[STATE] = part
        return part, replaced

    def keep(self, settings: list[Tiles]) -> None:
        """Leave these in place; without any, put back what was there before."""
        self.settings = settings
        module = self._module()
        here = {} if settings or module is None else vars(module)
        if here.get(self.method) is self:
            del here[self.method]
            if self.original is not None:
                here[self.method] = self.original
        if here.get(STATE) is self:
            del here[STATE]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the method returns, of the same type and on the same device."""
        module = self._module()
        call = functools.partial(getattr(type(module), self.method), module) if self.original is None else self.original
        setting = self.settings[-1] if self.settings else None
        x = args[0] if args else kwargs.get(self.argument)
        if setting is None or x is None or x.shape[self.axis] <= round(setting.seconds / self.frame):
            return call(*args, **kwargs)
        if x.requires_grad and torch.is_grad_enabled():  # which would need every tile's memory, and the moments' too
            return call(*args, **kwargs)
        others = {name: value for name, value in kwargs.items() if args or name != self.argument}
        output: Any = None

        def decode(clip: Tensor, first: int, window: int) -> Tensor:
            nonlocal output
            output = call(clip.narrow(self.axis, first, window), *args[1:], **others)
            return output if isinstance(output, Tensor) else output[0]

        clips = x.split(1) if x.ndim > 2 else (x,)  # a batch would take the memory of as many tiles
        whole = torch.cat([self.join(functools.partial(decode, clip), x.shape[self.axis], setting) for clip in clips])
        if isinstance(output, Tensor):
            return whole.to(output.device)
        whole = whole.to(output[0].device)
        return (whole, *output[1:]) if isinstance(output, tuple) else dataclasses.replace(output, sample=whole)

    def spans(self, frames: int, setting: Tiles, overlap: int) -> tuple[list[tuple[int, int, int]], int]:
        """(first frame to put in, start and stop of its own part) for every tile, and how many frames to put in."""
        count = math.ceil(frames / round(setting.seconds / self.frame))
        window = min(frames, math.ceil(frames / count) + 2 * overlap)
        edges = [frames * i // count for i in range(count + 1)]
        pairs = itertools.pairwise(edges)
        return [(max(0, min(start - overlap, frames - window)), start, stop) for start, stop in pairs], window

    def join(self, decode: Callable[[int, int], Tensor], frames: int, setting: Tiles) -> Tensor:
        """Convolutions alone: the tiles' own parts, one after the other. decode: from a frame on, so many frames."""
        spans, window = self.spans(frames, setting, self.reach)
        parts = []
        for first, start, stop in spans:
            part = decode(first, window)
            end = part.shape[-1] if stop == frames else self.hop * (stop - first)  # some vocoders add a few samples
            parts.append(part[..., self.hop * (start - first) : end].cpu())  # leaves the card
        return torch.cat(parts, dim=-1)


class _TiledVAE(_Tiled):
    """Group norms with the moments of the whole clip, and a cross-fade over the overlap of neighbours."""

    def join(self, decode: Callable[[int, int], Tensor], frames: int, setting: Tiles) -> Tensor:
        """(1, channels, frames of the mel spectrogram, bins). decode: from a latent frame on, so many."""
        overlap = round(setting.overlap / self.frame)
        spans, window = self.spans(frames, setting, overlap)
        norms = _ClipNorms(frames, window)
        with torch.no_grad():
            for first, start, stop in spans:
                with norms.adding_up(start - first, stop - first):
                    part = decode(first, window)
        scale = part.shape[2] // window
        whole = torch.zeros(1, part.shape[1], scale * frames, part.shape[3], dtype=part.dtype)
        ramp = (torch.arange(2 * overlap * scale, dtype=part.dtype)[:, None] + 0.5) / (2 * overlap * scale or 1)
        del part
        for first, start, stop in spans:
            begin, end = max(0, start - overlap), min(frames, stop + overlap)
            with norms.added_up():
                part = decode(first, window)[:, :, scale * (begin - first) : scale * (end - first)].cpu()
            weight = torch.ones(part.shape[2], 1, dtype=part.dtype)
            if start > 0:
                weight[: len(ramp)] = ramp
            if stop < frames:
                weight[len(weight) - len(ramp) :] = 1 - ramp
            whole[:, :, scale * begin : scale * end] += part * weight
        return whole


class _ClipNorms(TorchFunctionMode):
    """While tiles of one clip are decoded in turn: every group norm's moments over the clip.

    Seen in the order of calls, which is that of layers. A mode is of one thread: others decode with their own.
    """

    def __init__(self, frames: int, window: int) -> None:
        super().__init__()
        self.frames, self.window = frames, window
        self.moments: dict[int, Tensor] = {}  # (2, groups): mean, mean of squares

    def adding_up(self, start: int, stop: int) -> _ClipNorms:
        """While one tile is decoded, whose own part is frames start to stop of it: add up its moments."""
        self.start, self.stop, self.calls = start, stop, 0
        return self

    def added_up(self) -> _ClipNorms:
        """While one tile is decoded: normalise with what was added up."""
        return self.adding_up(0, 0)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return (self.group_norm if func is F.group_norm else func)(*args, **(kwargs or {}))

    def group_norm(
        self, x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        """x: (1, channels, frames, bins), or tokens for both, frame after frame."""
        index, self.calls = self.calls, self.calls + 1
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.stop:
            own = x[0, :, self.start * x.shape[2] // self.window : self.stop * x.shape[2] // self.window]
            dims = tuple(range(1, own.ndim + 1))
            var, mean = torch.var_mean(own.view(num_groups, -1, *own.shape[1:]).to(dtype), dim=dims, correction=0)
            moments = torch.stack([mean, var + mean**2])
            self.moments[index] = self.moments.get(index, 0) + (self.stop - self.start) / self.frames * moments
        else:
            moments = self.moments[index]
        mean, square = moments.repeat_interleave(x.shape[1] // num_groups, dim=1)
        weight, bias = (None if given is None else given.to(dtype) for given in (weight, bias))
        # normalising with moments that are given is what batch norm does in evaluation
        return F.batch_norm(x, mean, (square - mean**2).clamp(min=0), weight, bias, eps=eps)


def _decoders(pipe: Any) -> list[nn.Module]:
    """VAE and vocoder of `pipe`; in Tango and in the authors' code the vocoder is a part of the VAE."""
    vae = next((part for name in ("vae", "first_stage_model") if (part := getattr(pipe, name, None)) is not None), None)
    vocoder = getattr(vae, "vocoder", None) if getattr(pipe, "vocoder", None) is None else pipe.vocoder
    return [part for part in (getattr(vae, "_orig_mod", vae), vocoder) if isinstance(part, nn.Module)]


def _parts(pipe: Any) -> list[_Tiled]:
    """What can stand on VAE and vocoder of `pipe`; nothing if they are of other kinds than we know."""
    try:
        vae, vocoder = cast(list[Any], _decoders(pipe))
        levels = len(vae.config.block_out_channels) if hasattr(vae, "config") else vae.decoder.num_resolutions
        ours = hasattr(vocoder, "upsampler")  # of transformers, not of the authors
        ups, rate = (vocoder.upsampler, vocoder.config) if ours else (vocoder.ups, vocoder.h)
        rate = rate.sampling_rate
        block = max(sum(_reach(conv) for conv in block.modules()) for block in vocoder.resblocks)
        reach = _reach(vocoder.conv_post)
        for up in reversed(ups):
            reach = math.ceil((reach + block + up.kernel_size[0]) / up.stride[0])
        reach += _reach(vocoder.conv_pre)
        hop = math.prod(up.stride[0] for up in ups)
        type(vae).decode  # noqa: B018
    except (AttributeError, ValueError):
        return []
    # A call of the vocoder as a whole, hooks included: accelerate replaces `forward`, and puts it back at every call.
    method = "_call_impl" if vars(vocoder).get("_compiled_call_impl") is None else "_compiled_call_impl"
    return [
        _TiledVAE(vae, "decode", "z", -2, hop / rate * 2 ** (levels - 1)),
        _Tiled(vocoder, method, "spectrogram" if ours else "x", -2 if ours else -1, hop / rate, hop, reach),
    ]


def _reach(conv: Any) -> int:
    """Samples on either side that a convolution sees; 0 for other modules."""
    return conv.dilation[0] * (conv.kernel_size[0] - 1) // 2 if isinstance(conv, nn.Conv1d) else 0
