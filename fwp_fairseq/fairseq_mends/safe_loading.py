"""Loading of checkpoints that cannot run code.

A checkpoint is a pickle, and unpickling calls whatever the file names. torch's ``weights_only`` unpickler calls only
what is on its list; this module adds to the list what fairseq puts into checkpoints besides tensors, and nothing else,
and sees to it that fairseq loads in this way whatever the environment or the version of fairseq says. Without that
fairseq 0.12.3 loads none of its own checkpoints with torch 2.6 and later, or, told to, runs what is in them.

Some options fairseq evaluates as Python. A checkpoint in which one of them is more than a value is refused, and so is a
training that would write one.

It can go when fairseq loads with weights_only and a list of its own, and evaluates no options.
"""

import argparse
import ast
import os
import pickle
import re
import types
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Optional

import numpy as np
import torch

from fwp_fairseq.fairseq_mends.trainings import of_trainings

CHANGES = (
    "fairseq.checkpoint_utils.torch",
    "fairseq.distributed.utils.torch",
    "fairseq.checkpoint_utils.load_checkpoint",
)

# Arrays of numbers occur in the meters (the n-gram counts of --eval-bleu). Arrays of objects never do.
_NUMBER_TYPES = [np.dtype(code) for code in ("bool", "i4", "i8", "f4", "f8")]


def _number_type(name: str, *_flags: bool) -> np.dtype:
    """Stand-in for ``numpy.dtype`` that knows numbers only, and returns numpy's own constants.

    A copy, which is what the original returns, takes its layout from the file: enough to make numpy read bytes of the
    file as pointers.
    """
    for number_type in _NUMBER_TYPES:
        if number_type.str[1:] == name:
            return number_type
    raise pickle.UnpicklingError(f"Unsupported GLOBAL numpy.dtype({name!r})")


_CHECKPOINT_GLOBALS: list[Any] = [
    argparse.Namespace,
    np.ndarray,
    (np.ndarray.__reduce__(np.zeros(0))[0], "numpy.core.multiarray._reconstruct"),
    (np.ndarray.__reduce__(np.zeros(0))[0], "numpy._core.multiarray._reconstruct"),
    (_number_type, "numpy.dtype"),
    *map(type, _NUMBER_TYPES),
]


def load_checkpoint_file(file: Any, map_location: Any = "cpu", extra_globals: tuple[Any, ...] = ()) -> Any:
    """Load a checkpoint of fairseq from an open binary file without running anything in it.

    ``extra_globals`` are allowed in addition to what checkpoints contain. Raises pickle.UnpicklingError, with the name
    of the file, if it holds anything else or is damaged.
    """
    name = getattr(file, "name", "data from another process")
    # Leaving the context takes its globals off torch's list: do not take off what the user has put there.
    known = torch.serialization.get_safe_globals()
    allowed = [item for item in (*_CHECKPOINT_GLOBALS, *extra_globals) if item not in known]
    try:
        _check_archive(file)
        with torch.serialization.safe_globals(allowed):
            # Given here, weights_only outranks TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD.
            state = torch.load(file, map_location=map_location, weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        # Of whatever kind: torch may even find itself reading before the start of a file that was cut off. Its own
        # message for what is not on the list advises to switch the protection off.
        found = re.search(r"GLOBAL (\S+)|(?:function|got) (<.+?>)", str(error))
        if found and isinstance(error, pickle.UnpicklingError):
            reason = f"it holds {found[1] or found[2]}, which is not on the list of what fairseq checkpoints contain"
        else:
            reason = f"it is no PyTorch checkpoint, or it is incomplete or damaged ({type(error).__name__})"
        raise pickle.UnpicklingError(f"{name} was not loaded: {reason}.") from None
    if isinstance(state, dict):
        for option in options_with_code(state.get("cfg"), state.get("args")):
            raise pickle.UnpicklingError(
                f"{name} was not loaded: fairseq would evaluate its option {option}, which is more than a value."
            )
    return state


def _check_archive(file: Any) -> None:
    """Raise ValueError if a checksum of the archive is wrong, which torch does not look at, or if it is compressed.

    torch writes no compressed archives but reads them: a small one could fill the memory. Files in the format that
    torch had before 1.6 are no archives and have no checksums.
    """
    start = file.tell()
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("compressed")
            if archive.testzip() is not None:
                raise ValueError("wrong checksum")
    file.seek(start)


# The options that fairseq passes to eval, or to its eval_str_list, eval_str_dict or eval_bool, when it builds a model,
# a task, a criterion or an optimizer: generation takes them from the checkpoint.
_EVALUATED = {
    *("adam_betas", "adafactor_eps", "adamax_betas", "lamb_betas", "wer_args", "model_overrides"),
    *("adaptive_input_cutoff", "adaptive_softmax_cutoff", "character_filters"),
    *("encoder_layers", "decoder_layers", "override_encoder_layers", "decoder_zero_init"),
    *("encoder_attention", "decoder_attention", "self_attention", "gated_attention"),
    *("project_input", "downsample", "pretrained", "left_pad_source", "left_pad_target"),
    *("xformers_att_config", "encoder_xformers_att_config", "decoder_xformers_att_config"),
    *("pipeline_balance", "pipeline_encoder_balance", "pipeline_decoder_balance"),
    *("pipeline_devices", "pipeline_encoder_devices", "pipeline_decoder_devices"),
    *("conv_feature_layers", "conv_aggregator_layers", "conv_enc_config", "conv_dec_config", "feature_encoder_spec"),
    *("vggblock_enc_config", "transformer_enc_config", "transformer_dec_config"),
    *("transformer_context", "transformer_sampling"),
}

# What an expression of numbers, texts, lists and arithmetic is made of. No call is, nor a comprehension, which is as
# good as one, since it can assign to attributes.
_VALUES = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Tuple, ast.List, ast.Set, ast.Dict, ast.UnaryOp, ast.BinOp),
    *(ast.expr_context, ast.operator, ast.unaryop),
)

