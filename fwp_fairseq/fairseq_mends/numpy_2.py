"""fairseq finds what numpy has taken away since fairseq was written.

Its data sets ask for ``np.compat.long``, which went with numpy 2.0, and ``np.percentile`` with ``interpolation``, which
went with 2.4: a language model over sentences, or ``--num-batch-buckets``, ended in AttributeError or TypeError before
the first update. The layer of conditional random fields asks for ``np.float``, which went with 1.24. Only the modules
that ask see these again; numpy itself is left as it is.

It can go when fairseq works with numpy 2.4.
"""

import importlib
import types
from typing import Any

import numpy as np

_MODULES = (
    "fairseq.data.data_utils",
    "fairseq.data.language_pair_dataset",
    "fairseq.data.token_block_dataset",
    "fairseq.modules.dynamic_crf_layer",
)
CHANGES = tuple(f"{name}.np" for name in _MODULES)


def _percentile(*args: Any, interpolation: str = "linear") -> Any:
    """``np.percentile`` by the old name of its ``method``."""
    return np.percentile(*args, method=interpolation)  # type: ignore[call-overload]


def install() -> None:
    """Give the modules a copy of numpy with the old names."""
    numpy = types.ModuleType(np.__name__, np.__doc__)
    long = types.SimpleNamespace(long=int)
    numpy.__dict__.update(np.__dict__, compat=long, float=float, percentile=_percentile)
    for name in _MODULES:
        importlib.import_module(name).np = numpy  # type: ignore[attr-defined]
