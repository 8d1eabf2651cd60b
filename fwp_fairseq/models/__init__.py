"""Registered models. fairseq imports every module of this package when it is the user dir."""

from fwp_fairseq._requirements import require_fairseq

require_fairseq()

from fwp_fairseq.checkpoints import protect_checkpoint_loading  # noqa: E402

protect_checkpoint_loading()
