"""Numeric conventions that every operator shares."""

from typing import Optional

import torch
from torch import Tensor

from fwp_fairseq.ops.torch_modes import is_exported_for_any


def smallest_divisor(dtype: torch.dtype) -> float:
    """A floor for divisors: far below any sum of features that matters, yet its inverse squared is still finite."""
    return torch.finfo(dtype).tiny ** 0.5


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the state and of all accumulation for inputs of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def inputs_of_kernels(
    q: Optional[Tensor],
    k: Tensor,
    v: Tensor,
    write: Optional[Tensor],
    erase: Optional[Tensor],
    decay: Optional[Tensor],
    initial_state: Optional[Tensor],
) -> tuple[tuple[Optional[Tensor], ...], bool]:
    """The arguments of a scan in the types that compiled code reads, and whether to keep what a backward pass needs."""
    dtype = torch.promote_types(k.dtype, v.dtype)
    # What is not a type of the kernels (float8, say) is computed in the type of the state.
    dtype = dtype if dtype in _FLOATS else state_dtype(dtype)
    sequences = (None if x is None else x.to(dtype) for x in (q, k, v))
    gates = (None if x is None else x.to(state_dtype(dtype)) for x in (write, erase, decay))
    inputs = (*sequences, *gates, initial_state)
    differentiable = any(x is not None and x.requires_grad for x in inputs)
    # How many memories are kept for a backward pass depends on the length: none by a program for any length.
    return inputs, torch.is_grad_enabled() and differentiable and not is_exported_for_any(k.size(2))
