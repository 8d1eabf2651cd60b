"""fairseq's commands one after the other, as its test_binaries has them: training, validation, generation, scoring."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Corpus

pytest.importorskip("fairseq")
from fairseq.models.lightconv_lm import LightConvLanguageModel  # noqa: E402
from in_process import (  # noqa: E402
    KINDS,
    LANGUAGE_MODEL,
    LM_KINDS,
    LM_TASK,
    TRAINING,
    Log,
    fairseq_eval_lm,
    fairseq_generate,
    fairseq_interactive,
    fairseq_train,
    fairseq_validate,
    hypotheses,
    language_model,
    texts,
    trainer_of,
    training,
    translation,
)

ADAPTIVE_LOSS = ("--criterion", "adaptive_loss", "--ddp-backend", "legacy_ddp")


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def trained(kind: str, small_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Log]:
    """A translation model that has learned most of its six words, and the log of its training."""
    folder = tmp_path_factory.mktemp("trained")
    log = fairseq_train(
        translation(kind),
        data=small_corpus.translation,
        save_dir=folder,
        max_epoch=16,
        no_epoch_checkpoints=True,
        eval_bleu=True,
        eval_bleu_detok="space",
        eval_bleu_args='{"beam": 3}',
        eval_bleu_print_samples=True,
        best_checkpoint_metric="bleu",
        maximize_best_checkpoint_metric=True,
        validate_interval=16,
        save_interval=16,
    )
    return folder / "checkpoint_best.pt", log


@pytest.fixture
def given(trained: tuple[Path, Log], small_corpus: Corpus) -> dict[str, Any]:
    """What all commands are told that use the model."""
    return {"data": small_corpus.translation, "path": trained[0]}


@pytest.fixture
def plain_training(kind: str, small_corpus: Corpus, tmp_path: Path) -> dict[str, Any]:
    """What trainings are told of which nothing but their end matters."""
    return {
        "flags": translation(kind),
        "data": small_corpus.translation,
        "save_dir": tmp_path / "run",
        "no_epoch_checkpoints": True,
    }


def bleu(output: str) -> float:
    return float(re.search(r"BLEU4? = ([\d.]+)", output)[1])


def assert_same_hypotheses(a: str, b: str) -> None:
    assert texts(a) == texts(b)
    scores = [score for _, score, _ in hypotheses(a)]
    assert [score for _, score, _ in hypotheses(b)] == pytest.approx(scores, abs=1e-3)


def references(corpus: Corpus, split: str = "test") -> list[str]:
    return (corpus.text / f"{split}.b").read_text().splitlines()


def test_validation_and_both_ways_of_generation_agree_on_a_trained_model(
    given: dict[str, Any], small_corpus: Corpus
) -> None:
    # Guessing among six words and the end of a sentence costs 2.8 bits.
    assert fairseq_validate(**given, valid_subset="test") < 2.5
    generated = fairseq_generate(**given, beam=3)
    interactive = fairseq_interactive(**given, beam=3, input=small_corpus.text / "test.a")
    assert_same_hypotheses(interactive, generated)
    assert len(hypotheses(generated)) == 12


def test_text_that_is_too_long_is_refused_or_skipped_as_one_asks(
    kind: str, small_corpus: Corpus, tmp_path: Path
) -> None:
    given = {"data": small_corpus.translation, "save_dir": tmp_path, "max_target_positions": 4, "max_update": 1}
    refusal = "skip this example with --skip-invalid-size-inputs-valid-test"
    with pytest.raises(Exception, match=refusal):
        fairseq_train(translation(kind), **given)
    fairseq_train(translation(kind), **given, skip_invalid_size_inputs_valid_test=True)
    generation = {"data": small_corpus.translation, "path": tmp_path / "checkpoint_last.pt", "beam": 2}
    with pytest.raises(Exception, match=refusal):
        fairseq_generate(**generation)
    short = sum(len(line.split()) < 4 for line in references(small_corpus))
    assert 0 < short < 12
    assert len(texts(fairseq_generate(**generation, skip_invalid_size_inputs_valid_test=True))) == short


@pytest.mark.parametrize(
    "options",
    [
        {"sampling": True, "temperature": 2.0},
        {"sampling": True, "sampling_topk": 3},
        {"sampling": True, "sampling_topp": 0.9},
        {"diverse_beam_groups": 2, "diverse_beam_strength": 0.5},
        {"diversity_rate": 0.5},
        {"match_source_len": True},
        {"retain_dropout": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_way_to_search_gives_as_many_hypotheses_as_asked_for(
    given: dict[str, Any], small_corpus: Corpus, options: dict[str, Any]
) -> None:
    # Samples are not ranked: fairseq wants all of them.
    best = 4 if "sampling" in options else 2
    generation = {**given, **options, "beam": 4, "nbest": best, "max_len_a": 0, "max_len_b": 8, "seed": 1}
    found = hypotheses(fairseq_generate(**generation))
    assert [number for number, _, _ in found] == [number for number in range(12) for _ in range(best)]
    sources = (small_corpus.text / "test.a").read_text().splitlines()
    for number, _, text in found:
        words = text.split()
        assert len(words) <= 8
        if "match_source_len" in options:
            # To fairseq the end of a source is one of its words.
            assert len(words) == len(sources[number].split()) + 1
    if "sampling" in options or "retain_dropout" in options:
        # Randomness is that of the seed.
        assert hypotheses(fairseq_generate(**generation)) == found
        assert hypotheses(fairseq_generate(**{**generation, "seed": 2})) != found


def test_groups_of_beams_that_must_match_the_length_of_the_source_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="mutually exclusive"):
        fairseq_generate(**given, diverse_beam_groups=4, match_source_len=True)


def test_translations_begin_with_the_words_of_the_reference_that_are_given(
    given: dict[str, Any], small_corpus: Corpus
) -> None:
    free = fairseq_generate(**given, beam=3)
    forced = fairseq_generate(**given, beam=3, prefix_size=2)
    beginnings = [reference.split()[:2] for reference in references(small_corpus)]
    assert [text.split()[:2] for text in texts(forced)] == beginnings
    # Not all of them do so by themselves.
    assert [text.split()[:2] for text in texts(free)] != beginnings
    # Read in parallel.
    assert_same_hypotheses(forced, fairseq_generate(("--task", "fwp_translation"), **given, beam=3, prefix_size=2))


def test_an_ensemble_of_a_model_with_itself_translates_as_the_model(given: dict[str, Any]) -> None:
    alone = fairseq_generate(**given, beam=3)
    twice = fairseq_generate(**{**given, "path": f"{given['path']}:{given['path']}"}, beam=3)
    assert_same_hypotheses(alone, twice)


def test_the_words_that_a_translation_must_have_are_in_it(given: dict[str, Any], tmp_path: Path) -> None:
    sentences = {"u v": "Z", "w x y": "U", "z z": "W X"}
    (tmp_path / "constrained").write_text("".join(f"{text}\t{words}\n" for text, words in sentences.items()))
    (tmp_path / "free").write_text("".join(f"{text}\n" for text in sentences))
    free = texts(fairseq_interactive(**given, beam=5, input=tmp_path / "free"))
    found = texts(fairseq_interactive(**given, beam=5, input=tmp_path / "constrained", constraints="ordered"))
    assert not all(words in text for text, words in zip(free, sentences.values(), strict=True))
    assert all(words in text for text, words in zip(found, sentences.values(), strict=True))


def test_a_pruned_model_generates_with_the_layers_that_it_keeps(given: dict[str, Any], tmp_path: Path) -> None:
    # With all layers it is the same model; with one of two in each half it is another.
    whole = "{'encoder_layers_to_keep': '0,1', 'decoder_layers_to_keep': '0,1'}"
    half = "{'encoder_layers_to_keep': '1', 'decoder_layers_to_keep': '0'}"
    expected = fairseq_generate(**given, beam=3)
    assert_same_hypotheses(expected, fairseq_generate(**given, beam=3, model_overrides=whole))
    found = hypotheses(fairseq_generate(**given, beam=3, model_overrides=half))
    assert len(found) == 12 and found != hypotheses(expected)


def test_alignments_are_printed(given: dict[str, Any]) -> None:
    plain = fairseq_generate(**given)
    hard = fairseq_generate(**given, print_alignment="hard")
    assert len(re.findall(r"^A-\d+\t(\d+-\d+ ?)+$", hard, re.M)) == 12
    assert_same_hypotheses(plain, hard)
    soft = re.findall(r"^A-\d+\t(.*)$", fairseq_generate(**given, print_alignment="soft"), re.M)
    assert len(soft) == 12
    for line in soft:
        for word in line.split():
            weights = [float(weight) for weight in word.split(",")]
            assert min(weights) >= 0 and 0 < sum(weights) <= 1.02  # without that of the end of the sentence


def test_bleu_of_a_validation_is_that_of_generation(trained: tuple[Path, Log], given: dict[str, Any]) -> None:
    last = trained[1].stats("valid")[-1]
    assert last["valid_bleu"] > 5
    generated = fairseq_generate(**given, gen_subset="valid", beam=3, scoring="sacrebleu")
    assert bleu(generated) == pytest.approx(last["valid_bleu"], abs=0.01)


@pytest.mark.parametrize("saving", ["checkpoint_activations", "offload_activations"])
def test_recomputed_or_offloaded_activations_change_nothing(plain_training: dict[str, Any], saving: str) -> None:
    logs = []
    for on in (False, True):
        log = fairseq_train(**plain_training, **{saving: on}, no_save=True, max_epoch=1, dropout=0.1)
        logs.append([log.losses(), log.stats("valid")[-1]["valid_loss"]])
    assert logs[0] == logs[1]


def test_an_update_of_three_batches_is_one_of_a_batch_of_their_sentences(plain_training: dict[str, Any]) -> None:
    # All 48 sentences, so that it makes no difference which come first. No dropout, which is drawn for each batch.
    losses = []
    for size, frequency in ((48, 1), (16, 3)):
        trainer_options = {"batch_size": size, "update_freq": [frequency], "no_save": True}
        log = fairseq_train(**plain_training, **trainer_options, max_epoch=4, dropout=0.0)
        losses.append(log.losses())
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


# Adam is that of all other trainings.
OPTIMIZERS = {"adafactor": 1e-2, "adagrad": 1e-1, "nag": 1e-1, "sgd": 1e-1}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_trains_every_parameter(kind: str, small_corpus: Corpus, optimizer: str) -> None:
    flags = (*TRAINING, "--arch", "fwp_transformer", "--optimizer", optimizer, "--lr", OPTIMIZERS[optimizer])
    given = {"data": small_corpus.translation, "model": training(translation(kind)).model, "batch_size": 48}
    trainer = trainer_of(flags, **given)
    batch = next(iter(trainer.get_train_iterator(1).next_epoch_itr()))
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    losses = [trainer.train_step([batch])["loss"] for _ in range(5)]
    assert losses[-1] < losses[0] - 0.05
    unchanged = [name for name, value in trainer.model.named_parameters() if torch.equal(value, before[name])]
    # With softmax, what is added to all keys makes no difference.
    assert [name for name in unchanged if not name.endswith("k_proj.bias")] == []


@pytest.mark.parametrize("lm_kind", LM_KINDS)
@pytest.mark.parametrize("output", ["softmax", "adaptive softmax"])
def test_a_language_model_is_trained_validated_scored_and_continues_text(
    lm_kind: str, output: str, small_corpus: Corpus, tmp_path: Path
) -> None:
    data = {"data": small_corpus.language_model}
    adaptive = {"adaptive_softmax_cutoff": "4,7"} if output == "adaptive softmax" else {}
    flags = language_model(lm_kind) + (
        ("--criterion", "adaptive_loss", "--ddp-backend", "legacy_ddp") if adaptive else ()
    )
    trained = fairseq_train(flags, **data, **adaptive, save_dir=tmp_path, max_epoch=2)
    loss = trained.stats("valid")[-1]["valid_loss"]
    given = {**data, "path": tmp_path / "checkpoint_last.pt"}
    assert fairseq_validate(LM_TASK, **given) == pytest.approx(loss, abs=2e-3)
    scored = fairseq_eval_lm(**given, gen_subset="valid")
    # fairseq's adaptive_loss leaves out words that are scored.
    assert scored > loss if adaptive else scored == pytest.approx(loss, abs=2e-3)
    generation = {"beam": 2, "max_len_b": 12}
    generated = fairseq_generate(LM_TASK, **given, **generation)
    interactive = fairseq_interactive(LM_TASK, **given, **generation, input=small_corpus.text / "test.a")
    assert_same_hypotheses(interactive, generated)
    prompts = (small_corpus.text / "test.a").read_text().splitlines()
    assert all(text.startswith(prompt) for prompt, text in zip(prompts, texts(generated), strict=True))


@pytest.mark.parametrize("lm_kind", LM_KINDS)
def test_a_text_in_one_block_is_scored_as_in_windows_with_all_of_it_before_them(
    lm_kind: str, small_corpus: Corpus, tmp_path: Path
) -> None:
    given = {"data": small_corpus.language_model, "sample_break_mode": "none", "tokens_per_sample": 64}
    fairseq_train(language_model(lm_kind), **given, save_dir=tmp_path, max_update=6)
    del given["tokens_per_sample"]
    given["path"] = tmp_path / "checkpoint_last.pt"
    whole = fairseq_eval_lm(**given, tokens_per_sample=64)
    windows = fairseq_eval_lm(**given, tokens_per_sample=64, context_window=60)
    assert whole == pytest.approx(windows, abs=0.1)


def test_a_model_with_memory_that_is_never_written_is_trained_and_scored(
    small_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lightconv_lm has parameters that fairseq neither initialises nor uses."""
    build_model = LightConvLanguageModel.build_model.__func__

    def with_worst_memory(cls: type, args: Any, task: Any) -> Any:
        model = build_model(cls, args, task)
        for name, value in model.named_parameters():
            if name.endswith("conv_bias"):
                value.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(LightConvLanguageModel, "build_model", classmethod(with_worst_memory))
    flags = tuple("lightconv_lm" if flag == "fwp_transformer_lm" else flag for flag in LANGUAGE_MODEL)
    flags += ("--decoder-kernel-size-list", "[3, 7]")
    given = {"data": small_corpus.language_model}
    log = fairseq_train((*TRAINING, *flags), **given, save_dir=tmp_path, max_epoch=1)
    loss = fairseq_eval_lm(**given, path=tmp_path / "checkpoint_last.pt", gen_subset="valid")
    # Its kernels see how long a batch is.
    assert loss == pytest.approx(log.stats("valid")[-1]["valid_loss"], abs=0.1)
