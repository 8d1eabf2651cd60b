"""Fast weights in compiled code: the operators of ``csrc/``, with the shapes and the autograd that torch needs of them.

``setup.py`` builds the library where torch can be imported, and names it after that version of torch: a library built
for another one is never loaded. Without a library everything works with the "chunk" backend.
"""

import logging
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from fwp_fairseq.ops.numerics import inputs_of_kernels, state_dtype
from fwp_fairseq.ops.torch_modes import NOT_TWICE

logger = logging.getLogger(__name__)

LIBRARY_PREFIX = "_native_for_torch_"
REMEDY = "pip install --force-reinstall --no-deps -e . in a clone of fwp-fairseq, with a C++ compiler"


def copies() -> list[Path]:
    """Folders of the copies of this package that Python can find, the one in use first."""
    specs = [PathFinder.find_spec("fwp_fairseq", [entry]) for entry in sys.path]
    # A clone that is installed by -e is on no path, but known to a finder of its own.
    specs += [finder.find_spec("fwp_fairseq", None) for finder in sys.meta_path if hasattr(finder, "find_spec")]
    origins = [Path(__file__).parent] + [Path(spec.origin) for spec in specs if spec is not None and spec.origin]
    return list(dict.fromkeys(origin.resolve().parent for origin in origins))


def library_in(copy: Path) -> Optional[Path]:
    """The library of a copy of this package for this version of torch."""
    return next(iter(sorted(copy.glob(f"{LIBRARY_PREFIX}{torch.__version__.split('+')[0].replace('.', '_')}.*"))), None)


def _load() -> Optional[str]:
    """Load the library for this version of torch; return why that cannot be, or None."""
    own, *others = copies()
    path = library_in(own)
    if path is None:
        built = next(filter(library_in, others), None)
        if built is not None:
            return f"{own} is in use, which has none, and not {built}, which has them; to build them anew: {REMEDY}"
        found = sorted(own.glob(LIBRARY_PREFIX + "*"))
        if not found:
            return f"they were not built at installation of {own}; to build them: {REMEDY}"
        versions = ", ".join(p.name.split(".")[0].removeprefix(LIBRARY_PREFIX).replace("_", ".") for p in found)
        return f"they were built for torch {versions}, this is torch {torch.__version__}; to build them anew: {REMEDY}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} cannot be loaded ({error.__cause__ or error}); to build it anew: {REMEDY}"
    _register()
    return None


def note_unavailable() -> None:
    """Say once that the compiled operators are missing, and what to do."""
    global _noted
    if not _noted and not torch.compiler.is_compiling():
        _noted = True
        logger.warning("fast weights run without their compiled operators, which are faster: %s", unavailable)


def supports(device_type: str, d_k: int = 1, dtype: torch.dtype = torch.float32) -> bool:
    """Whether there are kernels for a kind of device, for keys of ``d_k`` features and a state of type ``dtype``.

    On a GPU, whether the library that was loaded has them, which depends on where it was built.
    """
    return device_type == "cpu" or (device_type == "cuda" and d_k <= _largest_cuda_key(dtype))


def _largest_cuda_key(dtype: torch.dtype) -> int:
    if unavailable is not None or not hasattr(torch.ops.fwp_fairseq, "largest_cuda_key"):
        return 0
    return torch.ops.fwp_fairseq.largest_cuda_key(dtype == torch.float64)


def scan(
    q: Optional[Tensor],
    k: Tensor,
    v: Tensor,
    write: Optional[Tensor],
    erase: Optional[Tensor],
    decay: Optional[Tensor],
    initial_state: Optional[Tensor],
) -> tuple[Optional[Tensor], Tensor]:
    """Same contract as ``token_loop.scan``. q, k and v are read, and read-outs written, in their own type.

    Raises RuntimeError where the compiled operators are not available.
    """
    if unavailable is not None:
        raise RuntimeError(f"backend is 'native', but its compiled operators cannot be used: {unavailable}")
    dtype = torch.promote_types(k.dtype, v.dtype)
    if not supports(k.device.type, k.size(3), state_dtype(dtype)):
        raise RuntimeError(
            f"backend is 'native', but there are no compiled operators for {k.device.type} tensors with keys of "
            f"{k.size(3)} features"
        )
    inputs, keep = inputs_of_kernels(q, k, v, write, erase, decay, initial_state)
    out, state, _ = torch.ops.fwp_fairseq.scan(*inputs, keep)
    return (None if q is None else out), state


def has_feature_map(name: str) -> bool:
    """Whether ``step`` and ``read`` map keys and queries by it; "none" takes them mapped already."""
    if name not in _known_maps:
        _known_maps[name] = torch.ops.fwp_fairseq.has_feature_map(name)
    return _known_maps[name]


