"""Which ONNX operators a torch function is.

Each entry of ``OPERATORS`` takes the graph, the result without data, and the function's arguments, adds what is needed
to the graph, and returns the name of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from fwp_fairseq.onnx_export.graph import ONNX_TYPES, CannotExport, Graph, Value


def _typed(graph: Graph, x: Any, dtype: torch.dtype) -> Any:
    """``x`` as an input of this type."""
    if isinstance(x, Value):
        return x if x.dtype == dtype else graph.node("Cast", x, to=ONNX_TYPES[dtype])
    if isinstance(x, Tensor):
        return x.to(dtype)
    return graph.constant(x, dtype)


def _elementwise(operator: str, swapped: bool = False, compares: bool = False) -> Callable[..., str]:
    def add(graph: Graph, out: Tensor, a: Any, b: Any) -> str:
        if swapped:
            a, b = b, a
        dtype = out.dtype
        if compares:
            dtype = torch.result_type(*(x.example if isinstance(x, Value) else x for x in (a, b)))
        return graph.node(operator, _typed(graph, a, dtype), _typed(graph, b, dtype))

    return add


def _unary(operator: str) -> Callable[..., str]:
    return lambda graph, out, x, **kwargs: graph.node(operator, x)


def _same(graph: Graph, out: Tensor, x: Value, *args: Any, **kwargs: Any) -> str:
    return x.name


def _cast(graph: Graph, out: Tensor, x: Any, *args: Any, **kwargs: Any) -> str:
    x = _typed(graph, x, out.dtype)
    return x.name if isinstance(x, Value) else graph.weight(x) if isinstance(x, Tensor) else x


def _not_equal(graph: Graph, out: Tensor, a: Any, b: Any) -> str:
    return graph.node("Not", _elementwise("Equal", compares=True)(graph, out, a, b))


def _reduce(operator: str) -> Callable[..., str]:
    def add(graph: Graph, out: Tensor, x: Value, dim: Any, keepdim: bool = False, dtype: Any = None) -> str:
        dims, x = [dim] if isinstance(dim, int) else dim, _typed(graph, x, out.dtype)
        return graph.node(operator, x, graph.ints(*dims), keepdims=int(keepdim))

    return add


def _along(operator: str) -> Callable[..., str]:
    return lambda graph, out, x, dim, **kwargs: graph.node(operator, x, axis=dim)


def _clamp(graph: Graph, out: Tensor, x: Value, min: Any = None, max: Any = None) -> str:
    ends = [None if end is None else graph.constant(end, x.dtype) for end in (min, max)]
    return graph.node("Clip", x, *ends)


def _masked_fill(graph: Graph, out: Tensor, x: Value, mask: Value, value: float) -> str:
    return graph.node("Where", mask, graph.constant(value, x.dtype), x)


def _where(graph: Graph, out: Tensor, condition: Any, a: Any, b: Any) -> str:
    return graph.node("Where", condition, _typed(graph, a, out.dtype), _typed(graph, b, out.dtype))


def _cat(graph: Graph, out: Tensor, tensors: Sequence[Any], dim: int = 0) -> str:
    return graph.node("Concat", *tensors, axis=dim % out.dim())


def _cumsum(graph: Graph, out: Tensor, x: Value, dim: int, **kwargs: Any) -> str:
    return graph.node("CumSum", x, graph.constant(dim, torch.int64))


def _permute(graph: Graph, out: Tensor, x: Value, *dims: Any) -> str:
    order = dims[0] if isinstance(dims[0], (tuple, list)) else dims
    return graph.node("Transpose", x, perm=[dim % x.dim() for dim in order])


def _transpose(graph: Graph, out: Tensor, x: Value, a: int, b: int) -> str:
    order = list(range(x.dim()))
    order[a], order[b] = order[b], order[a]
    return graph.node("Transpose", x, perm=order)


def _flip(graph: Graph, out: Tensor, x: Value, dim: int) -> str:
    return graph.node("Slice", x, graph.ints(-1), graph.ints(-(2**62)), graph.ints(dim), graph.ints(-1))


def _unsqueeze(graph: Graph, out: Tensor, x: Value, dim: int) -> str:
    return graph.node("Unsqueeze", x, graph.ints(dim))


def _squeeze(graph: Graph, out: Tensor, x: Value, dim: int) -> str:
    return graph.node("Squeeze", x, graph.ints(dim))


def _unflatten(graph: Graph, out: Tensor, x: Value, dim: int, sizes: Sequence[int]) -> str:
    """In an ONNX shape 0 is what the input has there, so that all free dimensions before are as they are."""
    dim %= x.dim()
    return graph.node("Reshape", x, graph.ints(*[0] * dim, *sizes, *x.shape[dim + 1 :]))


def _flatten(graph: Graph, out: Tensor, x: Value, start_dim: int, end_dim: int = -1) -> str:
    start, end = start_dim % x.dim(), end_dim % x.dim()
    return graph.node("Reshape", x, graph.ints(*[0] * start, -1, *x.shape[end + 1 :]))


def _reshape(graph: Graph, out: Tensor, x: Value, *sizes: int) -> str:
    # Another number may be the size of a free dimension.
    if not {-1, 1}.issuperset(sizes):
        raise CannotExport(f"the model makes the shape {sizes} of another one, which the export does not know")
    return graph.node("Reshape", x, graph.ints(*sizes))


def _getitem(graph: Graph, out: Tensor, x: Value, index: Any) -> str:
    index = index if isinstance(index, tuple) else (index,)
    if Ellipsis in index:
        at = index.index(Ellipsis)
        given = sum(part is not None for part in index) - 1
        index = (*index[:at], *[slice(None)] * (x.dim() - given), *index[at + 1 :])
    name, dim = x.name, 0
    squeezed: list[int] = []
    new: list[int] = []
    for place, part in enumerate(index):
        if part is None:
            new.append(place - len(squeezed))
            continue
        if isinstance(part, int):
            squeezed.append(dim)
            part = slice(part, part + 1 or None)
        if not isinstance(part, slice) or part.step not in (None, 1):
            raise CannotExport(f"the model takes {part} of a tensor, which the export does not know")
        if part != slice(None):
            end = 2**62 if part.stop is None else part.stop
            name = graph.node("Slice", name, graph.ints(part.start or 0), graph.ints(end), graph.ints(dim))
        dim += 1
    if squeezed:
        name = graph.node("Squeeze", name, graph.ints(*squeezed))
    return graph.node("Unsqueeze", name, graph.ints(*new)) if new else name


def _gather(graph: Graph, out: Tensor, x: Any, dim: int, index: Value) -> str:
    return graph.node("Gather", x, index, axis=dim)


def _embedding(graph: Graph, out: Tensor, tokens: Value, weight: Tensor, *args: Any, **kwargs: Any) -> str:
    quantized = graph.in_8_bits(weight)
    if quantized is None:
        return graph.node("Gather", weight, tokens)
    numbers, scale = quantized
    row = graph.node("Cast", graph.node("Gather", numbers, tokens), to=ONNX_TYPES[torch.float32])
    row_scale = graph.node("Unsqueeze", graph.node("Gather", scale, tokens), graph.ints(-1))
    return graph.node("Mul", row, row_scale)


def _linear(graph: Graph, out: Tensor, x: Value, weight: Tensor, bias: Optional[Tensor] = None) -> str:
    quantized = graph.in_8_bits(weight)
    if quantized is None:
        product = graph.node("MatMul", x, graph.transposed(weight))
    else:
        # The pattern that onnxruntime knows as one operator.
        numbers, scale = quantized
        x8, x_scale, x_zero = graph.node("DynamicQuantizeLinear", x, outputs=3)
        product = graph.node("MatMulInteger", x8, graph.transposed(numbers), x_zero)
        product = graph.node("Cast", product, to=ONNX_TYPES[torch.float32])
        product = graph.node("Mul", product, graph.node("Mul", x_scale, scale))
    return product if bias is None else graph.node("Add", product, bias)


def _layer_norm(
    graph: Graph, out: Tensor, x: Value, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> str:
    if weight is None:
        weight = graph.constant(torch.ones(tuple(shape)))
    return graph.node("LayerNormalization", x, weight, bias, axis=-len(shape), epsilon=eps)


def _rms_norm(graph: Graph, out: Tensor, x: Value, shape: Any, weight: Tensor, eps: float) -> str:
    mean = graph.node("ReduceMean", graph.node("Mul", x, x), graph.ints(-1), keepdims=1)
    scale = graph.node("Sqrt", graph.node("Add", mean, graph.constant(eps)))
    return graph.node("Mul", graph.node("Div", x, scale), weight)


def _gelu(graph: Graph, out: Tensor, x: Value, approximate: str = "none") -> str:
    if approximate != "none":
        raise CannotExport(f"the model uses gelu with approximate={approximate}, which the export does not know")
    error = graph.node("Erf", graph.node("Mul", x, graph.constant(math.sqrt(0.5))))
    half = graph.node("Mul", x, graph.constant(0.5))
    return graph.node("Mul", half, graph.node("Add", error, graph.constant(1.0)))


# By the name of the torch function, without underscores: one entry for a function, its method, and that in place.
OPERATORS: dict[str, Callable[..., str]] = {
    **{
        name: _unary(name.capitalize())
        for name in ["relu", "exp", "log", "tanh", "sigmoid", "neg", "abs", "sqrt", "sin", "cos"]
    },
    **{name: _elementwise(name.capitalize()) for name in ["add", "sub", "mul", "div", "pow", "matmul"]},
    "square": lambda graph, out, x: graph.node("Mul", x, x),
    "matmul": _elementwise("MatMul"),
    "radd": _elementwise("Add", swapped=True),
    "rsub": _elementwise("Sub", swapped=True),
    "isub": _elementwise("Sub"),
    "iadd": _elementwise("Add"),
    "rmul": _elementwise("Mul", swapped=True),
    "truediv": _elementwise("Div"),
    "rtruediv": _elementwise("Div", swapped=True),
    "rdiv": _elementwise("Div", swapped=True),
    "rmatmul": _elementwise("MatMul", swapped=True),
    # Of numbers that are not negative, where it is no matter how they are rounded.
    "floordiv": _elementwise("Div"),
    "invert": _unary("Not"),
    "and": lambda graph, out, a, b: graph.node("And", a, b),
    "eq": _elementwise("Equal", compares=True),
    "ne": _not_equal,
    "gt": _elementwise("Greater", compares=True),
    "lt": _elementwise("Less", compares=True),
    "ge": _elementwise("GreaterOrEqual", compares=True),
    "le": _elementwise("LessOrEqual", compares=True),
    "sum": _reduce("ReduceSum"),
    "amax": _reduce("ReduceMax"),
    "any": lambda graph, out, x: graph.constant(True),
    "softmax": _along("Softmax"),
    "log_softmax": _along("LogSoftmax"),
    "clamp": _clamp,
    "masked_fill": _masked_fill,
    "where": _where,
    "cat": _cat,
    "cumsum": _cumsum,
    "permute": _permute,
    "transpose": _transpose,
    "t": lambda graph, out, x: graph.node("Transpose", x, perm=[1, 0]),
    "flip": _flip,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "unflatten": _unflatten,
    "flatten": _flatten,
    "reshape": _reshape,
    "getitem": _getitem,
    "index_select": _gather,
    "embedding": _embedding,
    "linear": _linear,
    "layer_norm": _layer_norm,
    "gelu": _gelu,
    "silu": lambda graph, out, x, inplace=False: graph.node("Mul", x, graph.node("Sigmoid", x)),
    "rms_norm": _rms_norm,
    **dict.fromkeys(("detach", "contiguous", "clone", "dropout"), _same),
    **dict.fromkeys(("to", "type_as", "float", "int", "long", "bool"), _cast),
}
