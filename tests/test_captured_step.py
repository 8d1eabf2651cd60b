"""A decoder's step that is captured and replayed gives what the step gives, in searches and in loops of one's own.

There is no GPU here. What stands for a graph is as strict as one: capturing changes nothing, replaying runs the same
operators on the same tensors, without any Python, and what would ask the device is an error while it is captured.
"""

import argparse
import copy
import gc
import math
import unittest.mock
import weakref

import pytest
import torch
from fairseq.search import Sampling
from fairseq.sequence_generator import SequenceGenerator
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from tiny_models import PLACES, build_lm, build_translation, dictionary, places, tokens, translation_batch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from fwp_fairseq.models import captured_step
from fwp_fairseq.tasks.parallel_prefix import FWPLanguageModelingTask

# test_graph_gpu.py has others.
DEVICE, DTYPE, TOLERANCE = "cpu", torch.float32, 1e-5
ASKING = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "lift_fresh", "unique")


class Recorder(TorchDispatchMode):
    """Notes what is called, and what tensors that were there before are to be again."""

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.made = [], [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.__name__.partition(".")[0] in ASKING:
            raise RuntimeError(f"{function} asks the device")
        kwargs = kwargs or {}
        aliases = [argument.alias_info for argument in function._schema.arguments]
        for alias, x in zip(aliases, args):
            if alias is not None and alias.is_write and x is not None and x.untyped_storage()._cdata not in self.made:
                self.before.append((x, x.clone()))
        result = function(*args, **kwargs)
        outputs = [x for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor)]
        views = any(x.alias_info is not None for x in function._schema.returns)
        if not views:
            self.made.update((x.untyped_storage()._cdata, x) for x in outputs)
        written = any(alias is not None and alias.is_write for alias in aliases)
        if written or not views:
            self.calls.append((function, args, kwargs, [] if views else outputs))
        return result


class RecordedGraph:
    """Stands for captured_step.Graph."""

    captures = replayed = 0

    def __init__(self, function, device):
        RecordedGraph.captures += 1
        recorder = Recorder()
        try:
            with recorder:
                function()
        finally:
            for x, before in reversed(recorder.before):
                x.copy_(before)
        self.calls, self.made = recorder.calls, recorder.made

    def is_here(self):
        return True

    def replay(self):
        RecordedGraph.replayed += 1
        for function, args, kwargs, outputs in self.calls:
            for x, new in zip(outputs, tree_flatten(function(*args, **kwargs))[0]):
                x.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """Steps are captured, and the class counts how often, and how many are replayed."""
    monkeypatch.setattr(captured_step, "_is_on_gpu", lambda x: True)
    monkeypatch.setattr(captured_step, "Graph", RecordedGraph)
    RecordedGraph.captures = RecordedGraph.replayed = 0
    return RecordedGraph


def sharpened(model, beam=5):
    """Random, but with predictions far from uniform, so that hypotheses differ, and prepared for generation."""
    with torch.no_grad():
        model.decoder.output_projection.weight.mul_(4)
    model.eval().prepare_for_inference_(argparse.Namespace(generation=argparse.Namespace(beam=beam)))
    return model.to(DEVICE, DTYPE)


def sources(model, batch, source=9):
    made = translation_batch(model, batch=batch, source=source)
    return {key: made[key].to(DEVICE) for key in ("src_tokens", "src_lengths")}


def search(model, batch, beam=5, max_len=12, **options):
    generator = SequenceGenerator(
        [model], model.decoder.dictionary, beam_size=beam, max_len_b=max_len, unk_penalty=math.inf, **options
    )
    return generator.generate([model], {"net_input": batch})


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert [h["tokens"].tolist() for h in ours] == [h["tokens"].tolist() for h in theirs]
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a["positional_scores"], b["positional_scores"], rtol=0, atol=TOLERANCE)
            torch.testing.assert_close(a["attention"], b["attention"], rtol=0, atol=TOLERANCE)


def without_graphs(function, *args, **kwargs):
    with unittest.mock.patch.dict("os.environ", {captured_step.SWITCH: "0"}):
        return function(*args, **kwargs)


