"""Work on the lines of large text files with all cores, in order and in bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

CHUNK = 5000
Result = TypeVar("Result")
_work: Callable[[list[str]], object]


def lines(path: Path) -> Iterator[str]:
    """Lines without their ends. Only a line feed ends one, not the other characters that Unicode has for it."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield line.rstrip("\n")


def chunks(items: Iterable[str]) -> Iterator[list[str]]:
    """Lists of CHUNK lines."""
    chunk: list[str] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _set_up(make: Callable[..., Callable[[list[str]], object]], arguments: tuple[object, ...]) -> None:
    global _work
    _work = make(*arguments)


def _run(chunk: list[str]) -> object:
    return _work(chunk)


def each_chunk(
    items: Iterable[str], jobs: int, make: Callable[..., Callable[[list[str]], Result]], *arguments: object
) -> Iterator[Result]:
    """What make(*arguments), called once in every process, gives for each chunk of the lines, in order."""
    if jobs == 1:
        yield from map(make(*arguments), chunks(items))
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), _set_up, (make, arguments)) as pool:
        running: deque[Future[Result]] = deque()
        for chunk in chunks(items):
            running.append(pool.submit(_run, chunk))  # type: ignore[arg-type]
            # More would be kept in memory without making it faster.
            if len(running) == 4 * jobs:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def write_lines(path: Path, text: Iterable[str]) -> int:
    """Write lines to a file, whole or not at all; their number."""
    temporary = path.with_name(path.name + ".new")
    count = 0
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        for line in text:
            file.write(line + "\n")
            count += 1
    os.replace(temporary, path)
    return count
