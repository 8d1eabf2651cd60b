"""State tracking: say after every move where one is. Parity, and the permutations of three things (S3).

A sequence is random elements of a group, and the target at each is the product of all so far: whether the number of
ones is odd; the order that three things are in after some exchanges. What cannot change the sign of what it has stored,
such as softmax attention or a delta rule with write strengths up to 1, cannot do so for sequences longer than those it
has seen (Grazzi et al., 2025).

Training sequences have random lengths up to ``--longest``, and are new in every epoch; those of the split valid have
just that length, and those of length_N have N. They depend on ``--seed`` and the epoch alone.
"""

import itertools
import re
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np
import torch
from fairseq.data import Dictionary, FairseqDataset
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.tasks import FairseqTask, register_task
from numpy.typing import NDArray
from omegaconf import II

Integers = NDArray[np.int64]


def multiplication_table(group: str) -> Integers:
    """Products a · b of the elements of a group, by number; element 0 is the neutral one."""
    if group == "parity":
        return np.array([[0, 1], [1, 0]])
    permutations = list(itertools.permutations(range(3)))
    numbers = {permutation: number for number, permutation in enumerate(permutations)}
    return np.array([[numbers[tuple(a[i] for i in b)] for b in permutations] for a in permutations])


GROUPS = ("parity", "s3")


class StateTrackingDataset(FairseqDataset):
    """Sequences of one split, drawn anew by ``set_epoch``. An example is (moves, states), words of the dictionary.

    ``lengths``: the shortest and the longest.
    """

    def __init__(
        self, sequences: int, lengths: tuple[int, int], group: str, words: Dictionary, seed: tuple[int, ...]
    ) -> None:
        self.words = words
        self.table = multiplication_table(group)
        self.limits = lengths
        self.seed = seed
        self.sizes = np.full(sequences, lengths[1])
        self.set_epoch(1)

    def set_epoch(self, epoch: int) -> None:
        generator = np.random.default_rng([*self.seed, epoch])
        shortest, longest = self.limits
        self.sizes = generator.integers(shortest, longest, len(self.sizes), endpoint=True)
        moves = generator.integers(len(self.table), size=(len(self.sizes), longest))
        states, state = np.empty_like(moves), np.zeros(len(self.sizes), dtype=np.int64)
        for position in range(longest):
            state = states[:, position] = self.table[state, moves[:, position]]
        self._moves, self._states = (torch.from_numpy(x + self.words.nspecial) for x in (moves, states))

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._moves[index, : self.sizes[index]], self._states[index, : self.sizes[index]]

    def __len__(self) -> int:
        return len(self.sizes)

    def collater(self, samples: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
        if not samples:
            return {}
        lengths = torch.tensor([len(moves) for moves, _ in samples])
        moves, states = (
            torch.nn.utils.rnn.pad_sequence(list(part), batch_first=True, padding_value=self.words.pad())
            for part in zip(*samples)
        )
        return {
            "net_input": {"src_tokens": moves, "src_lengths": lengths},
            "target": states,
            "nsentences": len(samples),
            "ntokens": int(lengths.sum()),
        }

    def num_tokens(self, index: int) -> int:
        return int(self.sizes[index])

    def num_tokens_vec(self, indices: Integers) -> Integers:
        return self.sizes[indices]

    def size(self, index: int) -> int:
        return int(self.sizes[index])


@dataclass
class StateTrackingConfig(FairseqDataclass):
    """Options of the task."""

    group: ChoiceEnum(list(GROUPS)) = field(  # type: ignore[valid-type]
        default="parity", metadata={"help": "whose elements are multiplied: parity, or s3, permutations of three"}
    )
    longest: int = field(default=40, metadata={"help": "moves of the longest training sequence"})
    epoch_sequences: int = field(default=6400, metadata={"help": "training sequences of an epoch"})
    eval_sequences: int = field(default=256, metadata={"help": "sequences of an evaluation"})
    tokens_per_sample: int = field(default=1024, metadata={"help": "moves of the longest sequence of all"})
    # fairseq's language models refer to it.
    max_target_positions: Optional[int] = field(default=None, metadata={"help": "as --tokens-per-sample if not given"})
    seed: int = II("common.seed")


@register_task("state_tracking", dataclass=StateTrackingConfig)
class StateTrackingTask(FairseqTask):
    """The product of all elements so far, after every one."""

    cfg: StateTrackingConfig

    def __init__(self, cfg: StateTrackingConfig) -> None:
        super().__init__(cfg)
        for name in ("longest", "epoch_sequences", "eval_sequences"):
            if getattr(cfg, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}, it must be at least 1")
        if str(cfg.group) not in GROUPS:
            raise ValueError(f"--group is {cfg.group}, allowed are {', '.join(GROUPS)}")
        self.dictionary = Dictionary()
        for element in range(len(multiplication_table(str(cfg.group)))):
            self.dictionary.add_symbol(str(element))

    def load_dataset(self, split: str, combine: bool = False, **kwargs: Any) -> None:
        """The splits are train, valid and test, of the training's longest, and length_N for any N."""
        cfg = self.cfg
        match = re.fullmatch(r"length_([1-9]\d*)", split)
        if match is None and split not in ("train", "valid", "test"):
            raise ValueError(f"{split} is no split of state_tracking, allowed are train, valid, test and length_N")
        length = cfg.longest if match is None else int(match[1])
        if length > cfg.tokens_per_sample:
            raise ValueError(f"{split} is longer than --tokens-per-sample {cfg.tokens_per_sample}")
        training = split == "train"
        self.datasets[split] = StateTrackingDataset(
            cfg.epoch_sequences if training else cfg.eval_sequences,
            (1 if training else length, length),
            str(cfg.group),
            self.dictionary,
            (cfg.seed, ("train", "valid", "test").index(split) if match is None else 2 + length),
        )

    def max_positions(self) -> int:
        return self.cfg.tokens_per_sample

    @property
    def source_dictionary(self) -> Dictionary:
        return self.dictionary

    @property
    def target_dictionary(self) -> Dictionary:
        return self.dictionary

    @property
    def output_dictionary(self) -> Optional[Dictionary]:
        return self.dictionary
