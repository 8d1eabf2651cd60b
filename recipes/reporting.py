"""Tables in Markdown, what a training has left, and files that are written whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def read_training(model: Path) -> dict[str, Any]:
    """Row and size of a trained model, the epochs that it had, and whether these are all."""
    row, size, *_ = (model / "settings").read_text(encoding="utf-8").splitlines()
    log = (model / "train.log").read_text(encoding="utf-8")
    epochs = max((int(epoch) for epoch in re.findall(r"\| valid \| epoch (\d+) \|", log)), default=0)
    return {"row": row, "size": size, "epochs": epochs, "finished": (model / ".trained").exists()}


def epochs_of(result: dict[str, Any]) -> str:
    """The epochs of a training, for a table."""
    return f"{result['epochs']}{'' if result['finished'] else ', unfinished'}"


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
