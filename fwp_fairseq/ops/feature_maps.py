"""Feature maps: what turns a key or a query into the vector that addresses the fast-weight memory.

All maps act on the last dimension. ``elu_plus_one`` is equation 30 of the paper, FAVOR+ equations 31-32 (Choromanski et
al., 2021), DPFP equation 37 and appendix C, sum normalisation equation 29. The paper is Schlag, Irie and Schmidhuber,
"Linear Transformers Are Secretly Fast Weight Programmers", ICML 2021. ``FEATURE_MAPS`` at the end has them all by the
names that users choose them by.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from fwp_fairseq.ops.numerics import smallest_divisor, state_dtype
from fwp_fairseq.ops.options import Option
from fwp_fairseq.ops.torch_modes import is_transformed, without_autocast

# exp() of a larger exponent would leave float32's range once two features are multiplied and summed.
_LARGEST_EXPONENT = 40.0


@without_autocast
def elu_plus_one(x: Tensor) -> Tensor:
    """ELU(x) + 1: x + 1 where x > 0, exp(x) elsewhere (eq. 30). Shape: (..., d_key) -> (..., d_key).

    One of the two terms is constant on either side. The exponential is taken directly rather than as expm1(x) + 1,
    which loses every digit for very negative x.
    """
    return x.relu() + x.clamp(max=0).exp()


@without_autocast
def dpfp(x: Tensor, nu: int = 1) -> Tensor:
    """Deterministic parameter-free projection (eq. 37). Shape: (..., d_key) -> (..., 2 * d_key * nu).

    With u = relu([x; -x]), feature block j is u * roll(u, j) for j = 1..nu. Raises ValueError unless
    1 <= nu <= 2 * d_key - 1: a roll by 2 * d_key would be no roll.
    """
    d_key = x.size(-1)
    if not 1 <= nu <= 2 * d_key - 1:
        raise ValueError(f"dpfp: nu is {nu}, allowed is 1 to 2 * d_key - 1 = {2 * d_key - 1}")
    u = torch.cat([x, -x], dim=-1).relu()
    # All the rolled copies are slices of one: u with its end put before it.
    around = torch.cat([u[..., -nu:], u], dim=-1)
    blocks = [u * around[..., nu - shift : nu - shift + 2 * d_key] for shift in range(1, nu + 1)]
    return blocks[0] if nu == 1 else torch.cat(blocks, dim=-1)


def draw_favor_projection(
    d_key: int,
    m: int,
    *,
    device: Optional[torch.device] = None,
    dtype: Optional[torch.dtype] = None,
    generator: Optional[torch.Generator] = None,
) -> Tensor:
    """Random matrix R of FAVOR+ (eq. 31-32). Shape: (m, d_key).

    Every row is distributed as N(0, I); rows are orthogonal within each block of d_key rows, which lowers the variance
    of the softmax-kernel estimate. Directions come from the QR decomposition of a Gaussian matrix, lengths from
    independent Gaussian vectors.
    """
    if d_key < 1 or m < 1:
        raise ValueError(f"draw_favor_projection: d_key is {d_key} and m is {m}, both must be at least 1")
    # QR exists in float32 and float64 only.
    draw_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, d_key, device=device, dtype=draw_dtype, generator=generator)

    blocks = []
    for start in range(0, m, d_key):
        q, r = torch.linalg.qr(normal(d_key))
        # Without these signs the columns of q would lean to one side: QR fixes the signs by its own convention.
        directions = q * r.diagonal().sign()
        blocks.append(directions.T[: m - start])
    lengths = normal(m).norm(dim=-1, keepdim=True)
    return (torch.cat(blocks) * lengths).to(dtype or draw_dtype)


@without_autocast
def favor_plus(x: Tensor, projection: Tensor) -> Tensor:
    """Positive random features of the softmax kernel (eq. 31-32). Shape: (..., d_key), (m, d_key) -> (..., 2 * m).

    exp(-|x|^2 / 2) / sqrt(2 m) * [exp(R x); exp(-R x)], evaluated with one exponential so that neither factor can
    overflow alone; exponents above 40 (features above 2e17) are cut off, to keep the sums that follow finite.
    """
    if not is_transformed():
        return _FavorPlus.apply(x, projection)
    scale = math.log(2 * projection.size(0)) / 2
    projected = x @ projection.T
    exponents = torch.cat([projected, -projected], dim=-1) - (x.square().sum(dim=-1, keepdim=True) / 2 + scale)
    return exponents.clamp(max=_LARGEST_EXPONENT - scale).exp()


class _FavorPlus(torch.autograd.Function):
    """FAVOR+ in few passes over the features, which are many, forward and backward. Its backward pass has one, too."""

    @staticmethod
    def forward(ctx, x, projection):  # type: ignore[no-untyped-def]
        # Half of each exponent, and the square of the exponential: torch's exp on a processor is ten to thirty times
        # slower where the result is too small for its type, as most are with large keys. Below the floor it is zero.
        numbers = torch.finfo(x.dtype)
        floor = math.log(numbers.tiny * numbers.eps) / 2 - 0.5
        scale = math.log(2 * projection.size(0)) / 4
        largest = _LARGEST_EXPONENT / 2 - scale
        projected = x @ projection.T / 2
        features = torch.cat([projected, -projected], dim=-1)
        features -= x.square().sum(dim=-1, keepdim=True) / 4 + scale
        features.clamp_(floor, largest).exp_().square_()
        ctx.save_for_backward(x, projection, features)
        ctx.cut_off = math.exp(2 * largest) * (1 - 1e-4)
        return features

    @staticmethod
    @without_autocast
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, projection, features = ctx.saved_tensors
        grad_exponent = (grad * features).masked_fill_(features > ctx.cut_off, 0)
        of_positive, of_negative = grad_exponent.chunk(2, dim=-1)
        grad_projected = of_positive - of_negative
        grad_x = grad_projected @ projection - x * grad_exponent.sum(dim=-1, keepdim=True)
        return grad_x, grad_projected.flatten(0, -2).T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None


@without_autocast
def favor_plus_normalized(x: Tensor, projection: Tensor) -> Tensor:
    """``sum_normalize(favor_plus(x, projection))`` as softmax([R x; -R x]). Shape: (..., d_key) -> (..., 2 * m).

    The factor exp(-|x|^2 / 2) cancels, so this form can neither overflow nor divide by zero.
    """
    projected = x @ projection.T
    return torch.cat([projected, -projected], dim=-1).softmax(dim=-1)


def draw_learned(num_heads: int, d_key: int, size: int) -> dict[str, Tensor]:
    """W, (H, size, d_key), and b, (H, 1, size), with which learned features start: pairs of opposite directions.

    They are orthogonal within blocks of d_key, and of length d_key^(1/4): φ(q)·φ(k) then grows with q·k, at first,
    as exp(q·k / sqrt(d_key)) does, the weight that softmax attention gives.
    """
    drawn = torch.stack([draw_favor_projection(d_key, (size + 1) // 2) for _ in range(num_heads)])
    directions = drawn / drawn.norm(dim=-1, keepdim=True) * d_key**0.25
    weight = torch.cat([directions, -directions], dim=1)[:, :size]
    return {"weight": weight, "bias": torch.zeros(num_heads, 1, size)}


def _exponents(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.transpose(-1, -2) + bias


@without_autocast
def learned_exp(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """exp(W x + b), of each head. Shapes: (..., H, L, d_key), (H, size, d_key), (H, 1, size) -> (..., H, L, size).

    Kasai et al. (2021) have relu in the place of exp, which Zhang et al. (2024, "The Hedgehog & the Porcupine") found
    to be nearer to softmax attention. Exponents above 32 are cut off: so sums over many tokens stay within float32.
    """
    return _exponents(x, weight, bias).clamp(max=32).exp()


@without_autocast
def learned_exp_normalized(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``sum_normalize(learned_exp(x, weight, bias))`` as softmax(W x + b), which cannot overflow. Shapes as there."""
    return _exponents(x, weight, bias).softmax(dim=-1)


