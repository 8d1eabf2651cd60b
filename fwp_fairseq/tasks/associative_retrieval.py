"""Synthetic retrieval (sec. 6.1 of Schlag, Irie and Schmidhuber, 2021): store key-value pairs, then ask for one.

A sequence is L pairs of one of S keys and one of S values, and a query is a key of the sequence. The answer is the
value that came with it last. Setting 1, capacity: without replacement, L = S. Setting 2, updates: with replacement,
L = 2 S, so that most keys get a new value on the way. In training a sequence has one query, the key of a random pair;
in evaluation it has every key that is in it, up to a limit.

Data are made on the fly: training sequences are new in every epoch, and evaluation sequences at every evaluation. They
depend on ``--seed`` and the epoch alone. An epoch is the training between two evaluations.
"""

from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np
import torch
from fairseq.data import FairseqDataset
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import FairseqTask, register_task
from numpy.typing import NDArray
from omegaconf import II

Integers = NDArray[np.int64]

NO_ANSWER = -1  # the target of a query whose key is not in the sequence
_SPLITS = {"train": 0, "valid": 1, "test": 2}


def draw_pairs(
    generator: np.random.Generator, sequences: int, length: int, num_keys: int, with_replacement: bool
) -> tuple[Integers, Integers]:
    """Keys and values of random sequences, (sequences, length) each, drawn independently of each other."""

    def draw() -> Integers:
        if with_replacement:
            return generator.integers(num_keys, size=(sequences, length))
        symbols = np.broadcast_to(np.arange(num_keys), (sequences, num_keys))
        return generator.permuted(symbols, axis=1)[:, :length]

    return draw(), draw()


def latest_values(keys: Integers, values: Integers, num_keys: int) -> Integers:
    """The value that each key has in the end, (sequences, num_keys); NO_ANSWER for keys that are not there."""
    latest = np.full((len(keys), num_keys), NO_ANSWER)
    for position in range(keys.shape[1]):
        np.put_along_axis(latest, keys[:, position, None], values[:, position, None], axis=1)
    return latest


class RetrievalDataset(FairseqDataset):
    """Sequences of one split, drawn anew by ``set_epoch``. An example is (keys, values, queries, targets).

    ``max_queries``: None for one query by example, else the number of keys that are asked for, at most. Where an
    example has fewer different keys, the rest of its queries have NO_ANSWER as target.
    """

    def __init__(
        self,
        sequences: int,
        length: int,
        num_keys: int,
        with_replacement: bool,
        *,
        seed: tuple[int, ...],
        max_queries: Optional[int] = None,
    ) -> None:
        self.sequences = sequences
        self.length = length
        self.num_keys = num_keys
        self.with_replacement = with_replacement
        self.seed = seed
        self.max_queries = max_queries
        self.set_epoch(1)

    def set_epoch(self, epoch: int) -> None:
        generator = np.random.default_rng([*self.seed, epoch])
        keys, values = draw_pairs(generator, self.sequences, self.length, self.num_keys, self.with_replacement)
        latest = latest_values(keys, values, self.num_keys)
        if self.max_queries is None:
            asked = generator.integers(self.length, size=(self.sequences, 1))
            queries = np.take_along_axis(keys, asked, axis=1)
        else:
            # Keys that are there come first.
            queries = np.argsort(latest == NO_ANSWER, axis=1, kind="stable")[:, : self.max_queries]
        targets = np.take_along_axis(latest, queries, axis=1)
        self._examples = tuple(torch.from_numpy(np.ascontiguousarray(x)) for x in (keys, values, queries, targets))

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return tuple(part[index] for part in self._examples)

    def __len__(self) -> int:
        return self.sequences

    def collater(self, samples: list[tuple[torch.Tensor, ...]]) -> dict[str, Any]:
        if not samples:
            return {}
        keys, values, queries, target = (torch.stack(parts) for parts in zip(*samples))
        return {
            "net_input": {"keys": keys, "values": values, "queries": queries},
            "target": target,
            "nsentences": len(samples),
            "ntokens": keys.numel(),
        }

    def num_tokens(self, index: int) -> int:
        return self.length

    def num_tokens_vec(self, indices: Integers) -> Integers:
        return np.full(len(indices), self.length)

    def size(self, index: int) -> int:
        return self.length

    def batch_by_size(
        self,
        indices: Integers,
        max_tokens: Optional[int] = None,
        max_sentences: Optional[int] = None,
        required_batch_size_multiple: int = 1,
    ) -> Any:
        # Not with fairseq's multiple of 8, which leaves out what does not fill the last group.
        return super().batch_by_size(indices, max_tokens, max_sentences, required_batch_size_multiple=1)


