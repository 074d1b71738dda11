"""Which settings are in force on a module: every handle of this library enters them, removes them and nests them here.

The settings of one kind (`patch`, `tile_decoding`, `set_duration`) are kept on the module itself, oldest first. The
newest counts. So they are copied and pickled with the module.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, ClassVar, TypeVar

H = TypeVar("H", bound="Handle")

_lock = threading.RLock()  # settings change one at a time, in whichever thread
_handles: weakref.WeakSet[Handle] = weakref.WeakSet()


class Setting:
    """What one call of `patch` or its kin asked for. Subclasses say what it does to a module.

    entered: whether a `with` block was begun with it. over: whether it was removed, for good.
    """

    kind: ClassVar[str]
    entered = over = False

    def install(self, module: Any) -> None:
        """Prepare the module for this setting, completely or, after an error, not at all."""

    def activate(self, module: Any) -> None:
        """Make this setting the one that counts on a module that was prepared."""

    def uninstall(self, module: Any) -> None:
        """Put the module back as it was."""


@dataclass(eq=False)
class _Place:
    """A setting among those of a module. replaced: what comes back below it if it is entered later."""

    setting: Any
    in_block: bool = False
    replaced: list[_Place] = field(default_factory=list)


def _places(module: Any, kind: str) -> list[_Place]:
    """Kept in the module's `__dict__`, which modules of torch and plain objects have alike."""
    places: list[_Place] = getattr(module, "__dict__", {}).get(f"_litefocus_{kind}", [])
    return places


def current(module: Any, kind: str) -> Any:
    """The setting of a kind that counts on a module; None without any."""
    places = _places(module, kind)
    return places[-1].setting if places else None


def put(module: Any, setting: Setting) -> None:
    """Make a setting count. It replaces those that were put since the innermost `with` block began."""
    with _lock:
        setting.install(module)
        places = vars(module).setdefault(f"_litefocus_{setting.kind}", [])
        begin = 1 + max((i for i, place in enumerate(places) if place.in_block), default=-1)
        replaced = [old for place in places[begin:] for old in (*place.replaced, place)]
        # those that a block may still be begun with, and the newest, which counted until now
        pending = {handle._setting for handle in _handles if not handle._setting.entered}
        newest = replaced[-1:]
        replaced = [_Place(old.setting) for old in replaced if old.setting in pending or old in newest]
        places[begin:] = [_Place(setting, replaced=replaced)]
        setting.activate(module)


def clear(module: Any, kind: str) -> None:
    """Remove every setting of a kind, also those of blocks that still run. Harmless without any."""
    with _lock:
        for handle in list(_handles):
            if any(reference() is module for reference in handle._modules) and handle._setting.kind == kind:
                handle._setting.over = True
        _keep(module, kind, [])


def _keep(module: Any, kind: str, kept: list[_Place]) -> None:
    places = _places(module, kind)
    if not places:
        return
    last = places[-1].setting
    places[:] = kept
    if places:
        places[-1].setting.activate(module)
    else:
        del vars(module)[f"_litefocus_{kind}"]
        last.uninstall(module)


class Handle:
    """Of a setting on one or more modules, in the manner of `torch.utils.hooks.RemovableHandle`. Keeps none alive."""

    _name: ClassVar[str]  # of the function that made it

    def __init__(self, setting: Setting, *modules: Any) -> None:
        self._setting = setting
        self._modules = tuple(weakref.ref(module) for module in modules)
        for module in modules:
            put(module, setting)
        _handles.add(self)

    def _in_place(self) -> list[Any]:
        """The modules where the setting still stands."""
        modules = (reference() for reference in self._modules)
        kind = self._setting.kind
        return [m for m in modules if m is not None and self._setting in (x.setting for x in _places(m, kind))]

    def remove(self) -> None:
        """Take this one off, wherever it stands. The newest that is left counts."""
        with _lock:
            self._setting.over = True
            for module in self._in_place():
                places = _places(module, self._setting.kind)
                _keep(module, self._setting.kind, [place for place in places if place.setting is not self._setting])

    def __enter__(self: H) -> H:
        """Begin a block, once. Raises RuntimeError if the setting was removed, or entered before."""
        with _lock:
            modules = [module for module in (reference() for reference in self._modules) if module is not None]
            if self._setting.over or self._setting.entered or not modules:
                raise RuntimeError(
                    f"this {self._name} was taken off, or was entered before; make another: "
                    f"with litefocus.{self._name}(...)"
                )
            for module in modules:
                self._setting.install(module)
                places = vars(module).setdefault(f"_litefocus_{self._setting.kind}", [])
                below: list[_Place] = []
                for place in places:  # what it had replaced comes back below it, and counts when the block has ended
                    back = [old for old in place.replaced if not (old.setting.entered or old.setting.over)]
                    below += back if place.setting is self._setting else [place]
                places[:] = [*below, _Place(self._setting, in_block=True)]
                self._setting.activate(module)
            self._setting.entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the block, with what was put inside of it. A newer block that still runs keeps its own setting."""
        with _lock:
            self._setting.over = True
            for module in self._in_place():
                places = _places(module, self._setting.kind)
                first = next(i for i, place in enumerate(places) if place.setting is self._setting)
                last = first + 1
                while last < len(places) and not places[last].in_block:
                    last += 1
                _keep(module, self._setting.kind, places[:first] + places[last:])

    def __reduce__(self) -> str:
        raise TypeError(
            f"the handle that {self._name} returned belongs to this process and cannot be copied or pickled; what it "
            "was called on can be, and litefocus.status(pipe)"
        )