def same_with_and_without(function, *args, **kwargs):
    """What ``function`` finds, with tolerance for other numbers of rows."""
    expected = without_graphs(function, *args, **kwargs)
    assert not captured_step.Graph.captures
    torch.testing.assert_close(function(*args, **kwargs), expected, rtol=TOLERANCE, atol=TOLERANCE)


MODELS = {
    "decoder": [],
    "all places": places("fast-weight", *PLACES),
    "attention normalisation": [*places("fast-weight", *PLACES), "--update-rule", "sum", "--feature-map", "elu"]
    + ["--attention-normalization"],
    "softmax in one layer": [*places("fast-weight", *PLACES), "--cross-softmax-layers", "1"],
    "convolved softmax": ["--softmax-short-convolution", "3", "--short-convolution", "2"],
    "slots": [*places("fast-weight", *PLACES), "--cross-slots", "3"],
    "stages": [*places("fast-weight", *PLACES), "--short-convolution", "3", "--output-gate", "--read-layer-norm"],
    "gated delta": ["--update-rule", "gated-delta", "--decoder-learned-pos"],
    "learned": ["--update-rule", "gated-delta", "--feature-map", "learned"],
    "favor": ["--feature-map", "favor", "--favor-features", "4"],
    "fwm": ["--update-rule", "fwm", "--feature-map", "tanh", "--key-normalization", "none"],
    "chunk": ["--fast-weight-backend", "chunk", *places("fast-weight", *PLACES)],
    "no positions": ["--no-token-positional-embeddings", "--decoder-normalize-before"],
    "other widths": ["--decoder-embed-dim", "16", "--decoder-input-dim", "12", "--decoder-output-dim", "12"],
}
models = pytest.mark.parametrize("flags", MODELS.values(), ids=MODELS)


def translation(flags, beam=5):
    torch.manual_seed(3)
    return sharpened(build_translation("--decoder-layers", "2", *flags), beam)


@models
@pytest.mark.parametrize("beam", [1, 5])
def test_beam_search_finds_the_same(flags, beam, graphs):
    model = translation(flags, beam)
    batch = sources(model, 4)
    expected = without_graphs(search, model, batch, beam)
    assert not graphs.captures
    found = search(model, batch, beam)
    assert graphs.captures == 1 and graphs.replayed > 4
    assert_same(found, expected)


@pytest.mark.parametrize("flags", [[], places("fast-weight", *PLACES)], ids=["decoder", "all places"])
def test_attention_is_that_of_the_token(flags, graphs):
    model = translation(flags)
    model.decoder.give_weights(True)
    batch = sources(model, 2)
    expected = without_graphs(search, model, batch)
    assert_same(search(model, batch), expected)
    assert graphs.replayed and all(h["attention"].size(0) == 9 for row in expected for h in row)


# --- Loops of one's own ----------------------------------------------------------------------------------------------

# Before each token: the rows that go on, or None: all as they are. Of six rows, two beams of three sentences.
ORDERS = {
    "nobody moves": [None] * 6,
    "beams move": [None, [1, 0, 3, 3, 4, 5], [0, 0, 2, 3, 5, 4], [1, 0, 3, 2, 5, 5], [0, 0, 3, 2, 5, 4]],
    "twice between two tokens": [None, None, [[1, 0, 3, 3, 4, 5], [0, 1, 3, 2, 5, 5]], None],
    "sentences end": [None, None, [1, 0, 2, 2, 5, 4], [1, 0, 5, 5], [2, 3], None, [1, 1], None],
    "the first sentence ends": [None, None, None, [2, 3, 5, 4], [1, 1, 2, 3], [3, 2], [1, 0]],
    "one beam": [None, None, None, [1, 2, 5], None, [2, 0, 0], [1], None],
    "sentences change places": [None, None, [2, 3, 0, 1, 4, 5], None, [4, 4, 1, 0, 3, 2], None],
    "sentences are mixed": [None, None, None, [0, 2, 1, 3, 4, 5], None, [5, 4, 3, 2, 1, 0], None],
    "rows come back": [None, None, None, [0, 1], [0, 1, 1, 0, 0, 1], [5, 4, 3, 2, 1, 0], None],
    "rows are added": [None, None, [0, 1, 2, 3, 4, 5, 4, 5], None, [1, 0], [1, 1]],
}


