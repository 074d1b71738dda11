"""LiteFocus attention behind diffusers' attention-processor protocol."""

from __future__ import annotations

import functools
import inspect
import operator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from litefocus._call import Watched
from litefocus._grid import Grid, focus_set_for
from litefocus._memory import hand_back
from litefocus._projection import attention_inputs
from litefocus.attention import focus_attention
from litefocus.config import LiteFocusConfig
from litefocus.focus import FreqAxis

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Installed:
    """What is patched on one layer. It is kept on the layer itself, whichever processor objects others may put there.

    name: of the layer. before: what was there, to be put back. original: the processor that other calls are handed to.
    processor: what was installed, None where one of ours was there already. watched: of the UNet.
    """

    def __init__(self, name: str, before: Any, processor: LiteFocusAttnProcessor | None, watched: Watched) -> None:
        self.name, self.before, self.processor, self.watched = name, before, processor, watched
        inside = ours_in(before)
        self.original = before if inside is None else inside.original

    @property
    def grid_in_force(self) -> Grid | None:
        """The layer's grid under the patch in force; None without any."""
        return self.watched.grids.get(self.name)

    @property
    def grid(self) -> Grid | None:
        """The same for a call that runs, which keeps the patch of its beginning."""
        grids = self.watched.grids
        call = self.watched.call if grids and not torch.compiler.is_compiling() else None
        return (grids if call is None else call.grids).get(self.name)


def installed_on(attn: Any) -> Installed | None:
    """What the patch in force says of a layer; None where it is not patched."""
    installed: Installed | None = getattr(attn, "_litefocus", None)
    return installed


class LiteFocusAttnProcessor:
    """Runs a layer's self-attention over focus sets, and hands every other call to the processor it replaced.

    Handed on unchanged are all calls that are not plain self-attention (cross-attention, a mask), all calls of grids
    with fewer frequency bins than `config.min_freq_bins` or so small that focus sets would not be cheaper than dense
    attention (fewer than 48 keys saved), and calls whose tokens are not the grid of the UNet's call (merged tokens).

    `litefocus.patch` installs it on a whole UNet, and keeps the layer's grid on the layer: there, a processor without
    a grid of its own is one like another, and one whose patch was taken off hands on every call, whoever holds it.

    Args:
        original: the processor that was on the layer; `AttnProcessor2_0` of diffusers by default.
        layer: name of the layer in its UNet, for messages and for the layer's own samples.
        freq_bins: frequency bins F of the grid at this layer; the number of frames is tokens / F at every call. None
            for a processor that has no grid but the one that a patch gives its layer.
        config: settings, `time_window` in frames of the UNet's input.
        level: how often the grid was halved on the way from the UNet's input to this layer.
        freq_axis: "width" or "height", see `focus_set`.

    Calls take and return what diffusers' `AttnProcessor2_0` does: hidden_states (batch, tokens, channels), or
    (batch, channels, height, width).

    Raises:
        ValueError: if the tokens of a call outside of a patched UNet's are no multiple of `freq_bins`.

    Source of the protocol: `AttnProcessor2_0.__call__` in diffusers/models/attention_processor.py.

    >>> import torch
    >>> from diffusers.models.attention_processor import Attention
    >>> attn = Attention(query_dim=16, heads=2, dim_head=8)
    >>> attn.set_processor(LiteFocusAttnProcessor(attn.processor, layer="attn1", freq_bins=8))
    >>> attn(torch.randn(1, 100 * 8, 16)).shape  # 100 frames x 8 bins
    torch.Size([1, 800, 16])
    """

    def __init__(
        self,
        original: Any = None,
        *,
        layer: str = "",
        freq_bins: int | None = None,
        config: LiteFocusConfig = LiteFocusConfig(),  # noqa: B008  (immutable)
        level: int = 0,
        freq_axis: FreqAxis = "width",
    ) -> None:
        self.original = original
        self.grid = None
        if freq_bins is not None:
            self.grid = Grid(layer, freq_bins, level=level, config=config, freq_axis=freq_axis)

    def __repr__(self) -> str:
        grid = "no grid of its own" if self.grid is None else repr(self.grid)
        return f"{type(self).__name__}({grid}, original={type(self.original).__name__})"

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        # whose call is it?
        installed = installed_on(attn)
        grid = self.grid if installed is None else installed.grid
        original = self.original
        if original is None and installed is not None:
            original = installed.original
        focus = None
        if grid is not None and encoder_hidden_states is None and attention_mask is None:
            # which grid? operator.index: a plain int under torch.compile's dynamic shapes too, as the index needs one
            tokens = hidden_states.shape[1] if hidden_states.ndim == 3 else hidden_states.shape[2:].numel()
            watched = None if installed is None else installed.watched
            traced = torch.compiler.is_compiling()
            focus = focus_set_for(grid, operator.index(tokens), hidden_states.device, watched, traced)
        elif grid is not None and encoder_hidden_states is None and not torch.compiler.is_compiling():
            grid.mismatch = "its calls bring a mask"
        if focus is None:
            original = default_processor() if original is None else original
            return hand_on(original, attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)

        residual, input_shape = hidden_states, hidden_states.shape
        query, key, value = attention_inputs(attn, hidden_states, temb, original)
        hidden_states = focus_attention(query, key, value, focus)
        hidden_states = hidden_states.transpose(1, 2).flatten(2).to(query.dtype)
        del query, key, value
        hand_back(hidden_states)
        hidden_states = attn.to_out[0](hidden_states)
        hidden_states = attn.to_out[1](hidden_states)
        if len(input_shape) == 4:
            hidden_states = hidden_states.transpose(1, 2).reshape(input_shape)
        if getattr(attn, "residual_connection", False):
            hidden_states = hidden_states + residual
        rescale: float = getattr(attn, "rescale_output_factor", 1.0)
        return hidden_states / rescale


