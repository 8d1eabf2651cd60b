"""Attention normalisation (eq. 26-28): read-outs as weighted means, by a second memory that counts what was written.

The accumulator z is not a rule of its own. It is the same recurrence on a constant value of one:

- rules that never erase carry it as one more value column, which every write and every decay treats alike, so that the
  read-out is Σ_s a_ts v_s / Σ_s a_ts (eq. 17-19; for the gated rule this is RFA-Gate of Peng et al., 2021);
- rules that erase keep z as the plain sum of keys (with the rule's decay), and divide the retrieved value v̄_t by
  z_{t-1} · k_t as well, with v̄_1 = 0 (eq. 27-28). That is a rescaled erase strength: erase_t / (z_{t-1} · k_t).

Where nothing was written under a key, z · k is 0 and the read-out is 0.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from fwp_fairseq.ops import token_loop
from fwp_fairseq.ops.fast_weights import fast_weight_memory, fast_weight_scan, fast_weight_step
from fwp_fairseq.ops.numerics import smallest_divisor, state_dtype
from fwp_fairseq.ops.torch_modes import without_autocast
from fwp_fairseq.ops.update_rules import Gates


@without_autocast
def normalized_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    *,
    initial_state: Optional[Tensor] = None,
    initial_normalizer: Optional[Tensor] = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """``fast_weight_scan`` with attention normalisation, for non-negative q and k.

    Shapes as there; the normalizer z is (B, H, Dk, 1), or None for zero. Returns out (B, H, L, Dv), the final state
    (B, H, Dk, Dv) and the final normalizer.
    """
    if gates.erase is None:
        out, state = fast_weight_scan(
            q, k, _with_ones(v), *gates, initial_state=_join(v, initial_state, initial_normalizer), backend=backend
        )
        weighted, total = out[..., :-1], out[..., -1:]
        return _ratio(weighted, total).to(v.dtype), *_apart(state)

    ones, count = _counting(v, gates)
    total, normalizer = fast_weight_scan(q, k, ones, *count, initial_state=initial_normalizer, backend=backend)
    erase = gates.erase * _inverse(_earlier_total(k, ones, count, initial_normalizer, backend)).squeeze(-1)
    out, state = fast_weight_scan(
        q, k, _wide(v), gates.write, erase, gates.decay, initial_state=initial_state, backend=backend
    )
    return _ratio(out, total).to(v.dtype), state, normalizer


@without_autocast
def normalized_memory(
    k: Tensor,
    v: Tensor,
    gates: Gates,
    *,
    initial_state: Optional[Tensor] = None,
    initial_normalizer: Optional[Tensor] = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The final state (B, H, Dk, Dv) and normalizer (B, H, Dk, 1) of ``normalized_scan``."""
    if gates.erase is None:
        state = fast_weight_memory(
            k, _with_ones(v), *gates, initial_state=_join(v, initial_state, initial_normalizer), backend=backend
        )
        return _apart(state)
    ones, count = _counting(v, gates)
    erase = gates.erase * _inverse(_earlier_total(k, ones, count, initial_normalizer, backend)).squeeze(-1)
    state = fast_weight_memory(k, v, gates.write, erase, gates.decay, initial_state=initial_state, backend=backend)
    return state, fast_weight_memory(k, ones, *count, initial_state=initial_normalizer, backend=backend)


@without_autocast
def normalized_step(q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: Tensor, normalizer: Tensor) -> Tensor:
    """One token of ``normalized_scan`` for decoding: updates ``state`` and ``normalizer`` in place.

    Shapes as in ``fast_weight_step``; gates are (B, H) or None, normalizer is (B, H, Dk, 1). Returns (B, H, Dv).
    """
    erase = gates.erase
    if erase is not None:
        erase = erase * _inverse(_kept(token_loop.read_token(normalizer, k.to(normalizer.dtype)), gates.decay)[..., 0])
    ones, count = _counting(v, gates)
    out = fast_weight_step(q, k, _wide(v), gates.write, erase, gates.decay, state)
    return _ratio(out, fast_weight_step(q, k, ones, *count, normalizer)).to(v.dtype)


@without_autocast
def normalized_read(q: Tensor, state: Tensor, normalizer: Tensor) -> Tensor:
    """W q / (z · q) for (..., L, Dk) queries of a finished memory (..., Dk, Dv) with its normalizer (..., Dk, 1)."""
    q = q.to(state.dtype)
    return _ratio(q @ state, q @ normalizer)


def _earlier_total(k: Tensor, ones: Tensor, count: Gates, initial_normalizer: Optional[Tensor], backend: str) -> Tensor:
    """decay_t z_{t-1} · k_t for every t: (B, H, L, 1). What is read if every write comes one token late.

    v̄_t carries the token's decay, and so must its divisor.
    """
    late_k = F.pad(k, (0, 0, 1, 0))[:, :, :-1]
    late = Gates(*(None if gate is None else F.pad(gate, (1, 0), value=1)[:, :, :-1] for gate in count))
    total, _ = fast_weight_scan(k, late_k, ones, *late, initial_state=initial_normalizer, backend=backend)
    return _kept(total, count.decay)


def _kept(total: Tensor, decay: Optional[Tensor]) -> Tensor:
    return total if decay is None else total * decay[..., None]


def _counting(v: Tensor, gates: Gates) -> tuple[Tensor, Gates]:
    """Ones to write in place of values, and the gates to write them with.

    Rules that erase count every token that writes at all in full (padding does not); the others count what it writes.
    """
    ones = v.new_ones(*v.shape[:-1], 1, dtype=state_dtype(v.dtype))
    write = gates.write
    if gates.erase is not None and write is not None:
        write = (write != 0).to(ones.dtype)
    return ones, Gates(write, None, gates.decay)


def _wide(v: Tensor) -> Tensor:
    """Values in the type of the state, so that float16 has to hold the ratio only, not what is divided."""
    return v.to(state_dtype(v.dtype))


def _with_ones(v: Tensor) -> Tensor:
    v = _wide(v)
    return torch.cat([v, v.new_ones(*v.shape[:-1], 1)], dim=-1)


def _join(v: Tensor, state: Optional[Tensor], normalizer: Optional[Tensor]) -> Optional[Tensor]:
    if state is None:
        if normalizer is None:
            return None
        state = normalizer.new_zeros(*normalizer.shape[:-1], v.size(-1))
    elif normalizer is None:
        normalizer = state.new_zeros(*state.shape[:-1], 1)
    return torch.cat([state, normalizer], dim=-1)


def _apart(joined: Tensor) -> tuple[Tensor, Tensor]:
    # As tensors of their own: decoding updates each in place.
    return joined[..., :-1].contiguous(), joined[..., -1:].contiguous()


def _inverse(total: Tensor) -> Tensor:
    """1 / total where there is something to divide by, else 0, with finite gradients everywhere."""
    floor = smallest_divisor(total.dtype)
    return (total > floor) / total.clamp(min=floor)


def _ratio(weighted: Tensor, total: Tensor) -> Tensor:
    return weighted * _inverse(total)
