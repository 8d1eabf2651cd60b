"""Writing of checkpoints that leaves whole files only, whenever it is interrupted.

fairseq writes a new checkpoint beside the old one and renames it, but then copies it byte by byte over
checkpoint_last.pt or checkpoint_best.pt: killed at that, it leaves half a file, with which no training can go on. After
an error, such as a full disk, it tries again twice, behind what it has already written.

It can go when fairseq renames whole files into place, also for the checkpoints that it copies.
"""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

CHANGES = ("fairseq.checkpoint_utils.torch_persistent_save", "fairseq.checkpoint_utils.PathManager")


def replace_atomically(path: str, write: Callable[[BinaryIO], Any]) -> None:
    """Let ``write`` fill the file ``path``, which has its old content or the whole new one whatever happens meanwhile.

    Raises OSError, with the name of the file, if it cannot be written.
    """
    unfinished = f"{path}.tmp"
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        _sync_folder(os.path.dirname(os.path.abspath(path)))
    except (OSError, RuntimeError) as error:
        # torch wraps what the system says, or replaces it by the position in its archive.
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error).splitlines()[0]
        earlier = "the earlier file of this name is as it was" if os.path.exists(path) else "there is no such file"
        raise OSError(f"{path} could not be written ({reason}); {earlier}. Make space and start again.") from error
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _sync_folder(folder: str) -> None:
    """Let the names in a folder outlast a power failure, on a file system that can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_whole(state: dict[str, Any], path: str) -> None:
    """Save the state of a training. Raises OSError as above."""
    replace_atomically(path, lambda file: torch.save(state, file))


def install() -> None:
    """Make fairseq save in this way."""
    from fairseq import checkpoint_utils
    from fairseq.file_io import PathManager

    fairseq_save = checkpoint_utils.torch_persistent_save

    def save(obj: Any, filename: str, async_write: bool = False) -> None:
        if async_write or not PathManager.supports_rename(filename):
            return fairseq_save(obj, filename, async_write)
        save_whole(obj, filename)

    checkpoint_utils.torch_persistent_save = save
    checkpoint_utils.PathManager = type("PathManager", (_AtomicCopies, PathManager), {})


class _AtomicCopies:
    """Mixed into fairseq's PathManager: its copies on a local disk are whole or not there."""

    @staticmethod
    def copy(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        from fairseq.file_io import PathManager

        if any(PathManager.path_requires_pathmanager(path) for path in (src_path, dst_path)):
            return PathManager.copy(src_path, dst_path, overwrite)
        with open(src_path, "rb") as source:
            replace_atomically(dst_path, lambda file: shutil.copyfileobj(source, file, 2**20))
        return True
