"""Forks a process for each call of the client: server.py SOCKET. It ends when its standard input does."""

import atexit
import faulthandler
import gc
import json
import logging
import os
import random
import runpy
import select
import signal
import socket
import sys
import threading
import warnings

# Not the plugin, which commands import when they are told to, nor fairseq_cli, which sets up the log.
import fairseq  # noqa: F401
import numpy as np
import sacrebleu  # noqa: F401
import torch
import torch._dynamo  # every optimizer of torch imports it
from hydra.core.override_parser.overrides_parser import OverridesParser

# The parser keeps what it has learnt of its grammar.
OverridesParser.create().parse_overrides(
    ["a.b=1", "+c='x'", "d=null", "e=[1,2.5]", "f=True", "a/b=c", "g=1e-3", 'h="a"', "i=-1", "j={k:1}", "l=", "~m"]
)
_OWN_THREADS = torch.get_num_threads()


def serve(address: str) -> None:
    """Take calls until the standard input ends."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    if sys.dont_write_bytecode:
        # The sources need not be compiled again in every process for that.
        sys.pycache_prefix, sys.dont_write_bytecode = os.path.join(os.path.dirname(address), "compiled"), False
    # What is here now is no garbage: processes that look for some need not walk over it, nor copy its pages.
    gc.collect()
    gc.freeze()
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:
            return
        client, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            os._exit(supervise(client))
        client.close()


def supervise(client: socket.socket) -> int:
    """Fork what was called, and see to it that it and the client end together."""
    length, streams, _, _ = socket.recv_fds(client, 8, 3)
    data = b""
    while len(data) < int.from_bytes(length, "big"):
        data += client.recv(1 << 16)
    process = os.fork()
    if process == 0:
        client.close()
        run(streams, **json.loads(data))
    for stream in streams:
        os.close(stream)
    client.sendall(process.to_bytes(8, "big"))
    end = os.pidfd_open(process)
    ready, _, _ = select.select([end, client], [], [])
    if end not in ready:
        os.kill(process, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    client.sendall(status.to_bytes(8, "big", signed=True))
    return 0


def run(streams: list[int], arguments: list[str], cwd: str, environment: dict[str, str]) -> None:
    """Be the process that was called; does not return."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    by_line = 1 if environment.get("PYTHONUNBUFFERED") or os.isatty(1) else -1
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", by_line, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    start_anew(environment)
    status = 0
    try:
        execute(arguments, [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path])
    except SystemExit as exit_:
        if isinstance(exit_.code, str):
            print(exit_.code, file=sys.stderr)
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (BrokenPipeError, ValueError):
            status = status or 120
    os._exit(status & 0xFF)


def start_anew(environment: dict[str, str]) -> None:
    """Undo what the imports have set up, and do what a new interpreter does."""
    # fairseq's import sets up a log, which its commands do first.
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    random.seed()
    np.random.seed()
    if environment.get("PYTHONWARNINGS"):
        warnings._processoptions(environment["PYTHONWARNINGS"].split(","))  # type: ignore[attr-defined]
    if environment.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
    threads = int(environment.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    if threads != _OWN_THREADS:
        torch.set_num_threads(threads)


def execute(arguments: list[str], python_path: list[str]) -> None:
    """What ``python`` does with these arguments."""
    own = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [*python_path, *(path for path in sys.path if path != own)]
    kind, rest = arguments[0], arguments[1:]
    if kind == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(kind)))
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
