"""Checkpoints are on the disk whole or not at all, and never with broken parameters."""

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Corpus, Run, find_script
from torch import Tensor

from fwp_fairseq.average_checkpoints import main as average_main
from fwp_fairseq.fairseq_mends.safe_loading import load_checkpoint_file
from fwp_fairseq.fairseq_mends.whole_checkpoints import replace_atomically, save_whole

pytest.importorskip("fairseq")
from campaigns import kills  # noqa: E402
from fairseq import checkpoint_utils, file_io  # noqa: E402


def load(path: Path) -> Any:
    with path.open("rb") as file:
        return load_checkpoint_file(file)


def state(value: float, size: int = 4) -> dict[str, Any]:
    return {"model": {"weight": torch.full((size,), value)}, "extra_state": {}}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process gets longer than this, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_copy_that_is_interrupted_leaves_the_file_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "checkpoint_best.pt", tmp_path / "checkpoint_last.pt"
    source.write_bytes(b"new" * 1000)
    target.write_bytes(b"old")

    def half_a_copy(source: Any, target: Any, *_: Any) -> None:
        target.write(source.read(1500))
        raise KeyboardInterrupt

    for name in ("copyfileobj", "copyfile"):
        monkeypatch.setattr(file_io.shutil, name, half_a_copy)
    with pytest.raises(KeyboardInterrupt):
        checkpoint_utils.PathManager.copy(str(source), str(target), overwrite=True)
    assert target.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_best.pt", "checkpoint_last.pt"]
    monkeypatch.undo()
    assert checkpoint_utils.PathManager.copy(str(source), str(target), overwrite=True)
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("size", [0, 1000, 100_000])
def test_a_full_disk_is_named_and_leaves_the_file_that_was_there(tmp_path: Path, size: int) -> None:
    path = tmp_path / "checkpoint_last.pt"
    for there in (False, True):
        with largest_file(size), pytest.raises(OSError) as caught:
            checkpoint_utils.torch_persistent_save(state(2.0, 100_000), str(path))
        message = str(caught.value)
        assert message.startswith(f"{path} could not be written (File too large)") and "\n" not in message
        assert ("is as it was" in message) == there
        assert os.listdir(tmp_path) == ([path.name] if there else [])
        save_whole(state(1.0, 4), str(path))
    assert load(path)["model"]["weight"].tolist() == [1.0] * 4


def test_an_error_while_writing_is_not_followed_by_a_second_try_behind_it(tmp_path: Path) -> None:
    def write(file: Any) -> None:
        file.write(b"half")
        raise RuntimeError("no more")

    with pytest.raises(OSError, match=r"could not be written \(no more\)"):
        replace_atomically(str(tmp_path / "x.pt"), write)
    assert not os.listdir(tmp_path)


