"""Fast weights whose norm is bounded after each write (FWM, sec. 6.1.2), in parallel over time as far as they can be.

    W'_t = W_{t-1} + k_t ⊗ u_t,   u_t = write_t v_t − erase_t v̄_t,   v̄_t = W_{t-1}ᵀ k_t
    W_t  = s_t W'_t,              s_t = M / max(M, ‖W'_t‖)

The scale s_t acts as a decay that depends on the data. Within a chunk that starts from memory W_0, let
F[t, r] = s_{r+1} ... s_t be what is left at token t of what the memory was after token r, and f_t = s_1 ... s_t. Then

    W_t = f_t W_0 + Σ_{r≤t} F[t, r] s_r k_r ⊗ u_r

so that v̄_t comes from W_0ᵀ k_t, the products k_r · k_t and the earlier u. So does the norm:

    ‖W'_t‖² = ‖W_{t-1}‖² + u_t · (2 v̄_t + ‖k_t‖² u_t)

Only vectors of the size of a value and scalars go from token to token; matrices only from chunk to chunk. Shares are
products of scales and never quotients, so that nothing is lost however strongly the memory is scaled down.

Backward, with H_t the gradient of W_t, G_t that of W'_t and g_t = G_tᵀ k_t that of u_t, where the bound holds:

    G_t = s_t (H_t − μ_t W_t),   μ_t = <H_t, W_t> / M²   (else μ_t = 0)
    H_{t-1} = q_{t-1} ⊗ do_{t-1} + G_t − erase_t k_t ⊗ g_t

<H_t, W_t> needs no matrices either. G_t is orthogonal to W'_t where the bound holds, and else <G_t, W'_t> = <H_t, W_t>:

    <H_{t-1}, W_{t-1}> = do_{t-1} · o_{t-1} + <G_t, W'_t> − write_t v_t · g_t

The forward pass keeps all u and s, and the memories at chunk borders.
"""

from functools import partial
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from fwp_fairseq.ops import token_loop
from fwp_fairseq.ops.chunkwise import remaining_shares
from fwp_fairseq.ops.torch_modes import differentiate_once, is_transformed

# Long chunks cost products within them, short ones passes over the memory. (For 32 memories of 128 x 200.)
DEFAULT_CHUNK_SIZE = 32


class _Chunk(NamedTuple):
    """Some tokens of N memories. k, q: (N, C, Dk), values (write · v): (N, C, Dv), erase: (N, C, 1)."""

    q: Optional[Tensor]
    k: Tensor
    values: Tensor
    erase: Tensor


