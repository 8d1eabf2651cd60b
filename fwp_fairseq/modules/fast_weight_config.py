"""The options of fast-weight attention, and which of their combinations make sense."""

import logging
from dataclasses import dataclass, field, fields, replace
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass

from fwp_fairseq.modules.key_features import FEATURE_MAPS, KEY_NORMALIZATIONS, check_feature_options
from fwp_fairseq.ops import BACKENDS, UPDATE_RULES, UpdateRule
from fwp_fairseq.ops.fast_weights import choose_backend

logger = logging.getLogger(__name__)


@dataclass
class FastWeightConfig(FairseqDataclass):
    """Options of every fast-weight attention in a model; each is a flag of the same name."""

    update_rule: ChoiceEnum(list(UPDATE_RULES)) = field(  # type: ignore[valid-type]
        default="delta", metadata={"help": "how a key-value pair is written into the fast-weight memory"}
    )
    feature_map: ChoiceEnum(list(FEATURE_MAPS)) = field(  # type: ignore[valid-type]
        default="dpfp", metadata={"help": "feature map of keys and queries"}
    )
    dpfp_nu: int = field(
        default=1, metadata={"help": "nu of DPFP, 1 to 2 * head size - 1: a memory has 2 * nu * head size rows"}
    )
    favor_features: int = field(
        default=64, metadata={"help": "m of FAVOR+: random vectors per head, a memory has 2 * m rows"}
    )
    key_normalization: ChoiceEnum(list(KEY_NORMALIZATIONS)) = field(  # type: ignore[valid-type]
        default="sum", metadata={"help": "scale features of keys and queries to sum 1, to length 1, or not at all"}
    )
    attention_normalization: bool = field(
        default=False, metadata={"help": "divide what is read by the accumulated keys (eq. 26-28)"}
    )
    whole_memory_update_rule: Optional[ChoiceEnum(list(UPDATE_RULES))] = field(  # type: ignore[valid-type]
        default=None, metadata={"help": "--update-rule of the encoder and of cross-attention, if it is another one"}
    )
    whole_memory_feature_map: Optional[ChoiceEnum(list(FEATURE_MAPS))] = field(  # type: ignore[valid-type]
        default=None, metadata={"help": "--feature-map of the encoder and of cross-attention, if it is another one"}
    )
    whole_memory_attention_normalization: bool = field(
        default=False, metadata={"help": "--attention-normalization in the encoder and in cross-attention only"}
    )
    read_layer_norm: bool = field(
        default=False, metadata={"help": "layer-normalise what each head reads; always on with the fwm rule"}
    )
    write_strength_bias: bool = field(
        default=False, metadata={"help": "add a learned bias to the projection that gives the write strength"}
    )
    no_attention_bias: bool = field(
        default=False, metadata={"help": "no biases in the projections of fast-weight attention"}
    )
    fast_weight_backend: ChoiceEnum(["auto", *BACKENDS]) = field(  # type: ignore[valid-type]
        default="auto", metadata={"help": "implementation of the fast-weight recurrence in training"}
    )

    @classmethod
    def from_args(cls, args: Any) -> "FastWeightConfig":
        """The options as plain values, from an argparse namespace or a model configuration that may have more."""
        values = {f.name: getattr(args, f.name) for f in fields(cls) if f.name != "_name" and hasattr(args, f.name)}
        # Choices arrive as strings or as members of an enumeration.
        plain: dict[str, Any] = {
            name: value if value is None or isinstance(value, (bool, int)) else str(value)
            for name, value in values.items()
        }
        return cls(**plain)

    @property
    def rule(self) -> UpdateRule:
        return UPDATE_RULES[str(self.update_rule)]

    def for_whole_memory(self) -> "FastWeightConfig":
        """The options of attention that reads the finished memory: encoder self-attention and cross-attention.

        There nothing depends on when a query comes, and a rule that lets later tokens erase earlier ones need not be
        the best.
        """
        return replace(
            self,
            update_rule=self.whole_memory_update_rule or self.update_rule,
            feature_map=self.whole_memory_feature_map or self.feature_map,
            attention_normalization=self.attention_normalization or self.whole_memory_attention_normalization,
        )

    def check(self, embed_dim: int, num_heads: int, place: str) -> None:
        """Raise ValueError naming flag, value and what is allowed, if no attention of this size can be built.

        ``place`` names where the attention stands ("encoder" or "decoder"), as in fairseq's flags. Logs a warning for
        combinations that are allowed but known to diverge or to hurt.
        """
        _check_choice("--update-rule", self.update_rule, UPDATE_RULES)
        _check_choice("--key-normalization", self.key_normalization, KEY_NORMALIZATIONS)
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(
                f"--{place}-attention-heads is {num_heads}, it must divide --{place}-embed-dim, which is {embed_dim}"
            )
        check_feature_options(
            str(self.feature_map),
            self.dpfp_nu,
            self.favor_features,
            embed_dim // num_heads,
            "head size",
            f" in the {place}",
        )
        signed = self.feature_map == "tanh"
        if signed and self.key_normalization == "sum":
            raise ValueError(
                "--key-normalization is sum, but --feature-map tanh has negative features: allowed are l2 and none"
            )
        if signed and self.attention_normalization:
            raise ValueError("--attention-normalization needs non-negative features: --feature-map tanh has not")
        if self.rule.max_norm is not None and self.attention_normalization:
            raise ValueError(
                f"--attention-normalization does not go with --update-rule {self.rule.name}: allowed are "
                + ", ".join(name for name, rule in UPDATE_RULES.items() if rule.max_norm is None)
            )
        check_backend(str(self.fast_weight_backend), self.rule)
        if self.fast_weight_backend == "fla" and (not self.rule.erases or self.attention_normalization):
            raise ValueError(
                "--fast-weight-backend is fla, which has --update-rule delta and gated-delta only, without "
                "--attention-normalization"
            )
        self._warn()

    def _warn(self) -> None:
        if not self.rule.erases or self.rule.max_norm is not None:
            return
        if self.key_normalization == "none":
            logger.warning(
                "--key-normalization none with --update-rule %s: the delta rule diverges when keys are not normalised "
                "(use sum or l2)",
                self.rule.name,
            )
        if self.attention_normalization:
            logger.warning(
                "--attention-normalization with --update-rule %s: it divides by sums of keys that can come close to "
                "zero, and hurts in the paper's table 3",
                self.rule.name,
            )


def check_backend(backend: str, rule: UpdateRule) -> None:
    """Raise ValueError if the backend is unknown, or cannot do what the rule needs."""
    try:
        choose_backend(backend, rule.max_norm)
    except ValueError as error:
        raise ValueError(f"--fast-weight-backend, with --update-rule {rule.name}: {error}") from None


def _check_choice(flag: str, value: object, allowed: Any) -> None:
    if str(value) not in allowed:
        raise ValueError(f"{flag} is {value}, allowed are {', '.join(allowed)}")
