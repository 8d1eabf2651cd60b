#!/usr/bin/env python3
"""Time fast-weight operators and softmax attention side by side: a table, operators.csv and operators.png.

All run in this one process on the same tensors, in turn within each repetition, so that whatever else the machine does
meets all of them; the figure is the median. Matrix multiplication of 1024 x 1024 (sgemm) runs in the same turns and is
the measure of the machine. FLOPs are those that the native algorithm has to do (see csrc/fast_weights_cpu_kernels.h),
multiply and add counted apart, whoever is timed.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from shared import clock, import_pyplot, save_figure, write_csv
from torch import Tensor

from fwp_fairseq.ops import fast_weight_scan, native

CHUNK = 16  # kChunk of the native kernels

# Token loops would take most of the time of the run. Those of more tokens take minutes, because the gradient of a slice
# is as long as the sequence: they run once.
LOOP_REPEATS = 3
LONG_LOOP = 4096

# Read-outs of (q, k, v, beta, decay).
Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Shape(NamedTuple):
    """Sizes of a batch of sequences."""

    batch: int
    heads: int
    length: int
    d_k: int
    d_v: int

    def __str__(self) -> str:
        width = str(self.d_k) if self.d_k == self.d_v else f"{self.d_k}/{self.d_v}"
        return f"{self.batch} x {self.heads} x {self.length} x {width}"


class Row(NamedTuple):
    """One line of the table; milliseconds, GFLOP/s, MiB."""

    shape: str
    length: int
    rule: str
    implementation: str
    forward_ms: float
    both_ms: float
    spread_percent: float
    gflops: Optional[float]
    percent_of_sgemm: Optional[float]
    peak_mib: Optional[float]


# The paper's small and medium language models, one head size of 64, and DPFP-2 features for values of that size.
SHAPES = [Shape(8, 8, 512, 64, 64), Shape(32, 8, 256, 16, 16), Shape(8, 8, 384, 32, 32), Shape(4, 16, 1024, 256, 64)]
TOKENS = 16384
LENGTHS = [256, 512, 1024, 2048, 4096, 8192, 16384]


def flops(rule: str, shape: Shape) -> tuple[float, float]:
    """FLOPs of the native algorithm, forward and backward."""
    tokens = shape.batch * shape.heads * shape.length
    memory, row = shape.d_k * shape.d_v, CHUNK * (shape.d_k + shape.d_v)
    if rule == "sum":
        return tokens * (4 * memory + row), tokens * (10 * memory + 2.5 * row)
    return tokens * (6 * memory + 2 * row), tokens * (16 * memory + 6 * row)


def ours(backend: str, rule: str) -> Attention:
    """One of this package's backends."""

    def run(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
        gates = {"sum": (None, None, None), "delta": (beta, beta, None), "gated-delta": (beta, beta, decay)}[rule]
        return fast_weight_scan(q, k, v, *gates, backend=backend)[0]

    return run


def softmax(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
    """torch's fused softmax attention."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def peers() -> dict[tuple[str, str], Attention]:
    """Other people's implementations, as far as they are installed."""
    found: dict[tuple[str, str], Attention] = {}
    try:
        from fast_transformers.causal_product import causal_dot_product
    except ImportError as error:
        print(f"without fast-transformers: {error}")
    else:
        found["sum", "fast-transformers"] = lambda q, k, v, beta, decay: causal_dot_product(q, k, v)
    naive = fla_naive()
    if naive is not None:
        # Both return a state too, and scale queries by the root of their size.
        found["delta", "fla, chunks"] = lambda q, k, v, beta, decay: naive.delta_rule_chunkwise(q, k, v, beta)[0]
        found["delta", "fla, token loop"] = lambda q, k, v, beta, decay: naive.delta_rule_recurrence(q, k, v, beta)[0]
    return found


def fla_naive() -> Any:
    """flash-linear-attention's plain torch functions, from their file: the package itself imports Triton."""
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        print("without flash-linear-attention: it is not installed")
        return None
    file = Path(package.submodule_search_locations[0]) / "ops" / "delta_rule" / "naive.py"
    spec = importlib.util.spec_from_file_location("fla_delta_rule_naive", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def candidates(shape: Shape, loop: bool) -> Iterator[tuple[str, str, Attention]]:
    """(rule, implementation, function) of all that is timed for a shape."""
    for rule in ("sum", "delta", "gated-delta"):
        for backend in ("native", "chunk", "loop") if loop else ("native", "chunk"):
            yield rule, backend, ours(backend, rule)
    for (rule, name), function in PEERS.items():
        if loop or "loop" not in name:
            yield rule, name, function
    if shape.d_k == shape.d_v:
        yield "softmax", "torch SDPA", softmax


def peak_memory(function: Callable[[], object]) -> Optional[float]:
    """MiB that a call adds to what the process holds before it, at its highest; Linux only."""

    def resident(field: str) -> int:
        match = re.search(field + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert match is not None
        return int(match[1])

    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator has kept would hide what a call needs
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = resident("VmRSS")
    except (OSError, AttributeError):
        return None
    function()
    return (resident("VmHWM") - before) / 1024


def make_inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, write strength and decay that all implementations get."""
    generator = torch.Generator().manual_seed(1)
    b, h, length, d_k, d_v = shape

    def uniform(*sizes: int) -> Tensor:
        return torch.rand(*sizes, generator=generator)

    q, k = (uniform(b, h, length, d_k).softmax(dim=-1).requires_grad_() for _ in range(2))
    v, beta = uniform(b, h, length, d_v).requires_grad_(), uniform(b, h, length).requires_grad_()
    return q, k, v, beta, (1 - uniform(b, h, length) / 100).requires_grad_()


def forward_and_backward(function: Attention, inputs: tuple[Tensor, ...], grad: Tensor) -> None:
    torch.autograd.grad(function(*inputs), inputs, grad, allow_unused=True)


def measure(shape: Shape, repeats: int, loop: bool) -> list[Row]:
    """Time everything for one shape."""
    inputs = make_inputs(shape)
    grad = torch.rand_like(inputs[2])

    def forward_only(function: Attention) -> None:
        with torch.no_grad():
            function(*inputs)

    def both(function: Attention) -> None:
        forward_and_backward(function, inputs, grad)

    square = torch.rand(1024, 1024)
    timed = list(candidates(shape, loop))
    peaks = []
    for _, name, function in timed:
        if not ("loop" in name and shape.length > LONG_LOOP):
            both(function)
        peaks.append(peak_memory(lambda function=function: both(function)))  # type: ignore[misc]
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in timed]
    sgemm = []
    # Token loops have turns of their own: what thousands of small tensors leave behind slows the others down.
    for are_loops in (False, True):
        group = [i for i, (_, name, _) in enumerate(timed) if ("loop" in name) == are_loops]
        turns = range(1 + (LOOP_REPEATS if are_loops else repeats))
        for repetition in [1] if are_loops and shape.length > LONG_LOOP else turns:
            for _ in range(0 if are_loops else 3):
                sgemm.append(clock(lambda: square @ square))
            for i in group:
                function = timed[i][2]
                # Each follows itself, so that none has to bring back what another drove out of the caches.
                if not are_loops:
                    forward_only(function)
                forward_s = clock(lambda function=function: forward_only(function))  # type: ignore[misc]
                both_s = clock(lambda function=function: both(function))  # type: ignore[misc]
                if repetition:  # the first one warms up
                    times[i][0].append(forward_s)
                    times[i][1].append(both_s)
    machine = 2 * 1024**3 / statistics.median(sgemm) / 1e9
    print(f"\n{shape}   sgemm {machine:.0f} GFLOP/s")
    rows = []
    for (rule, name, _), (forward_times, both_times), peak in zip(timed, times, peaks):
        forward_s, both_s = statistics.median(forward_times), statistics.median(both_times)
        quartiles = statistics.quantiles(both_times, n=4) if len(both_times) > 1 else [both_s] * 3
        spread = 100 * (quartiles[2] - quartiles[0]) / both_s
        rate = sum(flops(rule, shape)) / both_s / 1e9 if name == "native" else None
        share = None if rate is None else 100 * rate / machine
        row = Row(str(shape), shape.length, rule, name, forward_s * 1e3, both_s * 1e3, spread, rate, share, peak)
        rows.append(row)
        print(format_row(row), flush=True)
    return rows


def format_row(row: Row) -> str:
    rate = "" if row.gflops is None else f"{row.gflops:6.0f} GFLOP/s, {row.percent_of_sgemm:3.0f} % of sgemm"
    peak = "" if row.peak_mib is None else f"{row.peak_mib:8.0f} MiB"
    return (
        f"  {row.rule:<12} {row.implementation:<18} forward {row.forward_ms:9.2f} ms   forward + backward "
        f"{row.both_ms:9.2f} ms ± {row.spread_percent:2.0f} % {peak}  {rate}"
    )


def claims(rows: list[Row]) -> Iterator[str]:
    """The ratios that say how this package compares, from what was measured."""
    at = {(r.shape, r.rule, r.implementation): r for r in rows}
    first = str(SHAPES[0])

    def ratio(a: tuple[str, str, str], b: tuple[str, str, str], what: str) -> Iterator[str]:
        if a in at and b in at:
            yield f"{what}: {at[a].both_ms / at[b].both_ms:.2f}"

    yield from ratio((first, "sum", "native"), (first, "sum", "fast-transformers"), "sum, native / fast-transformers")
    chunked = [at[key] for key in ((first, "delta", "chunk"), (first, "delta", "fla, chunks")) if key in at]
    if chunked:
        best = min(chunked, key=lambda row: row.both_ms).implementation
        what = f"delta, native / best plain torch chunks ({best})"
        yield from ratio((first, "delta", "native"), (first, "delta", best), what)
    yield from ratio((first, "delta", "native"), (first, "sum", "native"), "delta / sum, native")
    last = str(sweep_shape(LENGTHS[-1]))
    for rule in ("sum", "delta"):
        small, large = at.get((last, rule, "native")), at.get((last, rule, "loop"))
        if small and large and small.peak_mib and large.peak_mib:
            ratio_of_peaks = small.peak_mib / large.peak_mib
            yield f"{rule}, peak memory at L = {LENGTHS[-1]}, native / token loop: {ratio_of_peaks:.3f}"


def growth(repeats: int) -> Iterator[str]:
    """What a token costs in a long sequence and in a short one, in turns: a machine's speed changes by the hour."""
    short, long = (make_inputs(sweep_shape(length)) for length in (512, LENGTHS[-1]))
    for rule in ("sum", "delta"):
        cases = [(ours("native", rule), inputs, torch.rand_like(inputs[2])) for inputs in (short, long)]
        ratios = []
        for _ in range(3 * repeats + 1):
            seconds = [clock(lambda case=case: forward_and_backward(*case)) for case in cases]  # type: ignore[misc]
            ratios.append(seconds[1] / seconds[0])
        ratio = statistics.median(ratios[1:])
        yield f"{rule}, native, time for a token at L = {LENGTHS[-1]} / at L = 512: {ratio:.2f}"


def is_sweep(row: Row) -> bool:
    return row.shape in {str(sweep_shape(length)) for length in LENGTHS}


def sweep_shape(length: int) -> Shape:
    return Shape(TOKENS // length, 4, length, 64, 64)


def plot(rows: list[Row], path: Path) -> None:
    """Time against length at a constant number of tokens, both axes logarithmic."""
    plt = import_pyplot()
    if plt is None:
        return
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    styles = {"sum": "-", "delta": "--", "gated-delta": ":", "softmax": "-."}
    names = list(dict.fromkeys(row.implementation for row in rows))
    for rule, name in dict.fromkeys((row.rule, row.implementation) for row in rows):
        line = [row for row in rows if (row.rule, row.implementation) == (rule, name) and is_sweep(row)]
        if len(line) > 1:
            axes.loglog(
                [row.length for row in line],
                [row.both_ms for row in line],
                styles[rule],
                marker="o",
                markersize=3,
                color=f"C{names.index(name)}",
                label=name if rule == "softmax" else f"{rule}, {name}",
                base=10,
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
    axes.set_xlabel(f"sequence length L, at B L = {TOKENS} tokens, 4 heads of 64")
    axes.set_ylabel("forward + backward, ms")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path)


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for the CSV file and the plot"
    )
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="repetitions, at least 3 (%(default)s)")
    parser.add_argument(
        "--only", choices=["shapes", "lengths", "first"], help="only this half, or only the first shape"
    )
    options = parser.parse_args()
    if options.repeats < 3:
        parser.error(f"--repeats is {options.repeats}, it must be at least 3")
    if native.unavailable is not None:
        print(f"operators.py: no compiled operators: {native.unavailable}", file=sys.stderr)
        return 1
    threads, vectors = torch.get_num_threads(), torch.ops.fwp_fairseq.instruction_set()
    print(f"torch {torch.__version__}, {threads} threads, native kernels: {vectors}")
    # The token loop keeps a memory per token: tens of gigabytes for the large ones of DPFP-2. It runs at the first and
    # the last length of the sweep only.
    shapes = [(shape, shape.d_k == shape.d_v) for shape in (SHAPES[:1] if options.only == "first" else SHAPES)]
    sweep = [(sweep_shape(length), length in (LENGTHS[0], LENGTHS[-1])) for length in LENGTHS]
    wanted = {None: shapes + sweep, "shapes": shapes, "first": shapes, "lengths": sweep}[options.only]
    options.output.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for shape, loop in wanted:
        rows += measure(shape, options.repeats, loop)
        write_csv(options.output / "operators.csv", Row._fields, rows)
    print()
    for claim in claims(rows):
        print(claim)
    if options.only in (None, "lengths"):
        for claim in growth(options.repeats):
            print(claim, flush=True)
    if options.only in (None, "lengths"):
        plot(rows, options.output / "operators.png")
    return 0


PEERS = peers()

if __name__ == "__main__":
    sys.exit(main())
