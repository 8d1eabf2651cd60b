#!/usr/bin/env python3
"""Translate lines with a model that was exported from fairseq: python translate.py MODEL < source > translation

Needs numpy and onnxruntime, and sentencepiece if the model has such pieces; neither torch nor fairseq. A line without
words gives an empty line.
"""

from __future__ import annotations

from collections.abc import Sequence

from command_line import answer, parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Translate as the command line says."""
    args = parser("Translate lines with a model that was exported from fairseq.", "translate", 200).parse_args(
        arguments
    )
    answer("translate.py", "translation", args, lambda model: model.translate, before=False)


if __name__ == "__main__":
    main()
