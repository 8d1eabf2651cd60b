"""Checkpoints load without running anything that is in them, and their mean is what it says."""

import argparse
import copy
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Corpus, Run

from fwp_fairseq.average_checkpoints import average_checkpoints
from fwp_fairseq.average_checkpoints import main as average_main
from fwp_fairseq.fairseq_mends.safe_loading import load_checkpoint_file

pytest.importorskip("fairseq")
from fairseq import checkpoint_utils, utils  # noqa: E402

USER_DIR = ("--user-dir", "fwp_fairseq", "--cpu")
SIZES = ("--encoder-layers", 1, "--decoder-layers", 1, "--encoder-embed-dim", 16, "--encoder-ffn-embed-dim", 16)
TRAINING = ("--optimizer", "adam", "--criterion", "cross_entropy", "--batch-size", 8, "--max-update", 2)
BLEU_IN_VALIDATION = ("--eval-bleu", "--eval-bleu-args", '{"beam": 1, "max_len_b": 5}', "--store-ema")


class Attack:
    """Pickles to a call that writes a file."""

    def __init__(self, target: Path, call: Callable[..., Any] = os.system):
        self.target, self.call = target, call

    def __reduce__(self) -> tuple[Any, ...]:
        if self.call is os.system:
            return os.system, (f"touch {self.target}",)
        return self.call, (f"open({str(self.target)!r}, 'w')",)


