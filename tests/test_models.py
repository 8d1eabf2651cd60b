"""The registered models: fairseq's Transformer with fast weights hooked in, and all of its options still working."""

import argparse
import itertools
import logging
import math
import re

import pytest
import torch
from fairseq import models
from fairseq.modules import MultiheadAttention
from fairseq.sequence_generator import SequenceGenerator
from hydra.core.config_store import ConfigStore
from tiny_models import (
    PLACES,
    assert_decodes_as_in_the_parallel_pass,
    build_lm,
    build_translation,
    decode_step_by_step,
    dictionary,
    parse,
    places,
    tokens,
    translation_batch,
)

from fwp_fairseq.modules import FastWeightAttention, FastWeightConfig, FastWeightCrossAttention

ALL = places("fast-weight")


def loss_and_gradients(model, batch):
    torch.manual_seed(1)
    logits, _ = model.train()(**batch)
    loss = logits.float().logsumexp(dim=-1).sum()
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_model(ours, theirs, batch):
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, parameter in ours.state_dict().items():
        assert torch.equal(parameter, theirs.state_dict()[name]), name
    (our_loss, our_gradients), (their_loss, their_gradients) = (loss_and_gradients(m, batch) for m in (ours, theirs))
    assert torch.equal(our_loss, their_loss)
    assert any(gradient is not None for gradient in our_gradients.values())
    for name, gradient in our_gradients.items():
        # A layer that was dropped has no gradient.
        assert (gradient is None) == (their_gradients[name] is None), name
        assert gradient is None or torch.equal(gradient, their_gradients[name]), name


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--share-all-embeddings", "--encoder-normalize-before", "--decoder-normalize-before", "--dropout", "0.3"],
        [
            "--share-decoder-input-output-embed",
            "--encoder-learned-pos",
            "--layernorm-embedding",
            "--relu-dropout",
            "0.1",
        ],
        ["--encoder-layers", "3", "--encoder-layerdrop", "0.5", "--decoder-layers", "3", "--decoder-layerdrop", "0.5"],
        ["--attention-dropout", "0.2", "--checkpoint-activations", "--no-token-positional-embeddings"],
    ],
)
def test_softmax_everywhere_is_fairseq_s_transformer_bit_for_bit(flags):
    built = []
    for arch, more in (("fwp_transformer", places("softmax")), ("transformer", [])):
        torch.manual_seed(5)
        built.append(build_translation(*flags, *more, arch=arch))
    assert_same_model(*built, translation_batch(built[0]))


def test_architectures_have_the_sizes_of_fairseq_s():
    for name in ("transformer", "transformer_wmt_en_de", "transformer_wmt_en_de_big"):
        theirs = parse("translation", name, "--encoder-embed-dim", "256")
        ours = parse("translation", f"fwp_{name}", "--encoder-embed-dim", "256")
        for option, value in vars(theirs).items():
            if option != "arch":
                assert getattr(ours, option) == value, option


def test_softmax_language_model_is_fairseq_s_bit_for_bit():
    built = []
    for arch, more in (("fwp_transformer_lm", places("softmax", "decoder-self-attention")), ("transformer_lm", [])):
        torch.manual_seed(5)
        built.append(build_lm("--dropout", "0.2", *more, arch=arch))
    batch = {"src_tokens": tokens(built[0], 2, 5)}
    assert_same_model(*built, batch)


@pytest.mark.parametrize("chosen", [c for n in range(4) for c in itertools.combinations(PLACES, n)])
def test_fast_weights_stand_exactly_where_they_are_chosen(chosen):
    flags = [flag for place in chosen for flag in places("fast-weight", place)]
    model = build_translation(*places("softmax"), *flags)
    modules = {
        "encoder-self-attention": model.encoder.layers[0].self_attn,
        "decoder-self-attention": model.decoder.layers[0].self_attn,
        "cross-attention": model.decoder.layers[0].encoder_attn,
    }
    for place, module in modules.items():
        assert isinstance(module, FastWeightAttention) == (place in chosen)
    assert modules["decoder-self-attention"].num_heads == 2


