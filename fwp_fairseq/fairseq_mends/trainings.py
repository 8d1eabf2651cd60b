"""Where the mends take hold of a training: what goes with fairseq's own trainer, and nothing else."""

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any


def of_trainings(name: str, around: Callable[..., Any]) -> None:
    """Let ``around(original, cfg, trainer, ...)`` answer calls of ``fairseq.checkpoint_utils.<name>`` by a training.

    A training has fairseq's trainer and all of its configuration. Programs and tests with something of their own in the
    place of either get the original, since nothing is known of what that has.
    """
    from fairseq import checkpoint_utils

    original = getattr(checkpoint_utils, name)

    @functools.wraps(original)
    def function(cfg: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_training(cfg, trainer):
            return original(cfg, trainer, *args, **kwargs)
        return around(original, cfg, trainer, *args, **kwargs)

    setattr(checkpoint_utils, name, function)


def _is_training(cfg: Any, trainer: Any) -> bool:
    from fairseq.dataclass.configs import CheckpointConfig, FairseqConfig
    from fairseq.trainer import Trainer

    # Not isinstance: a mock says that it is whatever it stands in for.
    if not issubclass(type(trainer), Trainer):
        return False
    return _is_whole(trainer.cfg, FairseqConfig) and _is_whole(cfg, CheckpointConfig)


def _is_whole(config: Any, kind: type) -> bool:
    from omegaconf import DictConfig

    if isinstance(config, DictConfig):
        return {field.name for field in fields(kind) if not field.name.startswith("_")} <= set(config)
    return isinstance(config, kind)
