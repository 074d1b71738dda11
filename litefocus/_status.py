"""What each layer does right now, and what that saves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from litefocus._decoding import Tiles, decoding_bytes, tiling_of
from litefocus._flops import StepFlops, step_flops
from litefocus._grid import halved
from litefocus._layers import Layer, get_processor
from litefocus._processor import LiteFocusAttnProcessor, installed_on, ours_in
from litefocus._table import as_html, as_text
from litefocus._target import Target, resolve
from litefocus.config import LiteFocusConfig

MUCH_MEMORY = 2**30  # bytes
LONG_CLIP = 10**6  # frames, for what a layer does where no length is given: no rounding of the sample matters


@dataclass(frozen=True)
class LayerStatus:
    """One self-attention layer.

    name: its path in the UNet.
    freq_bins: frequency bins of its grid; None if neither a pipeline nor a patch says.
    state: "focus" or "dense", with a reason where there is one, or "overwritten by <class>".
    frames, keys_kept: frames of its grid and the share of keys that a query attends to, in (0, 1], at the length that
        `status` was asked for; None without one.
    """

    name: str
    freq_bins: int | None
    state: str
    frames: int | None
    keys_kept: float | None


@dataclass(frozen=True, repr=False)
class Status:
    """What `litefocus.status` found. Prints as a table, in notebooks too.

    unet: class name. config: settings of the patch in force, None where there is none.
    layers: one row for every self-attention layer, in the UNet's order; what is printed has one for every level.
    seconds, frames, flops: the length asked for, its frames at the UNet's input, and the step's estimated arithmetic.
    tiles, decoding_bytes: of `tile_decoding`, None without; estimated memory of decoding one clip of that length.

    >>> row = LayerStatus("mid_block.attentions.0", freq_bins=2, state="dense", frames=None, keys_kept=None)
    >>> Status("UNet2DConditionModel", None, (row,))
    LiteFocus on UNet2DConditionModel: 0 of 1 self-attention layers focus
    not installed
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

    @property
    def advice(self) -> str | None:
        """One line where the settings are not the best for the length asked for; None where they are, or none was."""
        default = LiteFocusConfig().time_window
        if self.flops is None or self.frames is None or self.config is None or default is None:
            return None
        attention = sum(self.flops.attention) / self.flops.patched
        if self.config.time_window is None and self.frames > 2 * default:
            return (
                f"advice: self-attention still is {attention:.0%} of the step and grows with the square of the length; "
                f"leave time_window at its default of {default}"
            )
        if self.config.time_window is not None and not (self.config.reweight and self.config.far_sampled):
            return (
                "advice: a time window alone hears nothing of the rest of the clip; leave far_sampled and reweight on"
            )
        if self.tiles is None and (self.decoding_bytes or 0) > MUCH_MEMORY:
            return "advice: litefocus.tile_decoding(pipe) decodes in the memory of one tile"
        return None

    def _summary(self) -> list[str]:
        states = [layer.state for layer in self.layers]
        overwritten = sum(state.startswith("overwritten") for state in states)
        focus = sum(state.startswith("focus") for state in states)
        lines = [f"LiteFocus on {self.unet}: {focus} of {len(states)} self-attention layers focus"]
        if overwritten:
            lines[0] += f", {overwritten} overwritten since they were patched"
        lines.append(str(self.config) if self.config else "not installed")
        if self.flops is not None:
            lines.append(
                f"at {self.seconds:g} s: {self.flops.dense / 1e9:,.1f} GFLOPs a step become "
                f"{self.flops.patched / 1e9:,.1f} (estimated), at most {self.flops.ratio:.2f}x faster"
            )
        if self.tiles is not None or self.decoding_bytes is not None:
            tiled = "whole" if self.tiles is None else f"in tiles of {self.tiles.seconds:g} s"
            mega = (self.decoding_bytes or 0) / 2**20
            size = f"{mega:.0f} MiB" if mega < 1000 else f"{mega / 2**10:.1f} GiB"
            memory = "" if self.decoding_bytes is None else f", {size} (estimated)"
            lines.append(f"decoding: {tiled}{memory}")
        return lines + ([self.advice] if self.advice else [])

    def _table(self) -> list[tuple[str, ...]]:
        """A row for every level; layers that do not do what most of their level do are named."""
        timed = self.seconds is not None
        header = ("freq bins", *(("frames",) if timed else ()), "layers", "state")
        table = [header + (("keys kept", "share of the step") if timed else ())]
        levels: dict[int | None, list[LayerStatus]] = {}
        for layer in self.layers:
            levels.setdefault(layer.freq_bins, []).append(layer)
        shares = {}
        if self.flops is not None:
            shares = dict(zip((x.name for x in self.layers), self.flops.attention, strict=True))
        for freq_bins, layers in levels.items():
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

    def __repr__(self) -> str:
        return as_text(self._summary(), self._table())

    def _repr_html_(self) -> str:
        return as_html(self._summary(), self._table())


