"""Scores of texts: ``python -m fwp_fairseq.eval_lm``, fairseq-eval-lm, fairseq-generate and the hub find the same."""

import copy
import io
import logging
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import hub_utils, options, tasks
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_cli import eval_lm as fairseq_eval_lm
from fairseq_cli import generate as fairseq_generate
from omegaconf import OmegaConf
from tiny_models import dictionary, parse
from tiny_streams import Lines

from fwp_fairseq import eval_lm
from fwp_fairseq.tasks.streaming_language_modeling import StreamingLanguageModelingTask

STREAMING = "streaming_language_modeling"
COMMAND = "python -m fwp_fairseq.eval_lm"
# A language model of any length, and the whole text as one block.
ANY_LENGTH = {"model_overrides": "{'max_target_positions': 100}"}
WHOLE = {**ANY_LENGTH, "tokens_per_sample": 100}


@dataclass(frozen=True)
class Trained:
    """Binarised data in whose dictionary some tokens are pieces of words, and checkpoints of models for it."""

    data: Path
    lines: Lines
    checkpoints: Path

    def path(self, *names: str) -> str:
        return ":".join(str(self.checkpoints / f"{name}.pt") for name in names)

    @property
    def tokens(self) -> int:
        return int(self.lines.sizes.sum())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """``streaming`` and ``blocks`` have the same parameters."""
    data, checkpoints = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("checkpoints")
    words = dictionary(20)
    for number in (5, 6, 9):
        words.symbols[number] += "@@"
    for name in ("dict.txt", "dict.a.txt", "dict.b.txt"):
        words.save(str(data / name))
    lines = Lines(9, 1, 30, 6, 17)
    for part, content in (("test", lines), ("valid", Lines(11))):
        builder = MMapIndexedDatasetBuilder(str(data / f"{part}.bin"))
        for line in content:
            builder.add_item(line)
        builder.finalize(str(data / f"{part}.idx"))

    sizes = "--decoder-layers 2 --decoder-embed-dim 8 --decoder-ffn-embed-dim 16 --decoder-attention-heads 2"
    lm = ("fwp_transformer_lm", *sizes.split(), "--tokens-per-sample", "16", "--no-token-positional-embeddings")
    encoder = ("--encoder-layers", "1", "--encoder-embed-dim", "8", "-s", "a", "-t", "b")
    streaming, blocks, translation = (
        convert_namespace_to_omegaconf(parse(*flags))
        for flags in (
            (STREAMING, *lm),
            ("language_modeling", *lm),
            ("translation", "fwp_transformer", *sizes.split(), *encoder),
        )
    )
    for name, cfg, others in (
        ("streaming", streaming, {}),
        ("other", streaming, {"update_rule": "gated-delta"}),
        ("adaptive", streaming, {"adaptive_softmax_cutoff": "8,14", "adaptive_softmax_factor": 1}),
        ("blocks", blocks, {}),
        ("positions", blocks, {"no_token_positional_embeddings": False}),
        ("softmax", blocks, {"decoder_self_attention": "softmax"}),
        ("translation", translation, {}),
    ):
        saved = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
        saved["task"]["data"] = str(data)
        saved["model"].update(others)
        made = OmegaConf.create(saved)
        torch.manual_seed(name == "other")
        model = tasks.setup_task(made.task).build_model(made.model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        state = {"cfg": saved, "model": model.state_dict(), "extra_state": {"epoch": 1}}
        torch.save({**state, "best_loss": 0.0, "optimizer": None}, checkpoints / f"{name}.pt")
    return Trained(data, lines, checkpoints)


def run(trained: Trained, *flags: object) -> str:
    """What ``python -m fwp_fairseq.eval_lm`` prints."""
    with redirect_stdout(io.StringIO()) as output:
        eval_lm.main([str(trained.data), "--cpu", *map(str, flags)])
    return output.getvalue()


def figures(output: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"^([a-z ]+): ([\d.]+)", output, re.M)}


