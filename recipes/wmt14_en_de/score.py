#!/usr/bin/env python3
"""Score what fairseq-generate has translated: score.py MODEL --references DIR --tokens DIR

Reads MODEL/valid.out and MODEL/test.out, prints and writes MODEL/result.txt, and writes MODEL/result.json.

Two scores, which are not comparable with each other:
- tokenised BLEU with compounds split, as in Vaswani et al. (2017), Ott et al. (2018) and the paper: of Moses tokens, a
  hyphen between letters being one;
- sacreBLEU of detokenised text against the untouched reference (Post, 2018).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from sacrebleu.metrics import BLEU
from sacremoses import MosesDetokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parallel import lines
from reporting import read_training, write

TITLES = {"valid": "newstest2013", "test": "newstest2014"}


def split_compounds(text: str) -> str:
    """Make hyphens within words tokens of their own; Moses' -a has done it already where it says @-@."""
    return re.sub(r"(?<=[^\s@])-(?=[^\s@])", " @-@ ", text)


def read_hypotheses(path: Path) -> list[str]:
    """The translations in an output of fairseq-generate, in the order of the text."""
    found = {}
    for line in lines(path):
        if match := re.match(r"H-(\d+)\t[^\t]*\t(.*)", line):
            found[int(match[1])] = match[2]
    if sorted(found) != list(range(len(found))):
        sys.exit(f"score.py: {path} lacks some of the translations.")
    return [found[number] for number in range(len(found))]


def score(model: Path, part: str, references: Path, tokens: Path) -> dict[str, object]:
    """Both scores of one part."""
    hypotheses = read_hypotheses(model / f"{part}.out")
    tokenized = list(lines(tokens / f"{part}.de"))
    plain = list(lines(references / f"{part}.de"))
    if not len(hypotheses) == len(tokenized) == len(plain):
        sys.exit(f"score.py: {model / part}.out has {len(hypotheses)} translations of {len(plain)} sentences.")
    # That they are tokenised is what is wanted here.
    literature = BLEU(tokenize="none", force=True, smooth_method="none")
    split = literature.corpus_score(
        [split_compounds(line) for line in hypotheses], [[split_compounds(line) for line in tokenized]]
    )
    detokenizer = MosesDetokenizer(lang="de")
    metric = BLEU()
    detokenized = [detokenizer.detokenize(line.split()) for line in hypotheses]
    return {
        "tokenized_bleu": round(split.score, 2),
        "sacrebleu": round(metric.corpus_score(detokenized, [plain]).score, 2),
        "signature": str(metric.get_signature()),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Score what fairseq-generate has translated.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--references", type=Path, required=True, metavar="DIR", help="untouched valid.de and test.de")
    parser.add_argument("--tokens", type=Path, required=True, metavar="DIR", help="tokenised valid.de and test.de")
    options = parser.parse_args(arguments)
    parts = {part: score(options.model, part, options.references, options.tokens) for part in TITLES}
    result = {**read_training(options.model), **parts}
    text = ""
    for part, title in TITLES.items():
        text += f"{title}: tokenised BLEU, compounds split = {parts[part]['tokenized_bleu']}\n"
        text += f"{title}: sacreBLEU = {parts[part]['sacrebleu']} ({parts[part]['signature']})\n"
    write(options.model / "result.txt", text)
    write(options.model / "result.json", json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
