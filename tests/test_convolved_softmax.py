"""Softmax attention with the short convolution of fast weights (--softmax-short-convolution)."""

import copy
import itertools
import pickle

import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator
from test_models import assert_same_model, generate, loss_and_gradients
from test_parallel_prefix import assert_same
from test_parallel_prefix import generate as generate_with
from test_resuming import DELTA, differing
from tiny_models import (
    PLACES,
    assert_decodes_as_in_the_parallel_pass,
    build_lm,
    build_translation,
    decode_step_by_step,
    places,
    tokens,
    translation_batch,
)
from torch import Tensor
from torch.nn import functional as F

from fwp_fairseq.fairseq_mends import checkpoint_options
from fwp_fairseq.modules import FastWeightConfig
from fwp_fairseq.modules.convolved_softmax import ConvolvedSoftmaxAttention
from fwp_fairseq.tasks.parallel_prefix import ParallelPrefixGenerator

WIDTH = ["--softmax-short-convolution", "4"]
SOFTMAX = [*places("softmax"), *WIDTH]
MODELS = {
    "softmax": SOFTMAX,
    "width 2, pre-norm": [*SOFTMAX, "--softmax-short-convolution", "2", "--decoder-normalize-before"],
    "unequal widths": [*SOFTMAX, "--encoder-embed-dim", "12", "--decoder-embed-dim", "8"],
    "cross+self attention": [*SOFTMAX, "--no-cross-attention", "--cross-self-attention"],
    "fast weights in the encoder": [*SOFTMAX, *places("fast-weight", "encoder-self-attention")],
    "fast weights in the decoder": [*SOFTMAX, *places("fast-weight", "decoder-self-attention")],
    "fast weights in cross-attention": [*SOFTMAX, *places("fast-weight", "cross-attention")],
    "softmax in one layer": [*places("fast-weight"), *WIDTH, "--decoder-layers", "2", "--cross-softmax-layers", "1"],
}
each_model = pytest.mark.parametrize("flags", MODELS.values(), ids=MODELS)


