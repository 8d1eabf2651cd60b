"""Options of what a user can choose by name: feature maps, update rules, and the stages of attention."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional


@dataclass(frozen=True)
class Option:
    """An option under the name of its flag: dpfp_nu is --dpfp-nu.

    ``type`` is what its values are (choices: a list of strings), ``why_not`` says what is allowed in place of a value,
    given d_key and what that is called where the attention stands, or None: the value is allowed.
    """

    name: str
    default: Any
    help: str
    type: Any = field(default=int)
    why_not: Callable[[Any, int, str, str], Optional[str]] = lambda value, d_key, size, place: None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def check(self, value: Any, d_key: int, size: str, place: str) -> None:
        """Raise ValueError naming flag, value and what is allowed.

        ``size`` is what d_key is called, and ``place`` says where it is so, as " in the encoder".
        """
        reason = self.why_not(value, d_key, size, place)
        if reason is not None:
            raise ValueError(f"{self.flag} is {value}, {reason}")