def loop(model, orders, before=lambda token, words, state: None):
    """Logits and attention of each token, whose words differ by row.

    ``before`` each token may change what there is, and return options and another state.
    """
    found, state = [], {}
    with torch.no_grad():
        encoder_out = model.encoder(**sources(model, 3))
        two_beams = torch.arange(3, device=DEVICE).repeat_interleave(2)
        encoder_out = model.encoder.reorder_encoder_out(encoder_out, two_beams)
        words = torch.full((6, 1), 2, device=DEVICE)
        for token, order in enumerate(orders):
            for new in [order] if order is None or isinstance(order[0], int) else order:
                if new is not None:
                    new = torch.tensor(new, device=DEVICE)
                    words, encoder_out = words[new], model.encoder.reorder_encoder_out(encoder_out, new)
                    model.decoder.reorder_incremental_state_scripting(state, new)
            options, state = before(token, words, state) or ({}, state)
            logits, extra = model.decoder(words, encoder_out, state, **options)
            found += [x for x in (logits, *extra["attn"]) if x is not None]
            words = torch.cat([words, tokens(model, len(words), 1, seed=token).to(DEVICE)], dim=1)
    return found


@models
@pytest.mark.parametrize("orders", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("few_rows", [0, 64])
def test_logits_are_the_same_whatever_rows_do(flags, orders, few_rows, graphs, monkeypatch):
    """``few_rows``: with 0, another step is captured when half of the rows are left."""
    monkeypatch.setattr(captured_step, "_FEW_ROWS", few_rows)
    same_with_and_without(loop, translation(flags, beam=1), orders)
    assert graphs.replayed


MOVES = ORDERS["sentences end"][:5]
three_models = pytest.mark.parametrize("flags", [MODELS[name] for name in ("decoder", "all places", "stages")])


@three_models
@pytest.mark.parametrize("option", ["features_only", "a gradient"])
def test_a_token_that_is_asked_for_otherwise_is_decoded_without_a_step(flags, option, graphs):
    def before(token, words, state):
        if option == "features_only":
            return {option: token == 4}, state
        torch.set_grad_enabled(token == 4)

    same_with_and_without(loop, translation(flags, 1), [*ORDERS["sentences end"], [1, 0]], before)
    assert graphs.replayed


@three_models
def test_padding_among_the_tokens_leaves_the_memory_as_it_is(flags, graphs):
    model = translation(flags, 1)

    def before(token, words, state):
        words[token % 2 :: 2, -1] = model.decoder.padding_idx

    same_with_and_without(loop, model, ORDERS["beams move"], before)
    assert graphs.replayed


def on_a_copy(model):
    """What a loop does before each token, so that a copy of its search goes on from the fifth."""

    def before(token, words, state):
        if token == 4:
            other = copy.deepcopy(state)
            model.decoder(words + 0, None, state)  # which changes nothing in the copy
            return {}, other

    return before


@three_models
def test_a_copy_of_a_search_goes_on_as_the_search_does(flags, graphs):
    model = translation(flags, 1)

    orders = [None, None, None, *MOVES[2:], [1, 0], [0, 0]]
    with torch.no_grad():
        expected = without_graphs(loop, model, orders)
    torch.testing.assert_close(loop(model, orders, on_a_copy(model)), expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert graphs.replayed


# --- Searches --------------------------------------------------------------------------------------------------------


def test_a_batch_that_shrinks_is_replayed_with_fewer_rows_and_captured_anew_for_half(graphs, monkeypatch):
    rows = []
    begin = captured_step.CapturedStep.begin

    def note(step, n):
        rows.append(n)
        begins = begin(step, n)
        # On a GPU siblings wait for each other: rows that nobody looks at have none.
        assert not begins or step._order[n:].equal(step._in_order[n:])
        return begins

    monkeypatch.setattr(captured_step.CapturedStep, "begin", note)
    model = translation(places("fast-weight", *PLACES))
    with torch.no_grad():
        model.decoder.output_projection.weight[model.decoder.dictionary.eos()] *= 3
    batch = sources(model, 8)
    expected = without_graphs(search, model, batch, max_len=40)
    assert_same(search(model, batch, max_len=40), expected)
    assert len(set(rows)) > 2 and graphs.captures == 1, rows
    monkeypatch.setattr(captured_step, "_FEW_ROWS", 0)
    assert_same(search(model, batch, max_len=40), expected)
    assert graphs.captures > 2


@pytest.mark.parametrize("flags", [[], places("fast-weight", *PLACES)], ids=["decoder", "all places"])
def test_searches_in_turn_do_not_meet(flags, graphs):
    """Two models in an ensemble, a search after another, and one that begins while another is at work."""
    ours, theirs = translation(flags), translation(["--update-rule", "gated-delta", *flags])
    batches = [sources(ours, n, source=7 + n) for n in (2, 3)]
    generators = [
        SequenceGenerator(models, ours.decoder.dictionary, beam_size=3, max_len_b=8)
        for models in ([ours, theirs], [ours])
    ]

    def both():
        found = []
        for generator in generators:
            for batch in batches:
                found += generator.generate([], {"net_input": batch})
        return found

    expected = without_graphs(both)
    assert_same(both(), expected)
    assert graphs.captures == 6

    step, within = captured_step.CapturedStep.replay, []

    def interrupted(*args):
        if not within:
            within.append(None)
            within.append(both())
        return step(*args)

    with unittest.mock.patch.object(captured_step.CapturedStep, "replay", interrupted):
        assert_same(both(), expected)
    assert_same(within[1], expected)


def test_the_next_search_has_the_weights_that_there_are_then(graphs):
    model = translation([])
    batch = sources(model, 3)
    before = search(model, batch)
    model.decoder.layers[0].fc1 = nn.Linear(8, 16).eval().to(DEVICE)
    with torch.no_grad():
        model.decoder.layers[1].self_attn.v_proj.weight *= -2
    found = search(model, batch)
    assert graphs.captures == 2
    assert_same(found, without_graphs(search, model, batch))
    assert [h["tokens"].tolist() for h in found[0]] != [h["tokens"].tolist() for h in before[0]]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--adaptive-softmax-cutoff", "8,14", "--adaptive-softmax-factor", "1"],
        ["--adaptive-input", "--adaptive-input-cutoff", "8,14", "--adaptive-input-factor", "1"],
    ],
    ids=["plain", "adaptive softmax", "adaptive input"],
)
@pytest.mark.parametrize("read_ahead", [False, True])
def test_a_language_model_continues_its_prompt_as_before(flags, read_ahead, graphs):
    torch.manual_seed(2)
    model = build_lm(*flags).eval().to(DEVICE)
    model.prepare_for_inference_(argparse.Namespace(generation=argparse.Namespace(beam=3)))
    task = (FWPLanguageModelingTask if read_ahead else LanguageModelingTask)(LanguageModelingConfig(), dictionary(20))
    generator = task.build_generator([model], argparse.Namespace(beam=3, max_len_b=14))
    prompt = tokens(model, 2, 5).to(DEVICE)

    def continuations():
        return task.inference_step(generator, [model], {"net_input": {"src_tokens": prompt}}, prefix_tokens=prompt)

    expected = without_graphs(continuations)
    found = continuations()
    assert graphs.captures == 1 and graphs.replayed > 4
    for ours, theirs in zip(found, expected, strict=True):
        assert [h["tokens"].tolist() for h in ours] == [h["tokens"].tolist() for h in theirs]