class AddressFeatures(NamedTuple):
    """What maps projected keys and queries to the vectors that address a memory."""

    feature_map: str
    nu: int = 1
    key_normalization: str = "none"
    projection: Optional[Tensor] = None


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    write: Optional[Tensor],
    erase: Optional[Tensor],
    decay: Optional[Tensor],
    state: Tensor,
    normalizer: Optional[Tensor],
    order: Optional[Tensor],
    places: Optional[Tensor],
    features: AddressFeatures,
) -> tuple[Tensor, Optional[Tensor]]:
    """One token of decoding for n hypotheses in one pass over their memories: features, write, read, beam order.

    q, k: (n, H, d_key) and v: (n, H, Dv), as projected; write, erase, decay: (n, H), or None for 1, 0 and 1, the
    scalars of the recurrence as ``token_loop.write_token`` has them. With attention normalisation a token counts by
    what it writes, or, where ``erase`` is given, in full if it writes at all.

    ``state`` (S, H, Dk, Dv) and ``normalizer`` (S, H, Dk, 1) are updated in place. ``places`` (m) says where the m rows
    of the last step have their memories (None: row i in place i), and ``order`` (n), n <= S, from which of them each
    row goes on (None: each from its own). Siblings beyond the first go to places that nobody goes on from, so beam
    search reads and writes each memory once and needs no second copy.

    Returns what is read, (n, H, Dv) in v's type, and the new places (None: row i in place i). Inference only.
    Raises ValueError for an order or places out of range; on a GPU, where nothing waits for a kernel, it is an error of
    the device instead, after which the process can do nothing more there, as with torch's own indexing.
    """
    out, moved = torch.ops.fwp_fairseq.step.default(
        q, k, v, write, erase, decay, state, normalizer, order, places, *_arguments(features, state)
    )  # fmt: skip
    return out, (None if order is None and places is None else moved)


def read(q: Tensor, state: Tensor, normalizer: Optional[Tensor], features: AddressFeatures) -> Tensor:
    """What n queries (n, H, d_key), as projected, read from finished memories (m, H, Dk, Dv) with z (m, H, Dk, 1).

    Row i reads memory i // (n / m). Returns (n, H, Dv) in q's type. Inference only.
    """
    if q.size(0) == 0:
        return q.new_empty(*q.shape[:2], state.size(3))  # no rows to divide by the number of memories
    return torch.ops.fwp_fairseq.read.default(q, state, normalizer, *_arguments(features, state))


def few_rows_linear(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """x Wᵀ + bias: x (..., inputs), weight (outputs, inputs), bias (outputs) or None, of one type, float32 or float64.

    It reads the weight once and for up to some ten rows takes the time of that. On a processor; inference only.
    """
    return torch.ops.fwp_fairseq.few_rows_linear.default(x, weight, bias)


def few_rows_linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Optional[Tensor]]) -> list[Tensor]:
    """``few_rows_linear`` with the same x for each weight and its bias, at the cost of one call."""
    return torch.ops.fwp_fairseq.few_rows_linears.default(x, weights, biases)


