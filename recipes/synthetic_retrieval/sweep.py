#!/usr/bin/env python3
"""Train the models of one figure, each with fairseq-train, and keep a line for each finished run in runs.csv.

What is done already is not done again. Interrupted runs start anew. Several of these processes can share one output
folder: each takes the runs that no other one has in hand.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from experiments import FIELDS, FIGURES, RESULTS, Result, Run, expected_seconds, read_authors, read_results, to_row

# glibc gives large blocks back at once, and zeroing them anew takes longer than the arithmetic on them.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}

# Progress within a run is shown no more often than this.
SECONDS_BETWEEN_LINES = 60


class TrainingFailed(Exception):
    """fairseq-train did not come to its end; the message is one sentence."""


class Parser(argparse.ArgumentParser):
    """Errors are one sentence, in the name of the script that the user called."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options).\n")


@contextmanager
def claim(folder: Path, run: Run) -> Iterator[bool]:
    """Hold a run while it is done; False if another process has it. A claim ends with its process, however it ends."""
    (folder / "claims").mkdir(exist_ok=True)
    with (folder / "claims" / run.name).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def append_result(folder: Path, run: Run, result: Result) -> None:
    """Add a line to runs.csv, after what is whole in it."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    with (folder / RESULTS).open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        # The end of a line that a killed process did not write in full.
        file.truncate(content.rfind(b"\n") + 1)
        if b"\n" not in content:
            writer.writerow(FIELDS)
        writer.writerow(to_row(run, result))
        file.write(buffer.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())


class Sweep:
    """The runs of a figure, by ``jobs`` trainings at a time."""

    def __init__(self, runs: list[Run], folder: Path, user_dir: str, jobs: int) -> None:
        self.runs, self.folder, self.user_dir, self.jobs = runs, folder, user_dir, jobs
        self.authors = read_authors()
        self.processes: set[subprocess.Popen[str]] = set()
        self.lock = threading.Lock()
        self.stopping = False

    def work(self) -> int:
        """Do all runs that are not done; returns how many are left to other processes."""
        done = read_results(self.folder)
        missing = [run for run in self.runs if run not in done]
        print(f"{len(self.runs)} runs, {len(self.runs) - len(missing)} of them done before", flush=True)
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                futures = [pool.submit(self._do, run) for run in missing]
                return len(missing) - sum(future.result() for future in as_completed(futures))
            finally:
                self._stop()

    def _stop(self) -> None:
        with self.lock:
            self.stopping = True
            for process in self.processes:
                process.terminate()

    def _do(self, run: Run) -> bool:
        """Do a run, unless somebody else does it. Returns whether it is done."""
        if self.stopping:
            return False
        with claim(self.folder, run) as ours:
            if not ours:
                return False
            if run in read_results(self.folder):
                return True
            result = self._train(run)
            append_result(self.folder, run, result)
        steps, left = result.last_step, self._time_left()
        print(f"{run.name}: loss {result.best:.3g}, {steps} steps in {duration(result.seconds)}; {left}", flush=True)
        return True

    def _train(self, run: Run) -> Result:
        log = self.folder / "logs" / f"{run.name}.log"
        log.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-W", "ignore", "-m", "fairseq_cli.train", *run.flags(self.user_dir)]
        start = shown = time.monotonic()
        curve: list[float] = []
        with self.lock:
            if self.stopping:
                raise TrainingFailed("interrupted")
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**KEEP_MEMORY, **os.environ}
            )
            self.processes.add(process)
        assert process.stdout is not None
        with process, log.open("w") as file:
            for line in process.stdout:
                file.write(line)
                found = re.search(r"\| valid \| (\{.*\})$", line)
                if found:
                    curve.append(float(json.loads(found[1])["valid_loss"]))
                    if time.monotonic() - shown > SECONDS_BETWEEN_LINES:
                        shown = time.monotonic()
                        print(f"  {run.name}: step {100 * len(curve)}, loss {curve[-1]:.3g}", flush=True)
        with self.lock:
            self.processes.discard(process)
        if process.returncode != 0 or not curve:
            raise TrainingFailed(f"fairseq-train failed for {run.name} (all of its messages: {log})")
        return Result(time.monotonic() - start, tuple(curve))

    def _time_left(self) -> str:
        done = read_results(self.folder)
        ours = [run for run in self.runs if run in done]
        if len(ours) == len(self.runs):
            return "all runs are done"
        left = sum(expected_seconds(run, self.authors) for run in self.runs if run not in done)
        pace = sum(done[run].seconds for run in ours) / sum(expected_seconds(run, self.authors) for run in ours)
        return f"{len(self.runs) - len(ours)} runs left, about {duration(left * pace / self.jobs)}"


def duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h"


def positive(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number of at least 1")
    return int(text)


def main() -> int:
    """Command line; returns the exit status."""
    parser = Parser(
        prog=os.environ.get("FWP_SCRIPT"), description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("figure", choices=FIGURES)
    parser.add_argument("--quick", action="store_true", help="fewer numbers of keys and one seed")
    parser.add_argument("--sizes", type=positive, nargs="+", metavar="S", help="only these numbers of keys")
    parser.add_argument("--seeds", type=positive, nargs="+", metavar="N", help="only these seeds")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="only these models, such as dpfp1_sum")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=positive, default=cores, help="trainings at a time, one core each (%(default)s)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for everything that is made")
    options = parser.parse_args()
    figure = FIGURES[options.figure]
    for model in options.models or ():
        if model not in (allowed := figure.models + figure.more_models):
            parser.error(f"--models has {model}, {options.figure} has {', '.join(allowed)}")
    sizes = options.sizes or (figure.quick_sizes if options.quick else figure.sizes)
    seeds = options.seeds or (figure.seeds[:1] if options.quick else figure.seeds)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {options.output} cannot be made: {error.strerror}")
    import fwp_fairseq

    # Each training has one core.
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    runs = figure.runs(sizes, seeds, options.models or figure.models)
    sweep = Sweep(runs, options.output, str(Path(fwp_fairseq.__file__).parent), options.jobs)
    try:
        left = sweep.work()
    except TrainingFailed as error:
        print(f"{parser.prog}: {error}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; the same command goes on.", file=sys.stderr)
        return 130
    if left:
        print(f"{left} runs are in the hands of another process")
    return 0


if __name__ == "__main__":
    sys.exit(main())