OPTIONS = {
    "plain": [],
    "pre-norm": ["--encoder-normalize-before", "--decoder-normalize-before"],
    "shared embeddings": ["--share-all-embeddings"],
    "no positions": ["--no-token-positional-embeddings"],
    "learned positions": ["--encoder-learned-pos", "--decoder-learned-pos"],
    "layer drop": ["--decoder-layers", "3", "--decoder-layerdrop", "0.3", "--encoder-layerdrop", "0.3"],
    "unequal widths": ["--encoder-embed-dim", "12", "--decoder-embed-dim", "8"],
    "quantisation noise": ["--quant-noise-pq", "0.1", "--quant-noise-pq-block-size", "2"],
    "cross+self attention": ["--no-cross-attention", "--cross-self-attention"],
    "attention normalisation": ["--update-rule", "sum", "--feature-map", "elu", "--attention-normalization"],
    "favor": ["--feature-map", "favor", "--favor-features", "6"],
    "learned": ["--feature-map", "learned", "--learned-features", "6"],
    "dpfp-3": ["--dpfp-nu", "3"],
    "gated delta": ["--update-rule", "gated-delta"],
    "gated": ["--update-rule", "gated"],
    "fwm": ["--update-rule", "fwm", "--feature-map", "tanh", "--key-normalization", "none"],
    "rule of whole memories": ["--whole-memory-update-rule", "sum", "--whole-memory-attention-normalization"],
    "softmax in one layer": ["--decoder-layers", "2", "--cross-softmax-layers", "1"],
}


@pytest.mark.parametrize("flags", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("where", [["decoder-self-attention"], PLACES], ids=["decoder", "all"])
def test_fairseq_s_options_train_and_decode_as_in_the_parallel_pass(flags, where):
    torch.manual_seed(0)
    model = build_translation(*flags, *places("softmax"), *places("fast-weight", *where))
    batch = translation_batch(model)
    loss, gradients = loss_and_gradients(model, batch)
    assert torch.isfinite(loss) and any(g is not None and g.abs().sum() > 0 for g in gradients.values())
    assert_decodes_as_in_the_parallel_pass(model, batch)


@pytest.mark.parametrize("flags", [["--update-rule", "delta"], ["--feature-map", "favor"], ["--update-rule", "gated"]])
def test_activation_checkpointing_changes_nothing(flags):
    results = []
    for more in ([], ["--checkpoint-activations"]):
        torch.manual_seed(0)
        model = build_translation(*ALL, *flags, "--dropout", "0.2", *more)
        results.append(loss_and_gradients(model, translation_batch(model)))
    (loss, gradients), (checkpointed_loss, checkpointed_gradients) = results
    torch.testing.assert_close(checkpointed_loss, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed_gradients[name], gradient)


def adaptive(factor: int) -> list[str]:
    """Flags of adaptive input and softmax of the same shape, clusters narrower by this factor."""
    return [
        "--adaptive-input",
        *("--adaptive-input-cutoff", "8,14", "--adaptive-input-factor", str(factor)),
        *("--adaptive-softmax-cutoff", "8,14", "--adaptive-softmax-factor", str(factor)),
    ]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--decoder-normalize-before", "--share-decoder-input-output-embed", "--no-token-positional-embeddings"],
        adaptive(2),
        [*adaptive(1), "--tie-adaptive-weights", "--tie-adaptive-proj"],
        ["--decoder-input-dim", "4", "--decoder-output-dim", "6"],
        ["--scale-attn", "--scale-heads", "--scale-fc", "--scale-resids", "--checkpoint-activations"],
        ["--character-embeddings", "--character-filters", "[(1, 4), (2, 4)]"],
    ],
)
@pytest.mark.parametrize("rule", ["sum", "delta"])
def test_language_models_train_and_decode_as_in_the_parallel_pass(flags, rule):
    torch.manual_seed(0)
    model = build_lm("--update-rule", rule, *flags)
    text = tokens(model, 2, 7)
    features, _ = model.train()(text, features_only=True)
    features.sum().backward()
    model.eval()
    with torch.no_grad():
        parallel, _ = model(text)
    steps, state = decode_step_by_step(model.decoder, text)
    torch.testing.assert_close(steps, parallel, rtol=1e-4, atol=1e-5)
    (memory,) = (attention._get_input_buffer(state)["prev_key"] for attention in model.decoder.self_attentions())
    assert memory.shape == (2, 2, 8, 4)  # B, H, 2 * head size (DPFP-1), head size: the text's length is nowhere


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "size, rule, millions",
    [("small", "sum", 43.8), ("small", "delta", 43.8), ("medium", "sum", 89.8), ("medium", "delta", 89.9)],
)
def test_paper_s_language_models_have_their_parameters(size, rule, millions):
    """Table 2: 89.8 M and 89.9 M; for the small one appendix D.3 counts near 44 M with the full embedding table."""
    with torch.device("meta"):
        model = build_lm("--update-rule", rule, arch=f"fwp_transformer_lm_wiki103_{size}", words=267_735, tiny=False)
    assert round(count(model) / 1e6, 1) == millions
    assert len(model.decoder.layers) == 16 and not model.decoder.layers[0].normalize_before
    assert sum(p.numel() for n, p in model.named_parameters() if "write_proj" in n) == (
        {"small": 16_384, "medium": 32_768}[size] if rule == "delta" else 0
    )
    states = [layer.self_attn for layer in model.decoder.layers]
    numbers = sum(a.num_heads * a.features.size * a.head_dim for a in states)
    assert numbers == {"small": 32_768, "medium": 131_072}[size]  # 0.13 M in table 4


