#!/usr/bin/env python3
"""The text of WMT14: what the Perl scripts of fairseq's recipe do, with sacremoses and subword-nmt, on all cores.

corpus.py segments INPUT.sgm OUTPUT                              the segments of an SGML file, one a line
corpus.py tokenize --lang LANG INPUT... OUTPUT                   normalised, tokenised, the inputs one after the other
corpus.py learn-bpe --merges N OUTPUT TEXT...                    byte-pair merges of several texts together
corpus.py apply-bpe --codes FILE INPUT OUTPUT
corpus.py clean SOURCE TARGET OUT_SOURCE OUT_TARGET              pairs of 1 to 250 pieces, at most 1.5 to one

A killed command leaves a file NAME.new at most. Inputs may be large: they are read line by line.
"""

from __future__ import annotations

import argparse
import html
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bpe import learn_bpe, segmenter
from parallel import each_chunk, lines, write_lines

MAX_PIECES = 250
MAX_RATIO = 1.5


def segments(text: Iterable[str]) -> Iterator[str]:
    """The segments of an SGML file of WMT, without tags; a typographic apostrophe becomes a plain one."""
    for line in text:
        if match := re.search(r"<seg id=[^>]*>\s*(.*?)\s*</seg>", line):
            yield html.unescape(match[1]).replace("’", "'")


def tokenizer(lang: str, normalize: bool) -> Callable[[list[str]], list[str]]:
    """Normalises the punctuation, removes what cannot be printed, and tokenises, hyphens too (Moses' -a)."""
    import regex
    from sacremoses import MosesPunctNormalizer, MosesTokenizer

    punctuation = MosesPunctNormalizer(lang=lang, perl_parity=True)
    moses = MosesTokenizer(lang=lang)
    unprintable = regex.compile(r"\p{C}")

    def tokenize(chunk: list[str]) -> list[str]:
        if normalize:
            chunk = [unprintable.sub(" ", punctuation.normalize(line)) for line in chunk]
        return [moses.tokenize(line, aggressive_dash_splits=True, return_str=True) for line in chunk]

    return tokenize


def good_pairs(source: Iterable[str], target: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The pairs of which neither side is empty, longer than MAX_PIECES, or longer than MAX_RATIO times the other."""
    for pair in zip_longest(source, target):
        if None in pair:
            sys.exit("corpus.py: the two languages have different numbers of lines.")
        short, long = sorted(len(line.split()) for line in pair)
        if short >= 1 and long <= MAX_PIECES and long <= MAX_RATIO * short:
            yield pair


def clean(source: Path, target: Path, out_source: Path, out_target: Path) -> None:
    """Write the good pairs."""
    kept = write_lines(out_source, (pair[0] for pair in good_pairs(lines(source), lines(target))))
    write_lines(out_target, (pair[1] for pair in good_pairs(lines(source), lines(target))))
    print(f"{kept} pairs are kept")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="The text of WMT14.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, help: str, *paths: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help)
        sub.add_argument("--jobs", type=int, default=1, metavar="N", help="processes")
        for path in paths:
            sub.add_argument(path.rstrip("+"), type=Path, nargs="+" if path.endswith("+") else None)
        return sub

    command("segments", "the segments of an SGML file", "input", "output")
    sub = command("tokenize", "normalise and tokenise", "inputs+", "output")
    sub.add_argument("--lang", required=True)
    sub.add_argument("--no-normalize", action="store_true", help="only tokenise, as fairseq's recipe does the test")
    sub = command("learn-bpe", "learn merges", "output", "texts+")
    sub.add_argument("--merges", type=int, required=True, metavar="N")
    sub = command("apply-bpe", "split words into pieces", "input", "output")
    sub.add_argument("--codes", required=True, metavar="FILE")
    command("clean", "keep the good pairs", "source", "target", "out_source", "out_target")
    options = parser.parse_args(arguments)
    if options.command == "segments":
        count = write_lines(options.output, segments(lines(options.input)))
        if not count:
            sys.exit(f"corpus.py: {options.input} has no segments.")
    elif options.command == "tokenize":
        text = chain.from_iterable(map(lines, options.inputs))
        done = each_chunk(text, options.jobs, tokenizer, options.lang, not options.no_normalize)
        write_lines(options.output, chain.from_iterable(done))
    elif options.command == "learn-bpe":
        write_lines(options.output, learn_bpe(options.texts, options.merges, options.jobs))
    elif options.command == "apply-bpe":
        done = each_chunk(lines(options.input), options.jobs, segmenter, options.codes)
        write_lines(options.output, chain.from_iterable(done))
    else:
        clean(options.source, options.target, options.out_source, options.out_target)


if __name__ == "__main__":
    main()
