"""One training at a time writes into a folder of checkpoints.

Two of them, such as a job that a cluster started again while the first one still ran, would replace each other's
checkpoints and write into the same unfinished files.

It can go when fairseq locks --save-dir by itself.
"""

import fcntl
import logging
import os
from typing import Any

import torch

from fwp_fairseq.fairseq_mends.trainings import of_trainings

logger = logging.getLogger(__name__)

CHANGES = ("fairseq.checkpoint_utils.load_checkpoint",)

_NAME = ".training.lock"

# Files whose locks this process holds. They are never closed: the system takes a lock back when its process ends,
# however it does.
_held: set[str] = set()


def why_alone(cfg: Any) -> str:
    """What to say to a training that is one of several by its launcher, but alone by its flags; "" if it is not."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes <= 1 or cfg.distributed_training.distributed_world_size > 1:
        return ""
    flags = f"--distributed-world-size {processes}"
    if cfg.common.cpu or not torch.cuda.is_available():
        flags += (
            " --distributed-init-method env:// --distributed-rank=-1 --distributed-no-spawn --distributed-backend gloo"
            " --ddp-backend legacy_ddp"
        )
    return f"WORLD_SIZE is {processes}, but each process trains alone: they train together with {flags}."


def hold_folder(folder: str, hint: str = "") -> None:
    """Keep other processes from training into this folder until this one ends.

    Raises RuntimeError, with the hint, if another one does. On a file system without locks nothing is held, with a
    warning.
    """
    path = os.path.join(os.path.realpath(folder), _NAME)
    if path in _held:
        return
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        logger.warning(f"{path} cannot be opened ({error.strerror}): other trainings are not kept from this folder")
        return
    try:
        # Unlike that of flock, this lock is not shared with forks: workers that outlive the training do not hold it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(file)
        raise RuntimeError(
            f"--save-dir {folder}: another training is writing into this folder. "
            + (hint or "Wait for its end, or name another.")
        ) from None
    except OSError as error:
        os.close(file)
        logger.warning(f"{path} cannot be locked ({error.strerror}): other trainings are not kept from this folder")
        return
    _held.add(path)


def install() -> None:
    """Make fairseq hold the folder that it saves into, before it reads a checkpoint."""

    def load_checkpoint(load: Any, cfg: Any, trainer: Any, **passthrough_args: Any) -> Any:
        if alone := why_alone(trainer.cfg):
            logger.warning(alone)
        if trainer.is_data_parallel_master and not cfg.no_save:
            hold_folder(cfg.save_dir, alone)
        return load(cfg, trainer, **passthrough_args)

    of_trainings("load_checkpoint", load_checkpoint)
