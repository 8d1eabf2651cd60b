#!/usr/bin/env python3
"""Collect the accuracies of run.sh and draw them: draw.py OUTPUT writes OUTPUT/results.csv and state_tracking.png."""

from __future__ import annotations

import csv
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path

# (group, model) -> length -> accuracies of the seeds, in per cent.
Results = dict[tuple[str, str], dict[int, list[float]]]


def collect(output: Path) -> Results:
    found: Results = defaultdict(lambda: defaultdict(list))
    for log in sorted(output.glob("runs/*/*/seed*/train.log")):
        name = (log.parent / "name").read_text().strip()
        text = log.read_text("utf-8", errors="replace")
        # The last evaluation counts.
        last = dict(re.findall(r"valid on 'length_(\d+)' subset .*? accuracy ([\d.]+)", text))
        for length, accuracy in last.items():
            found[log.parts[-4], name][int(length)].append(float(accuracy))
    return found


def draw(results: Results, file: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    groups = list(dict.fromkeys(group for group, _ in results))
    figure, axes = plt.subplots(1, len(groups), figsize=(5 * len(groups), 3.6), squeeze=False, layout="constrained")
    for place, group in zip(axes[0], groups):
        for (other, name), by_length in results.items():
            if other == group:
                lengths = sorted(by_length)
                means = [statistics.mean(by_length[length]) for length in lengths]
                spread = [statistics.pstdev(by_length[length]) for length in lengths]
                place.errorbar(lengths, means, spread, marker="o", markersize=4, capsize=3, label=name)
        chance = {"parity": 50, "s3": 100 / 6}[group]
        place.axhline(chance, color="gray", linestyle=":", label="chance")
        place.axvline(40, color="gray", linewidth=0.8)
        place.set_title(f"{group}: trained on up to 40 moves", fontsize=10)
        place.set_xlabel("moves")
        place.set_ylabel("accuracy, %")
        place.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.savefig(file, dpi=110)


def main() -> None:
    output = Path(sys.argv[1])
    results = collect(output)
    if not results:
        sys.exit(f"draw.py: there are no results in {output}.")
    new = output / "results.csv.new"
    with new.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["group", "model", "moves", "seeds", "mean", "standard deviation"])
        for (group, name), by_length in results.items():
            for length, values in sorted(by_length.items()):
                row = [group, name, length, len(values)]
                table.writerow([*row, f"{statistics.mean(values):.1f}", f"{statistics.pstdev(values):.1f}"])
    new.replace(output / "results.csv")
    draw(results, output / "state_tracking.png")
    for (group, name), by_length in results.items():
        accuracies = ", ".join(f"{statistics.mean(by_length[x]):.1f} at {x}" for x in sorted(by_length))
        print(f"{group}, {name}: {accuracies}")


if __name__ == "__main__":
    main()
