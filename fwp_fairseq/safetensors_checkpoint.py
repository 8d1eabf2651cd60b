"""Parameters of a model as a safetensors file, and a checkpoint of fairseq from such a file.

    python -m fwp_fairseq.export_onnx --path checkpoint_best.pt --output DIR --safetensors
    python -m fwp_fairseq.safetensors_checkpoint DIR/model.safetensors --output checkpoint.pt

The first writes it; the options of the model and its task are in its metadata. The second's checkpoint is for
generation and evaluation, and for --finetune-from-model and --reset-optimizer: of the training it has nothing.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

_OPTIONS = "fairseq"
_SHARED = "shared"


def as_safetensors(path: Path) -> bytes:
    """A checkpoint of fairseq in the format of safetensors. Parameters that share their memory are there once.

    Raises OSError, ValueError and pickle.UnpicklingError: it cannot be read, or is none.
    """
    from fairseq import checkpoint_utils
    from omegaconf import OmegaConf
    from safetensors.torch import save

    state = checkpoint_utils.load_checkpoint_to_cpu(str(path))
    options = OmegaConf.to_container(state["cfg"], resolve=True, enum_to_str=True)
    assert isinstance(options, dict)
    tensors: dict[str, Any] = {}
    shared: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in state["model"].items():
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and identity in first:
            shared[name] = first[identity]
        else:
            first[identity] = name
            tensors[name] = tensor.contiguous().clone()
    chosen = {name: options[name] for name in ("model", "task")}
    return save(tensors, {_OPTIONS: json.dumps(chosen), _SHARED: json.dumps(shared)})


def checkpoint_of(path: Path) -> dict[str, Any]:
    """The state that fairseq loads, of a file of ``as_safetensors``. Raises OSError and ValueError: it is none."""
    from safetensors import SafetensorError, safe_open

    with open(path, "rb"):
        pass  # a missing file is said to be one
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            parameters = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
        options = json.loads(metadata[_OPTIONS])
        parameters |= {name: parameters[other] for name, other in json.loads(metadata[_SHARED]).items()}
    except (SafetensorError, KeyError, ValueError):
        raise ValueError(f"{path} is no file of --safetensors, or it is damaged") from None
    return checkpoint_state(parameters, options)


def checkpoint_state(model: dict[str, Any], cfg: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint of fairseq holds, with these parameters and options, and nothing of a training."""
    history = {"criterion_name": "none", "optimizer_name": "none", "lr_scheduler_state": {}, "num_updates": 0}
    return {
        "args": None,
        "cfg": cfg,
        "model": model,
        "optimizer_history": [history],
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
        "last_optimizer_state": None,
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m fwp_fairseq.safetensors_checkpoint", description=__doc__)
    parser.add_argument("input", type=Path, help="file that --safetensors wrote")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint to write")
    return parser


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Convert as the command line says; leave with a message and status 1 if it cannot be done."""
    from fwp_fairseq.fairseq_mends.whole_checkpoints import save_whole

    parser = build_parser()
    args = parser.parse_args(arguments)
    try:
        save_whole(checkpoint_of(args.input), str(args.output))
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"{parser.prog}: {str(error).rstrip('.')}.")
    print(args.output)


if __name__ == "__main__":
    main()
