"""A text in segments is the text as a whole: for data, models, training in one process or two, and generation."""

import itertools
import re

import pytest
import torch
from conftest import Corpus, Run, find_script
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.sequence_generator import SequenceGenerator
from test_end_to_end import SideBySide, logged, outcome
from tiny_models import build_streaming_lm, decode_step_by_step, dictionary, tokens
from tiny_streams import (
    DISTRIBUTED,
    MODEL,
    TASK,
    TRAINING,
    USER_DIR,
    Lines,
    Optimizer,
    batches,
    evaluated,
    streams_of,
    training_step,
)

from fwp_fairseq.eval_lm import evaluate
from fwp_fairseq.tasks.streaming_language_modeling import CarriedState, read_text
from fwp_fairseq.tasks.token_streams import TokenStreams

RULES = {
    "delta": [],
    "sum": ["--update-rule", "sum", "--feature-map", "elu"],
    "attention normalisation": ["--update-rule", "sum", "--feature-map", "elu", "--attention-normalization"],
    "delta, attention normalisation": ["--feature-map", "elu", "--attention-normalization"],
    "gated-delta, favor": ["--update-rule", "gated-delta", "--feature-map", "favor", "--favor-features", "6"],
    "gated, learned": ["--update-rule", "gated", "--feature-map", "learned"],
    "fwm": ["--update-rule", "fwm", "--feature-map", "tanh", "--key-normalization", "none"],
}


