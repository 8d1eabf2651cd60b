"""Registration with fairseq, however this package is imported: as --user-dir, before fairseq, or after it.

fairseq imports a user dir only if nobody has imported it before; else it says "has already been imported" and goes on
without its models and without safe loading of checkpoints. ``fwp_fairseq.ops`` needs no fairseq, nor imports it.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Optional


def require_fairseq() -> None:
    """Say how to install fairseq if it is missing: many people have one of their own, which pip cannot know.

    Raises ImportError: no module of that name. A fairseq that is there but fails to import speaks for itself.
    """
    try:
        import fairseq  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "fairseq":
            raise
        raise ImportError(
            "fwp_fairseq needs fairseq for its models and layers: install it with "
            "`pip install 'fwp-fairseq[fairseq]'`, or from its source."
        ) from None


def register_with_fairseq() -> None:
    """Register models, tasks, criterions and schedules and mend fairseq: now if fairseq is there, else once it is."""
    if sys.modules.get("fairseq") is not None:
        _register()
    elif not any(isinstance(finder, _AfterFairseq) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterFairseq())


def _register() -> None:
    importlib.import_module("fwp_fairseq.fairseq_mends").install()
    # They register what they define.
    importlib.import_module("fwp_fairseq.models")
    importlib.import_module("fwp_fairseq.tasks")


class _AfterFairseq(MetaPathFinder):
    """Finds fairseq where it is, and sees to it that ``_register`` runs right after its first import."""

    def __init__(self) -> None:
        self._is_asked = False

    def find_spec(
        self, fullname: str, path: Optional[Sequence[str]], target: Optional[ModuleType] = None
    ) -> Optional[ModuleSpec]:
        if fullname != "fairseq" or self._is_asked:
            return None
        self._is_asked = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._is_asked = False
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            execute(module)
            sys.meta_path.remove(self)
            _register()

        loader.exec_module = exec_module
        return spec
