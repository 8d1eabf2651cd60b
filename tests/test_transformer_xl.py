"""Transformer-XL: its attention is the formula of Dai et al., and the memory is what earlier segments were."""

import math
import re
from pathlib import Path

import pytest
import torch
from conftest import Corpus, Run
from test_end_to_end import SideBySide, outcome
from tiny_models import build_lm, build_streaming_lm, decode_step_by_step, tokens
from tiny_streams import (
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
from fwp_fairseq.modules.relative_attention import RelativeAttention
from fwp_fairseq.tasks.streaming_language_modeling import read_text


def build(*flags, **options):
    return build_streaming_lm(*flags, arch="transformer_xl_lm", **options)


def by_the_formula(attention, x, memory):
    """One query, one head and one position at a time: (T, B, D), (M, B, D) -> (T, B, D)."""
    context = torch.cat([memory, x])
    size, heads, width = attention.embed_dim, attention.num_heads, attention.head_dim
    q, k, v = attention.q_proj(x), attention.k_proj(context), attention.v_proj(context)
    out = torch.zeros_like(x)
    for t in range(len(x)):
        i = len(memory) + t
        for b in range(x.size(1)):
            for h in range(heads):
                of_head = slice(h * width, (h + 1) * width)
                scores = []
                for j in range(i + 1):
                    angles = [(i - j) / 10_000 ** (2 * n / size) for n in range(size // 2)]
                    r = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=x.dtype)
                    query = q[t, b, of_head]
                    score = (query + attention.content_bias[h, 0]) @ k[j, b, of_head]
                    score = score + (query + attention.position_bias[h, 0]) @ attention.position_proj(r)[of_head]
                    scores.append(score / math.sqrt(width))
                weights = torch.stack(scores).softmax(0)
                out[t, b, of_head] = weights @ v[: i + 1, b, of_head]
    return attention.out_proj(out)


@pytest.mark.parametrize("length, memory_length", [(1, 0), (1, 3), (4, 0), (4, 3), (3, 7)])
def test_attention_is_the_formula(length, memory_length):
    torch.manual_seed(0)
    attention = RelativeAttention(8, 2, 16)
    with torch.no_grad():
        attention.content_bias.normal_()
        attention.position_bias.normal_()
    x, memory = torch.randn(length, 2, 8), torch.randn(memory_length, 2, 8)
    with attention.carry({"prev_key": memory.transpose(0, 1)} if memory_length else {}) as after:
        found, _ = attention(x, x, x)
    torch.testing.assert_close(found, by_the_formula(attention, x, memory), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after["prev_key"], torch.cat([memory, x])[-16:].transpose(0, 1))


def test_a_memory_as_long_as_the_text_makes_segments_the_whole():
    torch.manual_seed(0)
    model, _ = build("--memory-length", "50")
    lines = Lines(20, 28)
    found = [evaluate([model], batches(streams_of(lines, length))) for length in (1, 7, 48)]
    assert [e.loss for e in found] == pytest.approx([found[0].loss] * 3, rel=1e-5)
    assert {e.state for e in found} == {2 * 48 * 8}


def test_a_segment_reads_a_memory_of_the_length_that_was_chosen():
    torch.manual_seed(0)
    # One layer: its memory is the embeddings of the earlier words.
    model, _ = build("--decoder-layers", "1", "--memory-length", "9", "--eval-memory-length", "3")
    words = tokens(model.eval(), 2, 12)
    state = read_text(model, words[:, :8], 4)
    with model.decoder.carry(state):
        found, _ = model(words[:, 8:])
    expected, _ = model(words[:, 5:])
    torch.testing.assert_close(found, expected[:, 3:], rtol=1e-4, atol=1e-5)
    assert state[0]["prev_key"].shape == (2, 3, 8)
    with model.train().decoder.carry() as left:
        model(words)
    assert left[0]["prev_key"].shape == (2, 9, 8)


def test_decoding_is_the_parallel_pass():
    torch.manual_seed(0)
    model, _ = build("--memory-length", "20")
    words = tokens(model.eval(), 2, 9)
    parallel, _ = model(words)
    steps, _ = decode_step_by_step(model.decoder, words)
    torch.testing.assert_close(steps, parallel, rtol=1e-4, atol=1e-5)


def test_gradients_end_at_the_border_of_a_segment_and_activation_checkpoints_change_nothing():
    found = []
    for more in ([], ["--checkpoint-activations"]):
        torch.manual_seed(0)
        model, task = build("--dropout", "0", *more)
        for batch in batches(streams_of(Lines(30, words=12), 5, 2)):
            model.zero_grad()
            training_step(task, model, Optimizer(), batch)
        assert not any(x.requires_grad for layer in task.training.layers for x in layer.values())
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_it_trains_as_a_language_model_without_memory_too():
    model = build_lm(arch="transformer_xl_lm")
    logits, _ = model(tokens(model, 2, 7))
    logits.logsumexp(-1).sum().backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert not unused


@pytest.mark.parametrize("memory_length, numbers", [(32, 131_072), (256, 1_048_576)])
def test_the_rows_of_table_4_have_the_state_of_the_paper(memory_length, numbers):
    flags = ["--adaptive-input-cutoff", "8,12", "--adaptive-softmax-cutoff", "8,12"]
    flags += ["--memory-length", "100", "--eval-memory-length", str(memory_length)]
    model, _ = build_streaming_lm(*flags, arch="transformer_xl_wiki103_medium", tiny=False)
    assert evaluate([model], batches(streams_of(Lines(260), 130))).state == numbers


def test_the_medium_model_has_the_paper_s_90_9_million_parameters():
    with torch.device("meta"):
        model = build_streaming_lm(
            *("--adaptive-input-cutoff", "8,12,16", "--adaptive-softmax-cutoff", "8,12,16"),
            arch="transformer_xl_wiki103_medium",
            tiny=False,
        )[0]
    # With the vocabulary of WikiText-103, whose embeddings are those of the adaptive softmax.
    count = sum(p.numel() for p in model.parameters()) + (267_735 - 20) * 256
    assert count / 1e6 == pytest.approx(90.9, abs=0.05)


def test_fairseq_s_commands_train_resume_evaluate_and_continue_a_prompt(
    corpus: Corpus, run: Run, side_by_side: SideBySide, tmp_path: Path
) -> None:
    model = (*("--arch", "transformer_xl_lm", "--memory-length", 24), *MODEL[2:])
    options = (*USER_DIR, *TASK, *model, *TRAINING, "--dropout", 0.1, "--batch-size", 40, "--disable-validation")
    command = ("fairseq-train", corpus.language_model, *options, "--save-dir")
    stretch, half = side_by_side(
        lambda: run(*command, tmp_path / "stretch", "--max-update", 5),
        lambda: run(*command, tmp_path / "halves", "--max-update", 3),
    )
    resumed = run(*command, tmp_path / "halves", "--max-update", 5)
    expected_losses, expected = outcome(tmp_path / "stretch", stretch)
    losses, found = outcome(tmp_path / "halves", half, resumed)
    assert len(losses) == 5 and losses == expected_losses
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    path = ("--path", tmp_path / "stretch" / "checkpoint_last.pt")
    overrides = ("--model-overrides", "{'eval_memory_length': 32}")
    evaluation, continuation = side_by_side(
        lambda: run("python", "-m", "fwp_fairseq.eval_lm", corpus.language_model, "--cpu", *path, *overrides),
        lambda: run(
            *("fairseq-interactive", corpus.language_model, *USER_DIR, *TASK, *path, "--beam", 2, "--max-len-b", 4),
            stdin="ba be bi " * 40,
        ),
    )
    assert evaluated(evaluation)["state"] == 2 * 32 * 16
    assert re.search(r"^D-0\t\S+\t(ba be bi ){40}", continuation.stdout, re.M)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--memory-length", "0"], "--memory-length is 0, it must be at least 1"),
        (["--eval-memory-length", "0"], "--eval-memory-length is 0, it must be at least 1"),
        (["--decoder-attention-heads", "3"], "--decoder-attention-heads is 3, it must divide"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        build(*flags)