@pytest.fixture(scope="module")
def checkpoints(
    corpus: Corpus, run: Run, side_by_side: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Real checkpoints, by the kind of model."""
    folder = tmp_path_factory.mktemp("checkpoints")
    # 40 sentences for a validation that takes no time.
    data = (corpus.translation, *USER_DIR, "--valid-subset", "test", *TRAINING)
    language_model = ("--task", "language_modeling", corpus.language_model, "--decoder-embed-dim", 16)
    side_by_side(
        lambda: run("fairseq-train", *data, *SIZES, "--arch", "fwp_transformer", "--save-dir", folder / "fwp"),
        lambda: run(
            *("fairseq-train", *data, *SIZES, "--arch", "transformer", "--save-dir", folder / "fairseq"),
            *("--decoder-embed-dim", 16, *BLEU_IN_VALIDATION),
        ),
        lambda: run(
            *("fairseq-train", *language_model, *USER_DIR, *TRAINING, "--arch", "fwp_transformer_lm"),
            *("--tokens-per-sample", 16, "--decoder-layers", 1, "--save-dir", folder / "lm"),
        ),
    )
    return {kind: folder / kind / "checkpoint_last.pt" for kind in ("fwp", "fairseq", "lm")}


@pytest.fixture
def state(checkpoints: dict[str, Path]) -> dict[str, Any]:
    """Content of a real checkpoint, for a test to change."""
    with open(checkpoints["fwp"], "rb") as file:
        return load_checkpoint_file(file)


def put(state: dict[str, Any], place: str, value: object) -> Any:
    """The content of a checkpoint with ``value`` in one place."""
    state = copy.copy(state)
    if place == "everything":
        return value
    if place == "args":
        state["args"] = argparse.Namespace(arch=value)
    elif place == "configuration":
        state["cfg"] = {**state["cfg"], "model": value}
    elif place == "parameters":
        state["model"] = {**state["model"], "encoder.version": value}
    elif place == "optimizer":
        state["last_optimizer_state"] = {"state": {0: {"exp_avg": value}}}
    else:
        state["extra_state"] = {**state["extra_state"], place: value}
    return state


PLACES = ("everything", "args", "configuration", "parameters", "optimizer", "train_iterator", "metrics")


def refusal(load: Callable[[], Any]) -> str:
    """The message with which a file is refused: one sentence that leaves out torch's advice to let everything in."""
    with pytest.raises(pickle.UnpicklingError) as caught:
        load()
    message = str(caught.value)
    assert "was not loaded" in message and message.endswith(".") and "\n" not in message
    assert "weights_only" not in message
    return message


def test_checkpoints_of_fairseq_load_with_all_that_is_in_them(checkpoints: dict[str, Path]) -> None:
    for path in checkpoints.values():
        loaded = checkpoint_utils.load_checkpoint_to_cpu(str(path))
        trusted = torch.load(path, weights_only=False)
        assert loaded.keys() >= trusted.keys()
        assert all(torch.equal(loaded["model"][name], value) for name, value in trusted["model"].items())
        assert repr(loaded["extra_state"]["metrics"]) == repr(trusted["extra_state"]["metrics"])
        assert repr(loaded["last_optimizer_state"]) == repr(trusted["last_optimizer_state"])
    # What makes an allow-list necessary does occur.
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(checkpoints["fairseq"])
    assert {"argparse.Namespace", "numpy.ndarray"} <= set(unsafe)


def test_parameters_of_the_moving_average_load(checkpoints: dict[str, Path]) -> None:
    assert checkpoint_utils.load_ema_from_checkpoint(str(checkpoints["fairseq"]))["model"]


def test_the_attack_of_these_tests_works_where_nothing_protects(state: dict[str, Any], tmp_path: Path) -> None:
    for place in PLACES:
        target = tmp_path / place
        torch.save(put(state, place, Attack(target)), tmp_path / "evil.pt")
        torch.load(tmp_path / "evil.pt", weights_only=False)
        assert target.exists()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("call", [os.system, eval, exec])
@pytest.mark.parametrize("variable", ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None])
def test_a_checkpoint_with_a_call_in_it_is_refused_and_the_call_not_made(
    state: dict[str, Any],
    place: str,
    call: Callable[..., Any],
    variable: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if variable:
        monkeypatch.setenv(variable, "1")
    target, file = tmp_path / "target", str(tmp_path / "evil.pt")
    torch.save(put(state, place, Attack(target, call)), file)
    for load in (checkpoint_utils.load_checkpoint_to_cpu, checkpoint_utils.load_ema_from_checkpoint):
        message = refusal(partial(load, file))
        assert file in message and call.__name__ in message
        assert not target.exists()


@pytest.mark.parametrize("new_format", [False, True])
def test_fairseq_cannot_choose_to_load_everything(state: dict[str, Any], new_format: bool, tmp_path: Path) -> None:
    target, file = tmp_path / "target", tmp_path / "evil.pt"
    torch.save(put(state, "args", Attack(target)), file, _use_new_zipfile_serialization=new_format)
    # As modified versions of fairseq do.
    refusal(lambda: checkpoint_utils.torch.load(file, weights_only=False))
    refusal(lambda: checkpoint_utils.torch.load(file, pickle_module=pickle))
    assert not target.exists()


def test_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    target, file = tmp_path / "target", tmp_path / "evil.pt"
    file.write_bytes(pickle.dumps(Attack(target), protocol=2))
    refusal(lambda: checkpoint_utils.load_checkpoint_to_cpu(str(file)))
    assert not target.exists()


@pytest.mark.parametrize("value", [np.array([object()]), np.array(["text"]), np.zeros(2, dtype=[("a", "i4")])])
def test_arrays_of_anything_but_numbers_are_refused(state: dict[str, Any], value: Any, tmp_path: Path) -> None:
    torch.save(put(state, "metrics", value), tmp_path / "evil.pt")
    refusal(lambda: checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "evil.pt")))


class NumbersThatAreObjects:
    """Pickles to an array whose type says object, whose bytes are addresses, and whose flags deny it."""

    def __reduce__(self) -> tuple[Any, ...]:
        reconstruct, start, _ = np.zeros(1).__reduce__()

        class ObjectType:
            def __reduce__(self) -> tuple[Any, ...]:
                return np.dtype, ("O8", False, True), (3, "|", None, None, None, 8, 8, 0)

        return reconstruct, start, (1, (1,), ObjectType(), False, b"\x01" * 8)


def test_an_array_whose_bytes_would_be_taken_for_addresses_is_refused(state: dict[str, Any], tmp_path: Path) -> None:
    torch.save(put(state, "metrics", NumbersThatAreObjects()), tmp_path / "evil.pt")
    assert "dtype" in refusal(lambda: checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "evil.pt")))


