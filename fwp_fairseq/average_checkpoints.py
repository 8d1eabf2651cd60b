"""Average the parameters of checkpoints: python -m fwp_fairseq.average_checkpoints --inputs a.pt b.pt --output c.pt

The options are those of the script of this name in fairseq's source, which its packages leave out. Neither fairseq nor
the code of the model is needed.
"""

import argparse
import pickle
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fwp_fairseq.fairseq_mends.safe_loading import load_checkpoint_file
from fwp_fairseq.fairseq_mends.sound_parameters import not_finite
from fwp_fairseq.fairseq_mends.whole_checkpoints import save_whole

EPOCH_CHECKPOINT = re.compile(r"checkpoint(\d+)\.pt")
UPDATE_CHECKPOINT = re.compile(r"checkpoint_\d+_(\d+)\.pt")


def last_checkpoints(folder: Path, count: int, pattern: re.Pattern[str], upper_bound: int | None = None) -> list[Path]:
    """The ``count`` latest checkpoints in ``folder``, latest first, whose number is not above ``upper_bound``.

    Raises ValueError: fewer than that are there.
    """
    numbered = [(int(match[1]), path) for path in folder.iterdir() if (match := pattern.fullmatch(path.name))]
    found = sorted((pair for pair in numbered if upper_bound is None or pair[0] <= upper_bound), reverse=True)
    if len(found) < count:
        raise ValueError(f"{folder} has {len(found)} checkpoints of the wanted kind, {count} are to be averaged")
    return [path for _, path in found[:count]]


def average_checkpoints(paths: Sequence[Path]) -> dict[str, Any]:
    """State of the first checkpoint with the arithmetic mean of the parameters of all of them.

    Half-precision parameters come out as float32 and integers are rounded down, as in fairseq's script. Raises
    ValueError: one has other parameters or other shapes than the first, or flags of another value, or a mean is not
    finite though one of the checkpoints is.
    """
    state: dict[str, Any] = {}
    total: dict[str, Tensor] = {}
    unwritten: set[str] = set()
    for path in paths:
        with open(path, "rb") as file:
            loaded = load_checkpoint_file(file)
        if not isinstance(loaded, dict) or not isinstance(loaded.get("model"), dict):
            raise ValueError(f"{path} has no model in it")
        parameters = {
            name: value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
            for name, value in loaded["model"].items()
        }
        # In all of them that is memory which no training has written.
        unwritten = not_finite(parameters.items()) & (unwritten if state else parameters.keys())
        if not state:
            state, total = loaded, {name: value.clone() for name, value in parameters.items()}
            continue
        differing = sorted(total.keys() ^ parameters.keys())
        if differing:
            raise ValueError(f"{path} and {paths[0]} are of different models: only one of them has {differing[0]}")
        for name, value in parameters.items():
            if value.shape != total[name].shape:
                shapes = f"{tuple(value.shape)} and {tuple(total[name].shape)}"
                raise ValueError(f"{path} and {paths[0]} are of different models: {name} has the shapes {shapes}")
            if value.dtype != torch.bool:
                total[name] += value
            elif not torch.equal(value, total[name]):
                raise ValueError(f"{path} and {paths[0]} differ in {name}, which has no mean")
    for value in total.values():
        if value.is_floating_point():
            value /= len(paths)
        elif value.dtype != torch.bool:
            value //= len(paths)
    if broken := not_finite(total.items()) - unwritten:
        raise ValueError(f"the mean of {min(broken)} is infinite or not a number")
    state["model"] = total
    return state


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m fwp_fairseq.average_checkpoints", description=__doc__)
    add = parser.add_argument
    add("--inputs", nargs="+", type=Path, required=True, help="checkpoints, or the folder that --num-* selects from")
    add("--output", type=Path, required=True, help="file to write")
    which = parser.add_mutually_exclusive_group()
    last = "average the last N checkpoints that were written at the end of an"
    which.add_argument("--num-epoch-checkpoints", type=int, metavar="N", help=f"{last} epoch")
    which.add_argument("--num-update-checkpoints", type=int, metavar="N", help=f"{last} interval of updates")
    add("--checkpoint-upper-bound", type=int, metavar="K", help="with --num-*: leave out those after epoch or update K")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Average as the command line says; leave with a message and status 1 if it cannot be done."""
    parser = build_parser()
    args = parser.parse_args(argv)
    count = args.num_epoch_checkpoints if args.num_epoch_checkpoints is not None else args.num_update_checkpoints
    if count is None and args.checkpoint_upper_bound is not None:
        parser.error("--checkpoint-upper-bound needs --num-epoch-checkpoints or --num-update-checkpoints")
    if count is not None and (count < 1 or len(args.inputs) != 1 or not args.inputs[0].is_dir()):
        parser.error("--num-epoch-checkpoints and --num-update-checkpoints need N >= 1 and one folder as --inputs")
    try:
        paths = args.inputs
        if count is not None:
            pattern = EPOCH_CHECKPOINT if args.num_epoch_checkpoints is not None else UPDATE_CHECKPOINT
            paths = last_checkpoints(args.inputs[0], count, pattern, args.checkpoint_upper_bound)
        save_whole(average_checkpoints(paths), str(args.output))
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        sys.exit(f"{parser.prog}: {error}")
    print(f"{args.output}: mean of {', '.join(map(str, paths))}")


if __name__ == "__main__":
    main()
