"""fairseq's commands with the models of this package, from a corpus to a score."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Corpus, Run, find_script
from torch import Tensor

from fwp_fairseq.checkpoints import load_checkpoint_file

SideBySide = Callable[..., list[subprocess.CompletedProcess[str]]]

USER_DIR = ("--user-dir", "fwp_fairseq", "--cpu")
FAST_EVERYWHERE = (
    *("--encoder-self-attention", "fast-weight"),
    *("--decoder-self-attention", "fast-weight"),
    *("--cross-attention", "fast-weight"),
    *("--update-rule", "delta", "--feature-map", "dpfp", "--dpfp-nu", "1", "--key-normalization", "sum"),
)
SMALL = (
    *("--encoder-layers", 1, "--encoder-embed-dim", 64, "--encoder-ffn-embed-dim", 128, "--encoder-attention-heads", 4),
    *("--decoder-layers", 1, "--decoder-attention-heads", 4),
)
TRAINING = (
    *("--optimizer", "adam", "--lr", 5e-3, "--lr-scheduler", "inverse_sqrt", "--warmup-updates", 20, "--seed", 1),
    *("--log-format", "json", "--log-interval", 1),
)


def losses(result: subprocess.CompletedProcess[str]) -> list[str]:
    """The training loss of every update, as it is logged."""
    records = re.findall(r"\| train_inner \| (\{.*\})$", result.stdout + result.stderr, re.M)
    return [json.loads(record)["loss"] for record in records]


def parameters(checkpoint: Path) -> dict[str, Tensor]:
    with open(checkpoint, "rb") as file:
        return load_checkpoint_file(file)["model"]


def bleu(result: subprocess.CompletedProcess[str]) -> float:
    found = re.search(r"^Generate test .*BLEU = ([\d.]+)", result.stdout, re.M)
    assert found, result.stdout
    return float(found[1])


def hypotheses(result: subprocess.CompletedProcess[str]) -> dict[int, str]:
    """Translation of each sentence by its number."""
    return {int(i): text for i, text in re.findall(r"^H-(\d+)\t\S+\t(.*)$", result.stdout, re.M)}


@pytest.fixture(scope="module")
def trained(corpus: Corpus, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the checkpoints of a translation model with fast weights in all three places."""
    folder = tmp_path_factory.mktemp("trained")
    run(
        *("fairseq-train", corpus.translation, *USER_DIR, "--arch", "fwp_transformer", *SMALL, *FAST_EVERYWHERE),
        *(*TRAINING, "--criterion", "cross_entropy", "--max-tokens", 500, "--max-epoch", 8, "--save-dir", folder),
    )
    return folder


@pytest.fixture(scope="module")
def generated(corpus: Corpus, trained: Path, run: Run) -> subprocess.CompletedProcess[str]:
    """What fairseq-generate prints for the test set."""
    model = ("--path", trained / "checkpoint_last.pt", "--beam", 3, "--scoring", "sacrebleu")
    return run("fairseq-generate", corpus.translation, *USER_DIR, *model)


def test_a_trained_model_translates_held_out_sentences(generated: subprocess.CompletedProcess[str]) -> None:
    assert bleu(generated) > 60


def test_interactive_translates_text_as_generate_translates_the_binarised_test_set(
    corpus: Corpus, trained: Path, run: Run, generated: subprocess.CompletedProcess[str]
) -> None:
    source = (corpus.text / "test.a").read_text()
    model = ("--path", trained / "checkpoint_last.pt", "--beam", 3)
    result = run("fairseq-interactive", corpus.translation, *USER_DIR, *model, stdin=source)
    assert len(hypotheses(result)) == 50
    assert hypotheses(result) == hypotheses(generated)


def test_the_average_of_two_epochs_translates(corpus: Corpus, trained: Path, run: Run, tmp_path: Path) -> None:
    average = tmp_path / "average.pt"
    last_two = ("--inputs", trained, "--num-epoch-checkpoints", 2, "--output", average)
    run("python", "-m", "fwp_fairseq.average_checkpoints", *last_two)
    seventh, eighth, mean = map(parameters, (trained / "checkpoint7.pt", trained / "checkpoint8.pt", average))
    assert any(not torch.equal(seventh[name], eighth[name]) for name in mean)
    for name in mean:
        torch.testing.assert_close(mean[name], (seventh[name] + eighth[name]) / 2)
    model = ("--path", average, "--beam", 3, "--scoring", "sacrebleu")
    assert bleu(run("fairseq-generate", corpus.translation, *USER_DIR, *model)) > 60


def test_eval_lm_finds_the_validation_loss_of_the_training_of_a_language_model(
    corpus: Corpus, run: Run, tmp_path: Path
) -> None:
    data = ("--task", "language_modeling", corpus.language_model, *USER_DIR, "--sample-break-mode", "none")
    data = (*data, "--tokens-per-sample", 32, "--max-tokens", 512)
    training = run(
        *("fairseq-train", *data, "--arch", "fwp_transformer_lm", *TRAINING, "--criterion", "cross_entropy"),
        *("--decoder-layers", 1, "--decoder-embed-dim", 32, "--decoder-ffn-embed-dim", 64),
        *("--decoder-attention-heads", 2, "--max-update", 30, "--save-dir", tmp_path),
    )
    logged = re.findall(r"\| valid \| (\{.*\})$", training.stdout + training.stderr, re.M)
    evaluation = run("fairseq-eval-lm", *data, "--path", tmp_path / "checkpoint_last.pt", "--gen-subset", "valid")
    loss = re.search(r"Loss \(base 2\): ([\d.]+)", evaluation.stdout + evaluation.stderr)
    assert loss
    # Better than guessing among the 20 words and the end of a sentence, which is log2(21) = 4.39.
    assert float(loss[1]) < 4.3
    assert float(loss[1]) == pytest.approx(float(json.loads(logged[-1])["valid_loss"]), abs=2e-3)


