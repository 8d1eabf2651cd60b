#!/usr/bin/env python3
"""Write the documentation that every CPython ships as a corpus: python_docs.py --output DIR

Documents are the topics of help() (`pydoc_data.topics`) and the modules of the standard library. Of these the
docstrings are read: of those in Python without importing them, of those in C that are part of the interpreter as
help() does. A line is a paragraph. Paragraphs that recur are kept where they are first met, so that none is in two
parts; whole documents go to train, valid and test, by the hash of their name.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "ui_strings"))

from parallel import write_lines
from python_text import divide

# Packages of others, and tests.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "pydoc_data"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(source: str) -> Iterator[str]:
    """All docstrings of a module in Python."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            yield text


def builtin_docstrings(name: str) -> Iterator[str]:
    """All docstrings of a module in C."""
    module = importlib.import_module(name)
    for value in (module, *vars(module).values()):
        members = vars(value).values() if isinstance(value, type) else ()
        yield from (text for x in (value, *members) if isinstance(text := getattr(x, "__doc__", None), str))


def documents() -> dict[str, str]:
    """Topics and modules, by name."""
    found = dict(topics)
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if LEFT_OUT.isdisjoint(name.parts):
            text = "\n\n".join(docstrings(path.read_text(encoding="utf-8", errors="replace")))
            if text:
                found[str(name)] = text
    for module in sorted(sys.builtin_module_names):
        found[module] = "\n\n".join(dict.fromkeys(builtin_docstrings(module)))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the documentation that every CPython ships as a corpus.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for train, valid and test")
    output = parser.parse_args(arguments).output
    output.mkdir(parents=True, exist_ok=True)
    for part, text in divide(documents()).items():
        write_lines(output / part, text)
        print(f"{part}: {len(text)} paragraphs, {sum(len(line.split()) for line in text)} words")


if __name__ == "__main__":
    main()
