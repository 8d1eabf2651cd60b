"""Fast weights in parallel over time: matrix products within a chunk, the memory from chunk to chunk.

Within a chunk of C tokens that starts from memory W_0, let P[t, s] = decay_{s+1} ... decay_t be what is left at token t
of something written at s, and g_t = decay_1 ... decay_t. With u_t the value that is written at t in the end,

    W_t = g_t W_0 + Σ_{s≤t} P[t, s] k_s ⊗ u_s
    u_t = write_t v_t − erase_t v̄_t,   v̄_t = g_t W_0ᵀ k_t + Σ_{s<t} P[t, s] (k_s · k_t) u_s

The second line is a unit-lower-triangular system for all u of the chunk at once, the WY form of the product of the
chunk's rank-one updates:

    (I + A) U = diag(write) V − diag(erase ⊙ g) K W_0,   A[t, s] = erase_t P[t, s] (k_t · k_s) for s < t

and the read-outs are O = diag(g) Q W_0 + (P ⊙ Q Kᵀ, lower triangle with the diagonal) U. Without erase there is nothing
to solve. See Bischof and Van Loan (1987) for the WY form, Yang et al. (2024) for its use with the delta rule.

The backward pass keeps the memories at chunk borders only, and recomputes each chunk, last chunk first, to
differentiate it: peak memory is one chunk's matrices plus L / C memories, not a memory per token.
"""

from collections.abc import Sequence
from functools import partial
from typing import Optional, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fwp_fairseq.ops.torch_modes import differentiate_once, is_exported_for_any, is_transformed

# Bounds the share of work that grows with C (the C x C products) against the number of sequential steps.
DEFAULT_CHUNK_SIZE = 64

# (q, k, v, write, erase, decay), as _advance takes them.
_Chunk = tuple[Optional[Tensor], Tensor, Tensor, Optional[Tensor], Optional[Tensor], Optional[Tensor]]


def remaining_shares(decay: Tensor) -> Tensor:
    """P[t, s] = decay_{s+1} ... decay_t for s <= t, 0 above. Shape: (..., C) -> (..., C, C).

    Cumulative products of the factors themselves, not exponentials of differences of logarithms: exact when a factor
    is 0, and no cancellation.
    """
    length = decay.size(-1)
    below_diagonal = torch.ones(length, length, dtype=torch.bool, device=decay.device).tril(-1)
    factors = torch.where(below_diagonal, decay[..., :, None], torch.ones_like(decay)[..., :, None])
    return factors.cumprod(dim=-2).tril()


def _advance(
    q: Optional[Tensor],
    k: Tensor,
    v: Tensor,
    write: Optional[Tensor],
    erase: Optional[Tensor],
    decay: Optional[Tensor],
    memory: Tensor,
) -> tuple[Optional[Tensor], Tensor]:
    """One chunk: read-outs (None without queries) and the memory after it. Differentiable torch code."""
    remaining = None if decay is None else remaining_shares(decay)
    from_start = None if decay is None else decay.cumprod(dim=-1)

    values = v if write is None else v * write[..., None]
    if erase is not None:
        overlap = k @ k.transpose(-1, -2)
        if remaining is not None:
            overlap = overlap * remaining
        retrieved = k @ memory
        old = erase if from_start is None else erase * from_start
        # solve_triangular reads the strict lower triangle only: the unit diagonal is implied.
        values = torch.linalg.solve_triangular(
            overlap * erase[..., None], values - retrieved * old[..., None], upper=False, unitriangular=True
        )

    out = None
    if q is not None:
        scores = q @ k.transpose(-1, -2)
        scores = scores.tril() if remaining is None else scores * remaining
        from_memory = q @ memory
        if from_start is not None:
            from_memory = from_memory * from_start[..., None]
        out = from_memory + scores @ values

    if remaining is not None and from_start is not None:
        values = values * remaining[..., -1, :, None]
        memory = memory * from_start[..., -1, None, None]
    return out, memory + k.transpose(-1, -2) @ values


class _ChunkwiseScan(torch.autograd.Function):
    """Chunk after chunk; saves the inputs and the memories at chunk borders."""

    @staticmethod
    def forward(ctx, chunk_size, q, k, v, write, erase, decay, initial_state):  # type: ignore[no-untyped-def]
        sequences = (q, k, v, write, erase, decay)
        out, borders = _advance_all(chunk_size, sequences, initial_state)
        ctx.chunk_size = chunk_size
        ctx.save_for_backward(*sequences, *borders[:-1])
        return out, borders[-1]

    @staticmethod
    def backward(ctx, grad_out, grad_memory):  # type: ignore[no-untyped-def]
        gradients = partial(_differentiate_all, ctx.chunk_size, ctx.needs_input_grad[1:7])
        return None, *differentiate_once(gradients, grad_out, grad_memory, *ctx.saved_tensors)


