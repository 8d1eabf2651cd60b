"""A training that resumes ends with the same bits and the same log, as fairseq's test_reproducibility has it."""

import shutil
from pathlib import Path

import pytest
from conftest import Corpus

pytest.importorskip("fairseq")
from in_process import KINDS, Log, fairseq_train, same_weights, saved, translation  # noqa: E402

PRECISIONS: dict[str, dict[str, object]] = {
    "float32": {},
    # --fp16 by itself trains a copy in float32, which is not in fairseq's checkpoints.
    "memory-efficient fp16": {"memory_efficient_fp16": True, "fp16": True, "fp16_init_scale": 4},
}
# An epoch has six updates.
CHECKPOINTS = {
    "the middle of the first epoch": "checkpoint_1_4.pt",
    "its end": "checkpoint1.pt",
    "the middle of the second epoch": "checkpoint_2_8.pt",
}
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
    for place, name in CHECKPOINTS.items():
        folder = tmp_path / place
        folder.mkdir()
        shutil.copy(tmp_path / "all" / name, folder / "checkpoint_last.pt")
        resumed = fairseq_train(translation(kind), save_dir=folder, no_epoch_checkpoints=True, **given)
        assert 0 < len(resumed.losses()) < len(at_a_stretch.losses()) == 12
        assert resumed.losses() == at_a_stretch.losses()[-len(resumed.losses()) :], place
        assert last_epoch(resumed) == last_epoch(at_a_stretch), place
        assert same_weights(saved(folder / "checkpoint_last.pt")["model"], expected), place
