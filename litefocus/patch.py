"""Find the UNet of a pipeline and its self-attention layers, install LiteFocus on them, and take it off again."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from types import TracebackType
from typing import Any

from torch import nn

from litefocus.config import LiteFocusConfig, positive_integer, refuse_unknown
from litefocus.focus import FreqAxis, check_freq_axis
from litefocus.processor import LiteFocusAttnProcessor
from litefocus.report import LayerStatus, Status, step_flops

LONG_CLIP = 10**6  # frames, for what a layer does where no length is given: no rounding of the sample matters
ACCEPTED = "an AudioLDM, AudioLDM 2 or MusicLDM pipeline, or its UNet (compiled or not)"

# Which layers of a UNet were patched last, {name: freq_bins}. Only `status` reads it, to tell a layer that something
# else has overwritten from one that never was patched; what is installed is read from the layers themselves.
_patched: weakref.WeakKeyDictionary[nn.Module, dict[str, int]] = weakref.WeakKeyDictionary()


def patch(
    pipe: Any,
    config: LiteFocusConfig | None = None,
    *,
    freq_bins: int | None = None,
    freq_axis: FreqAxis = "width",
    **overrides: Any,
) -> Patch:
    """Restrict the self-attention of a text-to-audio pipeline to focus sets, in place.

    pipe: an AudioLDM, AudioLDM 2 or MusicLDM pipeline, or a UNet of that kind, `torch.compile`d or not.
    config: settings; `overrides` are fields of `LiteFocusConfig` that replace its values.
    freq_bins: frequency bins of the latent at the UNet's input. A pipeline tells it (mel bins of its vocoder / VAE
        scale factor, 16 for all published checkpoints); a bare UNet does not, and needs it.
    freq_axis: "width" (all AudioLDM-style models), or "height" where the latent is (frequency, time).

    Returns the handle: `handle.remove()` takes the patch off, `with litefocus.patch(pipe): ...` restores on leaving
    what was there on entering, and its repr is the table of what was patched. Patching again replaces the settings;
    patches never stack. Where two pipelines share one UNet, both see the patch.

    Raises TypeError for an object without a 2-D UNet and for unknown or mistyped options, ValueError for
    values out of range, for a missing or contradicting `freq_bins` and where no layer qualifies. After an error the
    pipeline is as it was.
    """
    options = [field.name for field in fields(LiteFocusConfig)]
    refuse_unknown("patch()", overrides, [*options, "freq_bins", "freq_axis"])
    if config is not None and not isinstance(config, LiteFocusConfig):
        raise TypeError(
            f"config must be a LiteFocusConfig, got {type(config).__name__}; pass LiteFocusConfig(...), or its fields "
            "as keywords: litefocus.patch(pipe, sparse_ratio=0.1)"
        )
    config = replace(config or LiteFocusConfig(), **overrides)
    check_freq_axis(freq_axis)
    unet = _find_unet(pipe)
    if freq_axis != "width" and _geometry(pipe) is not None:
        raise ValueError(
            f"freq_axis={freq_axis!r} contradicts {type(pipe).__name__}, whose latent is (time, frequency); "
            "leave freq_axis out"
        )
    layers = list(_self_attention_layers(unet, _input_freq_bins(pipe, freq_bins)))
    _check_some_layer_qualifies(unet, layers, config)

    installed: list[_Replaced] = []
    try:
        for layer in layers:
            before = layer.attn.processor
            original = before.original if isinstance(before, LiteFocusAttnProcessor) else before
            processor = LiteFocusAttnProcessor(
                original,
                layer=layer.name,
                freq_bins=layer.freq_bins,
                config=config,
                level=layer.level,
                freq_axis=freq_axis,
            )
            layer.attn.set_processor(processor)
            installed.append(_Replaced(layer.attn, before, processor))
    except BaseException:
        for done in installed:
            done.attn.set_processor(done.before)
        raise
    _patched[unet] = {layer.name: layer.freq_bins for layer in layers}
    return Patch(unet, config, installed)


def unpatch(pipe: Any) -> None:
    """Put back every processor that LiteFocus replaced, the same objects. Harmless where nothing is patched.

    pipe: what `patch` accepts. Layers that something else has overwritten since are left as they are.
    """
    unet = _find_unet(pipe)
    for module in unet.modules():
        processor = getattr(module, "processor", None)
        if isinstance(processor, LiteFocusAttnProcessor):
            module.set_processor(processor.original)  # type: ignore[operator]
    _patched.pop(unet, None)


def status(pipe: Any, seconds: float | None = None) -> Status:
    """What each self-attention layer does right now: focus, dense, or overwritten by something else.

    pipe: what `patch` accepts, patched or not.
    seconds: length of a clip. With it, the table adds the share of keys that each layer keeps at that length, and
        how much less arithmetic one step of the UNet needs. It takes a pipeline: a bare UNet does not say how many
        frames a second has.

    Raises TypeError for what `patch` refuses, ValueError for a length that is not positive or cannot be converted.
    """
    unet = _find_unet(pipe)
    geometry = _geometry(pipe)
    known = _patched.get(unet, {})
    layers = list(_self_attention_layers(unet, geometry.freq_bins if geometry else None))
    processors = [layer.attn.processor for layer in layers]
    ours = [processor for processor in processors if isinstance(processor, LiteFocusAttnProcessor)]

    num_frames = None
    if seconds is not None:
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
            raise TypeError(f"seconds must be a number, got {seconds!r} ({type(seconds).__name__})")
        if not (math.isfinite(seconds) and seconds > 0):
            raise ValueError(f"seconds must be finite and above 0, got {seconds!r}")
        if geometry is None:
            raise ValueError(
                f"{type(pipe).__name__} does not say how many latent frames a second has; "
                "pass the whole pipeline to status(pipe, seconds=...)"
            )
        num_frames = geometry.num_frames(seconds)

    rows = []
    for layer, processor in zip(layers, processors, strict=True):
        freq_bins = layer.freq_bins or known.get(layer.name)
        frames = math.ceil(num_frames / 2**layer.level) if num_frames else None
        state, kept = "dense", 1.0
        if isinstance(processor, LiteFocusAttnProcessor):
            freq_bins = processor.freq_bins
            kept = processor.keys_kept(frames or LONG_CLIP)
            state = "focus" if kept < 1 else "dense"
        elif ours or known:
            state = f"overwritten by {type(processor).__name__}"
        rows.append(LayerStatus(layer.name, freq_bins, state, frames, kept if frames else None))
    flops = None
    if num_frames and geometry:
        kept_by_name = {row.name: row.keys_kept or 1.0 for row in rows}
        flops = step_flops(_blocks(unet), kept_by_name, num_frames, geometry.freq_bins)
    return Status(type(unet).__name__, ours[0].config if ours else None, tuple(rows), seconds, flops)


@dataclass(frozen=True)
class _Replaced:
    attn: Any
    before: Any
    after: LiteFocusAttnProcessor


class Patch:
    """The handle that `patch` returns, in the manner of `torch.utils.hooks.RemovableHandle`.

    config: the settings that were installed.
    """

    def __init__(self, unet: nn.Module, config: LiteFocusConfig, replaced: list[_Replaced]) -> None:
        self.config = config
        self._unet = weakref.ref(unet)
        self._replaced = replaced

    def remove(self) -> None:
        """Put back the original processors wherever this patch's own are still installed."""
        for layer in self._replaced:
            layer.after.removed = True
            if layer.attn.processor is layer.after:
                layer.attn.set_processor(layer.after.original)
        self._forget()

    def __enter__(self) -> Patch:
        """Raise RuntimeError if the patch was removed already: the block would run without it."""
        if any(layer.after.removed for layer in self._replaced):
            raise RuntimeError("this patch was removed; patch again: with litefocus.patch(pipe): ...")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore what was in force before this patch, on every layer that LiteFocus still holds."""
        nested = False
        for layer in self._replaced:
            layer.after.removed = True
            before = layer.before
            if isinstance(before, LiteFocusAttnProcessor):
                if before.removed:  # inside the block
                    before = before.original
                else:
                    nested = True
            if isinstance(layer.attn.processor, LiteFocusAttnProcessor):
                layer.attn.set_processor(before)
        if not nested:
            self._forget()

    def _forget(self) -> None:
        unet = self._unet()
        if unet is not None and not any(
            isinstance(layer.attn.processor, LiteFocusAttnProcessor) for layer in self._replaced
        ):
            _patched.pop(unet, None)

    def __repr__(self) -> str:
        unet = self._unet()
        return f"<{type(self).__name__}: its UNet is gone>" if unet is None else repr(status(unet))

    def _repr_html_(self) -> str:
        unet = self._unet()
        return repr(self) if unet is None else status(unet)._repr_html_()


@dataclass(frozen=True)
class _Geometry:
    freq_bins: int  # of the latent, at the UNet's input
    mel_frame: float  # seconds
    scale: int  # mel frames, and mel bins, that a VAE makes one of

    def num_frames(self, seconds: float) -> int:
        """Frames of the latent for a clip, rounded as the pipelines round them."""
        return math.ceil(int(seconds / self.mel_frame) / self.scale)


@dataclass(frozen=True)
class _Layer:
    name: str
    attn: Any
    level: int
    freq_bins: int


def _uncompiled(module: Any) -> Any:
    """The module inside `torch.compile`'s wrapper."""
    return getattr(module, "_orig_mod", module)


