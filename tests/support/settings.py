"""What a `Grid` is handed in: the number of samples, and the least saving that pays."""

from __future__ import annotations

import pytest
from torch import nn

from litefocus._grid import Grid


def hand_in(monkeypatch: pytest.MonkeyPatch, **values: int) -> None:
    """Change its defaults until the test, or the block of `monkeypatch`, ends."""
    for name, value in values.items():
        monkeypatch.setitem(Grid.__init__.__kwdefaults__, name, value)


def one_sample(model: nn.Module) -> None:
    """Make every focused layer use its first sample at every step, as exported code does."""
    for module in model.modules():
        layer = vars(module).get("_litefocus")
        for grid in (layer and layer.grid, getattr(getattr(module, "processor", None), "grid", None)):
            if grid:
                grid.num_samples = 1
                grid._built.clear()
