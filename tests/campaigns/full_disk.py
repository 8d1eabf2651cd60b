"""A disk that is full while checkpoints or binarised data are written, and has room again later.

    PYTHONPATH=.:tests python tests/campaigns/full_disk.py --cases 40 --folder FOLDER    (as root, on Linux)

Each case mounts a file system in memory of a random size, trains a small translation model into it, or binarises a
corpus into it, until it is full. That has to end with an error that says so, and every checkpoint under its name has to
be whole. Then the file system is made larger and the same command is given again: parameters and the optimizer's state,
or the data, must be those of an undisturbed run, bit for bit. A line for each case; status 1 if one is otherwise.
"""

import argparse
import ctypes
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from campaigns.kills import command
from campaigns.training import fairseq, load, make_corpus, run, same_bits


def mount(folder: Path, size: int, *options: str) -> None:
    """A file system of so many bytes."""
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join((*options, f"size={size}")), "none", str(folder)], check=True
    )


def preprocess(corpus: Path, folder: Path) -> Callable[[], Any]:
    splits = [f"--{split}pref={corpus / split}" for split in ("train", "valid", "test")]
    work = fairseq("preprocess", "-s", "a", "-t", "b", *splits, "--destdir", folder, "--workers", 1)

    def anew() -> None:
        # As the recipes do: fairseq refuses a folder with a dictionary.
        shutil.rmtree(folder, ignore_errors=True)
        work()

    return anew


def same_files(a: Path, b: Path) -> bool:
    """Whether two folders have the same files, but for messages."""
    found = [{p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".log"} for folder in (a, b)]
    return found[0] == found[1]


def broken(folder: Path) -> list[str]:
    """Checkpoints that cannot be loaded; those that are being written have another name."""
    names = []
    for path in folder.glob("*.pt"):
        try:
            load(path)
        except Exception:
            names.append(path.name)
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description="Fill the disk under trainings and binarised data.")
    parser.add_argument("--cases", type=int, default=40, metavar="N")
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Of this process and its children only; they end with it.
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() != 0 or libc.unshare(0x00020000) or libc.mount(b"none", b"/", None, 1 << 18 | 1 << 14, None):
        sys.exit("full_disk.py mounts file systems: run it as root, or in: unshare --user --map-root-user")
    import fairseq_cli.preprocess
    import fairseq_cli.train  # noqa: F401  (for all forks)

    import fwp_fairseq.models  # noqa: F401

    home = options.folder.resolve()
    shutil.rmtree(home, ignore_errors=True)
    data, log = make_corpus(home / "corpus"), home / "log"
    kinds = {
        "checkpoints": (
            lambda folder: command(data, folder),
            lambda a, b: same_bits(a / "checkpoint_last.pt", b / "checkpoint_last.pt"),
        ),
        "data": (lambda folder: preprocess(home / "corpus", folder), same_files),
    }
    sizes = {}
    for kind, (work, _) in kinds.items():
        if run(home / "whole.log", work(home / kind)):
            sys.exit(f"it failed without a full disk: {home / 'whole.log'}")
        sizes[kind] = sum(path.stat().st_size for path in (home / kind).iterdir())
    disk, faults = home / "disk", 0
    disk.mkdir()
    for number in range(options.cases):
        draw = random.Random(number)
        kind = draw.choice(["checkpoints", "checkpoints", "data"])
        work, same = kinds[kind]
        # A checkpoint more than what there is in the end is needed while one is replaced.
        size = int(draw.uniform(0.02, 1.2) * sizes[kind])
        mount(disk, size)
        try:
            log.write_text("")
            status = run(log, work(disk / "out"))
            said = "No space left on device" in log.read_text()
            bad = broken(disk / "out") if (disk / "out").exists() else []
            mount(disk, 16 * max(sizes.values()), "remount")
            again = run(log, work(disk / "out"))
            fine = not bad and again == 0 and same(disk / "out", home / kind) and (status == 0) != said
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)
        faults += not fine
        print(f"{number} {kind} of {sizes[kind]} bytes on {size}: status {status}, ", end="")
        print(f"{'full' if said else 'not full'}, then {again}{', BROKEN: ' * bool(bad)}{', '.join(bad)}", end="")
        print("" if fine else " FAULT", flush=True)
    print(f"{options.cases} cases, {faults} faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
