"""The flags that come with this package: fairseq prints its help before it reads --user-dir, and so without them."""

from dataclasses import Field, fields
from enum import Enum
from typing import Any

from fairseq import models, registry, tasks
from fairseq.models.transformer import TransformerConfig

from fwp_fairseq.models.fwp_transformer import flat_fields

_OURS = __name__.partition(".")[0] + "."


def help_of_flags() -> str:
    """Each with what it takes, its default and what it does, below what has it: these architectures, that task."""
    registered = {"--arch": models.MODEL_DATACLASS_REGISTRY, "--task": tasks.TASK_DATACLASS_REGISTRY}
    for name, kind in registry.REGISTRIES.items():
        registered[f"--{name.replace('_', '-')}"] = kind["dataclass_registry"]
    classes = [(f"{flag} {name}", c) for flag, found in registered.items() for name, c in found.items()]
    ours = [(owner, c) for owner, c in classes if c.__module__.startswith(_OURS)]
    of_fairseq = {name for name, *_ in flat_fields(TransformerConfig)}
    of_fairseq |= {option.name for owner in classes if owner not in ours for option in fields(owner[1])}
    owners: dict[str, list[str]] = {}
    for owner, config in ours:
        for option in fields(config):
            if option.name not in of_fairseq and not str(option.default).startswith("${"):
                owners.setdefault(_describe(option), []).append(owner)
    groups: dict[str, list[str]] = {}
    for description, having in owners.items():
        groups.setdefault(", ".join(having), []).append(description)
    return "\n\n".join("\n".join([f"{owner}:", *found]) for owner, found in groups.items())


def _describe(option: Field[Any]) -> str:
    kind = next(x for x in getattr(option.type, "__args__", [option.type]) if x is not type(None))
    is_choice = isinstance(kind, type) and issubclass(kind, Enum)
    takes = "" if kind is bool else f" {{{','.join(x.value for x in kind)}}}" if is_choice else f" {kind.__name__}"
    default = "" if kind is bool or option.default is None else f" (default: {option.default})"
    return f"  --{option.name.replace('_', '-')}{takes}{default}\n      {option.metadata.get('help', '')}"
