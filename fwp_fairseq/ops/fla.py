"""The delta rules by flash-linear-attention's Triton kernels: a backend for a GPU, where that package is installed.

https://github.com/fla-org/flash-linear-attention, version 0.6.0: ``chunk_delta_rule`` and ``chunk_gated_delta_rule``,
which have the same recurrence with layout (B, L, H, D) and a query scale, here 1. Nothing is imported until it is used.
"""

import importlib
from typing import Any, Optional

import torch
from torch import Tensor

# chunk_gated_delta_rule_fwd_h, which both use, asserts it.
LARGEST_KEY = 256


def scan(
    q: Optional[Tensor],
    k: Tensor,
    v: Tensor,
    write: Optional[Tensor],
    erase: Optional[Tensor],
    decay: Optional[Tensor],
    initial_state: Optional[Tensor],
) -> tuple[Optional[Tensor], Tensor]:
    """Same contract as ``token_loop.scan``, for half-precision tensors on a GPU and rules with erase equal to write.

    Raises ValueError for what those kernels do not have, RuntimeError without the package.
    """
    beta = _check(q, k, v, write, erase)
    sequences = [None if x is None else x.transpose(1, 2) for x in (q, k, v, beta, decay)]
    queries, keys, values, strengths, kept = sequences
    assert keys is not None and strengths is not None
    options: dict[str, Any] = {"scale": 1.0, "initial_state": initial_state, "output_final_state": True}
    # Without queries something has to be read all the same.
    queries = torch.zeros_like(keys) if queries is None else queries
    if kept is None:
        kernel = _find("delta_rule", "chunk_delta_rule")
        out, state = kernel(queries, keys, values, strengths.to(keys.dtype), **options)
    else:
        # It takes the logarithm, which has no zero; the smallest normal number forgets as much.
        floor = torch.finfo(torch.float32).tiny
        kernel = _find("gated_delta_rule", "chunk_gated_delta_rule")
        out, state = kernel(queries, keys, values, kept.float().clamp(min=floor).log(), strengths, **options)
    return (None if q is None else out.transpose(1, 2)), state


def _check(q: Optional[Tensor], k: Tensor, v: Tensor, write: Optional[Tensor], erase: Optional[Tensor]) -> Tensor:
    """The write strength, if the kernels have everything that is asked for."""
    if k.device.type != "cuda":
        raise ValueError(f"backend is 'fla', which needs tensors on a GPU, these are on {k.device.type}")
    types = {x.dtype for x in (q, k, v) if x is not None}
    if len(types) > 1 or not types <= {torch.bfloat16, torch.float16}:
        names = ", ".join(sorted(str(dtype) for dtype in types))
        raise ValueError(f"backend is 'fla', which takes q, k and v all in bfloat16 or all in float16, not {names}")
    if k.size(3) > LARGEST_KEY:
        raise ValueError(f"backend is 'fla', which has keys of at most {LARGEST_KEY} features, these have {k.size(3)}")
    if write is None or erase is None or (erase is not write and not _equal(erase, write)):
        raise ValueError("backend is 'fla', which has the delta rules only: erase must equal write")
    return write


def _equal(a: Tensor, b: Tensor) -> bool:
    # Comparing values would make the processor wait for the GPU; rules pass one tensor twice, or views of one.
    same = a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    return same and a.requires_grad == b.requires_grad


def _find(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(f"fla.ops.{module}"), name)
    except ImportError as error:
        raise RuntimeError(
            f"backend is 'fla', but flash-linear-attention cannot be imported ({error}); "
            "to install it: pip install flash-linear-attention==0.6.0"
        ) from error
