"""Install LiteFocus on the self-attention layers of a pipeline, take it off again, and tell what is installed."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import nn

from litefocus.clients import tango
from litefocus.config import LiteFocusConfig, merged_config
from litefocus.focus import FreqAxis, check_freq_axis
from litefocus.processor import LiteFocusAttnProcessor
from litefocus.report import LayerStatus, Status, step_flops
from litefocus.unet import (
    Layer,
    blocks,
    find_unet,
    geometry_of,
    get_processor,
    input_freq_bins,
    self_attention_layers,
    set_processor,
    warn_of_known_problems,
)

LONG_CLIP = 10**6  # frames, for what a layer does where no length is given: no rounding of the sample matters

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

    pipe: an AudioLDM, AudioLDM 2 or MusicLDM pipeline of diffusers, a Tango, Tango 2, Mustango or ConsistencyTTA
        object, a `LatentDiffusion` of the authors' audioldm and audioldm2 packages, or a 2-D UNet of one of those
        kinds, `torch.compile`d or not.
    config: settings; `overrides` are fields of `LiteFocusConfig` that replace its values.
    freq_bins: frequency bins of the latent at the UNet's input. A pipeline tells it (mel bins of its vocoder / VAE
        scale factor, 16 for all published checkpoints); a bare UNet does not, and needs it.
    freq_axis: "width" (all AudioLDM-style models), or "height" where the latent is (frequency, time), as in Riffusion
        and Auffusion.

    Returns the handle: `handle.remove()` takes the patch off, `with litefocus.patch(pipe): ...` restores on leaving
    what was there on entering, and its repr is the table of what was patched. Patching again replaces the settings;
    patches never stack. Where two pipelines share one UNet, both see the patch.

    Raises TypeError for an object without a 2-D UNet and for unknown or mistyped options, ValueError for
    values out of range, for a missing or contradicting `freq_bins` and where no layer qualifies. After an error the
    pipeline is as it was. Warns where the pipeline is known to fail without litefocus too, and names the mend.
    Source: arXiv 2407.10468, whose published patch covers the levels with 8 bins of AudioLDM 2.

    >>> import litefocus
    >>> from diffusers import AudioLDM2Pipeline
    >>> pipe = AudioLDM2Pipeline.from_pretrained("examples/embedded/pipeline")
    >>> with litefocus.patch(pipe, time_window=256):
    ...     audio = pipe("a slow bell", audio_length_in_s=2.0, num_inference_steps=1).audios[0]
    >>> audio.shape
    (32000,)
    """
    config = merged_config("patch()", config, overrides)
    check_freq_axis(freq_axis)
    unet = find_unet(pipe)
    if freq_axis != "width" and geometry_of(pipe) is not None:
        raise ValueError(
            f"freq_axis={freq_axis!r} contradicts {type(pipe).__name__}, whose latent is (time, frequency); "
            "leave freq_axis out"
        )
    layers = list(self_attention_layers(unet, input_freq_bins(pipe, freq_bins)))
    _check_some_layer_qualifies(unet, layers, config)
    warn_of_known_problems(pipe)

    installed: list[_Replaced] = []
    try:
        for layer in layers:
            before = get_processor(layer.attn)
            original = before.original if isinstance(before, LiteFocusAttnProcessor) else before
            processor = LiteFocusAttnProcessor(
                original,
                layer=layer.name,
                freq_bins=layer.freq_bins,
                config=config,
                level=layer.level,
                freq_axis=freq_axis,
            )
            set_processor(layer.attn, processor)
            installed.append(_Replaced(layer.attn, before, processor))
    except BaseException:
        for done in installed:
            set_processor(done.attn, done.before)
        raise
    _patched[unet] = {layer.name: layer.freq_bins for layer in layers}
    return Patch(unet, config, installed)


