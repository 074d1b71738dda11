"""Tables for people, as text and as HTML."""

from __future__ import annotations

import html


def as_text(summary: list[str], table: list[tuple[str, ...]]) -> str:
    """Lines of summary, then a table in columns; its first row is the header."""
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table)
    return "\n".join([*summary, *(line.rstrip() for line in lines)])


def as_html(summary: list[str], table: list[tuple[str, ...]]) -> str:
    """The same for notebooks."""

    def row(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    header, *rows = table
    top = "<br>".join(html.escape(line) for line in summary)
    return f"<p>{top}</p><table>{row(header, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"
