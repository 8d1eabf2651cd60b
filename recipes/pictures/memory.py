#!/usr/bin/env python3
"""Draw how a fast-weight memory is written and read: memory-light.png and memory-dark.png, for the README.

Computed with the package's operators: three associations are written, the third under the first's key, and that key
asks. Above with the sum rule, below with the delta rule. Needs torch and matplotlib.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from fwp_fairseq.ops import fast_weight_scan

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.colors import LinearSegmentedColormap  # noqa: E402

# Keys of sum one, nearly without overlap, and values, which are easy to tell apart.
KEYS = torch.tensor([[0.8, 0.2, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.3, 0.7, 0.0]])
VALUES = torch.tensor([[1.0, 1, 0, 0, -1, -1, 0, 0], [-1.0, 0, 1, 0, -1, 0, 1, 0], [0.0, 0, -1, 1, 1, 0, -1, 1]])
ORDER = [0, 1, 0]
TITLES = ["write  $k_1, v_1$", "write  $k_2, v_2$", "write  $k_1, v_3$", "read with  $k_1$"]
RULES = {"sum": "sum rule\n" + r"$W \leftarrow W + k \otimes v$",
         "delta": "delta rule\n" + r"$W \leftarrow W + k \otimes \beta\,(v - W^{\top} k)$"}  # fmt: skip
COLOURS = {
    # What is drawn with, the cells' zero, and those of negative and positive numbers.
    "light": ("#24292f", "#f3f4f6", "#c2410c", "#1d4ed8"),
    "dark": ("#e6edf3", "#21262d", "#fb923c", "#60a5fa"),
}


def memories(rule: str) -> tuple[list[Tensor], Tensor]:
    """The memory after each write, (Dk, Dv), and what the first key then reads, (Dv)."""
    k = torch.stack([KEYS[i] for i in ORDER])
    # Scaled to length one, a key that comes again finds what was written under it, and no more.
    k = (k / k.norm(dim=1, keepdim=True))[None, None]
    beta = None if rule == "sum" else torch.ones(1, 1, 3)
    found = []
    for length in range(1, 4):
        gates = None if beta is None else beta[:, :, :length]
        out, state = fast_weight_scan(
            k[:, :, :length], k[:, :, :length], VALUES[None, None, :length], gates, gates, backend="loop"
        )
        found.append(state[0, 0])
    return found, out[0, 0, 2]


def draw(theme: str) -> Any:
    """The picture. Everything has its place in cells, from the upper left corner."""
    ink, zero, negative, positive = COLOURS[theme]
    colours = LinearSegmentedColormap.from_list(theme, [negative, zero, positive])
    figure, axes = plt.subplots(figsize=(10.5, 3.9))
    axes.set_position((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, 63), ylim=(23.4, 0), aspect="equal")
    axes.axis("off")

    def cells(x: float, y: float, numbers: Tensor) -> None:
        rows, columns = numbers.shape
        axes.pcolormesh(
            [x + i for i in range(columns + 1)], [y + i for i in range(rows + 1)], numbers,
            cmap=colours, vmin=-1.6, vmax=1.6, edgecolors=ink, linewidth=0.4,
        )  # fmt: skip

    for row, (rule, name) in enumerate(RULES.items()):
        written, read = memories(rule)
        top = 3.8 + 10.6 * row
        axes.text(0.3, top + 3, name, color=ink, va="center", fontsize=11, linespacing=1.6)
        for step in range(4):
            x = 16.6 + 11.6 * step
            cells(x - 1.7, top, (KEYS[ORDER[step % 3]] / KEYS[ORDER[step % 3]].norm())[:, None])
            cells(x, top, written[min(step, 2)])
            # What is written comes from above, what is read leaves below.
            cells(x, *((top - 1.7, VALUES[step][None]) if step < 3 else (top + 6.7, read[None])))
            if row == 0:
                axes.text(x + 4, 0.9, TITLES[step], color=ink, ha="center", va="center", fontsize=12)
        what = "$v_3$" if torch.allclose(read, VALUES[2], atol=1e-5) else "$v_1 + v_3$"
        axes.text(x - 0.4, top + 7.2, what + " $=$", color=ink, ha="right", va="center", fontsize=12)
    return figure


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parent
    parser.add_argument("--output", type=Path, default=here, metavar="DIR", help="folder for them (that of this file)")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    for theme in COLOURS:
        figure, path = draw(theme), output / f"memory-{theme}.png"
        figure.savefig(path.with_suffix(".new.png"), dpi=150, transparent=True)
        os.replace(path.with_suffix(".new.png"), path)


if __name__ == "__main__":
    main()