@cache
def default_configuration(get_parser: Callable[[], Any], data: Path, task: str) -> Any:
    """Of a command of fairseq's. Making it takes longer than all that is done with it here."""
    flags = ("--task", task, "--cpu", "--num-workers", "0", "--required-batch-size-multiple", "1")
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(get_parser(), [str(data), *flags]))


def configuration(get_parser: Callable[[], Any], data: Path, task: str, **changes: Any) -> Any:
    cfg = copy.deepcopy(default_configuration(get_parser, data, task))
    for name, value in changes.items():
        sections = [section for section in cfg.values() if OmegaConf.is_dict(section) and name in section]
        assert sections
        for section in sections:
            section[name] = value
    return cfg


def run_fairseqs(trained: Trained, path: str, **changes: Any) -> dict[str, Any]:
    """What fairseq-eval-lm finds."""
    parser = options.get_eval_lm_parser
    return fairseq_eval_lm.main(configuration(parser, trained.data, "language_modeling", path=path, **changes))


def generate(trained: Trained, task: str, path: str, **changes: Any) -> list[float]:
    """Base-2 scores of all tokens by fairseq-generate --score-reference."""
    changes = {"path": path, "score_reference": True, "batch_size": 1, **changes}
    with redirect_stdout(io.StringIO()) as output:
        fairseq_generate.main(configuration(options.get_generation_parser, trained.data, task, **changes))
    lines = {int(i): line.split() for i, line in re.findall(r"^P-(\d+)\t(.*)$", output.getvalue(), re.M)}
    return [float(score) for i in sorted(lines) for score in lines[i]]


# --- python -m fwp_fairseq.eval_lm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["streaming", "adaptive"])
def test_the_perplexity_in_segments_is_that_of_fairseq_in_one_block(trained, name):
    expected = run_fairseqs(trained, trained.path(name), **WHOLE)
    found = [run(trained, "--path", trained.path(name), "--tokens-per-sample", n) for n in (1, 64)]
    for output in found:
        assert figures(output)["bits per token"] == pytest.approx(float(expected["loss"]), abs=2e-5)
        assert figures(output)["tokens"] == trained.tokens


