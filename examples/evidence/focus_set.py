"""Draw a focus set, from `litefocus.focus_set` itself: focus_set.png, the picture at the top of the README.

python examples/evidence/focus_set.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

FRAMES, BINS, FRAME, BIN = 500, 8, 210, 4  # the grid, and the query: 40 s at the level with 8 bins


def draw(path: Path) -> None:
    """Two grids: a clip without a time window, and one with a window that is shorter than the clip."""
    import matplotlib
    import matplotlib.pyplot as plt
    import numpy as np
    from plots import BLUE, GREEN, ORANGE

    from litefocus import LiteFocusConfig, focus_set

    matplotlib.use("Agg")
    figure, axes = plt.subplots(2, 1, figsize=(9, 3.4), sharex=True, layout="constrained")
    whole = LiteFocusConfig(time_window=None)
    window = LiteFocusConfig(time_window=128)
    titles = (
        "without a time window: own bin, sample of the others",
        "with one: the same inside of it, sample of the rest",
    )
    for axis, config, title in zip(axes, (whole, window), titles, strict=True):
        focus = focus_set(FRAMES, BINS, config)
        group = int(focus.inverse[FRAME * BINS + BIN]) // focus.queries.shape[1]
        keys = focus.keys[group].numpy()
        frames, bins = keys // BINS, keys % BINS
        own = focus.log_weights.numpy() == 0
        inside = (frames >= frames[own].min()) & (frames <= frames[own].max())
        colours = np.where(own, BLUE, np.where(inside, ORANGE, GREEN))
        axis.scatter(frames, bins, s=9, c=colours, marker="s", linewidths=0)
        axis.scatter([FRAME], [BIN], s=40, c="black", marker="s")
        share = len(keys) / (FRAMES * BINS)
        axis.set_title(f"{title} ({share:.0%} of the keys)", fontsize=9, loc="left")
        axis.set(ylim=(-0.7, BINS - 0.3), xlim=(-2, FRAMES + 1), yticks=range(BINS), ylabel="frequency bin")
        axis.tick_params(labelsize=8)
    axes[1].set_xlabel("time frame")
    handles = [plt.Line2D([], [], color=c, marker="s", ls="", ms=5) for c in ("black", BLUE, ORANGE, GREEN)]
    names = ("query", "own bin, weight 1", "sample, weight 1 / probability", "rest of the clip, weight 1 / probability")
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    draw(Path(__file__).parent / "focus_set.png")


if __name__ == "__main__":
    main()
