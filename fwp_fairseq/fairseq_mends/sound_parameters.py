"""No checkpoint replaces another once a training has made a parameter infinite or not a number.

fairseq looks at the gradients before an update, and not at what the update does: a training that diverged in its last
one saved that and ended with status 0. Judged are parameters that were finite when the training began or went on, since
models also have memory that nothing writes or reads, such as conv_bias of lightconv_lm. And those whose gradient is not
finite, which are in use.

It can go when fairseq looks at the parameters before it saves them.
"""

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from fwp_fairseq.fairseq_mends.trainings import of_trainings

CHANGES = ("fairseq.checkpoint_utils.load_checkpoint", "fairseq.checkpoint_utils.save_checkpoint")

# Names of the parameters that were not finite when a training began or went on, by its trainer.
_never_finite: "WeakKeyDictionary[Any, set[str]]" = WeakKeyDictionary()


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Names of the tensors with numbers in them that are infinite or not a number."""
    return {name for name, tensor in tensors if tensor.is_floating_point() and not tensor.isfinite().all()}


def install() -> None:
    """Make fairseq look at its parameters when a training begins, and before it saves them.

    Saving raises FloatingPointError, in every process, if one is broken.
    """

    def load_checkpoint(load: Any, cfg: Any, trainer: Any, **passthrough_args: Any) -> Any:
        loaded = load(cfg, trainer, **passthrough_args)
        _never_finite[trainer] = not_finite(trainer.get_model().named_parameters())
        return loaded

    def save_checkpoint(save: Any, cfg: Any, trainer: Any, epoch_itr: Any, val_loss: Any) -> Any:
        if trainer in _never_finite and not cfg.no_save:
            parameters = list(trainer.get_model().named_parameters())
            in_use = not_finite((name, value.grad) for name, value in parameters if value.grad is not None)
            broken = not_finite(parameters) - (_never_finite[trainer] - in_use)
            if broken:
                raise FloatingPointError(
                    f"No checkpoint was written into {cfg.save_dir}: {min(broken)} is infinite or not a number. The "
                    "training has diverged: go on from an earlier checkpoint, with a lower --lr or with --clip-norm."
                )
        return save(cfg, trainer, epoch_itr, val_loss)

    of_trainings("load_checkpoint", load_checkpoint)
    of_trainings("save_checkpoint", save_checkpoint)
