"""What a checkpoint may go on with: the flags that it was trained with, and the batches that it would have had."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Corpus, Run

pytest.importorskip("fairseq")
from fairseq import checkpoint_utils  # noqa: E402

from fwp_fairseq import fairseq_mends  # noqa: E402
from fwp_fairseq.fairseq_mends.checkpoint_options import check_options, fast_weight_flags  # noqa: E402
from fwp_fairseq.fairseq_mends.safe_loading import load_checkpoint_file  # noqa: E402

USER_DIR = ("--user-dir", "fwp_fairseq", "--cpu")
TRAINING = (
    *(*USER_DIR, "--encoder-layers", 1, "--decoder-layers", 1, "--encoder-embed-dim", 16),
    *("--encoder-ffn-embed-dim", 16, "--encoder-attention-heads", 2, "--decoder-attention-heads", 2),
    *("--optimizer", "adam", "--criterion", "cross_entropy", "--valid-subset", "test", "--no-epoch-checkpoints"),
)
DELTA = {"_name": "fwp_transformer", "update_rule": "delta", "feature_map": "elu"}


def load(path: Path) -> Any:
    with path.open("rb") as file:
        return load_checkpoint_file(file)


def differing(trained: dict[str, Any], overrides: dict[str, Any]) -> str:
    """The message about a checkpoint of these options with others in the place of some; "" if there is none."""
    from fwp_fairseq.fairseq_mends import checkpoint_options

    with checkpoint_options._set(checkpoint_options._overrides, overrides):
        try:
            check_options({"cfg": {"model": trained}}, "a.pt")
        except ValueError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    "trained, overrides, expected",
    [
        ({}, {"update_rule": "gated"}, "--update-rule delta, and this model has --update-rule gated"),
        ({}, {"update_rule": "sum"}, "--update-rule delta, and this model has --update-rule sum"),
        ({}, {"feature_map": "dpfp"}, "--feature-map elu, and this model has --feature-map dpfp"),
        ({}, {"key_normalization": "l2"}, "--key-normalization sum, and"),
        ({}, {"attention_normalization": True}, "--attention-normalization False, and"),
        ({}, {"cross_attention": "fast-weight"}, "--cross-attention softmax, and"),
        ({}, {"decoder_self_attention": "softmax"}, "--decoder-self-attention fast-weight, and"),
        ({}, {"_name": "transformer"}, "--decoder-self-attention fast-weight, and"),
        ({"feature_map": "dpfp"}, {"dpfp_nu": 2}, "--dpfp-nu 1, and this model has --dpfp-nu 2"),
        ({"feature_map": "favor"}, {"favor_features": 8}, "--favor-features 64, and"),
        ({}, {"short_convolution": 4}, "--short-convolution 0, and this model has --short-convolution 4"),
        ({"encoder_self_attention": "fast-weight"}, {"whole_memory_update_rule": "sum"}, "whole-memory-update-rule"),
        (
            {"encoder_self_attention": "fast-weight"},
            {"encoder_reading": "two-directions"},
            "--encoder-reading whole, and this model has --encoder-reading two-directions",
        ),
        (
            {"cross_attention": "fast-weight", "cross_softmax_layers": "1"},
            {"cross_softmax_layers": "2"},
            "--cross-softmax-layers 1, and this model has --cross-softmax-layers 2",
        ),
        (
            {"cross_attention": "fast-weight"},
            {"cross_slots": 16},
            "--cross-slots 0, and this model has --cross-slots 16",
        ),
        # What is not in use makes no difference, nor does the way of computing it.
        ({}, {}, ""),
        ({}, {"dpfp_nu": 2, "favor_features": 3, "whole_memory_update_rule": "sum"}, ""),
        ({}, {"encoder_reading": "two-directions", "cross_softmax_layers": "2", "cross_slots": 16}, ""),
        (
            {"cross_attention": "fast-weight", "cross_slots": 16},
            {"cross_update_rule": "sum", "cross_feature_map": "elu", "cross_attention_normalization": True},
            "",
        ),
        ({}, {"fast_weight_backend": "loop", "dropout": 0.9}, ""),
        ({"update_rule": "sum"}, {"write_strength_bias": True, "write_strength_range": 0.5}, ""),
        ({"write_strength_range": 2}, {"write_strength_range": 2.0}, ""),
        ({"decoder_self_attention": "softmax"}, {"update_rule": "sum"}, ""),
        ({"decoder_self_attention": "softmax"}, {"_name": "transformer"}, ""),
        ({"_name": "transformer"}, {"_name": "transformer_lm"}, ""),
    ],
)
def test_the_flag_that_differs_is_named(trained: dict[str, Any], overrides: dict[str, Any], expected: str) -> None:
    message = differing({**DELTA, **trained}, overrides)
    assert (expected in message) if expected else message == ""
    if message:
        assert message.startswith("a.pt was trained with --") and message.endswith("give it the flags of its training.")


def test_options_are_compared_with_their_defaults_where_a_checkpoint_lacks_them() -> None:
    assert fast_weight_flags({"_name": "fwp_transformer"})["update-rule"] == "delta"
    check_options({"args": argparse.Namespace(arch="fwp_transformer", update_rule="sum")}, "a.pt")
    check_options({"model": {}}, "a.pt")
    check_options([1], "a.pt")


@pytest.fixture(scope="module")
def trained(corpus: Corpus, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the delta rule."""
    folder = tmp_path_factory.mktemp("trained")
    options = ("--arch", "fwp_transformer", "--batch-size", 50, "--max-update", 1)
    run("fairseq-train", corpus.translation, *TRAINING, *options, "--save-dir", folder)
    return folder / "checkpoint_last.pt"


