"""A model that was prepared for generation decodes with the weights and layers that it has, whatever became of them."""

import argparse
import copy
import io
import pickle
import unittest.mock

import pytest
import torch
from conftest import needs_native
from fairseq.modules import quant_noise
from tiny_models import PLACES, build_lm, build_translation, decode_step_by_step, places, tokens, translation_batch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from fwp_fairseq.models import captured_step
from fwp_fairseq.ops import native


def prepared(*flags, translation=False):
    torch.manual_seed(1)
    if translation:
        model = build_translation(*places("fast-weight", *PLACES), *flags)
    else:
        model = build_lm("--update-rule", "gated-delta", "--decoder-layers", "2", *flags)
    for layer in model.decoder.modules():
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.normal_(layer.bias)
    model.eval().prepare_for_inference_(argparse.Namespace(generation=argparse.Namespace(beam=5)))
    return model


def decoded_and_parallel(model):
    """Logits of decoding, and of the parallel pass."""
    decoder = model.decoder
    words, encoder_out = tokens(model, 3, 5), None
    with torch.no_grad():
        if hasattr(model, "encoder"):
            batch = translation_batch(model)
            encoder_out = model.encoder(batch["src_tokens"], batch["src_lengths"])
        found, _ = decode_step_by_step(decoder, words, encoder_out)
        return found, decoder(words, encoder_out)[0]


def other(x):
    """Not twice as much alone, which normalised keys and queries do not show."""
    return 2 * x + 1