# --- Data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes, share", [(1, 1), (1, 3), (2, 2), (4, 7)])
@pytest.mark.parametrize("segment_length", [1, 4, 1000])
def test_every_token_is_predicted_once_from_the_one_before_it(processes, share, segment_length):
    lines = Lines(3, 1, 7, 0, 20, 2)
    text = streams_of(lines, segment_length, processes * share)
    streams: dict[int, list] = {stream: [] for stream in range(processes * share)}
    for number, batch in enumerate(batches(text, processes)):
        place = batch["position"]
        assert (place["segment"], place["first_stream"] // share) == divmod(number, processes)
        source, target = batch["net_input"]["src_tokens"], batch["target"]
        assert source.shape == target.shape and source.size(0) == share and 0 < source.size(1) <= segment_length
        assert source.ne(1).equal(target.ne(1)) and batch["ntokens"] == target.ne(1).sum()
        for row in range(share):
            pairs = [(s, t) for s, t in zip(source[row].tolist(), target[row].tolist()) if t != 1]
            streams[place["first_stream"] + row] += pairs
    assert len({len(stream) for stream in streams.values()} - {0}) <= 2
    sources, targets = zip(*itertools.chain(*streams.values()))
    whole = torch.cat(list(lines)).tolist()
    assert list(targets) == whole
    assert list(sources) == [2, *whole[:-1]]


def test_words_beyond_the_output_dictionary_are_unknown_as_targets():
    text = TokenStreams(Lines(9, words=20), 20, dictionary(20), dictionary(8))
    _, source, target = text[0]
    assert source.max() >= 8 and target.max() < 8
    assert target[:-1][source[1:] >= 8].eq(3).all()


# --- Models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", RULES.values(), ids=RULES)
def test_perplexity_does_not_depend_on_the_length_of_segments(flags):
    torch.manual_seed(0)
    model, _ = build_streaming_lm(*flags)
    lines = Lines(*[13, 40, 7] * 3)
    # Also over a border of the compiled scan, which are 128 tokens apart, and as far as it.
    found = [evaluate([model], batches(streams_of(lines, length))) for length in (1, 64, 128, 180)]
    assert {e.tokens for e in found} == {180} and len({e.state for e in found}) == 1
    assert [e.loss for e in found] == pytest.approx([found[-1].loss] * 4, rel=1e-4)
    # In five streams, which end in segments of their own, the contexts are others.
    parts = [evaluate([model], batches(streams_of(lines, length, 5))) for length in (1, 10, 32)]
    assert [e.loss for e in parts] == pytest.approx([parts[0].loss] * 3, rel=1e-4)
    assert parts[0].loss != pytest.approx(found[0].loss, rel=1e-6)


def test_padding_after_the_end_of_a_stream_does_not_matter():
    torch.manual_seed(0)
    model, _ = build_streaming_lm()
    lines = Lines(10, 7)  # in two streams 9 and 8
    found = evaluate([model], batches(streams_of(lines, 4, 2)))
    words = torch.cat(list(lines))
    expected = 0.0
    for source, target in ((torch.cat([torch.tensor([2]), words[:8]]), words[:9]), (words[8:16], words[9:])):
        logits, _ = model(source[None])
        expected += float(torch.nn.functional.cross_entropy(logits[0], target, reduction="sum"))
    assert found.loss == pytest.approx(expected / 17, rel=1e-5)


def test_adaptive_softmax_gives_the_perplexity_of_its_log_probabilities():
    torch.manual_seed(0)
    model, _ = build_streaming_lm("--adaptive-softmax-cutoff", "8,14")
    lines = Lines(30, 12)
    (batch,) = batches(streams_of(lines, 50))
    log_probs = model.get_normalized_probs(model.eval()(batch["net_input"]["src_tokens"]), log_probs=True)
    expected = -log_probs.gather(2, batch["target"][..., None]).mean()
    assert evaluate([model], batches(streams_of(lines, 7))).loss == pytest.approx(float(expected), rel=1e-5)


def test_the_medium_model_of_the_paper_carries_131072_numbers():
    flags = ["--adaptive-input-cutoff", "8,12", "--adaptive-softmax-cutoff", "8,12"]
    model, _ = build_streaming_lm(*flags, arch="fwp_transformer_lm_wiki103_medium", tiny=False)
    found = evaluate([model], batches(streams_of(Lines(8), 2, 2)))
    assert (found.state, found.state_bytes) == (131_072, 524_288)


def gradients(model, text, segments=2):
    """Of the last of some segments."""
    state = None
    for batch in batches(text)[:segments]:
        model.zero_grad()
        torch.manual_seed(3)
        with model.decoder.carry(state) as left:
            logits, _ = model(**batch["net_input"])
            logits.logsumexp(-1).sum().backward()
        state = left
        assert not any(x.requires_grad for layer in left for x in layer.values())
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("segment_length", [1, 5])
@pytest.mark.parametrize("flags", [[], ["--attention-normalization", "--update-rule", "sum", "--feature-map", "elu"]])
def test_activation_checkpoints_read_a_segment_again_from_the_same_state(flags, segment_length):
    found = []
    for more in ([], ["--checkpoint-activations"]):
        torch.manual_seed(0)
        model, _ = build_streaming_lm(*flags, *more, "--dropout", "0.2")
        found.append(gradients(model.train(), streams_of(Lines(40), segment_length, 2), segments=3))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_a_layer_that_is_dropped_keeps_its_memory():
    torch.manual_seed(0)
    model, _ = build_streaming_lm("--decoder-layerdrop", "0.5", "--decoder-layers", "6")
    before = read_text(model, tokens(model, 2, 5), 5)
    assert len(before) == 6 and all(before)
    with model.train().decoder.carry(before) as after:
        model(tokens(model, 2, 5, seed=1))
    same = [torch.equal(a["prev_key"], b["prev_key"]) for a, b in zip(before, after)]
    assert any(same) and not all(same)


@pytest.mark.parametrize(
    "flags, arch, message",
    [
        (["--decoder-self-attention", "softmax"], "fwp_transformer_lm", "--decoder-self-attention is softmax"),
        ([], "transformer_lm", "TransformerLanguageModel carries nothing"),
        (["--tokens-per-sample", "0"], "fwp_transformer_lm", "--tokens-per-sample is 0, it must be at least 1"),
        (["--add-bos-token"], "fwp_transformer_lm", "--add-bos-token"),
    ],
)
def test_what_cannot_be_carried_is_refused(flags, arch, message):
    with pytest.raises(ValueError, match=message):
        build_streaming_lm(*flags, arch=arch)


@pytest.mark.parametrize("flags", [[], ["--decoder-learned-pos", "--max-target-positions", "64"]])
def test_positions_are_refused(flags):
    with pytest.raises(ValueError, match="--no-token-positional-embeddings"):
        build_streaming_lm(*flags, positions=True)


# --- Task ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_sentences": None}, "--batch-size is None"),
        ({"max_sentences": 2, "max_tokens": 64}, "--max-tokens is 64"),
        ({"max_sentences": 20, "num_shards": 3}, "--batch-size is 20 in 3 process"),
    ],
)
def test_batches_that_are_no_streams_are_refused(options, message):
    _, task = build_streaming_lm()
    with pytest.raises(ValueError, match=message):
        task.get_batch_iterator(streams_of(Lines(40), 4), **options)


