"""What prints as a few lines and a table, in terminals and in notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any


class Table:
    """Shown by its `_summary` and its `_table`, whose first row is the header."""

    def _summary(self) -> list[str]:
        return []

    def _table(self) -> list[tuple[str, ...]]:
        return [()]

    def __repr__(self) -> str:
        table = self._table()
        widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table)
        return "\n".join([*self._summary(), *(line.rstrip() for line in lines)])

    def _repr_html_(self) -> str:
        def row(cells: tuple[str, ...], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        header, *rows = self._table()
        top = "<br>".join(html.escape(line) for line in self._summary())
        return f"<p>{top}</p><table>{row(header, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"


def by_freq_bins(layers: Iterable[Any]) -> dict[int | None, list[Any]]:
    """Rows of layers by their frequency bins, in the order of the first of each."""
    levels: dict[int | None, list[Any]] = {}
    for layer in layers:
        levels.setdefault(layer.freq_bins, []).append(layer)
    return levels
