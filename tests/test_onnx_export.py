"""Models as ONNX graphs: they compute in onnxruntime what fairseq's forward passes compute, whatever the options."""

import random
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from registered import UNBOUNDED_RULES, another_value
from tiny_models import build_lm, build_translation, places, tokens, translation_batch
from torch import Tensor

from fwp_fairseq.modules.fast_weight_config import ENCODER_READINGS
from fwp_fairseq.modules.stages import STAGES
from fwp_fairseq.onnx_export.graph import CannotExport
from fwp_fairseq.onnx_export.model_graphs import ModelGraphs
from fwp_fairseq.ops import FEATURE_MAPS

RULES = UNBOUNDED_RULES
MAPS = {
    name: f"--feature-map {name}" + " --key-normalization l2" * feature_map.signed
    for name, feature_map in FEATURE_MAPS.items()
} | {"dpfp": "--feature-map dpfp --dpfp-nu 2", "favor": "--feature-map favor --favor-features 3"}
# Each option of the stages, and all of them together.
_EACH = [
    [f"--{option.name.replace('_', '-')}"] + [str(another_value(option))] * (option.type is not bool)
    for stage in STAGES
    for option in stage.options
]
STAGED = [*_EACH, [flag for flags in _EACH for flag in flags]]
# The form, and an opset that has it.
FORMS = {"plain": 18, "onnxruntime": 18, "standard": 27}
TOLERANCE = 1e-4


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """What runs a graph, whose types and shapes are checked first."""
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def run(runs: onnxruntime.InferenceSession, **inputs: Any) -> dict[str, np.ndarray]:
    """The outputs by name."""
    return dict(zip([output.name for output in runs.get_outputs()], runs.run(None, inputs)))


