"""The options of fast-weight attention, and which of their combinations make sense."""

import itertools
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, make_dataclass, replace
from typing import Any, Optional

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from omegaconf import II

from fwp_fairseq.modules.places import CROSS_ATTENTION, ENCODER_SELF_ATTENTION, PLACES
from fwp_fairseq.modules.stages import STAGES
from fwp_fairseq.ops import (
    BACKENDS,
    FEATURE_MAPS,
    KEY_NORMALIZATIONS,
    UPDATE_RULES,
    FeatureMap,
    Option,
    UpdateRule,
    triton_scan,
)
from fwp_fairseq.ops.fast_weights import GPU_BACKENDS, choose_backend

logger = logging.getLogger(__name__)


def option_fields(options: Iterable[Option]) -> list[tuple[str, Any, Any]]:
    """Fields for ``make_dataclass``, which fairseq makes flags of."""
    return [
        (
            option.name,
            ChoiceEnum(option.type) if isinstance(option.type, list) else option.type,
            field(default=option.default, metadata={"help": option.help}),
        )
        for option in options
    ]


# What feature maps, update rules and stages say that there is to choose, and whose choice each is. Some may share one.
OWNERS_OF_CHOICES: dict[str, list[Any]] = {}
_owners: tuple[Any, ...] = (*FEATURE_MAPS.values(), *UPDATE_RULES.values(), *STAGES)
for _owner in _owners:
    for _option in _owner.options:
        OWNERS_OF_CHOICES.setdefault(_option.name, []).append(_owner)
_Choices = make_dataclass(
    "_Choices",
    option_fields(
        option for name, (owner, *_) in OWNERS_OF_CHOICES.items() for option in owner.options if option.name == name
    ),
    bases=(FairseqDataclass,),
)

ENCODER_READINGS = ("whole", "two-directions")

# Options that a place can have another value of, and the places that each prefix stands for.
_BY_PLACE = ("update_rule", "feature_map", "attention_normalization")
_PREFIXES: dict[str, tuple[str, ...]] = {
    "": PLACES,
    "whole_memory_": (ENCODER_SELF_ATTENTION, CROSS_ATTENTION),
    "cross_": (CROSS_ATTENTION,),
}
# What attention with slots has in their stead, since these map keys and queries themselves, and take a sum.
_OF_SLOTS: dict[str, Any] = {
    "update_rule": "sum",
    "feature_map": "identity",
    "key_normalization": "none",
    "attention_normalization": False,
}
_SLOTS = {ENCODER_SELF_ATTENTION: "encoder_slots", CROSS_ATTENTION: "cross_slots"}