DECODERS = {
    "decoder": places("fast-weight", "decoder-self-attention"),
    "delta": ALL,
    "sum-normalised": [*ALL, "--update-rule", "sum", "--feature-map", "elu", "--attention-normalization"],
    "delta-normalised": [*ALL, "--attention-normalization"],
    "fwm": [*ALL, "--update-rule", "fwm", "--feature-map", "tanh", "--key-normalization", "none"],
}


def sharpened(words: int, flags: list[str], seed: int = 3):
    """A random model whose predictions are far from uniform, so that hypotheses differ and beams change places."""
    torch.manual_seed(seed)
    model = build_translation(*flags, words=words).eval()
    with torch.no_grad():
        model.decoder.output_projection.weight.mul_(4)
    return model


def generate(model, batch, beam, max_len, incremental=True):
    generator = SequenceGenerator(
        [model], model.decoder.dictionary, beam_size=beam, max_len_b=max_len, unk_penalty=math.inf
    )
    generator.model.has_incremental = incremental
    return generator.generate([model], {"net_input": {k: batch[k] for k in ("src_tokens", "src_lengths")}})


@pytest.mark.parametrize("flags", DECODERS.values(), ids=DECODERS)
def test_beam_search_finds_the_best_of_all_sequences(flags):
    """Brute force: every sequence of one or two words, scored by the parallel pass.

    One word and the beginning-of-sentence symbol, which fairseq's search may generate too, with a beam of four make the
    search exhaustive. Sentences of different length share the batch.
    """
    model = sharpened(5, flags)
    eos = model.decoder.dictionary.eos()
    batch = translation_batch(model, batch=2, source=5)
    found = generate(model, batch, beam=4, max_len=2)
    targets = [[*body, eos] for n in (1, 2) for body in itertools.product((0, 4), repeat=n)]
    for row, hypotheses in enumerate(found):
        length = batch["src_lengths"][row : row + 1]
        scores = {}
        with torch.no_grad():
            encoder_out = model.encoder(batch["src_tokens"][row : row + 1, 5 - length :], length)
            for target in targets:
                log_probs = model.decoder(torch.tensor([[eos, *target[:-1]]]), encoder_out=encoder_out)[0].log_softmax(
                    -1
                )
                scores[tuple(target)] = log_probs[0].gather(-1, torch.tensor(target)[:, None]).mean().item()
        best = max(scores, key=lambda target: scores[target])
        assert tuple(hypotheses[0]["tokens"].tolist()) == best
        for hypothesis in hypotheses:
            assert hypothesis["score"].item() == pytest.approx(scores[tuple(hypothesis["tokens"].tolist())], abs=1e-4)