EXPRESSION = "[__import__('pathlib').Path({target!r}).touch()]"


def test_fairseq_evaluates_options_which_makes_them_an_attack(tmp_path: Path) -> None:
    utils.eval_str_list(EXPRESSION.format(target=str(tmp_path / "target")), type=str)
    assert (tmp_path / "target").exists()


@pytest.mark.parametrize("form", ["text", "bytes", "array", "nested", "comprehension", "reference", "quotes", "depth"])
@pytest.mark.parametrize("key", ["cfg", "args"])
def test_a_checkpoint_with_an_option_that_may_be_a_call_when_it_is_evaluated_is_refused(
    state: dict[str, Any], key: str, form: str, tmp_path: Path
) -> None:
    text = EXPRESSION.format(target="target")
    value = {
        "text": text,
        "bytes": text.encode(),
        "array": np.frombuffer(text.ljust(len(text) + -len(text) % 8).encode(), dtype="f8"),
        "nested": [{"deep": argparse.Namespace(deeper=(f"  {text}",))}],
        "comprehension": "[0 for torch.load in [0]]",
        # Another option is put in its place, and ends the text in which it stands.
        "reference": "'${model.folder}'",
        # Reading an override of an option takes the backslashes away.
        "quotes": rf"'a\' + {text} + \'b'",
        # Too deep to be looked at, which is no reason to evaluate it.
        "depth": "(" * 1000 + text + ")" * 1000,
    }[form]
    options = {"_name": "fwp_transformer_lm", "adaptive_softmax_cutoff": value, "folder": f"' + {text} + '"}
    state[key] = {"model": options} if key == "cfg" else argparse.Namespace(**options)
    torch.save(state, tmp_path / "evil.pt")
    message = refusal(lambda: checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "evil.pt")))
    assert "adaptive_softmax_cutoff" in message


def test_a_checkpoint_whose_options_are_made_up_when_they_are_read_is_refused(
    state: dict[str, Any], tmp_path: Path
) -> None:
    state["cfg"]["model"] = f'${{oc.create:{{adaptive_softmax_cutoff: "{EXPRESSION.format(target="target")}"}}}}'
    torch.save(state, tmp_path / "evil.pt")
    assert "model" in refusal(lambda: checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "evil.pt")))


@pytest.mark.parametrize(
    "option, value",
    [
        # Evaluated, and no more than values.
        ("decoder_layers", "[(512, 3)] * 4 + [(256, 3)]"),
        ("adam_betas", "(0.9, -1e-3)"),
        ("decoder_attention", "True"),
        ("encoder_xformers_att_config", '{"name": "scaled_dot_product"}'),
        ("encoder_layers", 6),
        ("adaptive_softmax_cutoff", None),
        ("adaptive_input_cutoff", [8, 14]),
        # Not evaluated.
        ("data", "run(2)"),
        ("folder", "/data (old)/model (2)"),
        ("pattern", r"\w+(x)"),
        ("script", "[word for word in words]"),
        ("max_tokens_valid", "${dataset.max_tokens}"),
    ],
)
def test_options_that_are_values_or_not_evaluated_load(
    state: dict[str, Any], option: str, value: Any, tmp_path: Path
) -> None:
    state["cfg"]["model"][option] = value
    torch.save(state, tmp_path / "good.pt")
    assert option in checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "good.pt"))["cfg"]["model"]