@without_autocast
def sum_normalize(x: Tensor) -> Tensor:
    """x / sum(x) over the last dimension, for non-negative x (eq. 29). Shape: (..., D) -> (..., D). 0 maps to 0."""
    # float16 has too small a range for sums of features and for a floor that does not bias them.
    y = x.to(state_dtype(x.dtype))
    return (y / y.sum(dim=-1, keepdim=True).clamp(min=smallest_divisor(y.dtype))).to(x.dtype)


@without_autocast
def l2_normalize(x: Tensor) -> Tensor:
    """x / |x| over the last dimension. Shape: (..., D) -> (..., D). 0 maps to 0.

    With unit keys and write strengths up to one, a delta-rule write is a contraction along the key (Yang et al., 2024).
    """
    y = x.to(state_dtype(x.dtype))
    # Squares have half the range that features have: those of DPFP of small keys would all be below the floor. The
    # result does not depend on the scale, so no gradient goes through it. With it the length is one or more, unless the
    # largest feature is below the floor.
    y = y / y.detach().abs().amax(dim=-1, keepdim=True).clamp(min=smallest_divisor(y.dtype))
    return (y / y.square().sum(dim=-1, keepdim=True).clamp(min=1).sqrt()).to(x.dtype)


KEY_NORMALIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": sum_normalize,
    "l2": l2_normalize,
    "none": lambda features: features,
}


