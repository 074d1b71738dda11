"""What the plots share: colours that the colour-blind tell apart, and names beside lines and points, not in legends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

# Okabe and Ito 2008; their yellow is left out, as letters in it cannot be read on white
BLACK, BLUE, VERMILLION, GREEN = "#000000", "#0072B2", "#D55E00", "#009E73"
PURPLE, ORANGE, SKY = "#CC79A7", "#E69F00", "#56B4E9"
OTHERS = (ORANGE, SKY, "#7F7F7F")
MARKERS = "Xv<>ph8"
STYLES = {  # the same in every plot
    "dense": (BLACK, "o"),
    "litefocus": (BLUE, "s"),
    "paper": (VERMILLION, "^"),
    "time tiles": (GREEN, "D"),
    "token merging": (PURPLE, "P"),
}


def styles(methods: Iterable[str]) -> dict[str, tuple[str, str]]:
    """(colour, marker) of every method: its own for those of STYLES, one after the other for the rest."""
    rest = [method for method in methods if method not in STYLES]
    given = {method: (OTHERS[i % len(OTHERS)], MARKERS[i % len(MARKERS)]) for i, method in enumerate(rest)}
    return {method: STYLES.get(method) or given[method] for method in methods}


def panels(columns: int, rows: int = 1, *, width: float = 5.0, height: float = 4.0) -> tuple[Figure, list[Any]]:
    """A figure of panels that needs no display, and its axes row by row; width and height of a panel in inches."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    every = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    return figure, every


def log_axis(axes: Any, which: str, ticks: Iterable[float]) -> None:
    """Make axis "x" or "y" logarithmic, with these ticks alone, written out in full."""
    axes.set(**{f"{which}scale": "log"})
    axis = {"x": axes.xaxis, "y": axes.yaxis}[which]
    axis.set_major_locator(FixedLocator(sorted(ticks)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def label_points(
    axes: Any,
    points: Mapping[str, tuple[float, float]],
    colours: Mapping[str, str],
    others: Iterable[tuple[float, float]] = (),
    size: float = 9,
) -> None:
    """The name of every point (x, y) beside it, at the first of a few places where it covers no other name or point.

    others: points without names.
    """
    axes.figure.draw_without_rendering()
    renderer = axes.figure.canvas.get_renderer()
    marks = [axes.transData.transform(point) for point in (*points.values(), *others)]
    taken: list[Any] = []
    places = [(angle, distance) for distance in (9, 18, 30, 45) for angle in (0, 180, 90, 270, 45, 315, 135, 225)]
    for name, point in points.items():
        for angle, distance in places:
            x, y = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            text = axes.annotate(
                name,
                point,
                xytext=(distance * x, distance * y),
                textcoords="offset points",
                ha="left" if x > 0.1 else "right" if x < -0.1 else "center",
                va="bottom" if y > 0.1 else "top" if y < -0.1 else "center",
                color=colours[name],
                fontsize=size,
                annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": colours[name], "linewidth": 0.5} if distance > 9 else None,
            )
            box = text.get_window_extent(renderer)
            inside = axes.bbox.x0 <= box.x0 and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
            around = box.padded(size / 2)
            free = not any(box.overlaps(other) for other in taken) and not any(around.contains(*x) for x in marks)
            if (inside and free) or (angle, distance) == places[-1]:
                taken.append(box)
                break
            text.remove()


def save(figure: Figure, path: Path) -> None:
    """As a PNG that can be read at half its size."""
    figure.savefig(path, dpi=110)
