"""What the two programs have in common: options of the search, lines in, lines out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from beam_search import Hypothesis, SearchOptions, batches
from exported import BadModel, ExportedModel

# Lines that are read before the first is answered, unless someone is typing.
_BUFFER = 64


def parser(description: str, what: str, max_len_b: int) -> argparse.ArgumentParser:
    """Options, of which those of the search are fairseq's."""
    made = argparse.ArgumentParser(description=description)
    add = made.add_argument
    add("model", type=Path, help="folder that fwp_fairseq.export_onnx wrote")
    add("text", nargs="*", help=f"what to {what}; without it, each line of standard input")
    add("--beam", type=_count, default=5, help="width of the search (5)")
    add("--nbest", type=_count, default=1, help="so many outputs for each line (1)")
    add("--lenpen", type=float, default=1.0, help="above 1 for longer outputs, below 1 for shorter ones (1)")
    add("--unkpen", type=float, default=0.0, help="above 0 for fewer unknown words (0)")
    add("--unnormalized", action="store_true", help="compare sums of log-probabilities, not means")
    add("--min-len", type=int, default=1, help="fewest pieces of an output (1)")
    add("--max-len-a", type=float, default=0.0, help="most pieces are A times those of the source + B (0)")
    add("--max-len-b", type=int, default=max_len_b, help=f"see --max-len-a ({max_len_b})")
    add("--batch-size", type=_count, default=_BUFFER, help=f"lines that are worked on at once ({_BUFFER})")
    add("--buffer-size", type=_count, help=f"lines that are read before they are answered ({_BUFFER}; typed ones: 1)")
    add("--threads", type=int, default=0, help="threads of onnxruntime (0: as many as there are cores)")
    add("--scores", action="store_true", help="before each output its score, to the base 2, and a tab")
    return made


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


Work = Callable[[Sequence[list[int]], SearchOptions], list[list[Hypothesis]]]


def answer(program: str, kind: str, args: Any, work: Callable[[ExportedModel], Work], before: bool) -> None:
    """Answer every line; leave with one sentence and status 1 where that cannot be done.

    ``before``: an output has the line itself in front.
    """
    if args.nbest > args.beam:
        sys.exit(f"{program}: --nbest is {args.nbest}, but --beam is {args.beam}: a search finds no more than that")
    names = ("beam", "max_len_a", "max_len_b", "min_len", "lenpen", "unkpen", "unnormalized")
    options = SearchOptions(**{name: getattr(args, name) for name in names})
    try:
        model = ExportedModel(args.model, kind, args.threads)
        for lines in _buffers(args):
            encoded = [model.encode(line) for line in lines]
            wanted = [number for number, words in enumerate(encoded) if words]
            outputs: list[list[str]] = [[""] * args.nbest for _ in lines]
            for batch in batches([len(encoded[number]) for number in wanted], args.batch_size):
                numbers = [wanted[place] for place in batch]
                for number, hypotheses in zip(numbers, work(model)([encoded[n] for n in numbers], options)):
                    prompt = encoded[number] if before else []
                    outputs[number] = [_format(model, prompt, h, args.scores) for h in hypotheses[: args.nbest]]
            for line in outputs:
                print(*line, sep="\n", flush=True)
    except (BadModel, ValueError) as error:
        sys.exit(f"{program}: {error}.")
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(1)


def _format(model: ExportedModel, prompt: list[int], hypothesis: Hypothesis, scores: bool) -> str:
    text = model.decode([*prompt, *hypothesis.tokens.tolist()])
    return f"{hypothesis.score / 0.6931471805599453:.4f}\t{text}" if scores else text


def _buffers(args: Any) -> Iterator[list[str]]:
    if args.text:
        yield args.text
        return
    size = args.buffer_size or (1 if sys.stdin.isatty() else max(_BUFFER, args.batch_size))
    sys.stdin.reconfigure(encoding="utf-8", errors="replace", newline="\n")  # type: ignore[union-attr]
    lines: list[str] = []
    for line in sys.stdin:
        lines.append(line.rstrip("\n"))
        if len(lines) == size:
            yield lines
            lines = []
    if lines:
        yield lines
