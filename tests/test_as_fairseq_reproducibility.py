"""A training that resumes ends with the same bits and the same log, as fairseq's test_reproducibility has it."""

import shutil
from pathlib import Path

import pytest
from conftest import Corpus

pytest.importorskip("fairseq")
from in_process import KINDS, Log, fairseq_train, same_weights, saved, translation  # noqa: E402

PRECISIONS = {
    "float32": {},
    # Without fp16_no_flatten_grads fairseq puts the parameters of the optimizer on a GPU.
    "fp16": {"fp16": True, "fp16_no_flatten_grads": True, "fp16_init_scale": 4},
    "memory-efficient fp16": {"memory_efficient_fp16": True, "fp16": True, "fp16_init_scale": 4},
}
# How far what is logged may be off: the float32 copy that --fp16 trains is not in fairseq's checkpoints.
TOLERANCE = {"float32": 0, "fp16": 0.03, "memory-efficient fp16": 0}
TRAIN = ("train_loss", "train_ppl", "train_num_updates", "train_gnorm")
VALID = ("valid_loss", "valid_ppl", "valid_num_updates", "valid_best_loss")


def last_epoch(log: Log) -> list[float]:
    train, valid = log.stats("train")[-1], log.stats("valid")[-1]
    return [train[name] for name in TRAIN] + [valid[name] for name in VALID]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_that_resumes_from_any_checkpoint_ends_as_one_at_a_stretch(
    kind: str, precision: str, small_corpus: Corpus, tmp_path: Path
) -> None:
    given = {"data": small_corpus.translation, "max_epoch": 2, "dropout": 0.1, **PRECISIONS[precision]}
    at_a_stretch = fairseq_train(translation(kind), save_dir=tmp_path / "all", save_interval_updates=4, **given)
    expected = saved(tmp_path / "all" / "checkpoint_last.pt")["model"]
    # An epoch has six updates: in the middle of the first, at its end, and in the middle of the second.
    for name in ("checkpoint_1_4.pt", "checkpoint1.pt", "checkpoint_2_8.pt"):
        folder = tmp_path / name.removesuffix(".pt")
        folder.mkdir()
        shutil.copy(tmp_path / "all" / name, folder / "checkpoint_last.pt")
        resumed = fairseq_train(translation(kind), save_dir=folder, **given)
        losses = at_a_stretch.losses()[-len(resumed.losses()) :]
        assert 0 < len(losses) < len(at_a_stretch.losses()) == 12
        assert resumed.losses() == pytest.approx(losses, rel=0, abs=TOLERANCE[precision]), name
        assert last_epoch(resumed) == pytest.approx(last_epoch(at_a_stretch), rel=0, abs=5 * TOLERANCE[precision]), name
        if not TOLERANCE[precision]:
            assert same_weights(saved(folder / "checkpoint_last.pt")["model"], expected), name
