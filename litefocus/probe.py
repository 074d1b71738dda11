"""See where a model's dense self-attention looks, before trusting a patch to leave the rest out."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from litefocus.config import LiteFocusConfig, merged_config
from litefocus.focus import FreqAxis, check_freq_axis
from litefocus.processor import LiteFocusAttnProcessor, attention_inputs, cached_focus_set
from litefocus.report import as_html, as_text
from litefocus.unet import Layer, find_unet, get_processor, input_freq_bins, self_attention_layers

QUERIES = 64  # of every call whose scores are looked at
NATIVE_FRAMES = 256  # 10.24 s at 25 latent frames a second, what AudioLDM-style models were trained on


@dataclass(frozen=True)
class Share:
    """Mean share of attention mass on a set of keys, in [0, 1], and what evenly spread attention would have there."""

    mass: float
    even: float


@dataclass(frozen=True)
class LayerProbe:
    """One self-attention layer, averaged over the calls, batch elements, heads and queries that were looked at.

    name: its path in the UNet. freq_bins: of its grid. frames: of its grid at the last call. calls: how many.
    own_bin: dense attention's mass on the query's own frequency bin. focus: inside its focus set. window: no more
        than half a time window away. None where the layer was not called.
    """

    name: str
    freq_bins: int
    frames: int | None
    calls: int
    own_bin: Share | None
    focus: Share | None
    window: Share | None


def probe(
    pipe: Any,
    config: LiteFocusConfig | None = None,
    *,
    freq_bins: int | None = None,
    freq_axis: FreqAxis = "width",
    **overrides: Any,
) -> Probe:
    """Measure what share of dense self-attention lies where LiteFocus would look, while the pipeline runs as it is.

    pipe, config, freq_bins, freq_axis, overrides: as for `patch`. Every self-attention layer is measured, also those
        below `min_freq_bins`. The time window is `config.time_window`, 256 frames (10.24 s) where that is None.

    Returns a context manager; use the pipeline inside of its block, then print it, or read `layers`. No output
    changes. At every call the scores of 64 queries are computed once more, never those of all: one batch element at a
    time, (heads, 64, tokens) in float32. A mass near the even share says that the layer looks anywhere alike.

    Raises what `patch` raises for the same arguments, ValueError where `pipe` is patched, and RuntimeError at the end
    of the block if it saw no self-attention call, as with a UNet that was compiled before.
    Source: the paper's observation that attention mass lies on the query's own frequency (arXiv 2407.10468).

    >>> import litefocus
    >>> from diffusers import AudioLDM2Pipeline
    >>> pipe = AudioLDM2Pipeline.from_pretrained("examples/embedded/pipeline")
    >>> with litefocus.probe(pipe) as probe:
    ...     audio = pipe("a slow bell", audio_length_in_s=2.0, num_inference_steps=1).audios[0]
    >>> first = probe.layers[0]
    >>> first.freq_bins, first.frames, first.own_bin.even, 0 < first.own_bin.mass < 1
    (8, 25, 0.125, True)
    """
    config = merged_config("probe()", config, overrides)
    check_freq_axis(freq_axis)
    unet = find_unet(pipe)
    layers = list(self_attention_layers(unet, input_freq_bins(pipe, freq_bins)))
    if not layers:
        raise ValueError(f"{type(unet).__name__} has no self-attention layer, so there is nothing to probe")
    if any(isinstance(get_processor(layer.attn), LiteFocusAttnProcessor) for layer in layers):
        raise ValueError("the pipeline is patched, so its attention is not dense; litefocus.unpatch(pipe) first")
    return Probe(type(unet).__name__, config, [_Measured(layer, config, freq_axis) for layer in layers])


class Probe:
    """What `litefocus.probe` returns: measures inside of its `with` block, prints as a table, in notebooks too.

    layers: a `LayerProbe` for every self-attention layer, in the UNet's order, as far as it has been measured.

    >>> import litefocus
    >>> from diffusers import AudioLDM2Pipeline
    >>> pipe = AudioLDM2Pipeline.from_pretrained("examples/embedded/pipeline")
    >>> probe = litefocus.probe(pipe)  # nothing measured yet
    >>> probe.layers[0].freq_bins, probe.layers[0].calls, probe.layers[0].own_bin
    (8, 0, None)
    """

    def __init__(self, unet: str, config: LiteFocusConfig, measured: list[_Measured]) -> None:
        self.config = config
        self._unet = unet
        self._measured = measured
        self._hooks: list[RemovableHandle] = []

    @property
    def layers(self) -> tuple[LayerProbe, ...]:
        """One row for every self-attention layer."""
        return tuple(layer.row() for layer in self._measured)

    def __enter__(self) -> Probe:
        """Start measuring; a second block adds to the first."""
        self._hooks = [
            layer.attn.register_forward_pre_hook(layer.measure, with_kwargs=True) for layer in self._measured
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop measuring. Raises RuntimeError if no self-attention call came, unless the block failed by itself."""
        for hook in self._hooks:
            hook.remove()
        if kind is None and not any(layer.calls for layer in self._measured):
            raise RuntimeError(
                "the probe saw no self-attention call: run the pipeline inside of the with block, and compile its "
                "UNet afterwards, since a compiled one does not show its calls"
            )

    def _summary(self) -> list[str]:
        return [
            f"dense attention of {self._unet}: share of its mass, and what even attention would have there",
            f"focus sets of {self.config}",
        ]

    def _table(self) -> list[tuple[str, ...]]:
        window = self.config.time_window or NATIVE_FRAMES
        table: list[tuple[str, ...]] = [
            ("layer", "freq bins", "frames", "own bin", "even", "focus set", "even", f"window of {window}", "even")
        ]
        for row in self.layers:
            cells = [row.name, str(row.freq_bins), "-" if row.frames is None else str(row.frames)]
            for share in (row.own_bin, row.focus, row.window):
                cells += ["-", "-"] if share is None else [f"{share.mass:.1%}", f"{share.even:.1%}"]
            table.append(tuple(cells))
        return table

    def __repr__(self) -> str:
        return as_text(self._summary(), self._table())

    def _repr_html_(self) -> str:
        return as_html(self._summary(), self._table())