def test_nothing_of_a_step_outlives_its_search(graphs, monkeypatch):
    kept = []
    made = captured_step.CapturedStep.__init__

    def note(step, *args):
        made(step, *args)
        of_sources = sum(step._sources.values(), [])
        kept.extend(weakref.ref(x) for x in (step, step.graph, *step._left[0].values(), *of_sources))

    monkeypatch.setattr(captured_step.CapturedStep, "__init__", note)
    model = translation(places("fast-weight", *PLACES))
    batch = sources(model, 3)
    gc.disable()
    try:
        loop(model, ORDERS["beams move"])
        assert len(kept) > 4 and not [x for x in kept if x() is not None]
        kept.clear()
        search(model, batch)
        assert len(kept) > 4 and not [x for x in kept if x() is not None]
    finally:
        gc.enable()


def test_words_are_drawn_as_before(graphs):
    """Capturing and replaying draw no random numbers."""
    model = translation([])
    batch = sources(model, 3)

    def drawn():
        torch.manual_seed(1)
        return search(model, batch, search_strategy=Sampling(model.decoder.dictionary))

    expected = without_graphs(drawn)
    assert_same(drawn(), expected)
    assert graphs.replayed and len({str(h["tokens"].tolist()) for row in expected for h in row}) > 3


# --- What is not captured --------------------------------------------------------------------------------------------


