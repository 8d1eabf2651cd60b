"""What the tests compile is kept between runs, as long as sources, command and compiler are the same."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path


def compile_once(cache: Path, command: Sequence[str], sources: Sequence[Path], build: Callable[[Path], None]) -> Path:
    """The file that ``build`` makes of the ``sources`` where it is told to; ``command`` is what it runs for that."""
    seen = hashlib.sha256("\0".join(command).encode())
    seen.update(subprocess.check_output([command[0], "--version"]))
    for source in sorted(sources):
        seen.update(source.read_bytes())
    made = cache / seen.hexdigest()[:32]
    if not made.exists():
        # Under another name first: it may be killed, and other processes may want the same.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            unfinished = Path(folder) / "made"
            build(unfinished)
            os.replace(unfinished, made)
    return made


def caching_compiler(cache: Path, folder: Path, versions: Path) -> Path:
    """A program for CXX, in ``folder``: g++ that keeps what it compiles, without optimisation, since it runs little.

    ``versions`` is a file that changes when those headers do that do not lie with the sources.
    """
    program = folder / "caching-g++"
    call = f"compiled.compile_as(pathlib.Path({str(cache)!r}), pathlib.Path({str(versions)!r}), sys.argv[1:])"
    path = str(Path(__file__).resolve().parent)
    program.write_text(
        f"#!{sys.executable}\nimport pathlib, sys\nsys.path.insert(0, {path!r})\nimport compiled\n{call}\n"
    )
    program.chmod(0o755)
    return program


def compile_as(cache: Path, versions: Path, arguments: list[str]) -> None:
    """What g++ does with these arguments, of sources that lie together with their headers; links as it does."""
    if "-c" not in arguments:
        os.execvp("g++", ["g++", *arguments])
    at = arguments.index("-o")
    command = ["g++", *arguments[:at], *arguments[at + 2 :], "-O0"]
    folder = Path(arguments[arguments.index("-c") + 1]).parent

    def build(made: Path) -> None:
        subprocess.run([*command, "-o", str(made)], check=True)

    sources = [path for path in folder.iterdir() if path.is_file()]
    shutil.copyfile(compile_once(cache, command, [*sources, versions], build), arguments[at + 1])
