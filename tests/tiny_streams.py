"""Small texts as streams, and the flags with which fairseq's commands train tiny models on them."""

import re

import numpy as np
import torch
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from tiny_models import dictionary

from fwp_fairseq.tasks.token_streams import TokenStreams

USER_DIR = ("--user-dir", "fwp_fairseq", "--cpu")
TASK = ("--task", "streaming_language_modeling", "--tokens-per-sample", 16)
MODEL = (
    *("--arch", "fwp_transformer_lm", "--decoder-layers", 2, "--decoder-embed-dim", 16, "--decoder-ffn-embed-dim", 32),
    *("--decoder-attention-heads", 2, "--no-token-positional-embeddings"),
)
TRAINING = (
    *("--optimizer", "adam", "--lr", 1e-2, "--seed", 1, "--criterion", "cross_entropy", "--log-format", "json"),
    *("--log-interval", 1, "--no-epoch-checkpoints", "--save-interval", 9),
)
DISTRIBUTED = (
    *("--distributed-world-size", 2, "--distributed-init-method", "env://", "--distributed-rank=-1"),
    *("--distributed-no-spawn", "--distributed-backend", "gloo"),
)


class Lines(list):
    """Lines of a text in memory, as fairseq's datasets have them."""

    def __init__(self, *sizes, words=20, seed=0):
        draw = torch.Generator().manual_seed(seed)
        ends = torch.tensor([2])
        super().__init__(
            torch.cat([torch.randint(4, words, (n - 1,), generator=draw), ends]) if n else ends[:0] for n in sizes
        )

    @property
    def sizes(self):
        return np.array([len(line) for line in self])


def streams_of(lines, segment_length, streams=1):
    vocabulary = dictionary(20)
    return TokenStreams(lines, segment_length, vocabulary, vocabulary).in_streams(streams)


def batches(text, processes=1):
    return [text.collater([text[i] for i in batch]) for batch in text.batches(processes)]


def training_step(task, model, optimizer, batch, update=0):
    criterion = CrossEntropyCriterion(task, sentence_avg=False)
    return task.train_step(batch, model, criterion, optimizer, update)[0].item()


class Optimizer:
    def backward(self, loss):
        loss.backward()


def evaluated(result) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"^([a-z ]+): ([\d.]+)", result.stdout, re.M)}
