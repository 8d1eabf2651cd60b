"""The folder of an exported model: graphs, dictionaries, subwords, and ``model.json``, which says what is what."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import onnx

# What a program that reads the folder must know (recipes/onnx/exported.py).
FORMAT = 1
DESCRIPTION = "model.json"

# Protocol buffers end at 2 GiB: a model with more has its weights in a file of their own.
LARGEST_FILE = 2**31 - 2**24


def check_empty(folder: Path) -> None:
    """Raise ValueError unless the folder can be made, or is there and empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"--output is {folder}, which is there and not empty: give the name of a new folder")


def write_folder(
    folder: Path,
    graphs: Mapping[str, onnx.ModelProto],
    dictionaries: Mapping[str, Any],
    subwords: Optional[tuple[str, Path]],
    description: Mapping[str, Any],
    extra: Mapping[str, bytes],
) -> None:
    """Write a model as a whole or not at all. ``subwords``: their kind and file. ``extra``: further files."""
    check_empty(folder)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        for name, graph in graphs.items():
            save_graph(graph, unfinished / f"{name}.onnx")
        for side, dictionary in dictionaries.items():
            dictionary.save(str(unfinished / f"{side}.dict.txt"))
        if subwords is not None:
            shutil.copyfile(subwords[1], unfinished / subwords[0])
        for name, content in extra.items():
            (unfinished / name).write_bytes(content)
        about = {
            "format": FORMAT,
            **description,
            "graphs": {name: f"{name}.onnx" for name in graphs},
            "dictionaries": {side: f"{side}.dict.txt" for side in dictionaries},
            "subwords": None if subwords is None else {"kind": subwords[0], "file": subwords[0]},
            "sha256": {file.name: _digest(file) for file in sorted(unfinished.iterdir())},
        }
        (unfinished / DESCRIPTION).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", "utf-8")
        if folder.exists():
            folder.rmdir()
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def save_graph(graph: onnx.ModelProto, file: Path, largest: int = LARGEST_FILE) -> None:
    """Write a graph; one that is larger than ``largest`` bytes has its weights in a file beside it, NAME.onnx.data."""
    external = sum(len(weight.raw_data) for weight in graph.graph.initializer) > largest
    onnx.save_model(
        graph, str(file), save_as_external_data=external, location=f"{file.name}.data" if external else None
    )


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()