class Adapted(nn.Module):
    """A layer with a low-rank addition beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class OtherLinear(nn.Linear):
    def forward(self, x):
        return other(super().forward(x))


class Other(nn.Module):
    def forward(self, weight):
        return other(weight)


def set_forward(owner, name):
    layer = getattr(owner, name)
    forward = layer.forward
    layer.forward = lambda x: other(forward(x))


def set_transposed(owner, name):
    """The same memory, read in another way."""
    layer = getattr(owner, name)
    layer.weight.data = layer.weight.data.t() if layer.in_features == layer.out_features else other(layer.weight.data)


def set_weight(change):
    def set_weight(owner, name):
        layer = getattr(owner, name)
        layer.weight = nn.Parameter(change(layer.weight.detach()))

    return set_weight


def without_parameter(owner, name):
    layer = getattr(owner, name)
    weight = other(layer.weight.detach())
    del layer.weight
    layer.weight = weight


def without_bias_parameter(owner, name):
    layer = getattr(owner, name)
    bias = torch.linspace(-1, 1, layer.out_features)
    del layer.bias
    layer.bias = bias


def set_function(owner, name, layer):
    delattr(owner, name)
    setattr(owner, name, lambda x: other(layer(x)))


def load(assign):
    def load(owner, name):
        layer = getattr(owner, name)
        layer.load_state_dict({key: other(x) for key, x in layer.state_dict().items()}, assign=assign)

    return load


def of_layer(change):
    return lambda owner, name: change(getattr(owner, name))


CHANGES = {
    "pruned": of_layer(lambda x: prune.l1_unstructured(x, "weight", amount=0.9)),
    "pruned for good": of_layer(lambda x: prune.remove(prune.l1_unstructured(x, "weight", amount=0.9), "weight")),
    "new parameter": set_weight(other),
    "in place": of_layer(lambda x: x.weight.data.mul_(2).add_(1)),
    "new data": of_layer(lambda x: setattr(x.weight, "data", other(x.weight.data))),
    "transposed": set_transposed,
    "no parameter": without_parameter,
    "bias no parameter": without_bias_parameter,
    "a function": lambda owner, name: set_function(owner, name, getattr(owner, name)),
    "sparse": set_weight(lambda w: other(w).to_sparse_csr()),
    "new layer": lambda owner, name: setattr(owner, name, nn.Linear(*getattr(owner, name).weight.shape[::-1])),
    "wrapped": lambda owner, name: setattr(owner, name, Adapted(getattr(owner, name))),
    "other forward": set_forward,
    "other class": of_layer(lambda x: setattr(x, "__class__", OtherLinear)),
    "parametrized": of_layer(lambda x: parametrize.register_parametrization(x, "weight", Other())),
    "spectral norm": of_layer(lambda x: parametrizations.spectral_norm(x).eval()),
    "old spectral norm": of_layer(lambda x: nn.utils.spectral_norm(x).eval()),
    "hook": of_layer(lambda x: x.register_forward_hook(lambda module, inputs, output: other(output))),
    "pre-hook": of_layer(lambda x: x.register_forward_pre_hook(lambda module, inputs: (other(inputs[0]),))),
    "loaded": load(assign=False),
    "loaded as they are": load(assign=True),
    "no bias": of_layer(lambda x: setattr(x, "bias", None)),
}


@pytest.mark.filterwarnings("ignore")  # what torch says of sparse and old ways
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_decoding_is_the_parallel_pass_after_a_layer_was_changed(change):
    places_of_linears = [
        *[("self_attn", name) for name in ("q_proj", "k_proj", "v_proj", "write_proj", "decay_proj", "out_proj")],
        *[("", "fc1"), ("", "fc2")],
    ]
    model = prepared()
    _, before = decoded_and_parallel(model)
    for path, name in places_of_linears:
        layer = model.decoder.layers[0]
        owner = layer.get_submodule(path)
        if change is CHANGES["no bias"] and getattr(owner, name).bias is None:
            continue
        with torch.no_grad():
            change(owner, name)
        found, expected = decoded_and_parallel(model)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(expected, before, rtol=1e-4, atol=1e-5), f"changing {name} changed nothing"
        before = expected


def test_decoding_is_the_parallel_pass_while_all_layers_have_a_hook():
    model = prepared()
    _, before = decoded_and_parallel(model)

    def change(module, inputs, output):
        return other(output) if isinstance(module, nn.Linear) else None

    hook = nn.modules.module.register_module_forward_hook(change)
    try:
        found, expected = decoded_and_parallel(model)
    finally:
        hook.remove()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, before)


@pytest.mark.parametrize("translation", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_decoding_is_the_parallel_pass_after_a_conversion(dtype, tolerance, translation):
    found, expected = decoded_and_parallel(prepared(translation=translation).to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_layers_with_quantisation_noise_decode_as_in_the_parallel_pass():
    model = prepared()
    attention = model.decoder.layers[0].self_attn
    attention.q_proj = quant_noise.quant_noise(attention.q_proj, 0.5, 4)
    found, expected = decoded_and_parallel(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_another_attention_takes_part_in_the_next_search():
    """Also in what beams do."""
    model = prepared()
    words = tokens(model, 3, 4)

    def search():
        state: dict = {}
        with torch.no_grad():
            for length in (1, 2, 3):
                model.decoder(words[:, :length], incremental_state=state)
            model.decoder.reorder_incremental_state_scripting(state, torch.tensor([2, 0, 0]))
            return model.decoder(words, incremental_state=state)[0]

    before = search()
    other = prepared().decoder.layers[0].self_attn
    other.reset_parameters()
    model.decoder.layers[0].self_attn = other
    found = search()
    history = torch.cat([words[[2, 0, 0], :3], words[:, 3:]], dim=1)
    with torch.no_grad():
        expected = model.decoder(history)[0][:, -1:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, before)


# --- Tools -----------------------------------------------------------------------------------------------------------


def linears(model):
    return [x for x in model.decoder.modules() if type(x) is nn.Linear]


@pytest.mark.filterwarnings("ignore")  # torch's quantisation is deprecated
@pytest.mark.parametrize("translation", [False, True])
def test_dynamic_quantisation_finds_all_layers_and_decodes_as_in_the_parallel_pass(translation):
    build = build_translation if translation else build_lm
    plain = len(linears(build(*places("fast-weight", *(PLACES if translation else PLACES[1:2])))))
    model = prepared("--decoder-layers", "1", "--update-rule", "delta", translation=translation)
    assert plain > 6 and len(linears(model)) == plain
    if torch.backends.quantized.engine == "none":
        pytest.skip("this torch has no engine for it")
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not linears(quantised)
    found, expected = decoded_and_parallel(quantised)
    # What is quantised is the input of each call, of one position or of all.
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
    assert not found.equal(decoded_and_parallel(model)[0])


@needs_native
@pytest.mark.parametrize("translation", [False, True])
def test_layers_as_they_are_decode_by_the_operators_for_few_rows(translation, monkeypatch):
    model = prepared("--decoder-layers", "1", "--update-rule", "delta", translation=translation)
    monkeypatch.setattr(captured_step, "program_of", lambda decoder: None)
    state: dict = {}
    encoder_out = None
    with torch.no_grad():
        if translation:
            batch = translation_batch(model)
            encoder_out = model.encoder(batch["src_tokens"], batch["src_lengths"])
        model.decoder(tokens(model, 3, 1), encoder_out, state)
        one, several, plain = (
            unittest.mock.Mock(wraps=f) for f in (native.few_rows_linear, native.few_rows_linears, nn.functional.linear)
        )
        monkeypatch.setattr(native, "few_rows_linear", one)
        monkeypatch.setattr(native, "few_rows_linears", several)
        monkeypatch.setattr(nn.functional, "linear", plain)
        model.decoder(tokens(model, 3, 2), encoder_out, state)
    # The output, the feed-forward network, the vocabulary; query and output of cross-attention; projections.
    assert one.call_count == (6 if translation else 4)
    assert several.call_count == 1 and plain.call_count == 0


# --- Copies ----------------------------------------------------------------------------------------------------------


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("translation", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_a_copy_of_a_prepared_model_decodes_with_weights_of_its_own(copied, translation):
    model = prepared(translation=translation)
    expected, _ = decoded_and_parallel(model)
    other = copied(model)
    torch.testing.assert_close(decoded_and_parallel(other)[0], expected, rtol=0, atol=0)
    with torch.no_grad():
        for x in other.decoder.parameters():
            x.mul_(1.5)
    found, parallel = decoded_and_parallel(other)
    torch.testing.assert_close(found, parallel, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, expected)
    torch.testing.assert_close(decoded_and_parallel(model)[0], expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="cannot train after make_generation_fast"):
        other.train()


def test_nothing_of_a_prepared_model_is_stored_together():
    """Each weight can be saved, shared and freed alone."""
    storages = [x.untyped_storage().data_ptr() for x in prepared().decoder.layers.parameters()]
    assert len(set(storages)) == len(storages)