@dataclass
class FastWeightConfig(_Choices):  # type: ignore[misc, valid-type]
    """Options of every fast-weight attention in a model; each is a flag of the same name."""

    update_rule: ChoiceEnum(list(UPDATE_RULES)) = field(  # type: ignore[valid-type]
        default="delta", metadata={"help": "how a key-value pair is written into the fast-weight memory"}
    )
    feature_map: ChoiceEnum(list(FEATURE_MAPS)) = field(  # type: ignore[valid-type]
        default="dpfp", metadata={"help": "feature map of keys and queries"}
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
    cross_update_rule: Optional[ChoiceEnum(list(UPDATE_RULES))] = field(  # type: ignore[valid-type]
        default=None, metadata={"help": "--update-rule of cross-attention, if it is another one"}
    )
    cross_feature_map: Optional[ChoiceEnum(list(FEATURE_MAPS))] = field(  # type: ignore[valid-type]
        default=None, metadata={"help": "--feature-map of cross-attention, if it is another one"}
    )
    cross_attention_normalization: bool = field(
        default=False, metadata={"help": "--attention-normalization in cross-attention only"}
    )
    cross_softmax_layers: Optional[str] = field(
        default=None,
        metadata={
            "help": "numbers of decoder layers, such as 2,6, that have softmax in cross-attention where others have "
            "fast weights"
        },
    )
    softmax_short_convolution: int = field(
        default=0,
        metadata={"help": "--short-convolution of the places with softmax, which that leaves as they are; 0: none"},
    )
    encoder_reading: ChoiceEnum(list(ENCODER_READINGS)) = field(  # type: ignore[valid-type]
        default="whole",
        metadata={
            "help": "fast weights in the encoder are read when all tokens are written, or, two-directions, after each, "
            "by half of the heads from left to right and by the others from right to left"
        },
    )
    no_attention_bias: bool = field(
        default=False, metadata={"help": "no biases in the projections of fast-weight attention"}
    )
    fast_weight_backend: ChoiceEnum(["auto", *BACKENDS]) = field(  # type: ignore[valid-type]
        default="auto", metadata={"help": "implementation of the fast-weight recurrence in training"}
    )
    decoding_weights: ChoiceEnum(["float32", "int8"]) = field(  # type: ignore[valid-type]
        default="float32",
        metadata={"help": "products of linear layers in generation on a processor: int8 is quicker"},
    )
    convert_attention: bool = field(
        default=False,
        metadata={"help": "make fast weights of the softmax attention of the checkpoint of --finetune-from-model"},
    )
    conversion_updates: int = field(
        default=100,
        metadata={"help": "updates in which converted attention learns what softmax attention gives, before training"},
    )
    log_memory: int = field(
        default=0,
        metadata={"help": "log write strengths, decays, norm and rank of the memories every so many updates; 0: never"},
    )
    # fairseq's own flag, which says that no GPU will be used.
    cpu: bool = II("common.cpu")

    @classmethod
    def from_args(cls, args: Any) -> "FastWeightConfig":
        """The options as plain values, from an argparse namespace or a model configuration that may have more."""
        defaults = {option.name: option.default for option in fields(cls) if option.name != "_name"}
        given = {name: getattr(args, name) for name in defaults if hasattr(args, name)}
        return cls(**{name: _plain(value, defaults[name]) for name, value in given.items()})

    @property
    def rule(self) -> UpdateRule:
        """Raises ValueError for one that there is not."""
        _check_choice("--update-rule", self.update_rule, UPDATE_RULES)
        return UPDATE_RULES[str(self.update_rule)]

    @property
    def map(self) -> FeatureMap:
        """Raises ValueError for one that there is not."""
        _check_choice("--feature-map", self.feature_map, FEATURE_MAPS)
        return FEATURE_MAPS[str(self.feature_map)]

    def choices(self, options: Iterable[Option]) -> dict[str, Any]:
        """The values of these options, by name."""
        return {option.name: getattr(self, option.name) for option in options}

    def for_place(self, place: str) -> "FastWeightConfig":
        """The options of the attention in one of PLACES: those for the place stand for those for more of them.

        Where the finished memory is read nothing depends on when a query comes, and a rule that lets later tokens
        erase earlier ones need not be the best.
        """
        chosen: dict[str, Any] = {name: 0 for other, name in _SLOTS.items() if other != place}
        if self.has_slots(place):
            return replace(self, **chosen, **_OF_SLOTS)
        for prefix, places in _PREFIXES.items():
            if place in places:
                chosen.update({name: value for name in _BY_PLACE if (value := getattr(self, prefix + name))})
        return replace(self, **chosen)

    def differs_by_place(self) -> bool:
        """Whether a place has a rule or a map of its own."""
        return any(getattr(self, prefix + name) for prefix in _PREFIXES if prefix for name in _BY_PLACE)

    def has_slots(self, place: str) -> bool:
        """Whether ``Slots`` are what the attention in one of PLACES has."""
        return place in _SLOTS and getattr(self, _SLOTS[place]) != 0

    def layers_with_softmax(self, layers: int) -> set[int]:
        """Which of a decoder's ``layers``, counted from 1, have softmax in cross-attention all the same.

        Raises ValueError for those that there are not, and for all of them.
        """
        if not self.cross_softmax_layers:
            return set()
        try:
            chosen = {int(number) for number in self.cross_softmax_layers.split(",")}
        except ValueError:
            chosen = {0}
        if not chosen < {*range(1, layers + 1)}:
            raise ValueError(
                f"--cross-softmax-layers is {self.cross_softmax_layers}, allowed are some of the numbers 1 to "
                f"{layers}, with commas between them, but not all: that is --cross-attention softmax"
            )
        return chosen

    def without_effect(self, places: Collection[str], there: Collection[str] = PLACES) -> dict[str, str]:
        """Options that change nothing in a model with fast weights in these places of those that are there, and why."""
        options = [option.name for option in fields(self) if option.name not in ("_name", "cpu")]
        of_softmax = ("softmax_short_convolution", *(["decoding_weights"] if self.softmax_short_convolution else []))
        if not places:
            return {option: "no place has fast weights" for option in options if option not in of_softmax}
        reasons = {}
        matrices = [place for place in places if not self.has_slots(place)]
        slots = " and ".join(f"--{_flag(name)}" for place, name in _SLOTS.items() if place in {*places} - {*matrices})
        slots_instead = f"{slots} stands for it in all places with fast weights"
        if set(there) <= set(places) and not self.cross_softmax_layers:
            reasons["softmax_short_convolution"] = "no place has softmax"
        for prefix, name in itertools.product(_PREFIXES, _BY_PLACE):
            of_prefix = set(_PREFIXES[prefix]) & set(places)
            only_slots = of_prefix and not of_prefix & set(matrices)
            reason = slots_instead if only_slots else self._why_without_effect(prefix, name, matrices)
            if reason is not None:
                reasons[prefix + name] = reason
        if CROSS_ATTENTION not in places:
            reasons |= dict.fromkeys(("cross_softmax_layers", "cross_slots"), "cross-attention has no fast weights")
        if ENCODER_SELF_ATTENTION not in places:
            reasons |= dict.fromkeys(("encoder_reading", "encoder_slots"), "the encoder has no fast weights")
        if not self.convert_attention:
            reasons["conversion_updates"] = "there is no --convert-attention"
        if set(places) == {ENCODER_SELF_ATTENTION} and "decoding_weights" not in of_softmax:
            reasons["decoding_weights"] = "the decoder has no fast weights"
        in_use = [self.for_place(place) for place in PLACES if place in matrices]
        maps, rules = {config.map.name for config in in_use}, {config.rule.name for config in in_use}
        reasons.update(_of_others("feature map", FEATURE_MAPS.values(), maps or {slots}))
        reasons.update(_of_others("update rule", UPDATE_RULES.values(), rules or {slots}))
        if not matrices:
            reasons["key_normalization"] = slots_instead
        for stage in STAGES:
            why = [stage.without_effect(self.for_place(place)) for place in places]
            reasons.update({name: why[0][name] for name in why[0] if all(name in each for each in why)})
        return reasons

    def _why_without_effect(self, prefix: str, name: str, places: Collection[str]) -> Optional[str]:
        """Why the option for the places of a prefix changes nothing, if it does not."""
        there = [place for place in _PREFIXES[prefix] if place in places]
        value = getattr(self, prefix + name)
        if not there:
            if prefix == "whole_memory_":
                return "neither the encoder nor cross-attention has fast weights"
            return "cross-attention has no fast weights"
        if not value:
            return None
        prefixes = list(_PREFIXES)
        earlier, later = prefixes[: prefixes.index(prefix)], prefixes[prefixes.index(prefix) + 1 :]
        others = {other: given for other in later if (given := getattr(self, other + name)) and given != value}
        if all(any(place in _PREFIXES[other] for other in others) for place in there):
            return f"--{_flag(next(iter(others)) + name)} stands for it in all places with fast weights"
        for place in there if earlier else ():
            of_place = [other for other in earlier if place in _PREFIXES[other] and getattr(self, other + name)]
            if not of_place or getattr(self, of_place[-1] + name) != value:
                return None
            said = of_place[-1]
        return f"--{_flag(said + name)} says so already" if earlier else None

    def warn_without_effect(self, places: Collection[str], there: Collection[str], defaults: Mapping[str, Any]) -> None:
        """Log a warning for each option that was set in vain. ``defaults``: those of the architecture."""
        standard = {option.name: option.default for option in fields(self)}
        for name, reason in self.without_effect(places, there).items():
            value = getattr(self, name)
            if value != defaults.get(name, standard[name]):
                flag = f"--{_flag(name)}" + ("" if value is True else f" {value}")
                logger.warning("%s has no effect in this model: %s", flag, reason)

    def check(self, embed_dim: int, num_heads: int, place: str) -> None:
        """Raise ValueError naming flag, value and what is allowed, if no attention of this size can be built.

        ``place`` names where the attention stands ("encoder" or "decoder"), as in fairseq's flags. Logs a warning for
        combinations that are allowed but known to diverge or to hurt.
        """
        _check_choice("--key-normalization", self.key_normalization, KEY_NORMALIZATIONS)
        _check_choice("--encoder-reading", self.encoder_reading, ENCODER_READINGS)
        for name in ("log_memory", "conversion_updates"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{_flag(name)} is {getattr(self, name)}, it must be at least 0")
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(
                f"--{place}-attention-heads is {num_heads}, it must divide --{place}-embed-dim, which is {embed_dim}"
            )
        both_ways = place == "encoder" and str(self.encoder_reading) == "two-directions"
        if both_ways and self.encoder_slots:
            raise ValueError(
                f"--encoder-reading is two-directions, and --encoder-slots {self.encoder_slots}: allowed is whole, or 0"
            )
        if both_ways and num_heads % 2:
            raise ValueError(
                f"--encoder-attention-heads is {num_heads}, it must be even with --encoder-reading two-directions, "
                "which takes half of them for each"
            )
        for option in (*self.map.options, *self.rule.options):
            option.check(getattr(self, option.name), embed_dim // num_heads, "head size", f" in the {place}")
        if self.map.signed and self.key_normalization == "sum":
            raise ValueError(
                f"--key-normalization is sum, but --feature-map {self.map.name} has negative features: allowed are l2 "
                "and none"
            )
        if self.map.signed and self.attention_normalization:
            raise ValueError(
                f"--attention-normalization needs non-negative features: --feature-map {self.map.name} has not"
            )
        if self.rule.max_norm is not None and self.attention_normalization:
            raise ValueError(
                f"--attention-normalization does not go with --update-rule {self.rule.name}: allowed are "
                + ", ".join(name for name, rule in UPDATE_RULES.items() if rule.max_norm is None)
            )
        if self.fast_weight_backend == "fla" and (not self.rule.erases or self.attention_normalization):
            raise ValueError(
                "--fast-weight-backend is fla, which has --update-rule delta and gated-delta only, without "
                "--attention-normalization, --encoder-slots and --cross-slots"
            )
        check_backend(str(self.fast_weight_backend), self.rule, self.cpu is True)
        for stage in STAGES:
            if stage.is_wanted(self):
                for option in stage.options:
                    option.check(getattr(self, option.name), embed_dim // num_heads, "head size", f" in the {place}")
                stage.check(self)
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


def _flag(name: str) -> str:
    return name.replace("_", "-")


def check_backend(backend: str, rule: UpdateRule, cpu: bool = False) -> None:
    """Raise ValueError if the backend is unknown, or cannot do what the rule needs, or has no GPU (``cpu``: --cpu)."""
    try:
        choose_backend(backend, rule.max_norm)
    except ValueError as error:
        raise ValueError(f"--fast-weight-backend, with --update-rule {rule.name}: {error}") from None
    if backend in GPU_BACKENDS and (cpu or not torch.cuda.is_available()):
        why = "--cpu says to use none" if cpu else "torch finds none"
        raise ValueError(
            f"--fast-weight-backend is {backend}, which needs a GPU, and {why}: "
            "allowed are auto, native, chunk and loop"
        )
    if backend == "triton" and not triton_scan.installed:
        raise ValueError(f"--fast-weight-{triton_scan.NOT_INSTALLED}")


def _check_choice(flag: str, value: object, allowed: Any) -> None:
    if str(value) not in allowed:
        raise ValueError(f"{flag} is {value}, allowed are {', '.join(allowed)}")


def _of_others(what: str, owners: Collection[Any], in_use: set[str]) -> dict[str, str]:
    """Options that feature maps or update rules have and none of those in use has, and whose they are."""
    reasons = {}
    for option, having in OWNERS_OF_CHOICES.items():
        names = [owner.name for owner in having if owner in owners]
        if names and not in_use & set(names):
            reasons[option] = f"it is for the {what} {' and '.join(names)}, not for {' and '.join(sorted(in_use))}"
    return reasons


def _plain(value: Any, default: Any) -> Any:
    """An option as a value of the type that its default has; choices arrive as strings or members of an enumeration."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(default, (int, float)) and isinstance(value, (int, float)) and type(default)(value) == value:
        return type(default)(value)
    return str(value)