class _Measured:
    """What one layer's attention has looked at so far."""

    def __init__(self, layer: Layer, config: LiteFocusConfig, freq_axis: FreqAxis) -> None:
        self.attn = layer.attn
        # it knows the layer's grid and focus sets; it is never installed
        self.grid = LiteFocusAttnProcessor(
            None, layer=layer.name, freq_bins=layer.freq_bins, config=config, level=layer.level, freq_axis=freq_axis
        )
        self.window = math.ceil((config.time_window or NATIVE_FRAMES) / 2**layer.level)
        self.calls = 0
        self.frames: int | None = None
        self.mass = torch.zeros(3, dtype=torch.float64)  # own bin, focus set, window; summed over calls
        self.even = torch.zeros(3, dtype=torch.float64)

    def row(self) -> LayerProbe:
        shares: list[Share | None] = [None] * 3
        if self.calls:
            means = ((self.mass / self.calls).tolist(), (self.even / self.calls).tolist())
            shares = [Share(*pair) for pair in zip(*means, strict=True)]
        return LayerProbe(self.grid.layer, self.grid.freq_bins, self.frames, self.calls, *shares)

    @torch.no_grad()
    def measure(self, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at a call before it is made (a forward pre-hook). Cross-attention and masked calls are let pass."""
        # diffusers: hidden_states, encoder_hidden_states, attention_mask; the authors' code: x, context, mask
        states, *others = (*args, *kwargs.values())
        if "hidden_states" in kwargs:
            states = kwargs["hidden_states"]
            others = [value for name, value in kwargs.items() if name != "hidden_states"]
        if any(isinstance(value, Tensor) for value in others):
            return
        query, key, _ = attention_inputs(attn, states)
        tokens = query.shape[2]
        frames = self.grid.num_frames(tokens)
        chosen = self._choose(tokens).to(query.device)
        sets = self._sets(chosen, frames)  # (3, queries, tokens)
        mass = torch.zeros(3, dtype=torch.float64)
        for one_query, one_key in zip(query, key, strict=True):  # one batch element at a time
            scores = one_query[:, chosen].float() @ one_key.float().transpose(1, 2) * query.shape[-1] ** -0.5
            weights = scores.softmax(dim=-1).mean(dim=0)  # (queries, tokens), over heads
            mass += (weights * sets).sum(dim=-1).mean(dim=-1).double().cpu()
        self.mass += mass / len(query)
        self.even += sets.double().mean(dim=(1, 2)).cpu()
        self.frames, self.calls = frames, self.calls + 1

    def _choose(self, tokens: int) -> Tensor:
        """The tokens whose scores are looked at, others at every call; the global random state stays as it is."""
        seed = zlib.crc32(f"probe/{self.grid.layer}/{self.calls}".encode())
        generator = torch.Generator("cpu").manual_seed(seed)
        return torch.randperm(tokens, generator=generator, device="cpu")[:QUERIES]

    def _sets(self, chosen: Tensor, frames: int) -> Tensor:
        """(3, queries, tokens) booleans: the own frequency bin, the focus set and the time window of every query."""
        token = torch.arange(frames * self.grid.freq_bins, device=chosen.device)
        if self.grid.freq_axis == "width":
            bins, times = token % self.grid.freq_bins, token // self.grid.freq_bins
        else:
            bins, times = token // frames, token % frames
        own_bin = bins[chosen, None] == bins
        window = (times[chosen, None] - times).abs() <= self.window / 2
        focus = cached_focus_set(self.grid, frames, chosen.device)
        group = focus.inverse[chosen] // focus.queries.shape[1]
        in_focus = torch.zeros_like(own_bin).scatter(1, focus.keys[group], True)
        return torch.stack([own_bin, in_focus, window])
