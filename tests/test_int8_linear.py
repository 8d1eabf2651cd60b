"""Decoding by 8-bit integers (--decoding-weights int8): close, row by row, and always by the weights that there are."""

import copy
import pickle
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.modules import MultiheadAttention
from test_good_citizen import generation
from test_models import generate
from tiny_models import build_lm, build_translation, places, translation_batch

from fwp_fairseq.modules import int8_linear
from fwp_fairseq.modules.few_rows_linear import call_linears, use_few_rows_linear
from fwp_fairseq.modules.int8_linear import Int8Weight
from fwp_fairseq.ops import native

pytestmark = pytest.mark.skipif(not int8_linear.is_there(), reason="without compiled operators")

INT8 = ["--decoding-weights", "int8"]


@pytest.fixture(autouse=True)
def small_weights_too(monkeypatch):
    monkeypatch.setattr(int8_linear, "_SMALL", 0)


@torch.no_grad()
def test_small_weights_stay_as_they_are_for_any_number_of_rows(monkeypatch):
    monkeypatch.setattr(int8_linear, "_SMALL", 32 * 16)
    for outputs, same in ((16, True), (17, False)):
        layer = linear(32, outputs)
        for rows in (1, 200):
            x = torch.randn(rows, 32)
            assert ((layer(x) - exact(layer, x)).abs().max() < 1e-5) == same
            (together,) = call_linears([layer], x)
            assert torch.equal(together, layer(x))


def linear(inputs: int, outputs: int, bias: bool = True, seed: int = 0) -> torch.nn.Linear:
    torch.manual_seed(seed)
    layer = torch.nn.Linear(inputs, outputs, bias=bias)
    use_few_rows_linear(layer, int8=True)
    return layer


def exact(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, layer.weight, layer.bias)


@pytest.mark.parametrize("rows", [1, 2, 7, 100])
@pytest.mark.parametrize("inputs, outputs", [(1, 1), (3, 5), (64, 33), (512, 100)])
@torch.no_grad()
def test_it_is_close_and_a_row_does_not_depend_on_the_others(rows, inputs, outputs):
    layer = linear(inputs, outputs, bias=rows != 2)
    x = torch.randn(rows, 1, inputs) * torch.logspace(-3, 3, rows)[:, None, None]
    found = layer(x)
    assert found.shape == (rows, 1, outputs)
    # What a row may be off: half a step of each of its numbers, and of each weight.
    step = x.abs().amax(dim=-1, keepdim=True) / 63
    allowed = 0.5 * step * layer.weight.abs().sum(dim=1)
    allowed = allowed + 0.5 / 127 * layer.weight.abs().amax(dim=1) * (x.abs() + step).sum(dim=-1, keepdim=True)
    assert ((found - exact(layer, x)).abs() <= 1.001 * allowed + 1e-6).all()
    assert all(torch.equal(layer(x[row : row + 1])[0], found[row]) for row in range(rows))


@torch.no_grad()
def test_rows_of_zeros_and_extreme_numbers_stay_what_they_are():
    layer = linear(8, 4)
    assert torch.equal(layer(torch.zeros(2, 8)), layer.bias.expand(2, 4))
    assert layer(torch.full((1, 8), 1e-42)).isfinite().all() and layer(torch.full((1, 8), 1e36)).isfinite().all()
    assert not layer(torch.tensor([[float("nan")] * 8])).isfinite().any()
    layer.weight.zero_()
    assert torch.equal(layer(torch.ones(1, 8)), layer.bias[None])


@torch.no_grad()
def test_layers_that_are_called_together_are_as_each_alone():
    layers = [linear(16, 8 + i, bias=bool(i), seed=i) for i in range(3)]
    x = torch.randn(5, 2, 16)
    together = call_linears(layers, x)
    assert all(torch.equal(out, layer(x)) for out, layer in zip(together, layers))


