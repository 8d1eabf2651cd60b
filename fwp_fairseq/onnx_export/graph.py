"""Recording of torch functions as ONNX operators.

A ``Value`` is handed to fairseq's own forward passes, and to the functions of ``fwp_fairseq.ops``, in place of a
tensor: torch gives every call on it to ``__torch_function__``, which adds the operator to the graph. So there is one
definition of what a model computes. torch.onnx does the same with more operators, in seconds for each layer where this
takes milliseconds, and without the last opsets. In signatures a value is a Tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Optional, Union

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor

# Sizes, while a graph is recorded, of the dimensions that are free in it. Rows are hypotheses, three of each sentence.
FREE_DIMENSIONS = {"sentences": 2, "source_length": 3, "rows": 6, "rows_before": 5, "length": 3}

# Matrices with a side below this, those of write strengths and kept shares, are not quantised.
_SMALLEST_QUANTIZED_SIDE = 16
# Of the signed numbers of 8 bits only those are used whose products with unsigned ones fit into 16 bits by twos: some
# processors add two of them before they widen the sum.
_LARGEST_NUMBER = 63

ONNX_TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.int64: onnx.TensorProto.INT64,
    torch.int32: onnx.TensorProto.INT32,
    torch.bool: onnx.TensorProto.BOOL,
    torch.int8: onnx.TensorProto.INT8,
}


class CannotExport(ValueError):
    """What the model does has no form in the graph."""


def _method(name: str) -> Callable[..., Any]:
    function = getattr(Tensor, name)
    return lambda *args: Value.__torch_function__(function, (), args)


class Value:
    """A tensor of a graph. It has torch.Tensor's methods, as far as ``operators`` knows them.

    ``example`` is such a tensor, of which only the type counts and, but for the free dimensions, the shape.
    """

    def __init__(self, graph: Graph, name: str, example: Tensor) -> None:
        self.graph = graph
        self.name = name
        self.example = example

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Value:
        from fwp_fairseq.onnx_export.operators import OPERATORS

        kwargs = kwargs or {}
        name = function.__name__
        operator = OPERATORS.get(name.strip("_"))
        if operator is None:
            raise CannotExport(f"the model uses {name}, which the export does not know")
        example = _map(_example, function)(args, kwargs)
        graph = max((value.graph for value in _values(args, kwargs)), key=lambda graph: graph.depth)
        made = Value(graph, operator(graph, example, *args, **kwargs), example)
        if name.endswith("_") and not name.startswith("__"):
            # In place: whoever has the value has the new one.
            args[0].graph, args[0].name, args[0].example = made.graph, made.name, made.example
            return args[0]
        return made

    def __getattr__(self, name: str) -> Any:
        function = getattr(Tensor, name)
        return lambda *args, **kwargs: Value.__torch_function__(function, (), (self, *args), kwargs)

    # Python looks these up in the class.
    __add__ = _method("__add__")
    __radd__ = _method("__radd__")
    __sub__ = _method("__sub__")
    __rsub__ = _method("__rsub__")
    __mul__ = _method("__mul__")
    __rmul__ = _method("__rmul__")
    __truediv__ = _method("__truediv__")
    __rtruediv__ = _method("__rtruediv__")
    __floordiv__ = _method("__floordiv__")
    __matmul__ = _method("__matmul__")
    __rmatmul__ = _method("__rmatmul__")
    __neg__ = _method("__neg__")
    __invert__ = _method("__invert__")
    __and__ = _method("__and__")
    __pow__ = _method("__pow__")
    __getitem__ = _method("__getitem__")
    __gt__ = _method("__gt__")
    __lt__ = _method("__lt__")
    __ge__ = _method("__ge__")
    __le__ = _method("__le__")

    def __bool__(self) -> bool:
        """Of what depends on data, such as whether there is padding, the graph has the general case."""
        return True

    @property
    def shape(self) -> torch.Size:
        return self.example.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.example.dtype

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def T(self) -> Value:
        return self.transpose(0, 1)

    def size(self, dim: Optional[int] = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.example.dim()


def _example(x: Any) -> Any:
    return x.example if isinstance(x, Value) else x


def _map(convert: Callable[[Any], Any], function: Any) -> Callable[[Any, Any], Any]:
    def converted(x: Any) -> Any:
        return type(x)(map(converted, x)) if isinstance(x, (list, tuple)) else convert(x)

    return lambda args, kwargs: function(*map(converted, args), **{name: converted(x) for name, x in kwargs.items()})


def _values(args: Any, kwargs: Any) -> list[Value]:
    found: list[Value] = []
    for x in (*args, *kwargs.values()):
        found += _values(x, {}) if isinstance(x, (list, tuple)) else [x] if isinstance(x, Value) else []
    return found


Input = Union[Value, Tensor, str, None]


class Graph:
    """Operators, weights, inputs and outputs.

    ``names`` are those of a model's parameters and buffers. ``quantize``: matrices of weights are in 8 bits. A graph
    within another one (the body of a loop) has the weights of the outermost.
    """

    def __init__(self, opset: int, names: dict[str, Tensor], quantize: bool = False, outer: Optional[Graph] = None):
        self.opset = opset
        self.quantize = quantize
        self.outer = outer
        self.depth: int = 0 if outer is None else outer.depth + 1
        self.root: Graph = self if outer is None else outer.root
        self.nodes: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.uses: set[str] = set()
        self._count = 0
        self._kept = names
        self._names = {tensor.data_ptr(): name for name, tensor in names.items()}
        self._weights: dict[Any, tuple[str, Tensor]] = {}
        self._constants: dict[Any, tuple[str, Tensor]] = {}
        self._quantized: dict[Any, tuple[Tensor, Tensor]] = {}

    # --- What a graph consists of ------------------------------------------------------------------------------------

    def input(self, name: str, dims: Sequence[Union[int, str]], dtype: torch.dtype = torch.float32) -> Any:
        """An input; a dimension is its size, or the name of a free one."""
        sizes = [FREE_DIMENSIONS[dim] if isinstance(dim, str) else dim for dim in dims]
        self.inputs.append(helper.make_tensor_value_info(name, ONNX_TYPES[dtype], list(dims)))
        return Value(self, name, torch.zeros(sizes, dtype=dtype))

    def output(self, name: str, value: Any, dims: Optional[Sequence[Union[int, str]]]) -> None:
        """Make ``value`` an output of this name."""
        self.nodes.append(helper.make_node("Identity", [value.name], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, ONNX_TYPES[value.dtype], dims))

    def node(self, operator: str, *inputs: Input, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Add an operator; tensors among the inputs are weights. Returns the name of its output, or of all of them."""
        made = [self._fresh(operator) for _ in range(outputs)]
        given = [self._name(x) for x in inputs]
        self.nodes.append(helper.make_node(operator, given, made, domain=domain, **attributes))
        self.root.uses.add(domain)
        return made[0] if outputs == 1 else made

    def value(self, name: str, *sizes: int, dtype: torch.dtype = torch.float32) -> Any:
        """The output ``name`` of a node, as a value of this shape."""
        return Value(self, name, torch.zeros(sizes, dtype=dtype))

    def size(self, value: Any, dim: int) -> str:
        """The size of a dimension, as a list of one number."""
        return self.node("Slice", self.node("Shape", value), self.ints(dim), self.ints(dim + 1))

    def _fresh(self, operator: str) -> str:
        self.root._count += 1
        return f"{operator}_{self.root._count}"

    def _name(self, x: Input) -> str:
        if isinstance(x, Tensor):
            return self.weight(x)
        return x.name if isinstance(x, Value) else x or ""

    # --- Weights and constants ---------------------------------------------------------------------------------------

    def weight(self, tensor: Tensor) -> str:
        """The name of a parameter or a part or transposition of it, which is in the file once."""
        weights, key = self.root._weights, _identity(tensor)
        if key not in weights:
            name = self.root._names.get(tensor.data_ptr())
            if name is None:
                return self.constant(tensor)
            taken = {taken for taken, _ in weights.values()}
            while name in taken:
                name += "'"
            weights[key] = (name, tensor)
        return weights[key][0]

    def constant(self, value: Any, dtype: Optional[torch.dtype] = None) -> str:
        """The name of a constant, which is in the file once."""
        tensor = torch.as_tensor(value, dtype=dtype).detach().contiguous()
        constants = self.root._constants
        key = (tensor.dtype, tensor.shape, tensor.numpy().tobytes())
        if key not in constants:
            constants[key] = (f"constant_{len(constants)}", tensor)
        return constants[key][0]

    def ints(self, *values: int) -> str:
        return self.constant(values, torch.int64)

    def transposed(self, matrix: Tensor) -> str:
        """The name of a transposed matrix: one of the file, or, where the matrix is already in it, made from that."""
        if _identity(matrix) in self.root._weights:
            return self.node("Transpose", matrix, perm=[1, 0])
        return self.weight(matrix.t())

    def in_8_bits(self, matrix: Tensor) -> Optional[tuple[Tensor, Tensor]]:
        """A matrix of weights as whole numbers and a scale for each row; None if it is not to be."""
        if not self.quantize or min(matrix.shape) < _SMALLEST_QUANTIZED_SIDE:
            return None
        quantized, key = self.root._quantized, _identity(matrix)
        if key not in quantized:
            scale = matrix.detach().abs().amax(dim=1).clamp(min=1e-30) / _LARGEST_NUMBER
            numbers = (matrix.detach() / scale[:, None]).round().to(torch.int8)
            name = self.root._names.get(matrix.data_ptr(), "weight")
            self.root._names[numbers.data_ptr()] = f"{name}.int8"
            self.root._names[scale.data_ptr()] = f"{name}.scale"
            quantized[key] = (numbers, scale)
        return quantized[key]

    # --- Loops -------------------------------------------------------------------------------------------------------

    def loop(
        self, body: Callable[..., tuple[Any, Optional[Any]]], state: Any, sequences: Sequence[Any]
    ) -> tuple[Any, Optional[Any]]:
        """Over the first dimension: body(state, item of each sequence) -> (state, item). The last state, the items."""
        inner = Graph(self.opset, {}, self.quantize, self)
        arguments = []
        for value in (state, *(Value(self, s.name, s.example[0]) for s in sequences)):
            name = inner._fresh("item")
            inner.inputs.append(helper.make_tensor_value_info(name, ONNX_TYPES[value.dtype], None))
            arguments.append(Value(inner, name, value.example))
        results = [result for result in body(*arguments) if result is not None]
        for result in results:
            inner.output(inner._fresh("result"), result, None)
        proto = helper.make_graph(inner.nodes, "body", inner.inputs, inner.outputs)
        made = [self._fresh("Scan") for _ in results]
        given = [value.name for value in (state, *sequences)]
        self.nodes.append(helper.make_node("Scan", given, made, body=proto, num_scan_inputs=len(sequences)))
        last = Value(self, made[0], results[0].example)
        if len(results) == 1:
            return last, None
        return last, self.value(made[1], len(sequences[0].example), *results[1].shape)

    # --- The whole ---------------------------------------------------------------------------------------------------

    def finish(self, name: str) -> onnx.ModelProto:
        """The model, with what its outputs need and nothing else."""
        nodes = _needed(self.nodes, {output.name for output in self.outputs})
        named = _names_in(nodes)
        tensors = [*self._weights.values(), *self._constants.values()]
        weights = [
            numpy_helper.from_array(np.ascontiguousarray(tensor.detach().numpy()), name)
            for name, tensor in tensors
            if name in named
        ]
        opsets = [helper.make_opsetid("", self.opset)]
        opsets += [helper.make_opsetid(domain, 1) for domain in sorted(self.uses - {""})]
        return helper.make_model(
            helper.make_graph(nodes, name, self.inputs, self.outputs, weights),
            opset_imports=opsets,
            ir_version=helper.find_min_ir_version_for(opsets, ignore_unknown=True),
            producer_name="fwp-fairseq",
        )


def _identity(tensor: Tensor) -> Any:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _bodies(node: Any) -> list[Any]:
    return [attribute.g for attribute in node.attribute if attribute.HasField("g")]


def _names_in(nodes: Any) -> set[str]:
    """What these nodes, and those of their bodies, read."""
    names: set[str] = set()
    for node in nodes:
        names.update(node.input)
        for body in _bodies(node):
            names |= _names_in(body.node)
    return names


def _needed(nodes: Sequence[Any], names: set[str]) -> list[Any]:
    """The nodes, in their order, that ``names`` are made by."""
    kept = []
    for node in reversed(nodes):
        if names.isdisjoint(node.output):
            continue
        for body in _bodies(node):
            body_nodes = _needed(body.node, {output.name for output in body.output})
            del body.node[:]
            body.node.extend(body_nodes)
        names |= _names_in([node])
        kept.append(node)
    return kept[::-1]
