"""Slots: what a decoder looks at in place of the tokens of a source, always as many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor, nn

from fwp_fairseq.modules.stages.stage import Projection, Sizes, Stage, Tokens
from fwp_fairseq.ops import Option
from fwp_fairseq.ops.numerics import state_dtype

if TYPE_CHECKING:
    from fwp_fairseq.modules.fast_weight_config import FastWeightConfig

MOST_SLOTS = 1024


def _why_not_so_many(slots: int, *_: Any) -> Optional[str]:
    allowed = slots == 0 or 2 <= slots <= MOST_SLOTS
    return None if allowed else f"allowed is 0, for none, or 2 to {MOST_SLOTS}"


class Slots(Stage):
    """φ(k_s)_j = exp(w_j x_s) / Σ_s' exp(w_j x_s') and φ(q)_j = softmax_j(q · K_j / √d), with K = Σ_s φ(k_s) ⊗ k_s.

    The memory of the values is the sum rule's, W = Σ_s φ(k_s) ⊗ v_s, and so each of its rows, a slot, is a mean of
    values under a mean of keys, K_j. It is read as softmax attention reads tokens, but their number stays the same
    ("attention with bounded-memory control", Peng et al., 2022; with gates in place of means Zhang et al., 2024, "Gated
    slot attention"). A query can choose one slot alone, which a product of features does not let it.
    """

    name = "slots"
    options = (
        Option(
            "cross_slots",
            0,
            f"cross-attention by softmax over so many means of the source, 2 to {MOST_SLOTS}, in place of a feature "
            "map and an update rule; 0: none",
            why_not=_why_not_so_many,
        ),
    )

    def __init__(self, config: FastWeightConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.size = config.cross_slots
        self._projections = (Projection("slot_proj", "key", self.size, True, _initialize),)

    @classmethod
    def is_wanted(cls, config: FastWeightConfig) -> bool:
        return config.cross_slots > 0

    def extra_repr(self) -> str:
        return f"{self.size}"

    def projections(self) -> Sequence[Projection]:
        return self._projections

    def keys(self, tokens: Tokens) -> Tensor:
        """φ(k), (B, H, S, slots), in the type of the state: of each slot, the shares of the tokens."""
        logits = tokens.projected["slot_proj"]
        wide = logits.to(state_dtype(logits.dtype))
        if tokens.padding is not None:
            # Not -inf: of a source that is nothing but padding there is no share.
            wide = wide.masked_fill(tokens.padding.bool()[:, None, :, None], torch.finfo(wide.dtype).min)
        return wide.softmax(dim=2)

    def queries(self, q: Tensor, names: Tensor) -> Tensor:
        """φ(q), (B, H, T, slots), of q, (B, H, T, head_dim), and K, ``names``, (B, H, slots, head_dim)."""
        return (q.to(names.dtype) @ names.transpose(2, 3) / q.size(3) ** 0.5).softmax(dim=-1)


def _initialize(layer: nn.Linear) -> None:
    # Shares that are all alike would make all slots alike, and their gradients.
    nn.init.xavier_uniform_(layer.weight, gain=2.0)
    nn.init.zeros_(layer.bias)