def test_every_command_names_the_flag_in_its_last_line(
    corpus: Corpus, trained: Path, run: Run, side_by_side: Callable[..., list[Any]], tmp_path: Path
) -> None:
    train = ("fairseq-train", corpus.translation, *TRAINING, "--arch", "fwp_transformer", "--batch-size", 50)
    new = ("--save-dir", tmp_path, "--no-save", "--max-update", 2)
    results = side_by_side(
        lambda: run(*train, *new, "--update-rule", "sum", "--restore-file", trained, check=False),
        lambda: run(*train, *new, "--update-rule", "gated", "--finetune-from-model", trained, check=False),
        lambda: run(
            *("fairseq-generate", corpus.translation, *USER_DIR, "--path", trained),
            *("--model-overrides", "{'update_rule': 'gated'}"),
            check=False,
        ),
    )
    for result, rule in zip(results, ("sum", "gated", "gated"), strict=True):
        assert result.returncode == 1
        last_line = result.stderr.strip().splitlines()[-1]
        assert last_line.startswith(f"ValueError: {trained} was trained with --update-rule delta, and this model has")
        assert f"--update-rule {rule}" in last_line


@pytest.mark.parametrize("limit", [("--max-update", 2), ("--stop-time-hours", 1e-9)])
def test_a_training_that_had_come_to_its_end_does_not_go_on(
    corpus: Corpus, run: Run, tmp_path: Path, limit: tuple[str, float]
) -> None:
    options = ("--arch", "fwp_transformer", "--batch-size", 50, "--save-dir", tmp_path, *limit)
    run("fairseq-train", corpus.translation, *TRAINING, *options)
    before = (tmp_path / "checkpoint_last.pt").read_bytes()
    again = run("fairseq-train", corpus.translation, *TRAINING, *options)
    assert "has come to its end before" in again.stdout + again.stderr
    assert (tmp_path / "checkpoint_last.pt").read_bytes() == before


def test_a_training_that_resumes_in_its_third_epoch_ends_with_the_same_bits(
    corpus: Corpus, run: Run, side_by_side: Callable[..., list[Any]], tmp_path: Path
) -> None:
    # Four batches make an epoch: the first part ends in the middle of the third.
    options = ("--arch", "fwp_transformer", "--feature-map", "favor", "--batch-size", 500, "--seed", 1)
    train = ("fairseq-train", corpus.translation, *TRAINING, *options)
    side_by_side(
        lambda: run(*train, "--save-dir", tmp_path / "stretch", "--max-update", 18),
        lambda: run(*train, "--save-dir", tmp_path / "parts", "--max-update", 10),
    )
    resumed = run(*train, "--save-dir", tmp_path / "parts", "--max-update", 18)
    assert "(epoch 3 @ 10 updates)" in resumed.stdout + resumed.stderr
    stretch, parts = (load(tmp_path / name / "checkpoint_last.pt")["model"] for name in ("stretch", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in stretch.items())


def test_installing_the_hooks_twice_is_installing_them_once() -> None:
    before = dict(vars(checkpoint_utils))
    fairseq_mends.install()
    assert dict(vars(checkpoint_utils)) == before
