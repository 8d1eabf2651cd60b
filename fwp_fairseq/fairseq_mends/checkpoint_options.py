"""A checkpoint goes into a model with the fast weights of its training, or is refused by the flag that differs.

Most rules and feature maps have parameters of the same names and shapes, so torch would load one for the other, and
fairseq compares nothing but these. With --convert-attention the checkpoint that a training begins with may have softmax
attention where the model has fast weights: it is converted when it is loaded.

It can go when fairseq lets a model refuse the options of a checkpoint.
"""

import argparse
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from typing import Any, NamedTuple, Optional

from fwp_fairseq.fairseq_mends import safe_loading
from fwp_fairseq.fairseq_mends.trainings import of_trainings
from fwp_fairseq.modules.conversion import convert
from fwp_fairseq.modules.fast_weight_config import OWNERS_OF_CHOICES, FastWeightConfig
from fwp_fairseq.modules.places import ATTENTION_KINDS, DECODER_SELF_ATTENTION, PLACES, places_with_fast_weights

CHANGES = ("fairseq.checkpoint_utils.load_checkpoint", "fairseq.checkpoint_utils.load_checkpoint_to_cpu")

# The options of the model that is about to take a checkpoint; None: those that the checkpoint has.
_wanted: ContextVar[Optional[Any]] = ContextVar("wanted", default=None)
_overrides: ContextVar[Optional[Mapping[str, Any]]] = ContextVar("overrides", default=None)


class Conversion(NamedTuple):
    """Of the checkpoint that a training begins with, for the model of its trainer."""

    checkpoint: str
    trainer: Any


_conversion: ContextVar[Optional[Conversion]] = ContextVar("conversion", default=None)

_SOFTMAX, _FAST_WEIGHT = ATTENTION_KINDS


@contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def _as_dict(options: Any) -> dict[str, Any]:
    """Options of a model as a plain dictionary: a namespace, a mapping, or a dataclass."""
    if isinstance(options, Mapping):
        return {str(name): options[name] for name in options}
    return dict(vars(options)) if hasattr(options, "__dict__") else {}


def _architecture(options: Mapping[str, Any]) -> str:
    return str(options.get("_name") or options.get("arch") or "")


def fast_weight_flags(options: Mapping[str, Any], with_heads: bool = False) -> dict[str, str]:
    """The flags that decide what a model with these options computes with fast weights, and their values.

    A model of fairseq's own has softmax everywhere. Options that a checkpoint of an earlier version lacks have their
    defaults. ``with_heads``: and the numbers of heads, which softmax has as well.
    """
    architecture, namespace = _architecture(options), argparse.Namespace(**options)
    there = (DECODER_SELF_ATTENTION,) if architecture.startswith("fwp_transformer_lm") else PLACES
    places = places_with_fast_weights(namespace, there if architecture.startswith("fwp_transformer") else ())
    flags = {place.replace("_", "-"): _FAST_WEIGHT if place in places else _SOFTMAX for place in PLACES}
    config = FastWeightConfig.from_args(namespace)
    # These change how it is computed, or what is said of it.
    ignored = {"_name", "cpu", "fast_weight_backend", "decoding_weights", "log_memory"}
    ignored.update(("convert_attention", "conversion_updates"), config.without_effect(places, there))
    # Those of every model first: what a map or a rule has follows from these.
    for name in sorted((option.name for option in fields(config)), key=lambda name: name in OWNERS_OF_CHOICES):
        if name not in ignored:
            flags[name.replace("_", "-")] = str(getattr(config, name))
    heads = [f"{side}_attention_heads" for side in ("encoder", "decoder")] if with_heads else []
    flags.update({name.replace("_", "-"): str(options[name]) for name in heads if name in options})
    return flags


