"""Feature map and normalisation of keys and queries, composed into one module."""

from typing import Any, Optional

import torch
from torch import Tensor, nn

from fwp_fairseq.ops import FEATURE_MAPS, KEY_NORMALIZATIONS, FeatureMap
from fwp_fairseq.ops.native import AddressFeatures
from fwp_fairseq.ops.numerics import state_dtype


class KeyFeatures(nn.Module):
    """Map (..., d_key) keys and queries to the (..., d_dot) vectors that address the memory; ``size`` is d_dot.

    ``choices`` are values of options by name, among them those of the feature map. One that learns does so for each of
    ``num_heads`` heads: it wants (..., num_heads, L, d_key).

    FAVOR+ draws a new projection for every call in training (the paper: for every mini-batch), and uses the one of its
    construction, which checkpoints carry, in evaluation. Keys and queries that meet must go through one call.
    """

    projection: Optional[Tensor]

    def __init__(self, feature_map: str, normalization: str, d_key: int, num_heads: int = 1, **choices: Any) -> None:
        super().__init__()
        if normalization not in KEY_NORMALIZATIONS:
            raise ValueError(f"normalization is {normalization}, allowed are {', '.join(KEY_NORMALIZATIONS)}")
        self.feature_map = feature_map
        self.choices = {option.name: choices[option.name] for option in self.map.options}
        self.normalization = normalization
        self.d_key = d_key
        self.size = self.map.size(d_key, **self.choices)
        draw = self.map.draw
        self.register_buffer("projection", None if draw is None else draw(d_key, **self.choices))
        learned = {} if self.map.learned is None else self.map.learned(num_heads, d_key, **self.choices)
        self.learned = list(learned)
        for name, start in learned.items():
            self.register_parameter(name, nn.Parameter(start))

    @property
    def map(self) -> FeatureMap:
        """By its name, which a pickle can take with it."""
        return FEATURE_MAPS[self.feature_map]

    def extra_repr(self) -> str:
        return f"{self.feature_map}, normalization={self.normalization}, {self.d_key} -> {self.size}"

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        choices = dict(self.choices)
        if self.map.draw is not None:
            choices["projection"] = self._draw()
        return tuple(self._features(x, **choices) for x in inputs)

    def address_features(self) -> AddressFeatures:
        """The same, in evaluation, for the compiled operators that map keys and queries themselves."""
        return AddressFeatures(self.feature_map, self.choices.get("dpfp_nu", 1), self.normalization, self.projection)

    def _draw(self) -> Tensor:
        assert self.projection is not None and self.map.draw is not None
        if not self.training:
            return self.projection
        # The default generator, so that a layer recomputed under --checkpoint-activations draws the same again.
        return self.map.draw(self.d_key, **self.choices, device=self.projection.device)

    def _features(self, x: Tensor, projection: Optional[Tensor] = None, **choices: Any) -> Tensor:
        # Products and exponentials of half-precision keys would overflow or vanish.
        wide = x.to(state_dtype(x.dtype))
        if projection is not None:
            choices["projection"] = projection.to(wide)
        choices.update({name: getattr(self, name).to(wide) for name in self.learned})
        features = self.map.features(wide, self.normalization, **choices)
        if self.normalization == "none" and x.dtype == torch.float16:
            # An infinite feature would make NaN of everything that meets it.
            features = features.clamp(max=torch.finfo(x.dtype).max)
        return features.to(x.dtype)
