"""What a call does with tensors: how much memory it takes, and whether it reads their values."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors allocated inside in all (`total`), and how many live at once (`peak`)."""

    live = peak = total = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        outputs = func(*args, **(kwargs or {}))
        for x in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in inputs:
                storage = x.untyped_storage()
                self.live += storage.nbytes()
                self.total += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage.nbytes())
        return outputs

    def _free(self, size: int) -> None:
        self.live -= size


class NoReading(TorchDispatchMode):
    """Fails where a tensor's value becomes a number of Python, for which a GPU would be waited."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func)
        return func(*args, **(kwargs or {}))
