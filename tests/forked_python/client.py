"""The ``python`` that is called. ``path`` puts before this what PYTHON and SERVER are."""

import json
import os
import signal
import socket
import sys

PYTHON = globals().get("PYTHON", sys.executable)
SERVER = globals().get("SERVER", "")


def main() -> None:
    """Hand the call over to the server and end as the process that it forks."""
    arguments = sys.argv[1:]
    # torchrun starts its processes with this, too, and with -u.
    environment = {**os.environ, "PYTHON_EXEC": sys.argv[0]}
    if arguments[:1] == ["-u"]:
        arguments = arguments[1:]
        environment["PYTHONUNBUFFERED"] = "1"
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-m", "-c")):
        # Options, and programs that come from the standard input.
        os.execv(PYTHON, [PYTHON, *sys.argv[1:]])
    server = socket.socket(socket.AF_UNIX)
    server.connect(SERVER)
    call = json.dumps({"arguments": arguments, "cwd": os.getcwd(), "environment": environment}).encode()
    socket.send_fds(server, [len(call).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(call)
    process = int.from_bytes(server.recv(8), "big")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: os.kill(process, number))
    status = int.from_bytes(server.recv(8), "big", signed=True)
    if status < 0:
        # It was ended by a signal, and so is this.
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


main()