def _advance_all(chunk_size: int, sequences: _Chunk, memory: Tensor) -> tuple[Optional[Tensor], list[Tensor]]:
    """Chunk after chunk: read-outs, and the memories at chunk borders, the last one included."""
    reads, borders = [], [memory]
    for start in range(0, sequences[1].size(2), chunk_size):
        read, memory = _advance(*_cut(sequences, start, chunk_size), memory)
        reads.append(read)
        borders.append(memory)
    return (None if reads[0] is None else torch.cat(cast(list[Tensor], reads), dim=2)), borders


def _differentiate_all(
    chunk_size: int, wanted: Sequence[bool], grad_out: Tensor, grad_memory: Tensor, *saved: Tensor
) -> tuple[Optional[Tensor], ...]:
    """Gradients of the sequences, as far as they are wanted, and of the initial state."""
    sequences, borders = cast(_Chunk, saved[:6]), saved[6:]
    grads = [torch.empty_like(x) if x is not None and want else None for x, want in zip(sequences, wanted)]
    for index in reversed(range(len(borders))):
        start = index * chunk_size
        chunk = cast(_Chunk, [None if x is None else x.detach() for x in _cut(sequences, start, chunk_size)])
        memory = borders[index].detach().requires_grad_()
        inputs = [x.requires_grad_() for x, want in zip(chunk, wanted) if x is not None and want]
        with torch.enable_grad():
            read, next_memory = _advance(*chunk, memory)
        outputs, output_grads = [next_memory], [grad_memory]
        if read is not None:
            outputs.append(read)
            output_grads.append(grad_out[:, :, start : start + chunk_size])
        *chunk_grads, grad_memory = torch.autograd.grad(outputs, [*inputs, memory], output_grads)
        for grad in grads:
            if grad is not None:
                grad[:, :, start : start + chunk_size] = chunk_grads.pop(0)
    return *grads, grad_memory


def _cut(sequences: _Chunk, start: int, size: int) -> _Chunk:
    return cast(_Chunk, tuple(None if x is None else x[:, :, start : start + size] for x in sequences))


def scan(
    q: Optional[Tensor],
    k: Tensor,
    v: Tensor,
    write: Optional[Tensor],
    erase: Optional[Tensor],
    decay: Optional[Tensor],
    initial_state: Tensor,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> tuple[Optional[Tensor], Tensor]:
    """Same contract as ``token_loop.scan``, for any length and any chunk size from 1 up."""
    if chunk_size < 1:
        raise ValueError(f"chunk size is {chunk_size}, it must be at least 1")
    if q is None and erase is None:
        # Only the sum of writes is wanted: one product over the whole sequence, no C x C matrix to bound.
        return None, _sum_of_writes(k, v, write, decay, initial_state)
    if is_exported_for_any(k.size(2)) or k.size(2) <= chunk_size:
        # One chunk's matrices are what the backward pass would recompute: keep them. An exported program cannot count
        # chunks, and takes a sequence of any length for one.
        return _advance(q, k, v, write, erase, decay, initial_state)
    if is_transformed():
        out, borders = _advance_all(chunk_size, (q, k, v, write, erase, decay), initial_state)
        return out, borders[-1]
    return _ChunkwiseScan.apply(chunk_size, q, k, v, write, erase, decay, initial_state)


def _sum_of_writes(k: Tensor, v: Tensor, write: Optional[Tensor], decay: Optional[Tensor], memory: Tensor) -> Tensor:
    """W_L = g_L W_0 + Σ_s P[L, s] write_s k_s ⊗ v_s."""
    scale = write
    if decay is not None:
        # Remaining share of each write at the end: products of all later factors.
        later = F.pad(decay, (0, 1), value=1)[..., 1:]
        left = later.flip(-1).cumprod(dim=-1).flip(-1)
        scale = left if scale is None else scale * left
        memory = memory * decay.prod(dim=-1)[..., None, None]
    values = v if scale is None else v * scale[..., None]
    return memory + k.transpose(-1, -2) @ values
