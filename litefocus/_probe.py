"""Measure how far a patch would be from a model's dense self-attention, and its mass on the own bin."""

from __future__ import annotations

import weakref
import zlib
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from litefocus._context import Context
from litefocus._grid import Grid, halved
from litefocus._layers import Layer, count_reasons, layers_to_patch
from litefocus._processor import attention_inputs
from litefocus._registry import current
from litefocus._table import Table, by_freq_bins
from litefocus._target import resolve
from litefocus.config import ConfigOptions, LiteFocusConfig, merged_config, shows_options
from litefocus.focus import FreqAxis

if TYPE_CHECKING:
    from typing_extensions import Unpack

QUERIES = 64  # of every call whose scores are looked at
NATIVE_FRAMES = 256  # 10.24 s at 25 latent frames a second, what AudioLDM-style models were trained on
# Settings within this mean error were as good as dense attention in the evaluation, examples/evidence/quality.md.
CLOSE = 0.2

_probed: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # UNets in a block of `probe`


def compared_settings(config: LiteFocusConfig) -> dict[str, LiteFocusConfig]:
    """The settings that are compared: the given ones first, then a few others."""
    default = LiteFocusConfig()
    named = {
        "given": config,
        "default": default,
        "paper": LiteFocusConfig.paper(),
        "shared sample": LiteFocusConfig(same_frequency=False, time_window=None),
        "window alone": LiteFocusConfig(time_window=NATIVE_FRAMES, far_sampled=0),
    }
    if config == default:
        del named["given"]
    return named


@dataclass(frozen=True)
class LayerProbe:
    """One self-attention layer, averaged over the calls, batch elements, heads and queries that were looked at.

    name: its path in the UNet. freq_bins, frames: of its grid at the last call. calls: how many.
    same_frequency: share of dense attention's mass on the query's own frequency bin, in [0, 1]; about 1 / freq_bins
        where a layer attends to all bins alike. None where the layer was not called.
    errors: by settings, the distance of the attention output from dense attention's, relative to it (Frobenius norms
        over everything that was looked at); 0 where the settings leave the layer dense.
    keys_kept: by settings, the share of keys at the last call.
    """

    name: str
    freq_bins: int | None
    frames: int | None
    calls: int
    same_frequency: float | None
    errors: dict[str, float]
    keys_kept: dict[str, float]


@shows_options
def probe(
    pipe: Any,
    config: LiteFocusConfig | None = None,
    *,
    freq_bins: int | None = None,
    freq_axis: FreqAxis = "width",
    **options: Unpack[ConfigOptions],
) -> Probe:
    """Measure how far LiteFocus would be from dense self-attention, while the pipeline runs as it is.

    For every layer: the relative error of the attention output with the settings asked about and with a few others
    (the default, the paper's, one shared sample for all queries, a time window of 256 frames alone), and which share of
    dense attention's mass lies on the query's own frequency bin. The printed table has their means by level, under a
    line of advice.

    No output changes. At every call the scores of 64 queries are computed once more, never those of all: one batch
    element at a time, (heads, 64, tokens) in float32. Every layer on which `patch` would put its attention is measured,
    also those below `min_freq_bins`.

    Args:
        pipe: as for `patch`.
        config: as for `patch`.
        freq_bins: as for `patch`.
        freq_axis: as for `patch`.
        **options: as for `patch`.

    Returns:
        A context manager; use the pipeline inside of its block, then print it, or read `layers`.

    Raises:
        TypeError: what `patch` raises for the same arguments.
        ValueError: what `patch` raises for the same arguments, and where `pipe` is patched.
        RuntimeError: at the start of the block if `pipe` was patched since, or another block measures it; at its end if
            it saw no self-attention call, as with a UNet that was compiled before.

    Source: the paper's observation that attention mass lies on the query's own frequency (arXiv 2407.10468).

    >>> import litefocus
    >>> from diffusers import AudioLDM2Pipeline
    >>> pipe = AudioLDM2Pipeline.from_pretrained("examples/embedded/pipeline")
    >>> with litefocus.probe(pipe) as probe:
    ...     audio = pipe("a slow bell", audio_length_in_s=2.0, num_inference_steps=1).audios[0]
    >>> first = probe.layers[0]
    >>> first.freq_bins, first.frames, 0 < first.same_frequency < 1
    (8, 25, True)
    """
    config = merged_config("probe()", config, options)
    target = resolve(pipe)
    freq_bins, known_bins = target.check_axes(freq_bins, freq_axis)
    if current(target.unet, "patch") is not None:
        raise ValueError("the pipeline is patched, so its attention is not dense; litefocus.unpatch(pipe) first")
    return Probe(target.unet, config, Context(freq_axis, freq_bins, "probed"), known_bins)


def probing(unet: nn.Module) -> bool:
    """Whether a block of `probe` measures this UNet."""
    return unet in _probed


