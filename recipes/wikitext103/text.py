#!/usr/bin/env python3
"""Pieces of words, and numbers of words, of WikiText-103.

text.py learn-bpe --size N MODEL TEXT                byte-pair merges
text.py learn-sentencepiece --size N MODEL TEXT      a sentencepiece model
text.py encode --model MODEL INPUT OUTPUT            pieces, one line for each line
text.py count TEXT...                                words of each, with the end of a line as one, as JSON

A killed command leaves a file NAME.new at most.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bpe import learn_bpe, segmenter
from parallel import each_chunk, lines, write_lines

# What a sentencepiece model is learned from; all of WikiText-103 would take tens of gigabytes.
SENTENCES = 500_000


def learn_sentencepiece(text: Path, size: int, model: Path) -> None:
    """Learn `size` pieces from the text and write a sentencepiece model; <unk> is a piece of its own."""
    import sentencepiece

    sentencepiece.set_random_generator_seed(1)
    content = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line.strip() for line in lines(text) if line.strip()),
            model_writer=content,
            vocab_size=size,
            character_coverage=0.9999,
            input_sentence_size=SENTENCES,
            shuffle_input_sentence=True,
            max_sentence_length=100_000,
            num_threads=1,
            minloglevel=1,
        )
    except RuntimeError as error:
        sys.exit(f"text.py: no vocabulary of {size} pieces can be made of this text: {error}")
    temporary = model.with_name(model.name + ".new")
    temporary.write_bytes(content.getvalue())
    temporary.replace(model)


def encoder(model: str) -> Callable[[list[str]], list[str]]:
    """Splits words into the pieces of either kind of model."""
    if Path(model).read_bytes().startswith(b"#version"):
        return segmenter(model)
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    return lambda chunk: [" ".join(pieces) for pieces in processor.encode(chunk, out_type=str)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Pieces of words, and numbers of words, of WikiText-103.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("learn-bpe", "learn-sentencepiece"):
        sub = commands.add_parser(name, help="learn pieces")
        sub.add_argument("--size", type=int, required=True, metavar="N")
        sub.add_argument("--jobs", type=int, default=1, metavar="N", help="processes")
        sub.add_argument("model", type=Path)
        sub.add_argument("text", type=Path)
    sub = commands.add_parser("encode", help="split words into pieces")
    sub.add_argument("--model", required=True, metavar="FILE")
    sub.add_argument("--jobs", type=int, default=1, metavar="N", help="processes")
    sub.add_argument("input", type=Path)
    sub.add_argument("output", type=Path)
    commands.add_parser("count", help="count words").add_argument("texts", type=Path, nargs="+")
    options = parser.parse_args(arguments)
    if options.command == "learn-bpe":
        write_lines(options.model, learn_bpe([options.text], options.size, options.jobs))
    elif options.command == "learn-sentencepiece":
        learn_sentencepiece(options.text, options.size, options.model)
    elif options.command == "encode":
        done = each_chunk(lines(options.input), options.jobs, encoder, options.model)
        write_lines(options.output, chain.from_iterable(done))
    else:
        print(json.dumps({path.name: sum(len(line.split()) + 1 for line in lines(path)) for path in options.texts}))


if __name__ == "__main__":
    main()
