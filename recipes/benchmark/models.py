#!/usr/bin/env python3
"""Words per second of training language models of the paper's shapes: a table and models.csv.

16 layers of width 128 (small) or 256 (medium), feed-forward width 2,048, 8 heads; vocabulary of 10,000 words in place
of WikiText-103's 267,735, since an output layer of that size would hide what the attention costs. Softmax is fairseq's
own transformer_lm. The text is random words, made here. All models of a length stand in this process, each with
fairseq's Trainer and the options that fairseq-train would get, and make their updates in turn, so that whatever else
the machine does meets all of them; the figure is the median over the updates, without the first.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer
from shared import WORDS, clock, preprocess, write_csv, write_lines

import fwp_fairseq.models  # noqa: F401  (registers the architectures)

CUTOFFS = "2000,6000"

WIDTHS = {"small": "128", "medium": "256"}
SHAPE = ["--decoder-layers", "16", "--decoder-ffn-embed-dim", "2048"]
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
    write_lines(folder / "train", WORDS + random.Random(1).choices(WORDS, k=tokens), 50)
    preprocess("--only-source", "--trainpref", f"{folder}/train", "--destdir", f"{folder}/bin")
    return folder / "bin"


def shape_flags(size: str) -> list[str]:
    width = WIDTHS[size]
    return [*SHAPE, "--decoder-embed-dim", width, "--decoder-input-dim", width, "--decoder-output-dim", width]


def make_trainer(data: Path, flags: list[str], length: int, batch: int) -> tuple[Trainer, list[Any]]:
    """fairseq's trainer of a model, and the batches that it is given."""
    command = [str(data), "--task", "language_modeling", "--tokens-per-sample", str(length), "--max-tokens", str(batch)]
    command += ["--required-batch-size-multiple", "1", "--optimizer", "adam", "--lr", "1e-4", "--clip-norm", "0.1"]
    command += ["--num-workers", "0", "--ddp-backend", "legacy_ddp", *flags]
    args = options.parse_args_and_arch(options.get_training_parser(), command)
    cfg = convert_namespace_to_omegaconf(args)
    task = tasks.setup_task(cfg.task)
    trainer = Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))
    batches = list(trainer.get_train_iterator(epoch=1, combine=False).next_epoch_itr(shuffle=False))
    trainer.lr_step_begin_epoch(1)
    return trainer, [b for b in batches if b["ntokens"] == batch]


def speeds(data: Path, length: int, batch: int, updates: int, common: list[str]) -> dict[str, float]:
    """Words per second of each model."""
    trainers = {name: make_trainer(data, [*common, *flags], length, batch) for name, flags in MODELS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in MODELS}

    def train(trainer: Trainer, sample: Any) -> None:
        trainer.train_step([sample])
        if trainer.cuda:
            torch.cuda.synchronize()

    for update in range(updates):
        for name, (trainer, batches) in trainers.items():
            second = clock(lambda: train(trainer, batches[update % len(batches)]))  # noqa: B023
            if update:  # the first one warms up
                seconds[name].append(second)
    return {name: batch / statistics.median(found) for name, found in seconds.items()}


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the CSV file")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096], metavar="L", help="%(default)s")
    parser.add_argument("--batch", type=int, default=4096, metavar="N", help="tokens of an update (%(default)s)")
    parser.add_argument("--updates", type=int, default=8, metavar="N", help="updates of each model (%(default)s)")
    parser.add_argument("--shape", choices=WIDTHS, default="small", help="of the model (%(default)s)")
    parser.add_argument("--gpu", action="store_true", help="train on the GPU")
    parser.add_argument("--precision", choices=["float32", "fp16", "bf16", "amp"], default="float32",
                        help="fairseq's option for mixed precision (%(default)s)")  # fmt: skip
    parser.add_argument("--table", default="models.csv", metavar="FILE", help="name of the table (%(default)s)")
    chosen = parser.parse_args()
    if chosen.gpu and not torch.cuda.is_available():
        parser.error("--gpu: torch finds no GPU on this machine")
    if chosen.updates < 4:
        parser.error(f"--updates is {chosen.updates}, it must be at least 4")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    common = shape_flags(chosen.shape)
    common += [] if chosen.gpu else ["--cpu"]
    common += [] if chosen.precision == "float32" else [f"--{chosen.precision}"]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder), chosen.batch * 4)
        for length in chosen.lengths:
            found = speeds(data, length, max(chosen.batch, length), chosen.updates, common)
            for name, speed in found.items():
                ratio = speed / found["softmax"]
                rows.append(
                    {"length": length, "model": name, "words_per_second": round(speed, 1),
                     "relative_to_softmax": round(ratio, 3)}
                )  # fmt: skip
                print(f"L = {length:>5}  {name:<8} {speed:8.0f} words/s   {ratio:5.2f} x softmax", flush=True)
            chosen.output.mkdir(parents=True, exist_ok=True)
            write_csv(chosen.output / chosen.table, rows[0], [row.values() for row in rows])
            cost = 100 * (found["sum"] / found["delta"] - 1)
            print(f"L = {length:>5}  the delta rule costs {cost:.1f} % over sum", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
