"""Linear layers for decoding on a processor, where each call has a few rows: one for every hypothesis.

Then all the time goes into reading the weights. torch multiplies one row with one thread, and for a few rows the BLAS
spends most of the time on arranging the large transposed W of x Wᵀ. The compiled operator reads W once, with all
threads; without it (W xᵀ)ᵀ has a small matrix to arrange. recipes/benchmark/step.py measures them.
"""

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fwp_fairseq.ops import native

# With more rows all are bound by arithmetic, and the BLAS is as good.
_MOST_ROWS = 64


def few_rows_linear(input: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """F.linear, quicker without gradients for few rows in float32 on a processor."""
    rows = input.numel() // input.size(-1)
    fits = 0 < rows <= _MOST_ROWS and input.dtype == weight.dtype == torch.float32 and input.device.type == "cpu"
    if not fits or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return F.linear(input, weight, bias)
    x = input.reshape(rows, -1)
    if native.unavailable is None:
        out = native.few_rows_linear(x, weight, bias)
    else:
        out = torch.mm(weight, x.t()).t().contiguous()
        if bias is not None:
            out += bias
    return out.view(*input.shape[:-1], -1)


class FewRowsLinear(nn.Linear):
    """nn.Linear by ``few_rows_linear``."""

    def forward(self, input: Tensor) -> Tensor:
        return few_rows_linear(input, self.weight, self.bias)


def use_few_rows_linear(module: nn.Module) -> None:
    """Make all plain linear layers of ``module`` such layers. Parameters and their names stay."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = FewRowsLinear


class JointLinear:
    """Linear layers with the same input as one product.

    Weights and biases of the layers become parts of common tensors, so that nothing is there twice. Layers that are
    moved or converted afterwards have tensors of their own again, which ``is_current`` notices.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._sizes = [layer.out_features for layer in layers]
        self._parameters = [parameter for layer in layers for parameter in layer.parameters()]
        with torch.no_grad():
            self._weight = torch.cat([layer.weight for layer in layers])
            zeros = self._weight.new_zeros
            self._bias = torch.cat([zeros(len(x.weight)) if x.bias is None else x.bias for x in layers])
        for layer, weight, bias in zip(layers, self._weight.split(self._sizes), self._bias.split(self._sizes)):
            layer.weight.data = weight
            if layer.bias is not None:
                layer.bias.data = bias
        self._addresses = self._find()

    def _find(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self._parameters]

    def is_current(self) -> bool:
        """Whether the layers still have the weights that are multiplied here."""
        return self._find() == self._addresses

    def __call__(self, input: Tensor) -> tuple[Tensor, ...]:
        """The output of each layer for ``input``, (..., in_features)."""
        return few_rows_linear(input, self._weight, self._bias).split(self._sizes, dim=-1)


def join_linears(layers: Sequence[Optional[nn.Module]]) -> Optional[JointLinear]:
    """The layers that are there as one product; None if there is one that is not a plain linear layer."""
    plain: list[nn.Linear] = []
    for layer in layers:
        if layer is None:
            continue
        if not isinstance(layer, nn.Linear) or type(layer) not in (nn.Linear, FewRowsLinear):
            return None
        plain.append(layer)
    return JointLinear(plain)
