"""Trainings and builds at the same time do not disturb each other, and more processes train as one does."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Corpus, Run, find_script

from fwp_fairseq.fairseq_mends.one_training import why_alone
from fwp_fairseq.fairseq_mends.safe_loading import load_checkpoint_file

pytest.importorskip("fairseq")
from omegaconf import OmegaConf  # noqa: E402

TRAINING = (
    *("--user-dir", "fwp_fairseq", "--cpu", "--arch", "fwp_transformer", "--encoder-layers", 1, "--decoder-layers", 1),
    *("--encoder-embed-dim", 16, "--encoder-ffn-embed-dim", 16, "--optimizer", "adam", "--criterion", "cross_entropy"),
    *("--required-batch-size-multiple", 1, "--no-epoch-checkpoints", "--valid-subset", "test", "--seed", 1),
    *("--encoder-attention-heads", 2, "--decoder-attention-heads", 2),
)


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    with (folder / "checkpoint_last.pt").open("rb") as file:
        return load_checkpoint_file(file)["model"]


def test_two_trainings_at_once_from_one_clone_end_with_the_same_bits(
    corpus: Corpus, run: Run, side_by_side: Callable[..., Any], tmp_path: Path
) -> None:
    command = ("fairseq-train", corpus.translation, *TRAINING, "--batch-size", 50, "--max-update", 20, "--save-dir")
    side_by_side(*(lambda name=name: run(*command, tmp_path / name) for name in "ab"))
    a, b = parameters(tmp_path / "a"), parameters(tmp_path / "b")
    assert all(torch.equal(value, b[name]) for name, value in a.items())


def test_a_second_training_into_the_same_folder_is_refused_until_the_first_is_gone(
    corpus: Corpus, run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    # A process that was forked from the first, as those that load data are, and outlives it.
    code = """
import os, sys, time
from fwp_fairseq.fairseq_mends.one_training import hold_folder
hold_folder(sys.argv[1])
hold_folder(sys.argv[1])
if not os.fork():
    time.sleep(300)
    os._exit(0)
print("held", flush=True)
time.sleep(300)
"""
    first = subprocess.Popen(
        [sys.executable, "-c", code, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        command = ("fairseq-train", corpus.translation, *TRAINING, "--batch-size", 50, "--max-update", 1)
        refused = run(*command, "--save-dir", folder, check=False)
        assert refused.returncode != 0
        assert f"--save-dir {folder}: another training is writing" in refused.stderr.splitlines()[-1]
        assert not list(folder.glob("*.pt*"))
        run(*command, "--save-dir", tmp_path / "another")
        first.kill()
        first.wait()
        run(*command, "--save-dir", folder)
        assert (folder / "checkpoint_last.pt").is_file()
    finally:
        os.killpg(first.pid, signal.SIGKILL)


def test_two_processes_with_unequal_shards_train_as_one_does_that_accumulates_gradients(
    corpus: Corpus, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Seven batches: four for one process and three for the other, which takes part in the fourth update with none.
    options = ("--dropout", 0, "--batch-size", 300, "--max-update", 9)
    command = ("fairseq-train", corpus.translation, *TRAINING, *options)
    # Those that processes are told of which train alone.
    monkeypatch.setenv("WORLD_SIZE", "2")
    alone = OmegaConf.create({"common": {"cpu": True}, "distributed_training": {"distributed_world_size": 1}})
    distributed = why_alone(alone).rpartition(" with ")[2].removesuffix(".").split()
    monkeypatch.delenv("WORLD_SIZE")
    run(*command, "--update-freq", 2, "--save-dir", tmp_path / "one")
    torchrun = ("torchrun", "--standalone", "--nproc_per_node", 2, find_script("fairseq-train"))
    run(*torchrun, *command[1:], *distributed, "--save-dir", tmp_path / "two")
    one, two = parameters(tmp_path / "one"), parameters(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-3, rtol=1e-3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_two_builds_at_once_give_one_whole_library(tmp_path: Path) -> None:
    """Of a small source in place of the operators: what is tested is how setup.py builds."""
    source = tmp_path / "clone"
    (source / "fwp_fairseq" / "csrc").mkdir(parents=True)
    for name in ("setup.py", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    shutil.copy(ROOT / "fwp_fairseq" / "__init__.py", source / "fwp_fairseq")
    code = 'extern "C" int answer() { return 42; }\n'
    (source / "fwp_fairseq" / "csrc" / "small.cpp").write_text(code)
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    builds = [subprocess.Popen(build, cwd=source, env={**os.environ}, **output) for _ in range(2)]
    messages = [each.communicate(timeout=300)[0] for each in builds]
    assert [each.returncode for each in builds] == [0, 0], messages
    assert sum("-c fwp_fairseq/csrc/small.cpp" in each for each in messages) == 1, "the second has nothing to compile"
    (library,) = (source / "fwp_fairseq").glob("*.so")
    assert library.name.startswith("_native_for_torch_")
    call = f"import ctypes; print(ctypes.CDLL({str(library)!r}).answer())"
    assert subprocess.run([sys.executable, "-c", call], capture_output=True, text=True).stdout == "42\n"
