"""What stands around a function, a method or a processor, and remembers how it was called."""

from __future__ import annotations

from typing import Any


class Recorder:
    """calls: (positional arguments, keywords) of every call."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.inner(*args, **kwargs)


def record(owner: Any, name: str) -> Recorder:
    """Put a recorder around a method of one object."""
    recorder = Recorder(getattr(owner, name))
    setattr(owner, name, recorder)
    return recorder


def frames_of(recorder: Recorder) -> list[int]:
    """Frames of the first argument of every call: a latent or a spectrogram, time on the last axis but one."""
    return [args[0].shape[-2] for args, _ in recorder.calls]
