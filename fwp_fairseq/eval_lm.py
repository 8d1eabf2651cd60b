"""Perplexity of a text of any length, whose state is carried from segment to segment.

    python -m fwp_fairseq.eval_lm DATA_BIN --path CHECKPOINT --gen-subset test --tokens-per-sample 384 [--cpu]

takes the options of fairseq-eval-lm. Memory does not depend on the length of the text. With fast weights the result
does not depend on ``--tokens-per-sample`` either, which is how many tokens are read at once. ``--batch-size`` reads as
many parts of the text at once (default 1), each of which begins without a context.
"""

import ast
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from torch import Tensor
from torch.nn import functional as F

import fwp_fairseq.models
import fwp_fairseq.tasks  # noqa: F401  (registers, as the import before)
from fwp_fairseq.tasks.token_streams import TokenStreams

TASK = "streaming_language_modeling"

# Scores of so many words are computed at once: each is a row as long as the vocabulary.
_WORDS_AT_ONCE = 512


@dataclass(frozen=True)
class Evaluation:
    """What was found. ``loss`` is in nats a token, ``state`` and ``state_bytes`` are of one stream."""

    loss: float
    tokens: int
    seconds: float
    state: int
    state_bytes: int

    def __str__(self) -> str:
        return "\n".join(
            [
                f"perplexity: {math.exp(self.loss):.4f}",
                f"bits per token: {self.loss / math.log(2):.5f}",
                f"tokens: {self.tokens}",
                f"tokens per second: {self.tokens / self.seconds:.1f}",
                f"state: {self.state} numbers, {self.state_bytes} bytes",
            ]
        )


@torch.no_grad()
def evaluate(model: Any, text: TokenStreams, device: Any = "cpu") -> Evaluation:
    """Score every token of the text once, given all that precede it in its stream."""
    model.eval()
    start = time.perf_counter()
    state, total, tokens = None, 0.0, 0
    for batch in text.batches(processes=1):
        sample = text.collater([text[i] for i in batch])
        with model.decoder.carry(state) as left:
            features, _ = model.decoder(sample["net_input"]["src_tokens"].to(device), features_only=True)
        state = left
        total += negative_log_likelihood(model.decoder, features, sample["target"].to(device), text.pad)
        tokens += sample["ntokens"]
    carried = [x for layer in state or [] for x in layer.values()]
    return Evaluation(
        loss=total / tokens,
        tokens=tokens,
        seconds=time.perf_counter() - start,
        state=sum(x.numel() for x in carried) // text.streams,
        state_bytes=sum(x.numel() * x.element_size() for x in carried) // text.streams,
    )


def negative_log_likelihood(decoder: Any, features: Tensor, target: Tensor, pad: int) -> float:
    """Sum of -log p of the targets that are not padding, in nats: features (..., D) of a decoder, target (...)."""
    total = 0.0
    for x, words in zip(features.flatten(0, -2).split(_WORDS_AT_ONCE), target.flatten().split(_WORDS_AT_ONCE)):
        if decoder.adaptive_softmax is None:
            scores, targets = [decoder.output_layer(x)], [words]
        else:
            # Of each group of rare words only where the target is one of it.
            scores, targets = decoder.adaptive_softmax(x[None], words)
        # Within a group of rare words the number of padding is another word's.
        for score, word, ignored in zip(scores, targets, [pad, *[-1] * len(targets)]):
            if word is not None:
                nll = F.cross_entropy(score.float(), word, ignore_index=ignored, reduction="none")
                total += float(nll.double().sum())
    return total


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Evaluate the model that the command line says, and print what was found."""
    parser = options.get_eval_lm_parser(default_task=TASK)
    args = options.parse_args_and_arch(parser, input_args=arguments)
    if args.task != TASK:
        parser.error(f"--task is {args.task}, allowed is {TASK}")
    if args.path is None:
        parser.error("--path is missing: the checkpoint to evaluate")
    if args.context_window:
        parser.error(f"--context-window is {args.context_window}: leave it out, the whole text before is the context")
    cfg = convert_namespace_to_omegaconf(args)
    utils.import_user_module(cfg.common)
    task = tasks.setup_task(cfg.task)
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task(
        [cfg.common_eval.path], arg_overrides=ast.literal_eval(cfg.common_eval.model_overrides), task=task
    )
    device = "cuda" if torch.cuda.is_available() and not cfg.common.cpu else "cpu"
    if cfg.common.fp16:
        model.half()
    model.to(device).prepare_for_inference_(cfg)
    task.load_dataset(cfg.dataset.gen_subset)
    text = task.dataset(cfg.dataset.gen_subset).in_streams(cfg.dataset.batch_size or 1)
    print(evaluate(model, text, device))


if __name__ == "__main__":
    main()