@dataclass(frozen=True)
class FeatureMap:
    """A feature map by name, with all that the rest of the package has to know of it.

    size: number of features, d_dot, for keys of d_key numbers; it is called with d_key and the values of ``options`` by
    name, as ``draw`` is.
    apply: (..., d_key) -> (..., d_dot), in float32 or float64; it is called with keys, and by name with the values of
    ``options`` and, if there is ``draw``, the ``projection``.
    signed: it has negative features, so that nothing can be divided by their sums.
    options: what a user can choose of it.
    draw: a random matrix, ``projection``, drawn anew for every call in training.
    learned: parameters at their start, by the names by which ``apply`` gets them; it is called with the number of heads
    before d_key. Keys then have the heads and the time as their dimensions before the last: (..., H, L, d_key).
    up_to_a_factor: the same as ``apply`` but for a positive factor for each key, where a normalisation takes that away.
    Its features have the sum 1.
    """

    name: str
    size: Callable[..., int]
    apply: Callable[..., Tensor]
    signed: bool = False
    options: tuple[Option, ...] = ()
    draw: Optional[Callable[..., Tensor]] = None
    learned: Optional[Callable[..., dict[str, Tensor]]] = None
    up_to_a_factor: Optional[Callable[..., Tensor]] = None

    def features(self, x: Tensor, normalization: str, **choices: Any) -> Tensor:
        """Normalised features, in float32 or float64: what addresses the memory. ``choices``: as ``apply`` has them."""
        if self.up_to_a_factor is None or normalization == "none":
            return KEY_NORMALIZATIONS[normalization](self.apply(x, **choices))
        features = self.up_to_a_factor(x, **choices)
        return features if normalization == "sum" else KEY_NORMALIZATIONS[normalization](features)


def _why_no_nu(nu: int, d_key: int, size: str, place: str) -> Optional[str]:
    largest = 2 * d_key - 1
    return None if 1 <= nu <= largest else f"allowed is 1 to 2 * {size} - 1 = {largest}{place}"


def _why_no_count(m: int, *_: Any) -> Optional[str]:
    return None if m >= 1 else "it must be at least 1"


FEATURE_MAPS = {
    feature_map.name: feature_map
    for feature_map in (
        FeatureMap("elu", size=lambda d_key: d_key, apply=elu_plus_one),
        FeatureMap(
            "favor",
            size=lambda d_key, favor_features: 2 * favor_features,
            apply=lambda x, projection, favor_features: favor_plus(x, projection),
            options=(
                Option(
                    "favor_features",
                    64,
                    "m of FAVOR+: random vectors per head, a memory has 2 * m rows",
                    why_not=_why_no_count,
                ),
            ),
            draw=lambda d_key, favor_features, **where: draw_favor_projection(d_key, favor_features, **where),
            # Features of large keys are too small for any type, but not relative to each other.
            up_to_a_factor=lambda x, projection, favor_features: favor_plus_normalized(x, projection),
        ),
        FeatureMap(
            "dpfp",
            size=lambda d_key, dpfp_nu: 2 * d_key * dpfp_nu,
            apply=lambda x, dpfp_nu: dpfp(x, dpfp_nu),
            options=(
                Option(
                    "dpfp_nu",
                    1,
                    "nu of DPFP, 1 to 2 * head size - 1: a memory has 2 * nu * head size rows",
                    why_not=_why_no_nu,
                ),
            ),
        ),
        FeatureMap(
            "learned",
            size=lambda d_key, learned_features: learned_features,
            apply=lambda x, weight, bias, learned_features: learned_exp(x, weight, bias),
            options=(
                Option(
                    "learned_features",
                    64,
                    "learned features per head: a memory has as many rows",
                    why_not=_why_no_count,
                ),
            ),
            learned=lambda num_heads, d_key, learned_features: draw_learned(num_heads, d_key, learned_features),
            up_to_a_factor=lambda x, weight, bias, learned_features: learned_exp_normalized(x, weight, bias),
        ),
        FeatureMap("tanh", size=lambda d_key: d_key, apply=torch.tanh, signed=True),
        FeatureMap("silu", size=lambda d_key: d_key, apply=F.silu, signed=True),
        FeatureMap("identity", size=lambda d_key: d_key, apply=lambda x: x, signed=True),
    )
}
