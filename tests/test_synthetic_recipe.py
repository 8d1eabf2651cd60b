"""recipes/synthetic_retrieval: the sweep, its results, the comparison and the pictures.

All but one of the tests have a stand-in for fairseq-train, which prints the lines of its log at once.
"""

import csv
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

RECIPE = ROOT / "recipes" / "synthetic_retrieval"
sys.path.insert(0, str(RECIPE))

import compare  # noqa: E402
import experiments  # noqa: E402
import sweep  # noqa: E402
from experiments import FIGURES, Result, Run, read_authors, read_results  # noqa: E402

STAND_IN = """
import os, sys, time
keys, seed = (int(sys.argv[sys.argv.index(flag) + 1]) for flag in ("--num-keys", "--seed"))
with open(os.environ["CALLS"], "a") as calls:
    calls.write(f"{keys} {seed}\\n")
for epoch in (1, 2):
    print(f'x | INFO | valid | {{"epoch": {epoch}, "valid_loss": "{keys / 1000 / epoch:g}"}}', flush=True)
    time.sleep(float(os.environ.get("PAUSE", 0)))
sys.exit(keys == 13)
"""


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    """The environment in which fairseq-train is the stand-in, which notes its calls in a file."""
    package = tmp_path / "stand-in" / "fairseq_cli"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "train.py").write_text(STAND_IN)
    path = os.pathsep.join([str(package.parent), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "CALLS": str(tmp_path / "calls"), "FWP_SCRIPT": "run.sh"}


def command(folder: Path, *arguments: object, figure: str = "figure2") -> list[str]:
    return [sys.executable, str(RECIPE / "sweep.py"), figure, "--output", str(folder), *map(str, arguments)]


def run_sweep(folder: Path, variables: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *arguments), capture_output=True, text=True, timeout=100, env=variables)


def calls(variables: dict[str, str]) -> list[str]:
    path = Path(variables["CALLS"])
    return path.read_text().splitlines() if path.exists() else []


SMALL = ("--models", "dpfp1_sum", "--sizes", 4, 5, 6, "--jobs", 1)


def test_a_sweep_keeps_a_line_for_each_run_and_does_none_again(tmp_path: Path, variables: dict[str, str]) -> None:
    done = run_sweep(tmp_path, variables, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "0 of them done before" in done.stdout and "2 runs left, about" in done.stdout
    with (tmp_path / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["num_keys"] for row in rows] == ["4", "5", "6"]
    assert rows[0]["best_eval_loss"] == "0.002" and rows[0]["last_step"] == "200"
    assert rows[0]["eval_losses"] == "0.004 0.002"
    before = (tmp_path / "runs.csv").read_bytes()
    again = run_sweep(tmp_path, variables, *SMALL)
    assert "3 of them done before" in again.stdout
    assert (tmp_path / "runs.csv").read_bytes() == before
    assert calls(variables) == ["4 1", "5 1", "6 1"]


def test_a_line_that_was_not_written_to_its_end_is_done_again(tmp_path: Path, variables: dict[str, str]) -> None:
    run_sweep(tmp_path, variables, *SMALL)
    path = tmp_path / "runs.csv"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert len(read_results(tmp_path)) == 2
    run_sweep(tmp_path, variables, *SMALL)
    assert [run.num_keys for run in read_results(tmp_path)] == [4, 5, 6]
    assert path.read_bytes().count(b"\n") == whole.count(b"\n")


def test_two_processes_share_the_runs(tmp_path: Path, variables: dict[str, str]) -> None:
    arguments = command(tmp_path, "--models", "dpfp1_sum", "softmax", "--sizes", *range(1, 9), "--jobs", 2)
    both = [
        subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env={**variables, "PAUSE": "0.05"})
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=100)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert len(read_results(tmp_path)) == 16
    assert sorted(calls(variables)) == sorted(f"{size} 1" for size in range(1, 9) for _ in range(2))


