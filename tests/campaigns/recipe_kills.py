"""A recipe that is killed in any of its steps and started again makes the same files as one that is not.

    PYTHONPATH=.:tests python tests/campaigns/recipe_kills.py --kills 12 --folder FOLDER

runs recipes/ui_strings/run.sh on a miniature archive of wheels, in a path with spaces and quotes: once to its end, and
then anew with all its processes killed (SIGKILL) at random moments, again and again until it comes to its end. Corpus,
subwords, binarised data, translations and scores must be the same bytes. A line for each kill; status 1 if they differ.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from test_ui_strings_collect import DE, RECIPE, catalogue, make_wheel, phrases
from test_ui_strings_recipe import AWKWARD, SMALL, environment

COMPARED = ("corpus", "text", "data-bin")


def start(home: Path, output: Path) -> "subprocess.Popen[bytes]":
    command = ["bash", str(RECIPE / "run.sh"), "--output", str(output), "--wheels", str(home / "wheels"), *SMALL]
    with output.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment(), start_new_session=True)


def made(output: Path) -> dict[str, bytes]:
    """What a run has made, but for messages and checkpoints, which hold times."""
    found = {
        str(path.relative_to(output)): path.read_bytes()
        for part in COMPARED
        for path in (output / part).rglob("*")
        if path.is_file() and not path.name.endswith(".log")
    }
    for path in (output / "models").rglob("*"):
        if path.name in ("test.out", "result.json"):
            lines = path.read_bytes().splitlines()
            found[path.name] = b"\n".join(line for line in lines if b"train_minutes" not in line)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill the recipe of the quick start again and again.")
    parser.add_argument("--kills", type=int, default=12, metavar="N")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    home = options.folder.resolve() / AWKWARD
    shutil.rmtree(home, ignore_errors=True)
    make_wheel(home / "wheels", "app", {DE + ".po": catalogue(phrases(12, 12))})
    begin = time.monotonic()
    if start(home, home / "whole").wait():
        sys.exit(f"the recipe failed: {home / 'whole.log'}")
    full = time.monotonic() - begin
    draw, kills, rounds, differing = random.Random(options.seed), 0, 0, []
    whole = made(home / "whole")
    while kills < options.kills:
        rounds += 1
        output = home / f"killed {rounds}"
        while True:
            run = start(home, output)
            try:
                # A run that goes on from an earlier one is quick: from the same range fewer and fewer are killed.
                status = run.wait(draw.uniform(0, full / 2) if kills < options.kills else None)
                break
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, signal.SIGKILL)
                run.wait()
            kills += 1
            lines = output.with_suffix(".log").read_text(errors="replace").splitlines()
            steps = [line for line in lines if line.startswith("== ") and not line.endswith("done before")]
            print(f"kill {kills} in: {steps[-1] if steps else 'the beginning'}", flush=True)
        if status:
            sys.exit(f"the recipe failed: {output.with_suffix('.log')}")
        killed = made(output)
        differing += [name for name in whole.keys() | killed.keys() if whole.get(name) != killed.get(name)]
    print(f"{kills} kills in {rounds} runs, {full:.0f} s at a stretch")
    print(f"{len(whole)} files; differing: {differing or 'none'}")
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main())
