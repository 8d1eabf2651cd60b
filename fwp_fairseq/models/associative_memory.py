"""The model of the synthetic experiments (sec. 6.1): one attention head with one memory, and nothing else.

Each pair of symbols writes its value, a one-hot vector of size S, under the key k = W_K [one-hot value; embedding of
the key symbol] with a strength β that comes from the same input; a query symbol asks with q = W_Q (its embedding). All
pairs are written before any query reads.

| rule | keys and queries | what is read | eq. |
| --- | --- | --- | --- |
| softmax | as projected | softmax(q · k / √d_key) over the pairs | |
| sum | φ(k), φ(q) | W φ(q) / (z · φ(q)) | 17-19 |
| delta | of sum one | W φ(q) | 20-25, 29 |
| fwm | φ(k), φ(q), not normalised | LayerNorm(W φ(q)), W divided by max(1, ‖W‖) after each write | sec. 6.1.2 |
"""

import math
from dataclasses import dataclass, field, make_dataclass
from typing import Any, Optional

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.models import BaseFairseqModel, register_model
from omegaconf import II
from torch import Tensor, nn
from torch.nn import functional as F

from fwp_fairseq.models.options import plain_options
from fwp_fairseq.modules.fast_weight_config import check_backend, option_fields
from fwp_fairseq.modules.key_features import KeyFeatures
from fwp_fairseq.modules.places import ATTENTION_KINDS
from fwp_fairseq.ops import (
    BACKENDS,
    FEATURE_MAPS,
    UPDATE_RULES,
    Gates,
    UpdateRule,
    fast_weight_memory,
    fast_weight_read,
    fast_weight_scan,
    normalized_memory,
    normalized_read,
    sum_normalize,
)

# How features are normalised under each rule; with "sum" the read-outs are, instead.
KEY_NORMALIZATION = {"sum": "none", "delta": "sum", "fwm": "none"}


_Choices = make_dataclass(
    "_Choices",
    option_fields(option for feature_map in FEATURE_MAPS.values() for option in feature_map.options),
    bases=(FairseqDataclass,),
)


@dataclass
class AssociativeMemoryConfig(_Choices):  # type: ignore[misc, valid-type]
    """Options of the model; each is a flag of the same name."""

    attention: ChoiceEnum(list(ATTENTION_KINDS)) = field(  # type: ignore[valid-type]
        default="fast-weight", metadata={"help": "softmax, the baseline, or a fast-weight memory"}
    )
    update_rule: ChoiceEnum(list(KEY_NORMALIZATION)) = field(  # type: ignore[valid-type]
        default="delta", metadata={"help": "how a key-value pair is written into the fast-weight memory"}
    )
    feature_map: ChoiceEnum(list(FEATURE_MAPS)) = field(  # type: ignore[valid-type]
        default="dpfp", metadata={"help": "feature map of keys and queries; tanh goes with fwm only"}
    )
    favor_redraw_in_evaluation: bool = field(
        default=False,
        metadata={
            "help": "draw the projection of FAVOR+ anew for each evaluation sequence, as in the authors' program; "
            "without, one serves all evaluations, as in the paper"
        },
    )
    key_size: int = field(default=64, metadata={"help": "d_key: size of keys and queries before the feature map"})
    embedding_size: Optional[int] = field(
        default=None, metadata={"help": "size of the embedding of key symbols (default: 2.2 S)"}
    )
    fast_weight_backend: ChoiceEnum(["auto", *BACKENDS]) = field(  # type: ignore[valid-type]
        default="auto", metadata={"help": "implementation of the fast-weight recurrence"}
    )
    cpu: bool = II("common.cpu")


