"""Fast weights on a GPU's tensor cores: the operators of ``triton_kernels``, with the shapes and autograd of torch.

Triton comes with torch's builds for CUDA. It compiles the kernels when they are first called, which takes seconds, and
is not imported before that.
"""

import functools
import importlib
import importlib.util
import os
import re
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from fwp_fairseq.ops.numerics import inputs_of_kernels
from fwp_fairseq.ops.torch_modes import NOT_TWICE

# Of keys, whose memories lie in registers.
LARGEST_KEY = 256
# As many as large GPUs have, or about.
_MULTIPROCESSORS = 128
NOT_INSTALLED = "backend is triton, but Triton is not installed: torch's builds for CUDA bring it"


class Tiles(NamedTuple):
    """How the work is cut. All sizes are powers of two, 16 at least.

    values: columns of a memory that a program takes through the chunks, with ``warps`` warps.
    stages: chunks that it has in shared memory, the one in work among them.
    keys, columns: features and values that a program for the gradients of a chunk takes at a time.
    """

    values: int
    warps: int
    stages: int
    keys: int
    columns: int


def chunk_size(k: Tensor) -> int:
    """Tokens of a chunk."""
    if k.dtype == torch.float32:
        return 16
    if warpgroups_are_sound(k.device):
        return 64 if k.size(3) > 16 else 32
    return 32 if k.size(3) <= 64 else 16


