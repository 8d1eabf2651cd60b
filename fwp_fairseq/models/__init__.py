"""Registered models. Importing this package registers them; fairseq does so for a user dir."""

import atexit

from fwp_fairseq._requirements import require_fairseq

require_fairseq()

from fwp_fairseq.background_loading import stop_background_loading  # noqa: E402
from fwp_fairseq.checkpoint_options import check_options, check_options_of_checkpoints  # noqa: E402
from fwp_fairseq.checkpoints import protect_checkpoint_loading  # noqa: E402
from fwp_fairseq.divergence import let_divergence_be_named  # noqa: E402
from fwp_fairseq.one_training import keep_to_one_training  # noqa: E402
from fwp_fairseq.resuming import make_resuming_exact  # noqa: E402
from fwp_fairseq.saving import protect_checkpoint_saving  # noqa: E402

protect_checkpoint_loading(check_options)
check_options_of_checkpoints()
protect_checkpoint_saving()
make_resuming_exact()
keep_to_one_training()
let_divergence_be_named()
atexit.register(stop_background_loading)

from fwp_fairseq.models import (  # noqa: E402
    associative_memory,
    fwp_transformer,
    fwp_transformer_lm,
    transformer_xl_lm,
)

__all__ = ["associative_memory", "fwp_transformer", "fwp_transformer_lm", "transformer_xl_lm"]