def _write(chunk: _Chunk, memory: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """The vectors u (N, C, Dv) that are written in the end, and the scales s (N, C, 1)."""
    _, k, values, erase = chunk
    bound = max_norm**2
    overlap = k @ k.transpose(-1, -2)
    written = torch.empty_like(values, memory_format=torch.contiguous_format)
    scales = torch.empty_like(erase, memory_format=torch.contiguous_format)
    shares = torch.zeros_like(overlap[:, :1])  # of each write in W_{t-1}
    from_start = torch.ones_like(erase[:, 0])
    norm = torch.linalg.vector_norm(memory, dim=(-2, -1)).square()[:, None]
    squares = overlap.diagonal(dim1=-2, dim2=-1)[..., None].unbind(1)
    tokens = (x.unbind(1) for x in (k @ memory, values, -erase, scales, written))
    for t, (from_memory, value, minus_erase, scale, u) in enumerate(zip(*tokens)):
        old = from_memory * from_start
        if t:
            old += ((shares[..., :t] * overlap[:, t : t + 1, :t]) @ written[:, :t]).squeeze(1)
        torch.addcmul(value, minus_erase, old, out=u)
        norm = norm + (u * (2 * old).addcmul_(squares[t], u)).sum(-1, keepdim=True)
        # Exactly 1 below the bound, which is how the backward pass tells.
        torch.div(max_norm, norm.clamp(min=0).sqrt_().clamp_(min=max_norm), out=scale)
        norm = norm.clamp(max=bound)
        shares[..., t] = 1
        shares *= scale[..., None]
        from_start = from_start * scale
    return written, scales


class _Shares(NamedTuple):
    """What is left in the memory W_t after each token t of a chunk."""

    of_start: Tensor  # f_t, of W_0: (N, C, 1)
    of_memory: Tensor  # F[t, r], of W_r: (N, C, C), r <= t
    of_writes: Tensor  # F[t, r] s_r, of k_r ⊗ u_r

    @classmethod
    def of(cls, scales: Tensor) -> "_Shares":
        remaining = remaining_shares(scales[..., 0])
        return cls(scales.cumprod(dim=1), remaining, remaining * scales.transpose(1, 2))

    def one_earlier(self) -> "_Shares":
        """The same in W_{t-1}."""
        first = torch.ones_like(self.of_start[:, :1])
        none = torch.zeros_like(self.of_memory[:, :1])
        return _Shares(*(torch.cat([x, y[:, :-1]], dim=1) for x, y in zip((first, none, none), self)))


def _read(q: Tensor, k: Tensor, written: Tensor, shares: _Shares, memory: Tensor) -> Tensor:
    """What every query reads after the write of its token: (N, C, Dv)."""
    return (q @ memory).mul_(shares.of_start) + ((q @ k.transpose(-1, -2)) * shares.of_writes) @ written


def _finish(k: Tensor, written: Tensor, shares: _Shares, memory: Tensor) -> Tensor:
    """The memory after the chunk."""
    left = shares.of_writes[:, -1, :, None]
    return torch.baddbmm(memory * shares.of_start[:, -1:], k.transpose(-1, -2), written * left)


def _differentiate(
    chunk: _Chunk,
    written: Tensor,
    scales: Tensor,
    memory: Tensor,
    next_memory: Tensor,
    grad_out: Optional[Tensor],
    grad_memory: Tensor,
    max_norm: float,
) -> tuple[Optional[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, values and erase of a chunk, and of the memory from which it starts.

    ``grad_memory`` is that of ``next_memory``, the memory after the chunk.

    H_t is F[C, t] H_C + Σ_{r≥t} F[r, t] q_r ⊗ do_r, which is known, less Σ_{r>t} F[r-1, t] erase_r k_r ⊗ g_r, and less
    Σ_{r>t} F[r, t] μ_r W_r, of which only the shares of W_0 and of the writes are kept.
    """
    q, k, values, erase = chunk
    length = k.size(1)
    shares = _Shares.of(scales)
    earlier = shares.one_earlier()
    overlap = k @ k.transpose(-1, -2)
    from_memory = k @ memory

    known = (k @ grad_memory).mul_(shares.of_memory[:, -1, :, None])
    grad_q, reads = None, None
    if q is not None and grad_out is not None:
        seen = (grad_out @ written.transpose(-1, -2)).mul_(shares.of_writes)
        grad_q = torch.baddbmm((grad_out @ memory.transpose(-1, -2)).mul_(shares.of_start), seen, k)
        reads = (q * grad_q).sum(-1, keepdim=True)  # do_t · o_t
        known.baddbmm_((q @ k.transpose(-1, -2)).mul_(shares.of_memory).transpose(-1, -2), grad_out)

    # Later g and all u below each other, and what they are multiplied with, for one product at each token.
    vectors = torch.cat([torch.empty_like(written), written], dim=1)
    by_later = (earlier.of_memory * overlap).mul_(erase).neg_().transpose(-1, -2)
    factors = torch.cat([by_later, torch.empty_like(overlap)], dim=-1)
    share = torch.cat([shares.of_writes, shares.of_start], dim=-1)  # of each write, and of W_0, in W_t
    removed = torch.zeros_like(share[:, 0])
    all_removed = torch.empty_like(share)
    bounded = (scales < 1).to(scales.dtype)
    product = (grad_memory * next_memory).sum(dim=(-2, -1))[:, None]  # <H_t, W_t>, without what token t reads
    tokens = (x.unbind(1) for x in (known, from_memory, scales, bounded, share, overlap, values, all_removed))
    for t, (g, start, scale, bound, share_t, overlap_t, value, removed_t) in reversed(list(enumerate(zip(*tokens)))):
        if reads is not None:
            product = product + reads[:, t]
        removed.addcmul_(product * bound, share_t, value=max_norm**-2)
        removed_t.copy_(removed)
        torch.mul(removed[:, :-1], overlap_t, out=factors[:, t, length:]).neg_()
        g += (factors[:, t : t + 1, t + 1 :] @ vectors[:, t + 1 :]).squeeze(1)
        g.addcmul_(removed[:, -1:], start, value=-1).mul_(scale)
        vectors[:, t] = g
        product = torch.addcmul(product, product, bound, value=-1) - (value * g).sum(-1, keepdim=True)
        removed *= scale
    grad_written = vectors[:, :length]

    # k_t is where u_t is written, which gives G_t u_t, and what retrieves v̄_t, which gives −erase_t W_{t-1} g_t.
    erased = grad_written @ written.transpose(-1, -2)
    among = (erased * earlier.of_writes).mul_(erase)
    among = among + among.transpose(-1, -2)
    among += (written @ written.transpose(-1, -2)).mul_(all_removed[..., :-1]).mul_(scales)
    with_memory = written * (scales * all_removed[..., -1:]) + grad_written * (earlier.of_start * erase)
    grad_k = (written @ grad_memory.transpose(-1, -2)).mul_(shares.of_writes[:, -1, :, None])
    grad_k.baddbmm_(with_memory, memory.transpose(-1, -2), alpha=-1).baddbmm_(among, k, alpha=-1)

    old = (from_memory * earlier.of_start).baddbmm_(earlier.of_writes * overlap, written)
    grad_erase = -(grad_written * old).sum(-1, keepdim=True)

    grad_start = grad_memory * shares.of_start[:, -1:] - memory * removed[:, -1:, None]
    at_keys = grad_written * (earlier.of_start * erase) + written * removed[:, :-1, None]
    grad_start.baddbmm_(k.transpose(-1, -2), at_keys, alpha=-1)
    if q is not None and grad_out is not None:
        grad_k.baddbmm_(seen.transpose(-1, -2), q)
        grad_start.baddbmm_(q.transpose(-1, -2), grad_out * shares.of_start)
    return grad_q, grad_k, grad_written, grad_erase, grad_start


class _BoundedScan(torch.autograd.Function):
    """Chunk after chunk; saves the inputs, what was written, the scales and the memories at chunk borders."""

    @staticmethod
    def forward(ctx, chunk_size, max_norm, q, k, values, erase, initial_state):  # type: ignore[no-untyped-def]
        out = None if q is None else torch.empty_like(values)
        written, scales = torch.empty_like(values), torch.empty_like(erase)
        borders = [initial_state]
        for part in _parts(k.size(1), chunk_size):
            chunk, memory = _cut(part, q, k, values, erase), borders[-1]
            u, s = _write(chunk, memory, max_norm)
            written[:, part], scales[:, part] = u, s
            shares = _Shares.of(s)
            if chunk.q is not None and out is not None:
                out[:, part] = _read(chunk.q, chunk.k, u, shares, memory)
            borders.append(_finish(chunk.k, u, shares, memory))
        ctx.chunk_size, ctx.max_norm = chunk_size, max_norm
        ctx.save_for_backward(q, k, values, erase, written, scales, *borders)
        return out, borders[-1]

    @staticmethod
    def backward(ctx, grad_out, grad_memory):  # type: ignore[no-untyped-def]
        gradients = partial(_differentiate_all, ctx.chunk_size, ctx.max_norm)
        return None, None, *differentiate_once(gradients, grad_out, grad_memory, *ctx.saved_tensors)


def _differentiate_all(
    chunk_size: int,
    max_norm: float,
    grad_out: Optional[Tensor],
    grad_memory: Tensor,
    q: Optional[Tensor],
    k: Tensor,
    values: Tensor,
    erase: Tensor,
    written: Tensor,
    scales: Tensor,
    *borders: Tensor,
) -> tuple[Optional[Tensor], ...]:
    """Gradients of q, k, values, erase and the initial state."""
    grads = [None if x is None else torch.empty_like(x) for x in (q, k, values, erase)]
    parts = _parts(k.size(1), chunk_size)
    for part, memory, next_memory in reversed(list(zip(parts, borders, borders[1:]))):
        chunk = _cut(part, q, k, values, erase)
        read = None if q is None or grad_out is None else grad_out[:, part]
        *chunk_grads, grad_memory = _differentiate(
            chunk, written[:, part], scales[:, part], memory, next_memory, read, grad_memory, max_norm
        )
        for grad, of_chunk in zip(grads, chunk_grads):
            if grad is not None and of_chunk is not None:
                grad[:, part] = of_chunk
    return *grads, grad_memory


def _cut(part: slice, q: Optional[Tensor], k: Tensor, values: Tensor, erase: Tensor) -> _Chunk:
    return _Chunk(None if q is None else q[:, part], k[:, part], values[:, part], erase[:, part])


def _parts(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]


def scan(
    q: Optional[Tensor],
    k: Tensor,
    v: Tensor,
    write: Optional[Tensor],
    erase: Optional[Tensor],
    decay: Optional[Tensor],
    initial_state: Tensor,
    max_norm: float,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> tuple[Optional[Tensor], Tensor]:
    """Same contract as ``token_loop.scan`` with a bound, for any length and any chunk size from 1 up."""
    if chunk_size < 1:
        raise ValueError(f"chunk size is {chunk_size}, it must be at least 1")
    if decay is not None or is_transformed():
        # No rule has both; and the derivatives here are for the one backward pass.
        return token_loop.scan(q, k, v, write, erase, decay, initial_state, max_norm)
    values = v if write is None else v * write[..., None]
    erase = torch.zeros_like(k[..., :1]) if erase is None else erase[..., None]
    inputs = (None if x is None else x.flatten(0, 1) for x in (q, k, values, erase, initial_state))
    out, state = _BoundedScan.apply(chunk_size, max_norm, *inputs)
    return None if q is None else out.view_as(v), state.view_as(initial_state)
