"""Running the scripts of the recipes, with the Python and the packages that run the tests."""

import os
import socket
import subprocess
from pathlib import Path

import forked_python
from conftest import ROOT

RECIPES = ROOT / "recipes"

# Nothing in a path may be special to bash, to pip, or to fairseq.
AWKWARD = 'it\'s a "folder" $HOME'


def environment(**variables: str) -> dict[str, str]:
    """The environment of a script: no settings but these, the Python of the tests as it is, one thread."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("FWP_")}
    return own | {"PYTHON": forked_python.path(), "FWP_VENV": "none", "FWP_THREADS": "1"} | variables


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def script(path: Path, *arguments: object, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script of a recipe to its end."""
    return subprocess.run(
        ["bash", str(path), *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(**variables),
        check=False,
    )


def succeed(path: Path, *arguments: object, **variables: str) -> str:
    """Run a script that has to succeed; what it prints."""
    done = script(path, *arguments, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_one_sentence(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """The script has stopped with one line about what is wrong, which has these words in it."""
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr
