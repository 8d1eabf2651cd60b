"""The public operators on fast-weight memories. Layout: batch B, heads H, time L, features D.

They check shapes, promote to the state's type, and pick a backend; the mathematics is in ``token_loop`` (the
definition), ``chunkwise`` and ``chunkwise_bounded`` (parallel over time), ``native`` (the same, compiled) and
``triton_scan`` (the same, on a GPU's tensor cores).
``update_rules`` says which scalars make which rule.
"""

from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from fwp_fairseq.ops import chunkwise, chunkwise_bounded, fla, native, token_loop, triton_scan
from fwp_fairseq.ops.numerics import state_dtype
from fwp_fairseq.ops.torch_modes import is_exported_for_any, is_transformed, without_autocast

_Scan = Callable[..., tuple[Optional[Tensor], Tensor]]

# A compiled backend joins the package, its checks and its contract tests by adding one entry.
BACKENDS: dict[str, _Scan] = {
    "loop": token_loop.scan,
    "chunk": chunkwise.scan,
    "native": native.scan,
    "triton": triton_scan.scan,
    "fla": fla.scan,
}
# These run on a GPU only.
GPU_BACKENDS = ("triton", "fla")
# These read q, k and v in their own type, and start without a state as well.
_OWN_TYPES = ("native", *GPU_BACKENDS)


@without_autocast
def fast_weight_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    write: Optional[Tensor] = None,
    erase: Optional[Tensor] = None,
    decay: Optional[Tensor] = None,
    *,
    initial_state: Optional[Tensor] = None,
    backend: str = "auto",
    max_norm: Optional[float] = None,
    chunk_size: Optional[int] = None,
) -> tuple[Tensor, Tensor]:
    """Causal fast weights: write each token, then read with its query (eq. 17-25, without normalisation).

        v̄_t = decay_t W_{t-1}ᵀ k_t
        W_t = decay_t W_{t-1} + k_t ⊗ (write_t v_t − erase_t v̄_t)
        o_t = W_tᵀ q_t

    q, k: (B, H, L, Dk), v: (B, H, L, Dv), any float type. write, erase, decay: (B, H, L), or None for 1, 0 and 1.
    initial_state: (B, H, Dk, Dv), or None for zero. Differentiable in every tensor, also through the final state.

    backend: "loop" (the definition, one token at a time), "chunk" (parallel over time), "native" (parallel over time,
        compiled), "triton" (the same on a GPU's tensor cores), "fla" (flash-linear-attention's kernels, for the delta
        rules in half precision on a GPU), or "auto": "triton" on a GPU where it is installed and has kernels for the
        type and the size of keys, else "native" where it was built and has them, else "chunk".
    max_norm: after each write scale W down to this Frobenius norm if it is larger (1 for FWM); "loop" and "chunk" can.
    chunk_size: tokens per chunk of the "chunk" backend.

    Returns out (B, H, L, Dv) in v's type and the final state (B, H, Dk, Dv) in float32 (float64 for float64 inputs).
    Raises ValueError on shapes that do not fit, and on options that the backend does not have; RuntimeError where
    "native", "triton" or "fla" is asked for and is not there, and for what a backend does not have: second derivatives
    ("loop" has them), torch.func ("loop" and "chunk"), torch.export of a varying length ("chunk" and "native", without
    max_norm). The result is the same within autocast as without.
    """
    out, state = _run(q, k, v, write, erase, decay, initial_state, backend, max_norm, chunk_size)
    assert out is not None  # there were queries
    return out.to(v.dtype), state


@without_autocast
def fast_weight_memory(
    k: Tensor,
    v: Tensor,
    write: Optional[Tensor] = None,
    erase: Optional[Tensor] = None,
    decay: Optional[Tensor] = None,
    *,
    initial_state: Optional[Tensor] = None,
    backend: str = "auto",
    max_norm: Optional[float] = None,
    chunk_size: Optional[int] = None,
) -> Tensor:
    """The memory after all tokens are written: the final state of ``fast_weight_scan``, with nothing read on the way.

    Arguments and errors are those of ``fast_weight_scan``. ``fast_weight_read`` reads it.
    Returns (B, H, Dk, Dv) in float32 (float64 for float64 inputs).
    """
    return _run(None, k, v, write, erase, decay, initial_state, backend, max_norm, chunk_size)[1]


@without_autocast
def fast_weight_read(q: Tensor, state: Tensor) -> Tensor:
    """What (..., L, Dk) queries read from a finished memory (..., Dk, Dv): ``q @ state`` in the state's type."""
    return q.to(state.dtype) @ state


