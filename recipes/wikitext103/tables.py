#!/usr/bin/env python3
"""What trained models reach, and the paper's tables 2 to 5 beside it.

tables.py result MODEL --data DATA_BIN     reads what evaluate.sh has written in a model's folder, writes result.json
tables.py show MODEL                       prints it
tables.py tables OUTPUT                    prints the tables, and writes tables.md and tables.csv
tables.py docs OUTPUT --rows ROW...        prints the table of python_docs.sh, and writes python_docs.md
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reporting import epochs_of, read_training, table, write

PARTS = ("valid", "test")

# Perplexity of the validation and test parts, by table, size and row of the recipe.
PAPER: dict[str, dict[tuple[str, str], tuple[float, float] | None]] = {
    "Table 2": {
        ("small", "softmax"): (33.0, 34.1),
        ("small", "sum-elu"): (37.1, 38.3),
        ("small", "delta-elu"): (34.1, 35.5),
        ("small", "sum-favor"): (39.0, 39.6),
        ("small", "delta-favor"): (36.1, 37.2),
        ("medium", "softmax"): (27.9, 29.6),
        ("medium", "sum-elu"): (31.1, 33.0),
        ("medium", "delta-elu"): (29.7, 31.5),
        ("medium", "sum-favor"): (32.2, 33.8),
        ("medium", "delta-favor"): (30.0, 31.8),
    },
    "Table 3: positions and attention normalisation": {
        ("medium", "delta-elu-attnorm"): (30.4, 32.1),
        ("medium", "delta-elu-nopos-attnorm"): (29.2, 31.2),
        ("medium", "delta-elu"): (29.7, 31.5),
        ("medium", "delta-elu-nopos"): (28.1, 31.1),
    },
    "Table 4: the context is not truncated": {
        ("medium", "sum-elu-streaming"): (math.inf, math.inf),
        ("medium", "delta-elu-streaming"): (27.8, 29.4),
        ("medium", "xl-8"): (65.7, 65.5),
        ("medium", "xl-64"): (29.3, 30.1),
        ("medium", "xl-128"): (26.4, 27.4),
        ("medium", "xl-384"): (24.6, 25.5),
    },
    "Table 5: more feature maps": {
        ("small", "sum-favor-16"): (38.0, 38.8),
        ("small", "delta-favor-16"): (36.0, 37.0),
        ("small", "sum-dpfp-1"): (37.7, 38.8),
        ("small", "delta-dpfp-1"): (33.9, 35.0),
    },
}
DIVERGED = "> 260"


def read_streaming(text: str) -> dict[str, Any]:
    """What fwp_fairseq.eval_lm has printed."""
    found = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    perplexity, tokens = float(found["perplexity"]), int(found["tokens"])
    state = int(found["state"].split()[0])
    return {"perplexity": perplexity, "tokens": tokens, "loss": math.log(perplexity) * tokens, "state": state}


def read_result(model: Path, data: Path) -> dict[str, Any]:
    """What evaluate.sh and the training have left in the folder of a model."""
    _, _, vocabulary, _, segment, *_ = (model / "settings").read_text(encoding="utf-8").splitlines()
    log = (model / "train.log").read_text(encoding="utf-8")
    words = json.loads((data / "words.json").read_text(encoding="utf-8"))
    result = {**read_training(model), "vocabulary": vocabulary, "segment": int(segment)}
    result["updates"] = max((int(update) for update in re.findall(r"\| num_updates (\d+)", log)), default=0)
    parameters = re.findall(r"num\. shared model params: ([\d,]+)", log)
    result["parameters"] = int(parameters[-1].replace(",", "")) if parameters else None
    # The last epoch of a training with a budget of time is cut short.
    speeds = [float(speed) for speed in re.findall(r"\| train \|.* wps ([\d.]+)", log)]
    result["words_per_second"] = median(speeds) if speeds else None
    for part in PARTS:
        text = (model / f"{part}.out").read_text(encoding="utf-8")
        found = json.loads(text.splitlines()[-1]) if text.rstrip().endswith("}") else read_streaming(text)
        result["state"] = found["state"]
        # A word is one token or several; the ends of lines are words, too.
        (count,) = (number for name, number in words.items() if f".{part}." in f".{name}.")
        result[part] = {
            "perplexity": round(found["perplexity"], 3),
            "perplexity_per_word": round(math.exp(found["loss"] / count), 3),
            "tokens": found["tokens"],
            "words": count,
        }
    return result


def show(model: Path) -> None:
    """Print the perplexities of a model."""
    result = json.loads((model / "result.json").read_text(encoding="utf-8"))
    for part in PARTS:
        found = result[part]
        per_word = "" if result["vocabulary"] == "words" else f", per word {found['perplexity_per_word']:.2f}"
        print(f"{model.name}: {part} perplexity = {found['perplexity']:.2f}{per_word} ({found['tokens']} tokens)")


def write_tables(output: Path) -> None:
    """Print and write the tables."""
    results: dict[tuple[str, str], list[tuple[str, dict[str, Any]]]] = {}
    for path in sorted(output.glob("models/*/result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        results.setdefault((result["size"], result["row"]), []).append((path.parent.name, result))
    known = {key for rows in PAPER.values() for key in rows}
    others: dict[tuple[str, str], tuple[float, float] | None] = {key: None for key in results if key not in known}
    header = ["size", "row", "paper, valid", "paper, test", "model", "epochs", "parameters", "state", "valid", "test"]
    text = ""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["table", *header])
    for title, paper in [*PAPER.items(), ("Without a figure in the paper", others)]:
        rows = []
        for key, figures in paper.items():
            published = ["", ""] if figures is None else [DIVERGED if x == math.inf else f"{x}" for x in figures]
            for name, result in results.get(key) or [("", {})]:
                row = [*key, *published, name]
                if result:
                    # Perplexity per word, the paper's, whatever the vocabulary is.
                    row += [epochs_of(result), *(f"{result[column]}" for column in ("parameters", "state"))]
                    row += [f"{result[part]['perplexity_per_word']:.2f}" for part in PARTS]
                rows.append(row + [""] * (len(header) - len(row)))
        writer.writerows([title, *row] for row in rows)
        if rows:
            text += f"{title}\n\n{table(header, rows)}\n"
    write(output / "tables.csv", lines.getvalue())
    write(output / "tables.md", text)
    print(text, end="")


def write_docs(output: Path, rows: Sequence[str]) -> None:
    """Print and write the table of python_docs.sh."""
    header = ["attention", "valid", "test", "parameters", "state, numbers", "words/s", "epochs", "updates"]
    lines = []
    for row in rows:
        for path in sorted(output.glob(f"models/{row}-seed*/result.json")):
            result = json.loads(path.read_text(encoding="utf-8"))
            # What fairseq counts as words are pieces here.
            words = result["words_per_second"] * result["test"]["words"] / result["test"]["tokens"]
            perplexities = [f"{result[part]['perplexity_per_word']:.1f}" for part in PARTS]
            counts = [result[name] for name in ("parameters", "state")]
            lines.append([path.parent.name, *perplexities, *(f"{n:,}" for n in counts), f"{words:,.0f}"])
            lines[-1] += [str(result["epochs"]), str(result["updates"])]
    text = table(header, lines)
    write(output / "python_docs.md", text)
    print(text, end="")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="What trained models reach, and the paper's tables beside it.")
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("result", help="write result.json")
    sub.add_argument("model", type=Path)
    sub.add_argument("--data", type=Path, required=True, metavar="DATA_BIN")
    commands.add_parser("show", help="print result.json").add_argument("model", type=Path)
    commands.add_parser("tables", help="print and write the tables").add_argument("output", type=Path)
    sub = commands.add_parser("docs", help="print and write the table of python_docs.sh")
    sub.add_argument("output", type=Path)
    sub.add_argument("--rows", nargs="+", required=True, metavar="ROW")
    options = parser.parse_args(arguments)
    if options.command == "result":
        write(options.model / "result.json", json.dumps(read_result(options.model, options.data), indent=2) + "\n")
    elif options.command == "show":
        show(options.model)
    elif options.command == "docs":
        write_docs(options.output, options.rows)
    else:
        write_tables(options.output)


if __name__ == "__main__":
    main()
