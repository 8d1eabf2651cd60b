"""Dropout in generation, as fairseq's test_inference_dropout has it: off, unless it is asked for where it is."""

from argparse import Namespace
from typing import Any

import pytest
import torch

pytest.importorskip("fairseq")
from fairseq.dataclass.utils import convert_namespace_to_omegaconf  # noqa: E402
from fairseq.modules import FairseqDropout  # noqa: E402
from fairseq.tasks.translation import TranslationConfig, TranslationTask  # noqa: E402
from in_process import KINDS  # noqa: E402
from tiny_models import build_translation, dictionary, translation_batch  # noqa: E402

from fwp_fairseq.models.fwp_transformer import FWPTransformerModel  # noqa: E402

SIDES = ("encoder", "decoder")


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(1)
    return build_translation("--encoder-layers", "2", "--dropout", "0.5", *KINDS[request.param])


def prepare(model: Any, **generation: Any) -> None:
    """As fairseq-generate does before it generates with these options."""
    model.eval()
    model.prepare_for_inference_(convert_namespace_to_omegaconf(Namespace(**generation)))


def own_dropouts(model: Any, side: str) -> list[FairseqDropout]:
    """Of the encoder or the decoder itself and of its layers, without attention's."""
    module = getattr(model, side)
    layers = [x for layer in module.layers for x in (layer.dropout_module, layer.activation_dropout_module)]
    return [module.dropout_module, *layers]


def is_random(model: Any) -> bool:
    batch = translation_batch(model)
    with torch.no_grad():
        return not torch.equal(model(**batch)[0], model(**batch)[0])


def test_dropout_is_off_in_generation(model: Any) -> None:
    prepare(model)
    assert not any(x.apply_during_inference for x in model.modules() if isinstance(x, FairseqDropout))
    assert not is_random(model)


def test_dropout_that_is_retained_acts_in_generation(model: Any) -> None:
    prepare(model, retain_dropout=True)
    assert all(x.apply_during_inference for x in model.modules() if isinstance(x, FairseqDropout))
    assert is_random(model)


def test_dropout_follows_the_mode_of_the_model(model: Any) -> None:
    dropouts = [x for x in model.modules() if isinstance(x, FairseqDropout)]
    for training in (True, False, True):
        model.train(training)
        assert all(x.training == training for x in dropouts)
        assert is_random(model) == training


@pytest.mark.parametrize("side", SIDES)
def test_dropout_is_retained_in_modules_by_fairseqs_names(model: Any, side: str) -> None:
    name = f"Transformer{side.capitalize()}"
    prepare(model, retain_dropout=True, retain_dropout_modules=[name, f"{name}LayerBase"])
    for other in SIDES:
        assert {x.apply_during_inference for x in own_dropouts(model, other)} == {other == side}
    assert is_random(model)


def test_dropout_can_be_retained_in_the_layers_alone(model: Any) -> None:
    prepare(model, retain_dropout=True, retain_dropout_modules=["TransformerEncoderLayerBase"])
    retained = [x for x in model.modules() if isinstance(x, FairseqDropout) and x.apply_during_inference]
    assert set(retained) == set(own_dropouts(model, "encoder")[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_built_from_a_namespace_that_has_only_what_was_given(kind: str) -> None:
    names = [flag.removeprefix("--").replace("-", "_") for flag in KINDS[kind][::2]]
    given = Namespace(encoder_embed_dim=16, decoder_layers=1, **dict(zip(names, KINDS[kind][1::2], strict=True)))
    vocabulary = dictionary(20)
    task = TranslationTask(TranslationConfig(), vocabulary, vocabulary)
    model = FWPTransformerModel.build_model(given, task)
    assert (len(model.encoder.layers), len(model.decoder.layers)) == (6, 1)
    assert model.decoder.embed_tokens.weight.shape == (20, 16)
    assert model.decoder.dropout_module.p == 0.1
    model.eval()
    prepare(model)
    assert not is_random(model)
