"""A training that resumes ends as it would have without the interruption.

It goes on with the batches that it would have had. fairseq 0.12.3 makes up the batches once, with a random order that
depends on the epoch in which it does so, and keeps them for all further epochs. A training that resumes in its third
epoch therefore has other batches than one that was never interrupted; in the rest of that epoch some sentences come
again and others not at all.

And one that had come to its end does not go on. fairseq looks at --max-update and --stop-time-hours after an update
only: a training that was killed between its last checkpoint and its end, or is started again, made one more. One that
begins with the parameters of another (--finetune-from-model) has hours of its own: fairseq adds those of the other one.

It can go when fairseq's checkpoints say with which epoch's order their batches were made up, its training loop looks at
the limits before an update, and --finetune-from-model begins the hours anew.
"""

import logging
from typing import Any

from fwp_fairseq.fairseq_mends.trainings import of_trainings

logger = logging.getLogger(__name__)

CHANGES = ("fairseq.checkpoint_utils.load_checkpoint",)


def install() -> None:
    """Make fairseq resume with the batches of a training that began in epoch 1, and only what is not at its end."""
    from fairseq.data.iterators import EpochBatchIterator

    def load_checkpoint(load: Any, cfg: Any, trainer: Any, **passthrough_args: Any) -> Any:
        extra_state, epoch_itr = load(cfg, trainer, **passthrough_args)
        if not trainer.get_num_updates():
            trainer._previous_training_time = 0
        if reason := _why_it_ended(trainer):
            logger.info(f"the training has come to its end before: {reason}")
            # No epoch has such a number; 0 stands for no limit.
            trainer.cfg.optimization.max_epoch = -1
        if type(epoch_itr) is not EpochBatchIterator or epoch_itr.epoch <= 1:
            return extra_state, epoch_itr
        # Where batches are made up for each epoch or each part of the data, they depend on that alone already, and no
        # iterator is kept; data sets that cannot be hashed are of this kind.
        iterators = trainer.task.dataset_to_epoch_iter
        kept = [dataset for dataset, iterator in iterators.items() if iterator is epoch_itr]
        if not kept:
            return extra_state, epoch_itr
        # The cache of the task would answer with the one that it has.
        for dataset in kept:
            del iterators[dataset]
        first = trainer.get_train_iterator(epoch=1, load_dataset=False, **passthrough_args)
        first.load_state_dict(extra_state["train_iterator"])
        return extra_state, first

    of_trainings("load_checkpoint", load_checkpoint)


def _why_it_ended(trainer: Any) -> str:
    limits = trainer.cfg.optimization
    updates = trainer.get_num_updates()
    if 0 < limits.max_update <= updates:
        return f"num_updates: {updates} >= max_update: {limits.max_update}"
    hours = trainer._previous_training_time / 3600
    if 0 < limits.stop_time_hours < hours:
        return f"{hours:.3f} hours > stop_time_hours: {limits.stop_time_hours}"
    return ""