@torch.no_grad()
@without_autocast
def fast_weight_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    write: Optional[Tensor],
    erase: Optional[Tensor],
    decay: Optional[Tensor],
    state: Tensor,
    *,
    max_norm: Optional[float] = None,
) -> Tensor:
    """One token of ``fast_weight_scan`` for decoding: updates ``state`` in place and returns what the query reads.

    q, k: (B, H, Dk), v: (B, H, Dv), write, erase, decay: (B, H) or None, state: (B, H, Dk, Dv), float32 (float64 for
    float64 inputs). Inference only: no gradient is recorded. Returns (B, H, Dv) in v's type.
    """
    gates = (write, erase, decay)
    dtype = _check(q[:, :, None], k[:, :, None], v[:, :, None], [None if g is None else g[..., None] for g in gates])
    if state.shape != (*k.shape, v.size(-1)) or state.dtype != dtype:
        raise ValueError(
            f"state is {tuple(state.shape)} {state.dtype}, it must be {(*k.shape, v.size(-1))} {dtype}: (B, H, Dk, Dv)"
        )
    write, erase, decay = (None if gate is None else gate.to(dtype) for gate in gates)
    state.copy_(token_loop.write_token(state, k.to(dtype), v.to(dtype), write, erase, decay, max_norm))
    return token_loop.read_token(state, q.to(dtype)).to(v.dtype)


def _run(
    q: Optional[Tensor],
    k: Tensor,
    v: Tensor,
    write: Optional[Tensor],
    erase: Optional[Tensor],
    decay: Optional[Tensor],
    initial_state: Optional[Tensor],
    backend: str,
    max_norm: Optional[float],
    chunk_size: Optional[int],
) -> tuple[Optional[Tensor], Tensor]:
    dtype = _check(q, k, v, (write, erase, decay))
    state_shape = (k.size(0), k.size(1), k.size(3), v.size(3))
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(
            f"initial_state has shape {tuple(initial_state.shape)}, it must be {state_shape}: (B, H, Dk, Dv)"
        )
    initial_state = None if initial_state is None else initial_state.to(dtype)
    name = choose_backend(backend, max_norm, k.device.type, k.size(3), dtype)
    if (name == "loop" or max_norm is not None) and is_exported_for_any(k.size(2)):
        raise RuntimeError(
            "torch.export of a varying length needs backend 'chunk' or 'native', and no bound on the memory (FWM): "
            "give one length"
        )
    empty = k.numel() == 0 or v.numel() == 0
    if name in _OWN_TYPES and not empty:
        if is_transformed():
            raise RuntimeError(
                f"backend is {name!r}, which torch.func cannot transform; 'auto', 'chunk' and 'loop' it can"
            )
        return BACKENDS[name](q, k, v, write, erase, decay, initial_state)
    options: dict[str, Any] = {}
    if max_norm is not None:
        options["max_norm"] = max_norm
    if name == "chunk" and chunk_size is not None:
        options["chunk_size"] = chunk_size
    scan: _Scan = chunkwise_bounded.scan if name == "chunk" and max_norm is not None else BACKENDS[name]
    if initial_state is None:
        initial_state = k.new_zeros(state_shape, dtype=dtype)
    if empty:
        scan, options = _scan_nothing, {}
    inputs = (None if x is None else x.to(dtype) for x in (q, k, v, write, erase, decay))
    return scan(*inputs, initial_state, **options)


def _scan_nothing(
    q: Optional[Tensor],
    k: Tensor,
    v: Tensor,
    write: Optional[Tensor],
    erase: Optional[Tensor],
    decay: Optional[Tensor],
    initial_state: Tensor,
) -> tuple[Optional[Tensor], Tensor]:
    """The recurrence where B, H, L, Dk or Dv is 0: sums over nothing, by which every input has a gradient, zero."""
    for gate in (write, erase, decay):
        v = v if gate is None else v * gate[..., None]
    state = initial_state + k.transpose(-1, -2) @ v
    return None if q is None else q @ state, state


def choose_backend(
    backend: str,
    max_norm: Optional[float] = None,
    device_type: str = "cpu",
    d_k: int = 1,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Name of the backend that runs, for keys of ``d_k`` features and a state of ``dtype``.

    Raises ValueError for an unknown one, and for ``max_norm`` with one that cannot bound the memory.
    """
    if backend == "auto":
        if max_norm is not None or is_transformed():
            return "chunk"
        if triton_scan.supports(device_type, d_k, dtype):
            return "triton"
        if not native.supports(device_type, d_k, dtype):
            return "chunk"
        if native.unavailable is not None:
            native.note_unavailable()
            return "chunk"
        return "native"
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, allowed are {', '.join(['auto', *BACKENDS])}")
    if max_norm is not None and backend not in ("loop", "chunk"):
        raise ValueError(f"backend is {backend!r}, but a bound on the memory (FWM) needs 'chunk', 'loop' or 'auto'")
    return backend


def _check(q: Optional[Tensor], k: Tensor, v: Tensor, gates: Sequence[Optional[Tensor]]) -> torch.dtype:
    """Raise ValueError unless shapes and types fit; return the type of the state."""
    if q is not None and q.shape != k.shape:
        raise ValueError(f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}: they must be equal, (B, H, L, Dk)")
    if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}: they must be (B, H, L, Dk) and (B, H, L, Dv)"
        )
    if not k.is_floating_point() or not v.is_floating_point():
        raise ValueError(f"k is {k.dtype} and v {v.dtype}: both must be floating-point")
    for name, gate in zip(("write", "erase", "decay"), gates):
        if gate is not None and gate.shape != k.shape[:3]:
            raise ValueError(
                f"{name} has shape {tuple(gate.shape)}, it must be (B, H, L) = {tuple(k.shape[:3])}, or None"
            )
    return state_dtype(torch.promote_types(k.dtype, v.dtype))
