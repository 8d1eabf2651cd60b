"""Words into pieces and back, as the model was trained: by sentencepiece, by byte-pair merges, or as they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


class Pieces:
    """Words as they are."""

    def encode(self, line: str) -> str:
        """The pieces of a line, with spaces between them."""
        return line

    def decode(self, pieces: str) -> str:
        """The line of such pieces."""
        return pieces


class SentencePieces(Pieces):
    """sentencepiece. Raises ValueError: not a model of it."""

    def __init__(self, model: Path) -> None:
        import sentencepiece

        self._processor: Any = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.load_from_serialized_proto(model.read_bytes())
        except RuntimeError:
            raise ValueError(f"{model} is no model of sentencepiece") from None

    def encode(self, line: str) -> str:
        return " ".join(self._processor.encode(line, out_type=str))

    def decode(self, pieces: str) -> str:
        return pieces.replace(" ", "").replace("\u2581", " ").strip()


class MergedPairs(Pieces):
    """The merges of subword-nmt: pieces that a word goes on after end in ``@@``. Raises ValueError: no such file."""

    def __init__(self, codes: Path) -> None:
        lines = codes.read_text("utf-8").rstrip("\n").split("\n")
        version = re.fullmatch(r"#version: (\d+)\.(\d+)", lines[0])
        if version:
            lines = lines[1:]
        # Before 0.2 the end of a word was a piece of its own.
        self._end_alone = version is None or (int(version[1]), int(version[2])) < (0, 2)
        pairs = [tuple(line.strip("\r\n ").split(" ")) for line in lines]
        wrong = [line for line, pair in zip(lines, pairs) if len(pair) != 2]
        if wrong:
            raise ValueError(f"{codes} is no file of byte-pair merges: {wrong[0]!r} is in it")
        # Of one that is there twice the first counts.
        self._rank = {pair: rank for rank, pair in reversed(list(enumerate(pairs)))}
        self._known: dict[str, list[str]] = {}

    def encode(self, line: str) -> str:
        pieces = [piece for word in line.split() for piece in self._split(word)]
        return " ".join(pieces)

    def decode(self, pieces: str) -> str:
        return re.sub(r"@@( |$)", "", pieces + " ").rstrip()

    def _split(self, word: str) -> list[str]:
        if word not in self._known:
            end = "</w>"
            parts = [*word, end] if self._end_alone else [*word[:-1], word[-1] + end]
            while len(parts) > 1:
                pair = min(zip(parts, parts[1:]), key=lambda pair: self._rank.get(pair, len(self._rank)))
                if pair not in self._rank:
                    break
                parts = _merge(parts, pair)
            if parts[-1] == end:
                parts.pop()
            parts[-1] = parts[-1].removesuffix(end)
            self._known[word] = [*(f"{part}@@" for part in parts[:-1]), parts[-1]]
        return self._known[word]


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """With each occurrence of the pair as one part."""
    merged: list[str] = []
    position = 0
    while position < len(parts):
        if tuple(parts[position : position + 2]) == pair:
            merged.append("".join(pair))
            position += 2
        else:
            merged.append(parts[position])
            position += 1
    return merged


def load(folder: Path, subwords: dict[str, str] | None) -> Pieces:
    """What the folder of a model says about its pieces."""
    if subwords is None:
        return Pieces()
    kinds: dict[str, Any] = {"sentencepiece": SentencePieces, "bpe": MergedPairs}
    return kinds[subwords["kind"]](folder / subwords["file"])
