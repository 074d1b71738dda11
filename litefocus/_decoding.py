"""Encoding and decoding in tiles of time: VAE and vocoder in the memory of one tile, whatever the length of the clip.

A vocoder is convolutions alone: tiles that overlap by their reach yield what the whole clip yields. Encoder and decoder
of a VAE also have group norms over the whole clip. So their tiles are computed several times: every pass accumulates
the moments of each group norm, and uses those of the pass before, until they stay the same. Pass n has the exact
moments of at least n - 1 norms, so it ends; clips of even loudness take two. Neighbours are cross-faded. What remains
different is attention in the middle block, which sees one tile.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from litefocus._registry import Handle, Setting, Wrapper, all_wrapped, current, unwrap, wrap
from litefocus._target import WAVEFORM_METHODS, LatentGeometry, latent_geometry, vae_and_vocoder, vaes, waveform_makers

VAE_METHODS = ("decode", "encode")
SETTLED = 0.01  # of a standard deviation: moments of a group norm that change by less are the clip's
OVERLAP = 16  # latent frames, about the reach of the published VAEs' convolutions


def tile_decoding(pipe: Any, seconds: float = 10.24, overlap: float | None = None) -> TiledDecoding:
    """Decode, and encode, long clips in tiles of time, in place: memory is that of one tile of one clip.

    Clips of up to one tile are computed as before, to the bit. Longer ones differ in the vocoder by rounding, in the
    VAE by less than 0.02 nats of log-mel, or 0.02 standard deviations of the latents, on average (measured on a small
    trained VAE); attention in its middle block sees one tile. They take the VAE twice as long, or several times where
    loudness changes much, as from music to silence. While autograd records, because the input or the weights require
    gradients, clips are computed whole.

    What pipelines call is tiled: `vae.decode`, `mel_spectrogram_to_waveform` or `decode_to_waveform`, and `vae.encode`
    of (batch, 1, mel frames, mel bins), also that of the second VAE that AudioSR encodes with. A vocoder that is called
    directly is not. Tiling again replaces the settings; `with litefocus.tile_decoding(pipe):` tiles for the block
    alone, as `patch` does. Pipelines that share a VAE share its tiles, and so may threads.

    Args:
        pipe: an AudioLDM, AudioLDM 2 or MusicLDM pipeline of diffusers, a Tango, Tango 2 or Mustango object, or a
            `LatentDiffusion` of the authors' audioldm, audioldm2 and audiosr packages.
        seconds: the longest stretch of a clip that is computed at once; a clip is divided evenly. The default is the
            length that the published VAEs were trained on.
        overlap: seconds that the VAE computes beyond a tile on either side. Neighbours are cross-faded over the half
            next to their seam. The default is 16 latent frames, about the reach of the published VAEs' convolutions:
            0.64 s, and 1.28 s in models of 48 kHz.

    Returns:
        The handle: `handle.remove()` takes the tiles off, as `unpatch` does, and so does the end of its `with` block.

    Raises:
        TypeError: for an object without such a VAE and vocoder, and for what is no number.
        ValueError: unless both are finite, `overlap` is at least 0, and `seconds` is at least one latent frame and four
            times `overlap`; for a VAE whose encoder or decoder is compiled. One that is compiled later computes whole
            clips, with a warning. After an error the pipeline is as it was.

    >>> import litefocus
    >>> from diffusers import AudioLDM2Pipeline
    >>> pipe = AudioLDM2Pipeline.from_pretrained("examples/embedded/pipeline")
    >>> with litefocus.tile_decoding(pipe, seconds=2.56):
    ...     audio = pipe("a slow bell", audio_length_in_s=6.0, num_inference_steps=1).audios[0]
    >>> audio.shape
    (96000,)
    """
    for name, value in (("seconds", seconds), ("overlap", 0 if overlap is None else overlap)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    geometry, makers, vae = latent_geometry(pipe), waveform_makers(pipe), vae_and_vocoder(pipe)[0]
    if geometry is None or geometry.mel_frame is None or not makers or not hasattr(vae, "decode"):
        raise TypeError(
            f"got {'None' if pipe is None else f'an object of type {type(pipe).__name__}'}, which has no VAE and "
            "HiFi-GAN vocoder that litefocus knows; tile_decoding takes AudioLDM, AudioLDM 2 and MusicLDM pipelines of "
            "diffusers, Tango, Tango 2 and Mustango objects, and the LatentDiffusion of the original AudioLDM code"
        )
    frame = geometry.latent_frame
    overlap = OVERLAP * frame if overlap is None else overlap
    if not (math.isfinite(overlap) and overlap >= 0):
        raise ValueError(f"overlap must be finite and at least 0 seconds, got {overlap!r}")
    if not (math.isfinite(seconds) and round(seconds / frame) >= max(1, 4 * round(overlap / frame))):
        raise ValueError(
            f"seconds must be finite, at least one latent frame ({frame:g} s) and at least four times the overlap "
            f"({overlap:g} s), got {seconds!r}"
        )
    for owner, method in itertools.product(vaes(pipe), VAE_METHODS):
        if reason := _compiled(owner, method):
            raise ValueError(reason)
    modules = {id(owner): owner for owner in (*vaes(pipe), *makers)}
    return TiledDecoding(type(pipe).__name__, Tiles(float(seconds), float(overlap), geometry), *modules.values())


def tiles_of(pipe: Any) -> Tiles | None:
    """The tiles in which `pipe` encodes and decodes now; None unless all that does is tiled."""
    owners = [*vaes(pipe), *waveform_makers(pipe)]
    tiles = [current(owner, "tiles") for owner in owners]
    return None if None in tiles or not all(all_wrapped(owner, "tiles") for owner in owners) else tiles[0]


def decoding_bytes(pipe: Any, seconds: float, tiles: tuple[float, float] | None = None) -> int | None:
    """Memory of decoding one clip of `seconds`, beside the weights; None if `pipe` does not say.

    tiles: seconds and overlap of `tile_decoding`; None where the clip is decoded whole.

    Estimated from the channels of VAE and vocoder: the tensors that are alive at the stage where they are largest.
    Temporary memory of convolutions is not counted.
    """
    geometry = latent_geometry(pipe)
    if geometry is None or geometry.mel_frame is None:
        return None
    vae, vocoder = vae_and_vocoder(pipe)
    mels, frames = seconds / geometry.mel_frame, seconds / geometry.latent_frame
    if tiles is not None and seconds > tiles[0]:
        share = seconds / math.ceil(seconds / tiles[0])
        mels, frames = share / geometry.mel_frame + 2 * geometry.reach, (share + 2 * tiles[1]) / geometry.latent_frame
    scale, bins = geometry.vae_scale_factor, vocoder.conv_pre.in_channels
    if hasattr(vae, "config"):
        numbers = 3 * vae.decoder.up_blocks[-1].resnets[0].in_channels * bins * frames * scale
    else:  # the authors' code has x and sigmoid(x) in memory, and all scores of its attention, twice
        numbers = 4 * vae.decoder.up[0].block[0].in_channels * bins * frames * scale
        numbers = max(numbers, 2 * (frames * bins / scale) ** 2)
    samples, widest = 1, 0
    for up in vocoder.upsampler if hasattr(vocoder, "upsampler") else vocoder.ups:
        samples *= up.stride[0]
        widest = max(widest, samples * up.out_channels)
    return int(max(numbers, 5 * widest * mels)) * int(next(vae.parameters()).element_size())


def _compiled(vae: Any, method: str) -> str | None:
    """Why a method of the VAE is not tiled: a compiler stands before the VAE, its encoder or decoder, or a part."""
    part = f"{method}r"
    roots = [vae, *getattr(getattr(vae, part, None), "modules", list)()]
    modules = [module for module in roots if isinstance(module, nn.Module)]
    if not any("_orig_mod" in m._modules or vars(m).get("_compiled_call_impl") is not None for m in modules):
        return None
    return (
        f"the VAE's {part} is compiled, and in tiles it would be compiled anew for every length of clip; "
        f"tile one that is not compiled, or {method} the whole clip at once"
    )


def _tensor_of(output: Any) -> Tensor:
    """What a VAE returned: a tensor, or the moments of a distribution, alone or first in a tuple or output class."""
    first: Any = output[0] if isinstance(output, (tuple, Mapping)) else output
    tensor: Tensor = first if isinstance(first, Tensor) else first.parameters
    return tensor


def _with_tensor(output: Any, tensor: Tensor) -> Any:
    """The same with another tensor."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, tuple):
        return (_with_tensor(output[0], tensor), *output[1:])
    if isinstance(output, Mapping):  # DecoderOutput and AutoencoderKLOutput of diffusers, which are dataclasses too
        name, first = next(iter(output.items()))
        return dataclasses.replace(output, **{name: _with_tensor(first, tensor)})  # type: ignore[type-var]
    return type(output)(tensor, output.deterministic)


