"""Linear layers by 8-bit integers, for decoding on a processor (--decoding-weights int8): x Wᵀ + bias.

A row of W is rounded to 127 steps of its largest number, and so is a row of x, to 63: what comes of a row does not
depend on the rows beside it, and so a translation not on its batch. More steps could overflow the sums of pairs on
processors without VNNI. Products and their sums are exact, by oneDNN.

Small weights stay as they are: for one row a call takes longer than reading them. That, too, does not depend on how
many rows there are.
"""

import weakref
from typing import Any, Optional

import torch
from torch import Tensor

_STEPS = 63
# Numbers of a weight: those of 512 x 512, where one row gains nothing.
_SMALL = 2**18


def is_there() -> bool:
    """Whether this torch has the product."""
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.onednn, name) for name in ("qlinear_prepack", "qlinear_pointwise")
    )


def is_worth_it(weight: Tensor) -> bool:
    """Whether a layer with this weight is quicker by integers."""
    return weight.numel() > _SMALL


class Int8Weight:
    """The weight of one layer as integers, made when it is asked for, and anew for another weight or other numbers.

    A copy or a pickle of it is empty: they come to be in another process, or with another layer.
    """

    def __init__(self) -> None:
        self._made: Optional[tuple[weakref.ref[Tensor], int, tuple[Any, ...]]] = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Int8Weight, ()

    def linear(self, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        """x: (..., inputs), in float32; returns (..., outputs)."""
        rows = x.reshape(-1, x.size(-1))
        step = rows.abs().amax(dim=1, keepdim=True).div_(_STEPS).clamp_(min=torch.finfo(x.dtype).tiny)
        # Cut off, not rounded: with a half more it is the nearest.
        integers = (rows / step).add_(_STEPS + 1.5).to(torch.uint8)
        packed, worth, zeros = self._of(weight)
        product = torch.ops.onednn.qlinear_pointwise(
            integers, 1.0, _STEPS + 1, packed, worth, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        product = product.mul_(step) if bias is None else torch.addcmul(bias, product, step)
        return product.view(*x.shape[:-1], weight.size(0))

    def _of(self, weight: Tensor) -> tuple[Any, ...]:
        made = self._made  # another thread may replace it meanwhile
        if made is None or made[0]() is not weight or made[1] != weight._version:
            values = weight.detach()
            worth = (values.abs().amax(dim=1) / 127).clamp(min=torch.finfo(values.dtype).tiny)
            integers = (values / worth[:, None]).round().to(torch.int8)
            packed = torch.ops.onednn.qlinear_prepack(integers, None)
            made = (
                weakref.ref(weight),
                weight._version,
                (packed, worth, torch.zeros(len(worth), dtype=torch.long)),
            )
            self._made = made
        return made[2]