class _WithWeights(LiteFocusAttnProcessor, nn.Module):
    """The same in place of a processor that is a module: its weights stay registered, under the same names."""

    def __init__(self, original: nn.Module | None = None) -> None:
        nn.Module.__init__(self)
        # as a plain attribute: assigned, it would become a module below itself
        self.__dict__.update(original=original, grid=None)
        if original is not None:
            for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"):
                self.__dict__[name] = original.__dict__[name]

    def train(self, mode: bool = True) -> _WithWeights:
        """Set the mode of the original too."""
        if self.original is not None:
            self.original.train(mode)
        return super().train(mode)


def processor_over(original: Any) -> LiteFocusAttnProcessor:
    """A processor to install in place of `original`, on a layer that a patch gives its grid."""
    kind = _WithWeights if isinstance(original, nn.Module) else LiteFocusAttnProcessor
    try:
        theirs = inspect.signature(original.__call__).parameters.values()
    except (TypeError, ValueError):  # of a builtin
        theirs = {}.values()
    ours = inspect.signature(LiteFocusAttnProcessor.__call__).parameters
    more = tuple(x.name for x in theirs if x.name not in ours and x.kind not in VARIADIC)
    made: LiteFocusAttnProcessor = (_taking(kind, more) if more else kind)(original)
    return made


@functools.cache
def _taking(kind: Any, names: tuple[str, ...]) -> Any:
    """`kind` with further parameters: diffusers hands a processor the keywords that its signature names, no others."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = kind.__call__(self, *args, **kwargs)
        return output

    def __reduce__(self: Any) -> Any:
        return processor_over, (self.original,)  # pickle finds classes by their names

    signature = inspect.signature(kind.__call__)
    shown = [x for x in signature.parameters.values() if x.kind not in VARIADIC]
    shown += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    __call__.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return type(kind.__name__, (kind,), {"__call__": __call__, "__reduce__": __reduce__, "__module__": kind.__module__})


def default_processor() -> Any:
    """What diffusers puts on a layer by itself."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    return AttnProcessor2_0()  # type: ignore[no-untyped-call]


def hand_on(
    original: Any,
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    attention_mask: Tensor | None,
    temb: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Call another processor: by keyword, and only what was given, since some take fewer arguments."""
    output: Tensor
    if args:  # further positional arguments keep their places
        call = (hidden_states, encoder_hidden_states, attention_mask, temb, *args)
        output = original(attn, *call, **kwargs)
        return output
    given = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask, "temb": temb, **kwargs}
    output = original(attn, hidden_states, **{name: value for name, value in given.items() if value is not None})
    return output


def ours_in(thing: Any) -> LiteFocusAttnProcessor | None:
    """The processor of ours in `thing`: itself, or in a wrapper of any kind (attributes, lists, closures, partials)."""
    queue = [thing]
    seen: set[int] = set()
    while queue and len(seen) < 500:
        thing = queue.pop(0)
        if isinstance(thing, LiteFocusAttnProcessor):
            return thing
        if isinstance(thing, MethodType):  # of one of the authors' layers
            queue.append(getattr(thing.__self__, "_litefocus_processor", None))
        plain = isinstance(thing, (Tensor, str, bytes, int, float, type, type(None)))
        if plain or id(thing) in seen or hasattr(thing, "to_q") or hasattr(thing, "down_blocks"):
            continue
        seen.add(id(thing))
        if isinstance(thing, dict):
            queue += thing.values()
        elif isinstance(thing, (list, tuple, set, frozenset)):
            queue += thing
        else:
            queue += vars(thing).values() if hasattr(thing, "__dict__") else ()
            slots = (name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ()))
            names = (*slots, "__self__", "__wrapped__", "func", "args", "keywords")
            queue += (getattr(thing, name, None) for name in names)
            for cell in getattr(thing, "__closure__", None) or ():
                try:
                    queue.append(cell.cell_contents)
                except ValueError:  # an empty cell
                    continue
    return None