def conversion_of(cfg: Any, trainer: Any) -> Optional[Conversion]:
    """What a training with the checkpoint options ``cfg`` begins with, if it converts that and does not go on already.

    Raises ValueError if there is nothing to begin with.
    """
    if not getattr(trainer.cfg.model, "convert_attention", False):
        return None
    if not cfg.finetune_from_model:
        raise ValueError("--convert-attention needs --finetune-from-model, the checkpoint with softmax attention")
    goes_on = os.path.exists(os.path.join(cfg.save_dir, f"checkpoint_last{trainer.checkpoint_suffix}.pt"))
    return None if goes_on else Conversion(cfg.finetune_from_model, trainer)


def check_options(state: Any, name: str) -> None:
    """Raise ValueError if a loaded checkpoint was trained with other fast weights than the model that takes it has.

    Options that are to be overridden, and that it lacks, are added to it. One that is to be converted is.
    """
    if not isinstance(state, dict):
        return
    config = state.get("cfg")
    trained = _as_dict(config.get("model")) if isinstance(config, Mapping) else _as_dict(state.get("args"))
    wanted = _as_dict(_wanted.get()) if _wanted.get() is not None else {**trained, **(_overrides.get() or {})}
    if not all(_architecture(options) for options in (trained, wanted)):
        return
    if not any(_architecture(options).startswith("fwp_transformer") for options in (trained, wanted)):
        return
    conversion = _conversion.get()
    if conversion is not None and conversion.checkpoint != name:
        conversion = None
    before, now = (fast_weight_flags(options, with_heads=conversion is not None) for options in (trained, wanted))
    differing = [flag for flag in {**before, **now} if before.get(flag) != now.get(flag)]
    # One that is in use in one of them only may be so because of another that differs.
    differing.sort(key=lambda flag: not (flag in before and flag in now))
    softmax_before = [flag for flag in differing if (before.get(flag), now.get(flag)) == (_SOFTMAX, _FAST_WEIGHT)]
    if conversion is not None:
        differing = [flag for flag in differing if flag in before and flag in now and flag not in softmax_before]
        width = before.get("softmax-short-convolution", "0")
        if width != "0":
            raise ValueError(
                f"{name} was trained with --softmax-short-convolution {width}, and --convert-attention makes fast "
                "weights of softmax without it alone"
            )
    if differing:
        flag, advice = differing[0], "give it the flags of its training"
        if flag in softmax_before and _wanted.get() is not None:
            advice += ", or begin with it by --finetune-from-model and --convert-attention"
        raise ValueError(
            f"{name} was trained with --{flag} {before.get(flag, '(not in use)')}, and this model has --{flag} "
            f"{now.get(flag, '(not in use)')}: {advice}."
        )
    if conversion is not None:
        if not softmax_before:
            raise ValueError(f"--convert-attention: {name} has no softmax where this model has fast weights.")
        convert(state["model"], name, [flag.replace("-", "_") for flag in softmax_before], conversion.trainer)
    # fairseq overrides what a checkpoint has, and one of an earlier version lacks what there is to choose since.
    if isinstance(config, Mapping) and isinstance(config.get("model"), dict):
        for option in fields(FastWeightConfig):
            if option.name in (_overrides.get() or {}):
                config["model"].setdefault(option.name, option.default)


def install() -> None:
    """Make fairseq compare the options when it resumes, fine-tunes and generates."""
    from fairseq import checkpoint_utils

    safe_loading.check_loaded(check_options)
    load_to_cpu = checkpoint_utils.load_checkpoint_to_cpu

    def load_checkpoint(load: Any, cfg: Any, trainer: Any, **passthrough_args: Any) -> Any:
        with _set(_wanted, trainer.cfg.model), _set(_conversion, conversion_of(cfg, trainer)):
            return load(cfg, trainer, **passthrough_args)

    def load_checkpoint_to_cpu(path: str, arg_overrides: Optional[dict[str, Any]] = None, **options: Any) -> Any:
        with _set(_overrides, arg_overrides):
            return load_to_cpu(path, arg_overrides, **options)

    of_trainings("load_checkpoint", load_checkpoint)
    checkpoint_utils.load_checkpoint_to_cpu = load_checkpoint_to_cpu
