#!/usr/bin/env python3
"""Time the fast-weight operators on a GPU, beside other implementations: gpu-operators.csv and gpu-step.csv.

The recurrence in bfloat16, forward and forward + backward, and the step of decoding in float32. GPU time is that of a
captured graph, which goes through several sets of tensors, together larger than the second-level cache, divided by
their number (the chunks of plain torch operators have none: they are not for capturing); wall time is that of the same
calls from Python. Both are medians. A copy of a large tensor and a large
product of matrices are the machine's measure; the floor of a recurrence is the time in which a copy moves as many bytes
as its arguments and results have.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from shared import write_csv
from torch import Tensor

from fwp_fairseq.ops import fast_weight_scan, fla, native

# (B, H, L, Dk, Dv): a large model, the paper's small and medium language models, long sequences, and DPFP-2 features.
SCANS = [
    (16, 16, 2048, 64, 64),
    (96, 8, 256, 16, 16),
    (32, 8, 384, 32, 32),
    (4, 16, 8192, 64, 64),
    (8, 16, 1024, 256, 64),
]
# (rows, H, Dk, Dv).
STEPS = [(5, 8, 128, 64), (160, 8, 128, 64), (640, 16, 256, 64), (640, 16, 64, 64)]
REHEARSED_SCANS, REHEARSED_STEPS = [(1, 2, 40, 16, 16)], [(3, 2, 16, 8)]

RULES = ("sum", "delta", "gated-delta")
GIVEN = torch.bfloat16


class Times(NamedTuple):
    """Medians in milliseconds."""

    gpu: Optional[float]
    wall: float


class Clock:
    """Times calls with one of several sets of arguments; on a processor (a rehearsal) there is no GPU time."""

    def __init__(self, device: str, repeats: int) -> None:
        self.on_gpu = device == "cuda"
        self.repeats = repeats
        self.cache = torch.cuda.get_device_properties(0).L2_cache_size if self.on_gpu else 0

    def sets_of(self, size: int) -> int:
        """How many sets of arguments of ``size`` bytes are twice as large as the cache."""
        return min(64, max(1, -(-2 * self.cache // size)))

    def __call__(self, calls: list[Callable[[], object]], captured: bool = True) -> Times:
        wall = self.wall(calls)
        return Times(self.replayed(calls) if self.on_gpu and captured else None, wall)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def wall(self, calls: list[Callable[[], object]]) -> float:
        """Of a call among others, which the GPU may still be at when the next one is made."""
        calls = calls * max(1, -(-8 // len(calls)))
        found = []
        for repetition in range(self.repeats // 2 + 3):
            self.wait()
            start = time.perf_counter()
            for call in calls:
                call()
            self.wait()
            if repetition >= 3:  # the first ones compile and warm up
                found.append((time.perf_counter() - start) / len(calls) * 1e3)
        return statistics.median(found)

    def replayed(self, calls: list[Callable[[], object]]) -> float:
        """Of a call in a captured graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        found = []
        for repetition in range(self.repeats + 2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if repetition >= 2:
                found.append(start.elapsed_time(end) / len(calls))
        return statistics.median(found)


class Limits(NamedTuple):
    """What the machine does at most, as measured."""

    bytes_per_ms: float
    flops_per_ms: float


def measure_limits(clock: Clock, device: str) -> Limits:
    size = 2**30 if clock.on_gpu else 2**20
    a, b = (torch.empty(size // 4, device=device).normal_() for _ in range(2))
    copied = clock([lambda: torch.neg(a, out=b)])  # a kernel: it moves more than the engine for copies
    n = 8192 if clock.on_gpu else 64
    x, y = (torch.randn(n, n, device=device, dtype=GIVEN) for _ in range(2))
    multiplied = clock([lambda: x @ y])
    limits = Limits(2 * a.nbytes / (copied.gpu or copied.wall), 2 * n**3 / (multiplied.gpu or multiplied.wall))
    print(f"copying {limits.bytes_per_ms / 1e9:.2f} TB/s, bfloat16 products {limits.flops_per_ms / 1e9:.0f} TFLOP/s")
    return limits


# --- The recurrence ---------------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    decay: Tensor
    grad: Tensor

    def gates(self, rule: str) -> tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
        beta = None if rule == "sum" else self.beta
        return beta, beta, self.decay if rule == "gated-delta" else None


def make_inputs(shape: tuple[int, ...], device: str, by_head: bool) -> Inputs:
    """Random ones, laid out (B, H, L, D), or with the heads within the tokens: flash-linear-attention's own layout."""
    b, h, length, d_k, d_v = shape

    def laid_out(x: Tensor) -> Tensor:
        return x if by_head else x.transpose(1, 2).contiguous().transpose(1, 2)

    def draw(*size: int) -> Tensor:
        return torch.randn(b, h, length, *size, device=device)

    q, k = (laid_out(draw(d_k).softmax(-1).to(GIVEN)).requires_grad_() for _ in range(2))
    v, grad = (laid_out(draw(d_v).to(GIVEN)) for _ in range(2))
    beta, decay = (laid_out(draw().sigmoid()).requires_grad_() for _ in range(2))
    return Inputs(q, k, v.requires_grad_(), beta, decay, grad)


def runs(shape: tuple[int, ...], device: str, chosen: list[str]) -> list[tuple[str, str]]:
    """Rules, and implementations that have them; the one that tries out how to compile itself comes last."""
    *_, d_k, d_v = shape
    found = [("softmax", "torch SDPA")] if d_k == d_v else []
    backends = ["native", "chunk"] if device == "cpu" else ["triton", "native", "chunk"]
    found += [(rule, name) for rule in RULES for name in backends]
    if importlib.util.find_spec("fla") is not None and d_k <= fla.LARGEST_KEY:
        found += [(rule, "fla") for rule in RULES if rule != "sum"]
    return [run for run in found if not chosen or run[1] in chosen]


def time_scan(shape: tuple[int, ...], clock: Clock, limits: Limits, device: str, chosen: list[str]) -> list[list[Any]]:
    """Rows for one of the SCANS."""
    b, h, length, d_k, d_v = shape
    print(f"\n{b} x {h} x {length} x {d_k}/{d_v}", flush=True)
    size = b * h * length * (2 * d_k + 2 * d_v) * 2
    rows = []
    for rule, name in runs(shape, device, chosen):
        sets = [make_inputs(shape, device, name != "fla") for _ in range(clock.sets_of(size))]

        def forward(x: Inputs, rule: str = rule, name: str = name) -> Tensor:
            if rule == "softmax":
                return F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True)
            return fast_weight_scan(x.q, x.k, x.v, *x.gates(rule), backend=name)[0]

        def both(x: Inputs, forward: Callable[[Inputs], Tensor] = forward) -> object:
            leaves = (x.q, x.k, x.v, x.beta, x.decay)
            return torch.autograd.grad(forward(x), leaves, x.grad, allow_unused=True)

        try:
            with torch.no_grad():
                once = clock([lambda x=x: forward(x) for x in sets], name != "chunk")  # type: ignore[misc]
            whole = clock([lambda x=x: both(x) for x in sets], name != "chunk")  # type: ignore[misc]
        except Exception as error:  # of one implementation: the others are still worth knowing
            print(f"  {rule:<12} {name:<12} failed: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            continue
        share = size / limits.bytes_per_ms / (once.gpu or once.wall)
        rows.append([*shape, rule, name, *once, *whole, share])
        shown = [f"{x.gpu or 0:8.3f} ms (wall {x.wall:7.3f})" for x in (once, whole)]
        print(f"  {rule:<12} {name:<12} {shown[0]}   with backward {shown[1]}   floor {share:4.0%}", flush=True)
    return rows


# --- The step ---------------------------------------------------------------------------------------------------------


def time_step(sizes: tuple[int, ...], clock: Clock, device: str) -> list[list[Any]]:
    """The delta rule's step for one of the STEPS: rows in their places, and in an order that moves all of them.

    It reads and writes every memory once, as copying them does, of which its rate is a share.
    """
    rows, h, d_k, d_v = sizes
    features = native.AddressFeatures("dpfp", 1, "sum")
    states = [torch.randn(*sizes, device=device) for _ in range(clock.sets_of(rows * h * d_k * d_v * 4))]
    other = torch.empty_like(states[0])
    q, k = (torch.randn(rows, h, d_k // 2, device=device) for _ in range(2))
    v, beta = torch.randn(rows, h, d_v, device=device), torch.rand(rows, h, device=device)
    order, places = torch.randperm(rows, device=device), torch.arange(rows, device=device)
    nowhere: tuple[Optional[Tensor], Optional[Tensor]] = (None, None)

    def step(state: Tensor, moved: bool) -> Callable[[], object]:
        where = (order, places) if moved else nowhere
        return lambda: native.step(q, k, v, beta, beta, None, state, None, *where, features)

    copied = clock([lambda x=x: torch.neg(x, out=other) for x in states])  # type: ignore[misc]
    print(f"\n{rows} rows x {h} x {d_k}/{d_v}, {states[0].nbytes / 2**20:.2f} MiB", flush=True)
    found = []
    for name, calls in (("copy", None), ("in place", False), ("in beam order", True)):
        times = copied if calls is None else clock([step(state, calls) for state in states])
        share = (copied.gpu or copied.wall) / (times.gpu or times.wall)
        found.append([*sizes, name, *times, share])
        print(
            f"  {name:<14} {1e3 * (times.gpu or 0):8.1f} us (wall {1e3 * times.wall:7.1f})   {share:4.0%}", flush=True
        )
    return found


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the tables (default: only printed)")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="repetitions (%(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="of these implementations (default: all)")
    parser.add_argument("--shapes", type=int, default=len(SCANS), metavar="N", help="the first N shapes (%(default)s)")
    parser.add_argument("--no-steps", action="store_true", help="without the step of decoding")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the processor; figures mean nothing")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}, it must be at least 1")
    if not options.rehearse and not torch.cuda.is_available():
        print("gpu.py: torch finds no GPU on this machine (--rehearse runs without one).", file=sys.stderr)
        return 1
    if not options.rehearse and not native.supports("cuda"):
        print("gpu.py: this package was built without kernels for a GPU (see the main README).", file=sys.stderr)
        return 1
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
    device = "cpu" if options.rehearse else "cuda"
    clock = Clock(device, options.repeats)
    card = "a processor, as a rehearsal" if options.rehearse else torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {card}")
    limits = measure_limits(clock, device)
    header = ["b", "h", "length", "d_k", "d_v", "rule", "name"]
    header += ["forward_gpu_ms", "forward_wall_ms", "both_gpu_ms", "both_wall_ms", "floor_share"]
    rows: list[list[Any]] = []
    for shape in (REHEARSED_SCANS if options.rehearse else SCANS)[: options.shapes]:
        rows += time_scan(shape, clock, limits, device, options.only)
        if options.output:  # after each, since the time may end
            write_csv(options.output / "gpu-operators.csv", header, rows)
    rows = []
    for sizes in [] if options.no_steps else REHEARSED_STEPS if options.rehearse else STEPS:
        rows += time_step(sizes, clock, device)
        if options.output:
            write_csv(
                options.output / "gpu-step.csv",
                ["rows", "h", "d_k", "d_v", "order", "gpu_ms", "wall_ms", "share_of_copy"],
                rows,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