def pack_integers(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight of 8-bit integers, (outputs, inputs), as ``integer_linear`` reads it: packed, and offset, (outputs)."""
    return torch.ops.fwp_fairseq.pack_integers.default(weight)


def integer_linear(x: Tensor, packed: Tensor, offset: Tensor, worth: Tensor, bias: Optional[Tensor]) -> Tensor:
    """x Wᵀ + bias by 8-bit integers: x (..., inputs) in float32, each row rounded to 63 steps of its largest number.

    packed, offset: W of ``pack_integers``; worth, bias: (outputs), in float32, what a step of its row is worth. On a
    processor; inference only.
    """
    return torch.ops.fwp_fairseq.integer_linear.default(x, packed, offset, worth, bias)


def new_decoder_step() -> Any:
    """A program for one token of all layers of a decoder, empty at first: what follows adds an operation to its end.

    An operation makes another x (rows, columns) of the one that it finds. All is float32, on a processor.

        keep(), add()                              keeps x; adds what was kept last
        normalize(weight, bias, epsilon)           layer norm of all columns
        activate(name)                             relu or gelu
        multiply(inputs, weights, biases, offsets, worths)
                                                   linear layers, whose outputs come to stand beside each other; with
                                                   ``offsets`` and ``worths`` (None: without) of ``pack_integers``
        convolve(first, heads, weights, hides_padding)
                                                   the first columns become sums of what they are and were, by weights
                                                   (tokens, columns): histories[first], (rows, H, tokens before, D)
        remember(layer, heads, d_key, d_dot, feature_map, nu, key_normalization, projection, normalized, has_beta,
                 has_alpha, range, gates)          ``step`` of queries, keys, values and logits of beta and alpha, in
                                                   memories[layer]; gates: ``UpdateRule.as_sums``
        look_at(first, heads, gives_weights)       softmax attention to sources[first]: keys, then values, both
                                                   (sentences, H, S, D), and padding (sentences, S), which may be empty
        recall(first, heads, d_key, d_dot, feature_map, nu, key_normalization, projection, normalized)
                                                   ``read`` of sources[first], then the normalizer

    ``run(x, padding, memories, normalizers, order, places, sources, histories)`` runs it for x (rows, columns) and
    returns what x is in the end, weights of attention (rows, 1, S), empty if nothing gives them, places, as ``step``
    has them, and the histories for the next token. All layers have their memories in the same places. Raises
    ValueError, or IndexError for an order out of range.
    """
    return torch.classes.fwp_fairseq.DecoderStep()


def _arguments(features: AddressFeatures, state: Tensor) -> tuple[Optional[Tensor], str, int, str]:
    feature_map, nu, key_normalization, projection = features
    return None if projection is None else projection.to(state.dtype), feature_map, nu, key_normalization


def _register() -> None:
    torch.library.register_fake("fwp_fairseq::step", _step_shapes)
    torch.library.register_fake("fwp_fairseq::read", lambda q, state, *_: q.new_empty(*q.shape[:2], state.size(3)))
    torch.library.register_fake("fwp_fairseq::few_rows_linear", lambda x, w, _: x.new_empty(*x.shape[:-1], w.size(0)))
    torch.library.register_fake(
        "fwp_fairseq::few_rows_linears", lambda x, weights, _: [x.new_empty(*x.shape[:-1], w.size(0)) for w in weights]
    )
    torch.library.register_fake(
        "fwp_fairseq::integer_linear", lambda x, packed, offset, worth, _: x.new_empty(*x.shape[:-1], worth.numel())
    )
    torch.library.register_fake("fwp_fairseq::scan", _scan_shapes)
    torch.library.register_fake("fwp_fairseq::scan_backward", _backward_shapes)
    torch.library.register_autograd("fwp_fairseq::scan", _backward, setup_context=_save)
    torch.library.register_autograd("fwp_fairseq::scan_backward", _second_backward)


def _scan_shapes(
    q: Optional[Tensor],
    k: Tensor,
    v: Tensor,
    write: Optional[Tensor],
    erase: Optional[Tensor],
    decay: Optional[Tensor],
    initial_state: Optional[Tensor],
    keep_borders: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = state_dtype(k.dtype)
    batch, heads, length, d_k = k.shape
    out = v.new_empty(0) if q is None else v.new_empty(v.shape)
    borders = (length + SEGMENT - 1) // SEGMENT - 1 if keep_borders else 0
    state = k.new_empty((batch, heads, d_k, v.size(3)), dtype=dtype)
    return out, state, k.new_empty((batch, heads, borders, d_k, v.size(3)), dtype=dtype)


def _step_shapes(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    order, places = others[5:7]
    moves = order is not None or places is not None
    return torch.empty_like(v, memory_format=torch.contiguous_format), q.new_empty(
        q.size(0) if moves else 0, dtype=torch.long
    )


def _backward_shapes(
    grad_out: Optional[Tensor],
    grad_state: Optional[Tensor],
    q: Optional[Tensor],
    k: Tensor,
    v: Tensor,
    *others: Optional[Tensor],
) -> tuple[Tensor, ...]:
    *gates_and_state, _ = others

    def like(x: Optional[Tensor], dtype: torch.dtype) -> Tensor:
        return k.new_empty(0 if x is None else x.shape, dtype=dtype)

    rest = (like(x, state_dtype(k.dtype)) for x in gates_and_state)
    return like(q, k.dtype), like(k, k.dtype), like(v, v.dtype), *rest


# Tokens from one kept memory to the next: kSegment of csrc/fast_weights.h.
SEGMENT = 128


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _ = inputs
    borders = output[2]
    ctx.mark_non_differentiable(borders)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, borders)


def _backward(
    ctx: Any, grad_out: Optional[Tensor], grad_state: Optional[Tensor], _: Optional[Tensor]
) -> tuple[Optional[Tensor], ...]:
    *tensors, borders = ctx.saved_tensors
    grads = torch.ops.fwp_fairseq.scan_backward(grad_out, grad_state, *tensors, borders)
    return *(None if x is None else grad for x, grad in zip(tensors, grads)), None


def _second_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(NOT_TWICE)


# Why the compiled operators cannot be used, or None if they can.
unavailable: Optional[str] = _load()
_known_maps: dict[str, bool] = {}
_noted = False
