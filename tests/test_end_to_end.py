"""fairseq's commands with the models of this package, from a corpus to a score."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Corpus, Run, find_script
from torch import Tensor

from fwp_fairseq.fairseq_mends.safe_loading import load_checkpoint_file

Result = subprocess.CompletedProcess[str]
SideBySide = Callable[..., list[Result]]
Training = tuple[list[str], dict[str, Tensor]]

USER_DIR = ("--user-dir", "fwp_fairseq", "--cpu")
# With its default of 8, fairseq 0.12.3 leaves out the sentences beyond the last full eight.
EVERY_SENTENCE = ("--required-batch-size-multiple", 1)
TRANSLATION = (
    *("--arch", "fwp_transformer", "--encoder-layers", 1, "--encoder-embed-dim", 64, "--encoder-ffn-embed-dim", 128),
    *("--encoder-attention-heads", 4, "--decoder-layers", 1, "--decoder-attention-heads", 4),
    *("--encoder-self-attention", "fast-weight", "--decoder-self-attention", "fast-weight"),
    *("--cross-attention", "fast-weight", "--update-rule", "delta", "--feature-map", "dpfp", "--dpfp-nu", 1),
    *("--key-normalization", "sum"),
)
LANGUAGE_MODEL = (
    *("--arch", "fwp_transformer_lm", "--decoder-layers", 1, "--decoder-embed-dim", 32),
    *("--decoder-ffn-embed-dim", 64, "--decoder-attention-heads", 2),
)
TRAINING = (
    *("--optimizer", "adam", "--lr", 1e-2, "--lr-scheduler", "inverse_sqrt", "--warmup-updates", 20, "--seed", 1),
    *("--criterion", "cross_entropy", "--log-format", "json", "--log-interval", 1, *EVERY_SENTENCE),
)
GENERATION = ("--beam", 3, "--scoring", "sacrebleu", *EVERY_SENTENCE)


def logged(result: Result, kind: str, name: str) -> list[str]:
    """The values called ``name`` in the lines of the log of this kind, in their order."""
    records = re.findall(rf"\| {kind} \| (\{{.*\}})$", result.stdout + result.stderr, re.M)
    return [json.loads(record)[name] for record in records]


def parameters(checkpoint: Path) -> dict[str, Tensor]:
    with open(checkpoint, "rb") as file:
        return load_checkpoint_file(file)["model"]


def outcome(folder: Path, *runs: Result) -> Training:
    """The loss of every update of the runs, as it was logged, and the parameters in the end."""
    losses = [loss for result in runs for loss in logged(result, "train_inner", "loss")]
    return losses, parameters(folder / "checkpoint_last.pt")


def bleu(result: Result) -> float:
    found = re.search(r"^Generate test .*BLEU = ([\d.]+)", result.stdout, re.M)
    assert found, result.stdout
    return float(found[1])


def hypotheses(result: Result) -> dict[int, str]:
    """Translation of each sentence by its number."""
    return {int(i): text for i, text in re.findall(r"^H-(\d+)\t\S+\t(.*)$", result.stdout, re.M)}


@pytest.fixture(scope="module")
def trained(corpus: Corpus, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the checkpoints of six epochs of a translation model with fast weights in all three places."""
    folder = tmp_path_factory.mktemp("trained")
    options = (*TRANSLATION, *TRAINING, "--dropout", 0, "--max-tokens", 500, "--max-epoch", 6, "--save-dir", folder)
    run("fairseq-train", corpus.translation, *USER_DIR, *options)
    return folder


@pytest.fixture(scope="module")
def translations(corpus: Corpus, trained: Path, run: Run, side_by_side: SideBySide) -> list[Result]:
    """Of the test set, with the last checkpoint: by fairseq-generate and by fairseq-interactive."""
    model = ("--path", trained / "checkpoint_last.pt", *GENERATION)
    sentences = (corpus.text / "test.a").read_text()
    return side_by_side(
        lambda: run("fairseq-generate", corpus.translation, *USER_DIR, *model),
        lambda: run("fairseq-interactive", corpus.translation, *USER_DIR, *model, stdin=sentences),
    )


def test_a_trained_model_translates_held_out_sentences(translations: list[Result]) -> None:
    generated, _ = translations
    assert bleu(generated) > 60


def test_interactive_translates_text_as_generate_does_the_binarised_test_set(translations: list[Result]) -> None:
    generated, interactive = map(hypotheses, translations)
    assert len(generated) == 50
    assert interactive == generated


def test_the_average_of_two_epochs_translates(corpus: Corpus, trained: Path, run: Run, tmp_path: Path) -> None:
    average = tmp_path / "average.pt"
    last_two = ("--inputs", trained, "--num-epoch-checkpoints", 2, "--output", average)
    run("python", "-m", "fwp_fairseq.average_checkpoints", *last_two)
    fifth, sixth, mean = map(parameters, (trained / "checkpoint5.pt", trained / "checkpoint6.pt", average))
    assert any(not torch.equal(fifth[name], sixth[name]) for name in mean)
    for name in mean:
        torch.testing.assert_close(mean[name], (fifth[name] + sixth[name]) / 2)
    assert bleu(run("fairseq-generate", corpus.translation, *USER_DIR, *GENERATION, "--path", average)) > 60