def test_batches_come_in_order_in_every_epoch():
    _, task = build_streaming_lm()
    text = streams_of(Lines(40), 4)
    for shard in range(2):
        iterator = task.get_batch_iterator(text, max_sentences=2, num_shards=2, shard_id=shard)
        for _ in range(2):
            places = [b["position"] for b in iterator.next_epoch_itr(shuffle=True)]
            assert [p["segment"] for p in places] == [0, 1, 2]
            assert {p["first_stream"] for p in places} == {2 * shard}


def test_fairseq_eval_lm_is_told_the_command_that_carries_a_state():
    _, task = build_streaming_lm()
    with pytest.raises(ValueError, match="python -m fwp_fairseq.eval_lm"):
        task.eval_lm_dataloader(dataset=None, max_tokens=4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"streams": 4}, "the checkpoint has 4 streams, but --batch-size 2 in 3 process.* makes 6"),
        ({"tokens_per_sample": 7}, "--tokens-per-sample is 4, but the checkpoint was trained with 7"),
        ({"streams": None}, "the checkpoint is of another task: .*--reset-dataloader"),
    ],
)
def test_only_the_same_streams_go_on_in_the_middle_of_an_epoch(changes, message):
    _, task = build_streaming_lm()
    iterators = [
        task.get_batch_iterator(streams_of(Lines(80), 4), max_sentences=2, num_shards=3, shard_id=1) for _ in range(2)
    ]
    next(iterators[0].next_epoch_itr())
    state = iterators[0].state_dict()
    iterators[1].load_state_dict(state)
    assert next(iterators[1].next_epoch_itr())["position"]["segment"] == 1
    with pytest.raises(ValueError, match=message):
        iterators[1].load_state_dict({**state, **changes})
    iterators[1].load_state_dict({**state, **changes, "iterations_in_epoch": 0})


def test_each_process_takes_its_streams_from_a_checkpoint():
    _, task = build_streaming_lm()
    task.set_checkpoint_dict({"next_segment": 3, "layers": [{"prev_key": torch.arange(6)}]})
    batch = {"position": {"segment": 3, "segments": 9, "first_stream": 2, "streams": 6}, "target": torch.zeros(2, 4)}
    task._restore(batch)
    assert task.training.before(batch)[0]["prev_key"].tolist() == [2, 3]


def sample(segment, segments=5):
    return {"position": {"segment": segment, "segments": segments, "first_stream": 0, "streams": 1}}


def test_segments_out_of_order_are_refused():
    carried = CarriedState()
    assert carried.before(sample(0)) is None
    carried.after([{"a": 0}])
    assert carried.before(sample(1)) == [{"a": 0}]
    carried.after([{"a": 1}])
    with pytest.raises(RuntimeError, match="segment 3 comes after what segment 1 left"):
        carried.before(sample(3))
    assert carried.before(sample(0)) is None


def test_the_middle_of_an_epoch_without_a_state_is_refused():
    with pytest.raises(RuntimeError, match="segment 3 comes after nothing was carried"):
        CarriedState().before(sample(3))


def test_an_update_that_is_repeated_begins_with_what_it_began_with():
    carried = CarriedState()
    for update, segments in ((0, (0, 1)), (1, (2, 3, 2, 3)), (2, (4,))):
        for segment in segments:
            before = carried.before(sample(segment), update)
            assert before == ([{"after": segment - 1}] if segment else None)
            carried.after([{"after": segment}])


def test_validation_does_not_touch_what_training_carries():
    torch.manual_seed(0)
    model, task = build_streaming_lm("--dropout", "0")
    train, valid = batches(streams_of(Lines(40), 8, 2)), batches(streams_of(Lines(30, seed=1), 8))
    expected = [training_step(task, model, Optimizer(), batch) for batch in train]
    found = []
    for batch in train:
        found.append(training_step(task, model, Optimizer(), batch))
        for other in valid:
            task.valid_step(other, model, CrossEntropyCriterion(task, sentence_avg=False))
    assert found == expected
    assert expected[1] != training_step(task, model, Optimizer(), {**train[1], "position": train[0]["position"]})


