"""Beam search with the scores, and the outcome, of fairseq's SequenceGenerator, in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

# Numbers of each of the blocks whose largest say which blocks can have the best of all.
_BLOCK = 64


@dataclass(frozen=True)
class SearchOptions:
    """fairseq's options of the same names."""

    beam: int = 5
    max_len_a: float = 0.0
    max_len_b: int = 200
    min_len: int = 1
    lenpen: float = 1.0
    unkpen: float = 0.0
    unnormalized: bool = False


@dataclass(frozen=True)
class Special:
    """Numbers of the words that the search treats in a way of their own."""

    pad: int
    eos: int
    unk: int


@dataclass(frozen=True)
class Hypothesis:
    """Words, the last of which is the end of the sentence, with the score of all and the log-probability of each."""

    tokens: Ints
    score: float
    log_probabilities: Floats


class Decoder(Protocol):
    """What the search asks: the words that may follow. Rows are hypotheses, as many for one sentence as for another."""

    def step(self, tokens: Ints, order: Ints) -> Floats:
        """Log-probabilities (rows, words) after ``tokens``, (rows,); each row goes on from row ``order`` before."""

    def keep(self, sentences: Ints) -> None:
        """Only these sentences are left. ``order`` still says which row it was before."""


def longest(options: SearchOptions, source_length: int, positions: int) -> int:
    """How many words an output may have, its end not counted. Raises ValueError: fewer than it must have."""
    max_len = min(int(options.max_len_a * source_length + options.max_len_b), positions - 1)
    if options.min_len > max_len:
        raise ValueError(f"--min-len is {options.min_len}, but an output can have {max_len} words here")
    return max_len


def search(
    decoder: Decoder, starts: Ints, words: int, max_len: int, special: Special, options: SearchOptions
) -> list[list[Hypothesis]]:
    """The best outputs of each sentence, best first. ``starts``, (sentences,): what comes before the first word."""
    beam = min(options.beam, words - 1)
    left = np.arange(len(starts))  # the sentences that are searched for
    tokens = np.full((len(starts), beam, max_len + 2), special.pad, np.int64)
    tokens[:, :, 0] = starts[:, None]
    scores = np.zeros((len(starts), beam, max_len + 1), np.float32)
    order = np.arange(len(starts))
    ended = np.zeros((len(starts), beam), bool)  # places of the beam that nothing goes on from
    found: list[list[Hypothesis]] = [[] for _ in starts]

    for step in range(max_len + 1):
        rows = 1 if step == 0 else beam  # of a sentence: all begin alike
        log_p = decoder.step(tokens[:, :rows, step].reshape(-1), order).reshape(len(left), rows, words)
        _constrain(log_p, step, max_len, special, options)
        if step > 0:
            log_p += scores[:, :, step - 1 : step]
        candidates = log_p.reshape(len(left), -1)
        best, where = top(candidates, min(2 * beam, candidates.shape[1] - 1))
        parent, word = np.divmod(where, words)

        # A sentence has found what ends among its best places.
        ends = (word == special.eos) & (best != -np.inf)
        ends[:, :beam] &= ~ended
        complete = np.zeros(len(left), bool)
        for row in np.flatnonzero(ends[:, :beam].any(axis=1)):
            results = found[left[row]]
            for place in np.flatnonzero(ends[row, :beam])[: beam - len(results)]:
                source = parent[row, place]
                path = np.append(tokens[row, source, 1 : step + 1], special.eos)
                sums = np.append(scores[row, source, :step], best[row, place])
                score = best[row, place] if options.unnormalized else best[row, place] / (step + 1) ** options.lenpen
                results.append(Hypothesis(path, float(score), np.diff(sums, prepend=np.float32(0))))
            complete[row] = len(results) == beam or step == max_len
        if complete.all():
            break

        going_on = np.flatnonzero(~complete)
        ends, parent, word, best = ends[going_on], parent[going_on], word[going_on], best[going_on]
        ended, tokens, scores = ended[going_on], tokens[going_on], scores[going_on]
        ends[:, :beam] |= ended
        # The best that do not end go on; where there are not enough, some that do fill the beam.
        rank = ends * (2 * beam) + np.arange(ends.shape[1])
        chosen = np.argsort(rank, axis=1)[:, :beam]
        ended = np.take_along_axis(rank, chosen, axis=1) >= 2 * beam
        parent = np.take_along_axis(parent, chosen, axis=1)
        tokens = np.take_along_axis(tokens, parent[:, :, None], axis=1)
        scores = np.take_along_axis(scores, parent[:, :, None], axis=1)
        tokens[:, :, step + 1] = np.take_along_axis(word, chosen, axis=1)
        scores[:, :, step] = np.take_along_axis(best, chosen, axis=1)
        order = (going_on[:, None] * rows + parent).reshape(-1)
        if len(going_on) < len(left):
            decoder.keep(going_on)
            left = left[going_on]
    return [sorted(results, key=lambda hypothesis: -hypothesis.score) for results in found]


def _constrain(log_p: Floats, step: int, max_len: int, special: Special, options: SearchOptions) -> None:
    log_p[:, :, special.pad] = -np.inf
    log_p[:, :, special.unk] -= np.float32(options.unkpen)
    if step >= max_len:
        end = log_p[:, :, special.eos].copy()
        log_p[:] = -np.inf
        log_p[:, :, special.eos] = end
    if step < options.min_len:
        log_p[:, :, special.eos] = -np.inf


def top(scores: Floats, k: int) -> tuple[Floats, Ints]:
    """The k best of each row and their places, best first, of equal ones the first; what is not a number is worst."""
    rows, size = scores.shape
    blocks = size // _BLOCK
    if blocks <= 2 * k:
        scores = np.where(np.isnan(scores), -np.inf, scores)
        places = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, places, axis=1), places
    highest = scores[:, : blocks * _BLOCK].reshape(rows, _BLOCK, blocks).max(axis=1)
    if np.isnan(highest).any():
        return top(np.where(np.isnan(scores), -np.inf, scores), k)
    # k blocks have a number that is not below this.
    bound = np.partition(highest, blocks - k, axis=1)[:, blocks - k]
    best = np.empty((rows, k), scores.dtype)
    places = np.empty((rows, k), np.int64)
    for row in range(rows):
        candidates = np.flatnonzero(scores[row] >= bound[row])
        places[row] = candidates[np.argsort(-scores[row, candidates], kind="stable")[:k]]
        best[row] = scores[row, places[row]]
    return best, places


def batches(lengths: Sequence[int], size: int) -> list[Any]:
    """Sentences of like lengths together, as fairseq puts them: numbers of the sentences of each batch."""
    order = np.argsort(lengths, kind="stable")
    return [order[start : start + size] for start in range(0, len(order), size)]
