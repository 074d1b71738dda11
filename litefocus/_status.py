"""What each layer does right now, and what that saves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from litefocus._decoding import Tiles, decoding_bytes, tiles_of
from litefocus._grid import Grid, halved
from litefocus._layers import PLAIN_PROCESSORS, Layer, blocks, named_modules, obstacle, patched, self_attention_layers
from litefocus._prompts import schedule_of
from litefocus._registry import current
from litefocus._table import Table, by_freq_bins
from litefocus._target import Target, resolve
from litefocus.config import LiteFocusConfig

MUCH_MEMORY = 2**30  # bytes
LONG_CLIP = 10**6  # frames that stand for any long clip where no length was given


@dataclass(frozen=True)
class StepFlops:
    """Estimated floating-point operations of one UNet step for one batch element.

    attention: operations of scores and weighted values of each self-attention layer as patched, in the UNet's order.
    """

    dense: float
    patched: float
    attention: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """FLOPs of the dense step over those of the patched one: an estimate of the speed-up, not a bound."""
        return self.dense / self.patched


@dataclass(frozen=True)
class LayerStatus:
    """One self-attention layer.

    name: its path in the UNet.
    freq_bins: frequency bins of its grid; None if neither a pipeline, nor a patch, nor a call has shown it.
    state: "focus"; "dense" if the UNet is not patched or the grid is too small to focus on; "dense: <reason>";
        "overwritten by <class>"; "not reached by the last call"; "not known before a call" if something wraps the
        layer. Why the layer cannot be patched may follow after a semicolon.
    frames, keys_kept: frames of its grid and the share of keys that a query attends to, in (0, 1], at the length that
        `status` was asked for; None without one.
    """

    name: str
    freq_bins: int | None
    state: str
    frames: int | None
    keys_kept: float | None


@dataclass(frozen=True, repr=False)
class Status(Table):
    """What `litefocus.status` found. Prints as a table, in notebooks too.

    unet: class name. config: settings of the patch that counts, None where there is none.
    layers: one row for every self-attention layer, in the UNet's order; what is printed has one for every level.
    seconds, frames: the length asked for, and its frames at the UNet's input.
    flops: estimated arithmetic of a step at that length. Before `patch`, `flops.patched` is that of `patch(pipe)` with
        its defaults.
    tiles: settings of `tile_decoding`, None without. decoding_bytes: estimated memory of decoding one clip.
    prompts: which is scheduled when, None without.

    >>> row = LayerStatus("mid_block.attentions.0", freq_bins=2, state="dense", frames=None, keys_kept=None)
    >>> Status("UNet2DConditionModel", None, (row,))
    LiteFocus on UNet2DConditionModel: 0 of 1 self-attention layers focus
    not patched
    freq bins  layers  state
    2          1       dense
    """

    unet: str
    config: LiteFocusConfig | None
    layers: tuple[LayerStatus, ...]
    seconds: float | None = None
    frames: int | None = None
    flops: StepFlops | None = None
    tiles: Tiles | None = None
    decoding_bytes: int | None = None
    prompts: str | None = None

    @property
    def advice(self) -> str | None:
        """One line of advice; None if the settings suit the length, or none was given."""
        default = LiteFocusConfig().time_window
        if self.flops is None or self.frames is None or self.config is None or default is None:
            return None
        attention = sum(self.flops.attention) / self.flops.patched
        if self.config.time_window is None and self.frames > 2 * default:
            return (
                f"advice: self-attention still is {attention:.0%} of the step and grows with the square of the length; "
                f"leave time_window at its default of {default}"
            )
        if self.config.time_window is not None and self.frames > self.config.time_window:
            if not self.config.far_sampled:
                return (
                    "advice: with far_sampled=0 a query attends to nothing outside of its time window; leave it at "
                    f"{LiteFocusConfig().far_sampled}"
                )
            if not self.config.reweight:
                return "advice: without reweight, sampled keys weigh too little; leave it on"
        if self.tiles is None and (self.decoding_bytes or 0) > MUCH_MEMORY:
            return "advice: litefocus.tile_decoding(pipe) decodes in the memory of one tile"
        return None

    def _summary(self) -> list[str]:
        states = [layer.state for layer in self.layers]
        count = sum(state.startswith("overwritten") for state in states)
        focus = sum(state.startswith("focus") for state in states)
        lines = [f"LiteFocus on {self.unet}: {focus} of {len(states)} self-attention layers focus"]
        if count:
            lines[0] += f", {count} overwritten since they were patched"
        lines.append(str(self.config) if self.config else "not patched")
        if self.flops is not None:
            become = "become" if self.config else "would become, by litefocus.patch(pipe),"
            lines.append(
                f"at {self.seconds:g} s: {self.flops.dense / 1e9:,.1f} GFLOPs a step {become} "
                f"{self.flops.patched / 1e9:,.1f} (estimated), {self.flops.ratio:.2f}x less arithmetic"
            )
        if self.tiles is not None or self.decoding_bytes is not None:
            tiled = "whole" if self.tiles is None else f"in tiles of {self.tiles.seconds:g} s"
            mebibytes = (self.decoding_bytes or 0) / 2**20
            size = f"{mebibytes:.0f} MiB" if mebibytes < 1000 else f"{mebibytes / 2**10:.1f} GiB"
            memory = "" if self.decoding_bytes is None else f", {size} (estimated)"
            lines.append(f"decoding: {tiled}{memory}")
        if self.prompts is not None:
            lines.append(f"prompts: {self.prompts}")
        return lines + ([self.advice] if self.advice else [])

    def _table(self) -> list[tuple[str, ...]]:
        """A row for every level; layers that do not do what most of their level do are named."""
        timed = self.seconds is not None
        header = ("freq bins", *(("frames",) if timed else ()), "layers", "state")
        table = [header + (("keys kept", "share of the step") if timed else ())]
        shares = {}
        if self.flops is not None:
            shares = dict(zip((x.name for x in self.layers), self.flops.attention, strict=True))
        for freq_bins, layers in by_freq_bins(self.layers).items():
            states = [layer.state for layer in layers]
            usual = max(dict.fromkeys(states), key=states.count)
            others = [f"{layer.name} {layer.state}" for layer in layers if layer.state != usual]
            cells = ["?" if freq_bins is None else str(freq_bins), str(len(layers))]
            cells.append("; ".join([usual, *others[:3], *([f"and {len(others) - 3} more"] if others[3:] else [])]))
            if timed:
                cells.insert(1, str(layers[0].frames))
                kept = sorted({layer.keys_kept or 1.0 for layer in layers})
                cells.append(" to ".join(f"{share:.1%}" for share in dict.fromkeys((kept[0], kept[-1]))))
                total = self.flops.patched if self.flops is not None else 0.0
                cells.append(f"{sum(shares[x.name] for x in layers) / total:.1%}" if total else "-")
            table.append(tuple(cells))
        return table


def status(pipe: Any, seconds: float | None = None) -> Status:
    """What each self-attention layer does right now, and what the patch saves.

    Args:
        pipe: what `patch` accepts, patched or not.
        seconds: length of a clip. With it, the table adds the share of keys that each layer keeps at that length, and
            how much less arithmetic one step of the UNet needs; before `patch`, what its defaults would save. Needs a
            pipeline: a bare UNet does not say how many frames a second has.

    Returns:
        The table.

    Raises:
        TypeError: for what `patch` refuses, and for a length that is no number.
        ValueError: for a length that is not positive or cannot be converted to frames.

    >>> import litefocus
    >>> from diffusers import AudioLDM2Pipeline
    >>> pipe = AudioLDM2Pipeline.from_pretrained("examples/embedded/pipeline")
    >>> handle = litefocus.patch(pipe)
    >>> status = litefocus.status(pipe, seconds=80)
    >>> status.layers[0].state, status.layers[0].frames, round(status.layers[0].keys_kept, 3)
    ('focus', 1000, 0.054)
    """
    found, tiles = status_of(resolve(pipe), seconds), tiles_of(pipe)
    sizes = None if tiles is None else (tiles.seconds, tiles.overlap)
    memory = None if seconds is None else decoding_bytes(pipe, seconds, sizes)
    return replace(found, tiles=tiles, decoding_bytes=memory, prompts=schedule_of(pipe))


def status_of(target: Target, seconds: float | None = None) -> Status:
    """`status` of a resolved target, without decoding."""
    geometry, unet, setting = target.geometry, target.unet, current(target.unet, "patch")
    num_frames = None
    if seconds is not None:
        if geometry is None or geometry.mel_frame is None:
            raise ValueError(
                f"{target.owner} does not say how many latent frames a second has, so status takes no seconds for it; "
                "a pipeline of diffusers and a Tango object do"
            )
        num_frames = geometry.num_frames(seconds)
    freq_bins = geometry.freq_bins if geometry else None
    if setting is not None:
        seen = vars(unet)["_litefocus_context"].sizes
        freq_bins = seen[-1][1] if seen else setting.known_bins
    layers = self_attention_layers(unet)
    rows = tuple(_row(layer, freq_bins, num_frames, setting is not None) for layer in layers)
    flops = None
    if num_frames and freq_bins:
        kept = {layer.attn: row.keys_kept or 1.0 for layer, row in zip(layers, rows, strict=True)}
        if setting is None:
            kept = {layer.attn: _kept_by_default(layer, num_frames, freq_bins) for layer in layers}
        flops = step_flops(unet, kept, num_frames, freq_bins)
    config = None if setting is None else setting.config
    return Status(type(unet).__name__, config, rows, seconds, num_frames, flops)


def _kept_by_default(layer: Layer, num_frames: int, freq_bins: int) -> float:
    """Share of keys that a layer would keep after `patch(pipe)`."""
    if obstacle(layer.attn) is not None:
        return 1.0
    return Grid(layer.name, level=layer.level).keys_kept(*(halved(x, layer.level) for x in (num_frames, freq_bins)))


def _row(layer: Layer, freq_bins: int | None, num_frames: int | None, is_patched: bool) -> LayerStatus:
    """freq_bins, num_frames: at the UNet's input, as far as they are known."""
    state, kept = "dense", 1.0
    bins = None if freq_bins is None else halved(freq_bins, layer.level)
    frames = None if num_frames is None else halved(num_frames, layer.level)
    found, hindrance = patched(layer.attn), obstacle(layer.attn)
    grid = None if found is None else found.grid
    if is_patched and (found is None or grid is None):
        state = f"dense: {hindrance or 'patch again, to include it'}"
    elif found is not None and grid is not None:
        processor = type(getattr(layer.attn, "processor", None)).__name__
        if processor in PLAIN_PROCESSORS:  # which call no other, so LiteFocus' is gone
            state = f"overwritten by {processor}"
        elif grid.last_call < found.context.finished:
            state = "not reached by the last call"
        elif hindrance and not grid.last_call:
            state = "not known before a call"
        else:
            kept = grid.keys_kept(frames or LONG_CLIP, bins or max(2, grid.config.min_freq_bins))
            state = "dense" if kept == 1 else "focus"
            if grid.why_dense is not None and kept < 1:
                state, kept = f"dense: {grid.why_dense}", 1.0
        if hindrance and not state.startswith("overwritten"):
            state += f"; {hindrance}"
    return LayerStatus(layer.name, bins, state, frames, kept if frames else None)


