"""The definition: fast weights one token at a time. Every other backend is tested against this file in float64.

Shapes here carry any leading dimensions: k: (..., Dk), v: (..., Dv), scalars: (...), memory W: (..., Dk, Dv).
"""

from typing import Optional

import torch
from torch import Tensor


def write_token(
    memory: Tensor,
    k: Tensor,
    v: Tensor,
    write: Optional[Tensor],
    erase: Optional[Tensor],
    decay: Optional[Tensor],
    max_norm: Optional[float] = None,
) -> Tensor:
    """The memory after one token: W_t = decay W_{t-1} + k ⊗ (write v − erase v̄), v̄ = decay W_{t-1}ᵀ k."""
    if decay is not None:
        memory = memory * decay[..., None, None]
    new_value = v if write is None else v * write[..., None]
    if erase is not None:
        new_value = new_value - erase[..., None] * read_token(memory, k)
    memory = memory + k[..., :, None] * new_value[..., None, :]
    if max_norm is not None:
        norm = memory.square().sum(dim=(-2, -1), keepdim=True)
        # The root only of norms that count: its slope at zero is infinite.
        memory = memory / torch.where(norm > max_norm**2, norm, max_norm**2).sqrt() * max_norm
    return memory


def read_token(memory: Tensor, q: Tensor) -> Tensor:
    """Wᵀ q: (..., Dk, Dv), (..., Dk) -> (..., Dv)."""
    return (q[..., None, :] @ memory).squeeze(-2)


def scan(
    q: Optional[Tensor],
    k: Tensor,
    v: Tensor,
    write: Optional[Tensor],
    erase: Optional[Tensor],
    decay: Optional[Tensor],
    initial_state: Tensor,
    max_norm: Optional[float] = None,
) -> tuple[Optional[Tensor], Tensor]:
    """Write every token in order; after each write read with its query, if there are queries.

    q, k: (B, H, L, Dk), v: (B, H, L, Dv), scalars: (B, H, L) or None, state: (B, H, Dk, Dv). Returns the read-outs
    (B, H, L, Dv), or None without queries, and the last memory.
    """
    memory = initial_state
    outputs = []
    for t in range(k.size(2)):
        write_t, erase_t, decay_t = (None if gate is None else gate[:, :, t] for gate in (write, erase, decay))
        memory = write_token(memory, k[:, :, t], v[:, :, t], write_t, erase_t, decay_t, max_norm)
        if q is not None:
            outputs.append(read_token(memory, q[:, :, t]))
    if q is None:
        return None, memory
    return torch.stack(outputs, dim=2), memory
