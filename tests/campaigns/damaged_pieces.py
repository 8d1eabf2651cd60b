"""Sentencepiece models and byte-pair merges that are cut short or have bits turned over.

    PYTHONPATH=.:tests:recipes python tests/campaigns/damaged_pieces.py --cases 600

Each case damages one of them in one of several ways and splits a text into pieces with it, in a process of its own.
What may come out: an error ("refused"), or the pieces of the sound file ("same"). "other" are other pieces, which only
merges can give, since their format has no checksum and every two words are one; recipes make anew what is not as they
made it (tests/test_wmt14_recipe.py). "crash" (a signal), "hang" (20 seconds) and "huge" (2 GB) may not be. Status 1 if
there was one of these, or other pieces from a sentencepiece model.
"""

import argparse
import os
import random
import resource
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import sentencepiece
from bpe import learn_bpe, segmenter
from campaigns.damage import DAMAGES, damage, virtual_memory

MEMORY = 2 * 2**30
SECONDS = 20


def make_text(path: Path, draw: random.Random) -> list[str]:
    """A text of words that share syllables."""
    syllables = [first + vowel for first in "bdfgklmnprst" for vowel in "aeiouäö"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(400)]
    lines = [" ".join(draw.choices(words, k=10)) for _ in range(400)]
    path.write_text("".join(line + "\n" for line in lines))
    return lines


def read_sentencepiece(path: Path, text: list[str]) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return [" ".join(pieces) for pieces in processor.encode(text, out_type=str)]


def read_merges(path: Path, text: list[str]) -> list[str]:
    return segmenter(str(path))(text)


def outcome(read: Callable[[Path, list[str]], list[str]], path: Path, text: list[str], expected: list[str]) -> str:
    """What comes of a damaged file."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (virtual_memory() + MEMORY, resource.RLIM_INFINITY))
        try:
            result = "same" if read(path, text) == expected else "other"
        except MemoryError:
            result = "huge"
        except (Exception, SystemExit):
            result = "refused"
        os.write(into, result.encode())
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as file:
        result = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return result or ("hang" if status == -signal.SIGALRM else "crash")


def main() -> int:
    parser = argparse.ArgumentParser(description="Damage vocabularies of pieces and split a text with them.")
    parser.add_argument("--cases", type=int, default=600, metavar="N")
    options = parser.parse_args()
    faults = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = make_text(folder / "text", random.Random(0))
        for kind in ("bpe", "unigram"):
            sentencepiece.SentencePieceTrainer.train(
                input=str(folder / "text"),
                model_prefix=str(folder / kind),
                vocab_size=150,
                model_type=kind,
                minloglevel=2,
            )
        (folder / "codes").write_text("\n".join(learn_bpe([folder / "text"], 100, 1)) + "\n")
        kinds = {"bpe.model": read_sentencepiece, "unigram.model": read_sentencepiece, "codes": read_merges}
        for kind, (file, read) in enumerate(kinds.items()):
            expected, case = read(folder / file, text), folder / "case"
            counts: Counter[str] = Counter()
            for number in range(kind, options.cases, len(kinds)):
                draw = random.Random(number)
                case.write_bytes((folder / file).read_bytes())
                damage(case, draw.choice(DAMAGES), draw)
                counts[outcome(read, case, text, expected)] += 1
            print(f"{file:<14}", ", ".join(f"{count} {name}" for name, count in counts.most_common()), flush=True)
            faults += sum(counts[name] for name in ("crash", "hang", "huge"))
            faults += 0 if read is read_merges else counts["other"]
    print(f"{options.cases} cases, {faults} faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