# OmegaConf's resolvers, such as ${oc.create:...}, make options of a text: what these are called is not seen.
_RESOLVER = re.compile(r"\$\{.*:", re.DOTALL)


def options_with_code(*configs: Any) -> Iterator[str]:
    """Names of the options in nested dictionaries, lists and namespaces with which fairseq would run code."""
    pending = [("", config) for config in configs]
    while pending:
        name, value = pending.pop()
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        if isinstance(value, dict):
            pending += [(name if name in _EVALUATED else str(key), item) for key, item in value.items()]
        elif isinstance(value, (list, tuple, set)):
            pending += [(name, item) for item in value]
        elif _runs_code(name, value):
            yield name


def _runs_code(name: str, option: Any) -> bool:
    if name not in _EVALUATED:
        return isinstance(option, str) and _RESOLVER.search(option) is not None
    if not isinstance(option, str):
        try:
            memoryview(option)
        except TypeError:
            return False
        # eval takes whatever has bytes in it, in any encoding.
        return True
    # Another option may stand for the first, and the second for a quote, so that a text ends where none is seen to.
    if "${" in option or "\\" in option:
        return True
    try:
        tree = ast.parse(option.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return True
    return not all(isinstance(node, _VALUES) for node in ast.walk(tree))


class _TorchWithSafeLoad(types.ModuleType):
    """Stands in for ``torch`` in one module of fairseq: all of torch, but for the way of loading."""

    def __init__(self, *extra_globals: Any):
        super().__init__("torch")
        self._load_file = partial(load_checkpoint_file, extra_globals=extra_globals)
        self.check: Optional[Callable[[Any, str], None]] = None

    def _load(self, file: Any, map_location: Any) -> Any:
        state = self._load_file(file, map_location)
        if self.check is not None:
            self.check(state, getattr(file, "name", "a checkpoint"))
        return state

    def load(self, file: Any, map_location: Any = None, **_ignored: Any) -> Any:
        """torch.load, whose weights_only and pickle_module are not the caller's to choose."""
        if isinstance(file, (str, os.PathLike)):
            with open(file, "rb") as opened:
                return self._load(opened, map_location)
        return self._load(file, map_location)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def check_loaded(check: Callable[[Any, str], None]) -> None:
    """Call ``check``, which may raise, with the content and the name of every checkpoint that fairseq loads."""
    from fairseq import checkpoint_utils

    checkpoint_utils.torch.check = check


def install() -> None:
    """Make every load of a checkpoint in fairseq a safe one."""
    from fairseq import checkpoint_utils
    from fairseq.distributed import utils as distributed_utils
    from omegaconf import DictConfig, ListConfig, OmegaConf
    from omegaconf.base import ContainerMetadata, Metadata
    from omegaconf.nodes import AnyNode

    checkpoint_utils.torch = _TorchWithSafeLoad()
    # When training resumes in several processes, the first one loads the file and sends the others its content, with
    # the configuration as OmegaConf's objects by then and placeholders for the tensors.
    distributed_utils.torch = _TorchWithSafeLoad(
        distributed_utils._TensorPlaceholder,
        *(DictConfig, ListConfig, ContainerMetadata, Metadata, AnyNode),
        *(Any, dict, list, int, defaultdict),
    )

    def load_checkpoint(load: Any, cfg: Any, trainer: Any, **passthrough_args: Any) -> Any:
        # As the trainer puts it into a checkpoint.
        for option in options_with_code(OmegaConf.to_container(trainer.cfg, resolve=True, enum_to_str=True)):
            raise ValueError(
                f"--{option.replace('_', '-')}: fairseq evaluates this option as Python, and no checkpoint could be "
                "loaded in which it is more than a value: numbers, texts, lists and arithmetic."
            )
        return load(cfg, trainer, **passthrough_args)

    of_trainings("load_checkpoint", load_checkpoint)