def test_a_killed_sweep_gives_its_claims_back(tmp_path: Path, variables: dict[str, str]) -> None:
    process = subprocess.Popen(command(tmp_path, *SMALL), env={**variables, "PAUSE": "30"}, start_new_session=True)
    end = time.monotonic() + 60
    while not calls(variables) and time.monotonic() < end:
        time.sleep(0.02)
    # The same runs, while the first process has one of them in hand.
    other = run_sweep(tmp_path, variables, *SMALL)
    assert "1 runs are in the hands of another process" in other.stdout
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    rest = run_sweep(tmp_path, variables, *SMALL)
    assert "all runs are done" in rest.stdout
    assert calls(variables) == ["4 1", "5 1", "6 1", "4 1"]


def test_an_interrupted_sweep_ends_its_trainings(tmp_path: Path, variables: dict[str, str]) -> None:
    process = subprocess.Popen(command(tmp_path, *SMALL), env={**variables, "PAUSE": "60"}, stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while not calls(variables) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143
    assert not read_results(tmp_path)


def test_a_training_that_fails_is_named_in_one_sentence(tmp_path: Path, variables: dict[str, str]) -> None:
    done = run_sweep(tmp_path, variables, "--models", "softmax", "--sizes", 13, 4, "--jobs", 1)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "softmax-setting1-S13-seed1" in done.stderr and str(tmp_path / "logs") in done.stderr
    assert not read_results(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["name a figure", "figure2, figure3, figure4 or figure5"]),
        (["figure9"], ["name a figure"]),
        (["figure2", "figure3"], ["one figure at a time"]),
        (["figure2", "--sizes", "0"], ["--sizes", "'0'", "at least 1"]),
        (["figure2", "--jobs", "two"], ["--jobs", "'two'"]),
        (["figure2", "--models", "dpfp9_sum"], ["dpfp9_sum", "dpfp1_sum, dpfp2_sum"]),
        (["figure2", "--fast"], ["--fast"]),
        (["figure2", "--venv"], ["--venv needs a value"]),
    ],
)
def test_a_wrong_flag_gives_one_sentence_and_no_work(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    out = tmp_path / "out"
    done = front_end("--venv", "none", "--output", str(out), *arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("run.sh: ")
    assert all(word in done.stderr for word in words)
    assert not out.exists()


def front_end(*arguments: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        ["bash", str(RECIPE / "run.sh"), *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env={**own, "PYTHON": sys.executable, "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
    )


def test_help_says_what_there_is_and_does_no_work() -> None:
    done = front_end("--help")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("figure2|figure3|figure4|figure5", "--quick", "--jobs", "--venv"))


def test_a_run_is_a_training_with_fairseq_train(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = front_end("figure2", "--venv", "none", "--output", str(tmp_path), "--models", "softmax", "--sizes", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    ((run, result),) = read_results(tmp_path).items()
    assert run == Run("softmax", False, 4)
    assert result.best <= experiments.TARGET_LOSS
    assert result.last_step <= 1000
    assert (tmp_path / "figure2.png").stat().st_size > 10_000
    assert ElementTree.parse(tmp_path / "figure2.svg").getroot().tag.endswith("svg")


# --- Results ---------------------------------------------------------------------------------------------------------


def finished(losses: Iterable[tuple[Run, float]]) -> dict[Run, Result]:
    return {run: Result(1.0, (loss,)) for run, loss in losses}


def write(folder: Path, results: dict[Run, Result]) -> None:
    for run, result in results.items():
        sweep.append_result(folder, run, result)


def authors_results() -> dict[Run, Result]:
    """What the authors found, as if it were ours."""
    return finished((Run(*point), loss) for point, (loss, _) in read_authors().items() if loss == loss)


def run_compare(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(RECIPE / "compare.py"), "--output", str(folder)], capture_output=True, text=True
    )


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    results = {
        Run("dpfp1_delta", True, 20, 3): Result(12.0, (0.5, 0.25)),
        Run("softmax", False, 40): Result(3.0, (1e-6,)),
    }
    write(tmp_path, results)
    assert read_results(tmp_path) == results


def test_the_authors_numbers_pass(tmp_path: Path) -> None:
    write(tmp_path, authors_results())
    done = run_compare(tmp_path)
    assert done.returncode == 0, done.stdout
    assert {line.split()[0] for line in done.stdout.splitlines()} == {"pass"}
    assert "312 of 312 points" in done.stdout


@pytest.mark.parametrize(
    ("run", "loss", "words"),
    [
        (Run("elu_sum", False, 40), 0.02, "linear attention is solved at S <= 40"),
        (Run("elu_sum", False, 80), 0.001, "linear attention is not solved at S >= 80"),
        (Run("dpfp1_sum", False, 160), 0.001, "DPFP-1 is not solved at S >= 160"),
        (Run("dpfp3_sum", False, 320), 0.5, "DPFP-3 is solved at S <= 320"),
        (Run("favor512_sum", False, 40), 0.01, "FAVOR+ with m = 512"),
        (Run("softmax", False, 480), float("nan"), "softmax is solved at S <= 480"),
        (Run("dpfp1_delta", True, 20, 2), 0.003, "the delta rule is below 0.002"),
        (Run("dpfp1_sum", True, 20), 0.04, "the sum rule is above 0.05"),
        (Run("tanh_fwm", True, 20), 0.0001, "FWM is above the delta rule"),
    ],
)
def test_a_loss_that_contradicts_a_claim_fails_it_alone(tmp_path: Path, run: Run, loss: float, words: str) -> None:
    write(tmp_path, {**authors_results(), **finished([(run, loss)])})
    done = run_compare(tmp_path)
    assert done.returncode == 1
    (failed,) = (line for line in done.stdout.splitlines() if line.startswith("fail"))
    assert words in failed and f"S = {run.num_keys}" in failed


def test_agreement_needs_four_points_of_five() -> None:
    authors: Any = {("elu_sum", False, size): (0.1, 100) for size in (20, 40, 60, 80, 100)}

    def verdict(*ours: float) -> str:
        losses = {("elu_sum", False, 20 * (i + 1)): [loss] for i, loss in enumerate(ours)}
        return compare.agreement(losses, authors).verdict

    assert verdict(0.1, 0.05, 0.2, 0.119, 0.9) == "pass"
    assert verdict(0.1, 0.05, 0.2, 0.9, 0.9) == "fail"
    assert verdict(0.1, 0.05, 0.2, 0.9, float("nan")) == "fail"
    assert verdict() == "missing"


def test_what_was_not_run_is_missing_and_no_pass(tmp_path: Path) -> None:
    assert run_compare(tmp_path).returncode == 2
    write(tmp_path, finished([(Run("softmax", False, 20), 0.001)]))
    done = run_compare(tmp_path)
    assert done.returncode == 1
    assert "missing DPFP-1 is solved" in done.stdout and "pass    softmax" in done.stdout


def test_every_run_of_the_figures_has_flags_and_a_guess_of_its_time() -> None:
    authors = read_authors()
    for figure in FIGURES.values():
        for run in figure.runs(figure.sizes, figure.seeds, figure.models):
            assert "--task" in run.flags("x")
            assert 0 < experiments.expected_seconds(run, authors) < 24 * 3600


def test_every_figure_is_drawn_from_what_there_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import draw

    assert not draw.draw("figure2", tmp_path)
    write(tmp_path, authors_results() | finished([(Run("dpfp1_delta", True, 20, 2), 0.001)]))
    for name, figure in FIGURES.items():
        assert draw.draw(name, tmp_path)
        svg = (tmp_path / f"{name}.svg").read_text("utf-8")
        assert all(draw.STYLES[model][0].split(",")[0] in svg for model in figure.models)
        assert "thin: the authors" in svg and "loss" in svg
    assert not list(tmp_path.glob("*.new*"))
