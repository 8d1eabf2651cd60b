"""One model in several searches, and several passes, at once: each gives what it gives alone."""

import argparse
import itertools
import sys
import threading
import unittest.mock
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import CONFIGS, build, build_cross, inputs
from tiny_models import (
    PLACES,
    build_lm,
    build_streaming_lm,
    build_translation,
    dictionary,
    places,
    tokens,
    translation_batch,
)

from fwp_fairseq.tasks.parallel_prefix import FWPLanguageModelingTask, FWPTranslationTask
from fwp_fairseq.tasks.streaming_language_modeling import read_text


@pytest.fixture
def often():
    """Threads take turns after every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def sharpened(model):
    with torch.no_grad():
        model.decoder.output_projection.weight.mul_(4)
    model.eval().prepare_for_inference_(argparse.Namespace(generation=argparse.Namespace(beam=5)))
    return model


def translation_task(task, *flags):
    model = sharpened(build_translation(*places("fast-weight", *PLACES), "--decoder-layers", "2", *flags))
    vocabulary = dictionary(20)
    return model, task(TranslationConfig(), vocabulary, vocabulary)


def language_modeling_task(task, *flags):
    return sharpened(build_lm("--decoder-layers", "2", *flags)), task(LanguageModelingConfig(), dictionary(20))


def streaming_task(*flags, **kwargs):
    model, task = build_streaming_lm("--tokens-per-sample", "3", *flags, **kwargs)
    return sharpened(model), task


TASKS = {
    "translation": lambda: translation_task(TranslationTask),
    "fwp_translation": lambda: translation_task(FWPTranslationTask),
    "fwp_translation, attention normalisation": lambda: translation_task(
        FWPTranslationTask, "--update-rule", "sum", "--feature-map", "elu", "--attention-normalization"
    ),
    "fwp_translation, softmax in some places": lambda: translation_task(
        FWPTranslationTask, "--encoder-self-attention", "softmax", "--cross-attention", "softmax"
    ),
    "translation, chunk": lambda: translation_task(TranslationTask, "--fast-weight-backend", "chunk"),
    "language_modeling": lambda: language_modeling_task(LanguageModelingTask),
    "fwp_language_modeling": lambda: language_modeling_task(FWPLanguageModelingTask),
    "streaming_language_modeling": streaming_task,
    "streaming_language_modeling, fwm": lambda: streaming_task(
        "--update-rule", "fwm", "--feature-map", "tanh", "--key-normalization", "none"
    ),
    "streaming_language_modeling, Transformer-XL": lambda: streaming_task(
        "--memory-length", "4", arch="transformer_xl_lm"
    ),
}


def search(model, task, beam, prefix_length, seed):
    """Words and scores of a batch; the generator is made for it, as the hub interface does."""
    generator = task.build_generator([model], argparse.Namespace(beam=beam, max_len_b=8))
    prefix = tokens(model, 3, prefix_length, seed=seed) if prefix_length else None
    if hasattr(model, "encoder"):
        batch = translation_batch(model)
        del batch["prev_output_tokens"]
        # Equal sentences beside each other, too.
        batch["src_tokens"][1 + seed % 2, :-1] = batch["src_tokens"][seed % 2, :-1]
    else:
        batch = {"src_tokens": tokens(model, 3, 5, seed=seed)}
    found = task.inference_step(generator, [model], {"net_input": batch}, prefix_tokens=prefix)
    return [(h["tokens"].tolist(), h["positional_scores"]) for hypotheses in found for h in hypotheses]


def assert_same(found, expected):
    assert [words for words, _ in found] == [words for words, _ in expected]
    for (_, scores), (_, others) in zip(found, expected):
        torch.testing.assert_close(scores, others, rtol=0, atol=0)


@pytest.mark.parametrize("make", TASKS.values(), ids=TASKS)
def test_four_threads_find_what_one_finds(make, often):
    torch.manual_seed(1)
    model, task = make()
    jobs = [(*job, seed) for seed, job in enumerate(itertools.product((1, 2, 3, 4, 5), (0, 4, 6)))]
    expected = [search(model, task, *job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: search(model, task, *job), jobs))
    for ours, theirs in zip(found, expected):
        assert_same(ours, theirs)


@pytest.mark.parametrize("make", TASKS.values(), ids=TASKS)
def test_a_search_within_a_search_changes_neither(make):
    """By a generator that is made meanwhile, as a constraint on the words may do."""
    torch.manual_seed(1)
    model, task = make()
    outer, inner = [(3, 4, 0), (4, 0, 1)], (2, 5, 7)
    expected = [search(model, task, *job) for job in (*outer, inner)]
    calls, found = [], []
    forward = model.decoder.forward

    def interrupted(*args, **kwargs):
        result = forward(*args, **kwargs)
        calls.append(1)
        if len(calls) == 3:
            found.append(search(model, task, *inner))
        return result

    for job, alone in zip(outer, expected):
        calls.clear()
        with unittest.mock.patch.object(model.decoder, "forward", interrupted):
            assert_same(search(model, task, *job), alone)
        assert_same(found.pop(), expected[2])


def test_what_was_read_ahead_is_not_kept_after_it_was_used():
    torch.manual_seed(1)
    model, _ = language_modeling_task(FWPLanguageModelingTask)
    prefix, state = tokens(model, 2, 4), {}
    words = torch.cat([torch.full((2, 1), 2), prefix], dim=1)
    with torch.no_grad(), model.decoder.begin_with(prefix):
        found = [model.decoder(words[:, :length], incremental_state=state)[0] for length in range(1, 6)]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(found, dim=1), model.decoder(words)[0], rtol=1e-4, atol=1e-5)
    features = [x for buffer in state.values() if isinstance(buffer, dict) for x in buffer if x == "features"]
    assert not features


# --- Passes that carry a state ---------------------------------------------------------------------------------------


def carried(model, words, before):
    with torch.no_grad(), model.decoder.carry(before) as after:
        logits, _ = model(words)
    return logits, after


def in_another_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


@pytest.mark.parametrize("arch", ["fwp_transformer_lm", "transformer_xl_lm"])
def test_a_pass_in_another_thread_carries_its_own_state_or_none(arch):
    torch.manual_seed(1)
    model, _ = build_streaming_lm(arch=arch)
    model.eval()
    words, other = tokens(model, 2, 5), tokens(model, 2, 4, seed=1)
    before = read_text(model, tokens(model, 2, 6, seed=2), 3)
    with torch.no_grad():
        plain, _ = model(other)
    expected, left = carried(model, words, before)
    expected_other, left_other = carried(model, other, None)
    with torch.no_grad(), model.decoder.carry(before) as after:
        found_plain, _ = in_another_thread(model, other)
        found_other, after_other = in_another_thread(carried, model, other, None)
        with model.decoder.carry(None):
            assert model(other)[0].equal(expected_other)
        found, _ = model(words)
    for ours, theirs in ((found_plain, plain), (found_other, expected_other), (found, expected)):
        assert ours.equal(theirs)
    for ours, theirs in ((after, left), (after_other, left_other)):
        assert all(a["prev_key"].equal(b["prev_key"]) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("arch", ["fwp_transformer_lm", "transformer_xl_lm"])
def test_activation_checkpoints_go_on_from_what_is_carried_in_whatever_thread_the_backward_pass_is(arch):
    """On a GPU it is another one."""
    gradients = []
    for flags in ([], ["--checkpoint-activations"]):
        torch.manual_seed(1)
        model, _ = build_streaming_lm(*flags, arch=arch)
        before = read_text(model, tokens(model, 2, 6, seed=2), 3)
        with model.train().decoder.carry(before):
            loss = model(tokens(model, 2, 5))[0].logsumexp(-1).sum()
            backward = threading.Thread(target=loss.backward)
            backward.start()
            backward.join()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.filterwarnings("ignore")  # about torch's own compiler
def test_a_compiled_attention_carries_what_is_said_in_its_thread():
    torch._dynamo.reset()
    attention = build(CONFIGS[0], causal=True).eval()
    compiled = torch.compile(attention, backend="eager")
    x = inputs(4)
    with torch.no_grad():
        expected, _ = attention(x, x, x)
        assert compiled(x, x, x)[0].equal(expected)
        with attention.carry({}) as before:
            compiled(x, x, x)
        with attention.carry(before):
            going_on, _ = attention(x, x, x)
            torch.testing.assert_close(compiled(x, x, x)[0], going_on)
            torch.testing.assert_close(in_another_thread(compiled, x, x, x)[0], expected)
    assert not torch.allclose(going_on, expected)


# --- Cross-attention -------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    groups=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), min_size=1, max_size=4),
    normalized=st.booleans(),
    padded=st.booleans(),
    draw=st.data(),
)
def test_rows_read_their_own_source_whoever_shares_it_and_wherever_they_move(groups, normalized, padded, draw):
    config = next(c for c in CONFIGS if c.attention_normalization == normalized)
    cross = build_cross(config)
    source = inputs(5, batch=3)
    rows = torch.tensor([sentence for sentence, count in groups for _ in range(count)])
    padding = torch.zeros(len(rows), 5, dtype=torch.bool)
    if padded:
        padding[draw.draw(st.integers(0, len(rows) - 1)) :, 3:] = True
    state: dict = {}
    with torch.no_grad():
        for step in range(4):
            query = inputs(1, batch=len(rows), seed=step)
            keys = source[:, rows]
            found, _ = cross(query, keys, keys, padding, incremental_state=state, static_kv=True)
            expected, _ = cross(query, keys, keys, padding)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            order = torch.tensor(draw.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8)))
            cross.reorder_incremental_state(state, order)
            rows, padding = rows[order], padding[order]