def test_a_file_is_on_the_disk_before_it_gets_its_name_and_then_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "checkpoint_last.pt", []

    def fsync(descriptor: int) -> None:
        synced = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        seen.append((synced.name, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    save_whole(state(1.0), str(path))
    assert seen == [("checkpoint_last.pt.tmp", False), (tmp_path.name, True)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_average_of_checkpoints_is_not_written_if_a_parameter_of_one_is_broken(
    tmp_path: Path, value: float
) -> None:
    files = [str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]
    for first, second in ((value, 1.0), (1.0, value)):
        for file, content in zip(files, (first, second), strict=True):
            torch.save(state(content), file)
        with pytest.raises(SystemExit, match="weight is infinite or not a number"):
            average_main(["--inputs", *files, "--output", str(tmp_path / "c.pt")])
        assert not (tmp_path / "c.pt").exists()


def test_memory_that_a_model_never_writes_does_not_keep_checkpoints_from_being_averaged(tmp_path: Path) -> None:
    files = [str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]
    for file, content in zip(files, (1.0, 2.0), strict=True):
        torch.save({"model": {**state(content)["model"], "unused": torch.tensor([float("nan"), 3.0])}}, file)
    average_main(["--inputs", *files, "--output", str(tmp_path / "c.pt")])
    assert load(tmp_path / "c.pt")["model"]["weight"].tolist() == [1.5] * 4


TRAINING = (
    *("--user-dir", "fwp_fairseq", "--cpu", "--arch", "fwp_transformer", "--encoder-layers", 1, "--decoder-layers", 1),
    *("--encoder-embed-dim", 16, "--encoder-ffn-embed-dim", 16, "--encoder-attention-heads", 2),
    *("--decoder-attention-heads", 2, "--optimizer", "adam", "--criterion", "cross_entropy", "--batch-size", 8),
    *("--no-epoch-checkpoints", "--save-interval-updates", 2, "--valid-subset", "test"),
)


def test_training_on_a_full_disk_ends_with_one_sentence_and_goes_on_from_its_last_whole_checkpoint(
    corpus: Corpus, run: Run, tmp_path: Path
) -> None:
    command = ("fairseq-train", corpus.translation, *TRAINING, "--save-dir", tmp_path / "full", "--max-update", 4)
    # The checkpoint has some 160 kilobytes.
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (100 * 1024,) * 2)"
    code = f"import resource, runpy, sys; {limit}; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    limited = run("python", "-c", code, find_script(command[0]), *command[1:], check=False)
    assert limited.returncode == 1
    last_line = limited.stderr.strip().splitlines()[-1]
    assert last_line.startswith("OSError:") and "could not be written (File too large)" in last_line
    assert not list((tmp_path / "full").glob("*.tmp")) and not list((tmp_path / "full").glob("*.pt"))
    run(*command)
    assert load(tmp_path / "full" / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"] == 4


def test_a_training_that_explodes_ends_in_an_error_and_keeps_its_last_sound_checkpoint(
    corpus: Corpus, run: Run, tmp_path: Path
) -> None:
    command = ("fairseq-train", corpus.translation, *TRAINING, "--save-dir", tmp_path)
    run(*command, "--max-update", 2)
    # One step of this length makes parameters infinite; the checkpoint would be written before the next loss is known.
    broken = run(*command, "--max-update", 3, "--lr", 1e39, "--reset-lr-scheduler", check=False)
    assert broken.returncode == 1
    assert broken.stderr.strip().splitlines()[-1].startswith("FloatingPointError")
    # Here they are only very large, and the gradients of the next loss are not finite.
    diverged = run(*command, "--max-update", 5, "--lr", 1e20, "--reset-lr-scheduler", check=False)
    assert diverged.returncode == 1
    assert diverged.stderr.strip().splitlines()[-1] == "FloatingPointError: gradients are Nan/Inf"
    kept: dict[str, Tensor] = load(tmp_path / "checkpoint_last.pt")["model"]
    assert all(value.isfinite().all() for value in kept.values())


def test_a_training_that_is_killed_four_times_ends_with_the_same_bits(corpus: Corpus, run: Run, tmp_path: Path) -> None:
    """A sample of campaigns/kills.py."""
    code = """
import random, sys
from pathlib import Path
import torch
from campaigns import kills, training
torch.set_num_threads(1)
import fairseq_cli.train, fwp_fairseq.models
kills.UPDATES = 30
data, home = map(Path, sys.argv[1:])
assert training.run(home / "unkilled.log", kills.command(data, home / "unkilled")) == 0
starts = kills.train_with_kills(kills.command(data, home / "run"), home / "run", random.Random(1), 1.5, kills=4)
print(starts)
assert starts[-1]["status"] == 0, (home / "run.log").read_text()
assert training.same_bits(home / "run" / "checkpoint_last.pt", home / "unkilled" / "checkpoint_last.pt")
assert any(start["killed"] for start in starts)
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "campaigns")])
    run("python", "-c", code, corpus.translation, tmp_path, PYTHONPATH=path)


def test_kills_are_counted_where_the_messages_of_a_training_end() -> None:
    assert kills.phase("") == "start"
    log = "task: X\n| train_inner | {}\n"
    assert kills.phase(log) == "updates"
    assert kills.phase(log + "begin validation on\n") == "validation"
    assert kills.phase(log + "begin validation on\n| valid | epoch 1\nPreparing to save checkpoint\n") == "writing"
    assert kills.phase(log + "Preparing to save checkpoint\nSaved checkpoint x\n") == "updates"
