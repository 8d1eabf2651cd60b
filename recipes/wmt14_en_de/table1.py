#!/usr/bin/env python3
"""Print the paper's table 1 beside the results of trained models: table1.py OUTPUT; writes table1.md and table1.csv."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reporting import epochs_of, table, write

# BLEU of newstest2013 and newstest2014 (table 1), and the features of a key.
PAPER = {
    "softmax": ("-", "26.6", "27.7"),
    "elu": ("64", "25.5", "26.8"),
    "favor-32": ("64", "24.2", "24.4"),
    "favor-128": ("256", "24.9", "25.3"),
    "favor-256": ("512", "26.7", "27.7"),
    "dpfp-2": ("256", "26.2", "26.9"),
    "dpfp-4": ("512", "26.2", "27.1"),
}
FIGURES = [("valid", "tokenized_bleu"), ("test", "tokenized_bleu"), ("valid", "sacrebleu"), ("test", "sacrebleu")]


def main() -> None:
    """Command line."""
    output = Path(sys.argv[1])
    found: dict[str, list[tuple[str, dict]]] = {row: [] for row in PAPER}
    for path in sorted(output.glob("models/*/result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        found[result["row"]].append((path.parent.name, result))
    header = ["row", "d_dot", "paper, valid", "paper, test", "model", "epochs"]
    header += ["valid", "test", "sacreBLEU, valid", "sacreBLEU, test"]
    rows = []
    for row, paper in PAPER.items():
        for name, result in found[row] or [("", {})]:
            epochs = epochs_of(result) if result else ""
            figures = [f"{result[part][figure]:.1f}" if result else "" for part, figure in FIGURES]
            rows.append([row, *paper, name, epochs, *figures])
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows([header, *rows])
    write(output / "table1.csv", lines.getvalue())
    text = table(header, rows)
    write(output / "table1.md", text)
    print(text, end="")


if __name__ == "__main__":
    main()
