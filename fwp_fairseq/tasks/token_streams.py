"""A corpus as parallel streams of tokens, which are read segment by segment."""

import copy
from collections.abc import Iterator
from typing import Any, Optional

import numpy as np
import torch
from fairseq.data import Dictionary, FairseqDataset, data_utils, iterators
from numpy.typing import NDArray
from torch import Tensor


class TokenStreams(FairseqDataset):
    """All tokens of the lines, one after the other, cut into ``streams`` contiguous parts, and these into segments.

    Every token is the target once, and its input is the token before it, across the borders of lines, segments and
    streams; that of the first is the end of a sentence. Streams are of equal length, ⌈tokens / streams⌉, but for the
    last ones, which may end sooner and are padded on the right. Item ``segment * streams + stream`` is one segment of
    one stream. Lines are read when they are needed, so that with binarised data in fairseq's default format, which is
    mapped into memory, what is kept does not grow with the text but for 8 bytes a line.
    """

    def __init__(self, lines: Any, segment_length: int, dictionary: Dictionary, targets: Dictionary) -> None:
        self.lines = lines
        self.segment_length = segment_length
        self.pad = dictionary.pad()
        self.eos = dictionary.eos()
        self.unk = dictionary.unk()
        self.target_words = len(targets)
        self.streams = 1
        self._ends: NDArray[np.int64] = np.cumsum(lines.sizes, dtype=np.int64)

    @property
    def tokens(self) -> int:
        return int(self._ends[-1])

    def in_streams(self, streams: int) -> "TokenStreams":
        """The same corpus in another number of streams."""
        other = copy.copy(self)
        other.streams = streams
        return other

    @property
    def stream_length(self) -> int:
        return -(-self.tokens // self.streams)

    @property
    def segments(self) -> int:
        """How many segments a stream has."""
        return -(-self.stream_length // self.segment_length)

    def batches(self, processes: int) -> Iterator[list[int]]:
        """Items of each batch: the segments in their order, and of each the streams of every process in turn."""
        share = self.streams // processes
        return (list(range(first, first + share)) for first in range(0, len(self), share))

    def __len__(self) -> int:
        return self.segments * self.streams

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor]:
        segment, stream = divmod(index, self.streams)
        first = stream * self.stream_length + segment * self.segment_length
        last = min(first + self.segment_length, (stream + 1) * self.stream_length, self.tokens)
        tokens = self._read(first - 1, last) if first < last else torch.tensor([self.eos])
        # With --output-dictionary-size, as fairseq's language_modeling has it.
        target = tokens[1:].masked_fill(tokens[1:] >= self.target_words, self.unk)
        return index, tokens[:-1], target

    def _read(self, first: int, last: int) -> Tensor:
        """Tokens ``first`` to ``last - 1``; what is before the first token of the corpus is the end of a sentence."""
        parts = [torch.tensor([self.eos])] if first < 0 else []
        first = max(first, 0)
        line = int(np.searchsorted(self._ends, first, side="right"))
        start = int(self._ends[line - 1]) if line > 0 else 0
        while start < last:
            tokens = self.lines[line]
            parts.append(tokens[max(first - start, 0) : last - start].long())
            start += len(tokens)
            line += 1
        return torch.cat(parts)

    def collater(self, samples: list[tuple[int, Tensor, Tensor]]) -> dict[str, Any]:
        """A batch as fairseq's, and its ``position``: which segment of how many, the first of its streams, and all."""
        if not samples:
            return {}
        segment, first_stream = divmod(samples[0][0], self.streams)
        # Streams that have ended still have their place in the batch.
        width = min(self.segment_length, self.stream_length - segment * self.segment_length)
        indices, source, target = zip(*samples)

        def pad(rows: Any) -> Tensor:
            return data_utils.collate_tokens(list(rows), self.pad, pad_to_length=width)

        return {
            "id": torch.tensor(indices),
            "net_input": {"src_tokens": pad(source), "src_lengths": torch.tensor([len(row) for row in source])},
            "target": pad(target),
            "nsentences": len(samples),
            "ntokens": sum(len(row) for row in target),
            "position": {
                "segment": segment,
                "segments": self.segments,
                "first_stream": first_stream,
                "streams": self.streams,
            },
        }

    def num_tokens(self, index: int) -> int:
        return self.segment_length

    def num_tokens_vec(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.full(len(indices), self.segment_length)

    def size(self, index: int) -> int:
        return self.segment_length


class StreamsIterator(iterators.EpochBatchIterator):
    """fairseq's iterator over TokenStreams, which goes on in the middle of an epoch with the same streams only."""

    dataset: TokenStreams
    num_shards: int

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        streams = {"streams": self.dataset.streams, "tokens_per_sample": self.dataset.segment_length}
        return {**super().state_dict(), **streams}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError if the checkpoint is of the middle of an epoch of other streams."""
        if state_dict.get("iterations_in_epoch", 0) > 0:
            self._check(state_dict.get("streams"), state_dict.get("tokens_per_sample"))
        super().load_state_dict(state_dict)

    def _check(self, streams: Optional[int], segment_length: Optional[int]) -> None:
        text = self.dataset
        if streams is None:
            problem = "the checkpoint is of another task"
        elif streams != text.streams:
            problem = (
                f"the checkpoint has {streams} streams, but --batch-size {text.streams // self.num_shards} in "
                f"{self.num_shards} process(es) makes {text.streams}"
            )
        elif segment_length != text.segment_length:
            problem = (
                f"--tokens-per-sample is {text.segment_length}, but the checkpoint was trained with {segment_length}"
            )
        else:
            return
        raise ValueError(f"{problem}: training cannot go on in the middle of an epoch (--reset-dataloader begins one)")
