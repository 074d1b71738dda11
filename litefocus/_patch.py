"""Install LiteFocus on the self-attention layers of a pipeline, and take it off again.

What is installed is known in one place, the `Patches` of the UNet: the settings of every patch that has been made and
neither removed nor left, the newest of which is in force. The layers get theirs from it.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn

from litefocus._call import Watch, Watched
from litefocus._compvis import OriginalAttention
from litefocus._decoding import untile
from litefocus._grid import Grid
from litefocus._layers import blocks, get_processor, self_attention_layers, set_processor
from litefocus._memory import hand_back_after, no_longer_after
from litefocus._processor import Installed, LiteFocusAttnProcessor, installed_on, ours_in, processor_over
from litefocus._status import LONG_CLIP, Status, status_of
from litefocus._tango import restore_duration
from litefocus._target import Plan, Target, plan, probed, resolve, warn_of_known_problems
from litefocus.config import ConfigOptions, LiteFocusConfig, shows_options
from litefocus.focus import FreqAxis

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Processors that attend and do nothing else, by name: clients bring copies of them under the same names.
PLAIN_PROCESSORS = {
    "AttnProcessor",
    "AttnProcessor2_0",
    "AttnProcessorNPU",
    "CrossAttnProcessor",
    "FusedAttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
    "XFormersCrossAttnProcessor",
    "XLAFlashAttnProcessor2_0",
}

_handles: weakref.WeakSet[Patch] = weakref.WeakSet()  # all that somebody still has
_lock = threading.RLock()  # patches come and go one at a time, whichever threads they are made in


@shows_options
def patch(
    pipe: Any,
    config: LiteFocusConfig | None = None,
    *,
    freq_bins: int | None = None,
    freq_axis: FreqAxis = "width",
    **options: Unpack[ConfigOptions],
) -> Patch:
    """Restrict the self-attention of a text-to-audio pipeline to focus sets, in place.

    The newest patch that was neither removed nor left is in force. One made outside of any `with` block replaces those
    before it; one made inside of a block ends with it. Patches never stack. A handle can be entered until it is removed
    or left, or `unpatch` is called: its block is under its own settings. Where two pipelines, or two threads, share one
    UNet, they share its patches: patch once at start-up, not per request, and run in as many threads as you like. A
    call that runs while the first patch comes or the last one goes is part dense; layers that are checkpointed run once
    more in the backward pass, under what is in force then. On a CPU under Linux, memory that large layers and blocks of
    the UNet have freed goes back to the system when they end.

    Args:
        pipe: an AudioLDM, AudioLDM 2 or MusicLDM pipeline of diffusers, a Tango, Tango 2, Mustango or ConsistencyTTA
            object, a `LatentDiffusion` of the authors' audioldm and audioldm2 packages, or a 2-D UNet of one of those
            kinds, compiled or wrapped for distributed training or not.
        config: settings; `options` are fields of `LiteFocusConfig` that replace its values.
        freq_bins: frequency bins of the latent at the UNet's input. A pipeline tells it (mel bins of its vocoder / VAE
            scale factor, 16 for all published checkpoints); a bare UNet does not, and needs it.
        freq_axis: "width" (all AudioLDM-style models), or "height" where the latent is (frequency, time), as in
            Riffusion and Auffusion.
        **options: fields of `LiteFocusConfig`.

    Returns:
        The handle: `handle.remove()` takes the patch off, `with litefocus.patch(pipe): ...` does so on leaving, and its
        repr is the table of what is patched.

    Raises:
        TypeError: for an object without a 2-D UNet, or with several, and for unknown or mistyped options.
        ValueError: for values out of range, for a missing or contradicting `freq_bins` or `freq_axis`, where no layer
            qualifies, and while `probe` measures. A UNet whose input has another number of bins raises it when it is
            called.

    After an error the pipeline is as it was. Warns where the pipeline is known to fail without litefocus too, and names
    the mend; and where a layer that is about to focus goes through a processor that may do more than attend, since
    focused calls pass by what it adds, counts, records or edits. Source: arXiv 2407.10468, whose published patch covers
    the levels with 8 bins of AudioLDM 2.

    >>> import litefocus
    >>> from diffusers import AudioLDM2Pipeline
    >>> pipe = AudioLDM2Pipeline.from_pretrained("examples/embedded/pipeline")
    >>> with litefocus.patch(pipe):
    ...     audio = pipe("a slow bell", audio_length_in_s=2.0, num_inference_steps=1).audios[0]
    >>> audio.shape
    (32000,)
    """
    planned = plan("patch", pipe, config, freq_bins, freq_axis, options)
    _check_some_layer_qualifies(planned)
    warn_of_known_problems(pipe)
    _warn_of_starving_processors(planned)
    unet = planned.target.unet
    with _lock:
        entry = Entry(planned)
        (patches_of(unet) or Patches()).add(unet, Slot(entry))
        handle = Patch(planned.target, entry)
        _handles.add(handle)
    return handle


def unpatch(pipe: Any) -> None:
    """Put back every processor that LiteFocus replaced, the same objects. Harmless where nothing is patched.

    Every patch is removed, also those of blocks that still run. Layers that something else has overwritten since are
    left as they are; what has wrapped a processor keeps it, and it hands every call to the one before it. Tiles of
    `tile_decoding`, and a length that `set_duration` gave a Tango object, are taken back too.

    Args:
        pipe: what `patch` accepts.

    Raises:
        TypeError: for what `patch` refuses.

    >>> import litefocus
    >>> from diffusers import AudioLDM2Pipeline
    >>> pipe = AudioLDM2Pipeline.from_pretrained("examples/embedded/pipeline")
    >>> handle = litefocus.patch(pipe)
    >>> litefocus.unpatch(pipe)
    >>> litefocus.status(pipe).config is None
    True
    """
    target = resolve(pipe)
    with _lock:
        for handle in list(_handles):
            handle._entry.removed |= handle._unet() is target.unet
        patches = patches_of(target.unet)
        if patches is not None:
            patches.keep(target.unet, [])
        for module in target.unet.modules():  # brought back by something that had kept them, or installed by hand
            take_off(module)
            processor = get_processor(module)
            if isinstance(processor, LiteFocusAttnProcessor) and processor.original is not None:
                set_processor(module, processor.original)
    untile(pipe)
    restore_duration(pipe)


class Entry:
    """One patch of one UNet: its settings, and a grid for every layer by name."""

    def __init__(self, planned: Plan) -> None:
        self.config = planned.config
        self.freq_bins, self.freq_axis = planned.freq_bins, planned.freq_axis
        self.grids: dict[str, Grid] = {grid.name: grid for grid in planned.grids}
        self.entered = self.removed = False


@dataclass
class Slot:
    """An entry that is in place, by a `with` block or not. `replaced`: what comes back if a block enters it later."""

    entry: Entry
    in_block: bool = False
    replaced: list[Slot] = field(default_factory=list)


class Patches:
    """What is installed on one UNet, kept on it as long as there is anything.

    slots: what is in place, the newest last, which is in force.
    """

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self.watch: Watch | None = None
        self.watched = Watched()

    def add(self, unet: nn.Module, slot: Slot) -> None:
        """Put an entry in force, on every layer or on none. Outside of a block it replaces what no block is in."""
        if probed(unet):
            raise ValueError("litefocus.probe is measuring this UNet's dense attention; leave its block, then patch")
        layers = list(self_attention_layers(unet))
        changed: list[tuple[Any, Any]] = []
        try:
            for layer in layers:
                processor = get_processor(layer.attn)
                if ours_in(processor) is None:
                    set_processor(layer.attn, processor_over(processor))
                    changed.append((layer.attn, processor))
        except BaseException:
            for attn, processor in changed:
                set_processor(attn, processor)
            raise
        before = {id(attn): processor for attn, processor in changed}
        for layer in layers:
            installed, processor = installed_on(layer.attn), get_processor(layer.attn)
            if id(layer.attn) in before:
                layer.attn._litefocus = Installed(layer.name, before[id(layer.attn)], processor, self.watched)
            elif installed is None:
                layer.attn._litefocus = Installed(layer.name, processor, None, self.watched)
            else:  # it may have been moved
                installed.name = layer.name
        for name, block, _ in blocks(unet):
            if not name.startswith("mid"):  # the smallest, which frees little
                hand_back_after(block)
        unet.__dict__["_litefocus_patches"] = self
        inside = [i for i, other in enumerate(self.slots) if other.in_block]
        kept = self.slots if slot.in_block else self.slots[: max(inside, default=-1) + 1]
        slot.replaced = self.slots[len(kept) :]
        self.keep(unet, [*kept, slot])

    def enter(self, unet: nn.Module, entry: Entry) -> None:
        """Begin a block of `entry`: what it had replaced is below it again, and comes back when the block ends."""
        below: list[Slot] = []
        for slot in self.slots:
            if slot.entry is entry and not slot.in_block:
                below += [old for old in slot.replaced if not (old.entry.entered or old.entry.removed)]
            else:
                below.append(slot)
        self.slots = below
        entry.entered = True
        self.add(unet, Slot(entry, in_block=True))

    def keep(self, unet: nn.Module, slots: list[Slot]) -> None:
        """Leave these in place, the last of them in force; without any, put everything back."""
        self.slots = slots
        entry = slots[-1].entry if slots else None
        self.watched.grids, self.watched.finished = {} if entry is None else entry.grids, 0
        for module in unet.modules():
            installed = module.__dict__.get("_litefocus")
            if installed is not None:
                installed.watched = self.watched  # that of a layer which was copied into the UNet is a copy
            if entry is None:
                take_off(module)
        if entry is None:
            unet.__dict__.pop("_litefocus_patches", None)
            if self.watch is not None:
                self.watch.remove()
                self.watch = None
        elif self.watch is None:
            self.watch = Watch(unet, self.watched, "patched", entry.freq_bins, entry.freq_axis)
        else:  # the same hooks: a call that begins in another thread meanwhile must not miss them
            self.watch.freq_bins, self.watch.freq_axis = entry.freq_bins, entry.freq_axis

    def leave(self, unet: nn.Module, entry: Entry) -> None:
        """End the newest block of `entry`, and what was patched inside of it without a block of its own."""
        places = [i for i, slot in enumerate(self.slots) if slot.entry is entry and slot.in_block]
        if not places:  # removed inside of the block
            return
        first = last = places[-1]
        while last + 1 < len(self.slots) and not self.slots[last + 1].in_block:
            last += 1
        entry.removed = not places[:-1]
        self.keep(unet, self.slots[:first] + self.slots[last + 1 :])


def take_off(attn: Any) -> None:
    """Put back what was on a layer, or a block, before it was patched; harmless on any other module."""
    no_longer_after(attn)
    installed = attn.__dict__.pop("_litefocus", None)
    if installed is None:
        return
    processor = get_processor(attn)
    if isinstance(processor, LiteFocusAttnProcessor):
        # one that something brought back, or made anew, goes for what it stands for itself
        own = processor is not installed.processor and processor.original is not None
        set_processor(attn, processor.original if own else installed.before)


def patches_of(unet: nn.Module) -> Patches | None:
    """What is installed on a UNet, None where nothing is."""
    patches: Patches | None = unet.__dict__.get("_litefocus_patches")
    return patches


class Patch:
    """The handle that `patch` returns, in the manner of `torch.utils.hooks.RemovableHandle`.

    config: the settings that were installed. Its repr is `status` of the UNet, as it is now. It keeps no weights alive.

    >>> import litefocus
    >>> from diffusers import AudioLDM2Pipeline
    >>> pipe = AudioLDM2Pipeline.from_pretrained("examples/embedded/pipeline")
    >>> handle = litefocus.patch(pipe, sparse_ratio=0.05)
    >>> handle.config.sparse_ratio
    0.05
    >>> handle.remove()
    """

    def __init__(self, target: Target, entry: Entry) -> None:
        self.config = entry.config
        self._entry = entry
        self._unet = weakref.ref(target.unet)
        self._owner, self._geometry = target.owner, target.geometry

    def remove(self) -> None:
        """Take this patch off, wherever it stands; an older one that is still in place is then in force again."""
        self._entry.removed = True
        unet = self._unet()
        if unet is None:
            return
        with _lock:
            patches = patches_of(unet)
            if patches is not None and any(slot.entry is self._entry for slot in patches.slots):
                patches.keep(unet, [slot for slot in patches.slots if slot.entry is not self._entry])

    def __enter__(self) -> Patch:
        """Put this patch's own settings in force. Raises RuntimeError if it was taken off already."""
        unet, entry = self._unet(), self._entry
        with _lock:
            if unet is None or entry.removed:
                raise RuntimeError("this patch is no longer in place; patch again: with litefocus.patch(pipe): ...")
            (patches_of(unet) or Patches()).enter(unet, entry)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore what was in force before. A newer patch that another block is still inside of stays in force."""
        unet = self._unet()
        if unet is None:
            return
        with _lock:
            patches = patches_of(unet)
            if patches is not None:
                patches.leave(unet, self._entry)

    def __reduce__(self) -> str:
        raise TypeError(
            "the handle of a patch belongs to the UNet of this process and cannot be pickled; pickle "
            "litefocus.status(pipe), or the patched UNet itself"
        )

    def __repr__(self) -> str:
        found = self._status()
        return f"<{type(self).__name__}: its UNet is gone>" if found is None else repr(found)

    def _repr_html_(self) -> str:
        found = self._status()
        return repr(self) if found is None else found._repr_html_()

    def _status(self) -> Status | None:
        unet = self._unet()
        return None if unet is None else status_of(Target(self._owner, unet, self._geometry))


def _warn_of_starving_processors(planned: Plan) -> None:
    """Warn where a layer that is about to focus goes through something that may do more than attend."""
    starving: Counter[str] = Counter()
    for layer, grid in zip(planned.layers, planned.grids, strict=True):
        processor = get_processor(layer.attn)
        name = type(processor).__name__
        if isinstance(processor, OriginalAttention):  # a `forward` that was set on a layer of the authors' code
            name = "AttnProcessor" if processor.forward is None else f"forward of {type(processor.forward).__name__}"
        if name not in PLAIN_PROCESSORS and ours_in(processor) is None and grid.keys_kept(LONG_CLIP) < 1:
            starving[name] += 1
    if starving:
        found = " and ".join(f"{name} ({count} layers)" for name, count in starving.items())
        warnings.warn(
            f"layers that are to focus go through {found}, which focused calls pass by: what it adds, counts, records "
            "or edits there is lost until unpatch",
            stacklevel=3,
        )


def _check_some_layer_qualifies(planned: Plan) -> None:
    searched = f"no self-attention layer of {type(planned.target.unet).__name__} qualifies: "
    bins = sorted({grid.freq_bins for grid in planned.grids}, reverse=True)
    least = planned.config.min_freq_bins
    if bins[0] == 1:
        raise ValueError(
            f"{searched}all {len(planned.grids)} have a single frequency bin, which leaves no frequency axis to focus "
            "on; check freq_bins"
        )
    if bins[0] < least:
        raise ValueError(
            f"{searched}searched {len(planned.grids)} layers with {', '.join(map(str, bins))} frequency bins, and "
            f"min_freq_bins is {least}; set min_freq_bins to {bins[0]} or less"
        )
