"""What can be made of checkpoints, as fairseq's test_checkpoint_utils has it: ensembles, pruned models, averages."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Corpus

pytest.importorskip("fairseq")
from fairseq import checkpoint_utils  # noqa: E402
from in_process import KINDS, fairseq_train, same_weights, saved, translation  # noqa: E402

Trained = Callable[..., Path]


@pytest.fixture(params=KINDS)
def trained(request: pytest.FixtureRequest, small_corpus: Corpus, tmp_path: Path) -> Trained:
    """Train for two updates with these options; the last checkpoint."""

    def trained(folder: str = "run", **given: Any) -> Path:
        given = {"data": small_corpus.translation, "max_update": 2, **given}
        fairseq_train(translation(request.param), save_dir=tmp_path / folder, **given)
        return tmp_path / folder / "checkpoint_last.pt"

    return trained


def test_an_ensemble_has_the_task_of_its_first_model_and_the_configuration_of_its_last(
    trained: Trained, small_corpus: Corpus, tmp_path: Path
) -> None:
    other = shutil.copytree(small_corpus.translation, tmp_path / "other_data")
    paths = [trained("first", seed=12), trained("second", seed=34, data=other)]
    models, cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(path) for path in paths])
    for path, model in zip(paths, models, strict=True):
        assert same_weights(model.state_dict(), saved(path)["model"])
    assert task.cfg.data == str(small_corpus.translation)
    assert (cfg.common.seed, cfg.task.data) == (34, str(other))


def test_a_loaded_model_knows_the_options_that_it_was_built_from(trained: Trained) -> None:
    models, _ = checkpoint_utils.load_model_ensemble([str(trained(dropout=0.25))])
    assert (models[0].args.encoder_layers, models[0].args.dropout) == (2, 0.25)


def layers(side: str, state: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The parameters of each layer of the encoder or the decoder, by its number."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in state.items():
        if name.startswith(f"{side}.layers."):
            number, parameter = name.removeprefix(f"{side}.layers.").split(".", 1)
            found.setdefault(number, {})[parameter] = value
    return found


def test_a_pruned_model_has_the_layers_that_it_was_to_keep(trained: Trained) -> None:
    path = trained(encoder_layers=3, decoder_layers=3, encoder_layerdrop=0.1, decoder_layerdrop=0.1)
    overrides = {"encoder_layers_to_keep": "0,2", "decoder_layers_to_keep": "1"}
    models, _ = checkpoint_utils.load_model_ensemble([str(path)], arg_overrides=overrides)
    whole, pruned = saved(path)["model"], models[0].state_dict()
    for side, kept in {"encoder": ["0", "2"], "decoder": ["1"]}.items():
        expected = layers(side, whole)
        found = layers(side, pruned)
        assert len(expected) == 3 and len(found) == len(kept)
        assert all(same_weights(found[str(i)], expected[layer]) for i, layer in enumerate(kept))


def test_layers_to_keep_say_how_many_there_are_when_given_to_a_training(trained: Trained) -> None:
    kept = {"encoder_layers_to_keep": "0,2", "decoder_layers_to_keep": "1"}
    model = saved(trained(encoder_layers=3, decoder_layers=3, **kept))["model"]
    assert (len(layers("encoder", model)), len(layers("decoder", model))) == (2, 1)


def test_a_moving_average_of_the_weights_is_kept_restored_and_loaded(
    trained: Trained, small_corpus: Corpus, tmp_path: Path
) -> None:
    average = {"store_ema": True, "ema_decay": 0.75}
    first = trained(max_update=1, **average)
    before = checkpoint_utils.load_ema_from_checkpoint(str(first))["model"]
    second = trained(max_update=2, **average)
    after = checkpoint_utils.load_ema_from_checkpoint(str(second))["model"]
    weights = saved(second)["model"]
    assert after.keys() == weights.keys()
    for name, value in weights.items():
        # fairseq's own count of its formats is not averaged.
        if not name.endswith(".version"):
            torch.testing.assert_close(after[name], 0.75 * before[name] + 0.25 * value)


def test_a_checkpoint_that_is_written_in_the_background_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its files are those of another package, iopath.
    opened = []

    def opena(path: str, mode: str) -> Any:
        opened.append(path)
        return open(path, mode)

    monkeypatch.setattr(checkpoint_utils.PathManager, "opena", staticmethod(opena), raising=False)
    state = {"model": {"weight": torch.ones(3)}}
    checkpoint_utils.torch_persistent_save(state, str(tmp_path / "checkpoint_last.pt"), async_write=True)
    assert opened == [str(tmp_path / "checkpoint_last.pt")]
    assert same_weights(saved(tmp_path / "checkpoint_last.pt")["model"], state["model"])
