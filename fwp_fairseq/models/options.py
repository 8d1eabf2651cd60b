"""What fairseq leaves to its models to do with options: defaults, layers to keep, modules that keep their dropout."""

import re
from argparse import Namespace
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import MISSING, fields
from enum import Enum
from typing import Any

from fairseq.modules.fairseq_dropout import FairseqDropout
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from torch import nn

# As fairseq has them; all others have the names of their classes.
_NAMES_FOR_DROPOUT = {"TransformerEncoderBase": "TransformerEncoder", "TransformerDecoderBase": "TransformerDecoder"}


def plain_options(model: type, args: Any, task: Any) -> Namespace:
    """All options of a registered ``model`` as plain values: what ``args`` has, and the defaults of the rest.

    ``args`` is a namespace that may have only what was given, a configuration of hydra's, or the model's dataclass. An
    option that refers to one of the task's, as fairseq's do, has the value of that; one that refers to nothing is None.
    Members of an enumeration, which cannot be pickled, become their values, since models keep their options.
    """
    given = args if isinstance(args, Mapping) else vars(args)
    options = {}
    for option in fields(getattr(model, "__dataclass")):  # noqa: B009  (a class's own code would mangle the name)
        options[option.name] = option.default if option.default_factory is MISSING else option.default_factory()
    for name in given:
        try:
            options[name] = given[name]
        except OmegaConfBaseException:  # It refers to what is not there.
            continue
    return Namespace(**{name: _plain(value, task) for name, value in options.items()})


def _plain(value: Any, task: Any) -> Any:
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True, enum_to_str=True)
    if isinstance(value, Enum):
        return value.value
    reference = re.fullmatch(r"\$\{(?:task\.)?(.*)\}", value) if isinstance(value, str) else None
    if reference is None:
        return value
    return getattr(getattr(task, "cfg", None) or getattr(task, "args", None), reference[1], None)


def complete_pruning(model: Any, state_dict: Mapping[str, Any], cfg: Any) -> None:
    """Say on ``cfg`` which layers of a checkpoint the model takes, on the side for which --*-layers-to-keep does not.

    fairseq takes none of a side whose flag was not given where the other's was; nor does it remember, in the
    configuration of a new training, how many layers are left, nor that its checkpoints have no others.
    """
    if not any(getattr(cfg, f"{side}_layers_to_keep", None) for side in ("encoder", "decoder")):
        return
    with open_dict(cfg) if isinstance(cfg, DictConfig) else nullcontext():
        for side in ("encoder", "decoder"):
            if not hasattr(model, side):
                continue
            layers = getattr(getattr(model, side).cfg, side).layers
            there = {match[1] for name in state_dict if (match := re.match(rf"{side}\..*?layers\.(\d+)\.", name))}
            setattr(cfg, f"{side}_layers", layers)
            if len(there) == layers:
                setattr(cfg, f"{side}_layers_to_keep", ",".join(sorted(there)))


def name_dropout(model: nn.Module) -> None:
    """Let --retain-dropout-modules find the dropout of our classes by the names of those of fairseq's they extend."""
    for module in model.modules():
        names = [kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("fairseq.")]
        for child in module.children():
            if isinstance(child, FairseqDropout) and child.module_name == type(module).__name__ and names:
                child.module_name = _NAMES_FOR_DROPOUT.get(names[0], names[0])
