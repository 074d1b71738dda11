"""What torch.compile reads from functions and tensors, and the trace that it is in, by private names of torch.

The public functions for the same load the whole compiler, which takes 2 s; `import litefocus` must not pay that.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, _guards, compiler

Function = TypeVar("Function", bound=Callable[..., object])


def assume_constant_result(function: Function) -> Function:
    """As `torch.compiler.assume_constant_result`: the compiler calls `function` once and keeps what it returned."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def current_trace() -> object:
    """The running trace of torch.compile; None outside of one, in an exporter's, and in torch too old to tell them."""
    return None if getattr(compiler, "is_exporting", lambda: True)() else _guards.CompileContext.try_get()


def not_compiled(function: Function) -> Function:
    """Keeps `function` out of compiled code, as `torch.compiler.disable` does.

    That loads the compiler, so it is put off until something else has loaded it.
    """
    disabled: Any = None

    @functools.wraps(function)
    def uncompiled(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if disabled is None and "torch._dynamo" in sys.modules:
            disabled = compiler.disable(function)  # type: ignore[no-untyped-call]
        return (disabled or function)(*args, **kwargs)

    uncompiled._torchdynamo_disable = True  # type: ignore[attr-defined]  # which alone would have `function` compiled
    return uncompiled  # type: ignore[return-value]


def mark_static(tensor: Tensor) -> None:
    """As `torch._dynamo.mark_static(tensor)`: no dimension of `tensor` gets a symbolic size, nor guards for one."""
    tensor._dynamo_static_indices = set(range(tensor.ndim))  # type: ignore[attr-defined]
    tensor._has_dynamo_dim_marking = True  # type: ignore[attr-defined]  # in newer torch alone
