"""Memory that was freed, handed back to the system.

The C library of Linux keeps what a program frees, and fits little of the next into it where tensors come in many sizes:
ten minutes of sound from a small AudioLDM 2 took 2.3 GiB on a CPU, of which 1.4 were in use. It is left alone where it
was told how much to keep, by MALLOC_TRIM_THRESHOLD_ in the environment.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

import torch
from torch import Tensor, nn

LARGE = 16 * 2**20  # bytes of a tensor; below, asking would cost more than there is to gain

_trim: Any = None
if sys.platform == "linux" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
    _trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone


def hand_back(after: Any) -> None:
    """Hand back what the work on `after` freed, if that is a large tensor on a CPU, or begins with one."""
    x = after[0] if isinstance(after, tuple) and after else after
    if _trim is None or torch.compiler.is_compiling() or not isinstance(x, Tensor):
        return
    if x.device.type == "cpu" and x.numel() * x.element_size() >= LARGE:
        _trim(0)


def hand_back_after(block: nn.Module) -> None:
    """Do so whenever `block` has run."""
    if _after_block not in block._forward_hooks.values():
        block.register_forward_hook(_after_block)


def no_longer_after(module: nn.Module) -> None:
    """Take that back; harmless on any other module. The hook is known by its function, wherever its block has gone."""
    for key in [key for key, hook in module._forward_hooks.items() if hook is _after_block]:
        del module._forward_hooks[key]


def _after_block(block: nn.Module, args: Any, output: Any) -> None:
    hand_back(output)
