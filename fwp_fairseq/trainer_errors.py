"""Errors of fairseq's trainer that name their cause.

Its optimizers for --fp16 and --bf16 need a GPU; without one they end in an error about something else. When gradients
are not finite it looks for the module that is the cause, with hooks that do not bear an encoder's output, which is a
dictionary of lists: a training that diverged ended in "StopIteration".
"""

from functools import partial
from importlib.util import find_spec
from typing import Any

import torch


def refuse_half_precision_without_gpu() -> None:
    """Make fairseq's trainer say which flag to leave out. A second call changes nothing."""
    from fairseq.trainer import Trainer

    if getattr(Trainer, "fwp_checks_precision", False):
        return
    fairseq_init = Trainer.__init__

    def init(self: Any, cfg: Any, *args: Any, **kwargs: Any) -> None:
        flags = ("fp16", "bf16", "memory_efficient_fp16", "memory_efficient_bf16", "amp")
        chosen = [f"--{flag.replace('_', '-')}" for flag in flags if getattr(cfg.common, flag, False)]
        if chosen and (cfg.common.cpu or not torch.cuda.is_available()) and not find_spec("torch_xla"):
            raise ValueError(
                f"{chosen[0]} needs a GPU, and this training has none (or --cpu): leave {chosen[0]} out to train in "
                "float32"
            )
        fairseq_init(self, cfg, *args, **kwargs)

    Trainer.__init__ = init
    Trainer.fwp_checks_precision = True


def let_divergence_be_named() -> None:
    """Make fairseq look for the cause in the forward pass only, and then raise its FloatingPointError."""
    from fairseq import trainer
    from fairseq.nan_detector import NanDetector

    trainer.NanDetector = partial(NanDetector, backward=False)
