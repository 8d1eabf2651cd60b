"""Perplexity of a text of any length, whose state is carried from segment to segment.

    python -m fwp_fairseq.eval_lm DATA_BIN --path CHECKPOINT --gen-subset test --tokens-per-sample 384 [--cpu]

takes the options of fairseq-eval-lm, and refuses those that would be without effect. Memory does not depend on the
length of the text. With fast weights the result does not depend on ``--tokens-per-sample`` either, which is how many
tokens are read at once. ``--batch-size`` reads as many parts of the text at once (default 1), each of which begins
without a context; ``--num-shards N --shard-id I`` reads the I-th of N times as many. Of several checkpoints
(``--path a.pt:b.pt``) the mean probability counts.
"""

import argparse
import ast
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from fairseq import checkpoint_utils, options, tasks, utils
from fairseq.logging.progress_bar import progress_bar
from torch import Tensor
from torch.nn import functional as F

import fwp_fairseq.models
import fwp_fairseq.tasks  # noqa: F401  (registers, as the import before)
from fwp_fairseq.modules.carried_state import DecoderState

TASK = "streaming_language_modeling"

# Scores of so many words are computed at once: each is a row as long as the vocabulary.
_WORDS_AT_ONCE = 512

# Of fairseq-eval-lm's options those that work here. Any seed is as good as another: nothing is drawn.
_USED = frozenset(
    {
        *("path", "model_overrides", "user_dir", "seed", "cpu", "device_id", "fp16", "memory_efficient_fp16"),
        *("data", "dataset_impl", "gen_subset", "output_dictionary_size", "num_workers", "data_buffer_size"),
        *("tokens_per_sample", "batch_size", "num_shards", "shard_id", "softmax_batch"),
        *("output_word_probs", "output_word_stats", "post_process"),
        *("no_progress_bar", "log_format", "log_interval"),
    }
)
# The end of a token that goes on in the next one, by subword-nmt. fairseq-eval-lm knows no other pieces.
_GOES_ON = "@@"


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


@dataclass
class WordStatistics:
    """Of all occurrences of a word; ``before_others``: of those, the ones with a word after them, and its score."""

    word: str
    has_pieces: bool
    occurrences: int = 0
    log_prob: float = 0.0
    before_others: int = 0
    next_log_prob: float = 0.0

    def __str__(self) -> str:
        """As fairseq-eval-lm prints it."""
        values = (self.occurrences, self.log_prob, self.has_pieces, self.next_log_prob, self.before_others)
        return "\t".join(map(str, (self.word, *values)))


class Words:
    """The words of streams, whose pieces may lie in several segments, and what is known of each."""

    def __init__(self, dictionary: Any, joined: bool) -> None:
        """``joined``: pieces of subword-nmt make up words; else each token is one."""
        self.dictionary = dictionary
        self.statistics: dict[str, WordStatistics] = {}
        self._goes_on = {i for i in range(len(dictionary)) if joined and dictionary[i].endswith(_GOES_ON)}
        self._begun: dict[int, tuple[str, float]] = {}
        self._latest: dict[int, WordStatistics] = {}

    @property
    def count(self) -> int:
        """How many words there are; one that the end of a stream cuts off is one, too."""
        return sum(word.occurrences for word in self.statistics.values()) + len(self._begun)

    def read(self, sample: dict[str, Any], scores: Tensor, pad: int) -> Iterator[tuple[int, list[tuple[str, float]]]]:
        """Of each row of a segment its id and the words that end in it, with their log-probabilities in nats."""
        first = sample["position"]["first_stream"]
        for row, (number, target, score) in enumerate(zip(sample["id"], sample["target"].tolist(), scores.tolist())):
            known = [(token, x) for token, x in zip(target, score) if token != pad]
            yield int(number), [self._finish(first + row, *word) for word in self._join(first + row, known)]

    def _join(self, stream: int, tokens: list[tuple[int, float]]) -> Iterator[tuple[str, bool, float]]:
        for token, log_prob in tokens:
            begin, total = self._begun.pop(stream, ("", 0.0))
            piece = self.dictionary[token]
            if token in self._goes_on:
                self._begun[stream] = begin + piece.removesuffix(_GOES_ON), total + log_prob
            else:
                yield begin + piece, bool(begin), total + log_prob

    def _finish(self, stream: int, word: str, has_pieces: bool, log_prob: float) -> tuple[str, float]:
        if stream in self._latest:
            self._latest[stream].before_others += 1
            self._latest[stream].next_log_prob += log_prob
        known = self._latest[stream] = self.statistics.setdefault(word, WordStatistics(word, has_pieces))
        known.occurrences += 1
        known.log_prob += log_prob
        return word, log_prob


@torch.no_grad()
def evaluate(
    models: Sequence[Any],
    batches: Iterable[dict[str, Any]],
    device: Any = "cpu",
    words_at_once: int = _WORDS_AT_ONCE,
    report: Optional[Callable[[dict[str, Any], Tensor, float], None]] = None,
) -> Evaluation:
    """Score every token of streams once, given all that precede it in its stream.

    The probability of a token is the mean of the models'. ``report`` gets each batch, the log-probabilities of its
    targets (streams, length), which are zero for padding, and the loss so far. Raises ValueError: there are no tokens.
    """
    start = time.perf_counter()
    for model in models:
        model.eval()
    pad = models[0].decoder.dictionary.pad()
    states: list[Optional[DecoderState]] = [None] * len(models)
    total, tokens, streams = 0.0, 0, 1
    for sample in batches:
        source, target = sample["net_input"]["src_tokens"].to(device), sample["target"].to(device)
        found = []
        for number, model in enumerate(models):
            with model.decoder.carry(states[number]) as left:
                features, _ = model.decoder(source, features_only=True)
            states[number] = left
            found.append(log_probabilities(model.decoder, features, target, pad, words_at_once))
        scores = found[0] if len(models) == 1 else torch.stack(found).logsumexp(dim=0) - math.log(len(models))
        total -= float(scores.sum())
        tokens += sample["ntokens"]
        streams = target.size(0)
        if report is not None:
            report(sample, scores, total / max(tokens, 1))
    if not tokens:
        raise ValueError("there are no tokens to evaluate")
    carried = [x for state in states for layer in state or [] for x in layer.values()]
    return Evaluation(
        loss=total / tokens,
        tokens=tokens,
        seconds=time.perf_counter() - start,
        state=sum(x.numel() for x in carried) // streams,
        state_bytes=sum(x.numel() * x.element_size() for x in carried) // streams,
    )


