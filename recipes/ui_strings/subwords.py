#!/usr/bin/env python3
"""Learn a sentencepiece model, and encode text files with it.

subwords.py learn --model spm --size 4000 train.en train.de     writes spm.model and spm.vocab
subwords.py encode --model spm.model INPUT OUTPUT               one line of pieces for each line
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import sentencepiece


def learn(model: Path, size: int, texts: Sequence[Path]) -> None:
    """Learn `size` pieces from the texts and write model.model and model.vocab."""
    # An iterator in place of file names, which sentencepiece would split at commas.
    lines = (line for text in texts for line in text.read_text(encoding="utf-8").splitlines())
    temporary = model.with_name(model.name + ".new")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_prefix=str(temporary),
            vocab_size=size,
            character_coverage=1.0,
            # All of the text counts: nothing is sampled, so that the same text always gives the same pieces.
            input_sentence_size=0,
            shuffle_input_sentence=False,
            num_threads=1,
            minloglevel=1,
        )
    except RuntimeError as error:
        sys.exit(f"subwords.py: no vocabulary of {size} pieces can be made of this text: {error}")
    for suffix in (".vocab", ".model"):
        os.replace(f"{temporary}{suffix}", f"{model}{suffix}")


def encode(model: Path, text: Path, output: Path) -> None:
    """Write the pieces of each line of a text, separated by spaces."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    temporary = output.with_name(output.name + ".new")
    with text.open(encoding="utf-8", newline="\n") as lines, temporary.open("w", encoding="utf-8") as pieces:
        for line in lines:
            pieces.write(" ".join(processor.encode(line.rstrip("\n"), out_type=str)) + "\n")
    os.replace(temporary, output)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Learn a sentencepiece model, and encode text files with it.")
    commands = parser.add_subparsers(dest="command", required=True)
    learner = commands.add_parser("learn", help="learn a model")
    learner.add_argument("--model", type=Path, required=True, metavar="PREFIX")
    learner.add_argument("--size", type=int, required=True, metavar="N")
    learner.add_argument("texts", type=Path, nargs="+", metavar="TEXT")
    encoder = commands.add_parser("encode", help="encode a text")
    encoder.add_argument("--model", type=Path, required=True, metavar="FILE")
    encoder.add_argument("input", type=Path)
    encoder.add_argument("output", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "learn":
        learn(options.model, options.size, options.texts)
    else:
        encode(options.model, options.input, options.output)


if __name__ == "__main__":
    main()
