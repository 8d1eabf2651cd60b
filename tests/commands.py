"""Commands in processes of their own that need not import torch and fairseq again.

Most of the time of a small command goes into these imports. A server that has done them forks a process for each
command, which is otherwise as a new one: its own arguments, folder, standard streams and log settings, and the plugin
not yet imported.
"""

import atexit
import faulthandler
import logging
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_SECONDS = 300

_context: Any = multiprocessing.get_context("forkserver")
# Not the plugin, which commands import when they are told to, nor fairseq_cli, which sets up the log.
_context.set_forkserver_preload(["torch", "fairseq", "sacrebleu", "commands"])


def run_forked(
    program: str, arguments: Sequence[str], stdin: str = "", cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run a script of Python, or ``python`` with ``-m`` or ``-c``; its output is text."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "stdin").write_text(stdin)
        process = _context.Process(target=_run, args=(program, list(arguments), folder, str(cwd)))
        process.start()
        process.join(_SECONDS)
        command = [program, *arguments]
        output, errors = ((Path(folder) / name).read_text(errors="replace") for name in ("stdout", "stderr"))
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(command, _SECONDS, output, errors)
        return subprocess.CompletedProcess(command, process.exitcode, output, errors)


def _run(program: str, arguments: list[str], folder: str, cwd: str) -> None:
    """What the forked process does."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        file = os.open(os.path.join(folder, name), os.O_RDONLY if name == "stdin" else os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    faulthandler.enable()
    # fairseq's import sets up a log, which the commands do first.
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    os.chdir(cwd)
    here = str(Path(__file__).parent)
    sys.path[:] = [str(ROOT), *(path for path in sys.path if path not in ("", here, str(ROOT)))]
    try:
        if program != "python":
            _run_file(program, arguments)
        elif arguments[0] == "-m":
            sys.path.insert(0, cwd)
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            sys.path.insert(0, cwd)
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            _run_file(arguments[0], arguments[1:])
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        # multiprocessing ends a process without these.
        atexit._run_exitfuncs()


def _run_file(path: str, arguments: list[str]) -> None:
    sys.argv = [path, *arguments]
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    runpy.run_path(path, run_name="__main__")
