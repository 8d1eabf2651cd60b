#!/usr/bin/env python3
"""Draw a figure of the paper from runs.csv, as PNG and SVG, with the authors' results as thin lines beneath."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from experiments import (
    EVALUATE_EVERY,
    FIGURES,
    Figure,
    Result,
    group_by_point,
    read_authors,
    read_authors_curves,
    read_results,
)

# Colours of different lightness, and markers and dashes besides, so that print in grey can be read.
STYLES = {
    "softmax": ("softmax", "#000000", "o", "-"),
    "elu_sum": ("ELU+1 (linear)", "#d55e00", "s", "--"),
    "favor64_sum": ("FAVOR+, m = 64", "#b8a9d9", "v", ":"),
    "favor128_sum": ("FAVOR+, m = 128", "#8a63c2", "<", ":"),
    "favor512_sum": ("FAVOR+, m = 512", "#4b0082", "^", ":"),
    "dpfp1_sum": ("DPFP-1", "#7fc8f8", "D", "-"),
    "dpfp2_sum": ("DPFP-2", "#2f8fce", "P", "-"),
    "dpfp3_sum": ("DPFP-3", "#0b3c6f", "X", "-"),
    "elu_delta": ("ELU+1, delta", "#d55e00", "s", "--"),
    "favor64_delta": ("FAVOR+, m = 64, delta", "#b8a9d9", "v", ":"),
    "favor128_delta": ("FAVOR+, m = 128, delta", "#8a63c2", "<", ":"),
    "dpfp1_delta": ("DPFP-1, delta", "#2f8fce", "o", "-"),
    "dpfp2_delta": ("DPFP-2, delta", "#0b3c6f", "P", "-"),
    "dpfp1_fwm": ("DPFP-1, FWM", "#3a9e5c", "^", "-."),
    "tanh_fwm": ("tanh, FWM", "#1c5c34", "v", "-."),
}
BY_RULE = {"dpfp1_sum": "DPFP-1, sum"}  # its name where other rules are beside it

Points = dict[tuple[str, bool, int], list[Result]]


def draw(name: str, folder: Path) -> bool:
    """Write NAME.png and NAME.svg into the folder; False if no run of the figure is done."""
    import matplotlib

    matplotlib.use("Agg")
    # The same input gives the same SVG, with text as text.
    matplotlib.rcParams.update({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 10})
    import matplotlib.pyplot as plt

    figure, points = FIGURES[name], dict(group_by_point(read_results(folder)))
    panel, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    drawn = (draw_losses if len(figure.sizes) > 1 else draw_curves)(axes, name, figure, points)
    if drawn:
        axes.grid(alpha=0.3)
        axes.plot([], [], color="0.3", linewidth=0.8, label="thin: the authors' logs")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        for suffix, options in (".png", {"dpi": 150}), (".svg", {"metadata": {"Date": None}}):
            temporary = folder / f"{name}.new{suffix}"
            panel.savefig(temporary, **options)
            os.replace(temporary, folder / f"{name}{suffix}")
    plt.close(panel)
    return drawn


def draw_losses(axes: Any, name: str, figure: Figure, points: Points) -> bool:
    """Best evaluation loss against the number of keys: figures 2 and 5."""
    authors = read_authors()
    drawn = False
    for model in figure.models:
        label, colour, marker, dashes = STYLES[model]
        label = BY_RULE.get(model, label) if figure.with_replacement else label
        theirs = [(at[2], loss) for at, (loss, _) in authors.items() if at[:2] == (model, figure.with_replacement)]
        axes.plot(*zip(*theirs), color=colour, linestyle=dashes, linewidth=0.8, zorder=1)
        ours = [
            (at[2], sum(result.best for result in results) / len(results))
            for at, results in points.items()
            if at[:2] == (model, figure.with_replacement)
        ]
        if ours:
            drawn = True
            style = {"color": colour, "linestyle": dashes, "marker": marker, "markersize": 5, "linewidth": 2}
            axes.plot(*zip(*ours), **style, zorder=2, label=label)
    axes.set_xlabel("number of unique keys S")
    axes.set_ylabel("best evaluation loss, ½ ‖v* − v̂‖²")
    axes.set_ylim(-0.015, 0.62)
    axes.set_xlim(0, figure.sizes[-1] + figure.sizes[0])
    setting = "setting 2, L = 2 S pairs with replacement" if figure.with_replacement else "setting 1, L = S pairs"
    axes.set_title(f"{name.replace('figure', 'Figure ')}: {setting}")
    return drawn


def draw_curves(axes: Any, name: str, figure: Figure, points: Points) -> bool:
    """Evaluation loss against training steps, mean and standard deviation over seeds: figures 3 and 4."""
    curves = read_authors_curves()
    sizes = sorted({key[2] for key in points if key[0] in figure.models and key[1] == figure.with_replacement})
    size = figure.sizes[0] if figure.sizes[0] in sizes else max(sizes, default=figure.sizes[0])
    drawn, longest = False, 0
    for model in figure.models:
        label, colour, _, dashes = STYLES[model]
        label = BY_RULE.get(model, label) if figure.with_replacement else label
        theirs = curves.get((model, figure.with_replacement, size), ())
        axes.plot(steps_of(theirs), theirs, color=colour, linestyle=dashes, linewidth=0.8, zorder=1)
        results = points.get((model, figure.with_replacement, size))
        if not results:
            continue
        drawn = True
        # A training that has ended keeps its last loss.
        length = max(len(result.curve) for result in results)
        longest = max(longest, length)
        columns = list(zip(*(result.curve + result.curve[-1:] * (length - len(result.curve)) for result in results)))
        means = [sum(column) / len(column) for column in columns]
        spreads = [(sum((x - mean) ** 2 for x in column) / len(column)) ** 0.5 for column, mean in zip(columns, means)]
        axes.plot(steps_of(means), means, color=colour, linestyle=dashes, linewidth=2, zorder=2, label=label)
        if len(results) > 1:
            low = [max(mean - spread, 1e-6) for mean, spread in zip(means, spreads)]
            high = [mean + spread for mean, spread in zip(means, spreads)]
            axes.fill_between(steps_of(means), low, high, color=colour, alpha=0.25, linewidth=0, zorder=1)
    axes.set_xlabel("training steps")
    axes.set_ylabel("evaluation loss, ½ ‖v* − v̂‖²")
    if figure.with_replacement:
        axes.set_yscale("log")
        axes.set_xscale("log")
    else:
        axes.set_ylim(-0.015, 0.62)
    setting = f"setting {1 + figure.with_replacement}, S = {size}"
    seeds = f", mean and standard deviation over {len(figure.seeds)} seeds" if len(figure.seeds) > 1 else ""
    axes.set_title(f"{name.replace('figure', 'Figure ')}: {setting}{seeds}")
    return drawn


def steps_of(curve: Any) -> list[int]:
    return [EVALUATE_EVERY * (index + 1) for index in range(len(curve))]


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "figures", nargs="*", metavar="FIGURE", help=f"{', '.join(FIGURES)} (default: all with results)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder with runs.csv")
    options = parser.parse_args()
    for name in options.figures:
        if name not in FIGURES:
            parser.exit(2, f"draw.py: there is no {name}, allowed are {', '.join(FIGURES)}.\n")
    for name in options.figures or FIGURES:
        if draw(name, options.output):
            print(f"{options.output / name}.png, {name}.svg")
        elif options.figures:
            print(f"draw.py: no run of {name} is done in {options.output}.", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