class Foreign(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x) + (x.mean().item() > 1e9)


def foreign(model):
    model.decoder.layers[0].fc1 = Foreign(model.decoder.layers[0].fc1).eval()


def other_forward(model):
    forward = model.decoder.layers[1].fc1.forward
    model.decoder.layers[1].fc1.forward = lambda x: forward(x)


def retained_dropout(model):
    model.decoder.layers[0].dropout_module.apply_during_inference = True


@pytest.mark.parametrize(
    "change",
    [
        foreign,
        other_forward,
        retained_dropout,
        lambda model: model.decoder.layers[0].fc2.register_forward_hook(lambda *_: None),
        lambda model: model.decoder.layers[0].fc2.register_forward_pre_hook(lambda *_: None),
        lambda model: model.decoder.layers[0].train(),
        lambda model: model.decoder.train(),
    ],
    ids=["foreign", "other forward", "dropout", "hook", "pre-hook", "a layer in training", "training"],
)
def test_what_may_differ_from_token_to_token_is_not_captured(change, graphs):
    model = translation([])
    change(model)
    loop(model, ORDERS["beams move"])
    assert not graphs.captures


def test_softmax_in_the_decoder_is_not_captured(graphs):
    model = translation(["--decoder-self-attention", "softmax", "--cross-attention", "fast-weight"])
    loop(model, ORDERS["beams move"])
    assert not graphs.captures


def test_nothing_is_captured_in_modes_that_see_through_python(graphs):
    model = translation([])
    with torch.autocast("cpu"), unittest.mock.patch.object(torch, "is_autocast_enabled", lambda device: True):
        loop(model, ORDERS["beams move"])
    with unittest.mock.patch.object(torch.compiler, "is_compiling", lambda: True):
        loop(model, ORDERS["nobody moves"])
    assert not graphs.captures
    loop(model, ORDERS["nobody moves"])
    assert graphs.captures == 1


def test_the_switch_says_what_it_allows(graphs, monkeypatch):
    monkeypatch.setenv(captured_step.SWITCH, "no")
    with pytest.raises(ValueError, match="FWP_CUDA_GRAPHS is no, allowed are 0 and 1"):
        loop(translation([]), ORDERS["nobody moves"])


def test_what_cannot_be_captured_after_all_is_said_and_decoded_without(graphs, caplog):
    model = translation(places("fast-weight", *PLACES))
    layer = model.decoder.layers[0]
    activation = layer.activation_fn
    layer.activation_fn = lambda x: activation(x) if x.sum().item() < 1e9 else x
    same_with_and_without(loop, model, ORDERS["sentences end"])
    assert graphs.captures == 1 and not graphs.replayed
    assert "decoding goes on without a captured graph: " in caplog.text
    layer.activation_fn = activation
    search(model, sources(model, 2))
    assert graphs.replayed
