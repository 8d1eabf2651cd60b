"""Update rules: how the gates of a token become the three scalars of the one recurrence.

    v̄_t = decay_t W_{t-1}ᵀ k_t
    W_t = decay_t W_{t-1} + k_t ⊗ (write_t v_t − erase_t v̄_t)
    o_t = W_tᵀ q_t

| rule        | decay | erase | write | source |
|-------------|-------|-------|-------|--------|
| sum         | 1     | 0     | 1     | eq. 17-19 |
| delta       | 1     | β     | β     | eq. 20-25 |
| gated       | 1 − β | 0     | β     | eq. 54 (Peng et al., 2021) |
| gated-delta | α     | β     | β     | Yang et al., 2025 |
| fwm         | 1     | β     | β     | sec. 6.1.2 (Schlag et al., 2021): delta, then W / max(1, ‖W‖_F) |

β is the write strength, α the share of the memory that is kept; both lie in (0, 1), one per token and head.
"""

from dataclasses import dataclass
from typing import NamedTuple, Optional

from torch import Tensor


class Gates(NamedTuple):
    """The scalars of the recurrence, each (B, H, L) or None: write 1, erase 0, decay 1."""

    write: Optional[Tensor] = None
    erase: Optional[Tensor] = None
    decay: Optional[Tensor] = None


@dataclass(frozen=True)
class UpdateRule:
    """What a rule takes from the token and does to the memory.

    strength: it has a learned write strength β. erases: it removes β times the value that the key retrieves.
    forgets: "complement" keeps 1 − β of the memory, "learned" keeps a learned share α. max_norm: bound on the
    Frobenius norm of the memory after each write, which the compiled backends do not have.
    """

    name: str
    strength: bool = True
    erases: bool = False
    forgets: Optional[str] = None
    max_norm: Optional[float] = None

    def gates(self, beta: Optional[Tensor], alpha: Optional[Tensor], padding: Optional[Tensor] = None) -> Gates:
        """Scalars of the recurrence from β, α: (B, H, L), as far as the rule has them.

        ``padding``, broadcastable to (B, H, L), is True where the token must leave the memory as it is: nothing is
        written, erased or forgotten there.
        """
        write = beta
        decay = {None: None, "complement": None if beta is None else 1 - beta, "learned": alpha}[self.forgets]
        if padding is not None:
            write = (~padding).float() if write is None else write.masked_fill(padding, 0.0)
            decay = None if decay is None else decay.masked_fill(padding, 1.0)
        return Gates(write, write if self.erases else None, decay)


UPDATE_RULES = {
    rule.name: rule
    for rule in (
        UpdateRule("sum", strength=False),
        UpdateRule("delta", erases=True),
        UpdateRule("gated", forgets="complement"),
        UpdateRule("gated-delta", erases=True, forgets="learned"),
        UpdateRule("fwm", erases=True, max_norm=1.0),
    )
}
