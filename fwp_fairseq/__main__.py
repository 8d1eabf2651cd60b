"""Print the folder to give fairseq as --user-dir: fairseq-train --user-dir "$(python -m fwp_fairseq)" ...

``--check`` says instead whether all is there to train with, ``--options`` which flags there are, ``--mends`` what is
changed in fairseq, and why, and ``--list`` what there is to choose from.
"""

import argparse
import importlib
import logging
import platform
import sys
from pathlib import Path

# What --list can list, and what has it by name.
LISTS = {
    "update-rules": "UPDATE_RULES",
    "feature-maps": "FEATURE_MAPS",
    "key-normalizations": "KEY_NORMALIZATIONS",
    "backends": "BACKENDS",
}


def main() -> int:
    """The command's exit status."""
    parser = argparse.ArgumentParser("python -m fwp_fairseq", description="Print the folder to give as --user-dir.")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="print what a training would use, and what is missing")
    instead.add_argument("--options", action="store_true", help="print the flags that fairseq's commands get by it")
    instead.add_argument("--mends", action="store_true", help="print what is changed in fairseq, and why")
    instead.add_argument("--list", choices=LISTS, help="print the names of these, one a line")
    args = parser.parse_args()
    if args.list:
        from fwp_fairseq import ops

        print(*getattr(ops, LISTS[args.list]), sep="\n")
        return 0
    # fairseq has much to say when it is imported.
    logging.disable(logging.INFO)
    if args.check:
        problems = check()
        for problem in problems:
            print(f"Problem: {problem}")
        if not problems:
            print("All is there to train with.")
        return int(bool(problems))
    if args.options:
        from fwp_fairseq.models.flags import help_of_flags

        print(help_of_flags())
    elif args.mends:
        from fwp_fairseq.fairseq_mends import mends

        print(*mends(), sep="\n\n")
    else:
        print(Path(__file__).resolve().parent)
    return 0


def check() -> list[str]:
    """Print what a training would use: versions, and where they lie. What is missing, and what to do."""
    from fwp_fairseq import __version__
    from fwp_fairseq._registration import require_fairseq

    print(f"Python {platform.python_version()}: {sys.executable}")
    problems = []
    for name in ("torch", "numpy", "fairseq"):
        try:
            if name == "fairseq":
                require_fairseq()
            module = importlib.import_module(name)
        except Exception as error:  # of whatever kind: one that was compiled for another torch or numpy
            problems.append(f"{name} cannot be imported: {error}")
        else:
            print(f"{name} {module.__version__}: {Path(str(module.__file__)).parent}")
    try:
        from fwp_fairseq.ops import native
    except Exception as error:
        return [*problems, f"fwp_fairseq.ops cannot be imported: {error}"]
    own, *others = native.copies()
    print(f"fwp_fairseq {__version__}: {own}")
    for other in others:
        print(f"    not in use: {other}, {'with' if native.library_in(other) else 'without'} compiled operators")
    if native.unavailable is None:
        on_gpu = "on a processor and a GPU" if native.supports("cuda") else "on a processor"
        print(f"compiled operators, {on_gpu}: {native.library_in(own)}")
    else:
        problems.append(f"no compiled operators: {native.unavailable}")
    return problems


if __name__ == "__main__":
    sys.exit(main())
