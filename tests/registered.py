"""What users can choose by name, for tests that run all of it: what is registered joins them by that."""

from typing import Any, Optional

from torch import Tensor

from fwp_fairseq.modules.key_features import KeyFeatures
from fwp_fairseq.ops import FEATURE_MAPS, UPDATE_RULES, Gates, Option

UNBOUNDED_RULES = [name for name, rule in UPDATE_RULES.items() if rule.max_norm is None]
NON_NEGATIVE_MAPS = [name for name, feature_map in FEATURE_MAPS.items() if not feature_map.signed]


def defaults(owner: Any) -> dict[str, Any]:
    """The options of a feature map, an update rule or a stage."""
    return {option.name: option.default for option in owner.options}


def another_value(option: Option) -> Any:
    """One that is allowed and not the default."""
    if isinstance(option.type, list):
        return next(value for value in option.type if value != option.default)
    if option.type is bool:
        return not option.default
    values = (option.default + step for step in (1, 3, -0.5))
    found = next(value for value in values if not option.why_not(value, 4, "", ""))
    return option.type(found)


def gates_of(rule: str, beta: Optional[Tensor], alpha: Optional[Tensor], padding: Optional[Tensor] = None) -> Gates:
    """Those of (B, H, L) tokens, of which the rule takes what it needs."""
    gates = UPDATE_RULES[rule].gates(beta, alpha, padding, **defaults(UPDATE_RULES[rule]))
    like = next(x for x in (beta, alpha, padding) if x is not None)
    return Gates(*(gate.expand(like.shape) if gate is not None and not gate.dim() else gate for gate in gates))


def features_of(feature_map: str, normalization: str, d_key: int, **choices: Any) -> KeyFeatures:
    """A feature map with its defaults but for ``choices``, of which it takes its own."""
    return KeyFeatures(feature_map, normalization, d_key, **{**defaults(FEATURE_MAPS[feature_map]), **choices})