@register_model("associative_memory", dataclass=AssociativeMemoryConfig)
class AssociativeMemory(BaseFairseqModel):
    """``forward``: keys and values (B, L), queries (B, Q), numbers of symbols -> the answers (B, Q, S)."""

    value_identity: Tensor

    def __init__(self, cfg: Any, num_keys: int) -> None:
        super().__init__()
        softmax = str(cfg.attention) == "softmax"
        self.update_rule = None if softmax else str(cfg.update_rule)
        self.backend = str(cfg.fast_weight_backend)
        self.num_keys = num_keys
        size = int(2 * num_keys * 1.1) if cfg.embedding_size is None else cfg.embedding_size
        _check(cfg, size)
        self.embedding = nn.Embedding(num_keys, size)  # N(0, 1)
        self.key = nn.Linear(num_keys + size, cfg.key_size)
        self.query = nn.Linear(size, cfg.key_size)
        self.strength = None if self.rule is None or not self.rule.takes else nn.Linear(num_keys + size, 1)
        self.features = None
        if self.rule is not None:
            normalization = KEY_NORMALIZATION[self.rule.name]
            feature_map = str(cfg.feature_map)
            choices = {option.name: getattr(cfg, option.name) for option in FEATURE_MAPS[feature_map].options}
            self.features = KeyFeatures(feature_map, normalization, cfg.key_size, **choices)
        self.redraw_in_evaluation = cfg.favor_redraw_in_evaluation
        self.register_buffer("value_identity", torch.eye(num_keys), persistent=False)
        for projection in (self.key, self.query):
            if softmax:
                nn.init.xavier_uniform_(projection.weight)
            else:
                # As in the authors' program. At large S it is far more than Xavier's range.
                bound = 1 / math.sqrt(cfg.key_size)
                nn.init.uniform_(projection.weight, -bound, bound)

    @property
    def rule(self) -> Optional[UpdateRule]:
        """None: softmax. By its name, which a pickle can take with it."""
        return None if self.update_rule is None else UPDATE_RULES[self.update_rule]

    @classmethod
    def build_model(cls, cfg: AssociativeMemoryConfig, task: Any) -> "AssociativeMemory":
        return cls(plain_options(cls, cfg, task), task.num_keys)

    def train(self, mode: bool = True) -> "AssociativeMemory":
        super().train(mode)
        if self.features is not None and self.redraw_in_evaluation:
            self.features.train()
        return self

    def forward(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        if self.redraw_in_evaluation and not self.training and len(keys) > 1:
            sequences = zip(keys.split(1), values.split(1), queries.split(1))
            return torch.cat([self(*sequence) for sequence in sequences])
        k = self._project(self.key, keys, values)
        q = F.embedding(queries, self.query(self.embedding.weight))
        if self.features is None:
            overlap = q @ k.transpose(1, 2) / math.sqrt(k.size(2))
            return self._weighted(overlap.softmax(dim=-1), values)
        k, q = self.features(k, q)
        assert self.rule is not None
        if self.strength is None:
            if q.size(1) == 1:
                # What one query reads needs no memory: V (Kᵀ q) for (V Kᵀ) q, a factor of about S less work.
                return self._weighted(sum_normalize(q @ k.transpose(1, 2)), values)
            memory, normalizer = normalized_memory(k.unsqueeze(1), self._one_hot(values), Gates(), backend=self.backend)
            return normalized_read(q, memory.squeeze(1), normalizer.squeeze(1))
        beta = self._project(self.strength, keys, values).sigmoid().transpose(1, 2)
        # "loop" stays the recurrence as the equations state it.
        if q.size(1) == 1 and self.rule.max_norm is None and self.backend != "loop":
            return self._weighted(self._read_weights(q, k, beta), values)
        memory = fast_weight_memory(
            k.unsqueeze(1),
            self._one_hot(values),
            *self.rule.gates(beta, None),
            backend=self.backend,
            max_norm=self.rule.max_norm,
        )
        out = fast_weight_read(q, memory.squeeze(1))
        return out if self.rule.max_norm is None else F.layer_norm(out, out.shape[-1:])

    def _read_weights(self, q: Tensor, k: Tensor, beta: Tensor) -> Tensor:
        """How much of each value one query reads under the delta rule: (B, 1, D), (B, L, D), (B, 1, L) -> (B, 1, L).

        The memory is a sum of values, and what one query reads needs no memory either, a factor of about S less work:

            W φ(q) = Σ_t β_t (φ(k_t) · r_t) v_t,   r_L = φ(q),   r_{t-1} = r_t − β_t (φ(k_t) · r_t) φ(k_t)

        Backwards in time that is the delta rule with values of size one that are zero, in a memory that begins as φ(q).
        """
        assert self.rule is not None
        keys, strengths = k.flip(1).unsqueeze(1), beta.flip(2)
        # Each r is read by the key that comes next, and φ(q) itself by the first.
        after, _ = fast_weight_scan(
            keys.roll(-1, dims=2),
            keys,
            keys.new_zeros(*keys.shape[:3], 1),
            *self.rule.gates(strengths, None),
            initial_state=q.unsqueeze(-1),
            backend=self.backend,
        )
        first = (keys[:, :, :1] * q.unsqueeze(2)).sum(-1, keepdim=True)
        return beta * torch.cat([first, after[:, :, :-1]], dim=2).squeeze(-1).flip(2)

    def _project(self, linear: nn.Linear, keys: Tensor, values: Tensor) -> Tensor:
        """``linear`` of [one-hot value; key embedding], (B, L, out).

        There are far fewer symbols than tokens, so each symbol is projected once, and looked up.
        """
        of_value, of_key = linear.weight.split([self.num_keys, self.embedding.embedding_dim], dim=1)
        by_key = F.linear(self.embedding.weight, of_key, linear.bias)
        return F.embedding(keys, by_key) + F.embedding(values, of_value.t())

    def _one_hot(self, values: Tensor) -> Tensor:
        return F.embedding(values, self.value_identity).unsqueeze(1)

    def _weighted(self, weights: Tensor, values: Tensor) -> Tensor:
        """Σ weight · one-hot value: (B, Q, L), (B, L) -> (B, Q, S)."""
        out = weights.new_zeros(*weights.shape[:2], self.num_keys)
        return out.scatter_add(2, values.unsqueeze(1).expand_as(weights), weights)


def _check(cfg: Any, embedding_size: int) -> None:
    """Raise ValueError naming flag, value and what is allowed, if no such model can be built."""
    for flag, size in ("--key-size", cfg.key_size), ("--embedding-size", embedding_size):
        if size < 1:
            raise ValueError(f"{flag} is {size}, it must be at least 1")
    if str(cfg.attention) == "softmax":
        return
    rule, feature_map = str(cfg.update_rule), str(cfg.feature_map)
    if rule not in KEY_NORMALIZATION:
        raise ValueError(f"--update-rule is {rule}, allowed are {', '.join(KEY_NORMALIZATION)} in associative_memory")
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"--feature-map is {feature_map}, allowed are {', '.join(FEATURE_MAPS)}")
    for option in FEATURE_MAPS[feature_map].options:
        option.check(getattr(cfg, option.name), cfg.key_size, "key size", "")
    if cfg.favor_redraw_in_evaluation and feature_map != "favor":
        raise ValueError(f"--favor-redraw-in-evaluation is for --feature-map favor, and that is {feature_map}")
    if FEATURE_MAPS[feature_map].signed and rule != "fwm":
        others = [name for name, each in FEATURE_MAPS.items() if not each.signed]
        raise ValueError(
            f"--feature-map {feature_map} has negative features: with --update-rule {rule}, which divides by sums, "
            f"allowed are {', '.join(others)}"
        )
    check_backend(str(cfg.fast_weight_backend), UPDATE_RULES[rule], cfg.cpu is True)