@pytest.mark.parametrize("flags", DECODERS.values(), ids=DECODERS)
def test_beam_search_on_reordered_states_equals_beam_search_without_states(flags):
    """Brute force: the same search, with every step computed from all tokens again."""
    model = sharpened(30, flags)
    batch = translation_batch(model, batch=4, source=9)
    cached, recomputed = (generate(model, batch, 5, 12, incremental) for incremental in (True, False))
    assert len({tuple(h["tokens"].tolist()) for row in cached for h in row}) > 8
    for ours, theirs in zip(cached, recomputed):
        assert [h["tokens"].tolist() for h in ours] == [h["tokens"].tolist() for h in theirs]
        for mine, other in zip(ours, theirs):
            torch.testing.assert_close(mine["positional_scores"], other["positional_scores"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dpfp-nu", "0"], "--dpfp-nu is 0, allowed is 1 to .* = 7"),
        (["--dpfp-nu", "8"], "--dpfp-nu is 8, allowed is 1 to .* = 7"),
        (["--feature-map", "favor", "--favor-features", "0"], "--favor-features is 0, it must be at least 1"),
        (
            ["--update-rule", "fwm", "--fast-weight-backend", "native"],
            "--fast-weight-backend, with --update-rule fwm: backend is 'native'",
        ),
        (
            ["--update-rule", "sum", "--fast-weight-backend", "fla"],
            "--fast-weight-backend is fla, .* delta and gated-delta",
        ),
        (["--attention-normalization", "--fast-weight-backend", "fla"], "backend is fla, .* without --attention-norm"),
        (["--decoder-attention-heads", "3"], "--decoder-attention-heads is 3, it must divide --decoder-embed-dim.* 8"),
        (["--feature-map", "tanh"], "--key-normalization is sum, but --feature-map tanh.* allowed are l2 and none"),
        (
            ["--feature-map", "tanh", "--key-normalization", "l2", "--attention-normalization"],
            "--attention-normalization needs non-negative features",
        ),
        (["--update-rule", "fwm", "--attention-normalization"], "--attention-normalization .* --update-rule fwm"),
        (["--decoder-xformers-att-config", "{}"], "xformers_att_config .* softmax"),
    ],
)
def test_wrong_combinations_are_refused_by_flag_value_and_what_is_allowed(flags, message):
    with pytest.raises(ValueError, match=message):
        build_translation(*flags)


def test_whole_memory_attention_can_have_a_rule_and_a_map_of_its_own():
    flags = "--whole-memory-update-rule sum --whole-memory-feature-map elu --whole-memory-attention-normalization"
    model = build_translation(*ALL, *flags.split())
    causal = model.decoder.layers[0].self_attn
    assert (causal.rule.name, causal.features.feature_map, causal.attention_normalization) == ("delta", "dpfp", False)
    for whole in (model.encoder.layers[0].self_attn, model.decoder.layers[0].encoder_attn):
        assert (whole.rule.name, whole.features.feature_map, whole.attention_normalization) == ("sum", "elu", True)


