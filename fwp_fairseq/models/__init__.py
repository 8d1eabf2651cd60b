"""Registered models. Importing this package registers them; fairseq does so for a user dir."""

from fwp_fairseq._requirements import require_fairseq

require_fairseq()

from fwp_fairseq.checkpoint_options import check_options, check_options_of_checkpoints  # noqa: E402
from fwp_fairseq.checkpoints import protect_checkpoint_loading  # noqa: E402
from fwp_fairseq.resuming import make_resuming_exact  # noqa: E402
from fwp_fairseq.saving import protect_checkpoint_saving  # noqa: E402
from fwp_fairseq.trainer_errors import let_divergence_be_named, refuse_half_precision_without_gpu  # noqa: E402

protect_checkpoint_loading(check_options)
check_options_of_checkpoints()
protect_checkpoint_saving()
make_resuming_exact()
refuse_half_precision_without_gpu()
let_divergence_be_named()

from fwp_fairseq.models import associative_memory, fwp_transformer, fwp_transformer_lm  # noqa: E402

__all__ = ["associative_memory", "fwp_transformer", "fwp_transformer_lm"]
