"""Numeric conventions that every operator shares."""

import torch


def smallest_divisor(dtype: torch.dtype) -> float:
    """A floor for divisors: far below any sum of features that matters, yet its inverse squared is still finite."""
    return torch.finfo(dtype).tiny ** 0.5


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the state and of all accumulation for inputs of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