def status(pipe: Any, seconds: float | None = None) -> Status:
    """What each self-attention layer does right now: focus, dense, or overwritten by something else.

    Args:
        pipe: what `patch` accepts, patched or not.
        seconds: length of a clip. With it, the table adds the share of keys that each layer keeps at that length, and
            how much less arithmetic one step of the UNet needs. It takes a pipeline: a bare UNet does not say how many
            frames a second has.

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
    ('focus', 1000, 0.097)
    """
    found, tiles = status_of(resolve(pipe), seconds), tiling_of(pipe)
    memory = None if seconds is None else decoding_bytes(pipe, seconds, tiles)
    return replace(found, tiles=tiles, decoding_bytes=memory)


def status_of(target: Target, seconds: float | None = None) -> Status:
    """The same of what is resolved already."""
    geometry, num_frames = target.geometry, None
    if seconds is not None:
        if geometry is None or geometry.hop_seconds is None:
            raise ValueError(
                f"{target.owner} does not say how many latent frames a second has; "
                "pass the whole pipeline to status(pipe, seconds=...)"
            )
        num_frames = geometry.num_frames(seconds)
    layers = target.layers
    rows = tuple(_row(layer, target, num_frames) for layer in layers)
    flops = None
    if num_frames and geometry:
        kept = {layer.attn: row.keys_kept or 1.0 for layer, row in zip(layers, rows, strict=True)}
        flops = step_flops(target.unet, kept, num_frames, geometry.freq_bins)
    grids = (one.grid_in_force for one in map(installed_on, (layer.attn for layer in layers)) if one is not None)
    config = next((grid.config for grid in grids if grid is not None), None)
    return Status(type(target.unet).__name__, config, rows, seconds, num_frames, flops)


def _row(layer: Layer, target: Target, num_frames: int | None) -> LayerStatus:
    processor, installed = get_processor(layer.attn), installed_on(layer.attn)
    geometry = target.geometry
    freq_bins = halved(geometry.freq_bins, layer.level) if geometry else None
    frames = halved(num_frames, layer.level) if num_frames else None
    grid = getattr(processor, "grid", None) if isinstance(processor, LiteFocusAttnProcessor) else None
    state, kept = "dense", 1.0
    if installed is not None and installed.grid_in_force is not None:
        grid = installed.grid_in_force
    elif grid is None and isinstance(processor, LiteFocusAttnProcessor):
        state = "dense: its patch was removed"
    if grid is not None:
        freq_bins = grid.freq_bins
        wrapped = not isinstance(processor, LiteFocusAttnProcessor)
        passed_over = installed is not None and grid.reached < installed.watched.finished
        if wrapped and (passed_over or ours_in(processor) is None):
            state = f"overwritten by {type(processor).__name__}"
        else:
            kept = grid.keys_kept(frames or LONG_CLIP)
            state = "dense" if kept == 1 else "focus"
            if grid.mismatch is not None and kept < 1:
                state, kept = f"dense: {grid.mismatch}", 1.0
            if wrapped:
                state += f", wrapped by {type(processor).__name__}"
    return LayerStatus(layer.name, freq_bins, state, frames, kept if frames else None)
