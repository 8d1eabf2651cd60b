"""Damaged files are refused, and wrong use answered, in one sentence."""

import json
import os
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Corpus, Run, find_script

from fwp_fairseq.fairseq_mends.safe_loading import load_checkpoint_file

pytest.importorskip("fairseq")
import tiny_models  # noqa: E402
from fairseq import checkpoint_utils  # noqa: E402

import fwp_fairseq.models  # noqa: E402, F401


def refusal(path: Path) -> str:
    with pytest.raises(Exception, match="was not loaded") as caught:
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    return str(caught.value)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": {"weight": torch.arange(1000.0)}, "args": None}, path)
    return path


def test_one_bit_that_is_turned_over_in_a_parameter_is_noticed(checkpoint: Path) -> None:
    data = bytearray(checkpoint.read_bytes())
    place = data.index(torch.arange(1000.0).numpy().tobytes()[400:440])
    data[place] ^= 1
    checkpoint.write_bytes(data)
    with checkpoint.open("rb") as file:
        assert torch.load(file, weights_only=True)  # torch does not notice
    assert "incomplete or damaged" in refusal(checkpoint)


def test_a_compressed_checkpoint_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    torch.save({"model": {"weight": torch.zeros(10)}}, tmp_path / "small.pt")
    with (
        zipfile.ZipFile(tmp_path / "small.pt") as small,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in small.infolist():
            content = bytes(50_000_000) if "/data/" in entry.filename else small.read(entry)
            bomb.writestr(entry.filename, content)
    assert (tmp_path / "bomb.pt").stat().st_size < 100_000
    assert "incomplete or damaged" in refusal(tmp_path / "bomb.pt")


def test_a_sound_checkpoint_is_read_from_where_the_file_stands(checkpoint: Path) -> None:
    with checkpoint.open("rb") as file:
        assert load_checkpoint_file(file)["model"]["weight"].equal(torch.arange(1000.0))
        file.seek(0)
        assert load_checkpoint_file(file)


def test_a_checkpoint_of_another_size_is_refused_by_the_parameter_that_differs() -> None:
    for build in (tiny_models.build_translation, tiny_models.build_lm):
        small, large = build(words=20), build(words=21)
        with pytest.raises(ValueError, match=r"embed_tokens.weight has the shape \(20, 8\).*\(21, 8\).*dictionaries"):
            large.load_state_dict(small.state_dict())


TRAINING = (
    *("--user-dir", "fwp_fairseq", "--cpu", "--encoder-layers", 1, "--decoder-layers", 1, "--batch-size", 50),
    *("--optimizer", "adam", "--criterion", "cross_entropy", "--no-save", "--max-update", 1),
)


WRONG = [
    ("--encoder-embed-dim 0", 1, "--encoder-embed-dim is 0, it must be at least 1"),
    ("--update-rule hebb", 2, "--update-rule: invalid choice: 'hebb'"),
    ("--feature-map cosine", 2, "--feature-map: invalid choice: 'cosine'"),
    ("--key-normalization l3", 2, "--key-normalization: invalid choice: 'l3'"),
    ("--whole-memory-update-rule hebb", 2, "--whole-memory-update-rule: invalid choice: 'hebb'"),
    ("--whole-memory-feature-map cosine", 2, "--whole-memory-feature-map: invalid choice: 'cosine'"),
    ("--encoder-self-attention none", 2, "--encoder-self-attention: invalid choice: 'none'"),
    ("--decoder-self-attention none", 2, "--decoder-self-attention: invalid choice: 'none'"),
    ("--cross-attention none", 2, "--cross-attention: invalid choice: 'none'"),
    ("--fast-weight-backend cuda", 2, "--fast-weight-backend: invalid choice: 'cuda'"),
    ("--dpfp-nu x", 2, "--dpfp-nu: invalid int value: 'x'"),
    ("--dpfp-nu 0", 1, "--dpfp-nu is 0, allowed is 1 to"),
    ("--dpfp-nu 10000", 1, "--dpfp-nu is 10000, allowed is 1 to"),
    ("--feature-map favor --favor-features 0", 1, "--favor-features is 0, it must be at least 1"),
    ("--decoder-attention-heads 3", 1, "--decoder-attention-heads is 3, it must divide"),
    ("--decoder-attention-heads 0", 1, "--decoder-attention-heads is 0, it must divide"),
    ("--feature-map tanh", 1, "--key-normalization is sum, but --feature-map tanh"),
    ("--feature-map tanh --key-normalization l2 --attention-normalization", 1, "needs non-negative features"),
    ("--update-rule fwm --attention-normalization", 1, "does not go with --update-rule fwm"),
    ("--update-rule fwm --fast-weight-backend native", 1, "--fast-weight-backend, with --update-rule fwm"),
    ("--update-rule sum --fast-weight-backend fla", 1, "--fast-weight-backend is fla, which has --update-rule delta"),
    ("--fast-weight-backend fla", 1, "--fast-weight-backend is fla, which needs a GPU"),
    ("--cross-attention fast-weight --whole-memory-feature-map tanh", 1, "--key-normalization is sum, but"),
]


def test_a_wrong_flag_or_pair_is_named_in_the_last_line(corpus: Corpus, run: Run, tmp_path: Path) -> None:
    # All in forks of one process: the imports take most of the time of a command that is refused.
    code = """
import json, sys
from pathlib import Path
from campaigns.training import fairseq, run
import fairseq_cli.train, fwp_fairseq.models
log, common, *wrong = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
for flags in wrong:
    log.write_text("")
    status = run(log, fairseq("train", *common, *flags))
    print(json.dumps([status, log.read_text().strip().splitlines()[-1]]))
"""
    common = [str(option) for option in (corpus.translation, *TRAINING, "--arch", "fwp_transformer")]
    arguments = [json.dumps(common), *(json.dumps(flags.split()) for flags, *_ in WRONG)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = run("python", "-c", code, tmp_path / "log", *arguments, PYTHONPATH=path)
    # fairseq has messages of its own.
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    for (flags, status, words), line in zip(WRONG, lines, strict=True):
        found, last_line = json.loads(line)
        assert (found, words in last_line) == (status, True), (flags, found, last_line)


@pytest.fixture(scope="module")
def model(corpus: Corpus, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    options = ("--save-dir", folder, "--arch", "fwp_transformer", "--encoder-embed-dim", 16, "--max-update", 1)
    training = [option for option in TRAINING if option != "--no-save"]
    run("fairseq-train", corpus.translation, *training, *options, "--no-epoch-checkpoints", "--valid-subset", "test")
    return folder / "checkpoint_last.pt"


def test_lines_that_are_empty_unknown_or_very_long_are_translated_or_refused(
    corpus: Corpus, model: Path, run: Run, side_by_side: Callable[..., list[Any]]
) -> None:
    command = ("fairseq-interactive", corpus.translation, "--user-dir", "fwp_fairseq", "--cpu", "--path", model)
    interactive = partial(run, *command, "--beam", 1, "--max-len-b", 5, check=False)
    lines = ["", "unheard", "ba", "\0", "\u2028\x85 \ufeff", "ba " * 1000]
    short, long = side_by_side(
        lambda: interactive(stdin="".join(line + "\n" for line in lines)),
        lambda: interactive(stdin="ba " * 20_000 + "\n"),
    )
    assert short.returncode == 0, short.stderr
    assert short.stdout.count("\nH-") + short.stdout.startswith("H-") >= len(lines)
    assert long.returncode in (0, 1)
    if long.returncode:
        assert "20001" in long.stderr.strip().splitlines()[-1] or "exceeds" in long.stderr


def test_one_process_of_two_that_is_killed_ends_the_other_within_a_minute(corpus: Corpus, run: Run) -> None:
    code = f"""
import os, re, signal, subprocess, sys, time
command = [{find_script("torchrun")!r}, "--standalone", "--nproc_per_node", "2", {find_script("fairseq-train")!r},
    {str(corpus.translation)!r}, "--user-dir", "fwp_fairseq", "--cpu", "--arch", "fwp_transformer",
    "--encoder-embed-dim", "16", "--optimizer", "adam", "--criterion", "cross_entropy", "--batch-size", "8",
    "--no-save", "--disable-validation", "--log-format", "simple", "--log-interval", "1",
    "--distributed-world-size", "2", "--distributed-init-method", "env://", "--distributed-rank=-1",
    "--distributed-no-spawn",
    "--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp"]
training = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
for line in training.stdout:
    if "num_updates=3," in line:
        break
children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(training.pid)], capture_output=True, text=True)
pids = [int(pid) for pid in children.stdout.split()]
os.kill(pids[-1], signal.SIGKILL)
killed = time.monotonic()
rest = training.stdout.read()
status = training.wait()
print(status, time.monotonic() - killed)
assert not any(os.path.exists(f"/proc/{{pid}}") for pid in pids), "a process is left"
"""
    done = run("python", "-c", code)
    status, seconds = map(float, done.stdout.split())
    assert status != 0 and seconds < 60
