"""Registered models. Importing this package registers them; fairseq does so for a user dir."""

from fwp_fairseq._registration import require_fairseq

require_fairseq()

from fwp_fairseq.models import (  # noqa: E402
    associative_memory,
    fwp_transformer,
    fwp_transformer_align,
    fwp_transformer_lm,
    transformer_xl_lm,
)

__all__ = ["associative_memory", "fwp_transformer", "fwp_transformer_align", "fwp_transformer_lm", "transformer_xl_lm"]