def _find_unet(pipe: Any) -> nn.Module:
    """The 2-D UNet of a pipeline, or `pipe` itself if it is one."""
    pipe = _uncompiled(pipe)
    unet = _uncompiled(getattr(pipe, "unet", None))
    for candidate in (pipe, unet):
        if (
            isinstance(candidate, nn.Module)
            and isinstance(getattr(candidate, "conv_in", None), nn.Conv2d)
            and hasattr(candidate, "down_blocks")
            and hasattr(candidate, "up_blocks")
        ):
            return candidate
    if unet is None and getattr(pipe, "transformer", None) is not None:
        raise TypeError(
            f"{type(pipe).__name__} has a transformer and no 2-D UNet, so its latent has no frequency axis to focus "
            f"on; litefocus accepts {ACCEPTED}"
        )
    what = f"an object of type {type(pipe).__name__}" if pipe is not None else "None"
    if unet is not None:
        what += f", whose unet ({type(unet).__name__}) is no 2-D UNet"
    raise TypeError(f"got {what}; litefocus accepts {ACCEPTED}")


def _geometry(pipe: Any) -> _Geometry | None:
    """Frequency bins and frame rate of a pipeline's latent, from its vocoder and VAE; None where it has none."""
    vocoder, vae = (getattr(getattr(pipe, name, None), "config", None) for name in ("vocoder", "vae"))
    if vocoder is None or vae is None or not hasattr(vocoder, "model_in_dim"):
        return None
    scale = 2 ** (len(vae.block_out_channels) - 1)
    mel_frame = math.prod(vocoder.upsample_rates) / vocoder.sampling_rate
    return _Geometry(vocoder.model_in_dim // scale, mel_frame, scale)


def _input_freq_bins(pipe: Any, freq_bins: int | None) -> int:
    """`freq_bins` as given, or as the pipeline says. Never a guess."""
    geometry = _geometry(pipe)
    if freq_bins is None:
        if geometry is None:
            raise ValueError(
                f"freq_bins cannot be read from {type(_uncompiled(pipe)).__name__}, which has no vocoder and VAE; pass "
                "freq_bins=... (mel bins / VAE scale factor, 16 for AudioLDM-style models), or the whole pipeline"
            )
        return geometry.freq_bins
    freq_bins = positive_integer("freq_bins", freq_bins)
    if geometry is not None and geometry.freq_bins != freq_bins:
        raise ValueError(
            f"freq_bins={freq_bins} contradicts the pipeline, whose latent has {geometry.freq_bins} frequency bins; "
            "leave freq_bins out"
        )
    return freq_bins


def _blocks(unet: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """(name, block, level) of a UNet; the grid at level l is halved l times, rounded up."""
    level = 0
    for i, block in enumerate(unet.down_blocks):  # type: ignore[arg-type]
        yield f"down_blocks.{i}", block, level
        level += getattr(block, "downsamplers", None) is not None
    if getattr(unet, "mid_block", None) is not None:
        yield "mid_block", unet.mid_block, level  # type: ignore[misc]
    for i, block in enumerate(unet.up_blocks):  # type: ignore[arg-type]
        yield f"up_blocks.{i}", block, level
        level -= getattr(block, "upsamplers", None) is not None


def _self_attention_layers(unet: nn.Module, freq_bins: int | None) -> Iterator[_Layer]:
    """The attention layers that are called without encoder states.

    Whether a call is self-attention shows only when it comes, and the processor decides then. Here the layers are
    told that can be: keys are projected from as many channels as queries are. `is_cross_attention` alone does not
    tell: AudioLDM's attn2 says True and is self-attention, as its UNet sets cross_attention_dim to its own widths.
    Where the encoder's width equals a layer's by chance, other layers of the same UNet show that it is the encoder's.
    """
    found = []
    for prefix, block, level in _blocks(unet):
        for name, module in block.named_modules():
            if hasattr(module, "set_processor") and hasattr(module, "to_q") and hasattr(module, "to_k"):
                full_name = f"{prefix}.{name}".replace("_orig_mod.", "")
                found.append(_Layer(full_name, module, level, math.ceil(freq_bins / 2**level) if freq_bins else 0))

    def own_width(layer: _Layer) -> bool:
        return getattr(layer.attn.to_q, "in_features", None) == getattr(layer.attn.to_k, "in_features", None)

    has_encoder = not all(own_width(layer) for layer in found)
    for layer in found:
        if own_width(layer) and not (has_encoder and getattr(layer.attn, "is_cross_attention", False)):
            yield layer


def _check_some_layer_qualifies(unet: nn.Module, layers: list[_Layer], config: LiteFocusConfig) -> None:
    searched = f"no self-attention layer of {type(unet).__name__} qualifies: "
    if not layers:
        raise ValueError(
            f"{searched}its down, mid and up blocks hold no attention layer with a settable processor; "
            "there is nothing for litefocus to speed up in this UNet"
        )
    most = max(layer.freq_bins for layer in layers)
    if most < config.min_freq_bins:
        bins = ", ".join(str(n) for n in sorted({layer.freq_bins for layer in layers}, reverse=True))
        raise ValueError(
            f"{searched}searched {len(layers)} layers with {bins} frequency bins, and min_freq_bins is "
            f"{config.min_freq_bins}; set min_freq_bins to {most} or less"
        )
    if most == 1:
        raise ValueError(
            f"{searched}all {len(layers)} have a single frequency bin, which leaves no frequency axis to focus on; "
            "check freq_bins"
        )
