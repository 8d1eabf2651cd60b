"""A recipe that is killed in any of its steps and started again makes the same files as one that is not.

    PYTHONPATH=.:tests python tests/campaigns/recipe_kills.py --recipe ui_strings --kills 12 --folder FOLDER

runs the scripts of a recipe on a miniature of its archives, in a path with spaces and quotes: once to their end, and
then anew with all their processes killed (SIGKILL) in one step after the other, some of them left out and some hit
again, until they come to their end. What is made of the archives, translations, scores and tables must be the same
bytes. A line for each kill; status 1 if they differ.
"""

import argparse
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import test_ui_strings_recipe
import test_wikitext103_recipe
import test_wmt14_recipe
from recipe_scripts import AWKWARD, RECIPES, environment
from test_ui_strings_collect import DE, catalogue, make_wheel, phrases


@dataclass
class Recipe:
    """The scripts of a recipe with their options, and what they make that holds no times.

    Scripts are named by their path in the folder of recipes. ARCHIVES in the options stands for the folder of the
    archives.
    """

    make_archives: Callable[[Path], object]
    scripts: list[list[str]]
    compared: tuple[str, ...]


WMT14, WIKITEXT = test_wmt14_recipe.TINY, [*test_wikitext103_recipe.TINY, *test_wikitext103_recipe.CUTOFFS]
TEXT = ("raw/**/*", "references/*", "tokens/*", "codes", "pieces/**/*", "clean/*", "data-bin/**/*")
RECIPES_UNDER_FIRE = {
    "ui_strings": Recipe(
        lambda folder: make_wheel(folder, "app", {DE + ".po": catalogue(phrases(12, 12))}),
        [["ui_strings/run.sh", "--wheels", "ARCHIVES", *test_ui_strings_recipe.SMALL]],
        ("corpus/*", "text/*", "data-bin/*", "models/*/test.out", "models/*/result.json"),
    ),
    "wmt14_en_de": Recipe(
        test_wmt14_recipe.make_archives,
        [
            ["wmt14_en_de/prepare.sh", "--from", "ARCHIVES", "--merges", "60", "--jobs", "2"],
            ["wmt14_en_de/train.sh", "dpfp-2", "--size", "base", "--cpu", "--", *WMT14],
            ["wmt14_en_de/evaluate.sh", "--cpu"],
            ["wmt14_en_de/table1.sh"],
        ],
        (*TEXT, "models/*/*.out", "models/*/result.*", "table1.*"),
    ),
    "wikitext103": Recipe(
        test_wikitext103_recipe.make_archive,
        [
            ["wikitext103/prepare.sh", "--from", "ARCHIVES", "--jobs", "1"],
            ["wikitext103/prepare.sh", "--from", "ARCHIVES", "--jobs", "1", "--sentencepiece", "30"],
            ["wikitext103/train.sh", "delta-elu", "--cpu", "--", *WIKITEXT],
            ["wikitext103/evaluate.sh", "--cpu", "--window", "16"],
            ["wikitext103/tables.sh"],
        ],
        (*TEXT, "models/*/result.json", "tables.*"),
    ),
    "python_docs": Recipe(
        lambda folder: None,
        [
            [
                *("wikitext103/python_docs.sh", "--cpu", "--only", "delta-elu delta-elu-streaming", "--pieces", "300"),
                *("--threads", "1", "--window", "4", "--batch-size", "2048", "--", "--decoder-layers", "1"),
                *("--decoder-embed-dim", "16", "--max-update", "30", "--max-valid-steps", "4"),
            ],
        ],
        ("text/*", "data-bin/**/*", "models/*/result.json"),
    ),
}


def start(name: str, home: Path, output: Path) -> "subprocess.Popen[bytes]":
    commands = []
    for script, *options in RECIPES_UNDER_FIRE[name].scripts:
        given = [str(home / "archives") if option == "ARCHIVES" else option for option in options]
        commands.append(shlex.join(["bash", str(RECIPES / script), "--output", str(output), *given]))
    with output.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            ["bash", "-c", " && ".join(commands)], stdout=log, stderr=log, env=environment(), start_new_session=True
        )


def made(name: str, output: Path) -> dict[str, bytes]:
    """What a run has made, but for messages, times and speeds."""
    found = {}
    for pattern in RECIPES_UNDER_FIRE[name].compared:
        for path in output.glob(pattern):
            if path.is_file() and path.suffix != ".log":
                lines = path.read_bytes().splitlines(keepends=path.suffix != ".json")
                kept = [line for line in lines if b"_minutes" not in line and b"per_second" not in line]
                found[str(path.relative_to(output))] = b"".join(kept)
    return found


def steps(log: Path, start: int = 0) -> list[str]:
    """What the recipe says of the steps that it does, from some byte of its messages on."""
    lines = log.read_bytes()[start:].decode(errors="replace").split("\n")[:-1]
    return [line for line in lines if re.match("== (?!data: |model: )", line) and not line.endswith("done before")]


def wait_for(chosen: list[str], run: "subprocess.Popen[bytes]", log: Path, start: int) -> Optional[str]:
    """Wait until a run does one of these steps, and say which; None if it ends before."""
    while run.poll() is None:
        for step in steps(log, start):
            if step in chosen:
                return step
        time.sleep(0.01)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill a recipe again and again.")
    parser.add_argument("--recipe", choices=RECIPES_UNDER_FIRE, required=True)
    parser.add_argument("--kills", type=int, default=12, metavar="N")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    home = options.folder.resolve() / AWKWARD
    shutil.rmtree(home, ignore_errors=True)
    (home / "archives").mkdir(parents=True)
    RECIPES_UNDER_FIRE[options.recipe].make_archives(home / "archives")

    log = home / "whole.log"
    run = start(options.recipe, home, home / "whole")
    begun: dict[str, float] = {}
    while run.poll() is None:
        for step in steps(log):
            begun.setdefault(step, time.monotonic())
        time.sleep(0.01)
    if run.returncode:
        sys.exit(f"the recipe failed: {log}")
    titles = list(begun)
    ends = [*list(begun.values())[1:], time.monotonic()]
    seconds = {step: end - begin for (step, begin), end in zip(begun.items(), ends)}

    whole = made(options.recipe, home / "whole")
    draw, kills, rounds, differing = random.Random(options.seed), Counter[str](), 0, []
    while kills.total() < options.kills:
        rounds += 1
        output, target = home / f"killed {rounds}", 0
        log = output.with_suffix(".log")
        while True:
            before = log.stat().st_size if log.exists() else 0
            run = start(options.recipe, home, output)
            left = titles[target:] if kills.total() < options.kills else []
            left = [step for step in left if not kills[step]] or left
            step = wait_for(left, run, log, before)
            if step is None:
                break
            try:
                run.wait(draw.uniform(0, seconds[step]))
                break
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, signal.SIGKILL)
                run.wait()
            kills[step] += 1
            print(f"kill {kills.total()} in: {step}", flush=True)
            target = titles.index(step) + draw.choice([0, 1, 1, 2])
        if run.wait():
            sys.exit(f"the recipe failed: {log}")
        killed_files = made(options.recipe, output)
        differing += [n for n in whole.keys() | killed_files.keys() if whole.get(n) != killed_files.get(n)]
    print(f"{kills.total()} kills in {rounds} runs, in {len(kills)} of {len(titles)} steps")
    print(f"{len(whole)} files; differing: {differing or 'none'}")
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main())