@torch.no_grad()
def test_new_weights_are_seen_however_they_come():
    layer, x = linear(32, 16), torch.randn(3, 32)
    before = layer(x)
    layer.weight.mul_(2)
    torch.testing.assert_close(layer(x) - layer.bias, 2 * (before - layer.bias))
    layer.weight = torch.nn.Parameter(torch.zeros(16, 32))
    assert torch.equal(layer(x), layer.bias.expand(3, 16))
    layer.load_state_dict(linear(32, 16).state_dict())
    assert torch.equal(layer(x), before)


def test_gradients_are_those_of_the_weights_themselves():
    layer, x = linear(8, 4), torch.randn(2, 8)
    assert torch.equal(layer(x), exact(layer, x))
    layer(x).sum().backward()
    assert layer.weight.grad is not None


@torch.no_grad()
def test_copies_and_pickles_find_the_same():
    layer, x = linear(8, 4), torch.randn(2, 8)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)
        other.weight.zero_()
        assert torch.equal(other(x), other.bias.expand(2, 4)) and torch.equal(layer(x), expected)


def test_integers_are_made_once_for_a_weight(monkeypatch):
    made = []
    plain = native.pack_integers
    monkeypatch.setattr(native, "pack_integers", lambda *a: made.append(1) or plain(*a))
    integers, weight = Int8Weight(), torch.randn(4, 8)
    for _ in range(3):
        integers.linear(torch.randn(2, 8), weight, None)
    assert len(made) == 1


# --- Models -----------------------------------------------------------------------------------------------------------


def prepared(build: Any, *flags: str) -> Any:
    torch.manual_seed(3)
    model = build(*flags).eval()
    with torch.no_grad():
        model.decoder.output_projection.weight.mul_(2)  # so that hypotheses differ
    model.prepare_for_inference_(generation())
    return model


@pytest.mark.parametrize("chosen", [places("fast-weight"), []], ids=["all places", "decoder"])
def test_a_search_finds_nearly_the_same(chosen):
    sizes = ["--encoder-embed-dim", "32", "--decoder-embed-dim", "32", *chosen]
    plain, int8 = prepared(build_translation, *sizes), prepared(build_translation, *sizes, *INT8)
    sources = {name: translation_batch(plain)[name] for name in ("src_tokens", "src_lengths")}
    for ours, theirs in zip(generate(int8, sources, 4, 8), generate(plain, sources, 4, 8), strict=True):
        assert abs(ours[0]["score"] - theirs[0]["score"]) < 0.1
        assert ours[0]["score"] != theirs[0]["score"]


@pytest.mark.parametrize(
    "attention",
    [
        "softmax",
        "softmax --softmax-short-convolution 3",
        "fast-weight",
        "fast-weight --encoder-reading two-directions",
        "fast-weight --encoder-slots 4",
    ],
)
@torch.no_grad()
def test_the_encoder_is_close_and_a_sentence_does_not_depend_on_padding(attention):
    sizes = ["--encoder-embed-dim", "32", "--decoder-embed-dim", "32", "--encoder-self-attention", *attention.split()]
    plain, int8 = (prepared(build_translation, *sizes, *more).encoder for more in ([], INT8))
    tokens, lengths = torch.randint(4, 20, (3, 9)), torch.tensor([9, 9, 6])
    tokens[2, :3] = 1
    found, expected = (x(tokens, lengths)["encoder_out"][0] for x in (int8, plain))
    assert not torch.equal(found, expected) and (found - expected)[3:].abs().max() < 0.1
    alone = int8(tokens[2:, 3:], lengths[2:])["encoder_out"][0]
    torch.testing.assert_close(found[3:, 2:], alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_attention_in_an_int8_encoder_does_whatever_else_it_is_asked_for():
    sizes = ["--encoder-embed-dim", "32", "--decoder-embed-dim", "32"]
    attention = prepared(build_translation, *sizes, *INT8).encoder.layers[0].self_attn
    x, padding = torch.randn(6, 2, 32), torch.zeros(2, 6, dtype=torch.bool)
    padding[1, :2] = True
    ours, none = attention(x, key=x, value=x, key_padding_mask=padding, need_weights=False, attn_mask=None)
    theirs, weights = attention(x, x, x, padding)
    assert none is None and weights.shape == (2, 6, 6)
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0)
    mask = torch.full((6, 6), -1e8).triu(1)
    causal, _ = attention(x, key=x, value=x, need_weights=False, attn_mask=mask)
    first, _ = attention(x[:1], key=x[:1], value=x[:1], need_weights=False)
    torch.testing.assert_close(causal[:1], first, atol=0.05, rtol=0)