@dataclasses.dataclass(eq=False)
class Tiles(Setting):
    """Arguments of one `tile_decoding`. geometry: of the model."""

    kind = "tiles"
    seconds: float
    overlap: float
    geometry: LatentGeometry

    def __str__(self) -> str:
        return f"tiles of {self.seconds:g} s + {self.overlap:g} s on either side"

    def install(self, module: Any) -> None:
        """Wrap the methods that this module has."""
        for method in (*VAE_METHODS, *WAVEFORM_METHODS):
            if callable(getattr(module, method, None)):
                wrap(module, method, _Tiled)

    def uninstall(self, module: Any) -> None:
        """Unwrap them. Where a wrapper has to stay, it decodes whole."""
        unwrap(module, self.kind)

    def frames(self, method: str, x: Tensor) -> tuple[int, int]:
        """Frames of an input, and of a tile at most: of the latent for a VAE, of the mel spectrogram for a vocoder."""
        longest, scale = self.seconds / self.geometry.latent_frame, self.geometry.vae_scale_factor
        frames = x.shape[-2] // (scale if method == "encode" else 1)
        return frames, round(longest if method in VAE_METHODS else longest * scale)

    @staticmethod
    def spans(frames: int, longest: int, overlap: int) -> tuple[list[tuple[int, int, int]], int]:
        """For every tile (first frame of its input, start and stop of the part it yields), and its input's frames."""
        count = math.ceil(frames / longest)
        window = min(frames, math.ceil(frames / count) + 2 * overlap)
        pairs = itertools.pairwise(frames * i // count for i in range(count + 1))
        return [(max(0, min(start - overlap, frames - window)), start, stop) for start, stop in pairs], window

    def waveform(self, call: Callable[[Tensor], Any], mels: Tensor) -> Any:
        """Convolutions alone: the tiles' own parts, one after the other.

        mels: (batch, 1, frames, bins) or (batch, frames, bins). Returns tensors or arrays, as `call` does.
        """
        (frames, longest), hop = self.frames("waveform", mels), self.geometry.hop
        spans, window = self.spans(frames, longest, self.geometry.reach)
        waves: list[Any] = []
        for clip in torch.split(mels, 1):  # a batch would take the memory of as many tiles
            parts: list[Any] = []
            for first, start, stop in spans:
                part = call(clip.narrow(-2, first, window))
                end = part.shape[-1] if stop == frames else hop * (stop - first)  # some vocoders add a few samples
                parts.append(part[..., hop * (start - first) : end])
            waves.append(torch.cat(parts, -1) if isinstance(part, Tensor) else np.concatenate(parts, -1))
        return torch.cat(waves) if isinstance(part, Tensor) else np.concatenate(waves)

    def by_vae(self, method: str, call: Callable[[Tensor], Any], x: Tensor) -> Any:
        """Group norms with the moments of the whole clip, and a cross-fade of neighbours.

        x: (batch, channels, frames, bins), a mel spectrogram to encode, or latents. Returns what `call` does.
        """
        output: Any = None

        def run(clip: Tensor) -> Tensor:
            nonlocal output
            output = call(clip)
            return _tensor_of(output)

        whole = torch.cat([self._clip_by_vae(method, run, clip) for clip in torch.split(x, 1)])
        return _with_tensor(output, whole.to(_tensor_of(output).device))

    def _clip_by_vae(self, method: str, run: Callable[[Tensor], Tensor], clip: Tensor) -> Tensor:
        """(1, channels, frames, bins), on the CPU. Tiles begin at latent frames, where an encoder's strides do."""
        (frames, longest), overlap = self.frames(method, clip), round(self.overlap / self.geometry.latent_frame)
        spans, window = self.spans(frames, longest, overlap)
        step = self.geometry.vae_scale_factor if method == "encode" else 1
        rest = clip.shape[-2] - step * frames  # too short for a latent frame, but the last one depends on it
        fade = (overlap + 1) // 2  # next to its ends, a tile lacks what convolutions would read beyond them
        norms = _ClipNorms(window)
        while not norms.settled:
            whole = None
            for first, start, stop in spans:
                with torch.no_grad(), norms.tile(start - first, stop - first):
                    part = run(clip.narrow(-2, step * first, step * window + rest))
                scale = part.shape[2] // window
                begin, end = max(0, start - fade), min(frames, stop + fade)
                if whole is None:
                    whole = torch.zeros(1, part.shape[1], scale * frames, part.shape[3], dtype=part.dtype)
                    ramp = (torch.arange(2 * fade * scale, dtype=part.dtype)[:, None] + 0.5) / (2 * fade * scale or 1)
                part = part[:, :, scale * (begin - first) : scale * (end - first)].cpu()
                weight = torch.ones(part.shape[2], 1, dtype=part.dtype)
                if start > 0:
                    weight[: len(ramp)] = ramp
                if stop < frames:
                    weight[len(weight) - len(ramp) :] = 1 - ramp
                whole[:, :, scale * begin : scale * end] += part * weight
            norms.end_pass()
        assert whole is not None
        return whole


class TiledDecoding(Handle):
    """The handle that `tile_decoding` returns, in the manner of `torch.utils.hooks.RemovableHandle`.

    It keeps no weights alive.

    >>> import litefocus
    >>> from diffusers import AudioLDM2Pipeline
    >>> pipe = AudioLDM2Pipeline.from_pretrained("examples/embedded/pipeline")
    >>> handle = litefocus.tile_decoding(pipe)
    >>> handle
    <TiledDecoding of AudioLDM2Pipeline: tiles of 10.24 s + 0.64 s on either side, in force>
    >>> handle.remove()
    >>> handle
    <TiledDecoding of AudioLDM2Pipeline: tiles of 10.24 s + 0.64 s on either side, not in force>
    """

    _name = "tile_decoding"


class _Tiled(Wrapper):
    """Calls a method tile by tile, or once: where no tiles are in force or a newer wrapper has replaced this one."""

    kind = Tiles.kind

    def __init__(self, module: Any, method: str) -> None:
        super().__init__(module, method)
        parameters = inspect.signature(getattr(module, method)).parameters
        self.argument = next(iter(parameters))
        self.saves_files = "save" in parameters  # audioldm2's mel_spectrogram_to_waveform, at every call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the method returns, of the same type and on the same device. Time is the last axis but one."""
        module, call = self.owner, self.call
        tiles: Tiles | None = current(module, "tiles")
        x = args[0] if args else kwargs.get(self.argument)
        if tiles is None or x is None or not self.acts:
            return call(*args, **kwargs)
        of_vae = self.method in VAE_METHODS
        # a graph would keep every tile in memory, and tiles take the moments of group norms as constants
        weights = module.parameters() if of_vae else ()
        differentiable = torch.is_grad_enabled() and (x.requires_grad or any(each.requires_grad for each in weights))
        frames, longest = tiles.frames(self.method, x)
        if frames <= longest or differentiable or (self.saves_files and kwargs.get("save", True)):
            return call(*args, **kwargs)
        if of_vae and (reason := _compiled(module, self.method)):
            warnings.warn(f"{self.method[:-1]}ing the whole clip at once: {reason}", stacklevel=2)
            return call(*args, **kwargs)
        others = kwargs if args else {name: value for name, value in kwargs.items() if name != self.argument}
        in_tiles = functools.partial(tiles.by_vae, self.method) if of_vae else tiles.waveform
        return in_tiles(lambda part: call(part, *args[1:], **others), x)


class _ClipNorms(TorchFunctionMode):
    """Replaces F.group_norm while a clip passes a VAE in tiles: accumulates the moments of each norm, then uses them.

    Norms are told apart by the order of calls. A torch-function mode acts on its own thread alone.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window, self.passes, self.settled = window, 0, False
        self.sums: dict[int, Tensor] = {}  # (3, groups), over tiles: frames, frames x mean, frames x mean square
        self.moments: dict[int, Tensor] = {}  # (2, groups): mean and standard deviation, of the pass before

    def tile(self, start: int, stop: int) -> _ClipNorms:
        """For one tile, whose frames start to stop are its own part of the clip."""
        self.start, self.stop, self.calls = start, stop, 0
        return self

    def end_pass(self) -> None:
        """Settled if no norm's moments have changed, or after a pass for every norm and one more."""
        before, self.moments = self.moments, {index: self._moments(sums) for index, sums in self.sums.items()}
        self.passes, self.sums = self.passes + 1, {}
        changed = not before or any(self._changed(old, self.moments[index]) for index, old in before.items())
        self.settled = not changed or self.passes > len(self.moments)

    @staticmethod
    def _changed(old: Tensor, new: Tensor) -> bool:
        return bool(((new - old).abs() > SETTLED * new[1].clamp(min=1e-3)).any())

    @staticmethod
    def _moments(sums: Tensor) -> Tensor:
        mean, square = sums[1:] / sums[0]
        return torch.stack([mean, (square - mean**2).clamp(min=0).sqrt()])

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return (self.group_norm if func is F.group_norm else func)(*args, **(kwargs or {}))

    def group_norm(
        self, x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        """x: (1, channels, frames, bins), or tokens for both, frame after frame."""
        index, self.calls = self.calls, self.calls + 1
        dtype = torch.promote_types(x.dtype, torch.float32)
        step = x.shape[2] // self.window
        # to the end of a window that its own part ends, whose last frames may be too few for a latent frame
        own = x[0, :, step * self.start : None if self.stop == self.window else step * self.stop]
        dims = tuple(range(1, own.ndim + 1))
        var, mean = torch.var_mean(own.view(num_groups, -1, *own.shape[1:]).to(dtype), dim=dims, correction=0)
        sums = own.shape[1] * torch.stack([torch.ones_like(mean), mean, var + mean**2])
        self.sums[index] = self.sums.get(index, 0) + sums
        moments = self.moments[index] if self.passes else self._moments(sums)
        mean, deviation = moments.repeat_interleave(x.shape[1] // num_groups, dim=1)
        weight, bias = (None if given is None else given.to(dtype) for given in (weight, bias))
        # normalising with moments that are given is what batch norm does in evaluation
        return F.batch_norm(x, mean, deviation**2, weight, bias, eps=eps)
