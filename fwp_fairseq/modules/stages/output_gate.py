"""A gate on what each head reads, from the token that asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fwp_fairseq.modules.stages.stage import Projection, ReadOut, Sizes, Tokens
from fwp_fairseq.ops import Option

if TYPE_CHECKING:
    from fwp_fairseq.modules.fast_weight_config import FastWeightConfig


class OutputGate(ReadOut):
    """o ← RMSNorm(o) ∘ swish(W_g x), with the norm over each head (Yang et al., 2025)."""

    name = "output_gate"
    options = (
        Option("output_gate", False, "scale what each head reads to mean square one, and multiply it by a gate", bool),
    )

    def __init__(self, config: FastWeightConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.weight = nn.Parameter(torch.ones(sizes.head_dim))
        self._projections = (Projection("gate_proj", "query", sizes.head_dim, False, _initialize),)

    @classmethod
    def is_wanted(cls, config: FastWeightConfig) -> bool:
        return config.output_gate

    def projections(self) -> Sequence[Projection]:
        return self._projections

    def forward(self, read: Tensor, tokens: Tokens) -> Tensor:
        return F.rms_norm(read, self.weight.shape, self.weight, eps=1e-6) * F.silu(tokens.projected["gate_proj"])


def _initialize(layer: nn.Linear) -> None:
    nn.init.xavier_uniform_(layer.weight)
