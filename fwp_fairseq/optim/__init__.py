"""Registered learning-rate schedules. ``tasks`` imports them: of a user dir fairseq imports models and tasks only."""

from fwp_fairseq.optim import until_solved

__all__ = ["until_solved"]
