#!/usr/bin/env python3
"""Time the decoding step alone, against copying its memories, and linear layers: tables, step.csv and linear.csv.

A step reads and writes the memories of all hypotheses once. A copy of as many numbers from one buffer to another reads
and writes as much. Both have their turn in each repetition; the figure is the median. The smallest shape shows what a
call costs beside its work.

Linear layers are those of a model of base width, nn.Linear and the form that models of this package decode with; the
weights of twelve layers take turns, so that they come from memory as in decoding.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shared import clock, write_csv

from fwp_fairseq.modules.few_rows_linear import use_few_rows_linear
from fwp_fairseq.ops import native

# Hypotheses of 8 heads with Dk = 128 (DPFP-1 of 64) and Dv = 64: 256 KiB each.
ROWS = [1, 5, 20, 80, 400, 2000, 8000]
HEADS, D_KEY, D_V = 8, 64, 64
# Inputs and outputs of projections, of the feed-forward network, and of the output layer.
LINEAR = [(512, 512), (512, 1_544), (512, 2048), (2048, 512), (512, 10_000)]


def make_step(rows: int, heads: int, d_key: int, d_v: int, reorder: bool) -> tuple[Callable[[], object], torch.Tensor]:
    """A call of the step with the delta rule and DPFP-1, and the memories that it works on."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(rows, heads, d, generator=generator) for d in (d_key, d_key, d_v))
    beta = torch.rand(rows, heads, generator=generator)
    state = torch.zeros(rows, heads, 2 * d_key, d_v)
    features = native.AddressFeatures("dpfp", 1, "sum")
    order = torch.randint(rows, (rows,), generator=generator) if reorder else None
    places: torch.Tensor | None = None

    def step() -> None:
        nonlocal places
        _, places = native.step(q, k, v, beta, beta, None, state, None, order, places, features)

    return step, state


def format_row(row: dict[str, Any]) -> str:
    return (
        f"  {row['hypotheses']:>5} hypotheses, {row['state_mib']:7.1f} MiB, order {row['order']:<4}  "
        f"step {row['step_us']:9.1f} us  copy {row['copy_us']:9.1f} us  {row['gb_per_s']:6.1f} GB/s, "
        f"{row['percent_of_copy']:5.1f} % of copying"
    )


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the CSV file")
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="repetitions, at least 3 (%(default)s)")
    options = parser.parse_args()
    if options.repeats < 3:
        parser.error(f"--repeats is {options.repeats}, it must be at least 3")
    if native.unavailable is not None:
        print(f"step.py: no compiled operators: {native.unavailable}", file=sys.stderr)
        return 1
    torch.set_grad_enabled(False)
    threads, vectors = torch.get_num_threads(), torch.ops.fwp_fairseq.instruction_set()
    print(f"torch {torch.__version__}, {threads} threads, native kernels: {vectors}")
    small, _ = make_step(1, 1, 1, 1, False)
    clock(small, 1000)
    overhead = statistics.median(clock(small, 1000) for _ in range(options.repeats)) * 1e6
    print(f"a call of 1 x 1 x 2 x 1: {overhead:.1f} us")
    rows: list[dict[str, Any]] = []
    for count in ROWS:
        for reorder in (False, True):
            step, state = make_step(count, HEADS, D_KEY, D_V, reorder)
            mebibytes = state.numel() * 4 / 2**20
            buffer = torch.zeros(2, state.numel())
            calls = max(1, int(200 / mebibytes))
            times: tuple[list[float], list[float]] = ([], [])
            for repetition in range(options.repeats + 1):
                seconds = clock(step, calls), clock(lambda: buffer[0].copy_(buffer[1]), calls)  # noqa: B023
                if repetition:  # the first one warms up
                    for found, second in zip(times, seconds):
                        found.append(second)
            step_s, copy_s = (statistics.median(found) for found in times)
            rows.append(
                {
                    "hypotheses": count,
                    "order": "any" if reorder else "kept",
                    "state_mib": mebibytes,
                    "step_us": round(step_s * 1e6, 1),
                    "copy_us": round(copy_s * 1e6, 1),
                    "gb_per_s": round(2 * state.numel() * 4 / step_s / 1e9, 1),
                    "percent_of_copy": round(100 * copy_s / step_s, 1),
                }
            )
            print(format_row(rows[-1]), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    write_table(options.output / "step.csv", rows)
    write_table(options.output / "linear.csv", time_linear(options.repeats))
    return 0


def time_linear(repeats: int) -> list[dict[str, Any]]:
    """nn.Linear as it is and by few_rows_linear, with one row for each hypothesis of a beam, and of 16 sentences."""
    rows = []
    for count in (1, 5, 80):
        for inputs, outputs in LINEAR:
            x = torch.randn(1, count, inputs)
            layers = [torch.nn.ModuleList(torch.nn.Linear(inputs, outputs) for _ in range(12)) for _ in range(2)]
            use_few_rows_linear(layers[1])
            times: tuple[list[float], list[float]] = ([], [])
            for repetition in range(repeats + 1):
                for found, group in zip(times, layers):
                    second = clock(lambda: [layer(x) for layer in group], 1) / len(group)  # noqa: B023
                    if repetition:
                        found.append(second)
            plain, ours = (statistics.median(found) * 1e6 for found in times)
            rows.append(
                {
                    "rows": count,
                    "inputs": inputs,
                    "outputs": outputs,
                    "linear_us": round(plain, 1),
                    "few_rows_linear_us": round(ours, 1),
                    "gb_per_s": round(4 * inputs * outputs / ours / 1e3, 1),
                }
            )
            print(
                f"  linear, {count:>2} rows, {inputs:>4} -> {outputs:>5}: nn.Linear {plain:7.0f} us, "
                f"few_rows_linear {ours:7.0f} us, {rows[-1]['gb_per_s']:5.1f} GB/s of weights",
                flush=True,
            )
    return rows


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    write_csv(path, rows[0], [row.values() for row in rows])


if __name__ == "__main__":
    sys.exit(main())
