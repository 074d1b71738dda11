"""Tables: what each layer does, with the estimate of what that saves."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from litefocus.config import LiteFocusConfig


@dataclass(frozen=True)
class LayerStatus:
    """One self-attention layer.

    name: its path in the UNet.
    freq_bins: frequency bins of its grid; None if neither a pipeline nor a patch says.
    state: "focus", "dense" or "overwritten by <class>".
    frames, keys_kept: frames of its grid and the share of keys that a query attends to, in (0, 1], at the length that
        `status` was asked for; None without one.
    """

    name: str
    freq_bins: int | None
    state: str
    frames: int | None
    keys_kept: float | None


@dataclass(frozen=True)
class StepFlops:
    """Estimated floating-point operations of one UNet step for one batch element."""

    dense: float
    patched: float

    @property
    def ratio(self) -> float:
        """How many times less arithmetic the patched step needs; the most that it can be faster."""
        return self.dense / self.patched


@dataclass(frozen=True, repr=False)
class Status:
    """What `litefocus.status` found. Prints as a table, in notebooks too.

    unet: class name. config: settings of the installed patch, None where there is none.
    layers: one row for every self-attention layer, in the UNet's order.
    seconds, flops: the length asked for, and the step's estimated arithmetic at that length.

    >>> row = LayerStatus("mid_block.attentions.0", freq_bins=2, state="dense", frames=None, keys_kept=None)
    >>> Status("UNet2DConditionModel", None, (row,))
    LiteFocus on UNet2DConditionModel: 0 of 1 self-attention layers focus
    not installed
    layer                   freq bins  does
    mid_block.attentions.0  2          dense
    """

    unet: str
    config: LiteFocusConfig | None
    layers: tuple[LayerStatus, ...]
    seconds: float | None = None
    flops: StepFlops | None = None

    def _summary(self) -> list[str]:
        states = [layer.state for layer in self.layers]
        overwritten = sum(state.startswith("overwritten") for state in states)
        lines = [f"LiteFocus on {self.unet}: {states.count('focus')} of {len(states)} self-attention layers focus"]
        if overwritten:
            lines[0] += f", {overwritten} overwritten since they were patched"
        lines.append(str(self.config) if self.config else "not installed")
        if self.flops is not None:
            lines.append(
                f"at {self.seconds:g} s: {self.flops.dense / 1e9:,.1f} GFLOPs a step become "
                f"{self.flops.patched / 1e9:,.1f} (estimated), at most {self.flops.ratio:.2f}x faster"
            )
        return lines

    def _table(self) -> list[tuple[str, ...]]:
        header: tuple[str, ...] = ("layer", "freq bins", "does")
        rows: list[tuple[str, ...]] = [
            (layer.name, "?" if layer.freq_bins is None else str(layer.freq_bins), layer.state) for layer in self.layers
        ]
        if self.seconds is not None:
            header += ("frames", "keys kept")
            rows = [
                (*row, str(layer.frames), f"{layer.keys_kept:.1%}")
                for row, layer in zip(rows, self.layers, strict=True)
            ]
        return [header, *rows]

    def __repr__(self) -> str:
        return as_text(self._summary(), self._table())

    def _repr_html_(self) -> str:
        return as_html(self._summary(), self._table())


def as_text(summary: list[str], table: list[tuple[str, ...]]) -> str:
    """Lines of summary, then a table in columns; its first row is the header."""
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table)
    return "\n".join([*summary, *(line.rstrip() for line in lines)])


def as_html(summary: list[str], table: list[tuple[str, ...]]) -> str:
    """The same for notebooks."""

    def row(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    header, *rows = table
    top = "<br>".join(html.escape(line) for line in summary)
    return f"<p>{top}</p><table>{row(header, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"


def step_flops(
    blocks: Iterable[tuple[str, nn.Module, int]], keys_kept: Mapping[str, float], num_frames: int, freq_bins: int
) -> StepFlops:
    """Arithmetic of one UNet step: convolutions, projections and self-attention, 2 FLOPs a multiplication.

    blocks: (name, block, level) for all blocks. keys_kept: share of keys for every self-attention layer, by name.
    num_frames, freq_bins: grid at the UNet's input. Cross-attention over the prompt's tokens, embeddings and
    norms are left out; they are below 2 % from 10 s on.
    """
    dense = saved = 0.0
    for prefix, block, level in blocks:
        for name, module in block.named_modules():
            at = level + ("downsamplers." in name) - ("upsamplers." in name)
            tokens = math.ceil(num_frames / 2**at) * math.ceil(freq_bins / 2**at)
            full_name = f"{prefix}.{name}".replace("_orig_mod.", "")
            if full_name in keys_kept:
                attention = 4 * tokens**2 * module.to_q.out_features
                dense += attention
                saved += attention * (1 - keys_kept[full_name])
            layer, _, projection = full_name.partition(".to_")
            of_prompt = projection.startswith(("k", "v")) and layer not in keys_kept
            in_transformer = "attentions." in name or "transformer_blocks." in name
            per_token = isinstance(module, nn.Conv2d) or (isinstance(module, nn.Linear) and in_transformer)
            if per_token and not of_prompt:
                dense += 2 * module.weight.numel() * tokens
    return StepFlops(dense, dense - saved)