def test_cross_attention_of_some_layers_can_have_softmax():
    model = build_translation(*ALL, "--decoder-layers", "3", "--cross-softmax-layers", "3, 1")
    kinds = [type(layer.encoder_attn) for layer in model.decoder.layers]
    assert kinds == [MultiheadAttention, FastWeightCrossAttention, MultiheadAttention]
    assert all(isinstance(layer.self_attn, FastWeightAttention) for layer in model.decoder.layers)


@pytest.mark.parametrize("given", ["0", "3", "1,2", "1;2", "1,", "-1", "x"])
def test_numbers_that_no_layers_have_are_refused(given):
    flags = [*ALL, "--decoder-layers", "2", f"--cross-softmax-layers={given}"]
    with pytest.raises(ValueError, match=f"--cross-softmax-layers is {given}, allowed are some of the numbers 1 to 2,"):
        build_translation(*flags)


def test_layers_are_not_taken_away_from_under_their_numbers():
    flags = [*ALL, "--decoder-layers", "3", "--cross-softmax-layers", "3", "--decoder-layers-to-keep", "0,2"]
    with pytest.raises(ValueError, match="--decoder-layers-to-keep is 0,2, .* --cross-softmax-layers: it must be left"):
        build_translation(*flags)


def test_wrong_options_of_whole_memories_are_refused_by_their_name():
    with pytest.raises(
        ValueError, match="with the --whole-memory-.*--key-normalization is sum, but --feature-map tanh"
    ):
        build_translation(*ALL, "--whole-memory-feature-map", "tanh")


def test_wrong_encoder_heads_are_refused_under_the_encoder_s_flag():
    with pytest.raises(ValueError, match="--encoder-attention-heads is 3, it must divide --encoder-embed-dim"):
        build_translation("--encoder-attention-heads", "3", *ALL)


def test_two_directions_need_an_even_number_of_heads_where_they_are_read_in():
    flags = ["--encoder-reading", "two-directions", "--encoder-embed-dim", "9"]
    flags += ["--encoder-attention-heads", "3", "--decoder-attention-heads", "3"]
    with pytest.raises(ValueError, match="--encoder-attention-heads is 3, it must be even with --encoder-reading two-"):
        build_translation(*flags, *ALL)
    build_translation(*flags)


@pytest.mark.parametrize(
    "option", ["update_rule", "feature_map", "key_normalization", "cross_attention", "encoder_reading"]
)
def test_unknown_choices_are_refused(option, capsys):
    flag = "--" + option.replace("_", "-")
    with pytest.raises(SystemExit):
        parse("translation", "fwp_transformer", flag, "nonsense")
    assert f"argument {flag}: invalid choice: 'nonsense'" in capsys.readouterr().err
    # A model built from Python has no argument parser before it.
    config = models.MODEL_DATACLASS_REGISTRY["fwp_transformer"](
        **{"cross_attention": "fast-weight", option: "nonsense"}
    )
    vocabulary = dictionary(20)
    task = argparse.Namespace(source_dictionary=vocabulary, target_dictionary=vocabulary)
    with pytest.raises(ValueError, match=f"{flag} is nonsense, allowed are "):
        models.MODEL_REGISTRY["fwp_transformer"].build_model(config, task)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--key-normalization", "none"], "diverges when keys are not normalised"),
        (["--attention-normalization"], "hurts in the paper's table 3"),
    ],
)
def test_combinations_that_diverge_or_hurt_are_warned_about(flags, message, caplog):
    with caplog.at_level(logging.WARNING):
        build_translation()
        assert not caplog.records
        build_translation(*flags)
    assert message in caplog.text


def test_tied_adaptive_weights_of_different_shape_are_refused():
    flags = ["--tie-adaptive-weights", "--adaptive-input-cutoff", "8", "--adaptive-softmax-cutoff", "9"]
    with pytest.raises(ValueError, match="--tie-adaptive-weights needs --adaptive-input"):
        build_lm(*flags)
    with pytest.raises(ValueError, match="--adaptive-input-cutoff is 8 and --adaptive-softmax-cutoff is 9"):
        build_lm("--adaptive-input", *flags)


