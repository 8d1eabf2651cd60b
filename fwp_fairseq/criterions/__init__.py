"""Registered criterions. ``tasks`` imports them: of a user dir fairseq itself imports models and tasks only."""

from fwp_fairseq.criterions import half_squared_error

__all__ = ["half_squared_error"]
