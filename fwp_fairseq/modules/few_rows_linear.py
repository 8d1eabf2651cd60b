"""Linear layers for decoding on a processor, where each call has a few rows: one for every hypothesis.

torch multiplies x Wᵀ. With few rows of x the BLAS spends most of the time on arranging the large transposed W; (W xᵀ)ᵀ
is the same product with a small matrix to arrange. recipes/benchmark/step.py measures both.
"""

import torch
from torch import Tensor, nn

# With more rows the two take the same time.
_MOST_ROWS = 128


class FewRowsLinear(nn.Linear):
    """nn.Linear, quicker without gradients for few rows in float32 on a processor; otherwise nn.Linear itself."""

    def forward(self, input: Tensor) -> Tensor:
        rows = input.numel() // self.in_features
        fits = 1 < rows <= _MOST_ROWS and input.dtype == torch.float32 and input.device.type == "cpu"
        if not fits or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        out = torch.mm(self.weight, input.reshape(rows, self.in_features).t()).t().contiguous()
        if self.bias is not None:
            out += self.bias
        return out.view(*input.shape[:-1], self.out_features)


def use_few_rows_linear(module: nn.Module) -> None:
    """Make all plain linear layers of ``module`` such layers. Parameters and their names stay."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = FewRowsLinear
