"""Prompts are read in parallel, and what is generated is what fairseq's search generates word by word."""

import unittest.mock

import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator
from tiny_models import PLACES, build_lm, build_translation, places, tokens, translation_batch

from fwp_fairseq.modules import FastWeightAttention
from fwp_fairseq.tasks.parallel_prefix import ParallelPrefixGenerator

FLAGS = {
    "delta": ["--update-rule", "delta"],
    "sum, attention normalisation": ["--update-rule", "sum", "--feature-map", "elu", "--attention-normalization"],
    "gated-delta, favor": ["--update-rule", "gated-delta", "--feature-map", "favor"],
    "fwm": ["--update-rule", "fwm"],
}


def generate(generator_class, models, prefix, beam, batch=None, **options):
    """Hypotheses, and the number of calls of the layers' feed-forward networks."""
    vocabulary = models[0].decoder.dictionary
    generator = generator_class(models, vocabulary, beam_size=beam, max_len_b=14, **options)
    sample = {"net_input": batch or {"src_tokens": prefix}}
    network = models[0].decoder.layers[0].fc1
    with unittest.mock.patch.object(network, "forward", wraps=network.forward) as forward:
        return generator.generate(models, sample, prefix_tokens=prefix), forward.call_count


def sharpen(model):
    with torch.no_grad():
        model.decoder.output_projection.weight.mul_(4)
    return model.eval()


def assert_same(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        assert [h["tokens"].tolist() for h in ours] == [h["tokens"].tolist() for h in theirs]
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a["positional_scores"], b["positional_scores"], rtol=0, atol=1e-4)
            if a["attention"] is not None:
                torch.testing.assert_close(a["attention"], b["attention"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("beam", [1, 3])
def test_language_models_go_on_from_a_prompt_that_is_read_at_once(flags, beam):
    torch.manual_seed(1)
    model = sharpen(build_lm(*flags, "--decoder-layers", "2"))
    prompt = tokens(model, 3, 9)
    expected, calls = generate(SequenceGenerator, [model], prompt, beam)
    found, fewer = generate(ParallelPrefixGenerator, [model], prompt, beam)
    assert_same(found, expected)
    assert fewer == calls - 8  # nine words in one pass


def test_a_batch_reads_together_what_all_of_its_prompts_have():
    torch.manual_seed(1)
    model = sharpen(build_lm())
    prompts = tokens(model, 3, 9)
    pad = model.decoder.dictionary.pad()
    prompts[0, 5:], prompts[2, 7:] = pad, pad
    expected, calls = generate(SequenceGenerator, [model], prompts, 2)
    found, fewer = generate(ParallelPrefixGenerator, [model], prompts, 2)
    assert_same(found, expected)
    assert fewer == calls - 4


@pytest.mark.parametrize("where", [PLACES, ["decoder-self-attention"]], ids=["all", "decoder"])
def test_translations_begin_with_their_prefix(where):
    torch.manual_seed(1)
    model = sharpen(build_translation(*places("fast-weight", *where)))
    batch = translation_batch(model)
    del batch["prev_output_tokens"]
    prefix = tokens(model, 3, 5, seed=4)
    expected, calls = generate(SequenceGenerator, [model], prefix, 3, batch)
    found, fewer = generate(ParallelPrefixGenerator, [model], prefix, 3, batch)
    assert_same(found, expected)
    assert fewer == calls - 4
    for row, hypotheses in enumerate(found):
        assert all(h["tokens"][:5].equal(prefix[row]) for h in hypotheses)


def test_a_sentence_that_ends_within_its_prefix_leaves_the_batch():
    torch.manual_seed(1)
    model = sharpen(build_lm())
    prompts = tokens(model, 3, 9)
    prompts[1, 4] = model.decoder.dictionary.eos()
    expected, _ = generate(SequenceGenerator, [model], prompts, 2)
    found, _ = generate(ParallelPrefixGenerator, [model], prompts, 2)
    assert_same(found, expected)


def test_softmax_decoders_and_ensembles_with_them_read_word_by_word():
    torch.manual_seed(1)
    softmax, fast = sharpen(build_lm("--decoder-self-attention", "softmax")), sharpen(build_lm())
    prompt = tokens(fast, 2, 6)
    for models in ([softmax], [fast, softmax]):
        expected, _ = generate(SequenceGenerator, models, prompt, 2)
        found, _ = generate(ParallelPrefixGenerator, models, prompt, 2)
        assert_same(found, expected)


def test_nothing_of_a_prompt_is_left_behind():
    model = sharpen(build_lm())
    prompt = tokens(model, 2, 6)
    generate(ParallelPrefixGenerator, [model], prompt, 2)
    assert model.decoder._here.prefix is None
    attentions = [m for m in model.modules() if isinstance(m, FastWeightAttention)]
    assert attentions and all(m._carried() is None and m._anywhere is None for m in attentions)
    with pytest.raises(AssertionError, match="min_len"):  # fairseq's own check
        generate(ParallelPrefixGenerator, [model], prompt, 2, min_len=50)
    assert model.decoder._here.prefix is None
