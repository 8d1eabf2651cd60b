"""A training can begin with a checkpoint of softmax attention, and makes fast weights of it."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Corpus
from tiny_models import places, translation_batch
from torch.nn import functional as F

pytest.importorskip("fairseq")
from fairseq import checkpoint_utils  # noqa: E402
from in_process import LM_TASK, TRAINING, TRANSLATION, Flags, fairseq_generate, fairseq_train, saved, trainer_of  # noqa: E402

SOFTMAX = places("softmax")
EVERYWHERE = places("fast-weight")
BOTH_WAYS = ("--encoder-reading", "two-directions")
OURS = (*TRAINING, *TRANSLATION)
FAIRSEQS = (*TRAINING, "--arch", "transformer", *TRANSLATION[2:], "--decoder-embed-dim", 16)
LM_SIZES = ("--decoder-layers", 2, "--decoder-embed-dim", 16, "--decoder-ffn-embed-dim", 32)
LM = (*TRAINING, *LM_TASK, *LM_SIZES, "--decoder-attention-heads", 2)
OUR_LM = (*LM, "--arch", "fwp_transformer_lm")
FAIRSEQS_LM = (*LM, "--arch", "transformer_lm", "--decoder-input-dim", 16, "--decoder-output-dim", 16)


@pytest.fixture(scope="module")
def parent_of(small_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a model of these flags, whose parameters no other has."""

    @functools.cache
    def parent_of(flags: Flags, fused: bool = False) -> Path:
        path = tmp_path_factory.mktemp("parent") / "parent.pt"
        trainer = trainer_of(flags, data=data_of(flags, small_corpus), seed=7, no_save_optimizer_state=True)
        trainer.save_checkpoint(str(path), {"train_iterator": {"epoch": 1}})
        if fused:
            # As they were before fairseq 0.9.
            state = saved(path)
            for name in [name for name in state["model"] if ".self_attn.q_proj." in name]:
                parts = [state["model"].pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
                state["model"][name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
            torch.save(state, path)
        return path

    return parent_of


ParentOf = Callable[..., Path]


def data_of(flags: Flags, corpus: Corpus) -> Path:
    return corpus.language_model if "language_modeling" in flags else corpus.translation


def begin(flags: Flags, data: Path, folder: Path, parent: Path, **given: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """The trainer after it has loaded the parent, and the parameters that it had before."""
    given = {"convert_attention": True, "finetune_from_model": str(parent), **given}
    trainer = trainer_of(("--conversion-updates", 0, *flags), data=data, save_dir=folder, **given)
    before = {name: x.clone() for name, x in trainer.get_model().state_dict().items()}
    checkpoint_utils.load_checkpoint(trainer.cfg.checkpoint, trainer)
    return trainer, before


@pytest.mark.parametrize(
    "parent, flags, kind",
    [
        ((*OURS, *SOFTMAX), (*OURS, *EVERYWHERE, "--update-rule", "gated-delta", *BOTH_WAYS), "separate"),
        ((*OURS, *SOFTMAX), (*OURS, "--short-convolution", 2, "--no-attention-bias"), "separate"),
        ((*OURS, *SOFTMAX), (*OURS, *EVERYWHERE, "--cross-softmax-layers", 2), "separate"),
        ((*OURS, *SOFTMAX), (*OURS, *EVERYWHERE, "--encoder-slots", 3, "--cross-slots", 2), "separate"),
        ((*OURS, *places("fast-weight", "decoder-self-attention")), (*OURS, *EVERYWHERE), "separate"),
        (FAIRSEQS, (*OURS, *EVERYWHERE, "--feature-map", "favor"), "fused"),
        (FAIRSEQS_LM, OUR_LM, "separate"),
        (FAIRSEQS_LM, (*OUR_LM, "--feature-map", "elu", "--update-rule", "sum"), "fused"),
    ],
    ids=[
        "ours",
        "other parts",
        "but a layer",
        "slots",
        "one place more",
        "fairseq's of old",
        "fairseq's lm",
        "fairseq's lm of old",
    ],
)
def test_what_fits_is_the_checkpoint_s_and_what_is_new_the_model_s(
    small_corpus: Corpus, parent_of: ParentOf, tmp_path: Path, parent: Flags, flags: Flags, kind: str
) -> None:
    data = data_of(flags, small_corpus)
    given = saved(parent_of(parent))["model"]
    trainer, before = begin(flags, data, tmp_path, parent_of(parent, kind == "fused"))
    after = trainer.get_model().state_dict()
    assert len(after.keys() & given.keys()) > 10
    for name, parameter in after.items():
        torch.testing.assert_close(parameter, given.get(name, before[name]), rtol=0, atol=0)


def test_a_table_says_what_is_taken_and_what_is_new(
    small_corpus: Corpus, parent_of: ParentOf, tmp_path: Path, caplog: Any
) -> None:
    parent = parent_of((*OURS, *SOFTMAX))
    flags = (*OURS, "--no-attention-bias", "--update-rule", "gated-delta", "--cross-attention", "fast-weight")
    with caplog.at_level(logging.INFO, "fwp_fairseq"):
        begin(flags, small_corpus.translation, tmp_path, parent)
    projections, biases = "k_proj, v_proj, q_proj, out_proj", "k_proj.bias, v_proj.bias, q_proj.bias, out_proj.bias"
    new = "write_proj, decay_proj, decay_proj.bias"
    (table,) = (record.getMessage() for record in caplog.records if "is converted" in record.getMessage())
    assert table.splitlines() == [
        f"{parent} is converted:",
        "| attention | taken | new | left out |",
        f"| decoder.layers.*.self_attn | {projections} | {new} | {biases} |",
        f"| decoder.layers.*.encoder_attn | {projections} | {new} | {biases} |",
        "| all else | all | - | - |",
    ]


@pytest.mark.parametrize(
    "parent, flags, given, message",
    [
        ((*OURS, *SOFTMAX), OURS, {"convert_attention": False}, "or begin with it by --finetune-from-model and"),
        ((*OURS, *SOFTMAX), OURS, {"finetune_from_model": None}, "--convert-attention needs --finetune-from-model"),
        ((*OURS, *SOFTMAX), (*OURS, "--conversion-updates", -1), {}, "--conversion-updates is -1, it must be at"),
        (OURS, OURS, {}, "parent.pt has no softmax where this model has fast weights"),
        ((*OURS, *SOFTMAX), (*OURS, *SOFTMAX), {}, "parent.pt has no softmax where this model has fast weights"),
        (OURS, (*OURS, *EVERYWHERE, "--feature-map", "elu"), {}, "was trained with --feature-map dpfp, and this"),
        ((*OURS, *EVERYWHERE), (*OURS, *EVERYWHERE, *BOTH_WAYS), {}, "was trained with --encoder-reading whole, and"),
        ((*OURS, *EVERYWHERE), OURS, {}, "was trained with --encoder-self-attention fast-weight, and this model"),
        ((*OURS, *SOFTMAX), (*OURS, "--decoder-attention-heads", 4), {}, "--decoder-attention-heads 2, and this"),
        ((*OURS, *SOFTMAX), (*OURS, "--encoder-ffn-embed-dim", 8), {}, r"has the shape \(32, 16\) in the checkpoint"),
        ((*OURS, *SOFTMAX), (*OURS, "--decoder-layers", 3), {}, "only this model has decoder.layers.2.* give this"),
        ((*OURS, *SOFTMAX), (*OURS, "--decoder-layers", 1), {}, "only it has decoder.layers.1.* give this model"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_cannot_be_converted_is_refused_by_what_differs(
    small_corpus: Corpus,
    parent_of: ParentOf,
    tmp_path: Path,
    parent: Flags,
    flags: Flags,
    given: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        begin(flags, small_corpus.translation, tmp_path, parent_of(parent), **given)
    assert len(str(error.value).splitlines()) == 1


def test_a_converted_training_goes_on_from_its_own_checkpoint_and_generates(
    small_corpus: Corpus, parent_of: ParentOf, tmp_path: Path, caplog: Any
) -> None:
    options = {"data": small_corpus.translation, "save_dir": tmp_path, "convert_attention": True}
    options |= {"finetune_from_model": str(parent_of((*OURS, *SOFTMAX))), "conversion_updates": 2}
    for updates in (2, 4):
        caplog.clear()
        with caplog.at_level(logging.INFO, "fwp_fairseq"):
            fairseq_train(OURS, max_update=updates, **options)
        assert ("is converted" in caplog.text) == (updates == 2)
        assert saved(tmp_path / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"] == updates
    assert "H-0" in fairseq_generate(data=small_corpus.translation, path=tmp_path / "checkpoint_last.pt")


def test_the_hours_of_the_checkpoint_that_a_training_begins_with_are_not_its_own(
    small_corpus: Corpus, parent_of: ParentOf, tmp_path: Path
) -> None:
    state = saved(parent_of((*OURS, *SOFTMAX)))
    state["extra_state"]["previous_training_time"] = 7200.0
    torch.save(state, tmp_path / "parent.pt")
    options = {"finetune_from_model": str(tmp_path / "parent.pt"), "convert_attention": True, "conversion_updates": 0}
    fairseq_train(OURS, data=small_corpus.translation, save_dir=tmp_path, max_update=1, stop_time_hours=1, **options)
    state = saved(tmp_path / "checkpoint_last.pt")
    assert state["optimizer_history"][-1]["num_updates"] == 1 and state["extra_state"]["previous_training_time"] < 7200


def outputs(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch)[0]


@pytest.mark.parametrize("updates", [0, 4])
def test_slots_for_all_tokens_begin_as_their_parent_and_learn_nothing_that_leads_away(
    small_corpus: Corpus, parent_of: ParentOf, tmp_path: Path, updates: int
) -> None:
    data, path = small_corpus.translation, parent_of((*OURS, *SOFTMAX))
    parent = trainer_of((*OURS, *SOFTMAX), data=data).get_model()
    parent.load_state_dict(saved(path)["model"])
    flags = (*OURS, *EVERYWHERE, "--decoder-self-attention", "softmax", "--encoder-slots", 64, "--cross-slots", 64)
    trainer, _ = begin(flags, data, tmp_path, path, conversion_updates=updates)
    model, batch = trainer.get_model(), translation_batch(parent, 8)
    torch.testing.assert_close(outputs(model, batch), outputs(parent, batch), rtol=0, atol=0.02)


LEARNED = ("--update-rule", "sum", "--feature-map", "learned", "--key-normalization", "none")


@pytest.mark.parametrize(
    "flags",
    [
        (*LEARNED, "--attention-normalization"),
        ("--update-rule", "gated-delta", "--feature-map", "dpfp", "--short-convolution", 2, "--no-attention-bias"),
        ("--update-rule", "gated-delta", *BOTH_WAYS),
        ("--update-rule", "fwm", "--feature-map", "tanh", "--key-normalization", "none"),
    ],
    ids=["sum, learned", "gated-delta, dpfp", "two directions", "fwm"],
)
def test_attention_learns_to_give_what_softmax_gives(
    small_corpus: Corpus, parent_of: ParentOf, tmp_path: Path, flags: Flags
) -> None:
    """With any rule and map. What is not attention stays as it is."""
    data, path = small_corpus.translation, parent_of((*OURS, *SOFTMAX))
    parent = trainer_of((*OURS, *SOFTMAX), data=data).get_model()
    parent.load_state_dict(saved(path)["model"])
    batch = translation_batch(parent, 8)
    expected = outputs(parent, batch)
    errors = {}
    for updates in (0, 30):
        trainer, _ = begin((*OURS, *EVERYWHERE, *flags), data, tmp_path, path, conversion_updates=updates)
        model = trainer.get_model()
        errors[updates] = F.mse_loss(outputs(model, batch), expected).item()
        others = {name: x for name, x in model.state_dict().items() if "attn." not in name}
        assert all(torch.equal(x, parent.state_dict()[name]) for name, x in others.items())
        assert "forward" not in vars(model.decoder.layers[0].self_attn)
    assert errors[30] < 0.8 * errors[0]
