"""Every process of a training knows that a checkpoint is going to be saved.

fairseq asks the task of the first process only for what goes into a checkpoint, so that what the others have cannot get
there. A task that has ``before_checkpoint`` is called on all of them before.

It can go when fairseq asks the tasks of all processes.
"""

from typing import Any

from fwp_fairseq.fairseq_mends.trainings import of_trainings

CHANGES = ("fairseq.checkpoint_utils.save_checkpoint",)


def install() -> None:
    """Make fairseq call ``before_checkpoint`` of a task that has it."""

    def save_checkpoint(save: Any, cfg: Any, trainer: Any, epoch_itr: Any, val_loss: Any) -> Any:
        before_checkpoint = getattr(trainer.task, "before_checkpoint", None)
        if before_checkpoint is not None and not cfg.no_save:
            before_checkpoint()
        return save(cfg, trainer, epoch_itr, val_loss)

    of_trainings("save_checkpoint", save_checkpoint)
