"""Linear layers for decoding on a processor, where each call has a few rows: one for every hypothesis.

Then all the time goes into reading the weights. torch multiplies one row with one thread, and for a few rows the BLAS
spends most of the time on arranging the large transposed W of x Wᵀ. The compiled operator reads W once, with all
threads; without it (W xᵀ)ᵀ has a small matrix to arrange. recipes/benchmark/step.py measures them.

Nothing is kept of a layer but its weights as 8-bit integers, if these are wanted: every call looks at what it is and at
the weights that it has.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from fwp_fairseq.modules.int8_linear import Int8Weight, is_worth_it
from fwp_fairseq.ops import native

# With more rows all are bound by arithmetic, and the BLAS is quicker: kFewRows of csrc/decoder_step.cpp.
_MOST_ROWS = 48


def few_rows_linear(input: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """F.linear, quicker without gradients for few rows in float32 on a processor."""
    if not (_has_few_rows(input) and _is_dense(weight) and (bias is None or _is_dense(bias))):
        return F.linear(input, weight, bias)
    if native.unavailable is None:
        return native.few_rows_linear(input, weight, bias)
    out = torch.mm(weight, input.reshape(-1, input.size(-1)).t()).t().contiguous()
    if bias is not None:
        out += bias
    return out.view(*input.shape[:-1], -1)


def call_linears(layers: Sequence[nn.Module], input: Tensor) -> Sequence[Tensor]:
    """The output of each layer for ``input``, (..., in_features): those of plain linear layers by one operator."""
    if native.unavailable is None and _has_few_rows(input):
        parameters = _plain_parameters(layers)
        if parameters is not None:
            return native.few_rows_linears(input, *parameters)
    return [layer(input) for layer in layers]


def use_few_rows_linear(module: nn.Module, int8: bool = False) -> None:
    """Let all plain linear layers of ``module`` compute by ``few_rows_linear``. They stay nn.Linear, by name and type.

    ``int8``: by 8-bit integers (``int8_linear``) instead.

    fairseq's code calls most of them, so each gets a ``forward`` of its own, which leaves alone what comes to be around
    the call (hooks, another ``forward``) or in place of the class (parametrisations, conversions).
    """
    for layer in module.modules():
        if type(layer) is nn.Linear and "forward" not in vars(layer):
            layer.forward = partial(_forward, layer, Int8Weight() if int8 else None)  # type: ignore[method-assign]


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody has given it another ``forward`` than its class, and than ``use_few_rows_linear``."""
    forward = vars(module).get("forward")
    return not (forward is None or getattr(forward, "func", None) is _forward)


def _forward(layer: nn.Linear, integers: Optional[Int8Weight], input: Tensor) -> Tensor:
    if type(layer) is not nn.Linear:
        return type(layer).forward(layer, input)
    weight, bias = layer.weight, layer.bias
    dense = _is_dense(weight) and (bias is None or _is_dense(bias))
    if integers is not None and dense and is_worth_it(weight) and is_for_decoding(input):
        return integers.linear(input, weight, bias)
    return few_rows_linear(input, weight, bias)


class Product(NamedTuple):
    """x Wᵀ + bias, by the weight's numbers, or by its integers."""

    weight: Tensor
    bias: Optional[Tensor]
    integers: Optional[Int8Weight]


def product_of(layer: nn.Module) -> Optional[Product]:
    """What it is to call ``layer`` in decoding, if that is all it does, hooks apart."""
    if type(layer) is not nn.Linear or has_own_forward(layer) or not {"weight", "bias"} <= layer._parameters.keys():
        return None
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    if weight is None or not (_is_dense(weight) and (bias is None or _is_dense(bias))):
        return None
    if _multiplies_integers(vars(layer).get("forward"), weight):
        return Product(weight, bias, vars(layer)["forward"].args[1])
    return Product(weight, bias, None)


def _multiplies_integers(forward: Any, weight: Optional[Tensor]) -> bool:
    """Whether a layer's ``forward``, which may be that of ``use_few_rows_linear``, is by integers."""
    is_ours = getattr(forward, "func", None) is _forward and forward.args[1] is not None
    return is_ours and weight is not None and is_worth_it(weight)


def _plain_parameters(layers: Sequence[Any]) -> Optional[tuple[list[Tensor], list[Optional[Tensor]]]]:
    """Weights and biases of the layers, if to call them is to multiply by a dense weight and nothing else.

    It is asked for every layer of a decoder and every token: hence the plain loop over what nn.Module looks up slowly.
    """
    weights: list[Tensor] = []
    biases: list[Optional[Tensor]] = []
    for layer in layers:
        if type(layer) is not nn.Linear:
            return None
        own = vars(layer)
        parameters = own["_parameters"]
        if (
            _multiplies_integers(own.get("forward"), parameters.get("weight"))
            or own["_forward_pre_hooks"]
            or own["_forward_hooks"]
            or has_own_forward(layer)
            or "weight" not in parameters
            or "bias" not in parameters
        ):
            return None
        weight, bias = parameters["weight"], parameters["bias"]
        if not (_is_dense(weight) and (bias is None or _is_dense(bias))):
            return None
        weights.append(weight)
        biases.append(bias)
    return None if _has_any_global_hook() else (weights, biases)


def _has_few_rows(input: Tensor) -> bool:
    return input.numel() <= _MOST_ROWS * input.size(-1) and is_for_decoding(input)


def is_for_decoding(input: Tensor) -> bool:
    """Whether the operators, those of integers too, can multiply it."""
    return (
        input.numel() > 0
        and input.dtype == torch.float32
        and input.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def _is_dense(weight: Any) -> bool:
    """Whether the operators can read it; a tensor of another class may be quantised, or in several places."""
    return type(weight) is nn.Parameter and weight.dtype == torch.float32 and weight.layout is torch.strided
