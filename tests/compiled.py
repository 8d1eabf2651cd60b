"""What the tests compile is kept between runs, as long as sources, command and compiler are the same."""

import hashlib
import os
import subprocess
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