BRIEF = (*SMALL, *FAST_EVERYWHERE, "--criterion", "cross_entropy", "--arch", "fwp_transformer", "--no-epoch-checkpoints")


@pytest.fixture(scope="module")
def twenty_updates(
    corpus: Corpus, run: Run, side_by_side: SideBySide, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[list[str], dict[str, Tensor]]]:
    """Losses and final parameters of 20 updates with dropout: at a stretch, in two halves, and by fairseq-hydra-train."""
    folder = tmp_path_factory.mktemp("twenty")
    # Batches of 100 of 2,000 sentences: the first half ends in the middle of the epoch.
    options = (*BRIEF, *TRAINING, "--dropout", 0.1, "--batch-size", 50, "--save-dir")
    command = ("fairseq-train", corpus.translation, *USER_DIR, *options)
    hydra = {
        "task": "translation",
        "task.data": corpus.translation,
        "model": "fwp_transformer",
        "model.encoder_layers": 1,
        "model.encoder_embed_dim": 64,
        "model.encoder_ffn_embed_dim": 128,
        "model.encoder_attention_heads": 4,
        "model.decoder_layers": 1,
        "model.decoder_attention_heads": 4,
        "model.dropout": 0.1,
        "model.encoder_self_attention": "fast-weight",
        "model.decoder_self_attention": "fast-weight",
        "model.cross_attention": "fast-weight",
        "model.update_rule": "delta",
        "model.feature_map": "dpfp",
        "criterion": "cross_entropy",
        "optimizer": "adam",
        "lr_scheduler": "inverse_sqrt",
        "lr_scheduler.warmup_updates": 20,
        "optimization.lr": "[5e-3]",
        "optimization.max_update": 20,
        "dataset.batch_size": 50,
        "checkpoint.save_dir": folder / "hydra",
        "checkpoint.no_epoch_checkpoints": "true",
        "common.user_dir": "fwp_fairseq",
        "common.cpu": "true",
        "common.seed": 1,
        "common.log_format": "json",
        "common.log_interval": 1,
        "hydra.run.dir": folder / "hydra",
        "hydra.job_logging.root.handlers": "[console]",
    }
    stretch, half = side_by_side(
        lambda: run(*command, folder / "stretch", "--max-update", 20),
        lambda: run(*command, folder / "halves", "--max-update", 10),
    )
    resumed, by_hydra = side_by_side(
        lambda: run(*command, folder / "halves", "--max-update", 20),
        lambda: run("fairseq-hydra-train", *(f"{key}={value}" for key, value in hydra.items())),
    )
    return {
        "stretch": (losses(stretch), parameters(folder / "stretch" / "checkpoint_last.pt")),
        "halves": (losses(half) + losses(resumed), parameters(folder / "halves" / "checkpoint_last.pt")),
        "hydra": (losses(by_hydra), parameters(folder / "hydra" / "checkpoint_last.pt")),
    }


@pytest.mark.parametrize("other", ["halves", "hydra"])
def test_twenty_updates_are_the_same_when_resumed_half_way_and_when_run_by_hydra(
    twenty_updates: dict[str, tuple[list[str], dict[str, Tensor]]], other: str
) -> None:
    expected_losses, expected = twenty_updates["stretch"]
    found_losses, found = twenty_updates[other]
    assert len(expected_losses) == 20
    assert found_losses == expected_losses
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def two_processes(
    corpus: Corpus, run: Run, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[list[str], dict[str, Tensor]]]:
    """Losses and final parameters of 10 updates on the same batches: one process, two, and two that resume half way."""
    folder = tmp_path_factory.mktemp("processes")
    # No dropout: each process draws its own.
    options = (*BRIEF, *TRAINING, "--dropout", 0, "--batch-size", 50, "--max-update", 10, "--save-dir")
    command = ("fairseq-train", corpus.translation, *USER_DIR, *options)
    torchrun = ("torchrun", "--standalone", "--nproc_per_node", 2, find_script("fairseq-train"), *command[1:])
    gloo = ("--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp")
    one = run(*command, folder / "one", "--update-freq", 2)
    two = run(*torchrun, folder / "two", *gloo)
    half = run(*torchrun, folder / "halves", *gloo, "--max-update", 5)
    resumed = run(*torchrun, folder / "halves", *gloo)
    return {
        "one": (losses(one), parameters(folder / "one" / "checkpoint_last.pt")),
        "two": (losses(two), parameters(folder / "two" / "checkpoint_last.pt")),
        "halves": (losses(half) + losses(resumed), parameters(folder / "halves" / "checkpoint_last.pt")),
    }


@pytest.mark.parametrize("other", ["two", "halves"])
def test_two_processes_train_as_one_does_on_the_same_total_batch_also_when_they_resume(
    two_processes: dict[str, tuple[list[str], dict[str, Tensor]]], other: str
) -> None:
    expected_losses, expected = two_processes["one"]
    found_losses, found = two_processes[other]
    assert len(expected_losses) == 10
    # Losses are logged with three digits after the point; the order of the sums differs in the last bit of a float32.
    assert [float(x) for x in found_losses] == pytest.approx([float(x) for x in expected_losses], abs=2e-3)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-3)
