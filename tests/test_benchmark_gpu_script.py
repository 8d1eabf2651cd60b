"""``recipes/benchmark/gpu.sh`` where there is no GPU: what it says, and its rehearsal, in which parts may fail."""

import csv

import pytest
import torch
from conftest import ROOT
from recipe_scripts import assert_one_sentence, script, succeed

SCRIPT = ROOT / "recipes" / "benchmark" / "gpu.sh"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it does its work")


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--all", "--parts", "build decoding"], ["--parts is 'decoding'", "decode, peer"]),
        (["--all", "--output"], ["--output needs a value"]),
        (["--all", "--fast"], ["unknown option --fast"]),
        (["--all"], ["no GPU", "--rehearse"]),
        ([], ["no GPU", "--rehearse"]),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_done(tmp_path, arguments, words):
    output = [] if "--output" in arguments or not arguments else ["--output", tmp_path / "out"]
    assert_one_sentence(script(SCRIPT, *arguments, *output), *words)
    assert not list(tmp_path.glob("out/gpu-*"))


def test_a_rehearsal_goes_through_its_parts_and_survives_those_that_fail(tmp_path):
    # Of the parts, training fails: there is no data, and the folder of its wheels is not there.
    done = script(
        SCRIPT, "--all", "--rehearse", "--parts", "build sanitize training operators", "--output", tmp_path / "out",
        "--data", tmp_path / "nothing", FWP_WHEELS=str(tmp_path / "no wheels"),
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert "failed: training-softmax" in done.stdout.replace("training-default ", "").replace(
        "training-everywhere ", ""
    )
    assert "== operators: done" in done.stdout and "== sanitize-memcheck: done" in done.stdout
    rows = read_csv(tmp_path / "out" / "gpu-operators.csv")
    assert {row["rule"] for row in rows} == {"softmax", "sum", "delta", "gated-delta"}
    assert all(float(row["both_wall_ms"]) > 0 and not row["both_gpu_ms"] for row in rows)
    assert {row["order"] for row in read_csv(tmp_path / "out" / "gpu-step.csv")} == {
        "copy", "in place", "in beam order",
    }  # fmt: skip


def test_help_names_every_part():
    printed = succeed(SCRIPT, "--help")
    for part in ("build", "tests", "sanitize", "training", "operators", "lm", "decode", "peer"):
        assert f"\n  {part} " in printed
