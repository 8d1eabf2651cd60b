"""fairseq-eval-lm scores the text that it is given, and says so if a state that the model carries gets lost.

It cuts a text into blocks of --tokens-per-sample and leaves out those that are longer than what the model was built
for. By default these may be all, and the perplexity 1.00. A model that was trained to carry a state from segment to
segment begins each block without one, and scores worse than it could.

It can go when fairseq refuses to leave out most of a text, and tasks can refuse the checkpoints of others.
"""

import logging
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray

CHANGES = (
    "fairseq.checkpoint_utils.load_model_ensemble_and_task",
    "fairseq.tasks.language_modeling.LanguageModelingTask.eval_lm_dataloader",
)

# The task of checkpoints whose models carry a state.
STREAMING = "streaming_language_modeling"

logger = logging.getLogger(__name__)


def check_length(sizes: NDArray[np.int64], longest: int, other_command: Optional[str]) -> None:
    """Say what to give instead if most tokens are in blocks that are longer than the model takes.

    As a warning for models of which fairseq has always left them out; a ValueError if there is a command that does not.
    """
    tokens, lost = int(sizes.sum()), int(sizes[sizes > longest].sum())
    if lost <= tokens / 2:
        return
    message = (
        f"{lost} of {tokens} tokens would be left out, in blocks of up to {sizes.max()}, since the model takes "
        f"{longest} at once: give --tokens-per-sample {longest}"
    )
    if other_command:
        raise ValueError(f"{message}, or use {other_command}")
    logger.warning(message)


def install() -> None:
    """Make fairseq-eval-lm look at the length of blocks, and at the task of the checkpoint's training."""
    from fairseq import checkpoint_utils
    from fairseq.tasks.language_modeling import LanguageModelingTask

    load = checkpoint_utils.load_model_ensemble_and_task
    dataloader = LanguageModelingTask.eval_lm_dataloader
    # What would carry the state of the models that were loaded for this task, if they have one.
    LanguageModelingTask.carries_state = None

    def load_model_ensemble_and_task(filenames: list[str], *args: Any, **options: Any) -> Any:
        models, cfg, task = load(filenames, *args, **options)
        trained_for = getattr(getattr(cfg, "task", None), "_name", None)
        if isinstance(task, LanguageModelingTask) and trained_for == STREAMING:
            command = f"python -m fwp_fairseq.eval_lm {task.args.data} --path {':'.join(filenames)}"
            task.carries_state = f"{command}, which carries its state"
        return models, cfg, task

    def eval_lm_dataloader(
        self: Any,
        dataset: Any,
        max_tokens: Optional[int] = 36000,
        batch_size: Optional[int] = None,
        max_positions: Any = None,
        **options: Any,
    ) -> Any:
        sizes = getattr(dataset, "sizes", None)
        if isinstance(sizes, np.ndarray) and isinstance(max_positions, int):
            check_length(sizes, max_positions, self.carries_state)
        if self.carries_state:
            logger.warning(
                f"the model was trained with --task {STREAMING}, and here begins each block without what precedes it: "
                f"use {self.carries_state}"
            )
        return dataloader(self, dataset, max_tokens, batch_size, max_positions, **options)

    checkpoint_utils.load_model_ensemble_and_task = load_model_ensemble_and_task
    LanguageModelingTask.eval_lm_dataloader = eval_lm_dataloader
