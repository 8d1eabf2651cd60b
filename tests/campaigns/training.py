"""What the campaigns that train have in common: a small corpus, and trainings in processes that start at once.

Most of the time of a fairseq command is its imports. Here they are done once; each training is a fork of this process
that calls the command's main function, with its messages in a file.
"""

import contextlib
import json
import os
import random
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fwp_fairseq.fairseq_mends.safe_loading import load_checkpoint_file

ROOT = Path(__file__).resolve().parents[2]


def in_child(log: Path, work: Callable[[], Any]) -> int:
    """Start a process that does the work, with its output appended to the log; its number."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with log.open("a") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        work()
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def fairseq(tool: str, *arguments: object) -> Callable[[], Any]:
    """The work of fairseq-TOOL with these arguments."""

    def work() -> None:
        import importlib

        module = importlib.import_module(f"fairseq_cli.{tool}")
        sys.argv = [f"fairseq-{tool}", *map(str, arguments)]
        module.cli_main()

    return work


def status_of(child: int) -> int:
    """Wait for a process; its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(log: Path, work: Callable[[], Any]) -> int:
    return status_of(in_child(log, work))


def make_corpus(folder: Path, train: int = 400, other: int = 40) -> Path:
    """A binarised corpus in two artificial languages, as that of tests/conftest.py; its folder."""
    data = folder / "data-bin"
    if (data / "test.a-b.b.idx").exists():
        return data
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(1)
    words = [consonant + vowel for consonant in "bdgk" for vowel in "aeiou"]
    for split, size in {"train": train, "valid": other, "test": other}.items():
        sentences = [draw.choices(words, k=draw.randint(2, 6)) for _ in range(size)]
        (folder / f"{split}.a").write_text("".join(" ".join(s) + "\n" for s in sentences))
        (folder / f"{split}.b").write_text("".join(" ".join(s).upper() + "\n" for s in sentences))
    splits = [f"--{split}pref={folder / split}" for split in ("train", "valid", "test")]
    status = run(folder / "preprocess.log", fairseq("preprocess", "-s", "a", "-t", "b", *splits, "--destdir", data))
    if status:
        sys.exit(f"fairseq-preprocess failed: {folder / 'preprocess.log'}")
    return data


def read_records(log: Path) -> list[dict[str, Any]]:
    """What a campaign has found so far. A last line that a kill cut short is taken away: its case is run again."""
    if not log.exists():
        return []
    whole = log.read_text().rpartition("\n")[0]
    log.write_text(whole + "\n" if whole else "")
    return [json.loads(line) for line in whole.splitlines()]


def add_records(log: Path, records: list[dict[str, Any]]) -> None:
    with log.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def load(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return load_checkpoint_file(file)


def tensors(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors in nested dictionaries and lists, by their path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    else:
        return {}
    return {path: t for key, item in items for path, t in tensors(item, f"{name}.{key}").items()}


def same_bits(a: Path, b: Path) -> bool:
    """Whether two checkpoints have the same parameters, the same state of the optimizer and the same updates."""
    left, right = load(a), load(b)
    counts = [state["optimizer_history"][-1]["num_updates"] for state in (left, right)]
    parts = [tensors([state["model"], state["last_optimizer_state"]]) for state in (left, right)]
    return (
        counts[0] == counts[1]
        and parts[0].keys() == parts[1].keys()
        and all(torch.equal(value, parts[1][name]) for name, value in parts[0].items())
    )
