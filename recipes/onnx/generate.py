#!/usr/bin/env python3
"""Continue lines with a language model that was exported from fairseq: python generate.py MODEL < prompts

Needs numpy and onnxruntime, and sentencepiece if the model has such pieces; neither torch nor fairseq. Lengths and
scores are of what comes after the line, as with --task streaming_language_modeling. A line without words gives an
empty line.
"""

from __future__ import annotations

from collections.abc import Sequence

from command_line import answer, parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Generate as the command line says."""
    made = parser("Continue lines with a language model that was exported from fairseq.", "continue", 100)
    answer("generate.py", "language", made.parse_args(arguments), lambda model: model.go_on, before=True)


if __name__ == "__main__":
    main()
