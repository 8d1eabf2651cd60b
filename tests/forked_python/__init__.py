"""A ``python`` for tests that need not import torch and fairseq again.

Most of the time of a small command goes into these imports. A server that has done them forks a process for each call
of the ``python`` that ``path`` names. That process has the arguments, folder, environment and standard streams of the
call, has not imported the plugin, takes the signals that the caller gets, and ends when the caller is killed. The
processes that a torchrun among them starts are made in the same way. What must be new from its very start, such as the
reading of PYTHON* variables that torch or the interpreter look at early, and what is about how the interpreter ends,
wants ``sys.executable``.
"""

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


_starting = threading.Lock()


def path() -> str:
    """Path of a program that takes the arguments of ``python``; its server lives as long as this process."""
    with _starting:
        return _start()


@functools.cache
def _start() -> str:
    folder = Path(tempfile.mkdtemp(prefix="python-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    program, address = folder / "python", str(folder / "socket")
    settings = f"#!{sys.executable} -IS\nPYTHON, SERVER = {sys.executable!r}, {address!r}\n"
    program.write_text(settings + (HERE / "client.py").read_text())
    program.chmod(0o755)
    environment = {**os.environ, "PYTHONUTF8": "1"}
    reading, writing = os.pipe()  # When this process ends, whatever way, the server finds it closed.
    os.set_inheritable(writing, False)
    command = [sys.executable, str(HERE / "server.py"), address]
    with open(folder / "log", "w") as log:
        subprocess.Popen(command, stdin=reading, stdout=log, stderr=log, env=environment, start_new_session=True)
    os.close(reading)
    while not (folder / "socket").exists():
        if "Error" in (folder / "log").read_text():
            raise RuntimeError((folder / "log").read_text())
        time.sleep(0.01)
    return str(program)
