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

β is the write strength, α the decay: the share of the memory that is kept. There is one of each per token and head, as
far as a rule takes them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor

from fwp_fairseq.ops.options import Option


class Gates(NamedTuple):
    """The scalars of the recurrence, each (B, H, L) or None: write 1, erase 0, decay 1."""

    write: Optional[Tensor] = None
    erase: Optional[Tensor] = None
    decay: Optional[Tensor] = None


class Scalars(NamedTuple):
    """What a rule makes of a token. The decay may be one number for all tokens."""

    write: Optional[Tensor] = None
    erase: Optional[Tensor] = None
    decay: Union[Tensor, float, None] = None


@dataclass(frozen=True)
class UpdateRule:
    """A rule by name: what it takes from a token, and what it makes of that.

    takes: of "beta" and "alpha", what ``scalars`` is called with, by name, and with the values of ``options``.
    max_norm: bound on the Frobenius norm of the memory after each write, which the compiled backends do not have.
    options: what a user can choose of it. They have no defaults here, so that none can be forgotten.
    """

    name: str
    takes: tuple[str, ...]
    scalars: Callable[..., Scalars]
    max_norm: Optional[float] = None
    options: tuple[Option, ...] = ()

    @cached_property
    def erases(self) -> bool:
        """Whether it removes something of the value that the key retrieves."""
        values: dict[str, Any] = {option.name: option.default for option in self.options}
        return self.scalars(**dict.fromkeys(self.takes, torch.tensor(0.5)), **values).erase is not None

    def as_sums(self, **choices: Any) -> Optional[list[Optional[tuple[float, float, float]]]]:
        """Write, erase and decay as (constant, times β, times α), None for one that is not there.

        None if the rule makes anything else of them. ``choices`` are values of its options.
        """

        def at(beta: float, alpha: float) -> list[Optional[float]]:
            taken = {"beta": torch.tensor(beta, dtype=torch.float64), "alpha": torch.tensor(alpha, dtype=torch.float64)}
            scalars = self.scalars(**{name: taken[name] for name in self.takes}, **choices)
            return [None if x is None else float(x) for x in scalars]

        corners = zip(at(0, 0), at(1, 0), at(0, 1))
        sums = [None if c is None else (c, b - c, a - c) for c, b, a in corners]  # type: ignore[operator]
        for beta, alpha in ((0.3, 0.9), (0.8, 0.1), (1.7, 0.6)):
            for x, of in zip(at(beta, alpha), sums):
                if of is not None and abs(x - (of[0] + of[1] * beta + of[2] * alpha)) > 1e-9:  # type: ignore[operator]
                    return None
        return sums

    def gates(
        self, beta: Optional[Tensor], alpha: Optional[Tensor], padding: Optional[Tensor] = None, **choices: Any
    ) -> Gates:
        """Scalars of the recurrence from β, α: (B, H, L), as far as the rule takes them, and values of its options.

        ``padding``, (B, H, L) or of a shape that broadcasts to it, is True where the token must leave the memory as it
        is: nothing is written, erased or forgotten there. A decay of one number is a tensor of no dimension.
        """
        taken = {"beta": beta, "alpha": alpha}
        write, erase, decay = self.scalars(**{name: taken[name] for name in self.takes}, **choices)
        if isinstance(decay, float):
            decay = torch.tensor(decay, dtype=torch.float64)
        if padding is None:
            return Gates(write, erase, decay)
        # One tensor for both, where they are one.
        same = erase is write
        write = (~padding).float() if write is None else write.masked_fill(padding, 0.0)
        erase = write if same and erase is not None else None if erase is None else erase.masked_fill(padding, 0.0)
        if decay is not None:
            decay = (decay if decay.dim() else decay.expand(padding.shape)).masked_fill(padding, 1.0)
        return Gates(write, erase, decay)


UPDATE_RULES = {
    rule.name: rule
    for rule in (
        UpdateRule("sum", (), lambda: Scalars()),
        UpdateRule("delta", ("beta",), lambda beta: Scalars(beta, beta)),
        UpdateRule("gated", ("beta",), lambda beta: Scalars(beta, decay=1 - beta)),
        UpdateRule("gated-delta", ("beta", "alpha"), lambda beta, alpha: Scalars(beta, beta, alpha)),
        UpdateRule("fwm", ("beta",), lambda beta: Scalars(beta, beta), max_norm=1.0),
    )
}
