"""What fairseq and torch do with a model they do with ours, or are refused in one sentence before any work."""

import argparse
import copy
import io
import multiprocessing
import pickle
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils, models
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.modules.fairseq_dropout import FairseqDropout
from fairseq.sequence_generator import SequenceGenerator
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from omegaconf import OmegaConf
from registered import another_value
from tiny_models import (
    PLACES,
    build_lm,
    build_translation,
    dictionary,
    parse,
    places,
    tokens,
    translation_batch,
)
from torch import nn

from fwp_fairseq.modules import FastWeightConfig
from fwp_fairseq.modules.stages import STAGES
from fwp_fairseq.ops import FEATURE_MAPS, UPDATE_RULES, triton_scan
from fwp_fairseq.ops.fast_weights import GPU_BACKENDS

WORDS = dictionary(20)
TRANSLATION = TranslationTask(TranslationConfig(), WORDS, WORDS)
LANGUAGE_MODEL = LanguageModelingTask(LanguageModelingConfig(tokens_per_sample=64), WORDS)
RETRIEVAL = argparse.Namespace(num_keys=5)

SIZES = {"encoder_layers": 3, "decoder_layers": 3, "encoder_embed_dim": 8, "encoder_ffn_embed_dim": 16}
SIZES |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
LM_SIZES = {"decoder_layers": 3, "decoder_embed_dim": 8, "decoder_ffn_embed_dim": 16, "decoder_attention_heads": 2}
EVERYWHERE = {place.replace("-", "_"): "fast-weight" for place in PLACES}
SOFTMAX = dict.fromkeys(EVERYWHERE, "softmax")

# Architecture, task, and what is given of the options.
MODELS = {
    "softmax": ("fwp_transformer", TRANSLATION, SIZES | SOFTMAX),
    "default": ("fwp_transformer", TRANSLATION, SIZES),
    "everywhere": ("fwp_transformer", TRANSLATION, SIZES | EVERYWHERE),
    "another architecture": ("fwp_transformer_wmt_en_de", TRANSLATION, SIZES | EVERYWHERE),
    "language model": ("fwp_transformer_lm", LANGUAGE_MODEL, LM_SIZES),
    "Transformer-XL": ("transformer_xl_lm", LANGUAGE_MODEL, LM_SIZES),
    "synthetic": ("associative_memory", RETRIEVAL, {"key_size": 4}),
}


@cache
def _configuration(arch: str, *flags: str) -> Any:
    task = ("language_modeling", "--tokens-per-sample", "64") if "_lm" in arch else ("translation",)
    return convert_namespace_to_omegaconf(parse(task[0], arch, *task[1:], *flags))


def configuration(arch: str, given: dict[str, Any]) -> Any:
    """The whole of fairseq's configuration, as its commands make it of flags."""
    flags = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return copy.deepcopy(_configuration(arch, *flags))


def build_from_hydra(arch: str, task: Any, given: dict[str, Any]) -> Any:
    return models.build_model(configuration(arch, given).model, task)


def build_from_namespace(arch: str, task: Any, given: dict[str, Any]) -> Any:
    return models.ARCH_MODEL_REGISTRY[arch].build_model(argparse.Namespace(**given), task)


