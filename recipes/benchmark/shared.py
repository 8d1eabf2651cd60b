"""What the benchmarks share: a clock, random text for fairseq, and files that are replaced as a whole."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

# Entries of the dictionary, fairseq's four special symbols among them.
VOCABULARY = 10_000
WORDS = [f"w{i}" for i in range(VOCABULARY - 4)]


def clock(function: Callable[[], object], calls: int = 1) -> float:
    """Seconds of a call, of ``calls`` that follow each other."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def write_lines(path: Path, words: Sequence[str], words_per_line: int) -> None:
    """Text, a line for every so many words."""
    lines = (" ".join(words[i : i + words_per_line]) for i in range(0, len(words), words_per_line))
    path.write_text("".join(line + "\n" for line in lines))


def preprocess(*arguments: str) -> None:
    """Run fairseq-preprocess, which has much to say of it."""
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--workers", "1", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Replace a table; floating-point numbers get four digits."""
    temporary = path.with_suffix(".csv.new")
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([f"{x:.4g}" if isinstance(x, float) else x for x in row] for row in rows)
    os.replace(temporary, path)


def import_pyplot() -> Any:
    """matplotlib for files, or None, which is said, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("without the plot: matplotlib is not installed")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    return pyplot


def save_figure(figure: Any, path: Path) -> None:
    """Replace a picture."""
    temporary = path.with_suffix(".new.png")
    figure.savefig(temporary, dpi=150)
    os.replace(temporary, path)
