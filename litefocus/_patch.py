"""Put LiteFocus on the self-attention layers of a pipeline, and take it off again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from litefocus._context import Context
from litefocus._grid import Grid, halved
from litefocus._layers import count_reasons, install, layers_to_patch, patched, self_attention_layers, uninstall
from litefocus._probe import probing
from litefocus._registry import Handle, Setting, clear
from litefocus._status import Status, status_of
from litefocus._target import Target, owners_of_settings, resolve, warn_of_known_problems
from litefocus.config import ConfigOptions, LiteFocusConfig, merged_config, shows_options
from litefocus.focus import FreqAxis

if TYPE_CHECKING:
    from typing_extensions import Unpack


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

    The newest patch alone is in force; when it is removed, the one before is in force again. `with
    litefocus.patch(pipe):` patches for the block: at its end it is removed, with all patches made inside. Pipelines and
    threads that share a UNet share its patches, so patch once at start-up, not per request. If the first patch comes or
    the last one goes during a call, some layers of that call run dense.

    A layer is patched if it computes plain attention: its `forward` is that of its class, and it has one of diffusers'
    own processors (PLAIN_PROCESSORS in _layers.py) or is CompVis' CrossAttention. Every other layer stays dense and
    runs its own code: a warning says how many and why, `status` says which.

    All elements of a batch use the sample of the first one's timestep, also in a UNet that is compiled whole. Layers
    that are compiled apart from it or behind a graph break, traced and exported code use one sample at every step, and
    so do calls that record gradients, reentrant checkpoints included. A reentrant checkpoint is recognised by a UNet
    input with `requires_grad`; if no input has it, use `use_reentrant=False`. With gradient checkpointing, call
    `backward()` inside of the `with` block too, since `backward()` runs layers again.

    Args:
        pipe: an AudioLDM, AudioLDM 2 or MusicLDM pipeline of diffusers, a Tango, Tango 2, Mustango or ConsistencyTTA
            object, a `LatentDiffusion` of the authors' audioldm and audioldm2 packages, or a 2-D UNet of one of those
            kinds, compiled or wrapped for distributed training or not.
        config: settings; `options` are fields of `LiteFocusConfig` that replace its values.
        freq_bins: frequency bins of the latent at the UNet's input (mel bins / VAE scale factor, 16 for all published
            checkpoints). Not needed: the UNet's input shows it. If given, every input must have it.
        freq_axis: "width" (all AudioLDM-style models), or "height" where the latent is (frequency, time), as in
            Riffusion and Auffusion. The input does not show it.
        **options: fields of `LiteFocusConfig`.

    Returns:
        The handle: `handle.remove()` takes the patch off, and so does the end of its `with` block, which can be entered
        once. Its repr is the table of what is patched.

    Raises:
        TypeError: for an object without a 2-D UNet, or with several, and for unknown or mistyped options.
        ValueError: for values out of range, for a contradicting `freq_bins` or `freq_axis`, where no layer can be
            patched, and while `probe` measures. A UNet that is called with another number of bins than `freq_bins`
            raises it at the call.

    After an error the pipeline is as it was. Warns where the pipeline is known to fail without litefocus too, and says
    how to fix it. Source: arXiv 2407.10468, whose published patch covers the levels with 8 bins of AudioLDM 2.

    >>> import litefocus
    >>> from diffusers import AudioLDM2Pipeline
    >>> pipe = AudioLDM2Pipeline.from_pretrained("examples/embedded/pipeline")
    >>> with litefocus.patch(pipe):
    ...     audio = pipe("a slow bell", audio_length_in_s=2.0, num_inference_steps=1).audios[0]
    >>> audio.shape
    (32000,)
    """
    config = merged_config("patch()", config, options)
    return patch_with(pipe, config, freq_bins=freq_bins, freq_axis=freq_axis, stacklevel=3)


def patch_with(
    pipe: Any,
    config: LiteFocusConfig,
    *,
    freq_bins: int | None = None,
    freq_axis: FreqAxis = "width",
    stacklevel: int = 2,
    **of_grids: int,
) -> Patch:
    """`patch`. of_grids: `num_samples` and `min_keys_saved` of `Grid`, which only tests and measurements change."""
    target = resolve(pipe)
    freq_bins, known_bins = target.check_axes(freq_bins, freq_axis)
    reasons = layers_to_patch(target.unet)
    if known_bins is not None:
        _check_bins(target.unet, [layer.level for layer in reasons], config, known_bins)
    grids = {
        layer.name: Grid(layer.name, level=layer.level, config=config, freq_axis=freq_axis, **of_grids)
        for layer in reasons
    }
    warn_of_known_problems(pipe, stacklevel + 1)
    dense = sum(reason is not None for reason in reasons.values())
    if dense:
        warnings.warn(
            f"{dense} of {len(reasons)} self-attention layers stay dense and run their own code "
            f"({count_reasons(reasons.values())})",
            stacklevel=stacklevel,
        )
    return Patch(target, PatchSetting(config, grids, freq_axis, freq_bins, known_bins))