@pytest.mark.parametrize("points", ["8,100000", "14,8", "8,8", "0,8", "8,x", "[]"])
@pytest.mark.parametrize("flag", ["--adaptive-input-cutoff", "--adaptive-softmax-cutoff"])
def test_cut_offs_that_do_not_fit_the_dictionary_are_refused(flag, points):
    flags = {"--adaptive-input-cutoff": "8", "--adaptive-softmax-cutoff": "8", flag: points}
    message = f"{flag} is {re.escape(points)}, allowed are rising numbers between commas, from 1 to the"
    with pytest.raises(ValueError, match=message):
        build_lm("--adaptive-input", *itertools.chain(*flags.items()))


def test_every_option_is_known_to_argparse_and_to_hydra_with_help():
    names = {
        "fwp_transformer": {"encoder_self_attention", "decoder_self_attention", "cross_attention"},
        "fwp_transformer_lm": {"decoder_self_attention"},
    }
    common = {*FastWeightConfig.__dataclass_fields__} - {"_name", "cpu"}
    for arch, special in names.items():
        parser = argparse.ArgumentParser()
        models.ARCH_MODEL_REGISTRY[arch].add_args(parser)
        flags = {action.dest: action for action in parser._actions}
        node = ConfigStore.instance().repo["model"][f"{arch}.yaml"].node
        for name in common | special:
            assert name in node
            assert flags[name].help and flags[name].option_strings == ["--" + name.replace("_", "-")]


@pytest.mark.parametrize("build", [build_translation, build_lm])
def test_decoders_prepared_for_inference_give_the_same_scores(build):
    model = build().eval()
    names = list(model.state_dict())
    batch = translation_batch(model) if build is build_translation else {"src_tokens": tokens(model, 3, 6)}
    with torch.no_grad():
        expected = model(**batch)[0]
        model.prepare_for_inference_(argparse.Namespace(generation=argparse.Namespace(beam=5)))
        torch.testing.assert_close(model(**batch)[0], expected)
    assert list(model.state_dict()) == names


@pytest.mark.filterwarnings("ignore")  # about torch's own compiler, and what fairseq does that it cannot trace
@pytest.mark.parametrize(
    ("build", "rule"),
    [(build_translation, "delta"), *((build_lm, rule) for rule in ("sum", "delta", "gated", "gated-delta", "fwm"))],
)
def test_a_compiled_model_trains_with_the_same_losses(build, rule):
    flags = ["--update-rule", rule, "--feature-map", "dpfp", "--dropout", "0"]
    losses = []
    for compiled in (False, True):
        torch.manual_seed(3)
        model = build(*flags, *(ALL if build is build_translation else [])).train()
        batch = translation_batch(model) if build is build_translation else {"src_tokens": tokens(model, 3, 9)}
        torch._dynamo.reset()
        # This compiler traces as all others do, and needs no C++ compiler of its own.
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        curve = []
        for _ in range(4):
            optimizer.zero_grad()
            logits = forward(**batch)[0].float()
            words = batch.get("prev_output_tokens", batch["src_tokens"])
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), words)
            loss.backward()
            optimizer.step()
            curve.append(float(loss))
        losses.append(curve)
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_a_prompt_of_20_000_tokens_needs_no_mask_that_is_the_square_of_its_length():
    model = build_lm("--no-token-positional-embeddings").eval()
    assert model.decoder.buffered_future_mask(torch.zeros(20_000, 1, 8)) is None
    with torch.no_grad():
        logits, _ = model(tokens(model, 1, 20_000))
    assert logits.isfinite().all()
    softmax = build_lm("--decoder-self-attention", "softmax")
    assert softmax.decoder.buffered_future_mask(torch.zeros(5, 1, 8)).shape == (5, 5)
