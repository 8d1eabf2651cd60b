"""The one interface of the stages that fast-weight attention runs its tokens through.

    projections → mixing → features → gates → recurrence → read-out → output projection

Mixing and read-outs are there where an option says so, and what is not there draws no random numbers. A stage says here
what its options are and what they do not go with, which linear layers of the attention's inputs it wants, and what it
does to tokens. One forward pass is for any number of tokens, one included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Optional

from torch import Tensor, nn

from fwp_fairseq.modules.attention_state import AttentionState
from fwp_fairseq.ops import Option

if TYPE_CHECKING:
    from fwp_fairseq.modules.fast_weight_config import FastWeightConfig


class Sizes(NamedTuple):
    """Of an attention. ``causal``: its queries read right after their own token is written; ``cross``: of a source."""

    num_heads: int
    head_dim: int
    causal: bool
    cross: bool


class Projection(NamedTuple):
    """A linear layer of the attention's inputs that a stage wants: the attention has it under this name.

    ``of`` says which input, "query" or "key". There are ``per_head`` outputs for each head. One that is not ``wanted``
    with the options at hand is None there.
    """

    name: str
    of: str
    per_head: int
    bias: bool
    initialize: Callable[[nn.Linear], Any]
    wanted: bool = True


class Tokens(NamedTuple):
    """What attention makes of the tokens that are asked with (T of them) and of those that are written (S of them).

    q: (B, H, T, head_dim), k, v: (B, H, S, head_dim), each a Tensor or None. projected: the outputs of what stages
    wanted, by name, (B, H, T or S, per_head). padding: (B, S), True where the token must leave the memory as it is. A
    pass that only asks or only writes has None for the rest.
    """

    q: Any = None
    k: Any = None
    v: Any = None
    projected: Mapping[str, Tensor] = {}
    padding: Optional[Tensor] = None


class Stage(nn.Module):
    """Base of the stages. ``name`` is the attribute of the attention that it is, and so begins names of parameters."""

    name: ClassVar[str]
    options: ClassVar[tuple[Option, ...]] = ()

    def __init__(self, config: FastWeightConfig, sizes: Sizes) -> None:
        super().__init__()

    @classmethod
    def is_wanted(cls, config: FastWeightConfig) -> bool:
        """Whether attention with these options has this stage."""
        return True

    @classmethod
    def check(cls, config: FastWeightConfig) -> None:
        """Raise ValueError naming flag, value and what is allowed, if the stage cannot do what the options say."""

    @classmethod
    def without_effect(cls, config: FastWeightConfig) -> Mapping[str, str]:
        """Options of the stage that change nothing in attention with these options, and why."""
        return {}

    def projections(self) -> Sequence[Projection]:
        """The linear layers that it wants."""
        return ()


class Mixing(Stage):
    """A stage that makes other queries, keys and values of those that were projected."""

    def forward(self, tokens: Tokens, state: AttentionState) -> Tokens:
        """``state`` is what was kept of the tokens before, and is to have what the next pass needs."""
        raise NotImplementedError


class ReadOut(Stage):
    """A stage that acts on what is read, before the output projection."""

    def forward(self, read: Tensor, tokens: Tokens) -> Tensor:
        """(B, H, T, head_dim) -> (B, H, T, head_dim)."""
        raise NotImplementedError