def unpatch(pipe: Any) -> None:
    """Remove all patches, also those of `with` blocks that still run, tiles, prompts over time, and Tango's duration.

    Layers get back the same processor objects. A processor that was set after `patch` stays. If it wraps LiteFocus'
    processor, that one now calls the original. Harmless where nothing is patched.

    Args:
        pipe: what `patch`, `tile_decoding`, `schedule_prompts` and `set_duration` accept.

    Raises:
        TypeError: for an object with several UNets.

    >>> import litefocus
    >>> from diffusers import AudioLDM2Pipeline
    >>> pipe = AudioLDM2Pipeline.from_pretrained("examples/embedded/pipeline")
    >>> handle = litefocus.patch(pipe)
    >>> litefocus.unpatch(pipe)
    >>> litefocus.status(pipe).config is None
    True
    """
    for module in owners_of_settings(pipe):
        for kind in ("patch", "tiles", "duration", "prompts"):
            clear(module, kind)
        if isinstance(module, nn.Module):
            for layer in module.modules():  # brought back by something that had kept them, or installed by hand
                uninstall(layer)


@dataclass(eq=False)
class PatchSetting(Setting):
    """One patch of one UNet.

    grids: the grid of every layer, by the layer's name. freq_bins: number that the UNet's inputs must have, None for
    any. known_bins: number that they are expected to have, which `status` shows before the first call.
    """

    kind = "patch"

    config: LiteFocusConfig
    grids: Mapping[str, Grid]
    freq_axis: FreqAxis
    freq_bins: int | None
    known_bins: int | None

    def install(self, module: nn.Module) -> None:
        """Put processors on every layer that can be patched, or on none."""
        if probing(module):
            raise ValueError("litefocus.probe is measuring this UNet's dense attention; leave its block, then patch")
        context = vars(module).get("_litefocus_context") or Context()
        layers = self_attention_layers(module)
        before = [(x.attn, type(x.attn), patched(x.attn), getattr(x.attn, "processor", None)) for x in layers]
        try:
            for layer in layers:
                install(layer, context)
        except BaseException:
            for attn, kind, found, processor in before:
                uninstall(attn)
                attn.__class__ = kind
                if found is not None:
                    vars(attn)["_litefocus"] = found
                if processor is not None and attn.processor is not processor:
                    attn.set_processor(processor)
            raise
        vars(module)["_litefocus_context"] = context

    def activate(self, module: nn.Module) -> None:
        """Tell the layers, and watch the UNet's calls."""
        context: Context = vars(module)["_litefocus_context"]
        context.grids, context.finished = self.grids, 0
        context.freq_bins, context.freq_axis = self.freq_bins, self.freq_axis
        context.hook(module)

    def uninstall(self, module: nn.Module) -> None:
        """Put back what was on every layer."""
        context: Context = vars(module).pop("_litefocus_context")
        context.grids = {}
        context.unhook()
        for layer in module.modules():
            if "_litefocus" in vars(layer):
                uninstall(layer)


class Patch(Handle):
    """The handle that `patch` returns, in the manner of `torch.utils.hooks.RemovableHandle`.

    config: the settings of this patch. The handle's repr is the UNet's present `status`. It keeps no weights alive.

    >>> import litefocus
    >>> from diffusers import AudioLDM2Pipeline
    >>> pipe = AudioLDM2Pipeline.from_pretrained("examples/embedded/pipeline")
    >>> handle = litefocus.patch(pipe, sparse_ratio=0.05)
    >>> handle.config.sparse_ratio
    0.05
    >>> handle.remove()
    """

    _name = "patch"

    def __init__(self, target: Target, setting: PatchSetting) -> None:
        super().__init__(target.owner, setting, target.unet)
        self.config = setting.config
        self._geometry = target.geometry

    def _status(self) -> Status | None:
        unet = self._modules[0]()
        return None if unet is None else status_of(Target(self._owner, unet, self._geometry))

    def __repr__(self) -> str:
        found = self._status()
        return f"<{type(self).__name__}: its UNet is gone>" if found is None else repr(found)

    def _repr_html_(self) -> str | None:
        found = self._status()
        return None if found is None else found._repr_html_()


def _check_bins(unet: nn.Module, levels: list[int], config: LiteFocusConfig, freq_bins: int) -> None:
    bins = sorted({halved(freq_bins, level) for level in levels}, reverse=True)
    nothing = f"no self-attention layer of {type(unet).__name__} would focus: "
    if bins[0] == 1:
        raise ValueError(
            f"{nothing}all {len(levels)} have a single frequency bin, which leaves no frequency axis to focus on; "
            "check freq_bins"
        )
    if bins[0] < config.min_freq_bins:
        raise ValueError(
            f"{nothing}the {len(levels)} have {', '.join(map(str, bins))} frequency bins, and min_freq_bins is "
            f"{config.min_freq_bins}; set min_freq_bins to {bins[0]} or less"
        )
