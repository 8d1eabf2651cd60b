#!/usr/bin/env python3
"""What a trained model did: its result as JSON, sample translations, and tables of many models.

report.py result MODEL           reads test.out and train.log in a model folder, writes result.json
report.py samples MODEL          prints a few translations and the BLEU score
report.py table ...              prints a Markdown table of models, and writes it with a CSV file and a plot
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
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

SAMPLES = 6
# Of the test strings, for p values.
BOOTSTRAP_SAMPLES = 1000


class Translation(NamedTuple):
    """A line of the test part, as the model saw and translated it."""

    number: int
    source: str
    reference: str
    hypothesis: str


class Result(NamedTuple):
    """How good a model is and what it cost."""

    bleu: float
    chrf: float
    valid_nll: float
    train_minutes: float


class Run(NamedTuple):
    """A trained model with its seed, and the p value of its BLEU against the model that others are compared with."""

    model: str
    seed: int
    result: Result
    p: float | None


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


def result_of(model: Path) -> Result:
    """What the files of a model's folder say."""
    from sacrebleu import corpus_chrf

    nll, minutes = read_log(model / "train.log")
    translations, bleu = read_output(model / "test.out")
    chrf = round(corpus_chrf([t.hypothesis for t in translations], [[t.reference for t in translations]]).score, 2)
    return Result(bleu, chrf, nll, round(minutes, 2))


def write_result(model: Path) -> None:
    """Write result.json."""
    write(model / "result.json", json.dumps(result_of(model)._asdict(), indent=2) + "\n")


def print_samples(model: Path) -> None:
    """Print some translations of moderate length, spread over the test part, and the score."""
    translations, bleu = read_output(model / "test.out")
    fitting = [t for t in translations if 3 <= len(t.source.split()) <= 14] or translations
    for translation in fitting[:: max(1, len(fitting) // SAMPLES)][:SAMPLES]:
        print(f"\nsource     {translation.source}")
        print(f"reference  {translation.reference}")
        print(f"ours       {translation.hypothesis}")
    print(f"\nBLEU = {bleu:.1f}")


def p_values(baseline: Path, models: Sequence[Path]) -> list[float]:
    """How probable as large a difference in BLEU from ``baseline`` is by chance of the strings (paired bootstrap)."""
    from sacrebleu.metrics import BLEU
    from sacrebleu.significance import PairedTest

    outputs = [read_output(model / "test.out")[0] for model in (baseline, *models)]
    systems: Any = [(str(number), [t.hypothesis for t in output]) for number, output in enumerate(outputs)]
    references = [[t.reference for t in outputs[0]]]
    test = PairedTest(systems, {"BLEU": BLEU(references=references)}, None, test_type="bs", n_samples=BOOTSTRAP_SAMPLES)
    scores: Any = test()[1]["BLEU"]
    return [float(found.p_value) for found in scores[1:]]


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """Mean, and standard deviation if there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} \u00b1 {statistics.stdev(values):.{digits}f}"


def make_table(rows: Sequence[Sequence[str]], runs: Sequence[Run]) -> str:
    """Markdown table of the rows (attention, places, model): means and standard deviations of all seeds."""
    header = ["attention", "fast weights in", "BLEU", "chrF", "p", "validation nll", "training minutes"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for attention, places, model in rows:
        cells = [attention, places] + [""] * 5
        own = [run for run in runs if run.model == model]
        if own:
            figures = (("bleu", 1), ("chrf", 1), ("valid_nll", 3), ("train_minutes", 1))
            bleu, chrf, nll, minutes = (mean_and_spread([getattr(run.result, k) for run in own], n) for k, n in figures)
            cells[2:] = [bleu, chrf, ", ".join(f"{run.p:.3f}" for run in own if run.p is not None), nll, minutes]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Sequence[str]], runs: Sequence[Run], path: Path) -> None:
    """Mean, standard deviation and each seed of BLEU and validation loss."""
    try:
        import matplotlib
    except ImportError:
        print("without the plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    there = [row for row in rows if any(run.model == row[2] for run in runs)]
    figure, both = plt.subplots(1, 2, figsize=(10, 0.7 + 0.55 * len(there)), sharey=True, layout="constrained")
    for axes, name, label in ((both[0], "bleu", "BLEU"), (both[1], "valid_nll", "validation nll (lower is better)")):
        for height, (*_, model) in enumerate(there):
            values = [getattr(run.result, name) for run in runs if run.model == model]
            spread = statistics.stdev(values) if len(values) > 1 else 0
            axes.errorbar(statistics.mean(values), height, xerr=spread, fmt="o", color="C0", capsize=4)
            axes.plot(values, [height] * len(values), "|", color="C1", markersize=9)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3, axis="x")
    labels = [f"{textwrap.fill(attention, 60)}\n{places}" for attention, places, _ in there]
    both[0].set_yticks(range(len(there)), labels, fontsize=7)
    both[0].set_ylim(len(there) - 0.5, -0.5)
    new = path.with_suffix(".new.png")
    figure.savefig(new, dpi=150)
    os.replace(new, path)


def write_tables(output: Path, name: str, rows: Sequence[Sequence[str]], seeds: Sequence[int]) -> None:
    """Print and write the comparison of the models OUTPUT/models/NAME-seedN that are there, as OUTPUT/``name``.

    p is against the first row, of the same seed.
    """
    runs = []
    for seed in seeds:
        folders = {model: output / "models" / f"{model}-seed{seed}" for *_, model in rows}
        there = [model for model, folder in folders.items() if (folder / "result.json").exists()]
        baseline, others = rows[0][2], [model for model in there if model != rows[0][2]]
        found: dict[str, float] = {}
        if baseline in there and others:
            found = dict(zip(others, p_values(folders[baseline], [folders[model] for model in others])))
        runs += [Run(model, seed, result_of(folders[model]), found.get(model)) for model in there]
    table = io.StringIO()
    lines = csv.writer(table, lineterminator="\n")
    lines.writerow(["attention", "places", "seed", "bleu", "chrf", "p", "valid_nll", "train_minutes"])
    for attention, places, model in rows:
        for run in (run for run in runs if run.model == model):
            result, p = run.result, "" if run.p is None else f"{run.p:.4f}"
            own = [run.seed, result.bleu, result.chrf, p, result.valid_nll, result.train_minutes]
            lines.writerow([attention, places, *own])
    markdown = make_table(rows, runs)
    write(output / f"{name}.csv", table.getvalue())
    write(output / f"{name}.md", markdown)
    if runs:
        plot(rows, runs, output / f"{name}.png")
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
