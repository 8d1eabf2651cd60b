"""Gates: the scalars of the recurrence, by the update rule, from linear layers of what is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Optional

from torch import Tensor, nn

from fwp_fairseq.modules.stages.stage import Projection, Sizes, Stage, Tokens
from fwp_fairseq.ops import UPDATE_RULES, Gates, Option
from fwp_fairseq.ops.numerics import state_dtype

if TYPE_CHECKING:
    from fwp_fairseq.modules.fast_weight_config import FastWeightConfig


class TokenGates(Stage):
    """β = ρ σ(w_β x) and α = σ(w_α x + b), one of each per token and head, where the rule takes them (eq. 21).

    The range ρ is 1 in the paper. With ρ = 2 and keys of length one, W ← (I − β k kᵀ) W can change the sign of what is
    stored under a key, which tracking a state needs (Grazzi et al., 2025).
    """

    name = "gates"
    options = (
        Option(
            "write_strength_bias",
            False,
            "add a learned bias to the projection that gives the write strength",
            bool,
        ),
        Option(
            "write_strength_range",
            1.0,
            "the write strength is between 0 and this; above 1 an association can be written as its opposite",
            float,
            why_not=lambda value, *_: None if 0 < value <= 2 else "allowed is above 0 and up to 2",
        ),
    )

    def __init__(self, config: FastWeightConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.update_rule = config.rule.name
        self.range = config.write_strength_range
        self.rule_options = config.choices(config.rule.options)
        takes, bias = config.rule.takes, config.write_strength_bias
        self._projections = (
            Projection("write_proj", "key", 1, bias, _start_near_one_half, wanted="beta" in takes),
            Projection("decay_proj", "key", 1, True, _start_near_one, wanted="alpha" in takes),
        )

    @classmethod
    def without_effect(cls, config: FastWeightConfig) -> Mapping[str, str]:
        if "beta" in config.rule.takes:
            return {}
        reason = f"the rule {config.rule.name} has no write strength"
        return {"write_strength_bias": reason, "write_strength_range": reason}

    @classmethod
    def check(cls, config: FastWeightConfig) -> None:
        if config.write_strength_range > 1 and "beta" in config.rule.takes and not config.rule.erases:
            erasing = ", ".join(name for name, rule in UPDATE_RULES.items() if rule.erases)
            raise ValueError(
                f"--write-strength-range is {config.write_strength_range}, and --update-rule {config.rule.name} would "
                f"keep less than nothing of its memory: above 1 allowed are {erasing}"
            )

    def projections(self) -> Sequence[Projection]:
        return self._projections

    def forward(self, tokens: Tokens) -> Gates:
        """The gates of what is written, each (B, H, S) or None."""
        write_logit, decay_logit = (
            None if logit is None else logit.squeeze(-1)
            for logit in (tokens.projected.get("write_proj"), tokens.projected.get("decay_proj"))
        )
        shape = tokens.k.shape[:3]
        padding = None if tokens.padding is None else tokens.padding.bool()[:, None, :].expand(shape)
        gates = self.gates_of(write_logit, decay_logit, padding)
        return Gates(*(gate if gate is None or gate.shape == shape else gate.expand(shape) for gate in gates))

    def gates_of(
        self, write_logit: Optional[Tensor], decay_logit: Optional[Tensor], padding: Optional[Tensor]
    ) -> Gates:
        """The gates, of logits of any shape and, of one that broadcasts to it, where there is padding."""
        beta, alpha = _share(write_logit), _share(decay_logit)
        if beta is not None and self.range != 1:
            beta = self.range * beta
        return UPDATE_RULES[self.update_rule].gates(beta, alpha, padding, **self.rule_options)


def _share(logit: Optional[Tensor]) -> Optional[Tensor]:
    """Between 0 and 1, in the type of the state."""
    return None if logit is None else logit.to(state_dtype(logit.dtype)).sigmoid()


def _start_near_one_half(layer: nn.Linear) -> None:
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _start_near_one(layer: nn.Linear) -> None:
    """σ(4) = 0.98: a memory of some fifty tokens to start from."""
    nn.init.xavier_uniform_(layer.weight)
    nn.init.constant_(layer.bias, 4.0)
