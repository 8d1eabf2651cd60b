"""A decoder's step in one call of compiled code gives what the layers give, in searches and in loops of one's own.

The loops and searches are those of the captured steps: what holds for these has to hold here.
"""

import argparse
import gc
import unittest.mock
import weakref

import pytest
import torch
from fairseq.tasks.language_modeling import LanguageModelingConfig
from test_captured_step import (
    MODELS,
    ORDERS,
    assert_same,
    foreign,
    loop,
    on_a_copy,
    other_forward,
    retained_dropout,
    search,
    sources,
    translation,
)
from tiny_models import PLACES, build_lm, dictionary, places, tokens
from torch import nn

from fwp_fairseq.models import captured_step, compiled_step
from fwp_fairseq.modules import int8_linear
from fwp_fairseq.ops import UPDATE_RULES, native
from fwp_fairseq.ops.update_rules import Scalars, UpdateRule
from fwp_fairseq.tasks.parallel_prefix import FWPLanguageModelingTask

pytestmark = pytest.mark.skipif(native.unavailable is not None, reason="without compiled operators")

TOLERANCE = 1e-5
NOT_COVERED = ("stages", "fwm", "chunk", "learned")
CONVOLUTION = [*places("fast-weight", *PLACES), "--short-convolution", "3"]
FEW = {"decoder": MODELS["decoder"], "all places": CONVOLUTION}
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
@pytest.mark.parametrize("name", [*MODELS, "convolution"])
def test_logits_are_the_same_whatever_rows_do(name, orders, steps):
    same_with_and_without(loop, translation({**MODELS, "convolution": CONVOLUTION}[name], beam=1), orders)
    assert (steps.tokens > 0) == (name not in NOT_COVERED)