def drawn(model):
    """The model with convolutions that are not the identity, and predictions that are far from uniform."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "short_convolution" in name:
            torch.nn.init.normal_(parameter, std=0.7)
    with torch.no_grad():
        model.decoder.output_projection.weight.mul_(4)
    return model.eval()


def drawn_translation(flags: list[str], words: int = 20):
    torch.manual_seed(0)
    return drawn(build_translation(*flags, words=words))


def attention_of(causal: bool = False, cross: bool = False, width: int = 4) -> ConvolvedSoftmaxAttention:
    torch.manual_seed(1)
    attention = ConvolvedSoftmaxAttention(
        *(6, 2, FastWeightConfig(softmax_short_convolution=width)),
        causal=causal,
        self_attention=not cross,
        encoder_decoder_attention=cross,
    )
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    return attention.eval()


def by_hand(attention: ConvolvedSoftmaxAttention, query: Tensor, key: Tensor, hidden: Tensor | None) -> Tensor:
    """One sentence: (T, embed_dim) and (S, embed_dim), as the definition has it."""
    heads = []
    whole = 0 if attention.causal else (attention.short_convolution.width - 1) // 2
    for part, x in (("q", query), ("k", key), ("v", key)):
        later = 0 if part == "q" and attention.encoder_decoder_attention else whole
        projected = getattr(attention, f"{part}_proj")(x).view(len(x), 2, 3)
        weights = getattr(attention.short_convolution, part)[:, :, 0]
        mixed = torch.zeros_like(projected)
        for t, (j, weight) in itertools.product(range(len(x)), enumerate(weights.flip(0))):
            if 0 <= t - j + later < len(x):
                mixed[t] += weight * projected[t - j + later]
        heads.append(mixed.transpose(0, 1))
    read = F.scaled_dot_product_attention(*heads, attn_mask=None if hidden is None else ~hidden)
    return attention.out_proj(read.transpose(0, 1).flatten(1))


READINGS = {"encoder": (False, False), "decoder": (True, False), "cross": (False, True)}


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("causal, cross", READINGS.values(), ids=READINGS)
def test_attention_is_softmax_over_convolved_projections_and_padding_counts_as_nothing(causal, cross, width):
    attention = attention_of(causal, cross, width)
    query, key = torch.randn(6, 2, 6), torch.randn(5, 2, 6)
    padding = torch.tensor([[False] * 5, [True, True, False, False, False]])  # on the left, as fairseq pads sources
    if not cross:
        query, padding = key, padding.flip(1) if causal else padding
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1) if causal else None
    mask = torch.zeros(5, 5).masked_fill(hidden, -torch.inf) if causal else None
    found, _ = attention(query, key, key, key_padding_mask=padding, attn_mask=mask, static_kv=cross)
    for row, there in enumerate(~padding):
        asked = query[:, row] if cross else query[there, row]
        seen = None if hidden is None else hidden[there][:, there]
        expected = by_hand(attention, asked, key[there, row], seen)
        torch.testing.assert_close(found[:, row] if cross else found[there, row], expected, rtol=1e-4, atol=1e-4)


def test_it_begins_as_fairseq_s_model_with_its_random_numbers_and_its_names():
    torch.manual_seed(5)
    ours = build_translation(*SOFTMAX)
    torch.manual_seed(5)
    theirs = build_translation(arch="transformer")
    batch = translation_batch(ours)
    of_convolutions = [name for name in ours.state_dict() if ".short_convolution." in name]
    assert len(of_convolutions) == 3 * 3
    assert [name for name in ours.state_dict() if name not in of_convolutions] == list(theirs.state_dict())
    theirs.load_state_dict({name: x for name, x in ours.state_dict().items() if name in theirs.state_dict()})
    torch.testing.assert_close(ours.eval()(**batch)[0], theirs.eval()(**batch)[0])


def test_no_width_leaves_fairseq_s_model():
    built = []
    for arch, flags in (("fwp_transformer", [*SOFTMAX, "--softmax-short-convolution", "0"]), ("transformer", [])):
        torch.manual_seed(5)
        built.append(build_translation(*flags, arch=arch))
    assert_same_model(*built, translation_batch(built[0]))


@each_model
def test_it_trains_and_decodes_as_in_the_parallel_pass(flags):
    model = drawn_translation(flags)
    batch = translation_batch(model)
    _, gradients = loss_and_gradients(model, batch)
    for name, gradient in gradients.items():
        assert "short_convolution" not in name or gradient.abs().sum() > 0, name
    assert_decodes_as_in_the_parallel_pass(model, batch)


@each_model
def test_a_padded_batch_is_the_same_as_each_sentence_by_itself(flags):
    model = drawn_translation(flags)
    batch = translation_batch(model)
    targets = batch["prev_output_tokens"]
    targets[1, 4:] = model.decoder.dictionary.pad()
    together, _ = model(**batch)
    for row, (length, target) in enumerate(zip(batch["src_lengths"], (6, 4, 6))):
        alone, _ = model(batch["src_tokens"][row : row + 1, -length:], length[None], targets[row : row + 1, :target])
        torch.testing.assert_close(alone[0], together[row, :target], rtol=1e-4, atol=1e-5)


@each_model
def test_beams_take_their_convolutions_with_them(flags):
    """Brute force: the same search, with every step computed from all tokens again."""
    model = drawn_translation(flags, words=30)
    batch = translation_batch(model, batch=4, source=9)
    cached, recomputed = (generate(model, batch, 5, 12, incremental) for incremental in (True, False))
    assert len({tuple(h["tokens"].tolist()) for row in cached for h in row}) > 4
    for ours, theirs in zip(cached, recomputed):
        assert [h["tokens"].tolist() for h in ours] == [h["tokens"].tolist() for h in theirs]


@pytest.mark.parametrize(
    "flags",
    [
        [*places("fast-weight", "decoder-self-attention"), *WIDTH],
        [*places("fast-weight"), "--short-convolution", "4"],
        ["--short-convolution", "4"],
    ],
    ids=["softmax over the source", "fast weights of the source", "in the target alone"],
)
def test_what_goes_on_from_a_given_beginning_is_the_same(flags):
    model = drawn_translation([*flags, "--decoder-layers", "2"])
    batch = translation_batch(model)
    prefix = batch.pop("prev_output_tokens")[:, 1:5]
    expected, _ = generate_with(SequenceGenerator, [model], prefix, 3, batch)
    found, _ = generate_with(ParallelPrefixGenerator, [model], prefix, 3, batch)
    assert_same(found, expected)


def test_a_language_model_decodes_as_in_the_parallel_pass_and_carries_no_state():
    model = drawn(build_lm("--decoder-self-attention", "softmax", *WIDTH))
    text = tokens(model, 2, 7)
    steps, _ = decode_step_by_step(model.decoder, text)
    torch.testing.assert_close(steps, model(text)[0], rtol=1e-4, atol=1e-5)
    assert "--decoder-self-attention is softmax" in model.cannot_carry_state()


def test_searches_that_take_turns_do_not_see_each_other():
    attention = attention_of(causal=True)
    texts = torch.randn(2, 5, 1, 6)
    alone, turns = [[], []], [[], []]
    for x, found in zip(texts, alone):
        state: dict = {}
        found += [attention(x[t : t + 1], None, None, incremental_state=state)[0] for t in range(5)]
    states: list[dict] = [{}, {}]
    before = [*vars(attention)]
    for t, which in itertools.product(range(5), range(2)):
        x = texts[which, t : t + 1]
        turns[which].append(attention(x, None, None, incremental_state=states[which])[0])
    assert [*vars(attention)] == before
    torch.testing.assert_close(turns, alone)


def test_it_gives_attention_weights():
    model = drawn_translation(SOFTMAX)
    (weights,) = model(**translation_batch(model))[1]["attn"]
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 6))
    assert (weights.min() >= 0) and not weights[2, :, :-3].any()


def test_models_that_have_it_can_be_copied_pickled_and_checkpointed():
    model = drawn_translation(SOFTMAX)
    batch = translation_batch(model)
    expected = model(**batch)[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(**batch)[0], expected)
    other = build_translation(*SOFTMAX, "--checkpoint-activations")
    other.load_state_dict(model.state_dict())
    (_, ours), (_, theirs) = (loss_and_gradients(each, batch) for each in (other, model))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("width", ["1", "17", "-1"])
def test_a_width_that_is_not_allowed_is_refused(width):
    message = f"^--softmax-short-convolution is {width}, allowed is 0, for none, or 2 to 16$"
    with pytest.raises(ValueError, match=message):
        build_translation(*places("softmax"), "--softmax-short-convolution", width)


@pytest.mark.parametrize(
    "build, flags",
    [
        (build_translation, places("fast-weight")),
        (build_translation, [*places("fast-weight", *PLACES[:2]), "--no-cross-attention"]),
        (build_lm, []),
    ],
)
def test_it_is_warned_about_where_no_place_has_softmax(build, flags, caplog):
    build(*flags, *WIDTH)
    (message,) = [record.getMessage() for record in caplog.records if "has no effect" in record.getMessage()]
    assert message == "--softmax-short-convolution 4 has no effect in this model: no place has softmax"


def test_integers_multiply_where_it_is_alone(caplog):
    build_translation(*SOFTMAX, "--decoding-weights", "int8")
    assert not [record for record in caplog.records if "has no effect" in record.getMessage()]


FAST_WEIGHTS = dict.fromkeys((place.replace("-", "_") for place in PLACES), "fast-weight")


@pytest.mark.parametrize(
    "trained, now, expected",
    [
        ({}, 4, "--softmax-short-convolution 0, and this model has --softmax-short-convolution 4"),
        ({"softmax_short_convolution": 4}, 0, "--softmax-short-convolution 4, and this model has"),
        (FAST_WEIGHTS, 4, ""),
        ({**FAST_WEIGHTS, "cross_softmax_layers": "1"}, 4, "--softmax-short-convolution 0, and"),
    ],
)
def test_a_checkpoint_with_another_width_is_refused_where_a_place_has_softmax(trained, now, expected):
    message = differing({**DELTA, **trained}, {"softmax_short_convolution": now})
    assert (expected in message) if expected else message == ""


def test_a_checkpoint_that_has_it_is_not_converted():
    trained = {"_name": "fwp_transformer", **dict.fromkeys(FAST_WEIGHTS, "softmax"), "softmax_short_convolution": 4}
    conversion = checkpoint_options.Conversion("a.pt", None)
    with checkpoint_options._set(checkpoint_options._conversion, conversion):
        message = differing(trained, FAST_WEIGHTS)
    assert message.startswith("a.pt was trained with --softmax-short-convolution 4, and --convert-attention makes")


@pytest.mark.filterwarnings("ignore")  # torch calls it deprecated
def test_what_cannot_be_compiled_is_refused_by_the_flag():
    with pytest.raises(NotImplementedError, match="^torch.jit.script cannot compile --softmax-short-convolution"):
        torch.jit.script(build_translation(*SOFTMAX))
