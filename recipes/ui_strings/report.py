#!/usr/bin/env python3
"""What a trained model did: its result as JSON, sample translations, and tables of many models.

report.py result MODEL           reads test.out and train.log in a model folder, writes result.json
report.py samples MODEL          prints a few translations and the BLEU score
report.py table ...              prints a Markdown table of models, and writes it with a CSV file
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

SAMPLES = 6


class Translation(NamedTuple):
    """A line of the test part, as the model saw and translated it."""

    number: int
    source: str
    reference: str
    hypothesis: str


class Result(TypedDict):
    """How good a model is and what it cost."""

    bleu: float
    valid_nll: float
    train_minutes: float


def read_output(path: Path) -> tuple[list[Translation], float]:
    """Translations and BLEU from what fairseq-generate printed."""
    fields: dict[tuple[str, int], str] = {}
    bleu = None
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"([STD])-(\d+)\t(.*)", line):
            text = match[3].split("\t", 1)[1] if match[1] == "D" else match[3]
            fields[match[1], int(match[2])] = text
        elif match := re.match(r"Generate .*BLEU = (\d+(?:\.\d+)?)", line):
            bleu = float(match[1])
    if bleu is None:
        sys.exit(f"report.py: {path} has no BLEU score.")
    numbers = sorted(number for kind, number in fields if kind == "D")
    return [Translation(n, fields["S", n], fields["T", n], fields["D", n]) for n in numbers], bleu


def read_log(path: Path) -> tuple[float, float]:
    """Negative log-likelihood (base 2, per piece) of the best epoch on the valid part, and minutes of training."""
    seconds: dict[str, float] = {}
    losses: dict[str, tuple[float, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        # An epoch that was interrupted and done again stands there twice: the later one counts.
        if match := re.search(r"\| train \| epoch (\d+) \|.* train_wall ([\d.]+)", line):
            seconds[match[1]] = float(match[2])
        elif match := re.search(r"\| valid \| epoch (\d+) \|.* loss ([\d.]+) \| nll_loss ([\d.]+)", line):
            losses[match[1]] = (float(match[2]), float(match[3]))
    if not losses:
        sys.exit(f"report.py: {path} has no validation result.")
    return min(losses.values())[1], sum(seconds.values()) / 60


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_result(model: Path) -> None:
    """Write result.json."""
    nll, minutes = read_log(model / "train.log")
    result: Result = {"bleu": read_output(model / "test.out")[1], "valid_nll": nll, "train_minutes": round(minutes, 2)}
    write(model / "result.json", json.dumps(result, indent=2) + "\n")


def print_samples(model: Path) -> None:
    """Print some translations of moderate length, spread over the test part, and the score."""
    translations, bleu = read_output(model / "test.out")
    fitting = [t for t in translations if 3 <= len(t.source.split()) <= 14] or translations
    for translation in fitting[:: max(1, len(fitting) // SAMPLES)][:SAMPLES]:
        print(f"\nsource     {translation.source}")
        print(f"reference  {translation.reference}")
        print(f"ours       {translation.hypothesis}")
    print(f"\nBLEU = {bleu:.1f}")


def make_table(rows: Sequence[Sequence[str]], results: dict[tuple[str, int], Result], seeds: Sequence[int]) -> str:
    """Markdown table of the rows (attention, places, model): BLEU of each seed, means of all."""
    header = ["attention", "fast weights in", *(f"BLEU, seed {seed}" for seed in seeds)]
    header += ["BLEU, mean", "valid nll, mean", "training minutes, mean"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for attention, places, model in rows:
        found = [results.get((model, seed)) for seed in seeds]
        done = [result for result in found if result is not None]
        cells = [attention, places, *(f"{result['bleu']:.1f}" if result else "" for result in found)]
        if done:
            cells.append(f"{statistics.mean(result['bleu'] for result in done):.1f}")
            cells.append(f"{statistics.mean(result['valid_nll'] for result in done):.3f}")
            cells.append(f"{statistics.mean(result['train_minutes'] for result in done):.1f}")
        lines.append("| " + " | ".join(cells + [""] * (len(header) - len(cells))) + " |")
    return "\n".join(lines) + "\n"


def write_tables(output: Path, name: str, rows: Sequence[Sequence[str]], seeds: Sequence[int]) -> None:
    """Print and write the comparison of the models OUTPUT/models/NAME-seedN that are there, as OUTPUT/``name``."""
    results: dict[tuple[str, int], Result] = {}
    table = io.StringIO()
    lines = csv.writer(table, lineterminator="\n")
    lines.writerow(["attention", "places", "seed", "bleu", "valid_nll", "train_minutes"])
    for attention, places, model in rows:
        for seed in seeds:
            path = output / "models" / f"{model}-seed{seed}" / "result.json"
            if path.exists():
                result: Result = json.loads(path.read_text(encoding="utf-8"))
                results[model, seed] = result
                lines.writerow([attention, places, seed, *(result[k] for k in ("bleu", "valid_nll", "train_minutes"))])
    markdown = make_table(rows, results, seeds)
    write(output / f"{name}.csv", table.getvalue())
    write(output / f"{name}.md", markdown)
    print(markdown, end="")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Results of trained models.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("result", "samples"):
        commands.add_parser(name).add_argument("model", type=Path)
    table = commands.add_parser("table")
    table.add_argument("--output", type=Path, required=True, metavar="DIR")
    table.add_argument("--name", default="compare", help="of the files")
    table.add_argument("--seeds", type=int, nargs="+", required=True, metavar="N")
    help_row = "attention, places and model name"
    table.add_argument("--row", nargs=3, action="append", required=True, metavar=("A", "P", "M"), help=help_row)
    options = parser.parse_args(arguments)
    if options.command == "result":
        write_result(options.model)
    elif options.command == "samples":
        print_samples(options.model)
    else:
        write_tables(options.output, options.name, options.row, options.seeds)


if __name__ == "__main__":
    main()
