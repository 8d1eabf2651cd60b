"""Where a training goes on, as fairseq's tests of fairseq-train have it: with what, and with which batch next."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import pytest
from conftest import Corpus

pytest.importorskip("fairseq")
from fairseq import checkpoint_utils  # noqa: E402
from fairseq.data import ListDataset  # noqa: E402
from fairseq.data.iterators import EpochBatchIterator  # noqa: E402
from fairseq.trainer import Trainer  # noqa: E402
from in_process import KINDS, fairseq_train, same_weights, saved, trainer_of, translation  # noqa: E402

# An epoch is six batches.
MIDDLE, END = "checkpoint_1_4.pt", "checkpoint1.pt"
Resume = Callable[..., tuple[Trainer, EpochBatchIterator]]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def trained(kind: str, small_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with checkpoints of the middle and of the end of the first epoch."""
    folder = tmp_path_factory.mktemp("trained")
    fairseq_train(
        translation(kind), data=small_corpus.translation, save_dir=folder, max_epoch=1, save_interval_updates=4
    )
    return folder


@pytest.fixture
def resume(kind: str, small_corpus: Corpus, tmp_path: Path) -> Resume:
    """Start a training with these options up to its first update: its trainer and its batches."""

    def resume(**given: object) -> tuple[Trainer, EpochBatchIterator]:
        trainer = trainer_of(translation(kind), data=small_corpus.translation, **{"save_dir": tmp_path, **given})
        _, batches = checkpoint_utils.load_checkpoint(trainer.cfg.checkpoint, trainer)
        return trainer, batches

    return resume


def sentences(batches: EpochBatchIterator) -> list[list[int]]:
    """Their numbers in the batches that are left of the epoch."""
    return [batch["id"].tolist() for batch in batches.next_epoch_itr(shuffle=True)]


def has_the_weights_of(trainer: Trainer, path: Path) -> bool:
    return same_weights(trainer.model.state_dict(), saved(path)["model"])


def test_a_training_that_ended_within_an_epoch_goes_on_with_the_next_batch_of_it(trained: Path, resume: Resume) -> None:
    _, fresh = resume()
    whole_epoch = sentences(fresh)
    trainer, batches = resume(restore_file=trained / MIDDLE)
    assert has_the_weights_of(trainer, trained / MIDDLE)
    assert (trainer.get_num_updates(), batches.epoch, batches.iterations_in_epoch) == (4, 1, 4)
    assert sentences(batches) == whole_epoch[4:]
    assert batches.next_epoch_idx == 2
    assert sentences(batches) == sentences(fresh)


def test_a_training_that_ended_with_an_epoch_goes_on_with_the_next_one(trained: Path, resume: Resume) -> None:
    _, fresh = resume()
    first_epoch, second_epoch = sentences(fresh), sentences(fresh)
    assert first_epoch != second_epoch
    trainer, batches = resume(restore_file=trained / END)
    assert (trainer.get_num_updates(), batches.next_epoch_idx, batches.iterations_in_epoch) == (6, 2, 0)
    assert sentences(batches) == second_epoch


def test_a_training_without_a_checkpoint_begins_with_the_first_epoch(resume: Resume) -> None:
    trainer, batches = resume()
    assert (trainer.get_num_updates(), batches.next_epoch_idx, batches.iterations_in_epoch) == (0, 1, 0)
    assert sorted(sum(sentences(batches), [])) == list(range(48))


@pytest.mark.parametrize("part", ["optimizer", "lr_scheduler", "meters", "dataloader"])
def test_finetuning_resets_everything_by_itself(trained: Path, resume: Resume, part: str) -> None:
    with pytest.raises(ValueError, match="--finetune-from-model can not be set together with"):
        resume(finetune_from_model=trained / END, **{f"reset_{part}": True})


def test_finetuning_begins_with_the_weights_and_with_nothing_else(trained: Path, resume: Resume) -> None:
    trainer, batches = resume(finetune_from_model=trained / END)
    assert has_the_weights_of(trainer, trained / END)
    assert not trainer.optimizer.optimizer.state
    assert (trainer.get_num_updates(), batches.next_epoch_idx, batches.iterations_in_epoch) == (0, 1, 0)


def test_finetuning_that_is_started_again_goes_on_from_its_own_checkpoint(trained: Path, resume: Resume) -> None:
    trainer, batches = resume(finetune_from_model=trained / END, save_dir=trained)
    assert len(trainer.optimizer.optimizer.state) > 0
    assert (trainer.get_num_updates(), batches.next_epoch_idx) == (6, 2)


class TrainerOfItsOwn:
    """What fairseq's load_checkpoint asks of a trainer, and no more."""

    checkpoint_suffix = ""

    def __init__(self, iterations: Optional[int]):
        self.iterations = iterations
        self.task = object()

    def load_checkpoint(self, *_: Any, **__: Any) -> Optional[dict[str, Any]]:
        if self.iterations is None:
            return None
        return {"train_iterator": {"epoch": 2, "iterations_in_epoch": self.iterations, "shuffle": False}}

    def get_train_iterator(self, epoch: int, **_: Any) -> EpochBatchIterator:
        batches = [[i] for i in range(10)]
        return EpochBatchIterator(ListDataset(range(10)), collate_fn=list, batch_sampler=batches, epoch=epoch)

    def lr_step(self, epoch: int) -> None:
        pass


@pytest.mark.parametrize("iterations, epoch, first", [(5, 2, 5), (10, 3, 0), (None, 1, 0)])
def test_a_program_with_a_trainer_and_a_configuration_of_its_own_resumes(
    iterations: Optional[int], epoch: int, first: int, tmp_path: Path
) -> None:
    resets = dict.fromkeys(("reset_optimizer", "reset_lr_scheduler", "reset_meters", "reset_dataloader"), False)
    cfg = SimpleNamespace(
        save_dir=str(tmp_path),
        optimizer_overrides="{}",
        finetune_from_model=None,
        restore_file="checkpoint_last.pt",
        **resets,
    )
    _, batches = checkpoint_utils.load_checkpoint(cfg, TrainerOfItsOwn(iterations))
    assert batches.next_epoch_idx == epoch
    assert list(batches.next_epoch_itr(shuffle=False)) == [[i] for i in range(first, 10)]
