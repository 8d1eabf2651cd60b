#!/usr/bin/env python3
"""Hold runs.csv against the paper's claims and the authors' numbers: a line of pass, fail or missing for each claim.

The exit status is 0 if every claim passes.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from experiments import RESULTS, group_by_point, read_authors, read_results

SOLVED = 0.01
# Best losses agree within this factor, or this difference, at this share of the points that both have.
FACTOR, DIFFERENCE, SHARE = 2.0, 0.02, 0.8

# The best losses of all seeds, by model, setting 2 or not, and number of keys.
Losses = dict[tuple[str, bool, int], list[float]]


class Verdict(NamedTuple):
    """``verdict`` is pass, fail, or missing where there is no run that could tell."""

    verdict: str
    claim: str
    detail: str


def compare(losses: Losses, authors: dict[tuple[str, bool, int], tuple[float, int]]) -> Iterator[Verdict]:
    """Every claim, with what was found."""
    for name, model, last_solved, first_unsolved in (
        ("linear attention", "elu_sum", 40, 80),
        ("DPFP-1", "dpfp1_sum", 100, 160),
        ("DPFP-2", "dpfp2_sum", 200, 320),
        ("DPFP-3", "dpfp3_sum", 320, 460),
    ):
        at_most, at_least = at(losses, model, range(last_solved + 1)), at(losses, model, range(first_unsolved, 10_000))
        yield judge(f"{name} is solved at S <= {last_solved}: loss < {SOLVED}", at_most, lambda loss: loss < SOLVED)
        yield judge(f"{name} is not solved at S >= {first_unsolved}", at_least, lambda loss: loss >= SOLVED)
    for m in (64, 128, 512):
        found = at(losses, f"favor{m}_sum", range(40, 10_000))
        yield judge(f"FAVOR+ with m = {m} is above 0.02 at S >= 40", found, lambda loss: loss > 0.02)
    softmax = at(losses, "softmax", range(481))
    yield judge(f"softmax is solved at S <= 480: loss < {SOLVED}", softmax, lambda loss: loss < SOLVED)
    delta, total = (at(losses, f"dpfp1_{rule}", [20], with_replacement=True) for rule in ("delta", "sum"))
    yield judge("setting 2, S = 20: the delta rule is below 0.002", delta, lambda loss: loss < 0.002)
    yield judge("setting 2, S = 20: the sum rule is above 0.05", total, lambda loss: loss > 0.05)
    fwm = [point for name in ("dpfp1_fwm", "tanh_fwm") for point in at(losses, name, [20], with_replacement=True)]
    worst = max((loss for *_, loss in delta), default=math.nan)
    yield judge("setting 2, S = 20: FWM is above the delta rule", fwm if delta else [], lambda loss: loss > worst)
    yield agreement(losses, authors)


def at(
    losses: Losses, model: str, sizes: range | list[int], with_replacement: bool = False
) -> list[tuple[str, int, float]]:
    """The runs of a model: its name, number of keys and loss."""
    return [
        (model, size, loss)
        for (name, replaced, size), several in sorted(losses.items())
        if name == model and replaced == with_replacement and size in sizes
        for loss in several
    ]


def judge(claim: str, found: list[tuple[str, int, float]], holds: Callable[[float], bool]) -> Verdict:
    """Pass if the loss of every run found is as claimed; NaN never is."""
    wrong = [f"{model} S = {size}: {loss:.3g}" for model, size, loss in found if not holds(loss)]
    if wrong:
        return Verdict("fail", claim, ", ".join(wrong))
    sizes = ", ".join(str(size) for size in sorted({size for _, size, _ in found}))
    return Verdict("pass" if found else "missing", claim, f"S = {sizes}" if found else "no run")


def agreement(losses: Losses, authors: dict[tuple[str, bool, int], tuple[float, int]]) -> Verdict:
    """Whether enough best losses, means over seeds, are near the authors'. Where theirs is NaN there is none."""
    claim = f"best losses are within a factor of {FACTOR:g}, or {DIFFERENCE}, of the authors' at {SHARE:.0%} of points"
    compared, far = 0, []
    for point, several in sorted(losses.items()):
        theirs = authors.get(point, (math.nan, 0))[0]
        if math.isnan(theirs):
            continue
        compared += 1
        ours = sum(several) / len(several)
        if not (theirs / FACTOR <= ours <= theirs * FACTOR or abs(ours - theirs) <= DIFFERENCE):
            model, with_replacement, size = point
            far.append(f"{model} setting {1 + with_replacement} S = {size}: {ours:.3g}, theirs {theirs:.3g}")
    if not compared:
        return Verdict("missing", claim, "0 points")
    near = compared - len(far)
    detail = "; ".join([f"{near} of {compared} points", *far])
    return Verdict("pass" if near >= SHARE * compared else "fail", claim, detail)


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder with runs.csv")
    options = parser.parse_args()
    results = read_results(options.output)
    if not results:
        parser.exit(2, f"compare.py: there is no finished run in {options.output / RESULTS}.\n")
    losses = {point: [result.best for result in several] for point, several in group_by_point(results)}
    verdicts = list(compare(losses, read_authors()))
    for verdict, claim, detail in verdicts:
        print(f"{verdict:<8}{claim} ({detail})")
    return int(any(verdict != "pass" for verdict, _, _ in verdicts))


if __name__ == "__main__":
    sys.exit(main())
