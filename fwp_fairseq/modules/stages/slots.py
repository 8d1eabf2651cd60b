"""Slots: what is looked at in place of the tokens of a source, always as many."""

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
# e^8 = 2,981 times the share that a token has of other slots.
_OWN = 8.0


def _why_not_so_many(slots: int, *_: Any) -> Optional[str]:
    allowed = slots == 0 or 2 <= slots <= MOST_SLOTS
    return None if allowed else f"allowed is 0, for none, or 2 to {MOST_SLOTS}"


def _number_of(place: str, places: str) -> Option:
    return Option(
        f"{place}_slots",
        0,
        f"{places} by softmax over so many means of the source, 2 to {MOST_SLOTS}, in place of a feature map and an "
        "update rule; 0: none",
        why_not=_why_not_so_many,
    )


class Slots(Stage):
    """φ(k_s)_j = exp(a_sj) / Σ_s' exp(a_s'j) and φ(q)_j = softmax_j(q · K_j / √d), with K = Σ_s φ(k_s) ⊗ k_s.

    The memory of the values is the sum rule's, W = Σ_s φ(k_s) ⊗ v_s, and so each of its rows, a slot, is a mean of
    values under a mean of keys, K_j. It is read as softmax attention reads tokens, but their number stays the same
    ("attention with bounded-memory control", Peng et al., 2022; with gates in place of means Zhang et al., 2024, "Gated
    slot attention"). A query can choose one slot alone, which a product of features does not let it.

    a_sj = w_j x_s + u [j = ⌊s N / max(S, N)⌋]: N slots take S tokens in their order, one each or, where there are more,
    neighbours together, with a u that to begin with leaves little to others. Slots that no token is for are empty, and
    not chosen. So what there is to begin with is softmax attention, to the tokens or to means of neighbours.
    """

    name = "slots"
    options = (_number_of("encoder", "the encoder's attention"), _number_of("cross", "cross-attention"))

    def __init__(self, config: FastWeightConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.size = config.cross_slots if sizes.cross else config.encoder_slots
        self.own = nn.Parameter(torch.full((sizes.num_heads, 1, 1), _OWN))
        # A bias would be the same for all tokens of a slot, and so change no share.
        self._projections = (Projection("slot_proj", "key", self.size, False, _initialize),)

    @classmethod
    def is_wanted(cls, config: FastWeightConfig) -> bool:
        return bool(config.encoder_slots or config.cross_slots)

    def extra_repr(self) -> str:
        return f"{self.size}"

    def projections(self) -> Sequence[Projection]:
        return self._projections

    def keys(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """φ(k), (B, H, S, slots), in the type of the state: of each slot, the shares of the tokens.

        And which slots are empty, (B, slots), but for the first one, where no token is there.
        """
        logits, padding = tokens.projected["slot_proj"], tokens.padding
        rows, _, length, _ = logits.shape
        wide = logits.to(state_dtype(logits.dtype))
        if padding is None:
            padding = torch.zeros(rows, length, dtype=torch.bool, device=logits.device)
        padding = padding.bool()
        tokens_there = (~padding).long()
        before, count = (tokens_there.cumsum(dim=1) - 1).clamp(min=0), tokens_there.sum(dim=1, keepdim=True)
        numbers = torch.arange(self.size, device=logits.device)
        own = before * self.size // count.clamp(min=self.size)
        wide = wide + self.own.to(wide.dtype) * (own[:, :, None] == numbers)[:, None].to(wide.dtype)
        hidden = padding[:, None, :, None]
        # Not -inf: softmax of nothing but padding would be no number.
        shares = wide.masked_fill(hidden, torch.finfo(wide.dtype).min).softmax(dim=2).masked_fill(hidden, 0)
        return shares, numbers >= count.clamp(min=1)

    def queries(self, q: Tensor, names: Tensor, empty: Tensor) -> Tensor:
        """φ(q), (B, H, T, slots), of q, (B, H, T, head_dim), and K, ``names``, (B, H, slots, head_dim)."""
        scores = (q.to(names.dtype) @ names.transpose(2, 3)) * q.size(3) ** -0.5
        return scores.masked_fill(empty[:, None, None], -torch.inf).softmax(dim=-1)


def _initialize(layer: nn.Linear) -> None:
    nn.init.xavier_uniform_(layer.weight)