def unpatch(pipe: Any) -> None:
    """Put back every processor that LiteFocus replaced, the same objects. Harmless where nothing is patched.

    A length that `set_duration` gave a Tango object is taken back too.

    pipe: what `patch` accepts. Layers that something else has overwritten since are left as they are.

    Raises TypeError for what `patch` refuses.

    >>> import litefocus
    >>> from diffusers import AudioLDM2Pipeline
    >>> pipe = AudioLDM2Pipeline.from_pretrained("examples/embedded/pipeline")
    >>> handle = litefocus.patch(pipe)
    >>> litefocus.unpatch(pipe)
    >>> litefocus.status(pipe).config is None
    True
    """
    unet = find_unet(pipe)
    for module in unet.modules():
        processor = get_processor(module)
        if isinstance(processor, LiteFocusAttnProcessor):
            set_processor(module, processor.original)
    _patched.pop(unet, None)
    tango.restore_duration(pipe)


def status(pipe: Any, seconds: float | None = None) -> Status:
    """What each self-attention layer does right now: focus, dense, or overwritten by something else.

    pipe: what `patch` accepts, patched or not.
    seconds: length of a clip. With it, the table adds the share of keys that each layer keeps at that length, and
        how much less arithmetic one step of the UNet needs. It takes a pipeline: a bare UNet does not say how many
        frames a second has.

    Raises TypeError for what `patch` refuses, ValueError for a length that is not positive or cannot be converted.

    >>> import litefocus
    >>> from diffusers import AudioLDM2Pipeline
    >>> pipe = AudioLDM2Pipeline.from_pretrained("examples/embedded/pipeline")
    >>> handle = litefocus.patch(pipe)
    >>> status = litefocus.status(pipe, seconds=80)
    >>> status.layers[0].state, status.layers[0].frames, round(status.layers[0].keys_kept, 3)
    ('focus', 1000, 0.212)
    >>> round(status.flops.ratio, 2)
    2.66
    """
    unet = find_unet(pipe)
    geometry = geometry_of(pipe)
    known = _patched.get(unet, {})
    layers = list(self_attention_layers(unet, geometry.freq_bins if geometry else None))
    processors = [get_processor(layer.attn) for layer in layers]
    ours = [processor for processor in processors if isinstance(processor, LiteFocusAttnProcessor)]

    num_frames = None
    if seconds is not None:
        if geometry is None or geometry.mel_frame is None:
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
        flops = step_flops(blocks(unet), kept_by_name, num_frames, geometry.freq_bins)
    return Status(type(unet).__name__, ours[0].config if ours else None, tuple(rows), seconds, flops)


@dataclass(frozen=True)
class _Replaced:
    attn: Any
    before: Any
    after: LiteFocusAttnProcessor


class Patch:
    """The handle that `patch` returns, in the manner of `torch.utils.hooks.RemovableHandle`.

    config: the settings that were installed. Its repr is `status` of the UNet, as it is now.

    >>> import litefocus
    >>> from diffusers import AudioLDM2Pipeline
    >>> pipe = AudioLDM2Pipeline.from_pretrained("examples/embedded/pipeline")
    >>> handle = litefocus.patch(pipe, sparse_ratio=0.05)
    >>> handle.config.sparse_ratio
    0.05
    >>> handle.remove()
    """

    def __init__(self, unet: nn.Module, config: LiteFocusConfig, replaced: list[_Replaced]) -> None:
        self.config = config
        self._unet = weakref.ref(unet)
        self._replaced = replaced

    def remove(self) -> None:
        """Put back the original processors wherever this patch's own are still installed."""
        for layer in self._replaced:
            layer.after.removed = True
            if get_processor(layer.attn) is layer.after:
                set_processor(layer.attn, layer.after.original)
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
            if isinstance(get_processor(layer.attn), LiteFocusAttnProcessor):
                set_processor(layer.attn, before)
        if not nested:
            self._forget()

    def _forget(self) -> None:
        unet = self._unet()
        if unet is not None and not any(
            isinstance(get_processor(layer.attn), LiteFocusAttnProcessor) for layer in self._replaced
        ):
            _patched.pop(unet, None)

    def __repr__(self) -> str:
        unet = self._unet()
        return f"<{type(self).__name__}: its UNet is gone>" if unet is None else repr(status(unet))

    def _repr_html_(self) -> str:
        unet = self._unet()
        return repr(self) if unet is None else status(unet)._repr_html_()


def _check_some_layer_qualifies(unet: nn.Module, layers: list[Layer], config: LiteFocusConfig) -> None:
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
