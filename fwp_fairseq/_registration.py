"""Registration with fairseq, however this package is imported: as --user-dir, before fairseq, or after it.

fairseq imports a user dir only if nobody has imported it before; else it says "has already been imported" and goes on
without its models and without safe loading of checkpoints. ``fwp_fairseq.ops`` needs no fairseq, nor imports it.
"""

import importlib
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
    if not any(isinstance(finder, _AfterFairseq) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterFairseq())
    # Looked at only now: another thread may have begun to import it without the finder.
    if sys.modules.get("fairseq") is not None:
        _register()


def _register() -> None:
    # Within the import of one of this package's own folders, which needs fairseq, that folder is not complete: modules
    # are imported from where they are, not from their folder.
    importlib.import_module("fwp_fairseq.fairseq_mends").install()
    # They register what they define.
    importlib.import_module("fwp_fairseq.models")
    importlib.import_module("fwp_fairseq.tasks")


class _AfterFairseq(MetaPathFinder):
    """Finds fairseq where the other finders do, and sees to it that ``_register`` runs right after its import."""

    def find_spec(
        self, fullname: str, path: Optional[Sequence[str]], target: Optional[ModuleType] = None
    ) -> Optional[ModuleSpec]:
        if fullname != "fairseq":
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            execute(module)
            _register()

        loader.exec_module = exec_module
        return spec
