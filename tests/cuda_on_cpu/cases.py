"""What the kernels are tried on, and how far they are from the definition."""

import faulthandler
import os
import signal
from collections.abc import Callable
from typing import Any, Optional

import torch
from emulator import Kernels, LaunchError
from registered import features_of
from test_decoding import Hypotheses, test_rows_read_the_memory_they_share
from test_ops_contract import make_inputs
from torch import Tensor

from fwp_fairseq.ops import native, token_loop
from fwp_fairseq.ops.numerics import state_dtype

Uses = tuple[bool, bool, bool]


def scan_errors(
    kernels: Kernels,
    shape: tuple[int, ...],
    uses: Uses,
    dtype: torch.dtype,
    *,
    initial: bool = True,
    queries: bool = True,
    grad_state: bool = True,
    multiprocessors: int = 1,
    **change: Any,
) -> dict[str, float]:
    """Errors of values and gradients against the float64 loop, relative to the largest value that is above one."""
    inputs = {**make_inputs(shape, uses, dtype), **change}
    if not initial:
        inputs["initial_state"] = None
    if not queries:
        inputs["q"] = None
    wide = state_dtype(dtype)
    for name in ("write", "erase", "decay"):
        inputs[name] = None if inputs[name] is None else inputs[name].to(wide)
    arguments = list(inputs.values())
    out, state, borders = kernels.scan(*arguments, True, multiprocessors=multiprocessors)

    leaves = [None if x is None else x.detach().double().requires_grad_() for x in arguments]
    start = leaves[-1] if initial else torch.zeros(*shape[:2], *shape[3:], dtype=torch.float64)
    exact_out, exact_state = token_loop.scan(*leaves[:-1], start)
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(*shape[:3], shape[4], dtype=torch.float64, generator=generator).to(dtype)
    grad_final = torch.randn(exact_state.shape, dtype=torch.float64, generator=generator).to(wide)
    loss = exact_state.sum() * 0
    if queries:
        loss = loss + (exact_out * grad_out.double()).sum()
    if grad_state:
        loss = loss + (exact_state * grad_final.double()).sum()
    found = kernels.scan_backward(
        grad_out if queries else None, grad_final if grad_state else None, *arguments, borders,
        multiprocessors=multiprocessors,
    )  # fmt: skip

    expected = {f"d_{n}": x for n, x in zip(inputs, leaves) if x is not None}
    gradients = torch.autograd.grad(loss, list(expected.values()), allow_unused=True)
    errors = {"state": _error(state, exact_state)}
    if queries:
        errors["out"] = _error(out, exact_out)
    actual = [x for x in found if x is not None]
    assert len(actual) == len(gradients)
    for name, a, e in zip(expected, actual, gradients):
        errors[name] = _error(a, torch.zeros_like(a) if e is None else e)
    return errors


def _error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    error = (actual.double() - expected.detach()).abs().max().item()
    return error / max(1.0, expected.abs().max().item()) if error == error else float("inf")


def decoding_error(
    kernels: Kernels,
    rule: str,
    feature_map: str,
    normalization: str,
    normalized: bool,
    orders: list[Optional[list[int]]],
    rows: int = 6,
) -> float:
    """The largest error of steps of the rows that ``orders`` leaves, in read-outs and memories."""
    # As many features as two warps have threads, and a bit more.
    features = (
        features_of(feature_map, normalization, 70 if feature_map == "elu" else 18, dpfp_nu=2, favor_features=35)
        .eval()
        .double()
    )
    hypotheses = Hypotheses(rule, features, rows, 37 if rows < 100 else 2, normalized, torch.float32)
    worst = 0.0
    plain, native.step = native.step, kernels.step
    try:
        for i, order in enumerate(orders):
            rows = hypotheses.exact.size(0) if order is None else len(order)
            padding = None if i % 3 != 1 else torch.arange(rows) % 4 == 1
            found, expected = hypotheses.step(None if order is None else torch.tensor(order), padding)
            worst = max(worst, _error(found, expected), _error(hypotheses.rows(), hypotheses.exact))
    finally:
        native.step = plain
    return worst


def in_child(check: Callable[[], bool]) -> bool:
    """Whether a check holds, in a process of its own: it may end it."""
    child = os.fork()
    if not child:
        faulthandler.disable()
        signal.alarm(30)  # for a loop without end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            os._exit(0 if check() else 1)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def scans_are_right(kernels: Kernels) -> bool:
    """What takes least time comes first: most mistakes show in all of it."""
    for shape, uses, options in (
        ((1, 1, 40, 8, 20), (True, True, True), {}),
        ((1, 1, 40, 8, 20), (False, False, False), {}),
        ((1, 1, 40, 8, 20), (False, True, False), {"queries": False}),
        ((1, 1, 40, 8, 20), (False, False, True), {"queries": False}),
        ((1, 1, 150, 40, 40), (True, True, False), {}),
        ((1, 2, 150, 40, 20), (True, True, True), {}),
    ):
        try:
            errors = scan_errors(kernels, shape, uses, torch.float64 if options else torch.float32, **options)
        except LaunchError:
            return False
        if max(errors.values()) > 2e-5:
            return False
    return True


def steps_are_right(kernels: Kernels) -> bool:
    """What takes least time comes first: most mistakes show in all of it."""
    orders = [None, [5, 5, 5, 0, 1, 1], [2, 2, 2, 2, 2, 2], [3, 1, 1, 0], [1, 1, 0]]
    try:
        return (
            all(reads_are_right(kernels, normalized) for normalized in (False, True))
            and all(
                decoding_error(kernels, "gated-delta", *reading, orders) < 1e-4
                for reading in (("dpfp", "sum", True), ("favor", "sum", True), ("favor", "l2", False))
            )
            and decoding_error(kernels, "sum", "elu", "sum", False, [[i // 2 for i in range(280)]], rows=280) < 1e-4
        )
    except LaunchError:
        return False


def reads_are_right(kernels: Kernels, normalized: bool) -> bool:
    plain, native.read = native.read, kernels.read
    try:
        test_rows_read_the_memory_they_share("dpfp", "sum", normalized)
        return True
    except AssertionError:
        return False
    finally:
        native.read = plain


def all_is_right(kernels: Kernels, file: str, seed: int) -> bool:
    """Whether what uses a source file gives what it should, with one order of threads."""
    kernels.seed(seed)
    return scans_are_right(kernels) if "scan" in file else steps_are_right(kernels)
