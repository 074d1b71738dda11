"""The settings of a module: those that `patch`, `tile_decoding`, `schedule_prompts` and `set_duration` have made.

They are kept in the module's `__dict__`, by kind, oldest first, so they are copied and pickled with it. The newest of a
kind is in force. The first three functions return a handle, which removes what it has added.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, ClassVar, TypeVar

H = TypeVar("H", bound="Handle")

_lock = threading.RLock()  # settings change one at a time, in whichever thread
_handles: weakref.WeakSet[Handle] = weakref.WeakSet()


class Setting:
    """Arguments of one call of `patch` or of another such function, and what they do to a module.

    entered: a `with` block began with it. removed: for good. owner: only settings of the same one replace each other.
    """

    kind: ClassVar[str]
    entered = removed = False
    owner: int | None = None

    def install(self, module: Any) -> None:
        """Prepare the module for this setting, completely or, after an error, not at all."""

    def activate(self, module: Any) -> None:
        """Put this setting in force on a module that was prepared."""

    def uninstall(self, module: Any) -> None:
        """Put the module back as it was."""


def settings_on(module: Any, kind: str) -> list[Any]:
    """The settings of a kind, the newest last."""
    settings: list[Any] = getattr(module, "__dict__", {}).get(f"_litefocus_{kind}", [])
    return settings


def current(module: Any, kind: str) -> Any:
    """The setting of a kind that is in force on a module; None without any."""
    return next(reversed(settings_on(module, kind)), None)


def put(module: Any, setting: Setting) -> None:
    """Put a setting in force, as the newest."""
    with _lock:
        setting.install(module)
        settings = settings_on(module, setting.kind)
        # Nobody can remove a setting whose handle was garbage-collected. Of several such in the innermost block, only
        # the newest could ever be in force again, so the older ones are dropped.
        held = {handle._setting for handle in _handles}
        begin = 1 + max((i for i, old in enumerate(settings) if old.entered), default=-1)
        forgotten = [old for old in settings[begin:] if old not in held and old.owner == setting.owner]
        kept = [old for old in settings if old is not setting and old not in forgotten[:-1]]
        vars(module)[f"_litefocus_{setting.kind}"] = [*kept, setting]
        setting.activate(module)


def clear(module: Any, kind: str) -> None:
    """Remove every setting of a kind, also those of blocks that still run. Harmless without any."""
    with _lock:
        for handle in list(_handles):
            if handle._setting.kind == kind and any(reference() is module for reference in handle._modules):
                handle._setting.removed = True
        _keep(module, kind, [])


def _keep(module: Any, kind: str, kept: list[Any]) -> None:
    if kept:
        vars(module)[f"_litefocus_{kind}"] = kept
        kept[-1].activate(module)
    elif (last := current(module, kind)) is not None:
        del vars(module)[f"_litefocus_{kind}"]
        last.uninstall(module)


class Wrapper:
    """Stands for a method of one object, in whose `__dict__` it is kept. `wrap` notes it in `_litefocus_wrappers`."""

    kind: ClassVar[str]  # of the settings that it serves; an object may have wrappers of several

    def __init__(self, owner: Any, method: str) -> None:
        self.owner, self.method = owner, method
        self.original = vars(owner).get(method)  # None: the method of the class

    @property
    def acts(self) -> bool:
        """Whether this is the method's wrapper now, in its place or inside of what others have wrapped it in."""
        return vars(self.owner).get("_litefocus_wrappers", {}).get(self.method) is self

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method itself."""
        if self.original is not None:
            return self.original(*args, **kwargs)
        return getattr(type(self.owner), self.method)(self.owner, *args, **kwargs)


def wrap(owner: Any, method: str, make: Callable[[Any, str], Wrapper]) -> None:
    """Wrap a method, around whatever wraps it already; a wrapper that is in its place acts again."""
    here = vars(owner).get(method)
    wrapper = here if isinstance(here, Wrapper) and here.owner is owner else make(owner, method)
    vars(owner)["_litefocus_wrappers"] = {**vars(owner).get("_litefocus_wrappers", {}), method: wrapper}
    vars(owner)[method] = wrapper


def _wrappers(owner: Any, kind: str) -> dict[str, Wrapper]:
    """That act on an object, of one kind."""
    every = vars(owner).get("_litefocus_wrappers", {})
    return {method: wrapper for method, wrapper in every.items() if wrapper.kind == kind}


def unwrap(owner: Any, kind: str) -> None:
    """Put back every method of a kind. A wrapper that something else has wrapped since stays, and only calls it."""
    ours = _wrappers(owner, kind)
    others = {method: x for method, x in vars(owner).pop("_litefocus_wrappers", {}).items() if method not in ours}
    if others:
        vars(owner)["_litefocus_wrappers"] = others
    for method, wrapper in ours.items():
        if vars(owner).get(method) is wrapper:
            del vars(owner)[method]
            if wrapper.original is not None:
                vars(owner)[method] = wrapper.original


def all_wrapped(owner: Any, kind: str) -> bool:
    """Whether nothing has deleted a wrapper since, or put back the class' method, as hooks do that are removed."""
    for method in _wrappers(owner, kind):
        here = vars(owner).get(method)
        if here is None or getattr(here, "__func__", here) is getattr(type(owner), method, None):
            return False
    return True


class Handle:
    """Of a setting on one or more modules, in the manner of `torch.utils.hooks.RemovableHandle`. Keeps none alive.

    owner: class name of what the setting was made for. Its repr shows the setting, and whether it is in force.
    """

    _name: ClassVar[str]  # of the function that made it

    def __init__(self, owner: str, setting: Setting, *modules: Any) -> None:
        self._owner, self._setting = owner, setting
        self._modules = tuple(weakref.ref(module) for module in modules)
        with _lock:
            for module in modules:
                put(module, setting)
            _handles.add(self)

    def __repr__(self) -> str:
        counts = any(current(module, self._setting.kind) is self._setting for module in self._alive())
        state = "in force" if counts else "not in force"
        return f"<{type(self).__name__} of {self._owner}: {self._setting}, {state}>"

    def _alive(self) -> list[Any]:
        return [module for module in (reference() for reference in self._modules) if module is not None]

    def remove(self) -> None:
        """Remove this setting, even if it is not the newest. The newest that is left is then in force.

        If it began a `with` block, the settings that were made in the block go too, up to the next block that began.
        """
        with _lock:
            self._setting.removed = True
            for module in self._alive():
                settings = settings_on(module, self._setting.kind)
                if self._setting in settings:
                    first = settings.index(self._setting)
                    after = settings[first + 1 :]
                    own = [other for other in after if other.owner == self._setting.owner]
                    inside = list(itertools.takewhile(lambda other: not other.entered, own))
                    kept = [other for other in after if not (self._setting.entered and other in inside)]
                    _keep(module, self._setting.kind, settings[:first] + kept)

    def __enter__(self: H) -> H:
        """Begin a block, once; this setting is then the newest.

        Raises RuntimeError if it was removed or entered before, or if its pipeline is gone.
        """
        with _lock:
            modules = self._alive()
            if self._setting.removed or self._setting.entered or not modules:
                raise RuntimeError(
                    f"this {self._name} was taken off, or was entered before; make another: "
                    f"with litefocus.{self._name}(...)"
                )
            for module in modules:
                put(module, self._setting)
            self._setting.entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the block."""
        self.remove()

    def __reduce__(self) -> str:
        raise TypeError(
            f"the handle that {self._name} returned belongs to this process and cannot be copied or pickled; what it "
            "was called on can be, and litefocus.status(pipe)"
        )
