"""Linear layers by 8-bit integers, for decoding on a processor (--decoding-weights int8): x Wᵀ + bias.

A row of W is rounded to 127 steps of its largest number, and so is a row of x, to 63: what comes of a row does not
depend on the rows beside it, and so a translation not on its batch. More steps could overflow the sums of pairs on
processors without VNNI. Products and their sums are exact.

Small weights stay as they are: there is nothing to gain, and the gates of a memory are among them.
"""

import weakref
from typing import Optional

import torch
from torch import Tensor

from fwp_fairseq.ops import native

# Numbers of a weight.
_SMALL = 2**15


def is_there() -> bool:
    """Whether there is the product."""
    return native.unavailable is None


def is_worth_it(weight: Tensor) -> bool:
    """Whether a layer with this weight is quicker by integers."""
    return weight.numel() > _SMALL


class Int8Weight:
    """The weight of one layer as integers, made when it is asked for, and anew for another weight or other numbers.

    A copy or a pickle of it is empty: they come to be in another process, or with another layer.
    """

    def __init__(self) -> None:
        self._made: Optional[tuple[weakref.ref[Tensor], int, tuple[Tensor, Tensor, Tensor]]] = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Int8Weight, ()

    def linear(self, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        """x: (..., inputs), in float32; returns (..., outputs)."""
        return native.integer_linear(x, *self.of(weight), bias)

    def of(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The integers as ``native.pack_integers`` has them, with what a step of each row is worth."""
        made = self._made  # another thread may replace it meanwhile
        if made is None or made[0]() is not weight or made[1] != weight._version:
            values = weight.detach()
            worth = (values.abs().amax(dim=1) / 127).clamp(min=torch.finfo(values.dtype).tiny)
            packed, offset = native.pack_integers((values / worth[:, None]).round().to(torch.int8))
            made = weakref.ref(weight), weight._version, (packed, offset, worth)
            self._made = made
        return made[2]