def test_eval_lm_finds_the_validation_loss_of_the_training_of_a_language_model(
    corpus: Corpus, run: Run, tmp_path: Path
) -> None:
    data = (
        *("--task", "language_modeling", corpus.language_model, *USER_DIR),
        *("--sample-break-mode", "none", "--tokens-per-sample", 32, "--max-tokens", 512),
    )
    training = run("fairseq-train", *data, *LANGUAGE_MODEL, *TRAINING, "--max-update", 30, "--save-dir", tmp_path)
    evaluation = run("fairseq-eval-lm", *data, "--path", tmp_path / "checkpoint_last.pt", "--gen-subset", "valid")
    loss = re.search(r"Loss \(base 2\): ([\d.]+)", evaluation.stdout + evaluation.stderr)
    assert loss
    # Guessing among the 20 words and the end of a sentence costs log2(21) = 4.39.
    assert float(loss[1]) < 4.3
    assert float(loss[1]) == pytest.approx(float(logged(training, "valid", "valid_loss")[-1]), abs=2e-3)


def hydra_overrides(*options: object) -> list[str]:
    """Options of fairseq-train with a value each as fairseq-hydra-train wants them."""
    sections = {
        "task": ["data"],
        "lr_scheduler": ["warmup_updates"],
        "optimization": ["lr", "max_update"],
        "dataset": ["batch_size", "required_batch_size_multiple"],
        "common": ["user_dir", "seed", "log_format", "log_interval"],
        "checkpoint": ["save_dir"],
    }
    section_of = {name: section for section, names in sections.items() for name in names}
    overrides = [
        "task=translation",
        "common.cpu=true",
        "common.reset_logging=true",
        "checkpoint.no_epoch_checkpoints=true",
    ]
    for flag, value in zip(options[::2], options[1::2], strict=True):
        name = str(flag).removeprefix("--").replace("-", "_")
        if name == "arch":
            overrides.append(f"+model._name={value}")
        elif name in ("criterion", "optimizer", "lr_scheduler"):
            overrides.append(f"{name}={value}")
        elif name in section_of:
            overrides.append(f"{section_of[name]}.{name}={[value] if name == 'lr' else value}")
        else:
            overrides.append(f"+model.{name}={value}")
    return overrides


@pytest.fixture(scope="module")
def twenty_updates(
    corpus: Corpus, run: Run, side_by_side: SideBySide, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Training]:
    """Twenty updates with dropout: at a stretch, in two halves, and by fairseq-hydra-train."""
    folder = tmp_path_factory.mktemp("twenty")
    # An epoch is 40 batches: the first half ends in the middle of one.
    options = (*TRANSLATION, *TRAINING, "--dropout", 0.1, "--batch-size", 50)
    command = ("fairseq-train", corpus.translation, *USER_DIR, *options, "--no-epoch-checkpoints", "--save-dir")
    # Hydra changes to a folder of its own.
    hydra = hydra_overrides(
        *(*options, "--max-update", 20, "--save-dir", folder / "hydra"),
        *("--data", corpus.translation, "--user-dir", ROOT / "fwp_fairseq"),
    )
    stretch, half = side_by_side(
        lambda: run(*command, folder / "stretch", "--max-update", 20),
        lambda: run(*command, folder / "halves", "--max-update", 10),
    )
    resumed, by_hydra = side_by_side(
        lambda: run(*command, folder / "halves", "--max-update", 20),
        lambda: run("fairseq-hydra-train", *hydra, f"hydra.run.dir={folder / 'hydra'}"),
    )
    return {
        "stretch": outcome(folder / "stretch", stretch),
        "halves": outcome(folder / "halves", half, resumed),
        "hydra": outcome(folder / "hydra", by_hydra),
    }


@pytest.mark.parametrize("other", ["halves", "hydra"])
def test_twenty_updates_are_the_same_when_resumed_half_way_and_when_run_by_hydra(
    twenty_updates: dict[str, Training], other: str
) -> None:
    expected_losses, expected = twenty_updates["stretch"]
    losses, found = twenty_updates[other]
    assert len(expected_losses) == 20
    assert losses == expected_losses
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_two_processes_that_resume_half_way_train_as_one_does_on_the_same_total_batch(
    corpus: Corpus, run: Run, tmp_path: Path
) -> None:
    # No dropout: each process draws its own.
    options = (*TRANSLATION, *TRAINING, "--dropout", 0, "--batch-size", 50, "--no-epoch-checkpoints", "--save-dir")
    command = ("fairseq-train", corpus.translation, *USER_DIR, *options)
    # Without a GPU fairseq takes nothing from torchrun by itself, and would start two trainings of one process each.
    distributed = (
        *("--distributed-world-size", 2, "--distributed-init-method", "env://", "--distributed-rank=-1"),
        *("--distributed-no-spawn", "--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp"),
    )
    torchrun = ("torchrun", "--standalone", "--nproc_per_node", 2, find_script("fairseq-train"), *command[1:])
    one = run(*command, tmp_path / "one", "--update-freq", 2, "--max-update", 10)
    half = run(*torchrun, tmp_path / "two", *distributed, "--max-update", 5)
    resumed = run(*torchrun, tmp_path / "two", *distributed, "--max-update", 10)
    assert "training on 2 devices" in half.stdout + half.stderr
    expected_losses, expected = outcome(tmp_path / "one", one)
    losses, found = outcome(tmp_path / "two", half, resumed)
    # Three digits after the point are logged. The sums are the same but for their order, which Adam amplifies where a
    # gradient is almost nothing.
    assert len(expected_losses) == 10
    assert list(map(float, losses)) == pytest.approx(list(map(float, expected_losses)), abs=2e-3)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-3, rtol=1e-3)