# --- Commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(corpus: Corpus, run: Run, side_by_side: SideBySide, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Trainings of 12 updates: at a stretch, with validation in between, and in two parts, without; in one process, and
    in two that one goes on from.

    About 10,000 tokens in 40 streams are 16 segments: the epoch ends after eight updates of two segments each.
    """
    folder = tmp_path_factory.mktemp("streaming")
    command = ("fairseq-train", corpus.language_model, *USER_DIR, *TASK, *MODEL, *TRAINING, "--save-dir")
    dropout = ("--dropout", 0.1, "--batch-size", 40, "--update-freq", 2)
    # Without dropout: each process draws its own.
    one = ("--dropout", 0, "--batch-size", 40, "--num-workers", 0, "--disable-validation")
    two = ("torchrun", "--standalone", "--nproc_per_node", 2, find_script(command[0]), *command[1:])
    parallel, stretch = side_by_side(
        lambda: run(
            *two,
            folder / "two",
            *DISTRIBUTED,
            "--ddp-backend",
            "legacy_ddp",
            *one,
            "--batch-size",
            20,
            "--max-update",
            7,
        ),
        lambda: run(*command, folder / "stretch", *dropout, "--max-update", 12, "--validate-interval-updates", 3),
    )
    half, single = side_by_side(
        lambda: run(*command, folder / "halves", *dropout, "--max-update", 5, "--disable-validation"),
        lambda: run(*command, folder / "one", *one, "--max-update", 12),
    )
    resumed, joined = side_by_side(
        lambda: run(*command, folder / "halves", *dropout, "--max-update", 12, "--disable-validation"),
        lambda: run(*command, folder / "two", *one, "--max-update", 12),
    )
    return {
        "folder": folder,
        "command": command,
        "stretch": outcome(folder / "stretch", stretch),
        "halves": outcome(folder / "halves", half, resumed),
        "one": outcome(folder / "one", single),
        "two": outcome(folder / "two", parallel, joined),
        "validation": logged(stretch, "valid", "valid_loss"),
    }


def test_a_training_that_was_interrupted_within_an_epoch_equals_one_that_stopped_to_validate_only(
    trained: dict,
) -> None:
    (expected_losses, expected), (losses, found) = trained["stretch"], trained["halves"]
    assert len(expected_losses) == 12
    assert losses == expected_losses
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_two_processes_train_as_one_with_twice_the_streams_which_can_go_on_from_them(trained: dict) -> None:
    (expected_losses, expected), (losses, found) = trained["one"], trained["two"]
    assert len(expected_losses) == 12
    assert list(map(float, losses)) == pytest.approx(list(map(float, expected_losses)), abs=2e-3)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-3, rtol=1e-3)


def test_a_checkpoint_has_what_is_carried_only_within_an_epoch(trained: dict) -> None:
    from fwp_fairseq.fairseq_mends.safe_loading import load_checkpoint_file

    with open(trained["folder"] / "stretch" / "checkpoint_last.pt", "rb") as file:
        state = load_checkpoint_file(file)["extra_state"]
    carried = state["StreamingLanguageModelingTask"]
    # The fourth update of the second epoch.
    assert state["train_iterator"]["iterations_in_epoch"] == carried["next_segment"] == 8
    assert [layer["prev_key"].shape for layer in carried["layers"]] == [(40, 2, 16, 8)] * 2


def test_other_streams_cannot_go_on_in_the_middle_of_an_epoch(trained: dict, run: Run) -> None:
    other = ("--max-update", 13, "--batch-size", 39)
    result = run(*trained["command"], trained["folder"] / "stretch", *other, check=False)
    assert result.returncode != 0
    assert "the checkpoint has 40 streams, but --batch-size 39 in 1 process" in result.stdout + result.stderr


def test_the_command_for_evaluation_finds_the_loss_of_validation(
    trained: dict, corpus: Corpus, run: Run, side_by_side: SideBySide
) -> None:
    checkpoint = trained["folder"] / "stretch" / "checkpoint_last.pt"
    command = ("python", "-m", "fwp_fairseq.eval_lm", corpus.language_model, "--cpu", "--path", checkpoint)
    in_streams, whole = side_by_side(
        lambda: run(*command, "--gen-subset", "valid", "--batch-size", 40, "--tokens-per-sample", 3),
        lambda: run(*command, "--gen-subset", "test"),
    )
    found = evaluated(in_streams)
    assert found["bits per token"] == pytest.approx(float(trained["validation"][-1]), abs=2e-3)
    assert found["perplexity"] == pytest.approx(2 ** found["bits per token"], rel=1e-3)
    test = (corpus.text / "test.a").read_text()
    assert evaluated(whole)["tokens"] == len(test.split()) + test.count("\n")
    assert evaluated(whole)["state"] == found["state"] == 2 * 2 * 16 * 8


# --- Generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", RULES.values(), ids=RULES)
def test_the_state_after_segments_is_that_after_words(flags):
    torch.manual_seed(0)
    model, _ = build_streaming_lm(*flags)
    words = tokens(model.eval(), 2, 9)
    _, after_words = decode_step_by_step(model.decoder, words)
    for layer, attention in zip(read_text(model, words, 4), model.decoder.self_attentions()):
        buffer = attention._get_input_buffer(after_words)
        for name, x in layer.items():
            torch.testing.assert_close(x, buffer[name], rtol=1e-4, atol=1e-5)


def prompts_and_continuations(beam):
    torch.manual_seed(1)
    model, task = build_streaming_lm("--tokens-per-sample", "4")
    with torch.no_grad():
        model.eval().decoder.output_projection.weight.mul_(4)
    prompts = tokens(model, 3, 11)
    prompts[:, 0] = 2
    prompts[1, 7:] = 1
    generator = SequenceGenerator([model], task.target_dictionary, beam_size=beam, max_len_b=6)
    found = task.inference_step(generator, [model], {"net_input": {"src_tokens": prompts}})
    assert all(attention._carried() is None for attention in model.decoder.self_attentions())
    return model, [(prompt[prompt.ne(1)], hypotheses) for prompt, hypotheses in zip(prompts, found)]


def test_a_prompt_is_continued_as_word_by_word():
    model, continued = prompts_and_continuations(beam=1)
    for prompt, hypotheses in continued:
        whole = SequenceGenerator([model], model.decoder.dictionary, beam_size=1, max_len_b=6 + len(prompt) - 1)
        (expected,) = whole.generate(
            [model], {"net_input": {"src_tokens": prompt[None]}}, prefix_tokens=prompt[None, 1:], bos_token=2
        )
        assert hypotheses[0]["tokens"].equal(expected[0]["tokens"])


def test_scores_are_those_of_the_continuation_of_a_prompt():
    model, continued = prompts_and_continuations(beam=3)
    for prompt, hypotheses in continued:
        assert len({tuple(h["tokens"].tolist()) for h in hypotheses}) == 3
        for hypothesis in hypotheses:
            words, known = hypothesis["tokens"], len(prompt) - 1
            assert words[:known].equal(prompt[1:])
            logits, _ = model(torch.cat([prompt[:1], words[:-1]])[None])
            expected = logits[0].log_softmax(-1).gather(1, words[:, None])[known:, 0]
            torch.testing.assert_close(hypothesis["positional_scores"], expected, rtol=1e-4, atol=1e-4)


def test_interactive_continues_prompts_of_20000_words_of_none_and_of_unknown_ones(
    trained: dict, corpus: Corpus, run: Run
) -> None:
    words = (corpus.text / "train.a").read_text().split()
    prompt = " ".join((words * 3)[:20_000])
    checkpoint = trained["folder"] / "stretch" / "checkpoint_last.pt"
    command = ("fairseq-interactive", corpus.language_model, *USER_DIR, *TASK, "--tokens-per-sample", 512)
    lines = prompt + "\n\nunheard\n\0\n"
    result = run(*command, "--path", checkpoint, "--beam", 2, "--min-len", 5, "--max-len-b", 8, stdin=lines)
    long, empty, unknown, nul = re.findall(r"^D-\d+\t\S+\t(.*)$", result.stdout, re.M)
    assert long.startswith(prompt + " ") and 5 <= len(long.split()) - 20_000 <= 8
    assert 5 <= len(empty.split()) <= 8
    assert unknown == nul and unknown.startswith("<unk> ") and 5 <= len(unknown.split()) - 1 <= 8