def checkpoint(path: Any, model: Any, cfg: Any) -> str:
    """Write what fairseq's trainer would."""
    state = {
        "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True),
        "model": model.state_dict(),
        "optimizer_history": [{"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 1}],
        "extra_state": {"train_iterator": {"epoch": 1}},
    }
    torch.save(state, path)
    return str(path)


def inputs(model: Any, task: Any) -> dict[str, Any]:
    if task is RETRIEVAL:
        return {"keys": torch.tensor([[1, 2, 3]]), "values": torch.tensor([[4, 0, 1]]), "queries": torch.tensor([[2]])}
    return {"src_tokens": tokens(model, 3, 6)} if task is LANGUAGE_MODEL else translation_batch(model)


@torch.no_grad()
def output(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    out = model.eval()(**batch)
    return out if isinstance(out, torch.Tensor) else out[0]


# --- Options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_options_that_were_not_given_have_fairseq_s_defaults(name: str) -> None:
    arch, task, given = MODELS[name]
    torch.manual_seed(1)
    expected = build_from_hydra(arch, task, given)
    namespace = argparse.Namespace(**given)
    torch.manual_seed(1)
    found = models.ARCH_MODEL_REGISTRY[arch].build_model(namespace, task)
    assert vars(namespace) == given
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert found.max_positions() == expected.max_positions()
    batch = inputs(found, task)
    assert torch.equal(output(found, batch), output(expected, batch))


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "deepcopy": copy.deepcopy,
    "torch.save": lambda model: torch.load(_saved(model), weights_only=False),
}


def _saved(model: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("build", [build_from_hydra, build_from_namespace])
@pytest.mark.parametrize("name", MODELS)
def test_models_can_be_copied(name: str, build: Callable[..., Any]) -> None:
    arch, task, given = MODELS[name]
    model = build(arch, task, given)
    batch = inputs(model, task)
    for copied in (way(model) for way in COPIES.values()):
        assert torch.equal(output(copied, batch), output(model, batch))


def test_models_of_checkpoints_can_be_copied(tmp_path: Any) -> None:
    cfg = configuration("fwp_transformer", SIZES | EVERYWHERE)
    path = checkpoint(tmp_path / "model.pt", models.build_model(cfg.model, TRANSLATION), cfg)
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([path], task=TRANSLATION)
    batch = translation_batch(model)
    for copied in (way(model) for way in COPIES.values()):
        assert torch.equal(output(copied, batch), output(model, batch))


def test_models_can_be_sent_to_a_process_that_was_spawned() -> None:
    sent = []
    for arch, task, given in MODELS.values():
        model = build_from_hydra(arch, task, given)
        sent.append((model, inputs(model, task)))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        outputs = pool.starmap(output, sent)
    for (model, batch), found in zip(sent, outputs, strict=True):
        torch.testing.assert_close(found, output(model, batch))


# --- Pruning ---------------------------------------------------------------------------------------------------------


def pruned(model: Any, **kept: list[int]) -> Any:
    """A copy of the model without the other layers, computed here."""
    model = copy.deepcopy(model)
    for side, numbers in kept.items():
        getattr(model, side).layers = nn.ModuleList(getattr(model, side).layers[i] for i in numbers)
    return model


@pytest.mark.parametrize(
    "name, kept",
    [
        ("softmax", {"encoder": [0, 2], "decoder": [1]}),
        ("default", {"encoder": [0, 2], "decoder": [1]}),
        ("everywhere", {"encoder": [0, 2]}),
        ("another architecture", {"decoder": [0, 2]}),
        ("language model", {"decoder": [0, 2]}),
        ("Transformer-XL", {"decoder": [0, 2]}),
    ],
)
def test_layers_are_pruned_by_overrides_and_by_flags(name: str, kept: dict[str, list[int]], tmp_path: Any) -> None:
    arch, task, given = MODELS[name]
    cfg = configuration(arch, given)
    whole = models.build_model(cfg.model, task)
    batch = inputs(whole, task)
    expected = output(pruned(whole, **kept), batch)
    path = checkpoint(tmp_path / "whole.pt", whole, cfg)
    flags = {f"{side}_layers_to_keep": ",".join(map(str, numbers)) for side, numbers in kept.items()}

    (found,), _, _ = checkpoint_utils.load_model_ensemble_and_task([path], dict(flags), task)
    assert torch.equal(output(found, batch), expected)

    # A training that starts from the checkpoint, writes one itself, and goes on.
    cfg = configuration(arch, {**given, **flags})
    model = models.build_model(cfg.model, task)
    model.load_state_dict(whole.state_dict(), model_cfg=cfg.model)
    assert torch.equal(output(model, batch), expected)
    again = checkpoint(tmp_path / "pruned.pt", model, cfg)
    (found,), _, _ = checkpoint_utils.load_model_ensemble_and_task([again], task=task)
    assert torch.equal(output(found, batch), expected)
    cfg = configuration(arch, {**given, **flags})
    resumed = models.build_model(cfg.model, task)
    resumed.load_state_dict(model.state_dict(), model_cfg=cfg.model)
    assert torch.equal(output(resumed, batch), expected)


# --- TorchScript -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # torch calls it deprecated
def test_softmax_is_compiled_by_torchscript_with_its_search() -> None:
    torch.manual_seed(0)
    model = build_translation(*places("softmax")).eval()
    batch = translation_batch(model)
    torch.testing.assert_close(torch.jit.script(model)(**batch)[0], output(model, batch))
    sample = {"net_input": {name: batch[name] for name in ("src_tokens", "src_lengths")}}
    generator = SequenceGenerator([model], WORDS, beam_size=2, max_len_b=5)
    found, expected = torch.jit.script(generator)(sample), generator.generate([model], sample)
    for ours, theirs in zip(found, expected, strict=True):
        assert [hypothesis["tokens"].tolist() for hypothesis in ours] == [h["tokens"].tolist() for h in theirs]


@pytest.mark.filterwarnings("ignore")
def test_a_side_of_softmax_is_compiled_by_torchscript() -> None:
    encoder = build_translation().eval().encoder
    decoder = build_translation(*places("softmax"), *places("fast-weight", "encoder-self-attention")).eval().decoder
    for compiled in (encoder, decoder, build_lm("--decoder-self-attention", "softmax").eval().decoder):
        torch.jit.script(compiled)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", PLACES)
def test_fast_weights_are_refused_by_torchscript_in_one_sentence(place: str) -> None:
    model = build_translation(*places("softmax"), *places("fast-weight", place))
    with pytest.raises(NotImplementedError, match=r"^torch.jit.script cannot compile fast weights: .*softmax"):
        torch.jit.script(model)


# --- Generation ------------------------------------------------------------------------------------------------------


def generation(**options: Any) -> argparse.Namespace:
    return argparse.Namespace(generation=argparse.Namespace(beam=5, **options))


def retained(model: Any, names: list[str]) -> set[str]:
    model.prepare_for_inference_(generation(retain_dropout=True, retain_dropout_modules=names))
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, FairseqDropout) and module.apply_during_inference
    }


@pytest.mark.parametrize(
    "name",
    [
        *(f"Transformer{side}{layer}" for side in ("Encoder", "Decoder") for layer in ("", "LayerBase")),
        "MultiheadAttention",
    ],
)
def test_dropout_is_retained_in_the_modules_that_fairseq_names(name: str) -> None:
    expected = retained(build_translation(arch="transformer"), [name])
    assert expected
    for flags in (places("softmax"), [], places("fast-weight")):
        assert retained(build_translation(*flags), [name]) == expected
    in_language_models = retained(build_lm(arch="transformer_lm"), [name])
    for arch in ("fwp_transformer_lm", "transformer_xl_lm"):
        assert retained(build_lm(arch=arch), [name]) == in_language_models


@pytest.mark.parametrize("option, value", [("print_alignment", "hard"), ("replace_unk", "dictionary.txt")])
def test_alignments_are_refused_before_the_search_where_there_are_none(option: str, value: str) -> None:
    flag = option.replace("_", "-")
    for flags in ([], places("fast-weight")):
        build_translation(*flags).prepare_for_inference_(generation(**{option: value}))
    model = build_translation(*places("fast-weight", "cross-attention"), "--update-rule", "fwm")
    with pytest.raises(ValueError, match=f"--{flag} is {value}, .* fwm has none: --cross-update-rule can be sum"):
        model.prepare_for_inference_(generation(**{option: value}))
    model.prepare_for_inference_(generation(**{option: None}))


def test_alignments_to_learn_from_are_refused_before_the_training_where_there_are_none() -> None:
    task = TranslationTask(TranslationConfig(load_alignments=True), WORDS, WORDS)
    for more in ({}, {"cross_attention": "fast-weight"}):
        build_from_namespace("fwp_transformer", task, SIZES | more)
    with pytest.raises(ValueError, match="--load-alignments is True, .*--cross-update-rule can be"):
        build_from_namespace("fwp_transformer", task, SIZES | {"cross_attention": "fast-weight", "update_rule": "fwm"})


# --- Flags without effect --------------------------------------------------------------------------------------------

BASES = {
    "default": [],
    "sum, elu": ["--update-rule", "sum", "--feature-map", "elu"],
    "favor, everywhere": ["--feature-map", "favor", *places("fast-weight")],
    "fwm": ["--update-rule", "fwm", "--feature-map", "tanh", "--key-normalization", "none"],
    "two rules and maps": ["--whole-memory-update-rule", "sum", "--whole-memory-feature-map", "elu"]
    + places("fast-weight"),
    "encoder only": [*places("softmax"), *places("fast-weight", "encoder-self-attention")],
    "encoder only, rule of its own": ["--whole-memory-update-rule", "gated", "--whole-memory-feature-map", "favor"]
    + [*places("softmax"), *places("fast-weight", "encoder-self-attention")],
    "cross-attention of its own": ["--whole-memory-update-rule", "delta", "--cross-update-rule", "sum"]
    + ["--cross-attention-normalization", *places("fast-weight")],
    "cross-attention only": ["--cross-feature-map", "learned"]
    + [*places("softmax"), *places("fast-weight", "cross-attention")],
    "normalised everywhere": ["--update-rule", "sum", "--attention-normalization", *places("fast-weight")]
    + ["--decoder-layers", "2"],
    "slots": ["--cross-slots", "2", *places("fast-weight"), "--decoder-layers", "2"],
    "slots only": ["--cross-slots", "2", *places("softmax"), *places("fast-weight", "cross-attention")],
    "softmax": places("softmax"),
}
CHANGES = {
    "update_rule": ("gated-delta",),
    "feature_map": ("elu",),
    "key_normalization": ("l2",),
    "attention_normalization": (),
    "whole_memory_update_rule": ("delta",),
    "whole_memory_feature_map": ("dpfp",),
    "whole_memory_attention_normalization": (),
    "cross_update_rule": ("gated",),
    "cross_feature_map": ("elu",),
    "cross_attention_normalization": (),
    "cross_softmax_layers": ("2",),
    "encoder_reading": ("two-directions",),
    "softmax_short_convolution": ("4",),
    "no_attention_bias": (),
    **{
        option.name: () if option.type is bool else (str(another_value(option)),)
        for owner in (*FEATURE_MAPS.values(), *UPDATE_RULES.values(), *STAGES)
        for option in owner.options
    },
}


@cache
def fingerprint(*flags: str) -> tuple[list[str], torch.Tensor]:
    torch.manual_seed(0)
    model = build_translation(*flags)
    return list(model.state_dict()), output(model, translation_batch(model))


def warned(caplog: Any) -> list[str]:
    return [record.getMessage() for record in caplog.records if "has no effect" in record.getMessage()]


def test_every_option_of_fast_weights_is_tried() -> None:
    of_computing = {"fast_weight_backend", "decoding_weights", "log_memory", "cpu", "_name"}
    of_computing |= {"convert_attention", "conversion_updates"}
    assert {*CHANGES, *of_computing} == set(FastWeightConfig.__dataclass_fields__)


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
@pytest.mark.parametrize("option", CHANGES)
def test_a_flag_is_warned_about_exactly_if_the_model_is_the_same_without(
    option: str, base: list[str], caplog: Any
) -> None:
    flag = "--" + option.replace("_", "-")
    if flag in base:
        return
    names, expected = fingerprint(*base)
    caplog.clear()
    try:
        found = fingerprint(*base, flag, *CHANGES[option])
    except ValueError:  # They exclude each other.
        return
    same = names == found[0] and torch.equal(expected, found[1])
    of_flag = [message for message in warned(caplog) if message.startswith(f"{flag} ")]
    assert len(of_flag) == same


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--whole-memory-update-rule", "sum"], "--whole-memory-update-rule sum has no effect .*: neither the encoder"),
        (["--feature-map", "elu", "--dpfp-nu", "2"], "--dpfp-nu 2 has no effect .* dpfp, not for elu"),
        (["--favor-features", "8"], "--favor-features 8 has no effect .* favor, not for dpfp"),
        (["--update-rule", "sum", "--write-strength-bias"], "--write-strength-bias has no effect .* sum has no write"),
        ([*places("softmax"), "--fast-weight-backend", "loop"], "--fast-weight-backend loop has no effect .* no place"),
        (["--no-cross-attention", *places("fast-weight", "cross-attention")], "--cross-attention fast-weight has no"),
    ],
)
def test_a_flag_without_effect_is_named_once_with_its_value_and_the_reason(
    flags: list[str], message: str, caplog: Any
) -> None:
    build_translation("--encoder-layers", "2", "--decoder-layers", "2", *flags)
    (found,) = warned(caplog)
    assert re.match(message, found)


