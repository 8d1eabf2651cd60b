"""A constant learning rate until the validation loss is low enough: then zero, where ``--stop-min-lr 0`` ends training.

fairseq ends a training for lack of progress (``--patience``), but has no option for one that has reached its goal.
"""

from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.optim.lr_scheduler import FairseqLRScheduler, register_lr_scheduler
from omegaconf import II


@dataclass
class UntilSolvedConfig(FairseqDataclass):
    """Options of the schedule."""

    target_loss: float = field(
        default=0.001, metadata={"help": "learning rate 0 from the first epoch with this validation loss or less"}
    )
    lr: list[float] = II("optimization.lr")


@register_lr_scheduler("until_solved", dataclass=UntilSolvedConfig)
class UntilSolved(FairseqLRScheduler):
    """``--lr`` up to the first validation loss of ``--target-loss`` or less, then zero."""

    def __init__(self, cfg: UntilSolvedConfig, optimizer: Any) -> None:
        super().__init__(cfg, optimizer)
        self.solved = False
        self.optimizer.set_lr(cfg.lr[0])

    def state_dict(self) -> dict[str, Any]:
        return {"solved": self.solved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.solved = state_dict["solved"]

    def step(self, epoch: int, val_loss: Optional[float] = None) -> float:
        self.solved = self.solved or (val_loss is not None and val_loss <= self.cfg.target_loss)
        return self.step_update(0)

    def step_update(self, num_updates: int) -> float:
        self.optimizer.set_lr(0.0 if self.solved else self.cfg.lr[0])
        return self.optimizer.get_lr()
