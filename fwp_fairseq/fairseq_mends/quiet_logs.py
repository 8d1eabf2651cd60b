"""The log of a training says what concerns it.

fairseq 0.12.3 is older than the torch and hydra that it runs on, and these say so at every start. It asks for pinned
memory where there is none to pin, lists layers without a bias as "shared parameter: a.bias <- b.bias", and prints what
its author wanted to see ("can_reuse_epoch_itr = True"). Warnings that are about anything else, or that other code than
fairseq's has caused, are as they were, and filters of the user's own (-W) come first.

It can go with a fairseq that is written for these versions.
"""

import functools
import logging
import re
import warnings
from typing import Any

import torch

CHANGES = (
    "fairseq.dataclass.utils.initialize",
    "fairseq.dataclass.utils.compose",
    "fairseq.trainer._catalog_shared_params",
    "fairseq.data.iterators.CountingIterator.__init__",
)

_FAIRSEQ = r"fairseq(_cli)?(\.|$)"


def install() -> None:
    """Leave out what fairseq's age causes in the logs."""
    from fairseq import trainer
    from fairseq.data import iterators
    from fairseq.dataclass import utils

    warnings.filterwarnings("ignore", category=FutureWarning, module=_FAIRSEQ, append=True)
    warnings.filterwarnings("ignore", "(?s).*deprecated", module=_FAIRSEQ, append=True)
    logging.getLogger("fairseq.tasks.fairseq_task").addFilter(_is_no_printout)

    compose, initialize, catalog = utils.compose, utils.initialize, trainer._catalog_shared_params
    start_counting = iterators.CountingIterator.__init__

    @functools.wraps(compose)
    def quiet_compose(*args: Any, **options: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return compose(*args, **options)

    class QuietInitialize(initialize):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, caller_stack_depth: int = 1, **options: Any) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                super().__init__(*args, caller_stack_depth=caller_stack_depth + 1, **options)

    @functools.wraps(catalog)
    def catalog_shared_params(module: Any, memo: Any = None, prefix: str = "") -> Any:
        shared = catalog(module, memo, prefix)
        if memo is not None:
            return shared
        return [paths for paths in shared if trainer._get_module_by_path(module, paths[0]) is not None]

    @functools.wraps(start_counting)
    def count_without_pinning(self: Any, iterable: Any, *args: Any, **options: Any) -> None:
        # Every loader of fairseq comes by here before it is used, most of them in a BufferedIterator.
        loader = getattr(iterable, "_iterable", iterable)
        if isinstance(loader, torch.utils.data.DataLoader) and not torch.cuda.is_available():
            loader.pin_memory = False
        start_counting(self, iterable, *args, **options)

    utils.compose, utils.initialize = quiet_compose, QuietInitialize
    trainer._catalog_shared_params = catalog_shared_params
    iterators.CountingIterator.__init__ = count_without_pinning


def _is_no_printout(record: logging.LogRecord) -> bool:
    return re.fullmatch(r"\w+ = (True|False)", record.getMessage()) is None