@pytest.mark.parametrize("damage", ["empty", "text", "half", "no end", "other bytes", "archive"])
def test_a_damaged_file_is_named_as_such(checkpoints: dict[str, Path], damage: str, tmp_path: Path) -> None:
    whole = checkpoints["fwp"].read_bytes()
    file = tmp_path / "damaged.pt"
    if damage == "archive":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("readme.txt", "hello")
    else:
        content = {
            "empty": b"",
            "text": b"not a checkpoint\n",
            "half": whole[: len(whole) // 2],
            "no end": whole[:-10],
            "other bytes": os.urandom(1000),
        }
        file.write_bytes(content[damage])
    assert "incomplete or damaged" in refusal(lambda: checkpoint_utils.load_checkpoint_to_cpu(str(file)))


def test_loading_leaves_the_list_of_allowed_globals_as_it_was(checkpoints: dict[str, Path]) -> None:
    before = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([argparse.Namespace]):
        during = torch.serialization.get_safe_globals()
        checkpoint_utils.load_checkpoint_to_cpu(str(checkpoints["fairseq"]))
        assert set(torch.serialization.get_safe_globals()) == set(during)
    checkpoint_utils.load_checkpoint_to_cpu(str(checkpoints["fairseq"]))
    assert set(torch.serialization.get_safe_globals()) == set(before)


@pytest.fixture(scope="module")
def refused(
    corpus: Corpus,
    checkpoints: dict[str, Path],
    run: Run,
    side_by_side: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Any, Path, Path]]:
    """Of every command that loads checkpoints: its result with an evil one, that, and the file that it would make."""
    folder = tmp_path_factory.mktemp("refused")

    def prepare(command: str, kind: str, place: str) -> tuple[Path, Path]:
        (folder / command).mkdir()
        evil, target = folder / command / "checkpoint_last.pt", folder / command / "target"
        with open(checkpoints[kind], "rb") as file:
            torch.save(put(load_checkpoint_file(file), place, Attack(target)), evil)
        return evil, target

    train = ("fairseq-train", corpus.translation, *USER_DIR, *SIZES, *TRAINING, "--arch", "fwp_transformer")
    new = ("--save-dir", folder / "new", "--no-save")
    language_model = ("--task", "language_modeling", corpus.language_model, *USER_DIR, "--gen-subset", "valid")
    commands: dict[str, tuple[str, str, Callable[[Path], tuple[Any, ...]]]] = {
        "resume": ("fwp", "optimizer", lambda evil: (*train, "--save-dir", evil.parent)),
        "restore": ("fwp", "train_iterator", lambda evil: (*train, *new, "--restore-file", evil)),
        "finetune": ("fwp", "parameters", lambda evil: (*train, *new, "--finetune-from-model", evil)),
        "generate": (
            "fwp",
            "configuration",
            lambda evil: ("fairseq-generate", corpus.translation, *USER_DIR, "--path", evil),
        ),
        "interactive": (
            "fairseq",
            "args",
            lambda evil: ("fairseq-interactive", corpus.translation, *USER_DIR, "--path", evil),
        ),
        "eval-lm": ("lm", "everything", lambda evil: ("fairseq-eval-lm", *language_model, "--path", evil)),
        "average": (
            "fwp",
            "parameters",
            lambda evil: ("python", "-m", "fwp_fairseq.average_checkpoints", "--inputs", evil, "--output", evil),
        ),
    }
    files = {name: prepare(name, kind, place) for name, (kind, place, _) in commands.items()}
    run_unprotected = partial(run, check=False, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
    lines = [line(files[name][0]) for name, (_, _, line) in commands.items()]
    results = side_by_side(*(partial(run_unprotected, *line) for line in lines))
    return {name: (result, *files[name]) for name, result in zip(commands, results, strict=True)}


@pytest.mark.parametrize("command", ["resume", "restore", "finetune", "generate", "interactive", "eval-lm", "average"])
def test_every_command_refuses_a_checkpoint_with_a_call_in_it(
    refused: dict[str, tuple[Any, Path, Path]], command: str
) -> None:
    result, evil, target = refused[command]
    assert result.returncode != 0
    last_line = result.stderr.strip().splitlines()[-1]
    assert f"{evil} was not loaded: it holds {os.system.__module__}.system" in last_line
    assert "weights_only" not in result.stdout + result.stderr
    assert not target.exists()


def save(path: Path, **parameters: Any) -> Path:
    torch.save({"model": parameters, "extra_state": {"epoch": path.stem}}, path)
    return path


def test_the_average_is_the_arithmetic_mean_with_the_rest_of_the_first(tmp_path: Path) -> None:
    flag = torch.tensor([True, False])
    values = [torch.tensor([1.0, 2.0]), torch.tensor([2.0, 6.0]), torch.tensor([6.0, 1.0])]
    paths = [
        save(tmp_path / f"{i}.pt", w=value, half=value.half(), brain=value.bfloat16(), n=torch.tensor(i), flag=flag)
        for i, value in enumerate(values)
    ]
    state = average_checkpoints(paths)
    for name in ("w", "half", "brain"):
        assert (
            torch.equal(state["model"][name], torch.tensor([3.0, 3.0])) and state["model"][name].dtype == torch.float32
        )
    assert state["model"]["n"].item() == 1 and state["model"]["n"].dtype == torch.int64
    assert torch.equal(state["model"]["flag"], flag)
    assert state["extra_state"] == {"epoch": "0"}


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"w": torch.zeros(3)}, "w has the shapes (3,) and (2,)"),
        ({"w": torch.zeros(2), "extra": torch.zeros(1)}, "only one of them has extra"),
        ({}, "only one of them has w"),
    ],
)
def test_averaging_different_models_names_both_files_and_leaves_the_output_as_it_was(
    other: dict[str, Any], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, output = save(tmp_path / "a.pt", w=torch.zeros(2)), save(tmp_path / "b.pt", **other), tmp_path / "c.pt"
    output.write_text("old")
    with pytest.raises(SystemExit, match="of different models") as caught:
        average_main(["--inputs", str(a), str(b), "--output", str(output)])
    assert reason in str(caught.value) and str(a) in str(caught.value) and str(b) in str(caught.value)
    assert output.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "b.pt", "c.pt"]