def tiles(k: Tensor, v: Tensor, decays: bool) -> Tiles:
    """The largest tiles that fit into registers, and into the shared memory that a program can have.

    With ``chunk_size`` the one place that says so. To try others, put another function in its place.
    """
    keys, values = _power(k.size(3)), _power(v.size(3))
    if not warpgroups_are_sound(k.device):
        # With two warps there is no group of four: products are those of the tensor cores before Hopper.
        few = 32 if k.dtype != torch.float32 and keys <= 64 else 16
        return Tiles(min(values, few), 2, 1 if k.dtype == torch.float32 else 2, min(keys, 32), min(values, 32))
    if k.dtype == torch.float32:
        return Tiles(min(values, 32), 4, 1, min(keys, 32), min(values, 32))
    if keys == 16:
        return Tiles(min(values, 16), 2, 2, 16, min(values, 32))
    taken = min(values, 64 if keys <= 64 else max(16, (2048 if decays else 4096) // keys))
    stages = 2 if keys <= 64 or _shared_memory(k) >= 163 * 1024 else 1
    if keys <= 64 and k.size(0) * k.size(1) * _ceil(values, taken) < _MULTIPROCESSORS:
        # More and smaller programs, of which each loads ahead, since it has a multiprocessor for itself.
        taken, stages = min(taken, 32), 3
    if not decays:
        return Tiles(taken, 4, stages, min(keys, 64), min(values, 64))
    return Tiles(taken, 4, stages, max(16, min(keys // 2, 32)), min(values, 32))


def warpgroups_are_sound(device: torch.device) -> bool:
    """Whether products by four warps, which Hopper has, can be used; elsewhere there are none.

    The assembler (ptxas) before CUDA 13.3 reuses registers that such a product still reads, and an H100 stopped with
    illegal memory accesses, with some kernels, now and then. Triton 3.6 brings that of CUDA 12.8; TRITON_PTXAS_PATH
    names another.
    """
    is_hopper = device.type == "cuda" and torch.cuda.get_device_properties(device).major == 9
    return not is_hopper or _assembler_is_sound()


@torch.compiler.assume_constant_result  # torch.compile asks, and does not trace what cannot be
def _assembler_is_sound() -> bool:
    return _assembler() >= (13, 3)


@functools.cache
def _assembler() -> tuple[int, ...]:
    """The version of CUDA that Triton's assembler for Hopper is of."""
    compiler: Any = importlib.import_module("triton.backends.nvidia.compiler")
    found = re.search(r"release (\d+)\.(\d+)", str(compiler.get_ptxas_version(90)))
    return (0,) if found is None else tuple(int(number) for number in found.groups())


def _shared_memory(x: Tensor) -> int:
    """Bytes of it that a program can have: 99 KiB on the smallest GPUs."""
    properties = torch.cuda.get_device_properties(x.device) if x.is_cuda else None
    return getattr(properties, "shared_memory_per_block_optin", 99 * 1024)


def supports(device_type: str, d_k: int = 1, dtype: torch.dtype = torch.float32) -> bool:
    """Whether there are kernels for a kind of device, for keys of ``d_k`` features and a state of type ``dtype``."""
    if device_type != "cuda" or torch.version.cuda is None or not installed:
        return False
    device = torch.device("cuda", torch.cuda.current_device())
    # By two warps, memories of more than 128 rows do not fit into registers.
    if dtype == torch.float64 or d_k > (LARGEST_KEY if warpgroups_are_sound(device) else 128):
        return False
    # From Ampere on tensor cores take bfloat16 and tf32.
    return torch.cuda.get_device_properties(device).major >= 8


def scan(
    q: Optional[Tensor],
    k: Tensor,
    v: Tensor,
    write: Optional[Tensor],
    erase: Optional[Tensor],
    decay: Optional[Tensor],
    initial_state: Optional[Tensor],
) -> tuple[Optional[Tensor], Tensor]:
    """Same contract as ``token_loop.scan``, but for float64. q, k and v are read, and read-outs written, in their type.

    Half-precision inputs are multiplied in their precision, with sums, and memories from chunk to chunk, in float32.
    Raises ValueError for what the kernels do not have, RuntimeError without Triton.
    """
    _check(k, torch.promote_types(k.dtype, v.dtype))
    inputs, keep = inputs_of_kernels(q, k, v, write, erase, decay, initial_state)
    if any(x is not None and x.device != k.device for x in inputs):
        raise ValueError("backend is 'triton', which needs all tensors on one device, these are on several devices")
    out, state, *_ = torch.ops.fwp_fairseq.triton_scan(*inputs, keep)
    return (None if q is None else out), state


def _check(k: Tensor, dtype: torch.dtype) -> None:
    if not installed:
        raise RuntimeError(NOT_INSTALLED)
    if k.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend is 'triton', which needs tensors on a GPU, these are on {k.device.type}")
    if dtype == torch.float64:
        raise ValueError("backend is 'triton', which has float32, float16 and bfloat16, not float64")
    if k.size(3) > LARGEST_KEY:
        raise ValueError(
            f"backend is 'triton', which has keys of at most {LARGEST_KEY} features, these have {k.size(3)}"
        )


def _forward(
    q: Optional[Tensor],
    k: Tensor,
    v: Tensor,
    write: Optional[Tensor],
    erase: Optional[Tensor],
    decay: Optional[Tensor],
    initial_state: Optional[Tensor],
    keep: bool,
) -> tuple[Tensor, ...]:
    from fwp_fairseq.ops import triton_kernels as kernels

    made = _forward_shapes(q, k, v, write, erase, decay, initial_state, keep)
    out, state, inverses, spans, marks, memories, updates = made
    q, k, v = _rows(q), _rows(k), _rows(v)
    initial_state = None if initial_state is None else initial_state.contiguous()
    (batch, heads, length, d_k), d_v = k.shape, v.size(3)
    cut, chunk = tiles(k, v, decay is not None), chunk_size(k)
    chunks = _ceil(length, chunk)
    sizes = {"DK": d_k, "C": chunk, "PRECISION": _precision(k.dtype)}
    with torch.cuda.device_of(k):
        if erase is not None or decay is not None:
            kernels.prepare[batch * heads * chunks,](
                k, erase, decay, inverses, spans, marks,
                heads, length, chunks, *_strides(k, erase, decay), **sizes, BK=cut.keys, num_stages=1,
                num_warps=cut.warps,
            )  # fmt: skip
        kernels.advance[batch * heads * _ceil(d_v, cut.values),](
            q, k, v, write, *_if(erase, inverses), spans, *_if(decay, marks), initial_state,
            out, state, *(memories, updates) if keep else (None, None),
            heads, length, chunks, *_strides(q, k, v, write), **sizes, DV=d_v, BK=_power(d_k), BV=cut.values,
            STAGES=cut.stages, num_stages=cut.stages, num_warps=cut.warps,
        )  # fmt: skip
    return made


def _forward_shapes(
    q: Optional[Tensor],
    k: Tensor,
    v: Tensor,
    write: Optional[Tensor],
    erase: Optional[Tensor],
    decay: Optional[Tensor],
    initial_state: Optional[Tensor],
    keep: bool,
) -> tuple[Tensor, ...]:
    """Read-outs, the final memory, T, spans and marks, and with ``keep`` what a backward pass needs as well: W0, U."""
    batch, heads, length, d_k = k.shape
    d_v = v.size(3)
    chunk = chunk_size(k)
    chunks = _ceil(length, chunk)

    def new(wanted: bool, *shape: int, dtype: torch.dtype = k.dtype) -> Tensor:
        return k.new_empty((batch, heads, *shape) if wanted else (0,), dtype=dtype)

    return (
        new(q is not None, length, d_v),
        new(True, d_k, d_v, dtype=torch.float32),
        new(erase is not None, chunks, chunk, chunk),
        new(erase is not None or decay is not None, chunks, 4, chunk, dtype=torch.float32),
        new(decay is not None, chunks, chunk, dtype=torch.int32),
        new(keep, chunks, d_k, d_v),
        new(keep, length, d_v),
    )


def _backward(
    grad_out: Optional[Tensor],
    grad_state: Optional[Tensor],
    q: Optional[Tensor],
    k: Tensor,
    v: Tensor,
    write: Optional[Tensor],
    erase: Optional[Tensor],
    decay: Optional[Tensor],
    initial_state: Optional[Tensor],
    inverses: Tensor,
    spans: Tensor,
    marks: Tensor,
    memories: Tensor,
    updates: Tensor,
) -> tuple[Tensor, ...]:
    from fwp_fairseq.ops import triton_kernels as kernels

    grads = _backward_shapes(grad_out, grad_state, q, k, v, write, erase, decay, initial_state)
    grad_q, grad_k, grad_v, grad_write, grad_erase, grad_decay, grad_initial = grads
    if grad_out is None:
        grad_q.zero_()
    q, k, v, grad_out = _rows(q), _rows(k), _rows(v), _rows(grad_out)
    (batch, heads, length, d_k), d_v = k.shape, v.size(3)
    cut, chunk = tiles(k, v, decay is not None), chunk_size(k)
    chunks = _ceil(length, chunk)
    sizes = {"DK": d_k, "DV": d_v, "C": chunk, "PRECISION": _precision(k.dtype)}
    grad_memories, grad_updates = torch.empty_like(memories), torch.empty_like(updates)
    sums = k.new_empty((batch * heads * chunks, 3 * _ceil(d_k, cut.keys) + 1, chunk), dtype=torch.float32)
    with torch.cuda.device_of(k):
        kernels.retreat[batch * heads * _ceil(d_v, cut.values),](
            q, k, *_if(erase, inverses), spans, *_if(decay, marks), grad_out,
            None if grad_state is None else grad_state.contiguous(), grad_memories, grad_updates,
            *_if(initial_state, grad_initial),
            heads, length, chunks, *_strides(q, k, grad_out), **sizes, BK=_power(d_k), BV=cut.values,
            STAGES=cut.stages, num_stages=cut.stages, num_warps=cut.warps,
        )  # fmt: skip
        kernels.differentiate[batch * heads * chunks,](
            q, k, v, write, erase, decay, spans, marks, memories, updates, grad_out, grad_memories, grad_updates,
            *grads[:-1], sums,
            heads, length, chunks, *_strides(q, k, v, write, erase, decay, grad_out), **sizes, BK=cut.keys,
            BV=cut.columns, num_stages=1, num_warps=cut.warps,
        )  # fmt: skip
    return grads


def _backward_shapes(
    grad_out: Optional[Tensor],
    grad_state: Optional[Tensor],
    q: Optional[Tensor],
    k: Tensor,
    v: Tensor,
    *others: Optional[Tensor],
) -> tuple[Tensor, ...]:
    rest = (k.new_empty(0 if x is None else x.shape, dtype=torch.float32) for x in others[:4])
    return *(k.new_empty(0 if x is None else x.shape) for x in (q, k, v)), *rest


def _rows(x: Optional[Tensor]) -> Any:
    """With the features of a token beside each other, as the kernels read them."""
    return x if x is None or x.stride(3) == 1 else x.contiguous()


def _strides(*tensors: Optional[Tensor]) -> list[int]:
    """From sequence to sequence, from head to head and from token to token."""
    return [stride for x in tensors for stride in ((0, 0, 0) if x is None else x.stride()[:3])]


def _if(given: Optional[Tensor], *tensors: Tensor) -> tuple[Optional[Tensor], ...]:
    return tensors if given is not None else (None,) * len(tensors)


def _precision(dtype: torch.dtype) -> str:
    # One product of tf32 numbers has half precision's bits, three have float32's.
    return "tf32x3" if dtype == torch.float32 else "tf32"


def _power(size: int) -> int:
    return max(16, 1 << (int(size) - 1).bit_length())


def _ceil(size: int, divisor: int) -> int:
    return -(-size // divisor)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _ = inputs
    kept = output[2:]
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *kept)


def _differentiate(
    ctx: Any, grad_out: Optional[Tensor], grad_state: Optional[Tensor], *_: Optional[Tensor]
) -> tuple[Optional[Tensor], ...]:
    saved = ctx.saved_tensors
    grads = torch.ops.fwp_fairseq.triton_scan_backward(grad_out, grad_state, *saved)
    return *(None if x is None else grad for x, grad in zip(saved, grads)), None


def _differentiate_again(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(NOT_TWICE)


def _register(library: torch.library.Library) -> None:
    inputs = "Tensor? q, Tensor k, Tensor v, Tensor? write, Tensor? erase, Tensor? decay, Tensor? initial_state"
    kept = "Tensor inverses, Tensor spans, Tensor marks, Tensor memories, Tensor updates"
    seven = f"({', '.join(['Tensor'] * 7)})"
    for name, schema, kernel, shapes in (
        ("triton_scan", f"({inputs}, bool keep) -> {seven}", _forward, _forward_shapes),
        (
            "triton_scan_backward",
            f"(Tensor? grad_out, Tensor? grad_state, {inputs}, {kept}) -> {seven}",
            _backward,
            _backward_shapes,
        ),
    ):
        library.define(name + schema)
        library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fwp_fairseq::{name}", shapes, lib=library)
    torch.library.register_autograd("fwp_fairseq::triton_scan", _differentiate, setup_context=_save, lib=library)
    torch.library.register_autograd("fwp_fairseq::triton_scan_backward", _differentiate_again, lib=library)


installed = importlib.util.find_spec("triton") is not None
_library = torch.library.Library("fwp_fairseq", "FRAGMENT")
_register(_library)