@pytest.mark.parametrize("pieces", [[], ["--remove-bpe"]])
def test_words_have_the_probabilities_and_statistics_of_fairseq_also_across_segments(trained, caplog, pieces):
    path = trained.path("streaming")
    output = {"output_word_probs": True, "output_word_stats": True, "post_process": "@@ " if pieces else None}
    with caplog.at_level(logging.INFO, logger=fairseq_eval_lm.logger.name):
        # By the other name fairseq-eval-lm finds no pieces.
        expected = run_fairseqs(trained, path, **WHOLE, **output)
    said = [str(r.msg) for r in caplog.records if r.name == fairseq_eval_lm.logger.name]
    (probabilities,) = (line.removeprefix("0 ") for line in said if line.startswith("0 "))
    # fairseq's sums of the next words are tensors.
    statistics = [re.sub(r"tensor\((.*?)\)", r"\1", line).split("\t") for line in said if line.count("\t") == 5]
    assert (any("@@" in word for word, *_ in statistics), any("True" in line for line in statistics)) == (
        not pieces,
        bool(pieces),
    )
    for length in (1, 7) if pieces else (7,):
        flags = ("--output-word-probs", "--output-word-stats", *pieces, "--tokens-per-sample", length)
        output = run(trained, "--path", path, *flags)
        lines = re.findall(r"^(\d+) (.*)$", output, re.M)
        assert [int(number) for number, _ in lines] == list(range(-(-trained.tokens // length)))
        assert close("\t".join(line for _, line in lines if line), probabilities)
        found = [line.split("\t") for line in output.splitlines() if line.count("\t") == 5 and "[" not in line]
        assert [line[0] for line in found] == [line[0] for line in statistics]
        assert close(repr(found), repr(statistics))
        if pieces:
            assert figures(output)["perplexity per word"] == pytest.approx(float(expected["perplexity"]), rel=1e-4)
            assert figures(output)["words"] == sum(int(line[1]) for line in statistics) < figures(output)["tokens"]


def test_a_word_goes_on_in_its_own_stream_only(trained):
    words = eval_lm.Words(Dictionary.load(str(trained.data / "dict.txt")), joined=True)
    place = {"id": torch.tensor([4, 5]), "position": {"first_stream": 4}}
    # Tokens 5 and 6 go on in the next one; 1 is padding.
    segments = ([[5, 7], [8, 6]], [[5, 1], [7, 5]])
    found = []
    for target in segments:
        found += words.read({**place, "target": torch.tensor(target)}, torch.tensor([[-1.0, -2.0], [-4.0, -8.0]]), 1)
    assert found == [(4, [("w1w3", -3)]), (5, [("w4", -4)]), (4, []), (5, [("w2w3", -12)])]
    # Two are cut off.
    assert words.count == 5
    assert str(words.statistics["w4"]) == "w4\t1\t-4.0\tFalse\t-12.0\t1"


def close(text: str, expected: str) -> bool:
    """Whether two texts differ by rounding only."""
    number = r"-?\d+\.\d+"
    found, wanted = ([float(x) for x in re.findall(number, t)] for t in (text, expected))
    return re.sub(number, "", text) == re.sub(number, "", expected) and found == pytest.approx(wanted, abs=2e-3)


def test_shards_are_parts_of_the_streams(trained):
    path = ("--path", trained.path("streaming"), "--tokens-per-sample", 5)
    whole = figures(run(trained, *path, "--batch-size", 6))
    shards = [figures(run(trained, *path, "--batch-size", 3, "--num-shards", 2, "--shard-id", i)) for i in range(2)]
    assert sum(shard["tokens"] for shard in shards) == whole["tokens"] == trained.tokens
    bits = sum(shard["bits per token"] * shard["tokens"] for shard in shards)
    assert bits / trained.tokens == pytest.approx(whole["bits per token"], abs=1e-5)


def test_of_several_models_the_mean_probability_counts(trained):
    """As fairseq's scorer has it: fairseq-generate --score-reference."""
    paths = trained.path("streaming", "other")
    expected = generate(trained, "language_modeling", paths, **WHOLE)
    found = figures(run(trained, "--path", paths, "--tokens-per-sample", 7))
    assert -found["bits per token"] == pytest.approx(sum(expected) / len(expected), abs=1e-4)
    assert found["state"] == 2 * 2 * 2 * 4 * 8


def test_the_softmax_is_of_as_many_words_as_wanted(trained, monkeypatch):
    sizes, cross_entropy = [], torch.nn.functional.cross_entropy

    def spy(scores: Any, *arguments: Any, **kwargs: Any) -> Any:
        sizes.append(len(scores))
        return cross_entropy(scores, *arguments, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spy)
    path = ("--path", trained.path("adaptive"))
    expected = run(trained, *path).splitlines()[:3]
    assert max(sizes) == trained.tokens
    sizes.clear()
    assert run(trained, *path, "--softmax-batch", 10).splitlines()[:3] == expected
    assert max(sizes) == 10


def test_progress_is_shown_in_the_wanted_format(trained, caplog):
    path = ("--path", trained.path("streaming"), "--tokens-per-sample", 10)
    shown = {}
    for flags in ("--log-format json --log-interval 1", "--no-progress-bar --log-interval 3", "--log-format none"):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            output = run(trained, *path, *flags.split())
        shown[flags] = [r.getMessage() for r in caplog.records if "perplexity" in r.getMessage()]
    last = f"{figures(output)['perplexity']:.2f}"
    json, simple, none = shown.values()
    assert len(json) == 6 and json[-1] == f'{{"perplexity": "{last}"}}'
    assert len(simple) == 2 and simple[-1].endswith(f"7 / 7 perplexity={last}")
    assert none == []


def test_options_of_reading_have_an_effect(trained, monkeypatch):
    asked = {}
    get_batch_iterator = StreamingLanguageModelingTask.get_batch_iterator

    def spy(*arguments: Any, **kwargs: Any) -> Any:
        asked.update(kwargs)
        return get_batch_iterator(*arguments, **kwargs)

    monkeypatch.setattr(StreamingLanguageModelingTask, "get_batch_iterator", spy)
    flags = ("--num-workers", 1, "--data-buffer-size", 3, "--max-sentences", 4, "--gen-subset", "valid")
    output = run(trained, "--path", trained.path("streaming"), "--dataset-impl", "mmap", *flags)
    assert (asked["num_workers"], asked["data_buffer_size"], asked["max_sentences"]) == (1, 3, 4)
    assert figures(output)["tokens"] == 11


@pytest.mark.parametrize("flag", ["--fp16", "--memory-efficient-fp16"])
def test_half_precision_by_either_flag(trained, flag, monkeypatch):
    kinds = set()

    def spy(models: Any, *arguments: Any) -> None:
        kinds.update(x.dtype for model in models for x in model.parameters())

    monkeypatch.setattr(eval_lm, "evaluate", spy)
    run(trained, "--path", trained.path("streaming"), flag)
    assert kinds == {torch.float16}


def test_every_option_of_fairseq_has_an_effect_or_is_refused_by_name(trained, capsys):
    parser = options.get_eval_lm_parser(default_task=eval_lm.TASK)
    options.parse_args_and_arch(parser, [str(trained.data)])
    refused = []
    for action in parser._actions:
        if action.dest in eval_lm._USED or action.dest == "help":
            continue
        value = []
        if action.nargs != 0:
            other = [x for x in action.choices or () if x not in (action.default, "dummy_lm")]
            value = [str(other[0])] if other else ["7"]
        with pytest.raises(SystemExit):
            eval_lm.parse([str(trained.data), "--path", "x", action.option_strings[0], *value])
        refused.append(action.dest)
        error = capsys.readouterr().err.splitlines()[-1]
        assert re.search(rf"--{action.dest.replace('_', '-')} is \S+, without effect", error), error
    assert {"results_path", "max_tokens", "context_window", "required_batch_size_multiple", "task"} <= set(refused)
    assert {action.dest for action in parser._actions} >= eval_lm._USED


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "--path is missing"),
        ("--path x --post-process sentencepiece", "--post-process is sentencepiece, allowed are subword_nmt and"),
        ("--path x --softmax-batch 0", "--softmax-batch is 0, it must be at least 1"),
        ("--path x --num-shards 2 --shard-id 2", "--shard-id is 2, it must be at least 0 and below --num-shards, 2"),
        ("--path x --required-batch-size-multiple 8", "--required-batch-size-multiple is 8"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(trained, capsys, flags, message):
    with pytest.raises(SystemExit):
        eval_lm.parse([str(trained.data), *flags.split()])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, message",
    [
        ("positions", "positions would be counted from .* The checkpoint was trained otherwise: use fairseq-eval-lm"),
        ("softmax", "--decoder-self-attention is softmax.* The checkpoint was trained otherwise: use fairseq-eval-lm"),
        ("translation", "FWPTransformerModel carries nothing .* trained otherwise: use fairseq-generate"),
    ],
)
def test_a_model_that_carries_nothing_is_refused_with_the_command_for_it(trained, name, message):
    with pytest.raises(ValueError, match=message):
        run(trained, "--path", trained.path(name))


def test_a_shard_without_tokens_is_refused(trained):
    # Of 11 tokens in 8 streams each has two; the last two streams have none.
    flags = ("--gen-subset", "valid", "--num-shards", 8, "--shard-id", 7)
    with pytest.raises(ValueError, match="no tokens"):
        run(trained, "--path", trained.path("streaming"), *flags)


# --- fairseq-eval-lm -------------------------------------------------------------------------------------------------


LEFT_OUT = "63 of 63 tokens .* give --tokens-per-sample 16"


def test_fairseq_eval_lm_does_not_leave_out_most_of_a_text_that_another_command_reads(trained):
    command = f"{COMMAND} {trained.data} --path {trained.path('streaming')}"
    with pytest.raises(ValueError, match=f"{LEFT_OUT}, or use {re.escape(command)}"):
        run_fairseqs(trained, trained.path("streaming"))


def test_fairseq_eval_lm_says_that_it_leaves_out_most_of_a_text(trained, caplog):
    run_fairseqs(trained, trained.path("blocks"))
    assert re.search(LEFT_OUT, caplog.text) and COMMAND not in caplog.text


def test_fairseq_eval_lm_may_leave_out_a_few_long_lines(trained, caplog):
    lines = {"sample_break_mode": "eos", "model_overrides": "{'max_target_positions': 29}"}
    # fairseq's own words about the line of 30 tokens are enough.
    assert run_fairseqs(trained, trained.path("blocks"), **lines)["perplexity"] > 1
    assert "1 samples have invalid sizes" in caplog.text and "fwp_fairseq.eval_lm" not in caplog.text


def test_fairseq_eval_lm_says_that_a_state_is_lost_in_blocks(trained, caplog):
    in_blocks = run_fairseqs(trained, trained.path("streaming"), tokens_per_sample=16)
    (warning,) = (r.getMessage() for r in caplog.records if "fwp_fairseq.eval_lm" in r.getMessage())
    assert f"use {COMMAND} {trained.data} --path {trained.path('streaming')}" in warning
    carried = figures(run(trained, "--path", trained.path("streaming"), "--tokens-per-sample", 16))["perplexity"]
    assert carried != pytest.approx(float(in_blocks["perplexity"]), rel=1e-2)


# --- The hub and fairseq-generate ------------------------------------------------------------------------------------


def hub(trained: Trained, name: str) -> Any:
    loaded = hub_utils.from_pretrained(str(trained.checkpoints), f"{name}.pt", str(trained.data))
    return hub_utils.GeneratorHubInterface(loaded["args"], loaded["task"], loaded["models"])


def test_the_hub_scores_sentences_as_with_language_modeling(trained):
    sentences = ["w0 w3", "", "w9", " ".join(f"w{i % 15}" for i in range(15)), "w4 w4 unheard w7"]
    expected, found = (hub(trained, name).score(sentences) for name in ("blocks", "streaming"))
    assert [len(score["tokens"]) for score in found] == [2, 0, 1, 15, 4]
    for score, other in zip(found, expected):
        assert score["tokens"].equal(other["tokens"])
        assert score["positional_scores"].equal(other["positional_scores"])
    alone = hub(trained, "streaming").score(sentences[3])
    torch.testing.assert_close(alone["positional_scores"], found[3]["positional_scores"])


@pytest.mark.parametrize("names", [["streaming"], ["streaming", "other"]])
def test_references_in_streams_are_scored_as_the_whole_text_is(trained, names):
    path = trained.path(*names)
    expected = generate(trained, "language_modeling", path, **WHOLE)
    found = generate(trained, STREAMING, path, tokens_per_sample=7)
    assert len(found) == trained.tokens
    assert found == pytest.approx(expected, abs=1e-3)
    perplexity = 2 ** (-sum(found) / len(found))
    assert figures(run(trained, "--path", path))["perplexity"] == pytest.approx(perplexity, rel=1e-3)


def test_references_in_sentences_are_scored_by_the_task_with_parallel_prefixes(trained):
    lines = {**ANY_LENGTH, "sample_break_mode": "eos", "batch_size": 3}
    expected, found = (
        generate(trained, task, trained.path("blocks"), **lines)
        for task in ("language_modeling", "fwp_language_modeling")
    )
    assert found == expected and len(found) == trained.tokens
