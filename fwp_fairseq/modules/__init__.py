"""Attention and layers with fast weights, behind fairseq's interfaces."""

from fwp_fairseq._registration import require_fairseq

require_fairseq()

from fwp_fairseq.modules.fast_weight_attention import FastWeightAttention  # noqa: E402
from fwp_fairseq.modules.fast_weight_config import FastWeightConfig  # noqa: E402
from fwp_fairseq.modules.fast_weight_cross_attention import FastWeightCrossAttention  # noqa: E402
from fwp_fairseq.modules.fast_weight_layers import FastWeightDecoderLayer, FastWeightEncoderLayer  # noqa: E402

__all__ = [
    "FastWeightAttention",
    "FastWeightConfig",
    "FastWeightCrossAttention",
    "FastWeightDecoderLayer",
    "FastWeightEncoderLayer",
]
