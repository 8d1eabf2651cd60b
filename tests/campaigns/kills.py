"""Training that is killed at random moments, and goes on, ends with the bits of one that is not.

    PYTHONPATH=.:tests python tests/campaigns/kills.py --kills 60 --folder FOLDER

trains a small translation model once without a kill. Then it trains others, each of which is killed (SIGKILL) at a
random moment, started again with the same command, and so on until it ends; parameters and the optimizer's state must
be those of the first, bit for bit. Half of the kills are aimed: they come as soon as a file is being written. FOLDER
keeps kills.jsonl, a line for each start; a second call goes on from there. Status 1 if something was lost.

--unprotected leaves saving to fairseq as it is, to see what the plugin's own way of saving is for.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import torch
from campaigns.training import (
    ROOT,
    add_records,
    fairseq,
    in_child,
    make_corpus,
    read_records,
    run,
    same_bits,
    status_of,
)

UPDATES = 120


def command(data: Path, folder: Path) -> Callable[[], Any]:
    """A training with a checkpoint and a validation every ten updates; writing takes a good part of its time."""
    return fairseq(
        *("train", data, "--user-dir", ROOT / "fwp_fairseq", "--cpu", "--save-dir", folder, "--num-workers", 0),
        *("--arch", "fwp_transformer", "--encoder-layers", 1, "--decoder-layers", 1, "--encoder-embed-dim", 128),
        *("--encoder-ffn-embed-dim", 512, "--encoder-attention-heads", 4, "--decoder-attention-heads", 4),
        *("--feature-map", "favor", "--favor-features", 16, "--dropout", 0.1, "--optimizer", "adam", "--lr", 1e-3),
        *("--criterion", "cross_entropy", "--batch-size", 16, "--max-update", UPDATES, "--save-interval-updates", 10),
        *("--keep-interval-updates", 2, "--no-epoch-checkpoints", "--log-format", "simple", "--log-interval", 1),
        *("--seed", 1, "--required-batch-size-multiple", 1),
    )


def unprotected(work: Callable[[], Any]) -> Callable[[], Any]:
    """The same work with fairseq's own way of saving."""
    from fairseq import checkpoint_utils
    from fairseq.file_io import PathManager, torch_persistent_save

    def with_own_saving() -> None:
        checkpoint_utils.torch_persistent_save = torch_persistent_save
        checkpoint_utils.PathManager = PathManager
        work()

    return with_own_saving


def phase(messages: str) -> str:
    """What a training was doing when its messages ended."""
    marks = {
        "start": "task: ",
        "updates": "| train_inner |",
        "validation": "begin validation on",
        "between": "| valid | epoch",
        "writing": "Preparing to save checkpoint",
        "after writing": "Saved checkpoint",
    }
    found = {name: messages.rfind(mark) for name, mark in marks.items()}
    last = max(found, key=lambda name: found[name])
    return {"after writing": "updates", "between": "writing"}.get(last, last) if found[last] >= 0 else "start"


def wait_for_writing(folder: Path, until: float, child: int) -> Optional[float]:
    """Wait until a file is being written, at most to ``until``. None if the process ended before, else the time."""
    names = {"checkpoint_last.pt", "checkpoint_best.pt"}
    before = {name: _size(folder / name) for name in names}
    while time.monotonic() < until:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return None
        # What comes by a rename has its size at once; what is copied into grows, after it was cut to nothing.
        growing = any(0 <= _size(folder / name) < before[name] for name in names if before[name] > 0)
        if growing or (folder.exists() and any(name.endswith(".tmp") for name in os.listdir(folder))):
            return time.monotonic()
    return time.monotonic()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def train_with_kills(
    work: Callable[[], Any], folder: Path, draw: random.Random, full: float, kills: int
) -> list[dict[str, Any]]:
    """Start the training until it ends by itself; what happened each time. After ``kills`` it is left alone."""
    starts: list[dict[str, Any]] = []
    log = folder.with_suffix(".log")
    while True:
        log.write_text("")
        begin = time.monotonic()
        child = in_child(log, work)
        record: dict[str, Any] = {"run": folder.name, "aimed": False, "killed": False}
        if len(starts) < kills:
            delay = draw.uniform(0.1, full)
            record["aimed"] = draw.random() < 0.5
            while time.monotonic() < begin + delay:
                if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    break
                time.sleep(0.002)
            if record["aimed"]:
                wait_for_writing(folder, begin + full, child)
                time.sleep(draw.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
        status = status_of(child)
        record["killed"] = status == -signal.SIGKILL
        record["seconds"] = round(time.monotonic() - begin, 2)
        record["status"] = status
        record["in"] = phase(log.read_text()) if record["killed"] else "end"
        record["unfinished"] = (
            sorted(name for name in os.listdir(folder) if name.endswith(".tmp")) if (folder.exists()) else []
        )
        starts.append(record)
        if not record["killed"]:
            return starts


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill trainings and compare how they end.")
    parser.add_argument("--kills", type=int, default=60, metavar="N", help="(%(default)s)")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unprotected", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    import fairseq_cli.train  # noqa: F401  (for all forks)

    import fwp_fairseq.models  # noqa: F401

    home = options.folder.resolve()
    data = make_corpus(home / "corpus")
    log = home / "kills.jsonl"
    lines = read_records(log)

    reference, begin = home / "unkilled", time.monotonic()
    shutil.rmtree(reference, ignore_errors=True)
    if run(home / "unkilled.log", command(data, reference)):
        sys.exit(f"the training without a kill failed: {home / 'unkilled.log'}")
    full = time.monotonic() - begin
    number = len({line["run"] for line in lines})
    while sum(line["killed"] for line in lines) < options.kills:
        folder = home / f"run{number}"
        shutil.rmtree(folder, ignore_errors=True)
        work = command(data, folder)
        draw = random.Random(f"{options.seed} {number}")
        starts = train_with_kills(unprotected(work) if options.unprotected else work, folder, draw, full, kills=5)
        last = folder / "checkpoint_last.pt"
        starts[-1]["same bits"] = starts[-1]["status"] == 0 and same_bits(last, reference / "checkpoint_last.pt")
        add_records(log, starts)
        lines += starts
        if starts[-1]["same bits"]:
            shutil.rmtree(folder)
        number += 1
    kills = Counter(line["in"] for line in lines if line["killed"])
    unfinished = sum(bool(line["unfinished"]) for line in lines if line["killed"])
    ends = [line["same bits"] for line in lines if "same bits" in line]
    print(f"{sum(kills.values())} kills in {len(ends)} trainings of {UPDATES} updates, {full:.1f} s without a kill:")
    print(", ".join(f"{count} in {name}" for name, count in kills.most_common()))
    print(
        f"{unfinished} left a file that was being written; {ends.count(True)} trainings of {len(ends)} ended the same"
    )
    return not all(ends)


if __name__ == "__main__":
    sys.exit(main())
