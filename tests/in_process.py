"""fairseq's commands called in the process of the tests.

Most of the time of a tiny training goes into reading its command line. It is read once for the flags that say what
model it is; options that differ from test to test are given by their names, and set in every section that has them.
"""

import copy
import functools
import io
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from fairseq import checkpoint_utils, options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer
from fairseq_cli import eval_lm, generate, interactive, train, validate
from omegaconf import DictConfig
from tiny_models import places

import fwp_fairseq.models
import fwp_fairseq.tasks  # noqa: F401
from fwp_fairseq.fairseq_mends.safe_loading import load_checkpoint_file

Flags = tuple[object, ...]

# What a model can have in the places of attention. A language model has one place, whose default is a fast weight.
KINDS = {"softmax": places("softmax"), "default": [], "fast weights": places("fast-weight")}
LM_KINDS = {kind: places(kind, "decoder-self-attention") for kind in ("softmax", "fast-weight")}

TRANSLATION = (
    *("--arch", "fwp_transformer", "--encoder-layers", 2, "--encoder-embed-dim", 16, "--encoder-ffn-embed-dim", 32),
    *("--encoder-attention-heads", 2, "--decoder-layers", 2, "--decoder-attention-heads", 2),
)
LM_TASK = ("--task", "language_modeling", "--sample-break-mode", "eos", "--tokens-per-sample", 32)
LANGUAGE_MODEL = (
    *(*LM_TASK, "--arch", "fwp_transformer_lm", "--decoder-layers", 2, "--decoder-embed-dim", 16),
    *("--decoder-ffn-embed-dim", 32, "--decoder-attention-heads", 2),
)
TRAINING = (
    *("--optimizer", "adam", "--lr", 1e-2, "--seed", 1, "--criterion", "cross_entropy", "--log-format", "json"),
    *("--log-interval", 1, "--batch-size", 8),
)
EVERYWHERE = ("data-bin", "--cpu", "--num-workers", 0, "--required-batch-size-multiple", 1)


def translation(kind: str) -> Flags:
    """Flags that train a translation model of this kind."""
    return (*TRAINING, *TRANSLATION, *KINDS[kind])


def language_model(kind: str) -> Flags:
    """Flags that train a language model of this kind."""
    return (*TRAINING, *LANGUAGE_MODEL, *LM_KINDS[kind])


@functools.cache
def _read(parser: Any, flags: Flags) -> DictConfig:
    arguments = [str(flag) for flag in (*EVERYWHERE, *flags)]
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser(), arguments))


def configuration(parser: Any, flags: Flags, **given: Any) -> DictConfig:
    """What the command of this parser makes of the flags and of these options, or sections, by name."""
    cfg = copy.deepcopy(_read(parser, flags))
    for name, value in given.items():
        sections = [part for part in (cfg, *cfg.values()) if isinstance(part, DictConfig) and name in part]
        assert sections, name
        for section in sections:
            section[name] = str(value) if isinstance(value, Path) else value
    return cfg


class Log(list):
    """Records of what was logged of the progress."""

    def stats(self, kind: str) -> list[dict[str, float]]:
        """Numbers in the lines of this kind: "train_inner" (an update), "train" (an epoch) or a subset's name."""
        lines = [json.loads(record.getMessage()) for record in self if record.name == kind]
        return [{name: float(value) for name, value in line.items()} for line in lines]

    def losses(self) -> list[float]:
        return [update["loss"] for update in self.stats("train_inner")]


@contextmanager
def logged() -> Iterator[Log]:
    log, logger = Log(), logging.getLogger("fairseq.logging.progress_bar")
    handler = logging.Handler()
    handler.emit = log.append  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        # It would take the handlers of pytest away.
        with patch.object(validate, "reset_logging"):
            yield log
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def training(flags: Flags, **given: Any) -> DictConfig:
    # fairseq keeps the best score of a process, whichever training it was of.
    checkpoint_utils.save_checkpoint.__dict__.pop("best", None)
    return configuration(options.get_training_parser, flags, **given)


def fairseq_train(flags: Flags, **given: Any) -> Log:
    with logged() as log:
        train.main(training(flags, **given))
    return log


def trainer_of(flags: Flags, **given: Any) -> Trainer:
    """The trainer that fairseq-train has before it looks for a checkpoint."""
    cfg = training(flags, **given)
    task = tasks.setup_task(cfg.task)
    torch.manual_seed(cfg.common.seed)
    return Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))


def fairseq_validate(flags: Flags = ("--task", "translation"), valid_subset: str = "valid", **given: Any) -> float:
    """The loss."""
    flags = ("--log-format", "json", "--batch-size", 8, *flags)
    with logged() as log:
        validate.main(configuration(options.get_validation_parser, flags, valid_subset=valid_subset, **given))
    return log.stats(valid_subset)[-1][f"{valid_subset}_loss"]


def fairseq_generate(flags: Flags = (), **given: Any) -> str:
    with redirect_stdout(io.StringIO()) as output:
        generate.main(configuration(options.get_generation_parser, flags, **given))
    return output.getvalue()


def fairseq_interactive(flags: Flags = (), **given: Any) -> str:
    with redirect_stdout(io.StringIO()) as output:
        interactive.main(configuration(options.get_interactive_generation_parser, flags, **given))
    return output.getvalue()


def fairseq_eval_lm(flags: Flags = LM_TASK, **given: Any) -> float:
    """Bits per word."""
    return float(eval_lm.main(configuration(options.get_eval_lm_parser, flags, **given))["loss"])


def hypotheses(output: str) -> list[tuple[int, float, str]]:
    """Number, score and text of all translations, in the order of their numbers and then of their scores."""
    found = re.findall(r"^H-(\d+)\t(\S+)\t(.*)$", output, re.M)
    return sorted(((int(i), float(score), text) for i, score, text in found), key=lambda h: (h[0], -h[1]))


def texts(output: str) -> list[str]:
    return [text for _, _, text in hypotheses(output)]


def saved(path: Path) -> dict[str, Any]:
    """What a checkpoint holds."""
    with path.open("rb") as file:
        return load_checkpoint_file(file)


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two models have the same parameters, to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
