"""Registered tasks. Importing this package registers them; fairseq does so for a user dir."""

from fwp_fairseq._requirements import require_fairseq

require_fairseq()

from fwp_fairseq.tasks import parallel_prefix  # noqa: E402

__all__ = ["parallel_prefix"]
