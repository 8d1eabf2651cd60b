#!/usr/bin/env python3
"""Write the text that every CPython ships for its help(), `pydoc_data.topics`, as a corpus for a language model.

A line is a paragraph or a list item as it stands in the manual. Sections of the manual recur in several topics: a
paragraph is kept where it is first met, longest topic first, so none is in two parts. Whole topics go to train, valid
and test by the hash of their name; the last two get a twentieth of the words each.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT = 0.05


def paragraphs(topic: str) -> list[str]:
    """The paragraphs of a topic, each in one line; rulings and what has no three words are dropped."""
    blocks = (" ".join(re.sub(r"[*=~^-]{4,}", " ", block).split()) for block in re.split(r"\n\s*\n", topic))
    return [block for block in blocks if len(re.findall(r"[A-Za-z]+", block)) >= 3]


def divide(texts: Mapping[str, str]) -> dict[str, list[str]]:
    """Divide topics among train, valid and test; lines of train, valid and test."""
    seen: set[str] = set()
    documents: dict[str, list[str]] = {}
    for name in sorted(texts, key=lambda name: (-len(texts[name]), name)):
        new = [line for line in dict.fromkeys(paragraphs(texts[name])) if line not in seen]
        seen.update(new)
        if new:
            documents[name] = new
    words = {name: sum(len(line.split()) for line in lines) for name, lines in documents.items()}
    room = dict.fromkeys(("test", "valid"), HELD_OUT * sum(words.values()))
    parts: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for name in sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest()):
        part = next((part for part in room if words[name] <= room[part]), "train")
        parts[part] += documents[name]
        if part in room:
            room[part] -= words[name]
    return parts


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the text of Python's help() as a corpus.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for train, valid and test")
    output = parser.parse_args(arguments).output
    output.mkdir(parents=True, exist_ok=True)
    for part, lines in divide(topics).items():
        temporary = output / f"{part}.new"
        temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        os.replace(temporary, output / part)
        print(f"{part}: {len(lines)} paragraphs, {sum(len(line.split()) for line in lines)} words")


if __name__ == "__main__":
    main()