def test_what_an_architecture_sets_is_no_flag_without_effect(caplog: Any) -> None:
    given = {**LM_SIZES, "decoder_self_attention": "softmax"}
    given |= {"adaptive_input_cutoff": "8", "adaptive_softmax_cutoff": "8"}
    build_from_hydra("fwp_transformer_lm_wiki103_small", LANGUAGE_MODEL, given)
    assert not warned(caplog)
    build_from_hydra("fwp_transformer_lm_wiki103_small", LANGUAGE_MODEL, {**given, "feature_map": "favor"})
    assert len(warned(caplog)) == 1


# --- Backends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu, flags, reason", [(False, [], "torch finds none"), (True, ["--cpu"], "--cpu")])
@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_a_backend_for_a_gpu_is_refused_by_name_where_there_is_none(
    name: str, gpu: bool, flags: list[str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(triton_scan, "installed", True)
    message = f"--fast-weight-backend is {name}, which needs a GPU, and {reason}"
    for build in (build_translation, build_lm):
        with pytest.raises(ValueError, match=message):
            build("--fast-weight-backend", name, *flags)
    given = {"fast_weight_backend": name, "cpu": bool(flags)}
    with pytest.raises(ValueError, match=message):
        build_from_namespace("associative_memory", RETRIEVAL, given)
    if gpu:
        build_translation("--fast-weight-backend", name)


def test_a_backend_that_is_not_installed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_scan, "installed", False)
    with pytest.raises(ValueError, match="--fast-weight-backend is triton, but Triton is not installed"):
        build_translation("--fast-weight-backend", "triton")


@pytest.mark.parametrize(
    "flags, backend",
    [
        (["--fast-weight-backend", "loop"], "backend loop"),
        (["--update-rule", "fwm", "--feature-map", "tanh", "--key-normalization", "none"], "backend auto (chunk)"),
    ],
)
def test_the_printed_model_says_its_backend(flags: list[str], backend: str) -> None:
    assert f", {backend}\n" in repr(build_lm(*flags))
