#!/usr/bin/env python3
"""Training steps and evaluations per second in setting 2: operators parallel over time beside a loop over tokens.

The loop is the recurrence as the equations state it, one token after the other, in torch with autograd; its evaluations
take one sequence at a time. Both train the same model, without fairseq's trainer, and have turns; the figures are
medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch

from fwp_fairseq.criterions.half_squared_error import HalfSquaredError
from fwp_fairseq.models.associative_memory import AssociativeMemory, AssociativeMemoryConfig
from fwp_fairseq.tasks.associative_retrieval import RetrievalDataset


def clock(action: Any) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


class Trained:
    """A model with what one step and one evaluation need."""

    def __init__(self, num_keys: int, rule: str, backend: str) -> None:
        torch.manual_seed(1)
        cfg = AssociativeMemoryConfig(update_rule=rule, feature_map="dpfp", dpfp_nu=1, fast_weight_backend=backend)
        self.model = AssociativeMemory(cfg, num_keys)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.criterion = HalfSquaredError(None)
        train = RetrievalDataset(32, 2 * num_keys, num_keys, True, seed=(1, 0))
        valid = RetrievalDataset(20, num_keys, num_keys, True, seed=(1, 1), max_queries=200)
        self.batch = train.collater([train[i] for i in range(32)])
        sequences = [valid[i] for i in range(20)]
        parts = [[sequence] for sequence in sequences] if backend == "loop" else [sequences]
        self.evaluation = [valid.collater(part) for part in parts]

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss, queries, _ = self.criterion(self.model, self.batch)
        (loss / queries).backward()
        self.optimizer.step()

    @torch.no_grad()
    def evaluate(self) -> None:
        for batch in self.evaluation:
            self.criterion(self.model, batch)


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-keys", type=int, default=200, metavar="S", help="number of keys (%(default)s)")
    parser.add_argument("--rule", choices=("delta", "fwm"), default="delta", help="update rule (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="turns of each (%(default)s)")
    options = parser.parse_args()
    forms = {
        name: Trained(options.num_keys, options.rule, backend)
        for name, backend in (("loop", "loop"), ("operators", "auto"))
    }
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(options.repeats + 1):
        for name, form in forms.items():
            for what, action in ("step", form.step), ("evaluation", form.evaluate):
                seconds = clock(action)
                if turn:  # the first fills caches
                    times.setdefault((name, what), []).append(seconds)
    print(
        f"{options.rule}, DPFP-1, S = {options.num_keys}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, medians of {options.repeats}"
    )
    for what in "step", "evaluation":
        loop, operators = (statistics.median(times[name, what]) for name in forms)
        print(f"{what}s per second: loop {1 / loop:.3g}, operators {1 / operators:.3g}, {loop / operators:.1f} times")
    return 0


if __name__ == "__main__":
    sys.exit(main())
