#!/usr/bin/env python3
"""Words per second of fairseq-train for language models of the paper's small shape: a table and models.csv.

16 layers of width 128, feed-forward width 2,048, 8 heads; vocabulary of 10,000 words in place of WikiText-103's
267,735, since an output layer of that size would hide what the attention costs. Softmax is fairseq's own
transformer_lm. The text is random words, made here. Every model trains by fairseq-train in a process of its own, in
turn within each round; the figure is the median over the updates of all rounds, without the first two of each.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import fwp_fairseq

WORDS = 10_000
CUTOFFS = "2000,6000"
SKIPPED = 2  # updates at the start of a run

SHAPE = ["--decoder-layers", "16", "--decoder-embed-dim", "128", "--decoder-ffn-embed-dim", "2048"]
SHAPE += ["--decoder-input-dim", "128", "--decoder-output-dim", "128"]
SHAPE += ["--decoder-attention-heads", "8", "--dropout", "0.1"]
SHAPE += ["--adaptive-input", "--adaptive-input-factor", "1", "--adaptive-input-cutoff", CUTOFFS]
SHAPE += ["--adaptive-softmax-factor", "1", "--adaptive-softmax-cutoff", CUTOFFS]
SHAPE += ["--tie-adaptive-weights", "--tie-adaptive-proj", "--criterion", "adaptive_loss"]
FAST = ["--arch", "fwp_transformer_lm", "--feature-map", "elu", "--no-attention-bias"]
MODELS = {
    "softmax": ["--arch", "transformer_lm"],
    "sum": [*FAST, "--update-rule", "sum"],
    "delta": [*FAST, "--update-rule", "delta"],
}


def make_data(folder: Path, tokens: int) -> Path:
    """Binarise random text, with every word in the dictionary."""
    generator = random.Random(1)
    words = [f"w{i}" for i in range(WORDS - 4)]  # the dictionary has four symbols of its own
    for name, count in ("train", tokens), ("valid", 100):
        text = words + generator.choices(words, k=count) if name == "train" else generator.choices(words, k=count)
        lines = (" ".join(text[i : i + 50]) for i in range(0, len(text), 50))
        (folder / name).write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--only-source", "--workers", "1"]
    command += ["--trainpref", f"{folder}/train", "--validpref", f"{folder}/valid", "--destdir", f"{folder}/bin"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder / "bin"


def train(data: Path, flags: list[str], length: int, batch: int, updates: int) -> list[float]:
    """Words per second of each update but the first few."""
    command = [
        sys.executable,
        "-m",
        "fairseq_cli.train",
        str(data),
        "--user-dir",
        str(Path(fwp_fairseq.__file__).parent),
    ]
    command += ["--task", "language_modeling", "--tokens-per-sample", str(length), "--max-tokens", str(batch)]
    command += ["--required-batch-size-multiple", "1", "--optimizer", "adam", "--lr", "1e-4", "--clip-norm", "0.1"]
    command += ["--max-update", str(updates), "--no-save", "--disable-validation", "--num-workers", "0"]
    command += ["--ddp-backend", "legacy_ddp", "--log-format", "json", "--log-interval", "1", *SHAPE, *flags]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise SystemExit(f"models.py: fairseq-train failed:\n{run.stderr[-2000:]}")
    speeds = []
    for line in (run.stdout + run.stderr).splitlines():
        if "| train_inner | " in line:
            speeds.append(float(json.loads(line.split("| train_inner | ")[1])["wps"]))
    return speeds[SKIPPED:]


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the CSV file")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096], metavar="L", help="%(default)s")
    parser.add_argument("--batch", type=int, default=4096, metavar="N", help="tokens of an update (%(default)s)")
    parser.add_argument("--updates", type=int, default=6, metavar="N", help="updates of a run (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="runs of each model (%(default)s)")
    options = parser.parse_args()
    if options.updates <= SKIPPED:
        parser.error(f"--updates is {options.updates}, it must be more than {SKIPPED}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder), options.batch * (options.updates + 2))
        for length in options.lengths:
            speeds: dict[str, list[float]] = {name: [] for name in MODELS}
            for _ in range(options.rounds):
                for name, flags in MODELS.items():
                    # Positions are sinusoidal in softmax and in fast weights alike.
                    batch = max(options.batch, length)
                    speeds[name] += train(data, flags, length, batch, options.updates)
            softmax = statistics.median(speeds["softmax"])
            for name, found in speeds.items():
                median = statistics.median(found)
                rows.append({"length": length, "model": name, "words_per_second": round(median, 1),
                             "relative_to_softmax": round(median / softmax, 3)})  # fmt: skip
                print(
                    f"L = {length:>5}  {name:<8} {median:8.0f} words/s   {median / softmax:5.2f} x softmax", flush=True
                )
            delta, total = statistics.median(speeds["delta"]), statistics.median(speeds["sum"])
            print(f"L = {length:>5}  the delta rule costs {100 * (total / delta - 1):.1f} % over sum", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    temporary = options.output / "models.csv.new"
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, options.output / "models.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