def log_probabilities(
    decoder: Any, features: Tensor, target: Tensor, pad: int, words_at_once: int = _WORDS_AT_ONCE
) -> Tensor:
    """log p of the targets, zero for padding, in float64: features (..., D) of a decoder, target (...)."""
    adaptive, found = decoder.adaptive_softmax, []
    for x, words in zip(features.flatten(0, -2).split(words_at_once), target.flatten().split(words_at_once)):
        if adaptive is None:
            scores, targets, places = [decoder.output_layer(x)], [words], []
        else:
            # Of each group of rare words only where the target is one of it.
            scores, targets = adaptive(x[None], words)
            _, places = adaptive.adapt_target(words)
        log_probs = torch.zeros(len(words), dtype=torch.float64, device=words.device)
        # Within a group of rare words the number of padding is another word's.
        for score, word, ignored, place in zip(scores, targets, [pad, *[-1] * len(places)], [..., *places]):
            if word is not None:
                log_probs[place] -= F.cross_entropy(score.float(), word, ignore_index=ignored, reduction="none")
        found.append(log_probs)
    return torch.cat(found).view(target.shape)


def negative_log_likelihood(decoder: Any, features: Tensor, target: Tensor, pad: int) -> float:
    """Sum of -log p of the targets that are not padding, in nats: features (..., D) of a decoder, target (...)."""
    return -float(log_probabilities(decoder, features, target, pad).sum())


def parse(arguments: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """fairseq-eval-lm's options; one that would be without effect ends the program, unless it has its default."""
    parser = options.get_eval_lm_parser(default_task=TASK)
    # Batches have every stream, whatever their number; reading is too little work for a process of its own.
    parser.set_defaults(batch_size=1, num_workers=0, required_batch_size_multiple=1, softmax_batch=_WORDS_AT_ONCE)
    args = options.parse_args_and_arch(parser, input_args=arguments)
    default = vars(parser.parse_known_args(["DATA_BIN"])[0])
    # As given: fairseq has completed some options by others.
    for name, value in vars(parser.parse_args(arguments)).items():
        if name not in _USED and value != default[name]:
            parser.error(f"--{name.replace('_', '-')} is {value}, without effect on this evaluation: leave it out")
    if args.path is None:
        parser.error("--path is missing: the checkpoint to evaluate")
    if args.post_process not in (None, "subword_nmt", "@@ "):
        parser.error(f"--post-process is {args.post_process}, allowed are subword_nmt and '@@ '")
    if args.softmax_batch < 1:
        parser.error(f"--softmax-batch is {args.softmax_batch}, it must be at least 1")
    if not 0 <= args.shard_id < args.num_shards:
        parser.error(f"--shard-id is {args.shard_id}, it must be at least 0 and below --num-shards, {args.num_shards}")
    return args


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Evaluate the model that the command line says, and print what was found."""
    args = parse(arguments)
    logging.basicConfig(level=logging.INFO)
    utils.import_user_module(args)
    models, _, task = checkpoint_utils.load_model_ensemble_and_task(
        utils.split_paths(args.path), ast.literal_eval(args.model_overrides), tasks.setup_task(args)
    )
    device = "cpu"
    if torch.cuda.is_available() and not args.cpu:
        device = "cuda"
        torch.cuda.set_device(args.device_id)
    for model in models:
        if args.fp16:
            model.half()
        model.to(device).make_generation_fast_()
    task.load_dataset(args.gen_subset)
    batches = task.get_batch_iterator(
        task.dataset(args.gen_subset),
        max_sentences=args.batch_size,
        num_shards=args.num_shards,
        shard_id=args.shard_id,
        num_workers=args.num_workers,
        data_buffer_size=args.data_buffer_size,
    ).next_epoch_itr(shuffle=False)
    default_log_format = "simple" if args.no_progress_bar else "tqdm"
    progress = progress_bar(batches, args.log_format, args.log_interval, default_log_format=default_log_format)
    words = Words(task.target_dictionary, joined=args.post_process is not None)

    def report(sample: dict[str, Any], scores: Tensor, loss: float) -> None:
        progress.log({"perplexity": f"{math.exp(loss):.2f}"})
        if args.output_word_probs or args.output_word_stats or args.post_process:
            for number, ended in words.read(sample, scores, task.target_dictionary.pad()):
                if args.output_word_probs:
                    print(number, "\t".join(f"{word} [{log_prob:2f}]" for word, log_prob in ended))

    found = evaluate(models, progress, device, args.softmax_batch, report)
    if args.output_word_stats:
        print(*sorted(words.statistics.values(), key=lambda word: -word.occurrences), sep="\n")
    print(found)
    if args.post_process:
        print(f"perplexity per word: {math.exp(found.loss * found.tokens / words.count):.4f}\nwords: {words.count}")


if __name__ == "__main__":
    main()
