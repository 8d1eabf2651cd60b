"""Byte-pair encoding by subword-nmt, on all cores and with lines that only a line feed ends."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

from parallel import each_chunk, lines


def counter() -> Callable[[list[str]], Counter[str]]:
    """Counts words."""
    return lambda chunk: Counter(chain.from_iterable(line.split() for line in chunk))


def count_words(texts: Sequence[Path], jobs: int) -> Counter[str]:
    """How often each word occurs in the texts."""
    words: Counter[str] = Counter()
    for count in each_chunk(chain.from_iterable(map(lines, texts)), jobs, counter):
        words.update(count)
    return words


def learn_bpe(texts: Sequence[Path], merges: int, jobs: int) -> list[str]:
    """The lines of a file of byte-pair merges; <unk>, as some corpora have it, is no word to them."""
    from subword_nmt.learn_bpe import learn_bpe as learn

    words = count_words(texts, jobs)
    del words["<unk>"]
    # Ties are broken by the order of the words.
    dictionary = [f"{word} {count}" for word, count in sorted(words.items(), key=lambda item: (-item[1], item[0]))]
    codes = io.StringIO()
    learn(dictionary, codes, merges, is_dict=True)
    return codes.getvalue().splitlines()


def segmenter(codes: str) -> Callable[[list[str]], list[str]]:
    """Splits words into the pieces of a file of merges."""
    from subword_nmt.apply_bpe import BPE

    with open(codes, encoding="utf-8") as file:
        bpe = BPE(file, glossaries=["<unk>"])
    return lambda chunk: [bpe.process_line(line) for line in chunk]
