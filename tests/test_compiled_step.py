"""A decoder's step in one call of compiled code gives what the layers give, in searches and in loops of one's own.

The loops and searches are those of the captured steps: what holds for these has to hold here.
"""

import contextlib
import copy
import gc
import unittest.mock
import weakref

import pytest
import torch
from test_captured_step import MODELS, ORDERS, assert_same, foreign, loop, other_forward, retained_dropout
from test_captured_step import search, sources, translation
from tiny_models import PLACES, places
from torch import nn

from fwp_fairseq.models import captured_step, compiled_step
from fwp_fairseq.ops import UPDATE_RULES, Scalars, UpdateRule, native

pytestmark = pytest.mark.skipif(native.unavailable is not None, reason="without compiled operators")

TOLERANCE = 1e-5
NOT_COVERED = ("stages", "fwm", "chunk")
FEW = {name: MODELS[name] for name in ("decoder", "all places")}
few_models = pytest.mark.parametrize("flags", FEW.values(), ids=FEW)


class Count:
    tokens = 0


@pytest.fixture
def steps(monkeypatch):
    """Counts the tokens that compiled steps decode."""
    replay, count = compiled_step.CompiledStep.replay, Count()

    def counted(*args):
        count.tokens += 1
        replay(*args)

    monkeypatch.setattr(compiled_step.CompiledStep, "replay", counted)
    return count


def without_steps(function, *args, **kwargs):
    with unittest.mock.patch.object(captured_step, "_is_plain", lambda tokens: False):
        return function(*args, **kwargs)


def same_with_and_without(function, *args, **kwargs):
    expected = without_steps(function, *args, **kwargs)
    torch.testing.assert_close(function(*args, **kwargs), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("orders", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_same_whatever_rows_do(name, orders, steps):
    same_with_and_without(loop, translation(MODELS[name], beam=1), orders)
    assert (steps.tokens > 0) == (name not in NOT_COVERED)


OPTIONS = {
    "gelu, no biases": ["--activation-fn", "gelu", "--no-attention-bias", "--cross-attention", "fast-weight"],
    "tanh": ["--feature-map", "tanh", "--key-normalization", "l2", "--write-strength-range", "2"],
    "gated": ["--update-rule", "gated", "--write-strength-bias", "--decoder-normalize-before"],
    "sum": ["--update-rule", "sum", "--layernorm-embedding"],
    "one head": ["--decoder-attention-heads", "1", "--dpfp-nu", "3"],
}


@pytest.mark.parametrize("flags", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("beam", [1, 3])
def test_beam_search_finds_the_same_with_all_that_is_covered(flags, beam, steps):
    model = translation(flags, beam)
    batch = sources(model, 4)
    expected = without_steps(search, model, batch, beam)
    assert not steps.tokens
    assert_same(search(model, batch, beam), expected)
    assert steps.tokens > 3
