#!/usr/bin/env python3
"""Translate lines with fairseq's search and with exported models, and compare words, log-probabilities and BLEU:

    python agreement.py --path checkpoint_best.pt --source test.en --reference test.de exported exported-int8

Lines are plain text, which the exported model cuts into pieces. Needs fairseq and sacrebleu as well.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from beam_search import SearchOptions
from exported import ExportedModel

# Scores that are closer than that tie: float32 sums in another order differ by less.
TIE = 1e-4


class Translation(NamedTuple):
    """The best two scores tell whether the best one was nearly another."""

    tokens: list[int]
    log_probabilities: np.ndarray
    scores: list[float]


def by_fairseq(args: argparse.Namespace, sentences: Sequence[list[int]]) -> Iterator[Translation]:
    """The best translation of each sentence by fairseq's own search."""
    from fairseq.sequence_generator import SequenceGenerator

    from fwp_fairseq.export_onnx import load_model

    model, task, cfg = load_model(args.path, args.data)
    model.prepare_for_inference_(cfg)
    words = task.target_dictionary
    limits = {"beam_size": args.beam, "max_len_a": args.max_len_a, "max_len_b": args.max_len_b}
    generator = SequenceGenerator([model], words, **limits)
    for start in range(0, len(sentences), args.batch_size):
        batch = [torch.tensor([*sentence, words.eos()]) for sentence in sentences[start : start + args.batch_size]]
        lengths = torch.tensor([len(tokens) for tokens in batch])
        source = torch.full((len(batch), int(lengths.max())), words.pad())
        for row, tokens in zip(source, batch):
            row[len(row) - len(tokens) :] = tokens
        for found in generator.generate([model], {"net_input": {"src_tokens": source, "src_lengths": lengths}}):
            best = found[0]
            scores = [float(hypothesis["score"]) for hypothesis in found]
            yield Translation(best["tokens"].tolist(), best["positional_scores"].numpy(), scores)


def by_exported(
    args: argparse.Namespace, model: ExportedModel, sentences: Sequence[list[int]]
) -> Iterator[Translation]:
    """The best translation of each sentence by the exported model."""
    options = SearchOptions(beam=args.beam, max_len_a=args.max_len_a, max_len_b=args.max_len_b)
    for start in range(0, len(sentences), args.batch_size):
        for found in model.translate(sentences[start : start + args.batch_size], options):
            best = found[0]
            scores = [hypothesis.score for hypothesis in found]
            yield Translation(best.tokens.tolist(), best.log_probabilities, scores)


def compare(args: argparse.Namespace) -> None:
    """Print how far the models agree. Raises ValueError and OSError for what cannot be read."""
    import sacrebleu

    lines = args.source.read_text("utf-8").splitlines()
    references = args.reference.read_text("utf-8").splitlines() if args.reference else None
    if references is not None and len(references) != len(lines):
        raise ValueError(f"{args.reference} has {len(references)} lines, {args.source} has {len(lines)}")
    models = {folder: ExportedModel(folder, "translation", args.threads) for folder in args.models}
    first = next(iter(models.values()))
    sentences = [first.encode(line) for line in lines]
    expected = list(by_fairseq(args, sentences))
    found = {str(folder): list(by_exported(args, model, sentences)) for folder, model in models.items()}
    print(f"{len(lines)} lines, beam {args.beam}")
    for name, translations in {"fairseq": expected, **found}.items():
        report = [name]
        if references is not None:
            outputs = [first.decode(translation.tokens[:-1]) for translation in translations]
            report.append(f"BLEU {sacrebleu.corpus_bleu(outputs, [references]).score:.2f}")
        if name != "fairseq":
            pairs = list(zip(translations, expected))
            same = [(ours, theirs) for ours, theirs in pairs if ours.tokens == theirs.tokens]
            ties = [theirs for ours, theirs in pairs if ours.tokens != theirs.tokens and _ties(theirs)]
            furthest = max(
                (np.abs(ours.log_probabilities - theirs.log_probabilities).max() for ours, theirs in same), default=0.0
            )
            report.append(
                f"the same words in {len(same)}, a tie in {len(ties)}, others in {len(pairs) - len(same) - len(ties)}"
            )
            report.append(f"log-probabilities differ by {furthest:.1e} at most")
        print(": ".join([report[0], ", ".join(report[1:])]))


def _ties(translation: Translation) -> bool:
    return len(translation.scores) > 1 and abs(translation.scores[0] - translation.scores[1]) < TIE


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, or leave with a message and status 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", nargs="+", type=Path, metavar="MODEL", help="folder that fwp_fairseq.export_onnx wrote")
    add("--path", type=Path, required=True, help="checkpoint that they were made of")
    add("--data", type=Path, help="folder with its dictionaries, if they are not beside it")
    add("--source", type=Path, required=True, help="lines to translate")
    add("--reference", type=Path, help="their translations, for BLEU")
    add("--beam", type=int, default=5)
    add("--max-len-a", type=float, default=0.0)
    add("--max-len-b", type=int, default=200)
    add("--batch-size", type=int, default=64)
    add("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    # Some modules of fairseq would have everything logged.
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(args.threads)
    try:
        compare(args)
    except (OSError, ValueError) as error:
        sys.exit(f"agreement.py: {str(error).rstrip('.')}.")


if __name__ == "__main__":
    main()