@dataclass
class AssociativeRetrievalConfig(FairseqDataclass):
    """Options of the task; the defaults are the paper's."""

    num_keys: int = field(default=20, metadata={"help": "S: how many different keys there are, and values"})
    with_replacement: bool = field(
        default=False,
        metadata={
            "help": "draw keys and values with replacement (setting 2), so that later values replace earlier ones"
        },
    )
    sequence_length: Optional[int] = field(
        default=None, metadata={"help": "L: pairs in a training sequence (default: S, or 2 S with replacement)"}
    )
    eval_sequence_length: Optional[int] = field(
        default=None,
        metadata={"help": "pairs in an evaluation sequence (default: S, as in the authors' program in both settings)"},
    )
    eval_sequences: int = field(default=20, metadata={"help": "sequences of an evaluation"})
    eval_queries: int = field(default=200, metadata={"help": "queries of an evaluation sequence, at most"})
    epoch_sequences: int = field(
        default=3200, metadata={"help": "training sequences between two evaluations (the paper: 100 batches)"}
    )
    seed: int = II("common.seed")


@register_task("associative_retrieval", dataclass=AssociativeRetrievalConfig)
class AssociativeRetrievalTask(FairseqTask):
    """The latest value of a key among key-value pairs."""

    cfg: AssociativeRetrievalConfig

    def __init__(self, cfg: AssociativeRetrievalConfig) -> None:
        super().__init__(cfg)
        self.lengths = _checked_lengths(cfg)

    @property
    def num_keys(self) -> int:
        """S, which a model needs to know."""
        return self.cfg.num_keys

    def load_dataset(self, split: str, combine: bool = False, **kwargs: Any) -> None:
        """The splits are train, valid and test. None of them shares sequences with another but by chance."""
        if split not in _SPLITS:
            raise ValueError(f"{split} is no split of associative_retrieval, allowed are {', '.join(_SPLITS)}")
        cfg, training = self.cfg, split == "train"
        self.datasets[split] = RetrievalDataset(
            cfg.epoch_sequences if training else cfg.eval_sequences,
            self.lengths[not training],
            cfg.num_keys,
            cfg.with_replacement,
            seed=(cfg.seed, _SPLITS[split]),
            max_queries=None if training else cfg.eval_queries,
        )

    def begin_valid_epoch(self, epoch: int, model: Any) -> None:
        """Fresh sequences for every evaluation, where fairseq would keep the first ones."""
        for split, dataset in self.datasets.items():
            if split != "train":
                dataset.set_epoch(epoch)

    def max_positions(self) -> None:
        return None

    @property
    def source_dictionary(self) -> None:
        return None

    @property
    def target_dictionary(self) -> None:
        return None


def _checked_lengths(cfg: AssociativeRetrievalConfig) -> tuple[int, int]:
    """Length of training and of evaluation sequences. Raises ValueError naming flag, value and what is allowed."""
    for name in ("num_keys", "eval_sequences", "eval_queries", "epoch_sequences"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}, it must be at least 1")
    training, evaluation = cfg.sequence_length, cfg.eval_sequence_length
    for flag, length in ("--sequence-length", training), ("--eval-sequence-length", evaluation):
        if length is not None and not 1 <= length <= (length if cfg.with_replacement else cfg.num_keys):
            limit = "at least 1" if cfg.with_replacement else f"1 to {cfg.num_keys}, the keys, without replacement"
            raise ValueError(f"{flag} is {length}, allowed is {limit}")
    default = 2 * cfg.num_keys if cfg.with_replacement else cfg.num_keys
    return default if training is None else training, cfg.num_keys if evaluation is None else evaluation
