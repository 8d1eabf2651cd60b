"""The options of fast-weight attention, and which of their combinations make sense."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Optional

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from omegaconf import II

from fwp_fairseq.modules.key_features import FEATURE_MAPS, KEY_NORMALIZATIONS, check_feature_options
from fwp_fairseq.modules.places import CROSS_ATTENTION, DECODER_SELF_ATTENTION, ENCODER_SELF_ATTENTION
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
    # fairseq's own flag, which says that no GPU will be used.
    cpu: bool = II("common.cpu")

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
        """Raises ValueError for one that there is not."""
        _check_choice("--update-rule", self.update_rule, UPDATE_RULES)
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

    def without_effect(self, places: Collection[str]) -> dict[str, str]:
        """Options that change nothing in a model with fast weights in these places, and why."""
        options = [option.name for option in fields(self) if option.name not in ("_name", "cpu")]
        if not places:
            return dict.fromkeys(options, "no place has fast weights")
        whole = self.for_whole_memory() if {ENCODER_SELF_ATTENTION, CROSS_ATTENTION} & set(places) else None
        causal = self if DECODER_SELF_ATTENTION in places else None
        in_use = [config for config in (causal, whole) if config is not None]
        reasons: dict[str, str] = {}
        if whole is None:
            own = [name for name in options if name.startswith("whole_memory_")]
            reasons = dict.fromkeys(own, "neither the encoder nor cross-attention has fast weights")
        else:
            for name in ("update_rule", "feature_map"):
                flag, replacement = name.replace("_", "-"), getattr(self, f"whole_memory_{name}")
                if replacement == getattr(self, name):
                    reasons[f"whole_memory_{name}"] = f"--{flag} says so already"
                elif replacement and causal is None:
                    reasons[name] = f"--whole-memory-{flag} stands for it in all places with fast weights"
            if self.attention_normalization:
                reasons["whole_memory_attention_normalization"] = "--attention-normalization says so already"
        maps = {str(config.feature_map) for config in in_use}
        for name, feature_map in (("dpfp_nu", "dpfp"), ("favor_features", "favor")):
            if feature_map not in maps:
                reasons[name] = f"it is for the feature map {feature_map}, not for {' and '.join(sorted(maps))}"
        if not any(config.rule.strength for config in in_use):
            reasons["write_strength_bias"] = f"the rule {in_use[0].rule.name} has no write strength"
        if all(config.rule.max_norm is not None for config in in_use):
            reasons["read_layer_norm"] = f"the rule {in_use[0].rule.name} has it always"
        return reasons

    def warn_without_effect(self, places: Collection[str], defaults: Mapping[str, Any]) -> None:
        """Log a warning for each option that was set in vain. ``defaults``: those of the architecture."""
        standard = {option.name: option.default for option in fields(self)}
        for name, reason in self.without_effect(places).items():
            value = getattr(self, name)
            if value != defaults.get(name, standard[name]):
                flag = "--" + name.replace("_", "-") + ("" if value is True else f" {value}")
                logger.warning("%s has no effect in this model: %s", flag, reason)

    def check(self, embed_dim: int, num_heads: int, place: str) -> None:
        """Raise ValueError naming flag, value and what is allowed, if no attention of this size can be built.

        ``place`` names where the attention stands ("encoder" or "decoder"), as in fairseq's flags. Logs a warning for
        combinations that are allowed but known to diverge or to hurt.
        """
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
        if self.fast_weight_backend == "fla" and (not self.rule.erases or self.attention_normalization):
            raise ValueError(
                "--fast-weight-backend is fla, which has --update-rule delta and gated-delta only, without "
                "--attention-normalization"
            )
        check_backend(str(self.fast_weight_backend), self.rule, self.cpu is True)
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


def check_backend(backend: str, rule: UpdateRule, cpu: bool = False) -> None:
    """Raise ValueError if the backend is unknown, or cannot do what the rule needs, or has no GPU (``cpu``: --cpu)."""
    try:
        choose_backend(backend, rule.max_norm)
    except ValueError as error:
        raise ValueError(f"--fast-weight-backend, with --update-rule {rule.name}: {error}") from None
    if backend == "fla" and (cpu or not torch.cuda.is_available()):
        why = "--cpu says to use none" if cpu else "torch finds none"
        raise ValueError(
            f"--fast-weight-backend is fla, which needs a GPU, and {why}: allowed are auto, native, chunk and loop"
        )


def _check_choice(flag: str, value: object, allowed: Any) -> None:
    if str(value) not in allowed:
        raise ValueError(f"{flag} is {value}, allowed are {', '.join(allowed)}")