def step_flops(unet: nn.Module, keys_kept: Mapping[Any, float], num_frames: int, freq_bins: int) -> StepFlops:
    """Arithmetic of one UNet step: convolutions, projections and self-attention, 2 FLOPs a multiplication.

    Cross-attention over the prompt's tokens, embeddings and norms are left out; they are below 2 % from 10 s on.

    Args:
        unet: without wrappers.
        keys_kept: share of keys for every self-attention layer, by the layer itself.
        num_frames: of the grid at the UNet's input.
        freq_bins: of the grid at the UNet's input.
    """
    dense = saved = 0.0
    attention = dict.fromkeys(keys_kept, 0.0)
    # keys and values of cross-attention are made of the prompt's tokens, which are few
    of_prompt = set()
    module: Any
    for module in unet.modules():
        if hasattr(module, "to_q") and module not in keys_kept:
            of_prompt |= {
                id(part) for name in ("to_k", "to_v") for part in getattr(module, name, nn.Module()).modules()
            }
    for prefix, block, level in blocks(unet):
        for name, module in named_modules(block, prefix):
            at = level + (".downsamplers." in name) - (".upsamplers." in name)
            tokens = halved(num_frames, at) * halved(freq_bins, at)
            if module in keys_kept:
                scores = 4 * tokens**2 * module.to_q.out_features
                attention[module] = scores * keys_kept[module]
                dense += scores
                saved += scores - attention[module]
            in_transformer = ".attentions" in name or ".transformer_blocks." in name
            per_token = isinstance(module, nn.Conv2d) or (isinstance(module, nn.Linear) and in_transformer)
            if per_token and id(module) not in of_prompt:
                dense += 2 * module.weight.numel() * tokens
    return StepFlops(dense, dense - saved, tuple(attention.values()))