@pytest.mark.parametrize(
    ("options", "mean"),
    [
        (["--num-epoch-checkpoints", "2"], 9.5),
        (["--num-epoch-checkpoints", "2", "--checkpoint-upper-bound", "9"], 8.5),
        (["--num-update-checkpoints", "2"], 200.0),
        (["--num-update-checkpoints", "1", "--checkpoint-upper-bound", "150"], 100.0),
    ],
)
def test_the_last_checkpoints_are_taken_by_number(options: list[str], mean: float, tmp_path: Path) -> None:
    for epoch in (8, 9, 10):
        save(tmp_path / f"checkpoint{epoch}.pt", w=torch.tensor(float(epoch)))
    for update in (20, 100, 300):
        save(tmp_path / f"checkpoint_1_{update}.pt", w=torch.tensor(float(update)))
    save(tmp_path / "checkpoint_best.pt", w=torch.tensor(1e6))
    average_main(["--inputs", str(tmp_path), "--output", str(tmp_path / "mean.pt"), *options])
    with open(tmp_path / "mean.pt", "rb") as file:
        assert load_checkpoint_file(file)["model"]["w"].item() == mean


def test_asking_for_more_checkpoints_than_there_are_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint1.pt", w=torch.zeros(1))
    with pytest.raises(SystemExit, match="has 1 checkpoints of the wanted kind, 2 are to be averaged"):
        average_main(["--inputs", str(tmp_path), "--output", str(tmp_path / "x.pt"), "--num-epoch-checkpoints", "2"])
    assert not (tmp_path / "x.pt").exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="missing.pt"):
        average_main(["--inputs", str(tmp_path / "missing.pt"), "--output", str(tmp_path / "x.pt")])


def test_averaging_needs_no_fairseq(run: Run, tmp_path: Path) -> None:
    a, b = save(tmp_path / "a.pt", w=torch.tensor(1.0)), save(tmp_path / "b.pt", w=torch.tensor(2.0))
    code = "import sys; sys.modules['fairseq'] = None; from fwp_fairseq.average_checkpoints import main; main()"
    run("python", "-c", code, "--inputs", a, b, "--output", tmp_path / "c.pt")
    with open(tmp_path / "c.pt", "rb") as file:
        assert load_checkpoint_file(file)["model"]["w"].item() == 1.5
    assert sys.modules.get("fairseq") is not None