def test_attention_in_an_int8_encoder_is_fairseqs_own_where_products_are_of_numbers(monkeypatch):
    attention = prepared(build_translation, *INT8).encoder.layers[0].self_attn
    plain, called = MultiheadAttention.forward, []
    monkeypatch.setattr(MultiheadAttention, "forward", lambda *a, **k: called.append(1) or plain(*a, **k))
    for dtype, with_gradients in ((torch.float32, False), (torch.float32, True), (torch.float64, False)):
        x = torch.randn(6, 2, attention.embed_dim, dtype=dtype)
        with torch.set_grad_enabled(with_gradients):
            attention.to(dtype)(x, key=x, value=x, need_weights=False)
    assert len(called) == 2


def test_language_models_have_it_and_what_it_does_not_change_is_said(caplog):
    model = prepared(build_lm, *INT8)
    with torch.no_grad():
        tokens = torch.tensor([[5, 6, 7]])
        found, expected = model(tokens)[0], prepared(build_lm)(tokens)[0]
    assert not torch.equal(found, expected) and (found - expected).abs().max() < 0.1 * expected.abs().max()
    for half in (build_lm(*INT8).half(), build_translation(*INT8).half()):
        caplog.clear()
        half.prepare_for_inference_(generation())
        assert "--decoding-weights int8 has no effect on cpu in float16" in caplog.text
    for flags, why in ((places("softmax"), "no place has"), (["--decoder-self-attention", "softmax"], "no place has")):
        caplog.clear()
        build_translation(*flags, *INT8)
        assert f"--decoding-weights int8 has no effect in this model: {why}" in caplog.text
    caplog.clear()
    build_translation(
        *places("softmax", "decoder-self-attention"), *places("fast-weight", "encoder-self-attention"), *INT8
    )
    assert "--decoding-weights int8 has no effect in this model: the decoder has no fast weights" in caplog.text


def test_an_installation_without_it_is_told(monkeypatch):
    monkeypatch.setattr(int8_linear, "is_there", lambda: False)
    with pytest.raises(ValueError, match="--decoding-weights is int8, .* allowed is float32"):
        prepared(build_lm, *INT8)


def test_generation_chooses_it_for_checkpoints_that_know_nothing_of_it(tmp_path):
    model = build_translation()
    for part in ("a", "b"):
        model.decoder.dictionary.save(str(tmp_path / f"dict.{part}.txt"))
    task = {"_name": "translation", "data": str(tmp_path), "source_lang": "a", "target_lang": "b"}
    options = {**vars(model.args), "_name": "fwp_transformer"}
    del options["decoding_weights"], options["log_memory"]
    state = {"args": None, "cfg": {"model": options, "task": task}, "model": model.state_dict()}
    history = {"optimizer_name": "none", "lr_scheduler_state": {}, "num_updates": 0}
    state |= {"optimizer_history": [history], "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}}}
    torch.save(state, tmp_path / "checkpoint.pt")
    for overrides in ({}, {"decoding_weights": "int8"}):
        ensemble, _ = checkpoint_utils.load_model_ensemble([str(tmp_path / "checkpoint.pt")], overrides)
        assert str(ensemble[0].cfg.fast_weights.decoding_weights) == overrides.get("decoding_weights", "float32")
