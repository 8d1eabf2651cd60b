#!/usr/bin/env python3
"""Time the fast-weight operators on a GPU: the recurrence beside other implementations, and the decoding step.

The recurrence in bfloat16, forward and forward + backward, medians of single runs between events of the GPU. The step
reads and writes every memory once; its rate is given as a share of that of copying a tensor of that size, which does
the same. Nothing is kept between runs but what the caches of the GPU keep, for all alike.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from fwp_fairseq.ops import fast_weight_scan, fla, native

# (B, H, L, Dk, Dv): the paper's small and medium language models, heads of 64, and DPFP-2 features for such values.
SCANS = [
    (96, 8, 256, 16, 16),
    (32, 8, 384, 32, 32),
    (16, 16, 2048, 64, 64),
    (4, 16, 8192, 64, 64),
    (8, 16, 1024, 256, 64),
]
# (rows, H, Dk, Dv).
STEPS = [(5, 8, 128, 64), (160, 8, 128, 64), (640, 16, 256, 64), (640, 16, 64, 64)]


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Median of single runs."""
    times = []
    for repetition in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        if repetition >= 3:  # the first ones compile and warm up
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def time_scan(b: int, h: int, length: int, d_k: int, d_v: int, repeats: int) -> None:
    """The recurrence for one of the SCANS."""
    print(f"\n{b} x {h} x {length} x {d_k}/{d_v}, bfloat16")
    q, k = (torch.rand(b, h, length, d_k, device="cuda").softmax(-1).bfloat16().requires_grad_() for _ in range(2))
    v = torch.randn(b, h, length, d_v, device="cuda").bfloat16().requires_grad_()
    beta, decay = (torch.rand(b, h, length, device="cuda").requires_grad_() for _ in range(2))
    gates = {"sum": (None, None, None), "delta": (beta, beta, None), "gated-delta": (beta, beta, decay)}
    grad = torch.randn_like(v)

    def ours(rule: str, backend: str) -> Callable[[], Tensor]:
        return lambda: fast_weight_scan(q, k, v, *gates[rule], backend=backend)[0]

    def softmax() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def time(rule: str, name: str, function: Callable[[], Tensor]) -> None:
        def both() -> object:
            return torch.autograd.grad(function(), (q, k, v, beta, decay), grad, allow_unused=True)

        with torch.no_grad():
            forward = milliseconds(function, repeats)
        whole = milliseconds(both, repeats)
        print(f"  {rule:<12} {name:<12} forward {forward:8.3f} ms   forward + backward {whole:8.3f} ms", flush=True)

    with_fla = importlib.util.find_spec("fla") is not None and d_k <= fla.LARGEST_KEY
    for rule in gates:
        for backend in ("triton", "native", "chunk", *(("fla",) if with_fla and rule != "sum" else ())):
            time(rule, backend, ours(rule, backend))
    if d_k == d_v:
        time("softmax", "torch SDPA", softmax)


def time_step(rows: int, h: int, d_k: int, d_v: int, repeats: int) -> None:
    """The delta rule's step for one of the STEPS: rows in their places, and in an order that moves all of them."""
    state = torch.randn(rows, h, d_k, d_v, device="cuda")
    other = torch.empty_like(state)
    q, k = (torch.randn(rows, h, d_k // 2, device="cuda") for _ in range(2))
    v, beta = torch.randn(rows, h, d_v, device="cuda"), torch.rand(rows, h, device="cuda")
    order, places = torch.randperm(rows, device="cuda"), torch.arange(rows, device="cuda")
    features = native.AddressFeatures("dpfp", 1, "sum")

    def step(order: Optional[Tensor], places: Optional[Tensor]) -> object:
        return native.step(q, k, v, beta, beta, None, state, None, order, places, features)

    copied = milliseconds(lambda: other.copy_(state), repeats)
    rate = 2 * state.nbytes / 2**30 / copied * 1e3
    print(f"\n{rows} rows x {h} x {d_k}/{d_v}, float32: copy {rate:6.0f} GiB/s")
    for name, taken in (
        ("in place", milliseconds(lambda: step(None, None), repeats)),
        ("in beam order", milliseconds(lambda: step(order, places), repeats)),
    ):
        print(f"  step {name:<14} {taken * 1e3:8.1f} us, {100 * copied / taken:3.0f} % of the copy's rate", flush=True)


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="repetitions (%(default)s)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu.py: torch finds no GPU on this machine.", file=sys.stderr)
        return 1
    if not native.supports("cuda"):
        print("gpu.py: this package was built without kernels for a GPU (see the main README).", file=sys.stderr)
        return 1
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    for shape in SCANS:
        time_scan(*shape, repeats=options.repeats)
    for sizes in STEPS:
        time_step(*sizes, repeats=options.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