OPTIONS = {
    "gelu, no biases": ["--activation-fn", "gelu", "--no-attention-bias", "--cross-attention", "fast-weight"],
    "tanh": ["--feature-map", "tanh", "--key-normalization", "l2", "--write-strength-range", "2"],
    "gated": ["--update-rule", "gated", "--write-strength-bias", "--decoder-normalize-before"],
    "sum": ["--update-rule", "sum", "--layernorm-embedding"],
    "convolution": ["--update-rule", "gated-delta", "--short-convolution", "4"],
    "convolution, all places": [*places("fast-weight", *PLACES), "--short-convolution", "2"],
    "convolved softmax": ["--softmax-short-convolution", "3", "--short-convolution", "2"],
    "slots": [*places("fast-weight", *PLACES), "--cross-slots", "3", "--short-convolution", "2"],
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


@few_models
@pytest.mark.parametrize("int8", [[], ["--decoding-weights", "int8"]], ids=["float32", "int8"])
def test_threads_that_come_together_find_the_same(flags, int8, steps, monkeypatch):
    """With layers that are worth sharing, and both kinds of products; the first token is computed alone."""
    monkeypatch.setattr(int8_linear, "_SMALL", 0)
    sizes = ["--encoder-embed-dim", "64", "--decoder-embed-dim", "64", "--decoder-ffn-embed-dim", "1024"]
    model = translation([*flags, *sizes, *int8], 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = loop(model, ORDERS["nobody moves"])
    finally:
        torch.set_num_threads(threads)
    assert steps.tokens == 5
    # One that is rounded the other way changes what follows.
    tolerance = 0.1 if int8 else TOLERANCE
    torch.testing.assert_close(found, without_steps(loop, model, ORDERS["nobody moves"]), rtol=0, atol=tolerance)


@few_models
def test_many_rows_are_multiplied_by_the_blas_and_find_the_same(flags, steps):
    model = translation(flags)
    batch = sources(model, 16)
    assert_same(search(model, batch), without_steps(search, model, batch))
    assert steps.tokens > 3


@few_models
def test_padding_among_the_tokens_leaves_the_memory_as_it_is(flags, steps):
    for rule in (["--update-rule", "delta"], ["--update-rule", "sum"], ["--update-rule", "gated-delta"]):
        model = translation([*flags, *rule], 1)

        def before(token, words, state, padding=model.decoder.padding_idx):
            words[token % 2 :: 2, -1] = padding

        same_with_and_without(loop, model, ORDERS["beams move"], before)
    assert steps.tokens


@few_models
def test_a_copy_of_a_search_goes_on_as_the_search_does(flags, steps):
    model = translation(flags, 1)

    orders = [None, None, None, [1, 0, 5, 5], [2, 3, 0, 0], [1, 0, 2, 3]]
    with torch.no_grad():
        expected = without_steps(loop, model, orders)
    torch.testing.assert_close(loop(model, orders, on_a_copy(model)), expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert steps.tokens


@pytest.mark.parametrize("option", ["features_only", "a gradient"])
def test_a_token_that_is_asked_for_otherwise_is_decoded_without_a_step(option, steps):
    def before(token, words, state):
        if option == "features_only":
            return {option: token == 4}, state
        torch.set_grad_enabled(token == 4)

    same_with_and_without(loop, translation([], 1), [*ORDERS["sentences end"], [1, 0]], before)
    assert 0 < steps.tokens < 8


@pytest.mark.parametrize("adaptive", [[], ["--adaptive-softmax-cutoff", "8,14", "--adaptive-softmax-factor", "1"]])
def test_a_language_model_goes_on_from_a_prompt_that_was_read_ahead(adaptive, steps):
    torch.manual_seed(2)
    model = build_lm("--decoder-layers", "2", *adaptive).eval()
    model.prepare_for_inference_(argparse.Namespace(generation=argparse.Namespace(beam=3)))
    task = FWPLanguageModelingTask(LanguageModelingConfig(), dictionary(20))
    generator = task.build_generator([model], argparse.Namespace(beam=3, max_len_b=14))
    prompt = tokens(model, 2, 5)

    def continuations():
        return task.inference_step(generator, [model], {"net_input": {"src_tokens": prompt}}, prefix_tokens=prompt)

    assert_same(continuations(), without_steps(continuations))
    assert steps.tokens > 4


def test_the_next_search_has_the_weights_that_there_are_then(steps):
    model = translation([])
    batch = sources(model, 3)
    before = search(model, batch)
    model.decoder.layers[0].fc1 = nn.Linear(8, 16).eval()
    with torch.no_grad():
        model.decoder.layers[1].self_attn.v_proj.weight *= -2
    found = search(model, batch)
    assert_same(found, without_steps(search, model, batch))
    assert [h["tokens"].tolist() for h in found[0]] != [h["tokens"].tolist() for h in before[0]]


def test_nothing_of_a_step_outlives_its_search(monkeypatch):
    kept = []
    made = compiled_step.CompiledStep.__init__

    def note(step, *args):
        made(step, *args)
        kept.extend(weakref.ref(x) for x in (step, step._layers, *step._layers.memories, *step._layers.sources))

    monkeypatch.setattr(compiled_step.CompiledStep, "__init__", note)
    model = translation(places("fast-weight", *PLACES))
    gc.disable()
    try:
        search(model, sources(model, 3))
        assert len(kept) > 4 and not [x for x in kept if x() is not None]
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "scalars, covered",
    [(lambda beta, alpha: Scalars(beta, 0.5 * beta, decay=1 - 0.3 * alpha), True),
     (lambda beta, alpha: Scalars(beta, beta * alpha), False)],
    ids=["sums", "products"],
)  # fmt: skip
def test_a_rule_of_ones_own_is_compiled_if_it_is_made_of_sums(scalars, covered, steps, monkeypatch):
    model = translation(["--update-rule", "gated-delta"], 1)
    rule = UpdateRule("gated-delta", ("beta", "alpha"), scalars)
    monkeypatch.setitem(UPDATE_RULES, "gated-delta", rule)
    same_with_and_without(loop, model, ORDERS["beams move"])
    assert bool(steps.tokens) == covered


def no_bias(model):
    model.decoder.layers[0].fc1.bias = None


def other_weight(model):
    layer = model.decoder.layers[0].fc1
    bias = layer.bias.detach() + 1
    del layer.bias
    layer.bias = bias


@pytest.mark.parametrize(
    "change, covered",
    [
        (foreign, False),
        (other_forward, False),
        (retained_dropout, False),
        (lambda model: model.decoder.layers[0].fc2.register_forward_hook(lambda *_: None), False),
        (lambda model: model.decoder.layers[0].fc2.register_forward_pre_hook(lambda *_: None), False),
        (lambda model: model.decoder.layers[0].train(), False),
        (lambda model: model.double(), False),
        (other_weight, False),
        (no_bias, True),
    ],
    ids=["foreign", "forward", "dropout", "hook", "pre-hook", "training", "float64", "no parameter", "no bias"],
)
def test_what_a_program_cannot_do_is_decoded_by_the_layers(change, covered, steps):
    model = translation([])
    change(model)

    def with_the_same_dropout():
        torch.manual_seed(0)
        return loop(model, ORDERS["beams move"])

    same_with_and_without(with_the_same_dropout)
    assert bool(steps.tokens) == covered


def test_a_program_says_what_does_not_fit():
    program, nothing = native.new_decoder_step(), [None]
    program.multiply(4, [torch.ones(3, 4)], nothing, nothing, nothing)
    x, memories = torch.ones(2, 4), [torch.zeros(2, 1, 1, 1)]
    found, weights, *_ = program.run(x, None, memories, [], None, None, [], [])
    assert torch.equal(found, torch.full((2, 3), 4.0)) and not weights.numel()
    with pytest.raises(RuntimeError, match="linear layers of 4 inputs get 5"):
        program.run(torch.ones(2, 5), None, memories, [], None, None, [], [])
    with pytest.raises(IndexError, match="order has 2, there are 2 rows"):
        program.run(x, None, memories, [], torch.tensor([0, 2]), None, [], [])
    with pytest.raises(ValueError, match="3 rows, but 2 memories"):
        program.run(torch.ones(3, 4), None, memories, [], None, None, [], [])
    program.convolve(0, 1, [torch.ones(3, 3)], True)
    with pytest.raises(ValueError, match="a history must be"):
        program.run(x, None, memories, [], None, None, [], [torch.zeros(2, 1, 1, 3)])
    with pytest.raises(ValueError, match="activation is tanh, allowed are relu, gelu"):
        program.activate("tanh")
