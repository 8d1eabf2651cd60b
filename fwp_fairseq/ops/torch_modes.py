"""What becomes of an operator under torch's modes: autocast, torch.func, gradients of gradients, export."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

_Operator = TypeVar("_Operator", bound=Callable[..., Any])


def without_autocast(operator: _Operator) -> _Operator:
    """``operator`` computing under autocast as it does without, in the types that its tensors have.

    What is summed over a sequence outgrows half precision; autocast knows products one by one only.
    """

    @functools.wraps(operator)
    def run(*args: Any, **options: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return operator(*args, **options)
        device = next(x.device.type for x in (*args, *options.values()) if isinstance(x, Tensor))
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            return operator(*args, **options)

    return cast(_Operator, run)


@without_autocast
def differentiate_once(gradients: Callable[..., tuple[Any, ...]], *tensors: Tensor) -> tuple[Any, ...]:
    """``gradients(*tensors)`` for a backward pass, in words an error if it is differentiated in turn.

    ``tensors`` are all that it depends on. (torch's own ``once_differentiable`` takes the result for a constant where
    only what was saved requires a gradient.)
    """
    return _Gradients.apply(gradients, *tensors)


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradients, *tensors):  # type: ignore[no-untyped-def]
        return gradients(*tensors)

    @staticmethod
    def backward(ctx, *_):  # type: ignore[no-untyped-def]
        raise RuntimeError(NOT_TWICE)


NOT_TWICE = "the gradient of fast weights cannot be differentiated again; backend 'loop' can"


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work: they see through plain torch code only."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_exported_for_any(length: int) -> bool:
    """Whether torch.export traces a sequence of this length for other lengths as well."""
    if not hasattr(torch.compiler, "is_exporting") or not torch.compiler.is_exporting():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # takes a while to import

    return not has_static_value(length)
