"""The mathematics of fast weights: torch only, importable and testable without fairseq."""

from fwp_fairseq.ops.attention_normalization import normalized_memory, normalized_read, normalized_scan, normalized_step
from fwp_fairseq.ops.fast_weights import (
    BACKENDS,
    fast_weight_memory,
    fast_weight_read,
    fast_weight_scan,
    fast_weight_step,
)
from fwp_fairseq.ops.feature_maps import (
    FEATURE_MAPS,
    KEY_NORMALIZATIONS,
    FeatureMap,
    dpfp,
    draw_favor_projection,
    elu_plus_one,
    favor_plus,
    favor_plus_normalized,
    l2_normalize,
    sum_normalize,
)
from fwp_fairseq.ops.implied_attention import implied_attention, memory_of_tokens
from fwp_fairseq.ops.options import Option
from fwp_fairseq.ops.update_rules import UPDATE_RULES, Gates, Scalars, UpdateRule

__all__ = [
    "BACKENDS",
    "FEATURE_MAPS",
    "KEY_NORMALIZATIONS",
    "UPDATE_RULES",
    "FeatureMap",
    "Gates",
    "Option",
    "Scalars",
    "UpdateRule",
    "dpfp",
    "draw_favor_projection",
    "elu_plus_one",
    "fast_weight_memory",
    "fast_weight_read",
    "fast_weight_scan",
    "fast_weight_step",
    "favor_plus",
    "favor_plus_normalized",
    "implied_attention",
    "l2_normalize",
    "memory_of_tokens",
    "normalized_memory",
    "normalized_read",
    "normalized_scan",
    "normalized_step",
    "sum_normalize",
]
