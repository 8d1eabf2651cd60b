"""What this package changes in fairseq itself, one file a change.

Each file says at its top what fairseq does, what becomes of it, and when the change can go; ``CHANGES`` names what it
replaces, and ``install`` does it. ``python -m fwp_fairseq --mends`` lists them.
"""

import importlib
import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from fwp_fairseq._registration import require_fairseq

logger = logging.getLogger(__name__)

# In this order: what a later one wraps is what an earlier one has put there.
MENDS = (
    "numpy_2",
    "safe_loading",
    "checkpoint_options",
    "whole_checkpoints",
    "sound_parameters",
    "every_process_saves",
    "resuming",
    "one_training",
    "divergence",
    "background_loading",
    "quiet_logs",
    "evaluation_in_blocks",
)


@dataclass(frozen=True)
class Mend:
    """One change: its name, what for, the names in fairseq that it replaces, and when it can go."""

    name: str
    purpose: str
    changes: tuple[str, ...]
    until: str

    def __str__(self) -> str:
        changes = ", ".join(self.changes) or "nothing is replaced"
        return f"{self.name}: {self.purpose}\n    changes: {changes}\n    {self.until}"


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def mends() -> list[Mend]:
    """All changes, in the order in which they are made. Raises ImportError without fairseq."""
    require_fairseq()
    return [_describe(name, _module(name)) for name in MENDS]


def _describe(name: str, module: ModuleType) -> Mend:
    paragraphs = [" ".join(paragraph.split()) for paragraph in (module.__doc__ or "").strip().split("\n\n")]
    return Mend(name, paragraphs[0], module.CHANGES, paragraphs[-1])


def install() -> None:
    """Make all changes. What was made before, were it by another copy of this package, is not made again."""
    import fairseq

    made: list[Any] = fairseq.__dict__.setdefault("fwp_mends", [])
    for name in MENDS:
        if name not in made:
            _module(name).install()
            made.append(name)
    logger.debug("changed in fairseq (python -m fwp_fairseq --mends says why): %s", ", ".join(made))
