"""The benchmark recipes: what they say of their figures, and of wrong arguments. Nothing is timed here."""

import dataclasses
import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest
from conftest import ROOT

RECIPE = ROOT / "recipes" / "benchmark"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(RECIPE))  # they import what they share
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", RECIPE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def test_runs_of_decoding_survive_their_table_and_are_compared_with_softmax(tmp_path, monkeypatch):
    decode = load("decode", monkeypatch)
    rows = [
        decode.Row("softmax", 5, 1, 64, 20.0, 40.0, 60.0, 1000, 700.0),
        decode.Row("all places", 5, 1, 64, 50.0, 20.0, 21.0, 900, 700.0),
        decode.Row("all places", 1, 1, 64, 50.0, 20.0, 21.0, 900, 700.0),
        decode.Row("lm delta", 1, 1, 8192, 50.0, 20.0, 21.0, 900, 700.0),
    ]
    table = tmp_path / "decode.csv"
    decode.write_rows(table, rows)
    assert decode.read_csv(table) == rows
    assert [path.name for path in tmp_path.iterdir()] == ["decode.csv"]
    (claim,) = decode.claims(rows)  # the others have no softmax beside them
    assert claim == "all places, beam 5, 1 sentences, length 64: 2.50 x softmax; last / first tenth 1.050"


def test_every_run_of_decoding_has_its_softmax_and_its_data(monkeypatch):
    decode = load("decode", monkeypatch)
    softmax = {(r.beam, r.sentences, r.length) for r in decode.RUNS if r.model in ("softmax", "lm softmax")}
    assert all((r.beam, r.sentences, r.length) in softmax for r in decode.RUNS)
    assert {r.sentences for r in decode.RUNS} <= set(decode.SUBSETS)
    assert {5} == {r.beam for r in decode.RUNS if r.model == "softmax"} - {1}


def test_every_captured_run_of_decoding_has_one_without_and_both_their_softmax(monkeypatch):
    decode = load("decode", monkeypatch)
    runs = set(decode.GPU_RUNS)
    for run in runs:
        name = run.model.removesuffix(decode.EAGER)
        beside = [name] if "softmax" in name else [name, name + decode.EAGER]
        beside.append("lm softmax" if decode.is_lm(name) else "softmax")
        assert all(dataclasses.replace(run, model=other) in runs for other in beside)
    assert {run.sentences for run in runs} <= set(decode.SUBSETS)
    rows = [
        decode.Row("softmax", 5, 1, 64, 20.0, 40.0, 60.0, 1000, 700.0),
        decode.Row("decoder, eager", 5, 1, 64, 40.0, 20.0, 20.0, 900, 700.0),
        decode.Row("decoder", 5, 1, 64, 100.0, 10.0, 10.0, 900, 700.0),
    ]
    assert [claim.partition(": ")[2] for claim in decode.claims(rows)] == [
        "2.00 x softmax; last / first tenth 1.000",
        "5.00 x softmax; last / first tenth 1.000",
        "2.50 x decoder, eager; last / first tenth 1.000",
    ]


def test_operators_are_compared_with_the_best_of_the_others(monkeypatch):
    operators = load("operators", monkeypatch)
    first = str(operators.SHAPES[0])

    def row(rule, name, milliseconds, shape=first, length=512, peak=1.0):
        return operators.Row(shape, length, rule, name, 1.0, milliseconds, 0.0, None, None, peak)

    last = operators.LENGTHS[-1]
    sweep = str(operators.sweep_shape(last))
    found = list(
        operators.claims(
            [
                row("sum", "native", 10.0),
                row("sum", "fast-transformers", 40.0),
                row("delta", "native", 15.0),
                row("delta", "chunk", 60.0),
                row("delta", "fla, chunks", 45.0),
                row("delta", "native", 21.0, sweep, last, peak=5.0),
                row("delta", "loop", 900.0, sweep, last, peak=100.0),
            ]
        )
    )
    assert found == [
        "sum, native / fast-transformers: 0.25",
        "delta, native / best plain torch chunks (fla, chunks): 0.33",
        "delta / sum, native: 1.50",
        "delta, peak memory at L = 16384, native / token loop: 0.050",
    ]


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("run.sh", ["--only", "decode"], "run.sh: --only is 'decode', allowed are: operators, models."),
        ("decode.sh", ["--only", "models"], "decode.sh: --only is 'models', allowed are: step, decode."),
        ("decode.sh", ["--", "--lengths", "64"], "options after -- are for one part"),
        ("run.sh", ["--output"], "run.sh: --output needs a value."),
        ("run.sh", ["fast"], "run.sh: unexpected argument 'fast'"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_done(script, arguments, message, tmp_path):
    run = subprocess.run(["bash", RECIPE / script, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 1 and message in run.stderr
    assert not list(tmp_path.iterdir())
