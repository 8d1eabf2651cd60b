"""Registered tasks, criterions and schedules. Importing this package registers them; fairseq does so for a user dir."""

from fwp_fairseq._registration import require_fairseq

require_fairseq()

from fwp_fairseq import criterions, optim  # noqa: E402
from fwp_fairseq.tasks import (  # noqa: E402
    associative_retrieval,
    parallel_prefix,
    state_tracking,
    streaming_language_modeling,
)

__all__ = [
    "associative_retrieval",
    "criterions",
    "optim",
    "parallel_prefix",
    "state_tracking",
    "streaming_language_modeling",
]
