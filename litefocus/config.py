"""What a user may choose about the method. Every field is checked when it is set."""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict, TypeVar

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., object])


def suggestion(got: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' for the nearest known name, or nothing where none is near."""
    near = difflib.get_close_matches(got, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def refuse_unknown(owner: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise TypeError for the first of `names` that is not `known`, with the nearest known one."""
    known = list(known)
    for name in names:
        if name not in known:
            hint = suggestion(name, known)
            raise TypeError(f"{owner} has no option {name!r}.{hint} Options: {', '.join(known)}")


def positive_integer(name: str, value: Any, minimum: int = 1) -> int:
    """`value` as an int, or a clear error. NumPy integers pass, booleans and floats do not."""
    if not isinstance(value, bool):
        try:
            number = operator.index(value)
        except TypeError:
            pass
        else:
            if number < minimum:
                raise ValueError(f"{name} must be an integer of at least {minimum}, got {number}")
            return number
    raise TypeError(f"{name} must be an integer of at least {minimum}, got {value!r} ({type(value).__name__})")


def _refuse_unknown_fields(cls: type[T]) -> type[T]:
    """Make a dataclass name the nearest field where a keyword is misspelled."""
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self: Any, **values: Any) -> None:
        refuse_unknown(cls.__name__, values, (field.name for field in fields(cls)))  # type: ignore[arg-type]
        init(self, **values)

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


@_refuse_unknown_fields
@dataclass(frozen=True, kw_only=True)
class LiteFocusConfig:
    """Settings of LiteFocus attention (arXiv 2407.10468). Immutable; derive others with `dataclasses.replace`.

    The defaults fit every length: up to 15 seconds the paper's focus sets with weighted samples, beyond that a time
    window with a weighted sample of the rest of the clip. `LiteFocusConfig.paper()` is the method as published.

    Args:
        same_frequency: every query attends to all tokens of its own frequency bin (the paper's same-frequency focus).
        cross_frequency: every query also attends to a random sample of all other bins (cross-frequency compensation).
        sparse_ratio: fraction of each other bin's frames in that sample, in [0, 1]. At 1 the result is dense attention
            (unless a time window is in force); at 0 there is no sample.
        min_sampled: the least number of frames sampled of every other bin, at every level alike (all, where there are
            fewer). The error of a sample depends on its size, not on its share of the clip.
        reweight: weigh sampled keys by the inverse of their sampling probability. False, as published, overweights the
            own bin.
        time_window: length in latent frames, half before and half after a query, of the window in which it attends to
            all of its own bin and to the sample of the others; None for the whole clip. Counted at the UNet's input (25
            frames a second in AudioLDM-style models), halved at every level, clamped at the ends of the clip. A block
            of queries shares one window, which is wider: 384 frames for 256. Clips up to that length (15 s, at the
            levels of 4 and 2 bins 20 and 31 s) have no window. With a window, cost grows linearly with the clip.
        far_sampled: frames sampled outside of the time window, of every bin (of the own alone, if others are not
            sampled), at every level alike. At 0 a query attends to nothing there.
        min_freq_bins: layers whose grid has fewer frequency bins than this keep dense attention.
        seed: of the samples, an integer >= 0. Equal settings, layer name, grid and timestep give equal samples, for
            every batch element, in every process, on every device.

    Raises:
        TypeError: for an unknown field or a value of the wrong type.
        ValueError: for a value out of range and for settings that leave a query nothing to attend to.

    >>> LiteFocusConfig(sparse_ratio=0.05).sparse_ratio
    0.05
    >>> LiteFocusConfig(sparse_ration=0.05)
    Traceback (most recent call last):
        ...
    TypeError: LiteFocusConfig has no option 'sparse_ration'. Did you mean 'sparse_ratio'? Options: ...
    """

    same_frequency: bool = True
    cross_frequency: bool = True
    # In windows of up to 320 frames (all but those of Tango's first level), `min_sampled` rules: 16 frames in them and
    # 16 outside make focus sets of a multiple of 16 keys. On a CPU fused attention takes no longer over 432 keys than
    # over 424, and a tenth longer over 453.
    sparse_ratio: float = 0.05
    min_sampled: int = 16
    reweight: bool = True
    time_window: int | None = 256
    far_sampled: int = 16
    min_freq_bins: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("same_frequency", "cross_frequency", "reweight"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__})")
        ratio = self.sparse_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, numbers.Real):
            raise TypeError(f"sparse_ratio must be a number in [0, 1], got {ratio!r} ({type(ratio).__name__})")
        if not 0 <= ratio <= 1:  # false for nan too
            raise ValueError(f"sparse_ratio must be a finite number in [0, 1], got {ratio!r}")
        set_field = functools.partial(object.__setattr__, self)  # frozen: plain assignment is refused
        set_field("sparse_ratio", float(ratio))
        for name, minimum in (("min_sampled", 0), ("far_sampled", 0), ("min_freq_bins", 1), ("seed", 0)):
            set_field(name, positive_integer(name, getattr(self, name), minimum))
        if self.time_window is not None:
            set_field("time_window", positive_integer("time_window", self.time_window))
        if not self.same_frequency and not self.cross_frequency:
            raise ValueError(
                "same_frequency and cross_frequency are both False, which leaves nothing to attend to; "
                "set at least one of them to True"
            )
        if not self.same_frequency and self.sparse_ratio == 0:
            raise ValueError(
                "same_frequency=False with sparse_ratio=0.0 leaves nothing to attend to; "
                "set sparse_ratio above 0 or same_frequency=True"
            )

    @classmethod
    def paper(cls, **changes: Any) -> LiteFocusConfig:
        """The settings as published: no key weights, minimum sample or time window, only layers of at least 8 bins.

        The sample is stratified by bin and time; the published code draws from all tokens at once.

        `changes`: fields of `LiteFocusConfig` that replace these values.

        Source: arXiv 2407.10468, section 3, and the settings of its published code for AudioLDM 2.

        >>> LiteFocusConfig.paper(seed=3).reweight
        False
        """
        published = {
            "sparse_ratio": 0.1,
            "min_sampled": 0,
            "reweight": False,
            "time_window": None,
            "far_sampled": 0,
            "min_freq_bins": 8,
        }
        return cls(**{**published, **changes})


def checked_config(config: Any) -> LiteFocusConfig:
    """Return `config`. Raises TypeError if it is no `LiteFocusConfig`."""
    if not isinstance(config, LiteFocusConfig):
        raise TypeError(
            f"config must be a LiteFocusConfig, got {type(config).__name__}; pass LiteFocusConfig(...), or its fields "
            "as keywords: litefocus.patch(pipe, sparse_ratio=0.1)"
        )
    return config


class ConfigOptions(TypedDict, total=False):
    """The fields of `LiteFocusConfig` as keywords, for type checkers."""

    same_frequency: bool
    cross_frequency: bool
    sparse_ratio: float
    min_sampled: int
    reweight: bool
    time_window: int | None
    far_sampled: int
    min_freq_bins: int
    seed: int


def shows_options(function: F) -> F:
    """Let `help` and completion show the fields of `LiteFocusConfig`, with types and defaults, for `**options`."""
    signature = inspect.signature(function)
    named = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(LiteFocusConfig)
    ]
    function.__signature__ = signature.replace(parameters=[*named, *options])  # type: ignore[attr-defined]
    return function


def merged_config(owner: str, config: LiteFocusConfig | None, overrides: Mapping[str, Any]) -> LiteFocusConfig:
    """`config`, or the defaults, with fields replaced. Raises TypeError in the name of `owner`."""
    options = [field.name for field in fields(LiteFocusConfig)]
    refuse_unknown(owner, overrides, [*options, "freq_bins", "freq_axis"])
    return replace(LiteFocusConfig() if config is None else checked_config(config), **overrides)
