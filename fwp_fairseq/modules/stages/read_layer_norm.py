"""A layer norm over what each head reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fwp_fairseq.modules.stages.stage import ReadOut, Sizes, Tokens
from fwp_fairseq.ops import Option

if TYPE_CHECKING:
    from fwp_fairseq.modules.fast_weight_config import FastWeightConfig


class ReadLayerNorm(ReadOut):
    """FWM reads through it (sec. 6.1.2): the bound on its memory bounds what can be read."""

    name = "read_layer_norm"
    options = (Option("read_layer_norm", False, "layer-normalise what each head reads; always on with fwm", bool),)

    def __init__(self, config: FastWeightConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.weight = nn.Parameter(torch.ones(sizes.head_dim))
        self.bias = nn.Parameter(torch.zeros(sizes.head_dim))

    @classmethod
    def is_wanted(cls, config: FastWeightConfig) -> bool:
        return config.read_layer_norm or config.rule.max_norm is not None

    @classmethod
    def without_effect(cls, config: FastWeightConfig) -> Mapping[str, str]:
        if config.rule.max_norm is None:
            return {}
        return {"read_layer_norm": f"the rule {config.rule.name} has it always"}

    def forward(self, read: Tensor, tokens: Tokens) -> Tensor:
        return F.layer_norm(read, self.weight.shape, self.weight, self.bias)
