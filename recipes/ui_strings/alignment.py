#!/usr/bin/env python3
"""Alignment error of the attention of trained models: alignment.py --output outputs/ui_strings MODEL...

Each MODEL is a folder in OUTPUT/models. Reference translations of the test strings are scored, each target piece is
aligned to the source piece of the largest attention weight in each layer of the decoder (averaged over heads; with
softmax its own weights, with fast weights implied ones), and pieces are joined to words. Nobody has aligned these
strings by hand: the reference is statistical. Two IBM models 2 (nltk), one for each direction, learn from all strings;
what both say is sure, what one says is possible, and the error is Och and Ney's (2003):
1 - (|A and sure| + |A and possible|) / (|A| + |sure|). Needs nltk: pip install nltk
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Links = set[tuple[int, int]]

ITERATIONS = 5


def read_words(output: Path, part: str, language: str) -> list[list[str]]:
    return [line.lower().split() for line in (output / "corpus" / f"{part}.{language}").read_text("utf-8").splitlines()]


def statistical_links(sources: Sequence[list[str]], targets: Sequence[list[str]]) -> list[Links]:
    """Source and target word of each pair of sentences that IBM model 2 links, learned from them."""
    from nltk.translate import AlignedSent, IBMModel2

    pairs = [AlignedSent(target, source) for source, target in zip(sources, targets)]
    IBMModel2(pairs, ITERATIONS)
    return [{(s, t) for t, s in pair.alignment if s is not None} for pair in pairs]


def reference(output: Path) -> tuple[list[Links], list[Links]]:
    """Sure and possible links of the test strings. They take minutes to learn, and are kept."""
    file = output / "alignment.json"
    if not file.is_file():
        parts = ("train", "valid", "test")
        sources, targets = (
            [words for part in parts for words in read_words(output, part, language)] for language in ("en", "de")
        )
        forward = statistical_links(sources, targets)
        backward = [{(s, t) for t, s in links} for links in statistical_links(targets, sources)]
        count = len(read_words(output, "test", "en"))
        both = [
            [sorted(there & back), sorted(there | back)] for there, back in zip(forward[-count:], backward[-count:])
        ]
        new = file.with_suffix(".new")
        new.write_text(json.dumps(both))
        new.replace(file)
    both = json.loads(file.read_text())
    sure, possible = ([{(s, t) for s, t in pair[kind]} for pair in both] for kind in (0, 1))
    return sure, possible


def word_of(pieces: Iterable[str]) -> list[int]:
    """The word that each piece of sentencepiece belongs to."""
    words, word = [], -1
    for piece in pieces:
        word += piece.startswith("\u2581") or word < 0
        words.append(word)
    return words


def links_of_attention(model: Any, task: Any, source: str, target: str, layer: int) -> Links:
    """Words that the attention of a layer of the decoder links, of one sentence in pieces."""
    import torch

    pieces = source.split(), target.split()
    src, tgt = (
        words.encode_line(" ".join(side), add_if_not_exist=False, append_eos=True).long()[None]
        for words, side in zip((task.source_dictionary, task.target_dictionary), pieces)
    )
    with torch.no_grad():
        _, extra = model(
            src, torch.tensor([src.size(1)]), torch.cat([tgt[:, -1:], tgt[:, :-1]], dim=1), alignment_layer=layer
        )
    # Without the ends of the sentences.
    best = extra["attn"][0][0, :-1, :-1].argmax(dim=1).tolist()
    source_words, target_words = map(word_of, pieces)
    return {(source_words[s], target_words[t]) for t, s in enumerate(best)}


def error_rate(found: Sequence[Links], sure: Sequence[Links], possible: Sequence[Links]) -> float:
    agreed = sum(len(a & s) + len(a & p) for a, s, p in zip(found, sure, possible))
    return 1 - agreed / sum(len(a) + len(s) for a, s in zip(found, sure))


def evaluate(output: Path, names: Sequence[str]) -> None:
    """Print the error of each layer of each model. Raises ValueError and OSError for what cannot be read."""
    from fwp_fairseq.export_onnx import load_model

    sources, targets = ((output / "text" / f"test.{x}").read_text("utf-8").splitlines() for x in ("en", "de"))
    folders = [output / "models" / name for name in names]
    for folder in folders:
        if not (folder / "checkpoint_best.pt").is_file():
            raise ValueError(f"{folder} has no checkpoint_best.pt")
    sure, possible = reference(output)
    print(f"{len(sources)} strings, {sum(map(len, sure))} sure links, {sum(map(len, possible))} possible ones")
    for folder in folders:
        model, task, _ = load_model(folder / "checkpoint_best.pt", folder)
        model.eval()
        for layer in range(len(model.decoder.layers)):
            pairs = zip(sources, targets)
            found = [links_of_attention(model, task, source, target, layer) for source, target in pairs]
            print(f"{folder.name}, layer {layer + 1}: alignment error {100 * error_rate(found, sure, possible):.1f} %")


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate, or leave with a message and status 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="name of a trained model")
    parser.add_argument("--output", type=Path, default=Path("outputs/ui_strings"), help="output folder of run.sh")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    try:
        import nltk  # noqa: F401
    except ImportError:
        sys.exit("alignment.py: nltk is missing: pip install nltk")
    try:
        evaluate(args.output, args.models)
    except (OSError, ValueError) as error:
        sys.exit(f"alignment.py: {str(error).rstrip('.')}.")


if __name__ == "__main__":
    main()