def sessions(model: Any, form: str = "plain", **options: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What runs each graph of the model, and the states of one row that has read nothing."""
    graphs = ModelGraphs(model, FORMS[form], form, **options)
    empty = {name: np.zeros((1, *shape), np.float32) for name, shape in graphs.states().items()}
    return {name: session(graph) for name, graph in graphs.graphs().items()}, empty


def decode(
    step: Any, words: np.ndarray, states: dict[str, np.ndarray], start: int = 0, **kept: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Log-probabilities (rows, length, words) token by token, and the states at the end."""
    rows = len(words)
    order = np.zeros(rows, np.int64) if len(next(iter(states.values()))) == 1 else np.arange(rows)
    outputs = []
    for t in range(words.shape[1]):
        out = run(step, tokens=words[:, t], position=np.full(rows, start + t), order=order, **states, **kept)
        outputs.append(out["log_probabilities"])
        states = {name: out[f"{name}.new"] for name in states}
        order = np.arange(rows)
    return np.stack(outputs, axis=1), states


def assert_same_translation(model: Any, form: str = "plain", beam: int = 2, **batch: Any) -> None:
    """That two graphs give fairseq's log-probabilities, for several hypotheses of padded sources."""
    model.eval()
    run_graphs, empty = sessions(model, form)
    given = translation_batch(model, source=19, target=5, **batch)
    rows = given["prev_output_tokens"].repeat_interleave(beam, dim=0)
    rows[:, 1:] = tokens(model, len(rows), rows.size(1) - 1, seed=2)
    with torch.no_grad():
        out = model.encoder(given["src_tokens"], given["src_lengths"])
        out = model.encoder.reorder_encoder_out(out, torch.arange(len(rows)) // beam)
        expected = model.get_normalized_probs(model.decoder(rows, out), log_probs=True)
    kept = run(run_graphs["encoder"], source_tokens=given["src_tokens"].numpy())
    found, _ = decode(run_graphs["decoder_step"], rows.numpy(), empty, **kept)
    np.testing.assert_allclose(found, expected.numpy(), atol=TOLERANCE)


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_and_map_in_all_places_is_what_fairseq_computes(rule: str, feature_map: str) -> None:
    flags = [*MAPS[feature_map].split(), "--update-rule", rule, *places("fast-weight")]
    assert_same_translation(build_translation(*flags))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", RULES)
def test_every_form_of_the_recurrence_is_what_fairseq_computes(rule: str, form: str) -> None:
    for more in ([], ["--attention-normalization"]):
        for reading in ENCODER_READINGS:
            flags = "--update-rule", rule, "--encoder-reading", reading, *places("fast-weight"), *more
            assert_same_translation(build_translation(*flags), form)


@pytest.mark.parametrize("options", STAGED, ids=" ".join)
def test_every_stage_is_what_fairseq_computes(options: list[str]) -> None:
    assert_same_translation(build_translation(*options, *places("fast-weight")))
    if "--encoder-slots" not in options:
        both_ways = "--encoder-reading", "two-directions"
        assert_same_translation(build_translation(*options, *places("fast-weight"), *both_ways))
    assert_same_translation(build_translation(*options))


@pytest.mark.parametrize("normalization", ["l2", "none"])
def test_every_key_normalization_is_what_fairseq_computes(normalization: str) -> None:
    for feature_map in MAPS:
        flags = [*MAPS[feature_map].split(), "--key-normalization", normalization, *places("fast-weight")]
        assert_same_translation(build_translation(*flags, "--update-rule", "sum"))


@pytest.mark.parametrize("encoder", ["softmax", "fast-weight"])
@pytest.mark.parametrize("cross", ["softmax", "fast-weight"])
def test_every_place_can_have_softmax_but_the_decoders_own(encoder: str, cross: str) -> None:
    flags = ["--encoder-self-attention", encoder, "--cross-attention", cross]
    for batch in (1, 3):
        assert_same_translation(build_translation(*flags), batch=batch)


@pytest.mark.parametrize(
    "flags",
    [
        "--encoder-normalize-before --decoder-normalize-before",
        "--encoder-learned-pos --decoder-learned-pos --layernorm-embedding",
        "--no-token-positional-embeddings --no-scale-embedding",
        "--share-all-embeddings",
        "--share-decoder-input-output-embed --activation-fn gelu",
        "--activation-fn tanh --read-layer-norm --write-strength-bias --no-attention-bias",
        "--activation-fn gelu_accurate --decoder-embed-dim 12 --decoder-output-dim 10 --decoder-layers 3",
        "--encoder-embed-dim 9 --encoder-attention-heads 3 --decoder-attention-heads 3",
        "--adaptive-softmax-cutoff 8,12",
        "--decoder-layers 3 --cross-softmax-layers 1,3",
        "--softmax-short-convolution 4 --decoder-layers 3 --cross-softmax-layers 2",
        "--softmax-short-convolution 2 --cross-attention softmax --encoder-self-attention softmax",
        "--cross-slots 3 --encoder-self-attention fast-weight --encoder-slots 4",
        "--decoder-layers 3 --cross-softmax-layers 2 --cross-slots 5 --short-convolution 3 --output-gate",
        "--whole-memory-update-rule sum --whole-memory-feature-map elu --whole-memory-attention-normalization",
        "--activation-fn linear --encoder-layerdrop 0.3 --decoder-layerdrop 0.3",
    ],
)
def test_options_of_the_transformer_are_what_fairseq_computes(flags: str) -> None:
    assert_same_translation(build_translation(*places("fast-weight", "cross-attention"), *flags.split()))


LANGUAGE_MODELS = {
    "plain": "",
    "learned positions": "--decoder-learned-pos",
    "no positions": "--no-token-positional-embeddings --share-decoder-input-output-embed",
    "adaptive softmax": "--adaptive-softmax-cutoff 6,12 --adaptive-softmax-factor 2",
    "adaptive, tied": "--adaptive-input --adaptive-input-cutoff 6,12 --adaptive-input-factor 1 "
    "--adaptive-softmax-factor 1 --adaptive-softmax-cutoff 6,12 --tie-adaptive-weights --tie-adaptive-proj",
    "adaptive, factor": "--adaptive-input --adaptive-input-cutoff 6,12 --adaptive-input-factor 2 "
    "--adaptive-softmax-factor 2 --adaptive-softmax-cutoff 6,12 --tie-adaptive-weights",
    **{" ".join(options): " ".join(options) for options in STAGED},
}


@pytest.mark.parametrize("flags", LANGUAGE_MODELS.values(), ids=LANGUAGE_MODELS.keys())
def test_a_language_model_is_what_fairseq_computes(flags: str) -> None:
    model = build_lm(*flags.split(), "--decoder-layers", "2").eval()
    run_graphs, empty = sessions(model)
    words = tokens(model, 3, 7)
    with torch.no_grad():
        expected = model.get_normalized_probs(model.decoder(words), log_probs=True)
    found, _ = decode(run_graphs["step"], words.numpy(), empty)
    np.testing.assert_allclose(found, expected.numpy(), atol=TOLERANCE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", RULES)
def test_a_prompt_read_in_parallel_leaves_what_its_words_one_by_one_leave(rule: str, form: str) -> None:
    more_options = ["--attention-normalization"], ["--short-convolution", "4", "--output-gate"]
    for more in ([], *more_options):
        model = build_lm("--update-rule", rule, "--feature-map", "elu", "--decoder-layers", "2", *more).eval()
        run_graphs, empty = sessions(model, form)
        for length in (1, 16, 37):
            words = tokens(model, 3, length + 5, seed=length).numpy()
            _, states = decode(run_graphs["step"], words, empty)
            parallel = {name: np.repeat(state, 3, axis=0) for name, state in empty.items()}
            for start, end in ((0, 5), (5, length + 5)):
                out = run(run_graphs["prompt"], tokens=words[:, start:end], position=np.full(3, start), **parallel)
                parallel = {name: out[f"{name}.new"] for name in empty}
            for name in states:
                np.testing.assert_allclose(parallel[name], states[name], atol=TOLERANCE)


@pytest.mark.parametrize("flags", [[], ["--short-convolution", "4"]], ids=" ".join)
def test_padding_at_the_end_of_a_prompt_leaves_nothing(flags: list[str]) -> None:
    for rule in RULES:
        model = build_lm(*flags, "--update-rule", rule, "--feature-map", "elu").eval()
        run_graphs, empty = sessions(model)
        words = tokens(model, 1, 20).numpy()
        padded = np.concatenate([words[:, :6], np.full((1, 14), model.decoder.dictionary.pad())], axis=1)
        alone, within = (
            run(run_graphs["prompt"], tokens=x, position=np.zeros(1, np.int64), **empty) for x in (words[:, :6], padded)
        )
        for name in alone:
            np.testing.assert_allclose(within[name], alone[name], atol=1e-6)


def test_equal_keys_written_with_full_strength_overwrite_each_other() -> None:
    """Sums of powers of the chunk's matrix would lose all digits here."""
    model = build_lm("--feature-map", "elu", "--key-normalization", "l2", "--write-strength-bias").eval()
    attention = model.decoder.layers[0].self_attn
    with torch.no_grad():
        attention.write_proj.bias.fill_(30.0)
    run_graphs, empty = sessions(model)
    words = np.full((1, 64), 5)
    model.decoder.embed_positions.weights.zero_()
    _, states = decode(run_graphs["step"], words, empty)
    out = run(run_graphs["prompt"], tokens=words, position=np.zeros(1, np.int64), **empty)
    for name in states:
        np.testing.assert_allclose(out[f"{name}.new"], states[name], atol=1e-5)


def test_the_order_of_beams_says_which_row_a_row_goes_on_from() -> None:
    model = build_lm().eval()
    run_graphs, empty = sessions(model)
    words = tokens(model, 4, 6).numpy()
    _, states = decode(run_graphs["step"], words, empty)
    order = np.array([2, 2, 0])
    given = {"tokens": words[:3, 0], "position": np.full(3, 6)}
    moved = run(run_graphs["step"], order=order, **given, **states)
    there = {name: state[order] for name, state in states.items()}
    stayed = run(run_graphs["step"], order=np.arange(3), **given, **there)
    for name in moved:
        np.testing.assert_array_equal(moved[name], stayed[name])


def test_long_sources_and_extreme_gates_stay_finite_and_right() -> None:
    for rule in RULES:
        model = build_translation("--update-rule", rule, *places("fast-weight"), "--write-strength-bias")
        for layer in [*model.encoder.layers, *model.decoder.layers]:
            for projection in (layer.self_attn.write_proj, layer.self_attn.decay_proj):
                if projection is not None:
                    torch.nn.init.constant_(projection.bias, -40.0 if random.Random(rule).random() < 0.5 else 40.0)
        assert_same_translation(model)


def test_weights_that_are_shared_are_in_the_file_once() -> None:
    shared = ModelGraphs(build_translation("--share-all-embeddings", words=100), 18).graphs()["decoder_step"]
    own = ModelGraphs(build_translation(words=100), 18).graphs()["decoder_step"]
    assert own.ByteSize() - shared.ByteSize() > 100 * 8 * 4 * 0.9


def test_matrices_in_8_bits_take_a_quarter_and_say_nearly_the_same() -> None:
    model = build_translation("--encoder-embed-dim", "64", "--share-all-embeddings", words=400, tiny=True).eval()
    whole, small = (ModelGraphs(model, 18, quantize=quantize).graphs()["decoder_step"] for quantize in (False, True))
    assert small.ByteSize() < 0.4 * whole.ByteSize()
    given = translation_batch(model)
    found = []
    for quantize in (False, True):
        run_graphs, empty = sessions(model, quantize=quantize)
        kept = run(run_graphs["encoder"], source_tokens=given["src_tokens"].numpy())
        found.append(decode(run_graphs["decoder_step"], given["prev_output_tokens"].numpy(), empty, **kept)[0])
    assert 0 < np.abs(found[0] - found[1]).max() < 0.2


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--decoder-self-attention softmax", "--decoder-self-attention is softmax"),
        ("--update-rule fwm", "--update-rule fwm"),
        ("--no-cross-attention", "--no-cross-attention"),
    ],
)
def test_what_cannot_be_exported_is_refused_by_its_flag(flags: str, reason: str) -> None:
    with pytest.raises(CannotExport, match=reason):
        ModelGraphs(build_translation(*flags.split()), 18)


def _unknown(x: Tensor) -> Tensor:
    return x.erfinv()


def test_a_function_that_is_no_operator_is_named() -> None:
    model = build_translation()
    model.decoder.layers[0].activation_fn = _unknown
    with pytest.raises(CannotExport, match="erfinv"):
        ModelGraphs(model, 18).graphs()
