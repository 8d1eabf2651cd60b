"""Feature map and normalisation of keys and queries, composed into one module."""

from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor, nn

from fwp_fairseq.ops import (
    dpfp,
    draw_favor_projection,
    elu_plus_one,
    favor_plus,
    favor_plus_normalized,
    l2_normalize,
    sum_normalize,
)
from fwp_fairseq.ops.native import AddressFeatures
from fwp_fairseq.ops.numerics import state_dtype

FEATURE_MAPS = ("elu", "favor", "dpfp", "tanh")

KEY_NORMALIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": sum_normalize,
    "l2": l2_normalize,
    "none": lambda features: features,
}


def check_feature_options(feature_map: str, nu: int, m: int, d_key: int, size: str, place: str = "") -> None:
    """Raise ValueError naming flag, value and what is allowed. ``size`` is what d_key is called, ``place`` where."""
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"--feature-map is {feature_map}, allowed are {', '.join(FEATURE_MAPS)}")
    largest_nu = 2 * d_key - 1
    if feature_map == "dpfp" and not 1 <= nu <= largest_nu:
        raise ValueError(f"--dpfp-nu is {nu}, allowed is 1 to 2 * {size} - 1 = {largest_nu}{place}")
    if feature_map == "favor" and m < 1:
        raise ValueError(f"--favor-features is {m}, it must be at least 1")


class KeyFeatures(nn.Module):
    """Map (..., d_key) keys and queries to the (..., d_dot) vectors that address the memory; ``size`` is d_dot.

    FAVOR+ draws a new projection for every call in training (the paper: for every mini-batch), and uses the one of its
    construction, which checkpoints carry, in evaluation. Keys and queries that meet must go through one call.
    """

    projection: Optional[Tensor]

    def __init__(self, feature_map: str, normalization: str, d_key: int, *, nu: int = 1, m: int = 64) -> None:
        super().__init__()
        self.feature_map = feature_map
        self.normalization = normalization
        self.d_key = d_key
        self.nu = nu
        self.m = m
        self.size = {"elu": d_key, "favor": 2 * m, "dpfp": 2 * d_key * nu, "tanh": d_key}[feature_map]
        self.register_buffer("projection", draw_favor_projection(d_key, m) if feature_map == "favor" else None)

    def extra_repr(self) -> str:
        return f"{self.feature_map}, normalization={self.normalization}, {self.d_key} -> {self.size}"

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        projection = self._draw() if self.feature_map == "favor" else None
        return tuple(self._features(x, projection) for x in inputs)

    def address_features(self) -> AddressFeatures:
        """The same, in evaluation, for the compiled operators that map keys and queries themselves."""
        return AddressFeatures(self.feature_map, self.nu, self.normalization, self.projection)

    def _draw(self) -> Tensor:
        assert self.projection is not None
        if not self.training:
            return self.projection
        # The default generator, so that a layer recomputed under --checkpoint-activations draws the same again.
        return draw_favor_projection(self.d_key, self.m, device=self.projection.device)

    def _features(self, x: Tensor, projection: Optional[Tensor]) -> Tensor:
        # Products and exponentials of half-precision keys would overflow or vanish.
        wide = x.to(state_dtype(x.dtype))
        if projection is not None:
            projection = projection.to(wide)
            if self.normalization == "none":
                features = favor_plus(wide, projection)
            else:
                # Features of large keys are too small for any type, but not relative to each other.
                features = favor_plus_normalized(wide, projection)
                if self.normalization == "sum":
                    return features.to(x.dtype)
        elif self.feature_map == "dpfp":
            features = dpfp(wide, self.nu)
        else:
            features = elu_plus_one(wide) if self.feature_map == "elu" else wide.tanh()
        if self.normalization == "none" and x.dtype == torch.float16:
            # An infinite feature would make NaN of everything that meets it.
            features = features.clamp(max=torch.finfo(x.dtype).max)
        return KEY_NORMALIZATIONS[self.normalization](features).to(x.dtype)