class Probe(Table):
    """What `litefocus.probe` returns: measures inside of its `with` block, prints as a table, in notebooks too.

    layers: a `LayerProbe` for every self-attention layer that `patch` would patch, in the UNet's order.

    >>> import litefocus
    >>> from diffusers import AudioLDM2Pipeline
    >>> pipe = AudioLDM2Pipeline.from_pretrained("examples/embedded/pipeline")
    >>> probe = litefocus.probe(pipe)  # nothing measured yet
    >>> probe.layers[0].freq_bins, probe.layers[0].calls, probe.layers[0].same_frequency
    (8, 0, None)
    """

    def __init__(self, unet: nn.Module, config: LiteFocusConfig, context: Context, freq_bins: int | None) -> None:
        self.config = config
        self._owner = type(unet).__name__
        self._unet = weakref.ref(unet)
        self._context = context
        reasons = layers_to_patch(unet)
        self._left_out = count_reasons(reasons.values())
        self._layers = [_Measured(x, config, context, freq_bins) for x, reason in reasons.items() if reason is None]
        self._hooks: list[RemovableHandle] = []

    @property
    def layers(self) -> tuple[LayerProbe, ...]:
        """One row for every self-attention layer that `patch` would patch."""
        return tuple(layer.row() for layer in self._layers)

    def __enter__(self) -> Probe:
        """Start measuring; a later block adds to the first."""
        unet = self._unet()
        if unet is None:
            raise RuntimeError("the UNet of this probe is gone; make another: with litefocus.probe(pipe): ...")
        if probing(unet):
            raise RuntimeError("a probe is measuring this UNet already; leave its block first")
        if current(unet, "patch") is not None:
            raise RuntimeError("the pipeline was patched after the probe was made; litefocus.unpatch(pipe) first")
        _probed.add(unet)
        self._context.hook(unet)
        for layer in self._layers:
            attn = layer.attn()
            if attn is not None:
                self._hooks.append(attn.register_forward_pre_hook(layer.measure, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop measuring. Raises RuntimeError if no self-attention call came, unless the block failed by itself."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._context.unhook()
        unet = self._unet()
        if unet is not None:
            _probed.discard(unet)
        if kind is None and not any(layer.calls for layer in self._layers):
            raise RuntimeError(
                "the probe saw no self-attention call: run the pipeline inside of the with block, and compile its "
                "UNet afterwards, since a compiled one does not show its calls"
            )

    @property
    def advice(self) -> str:
        """One line: which settings are near enough to dense attention, and where they are not."""
        rows = [row for row in self.layers if row.calls]
        if not rows:
            return "nothing measured yet"
        # over the layers that focus: those that settings leave dense have no error, and need no keys to be saved
        focus = {name: [row for row in rows if row.keys_kept[name] < 1] for name in rows[0].errors}
        mean = {name: sum(row.errors[name] for row in of) / max(1, len(of)) for name, of in focus.items()}
        keys = {name: sum(row.keys_kept[name] for row in rows) for name in mean}
        given = next(iter(mean))
        if not focus[given]:
            return f"{given}: dense in all layers at this length"
        best = given if mean[given] <= CLOSE else min(mean, key=lambda name: mean[name])
        if not focus[best]:
            return f"{best}: dense in all layers at this length, so nothing is lost and nothing gained"
        worst = max(rows, key=lambda row: row.errors[best])
        found = f"{best}: {mean[best]:.0%} from dense on average, at most {worst.errors[best]:.0%} ({worst.name})"
        if mean[best] <= CLOSE:
            cheaper = [name for name in mean if keys[name] < 0.8 * keys[best] and mean[name] <= CLOSE]
            cheapest = min(cheaper, key=lambda name: keys[name], default=None)
            more = f"; {cheapest} would do too ({mean[cheapest]:.0%}), with fewer keys" if cheapest else ""
            return f"{found}: use it{more}"
        # the error of a sample shrinks with the root of its size
        ratio = min(1.0, self.config.sparse_ratio * (mean[given] / CLOSE) ** 2)
        far_off = [row.name for row in rows if row.errors[given] > CLOSE]
        return (
            f"{found}: in {len(far_off)} of {len(rows)} layers, such as {far_off[0]}, few tokens hold most attention; "
            f"raise sparse_ratio to {ratio:.2g}"
        )

    def _summary(self) -> list[str]:
        return [
            f"focus sets against dense attention of {self._owner}: error of the output, and dense mass on the own bin",
            f"focus sets of {self.config}",
            *([f"left out, as they would stay dense: {self._left_out}"] if self._left_out else []),
            self.advice,
        ]

    def _table(self) -> list[tuple[str, ...]]:
        names = list(compared_settings(self.config))
        errors = (f"error, {name}" for name in names)
        table = [("freq bins", "layers", "frames", *errors, "mass on the same frequency", "uniform")]
        for freq_bins, rows in by_freq_bins(self.layers).items():
            seen = [row for row in rows if row.calls]
            cells = [
                "?" if freq_bins is None else str(freq_bins),
                str(len(rows)),
                str(seen[-1].frames) if seen else "-",
            ]
            for name in names:
                error = f"{sum(row.errors[name] for row in seen) / len(seen):.1%}" if seen else "-"
                cells.append("dense" if seen and all(row.keys_kept[name] == 1 for row in seen) else error)
            mass = uniform = "-"
            if seen and freq_bins:
                mass = f"{sum(row.same_frequency or 0.0 for row in seen) / len(seen):.1%}"
                uniform = f"{1 / freq_bins:.1%}"
            table.append((*cells, mass, uniform))
        return table


class _Measured:
    """Measurements of one layer, summed over its calls so far."""

    def __init__(self, layer: Layer, config: LiteFocusConfig, context: Context, freq_bins: int | None) -> None:
        self.attn, self.context = weakref.ref(layer.attn), context
        self.grids = {
            name: Grid(layer.name, level=layer.level, config=each, freq_axis=context.freq_axis)
            for name, each in compared_settings(config).items()
        }
        self.grid = next(iter(self.grids.values()))  # of the given settings
        self.squared_error = dict.fromkeys(self.grids, 0.0)  # against dense attention's output, summed over calls
        self.squared_norm = 0.0  # of dense attention's output
        self.calls = 0
        self.freq_bins = None if freq_bins is None else halved(freq_bins, layer.level)
        self.frames: int | None = None
        self.mass = 0.0  # of dense attention on the query's own frequency bin, summed over calls

    def row(self) -> LayerProbe:
        same_frequency = self.mass / self.calls if self.calls else None
        errors = {name: (error / max(self.squared_norm, 1e-30)) ** 0.5 for name, error in self.squared_error.items()}
        kept = dict.fromkeys(self.grids, 1.0)
        if self.frames and self.freq_bins:
            kept = {name: grid.keys_kept(self.frames, self.freq_bins) for name, grid in self.grids.items()}
        return LayerProbe(self.grid.name, self.freq_bins, self.frames, self.calls, same_frequency, errors, kept)

    @torch.no_grad()
    def measure(self, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at a call before it is made (a forward pre-hook). Cross-attention and masked calls are let pass."""
        if self.attn() is not attn:  # but a copy
            return
        # diffusers: hidden_states, encoder_hidden_states, attention_mask; the authors' code: x, context, mask
        states, *others = (*args, *kwargs.values())
        if "hidden_states" in kwargs:
            states = kwargs["hidden_states"]
            others = [value for name, value in kwargs.items() if name != "hidden_states"]
        if any(isinstance(value, Tensor) for value in others):
            return
        fused = type(getattr(attn, "processor", None)).__name__.startswith("Fused")
        query, key, value = attention_inputs(attn, states, fused=fused)
        tokens = query.shape[2]
        size = self.context.layer_size(tokens, self.grid)
        if size is None:  # merged tokens: they lie on no grid
            return
        chosen = self._choose(tokens).to(query.device)
        frames, freq_bins = size
        token = torch.arange(tokens, device=chosen.device)
        bins = token % freq_bins if self.grid.freq_axis == "width" else token // frames
        same_frequency = bins[chosen, None] == bins  # (queries, tokens)
        biases = {name: self._bias(grid, chosen, size) for name, grid in self.grids.items()}
        for one_query, one_key, one_value in zip(query, key, value, strict=True):  # one batch element at a time
            scores = one_query[:, chosen].float() @ one_key.float().transpose(1, 2) * query.shape[-1] ** -0.5
            weights = scores.softmax(dim=-1)  # (heads, queries, tokens)
            self.mass += float((weights * same_frequency).sum(dim=-1).double().mean()) / len(query)
            dense = weights @ one_value.float()
            self.squared_norm += float(dense.double().square().sum())
            for name, bias in biases.items():
                if bias is not None:
                    focused = (scores + bias).softmax(dim=-1) @ one_value.float()
                    self.squared_error[name] += float((focused - dense).double().square().sum())
        self.frames, self.freq_bins = size
        self.calls += 1

    def _bias(self, grid: Grid, chosen: Tensor, size: tuple[int, int]) -> Tensor | None:
        """(queries, tokens): log weights in the focus set, -inf outside; None where the settings leave it dense."""
        if grid.keys_kept(*size) == 1:
            return None
        focus = grid.focus_set(*size, chosen.device)
        keys = focus.keys[focus.inverse[chosen] // focus.queries.shape[1]]
        weights = torch.zeros(keys.shape[1], device=chosen.device) if focus.log_weights is None else focus.log_weights
        bias = torch.full((len(chosen), focus.tokens), -torch.inf, device=chosen.device)
        return bias.scatter(1, keys, weights.expand(keys.shape))

    def _choose(self, tokens: int) -> Tensor:
        """The tokens whose scores are looked at, others at every call; the global random state stays as it is."""
        seed = zlib.crc32(f"probe/{self.grid.name}/{self.calls}".encode())
        generator = torch.Generator("cpu").manual_seed(seed)
        return torch.randperm(tokens, generator=generator, device="cpu")[:QUERIES]
