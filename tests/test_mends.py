"""What is changed in fairseq: what the mends say and nothing else, for trainings of fairseq only, and always."""

import ast
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from conftest import ROOT, Corpus, Run

pytest.importorskip("fairseq")
import fairseq  # noqa: E402
from fairseq import checkpoint_utils, options, tasks  # noqa: E402
from fairseq.data import ListDataset  # noqa: E402
from fairseq.data.iterators import EpochBatchIterator  # noqa: E402
from fairseq.dataclass.utils import convert_namespace_to_omegaconf  # noqa: E402
from fairseq.trainer import Trainer  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

import fwp_fairseq.models  # noqa: E402, F401
from fwp_fairseq.fairseq_mends import one_training, safe_loading  # noqa: E402

TRANSLATION = (
    *("--arch", "fwp_transformer", "--encoder-layers", "1", "--decoder-layers", "1", "--encoder-embed-dim", "16"),
    *("--encoder-ffn-embed-dim", "16", "--encoder-attention-heads", "2", "--decoder-attention-heads", "2"),
)
LIGHT = (
    *("--task", "language_modeling", "--tokens-per-sample", "16", "--arch", "lightconv_lm", "--decoder-layers", "1"),
    *("--decoder-embed-dim", "16", "--decoder-ffn-embed-dim", "16", "--decoder-attention-heads", "2"),
    *("--decoder-kernel-size-list", "[3]"),
)


def trainer_of(data: Path, folder: Path, *flags: str) -> Trainer:
    """The trainer that fairseq-train would make for these flags."""
    common = ("--cpu", "--num-workers", "0", "--optimizer", "adam", "--batch-size", "200", "--save-dir", str(folder))
    args = options.parse_args_and_arch(options.get_training_parser(), [str(data), *common, *flags])
    cfg = convert_namespace_to_omegaconf(args)
    task = tasks.setup_task(cfg.task)
    return Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))


def begin(trainer: Trainer) -> Any:
    """Begin a training, or go on with it; its iterator."""
    return checkpoint_utils.load_checkpoint(trainer.cfg.checkpoint, trainer)[1]


def update(trainer: Trainer, epoch_itr: Any) -> None:
    trainer.train_step([next(epoch_itr.next_epoch_itr())])


def save(trainer: Trainer, epoch_itr: Any) -> Path:
    checkpoint_utils.save_checkpoint(trainer.cfg.checkpoint, trainer, epoch_itr, None)
    return Path(trainer.cfg.checkpoint.save_dir) / "checkpoint_last.pt"


SNAPSHOTS = """
import importlib, sys
import fairseq, fairseq.trainer

def snapshot(modules):
    found = {}
    for module in modules:
        for key, value in vars(module).items():
            name = f"{module.__name__}.{key}"
            found[name] = value
            if isinstance(value, type) and value.__module__ == module.__name__:
                found.update({f"{name}.{inner}": own for inner, own in vars(value).items()})
    return found

# As if all had been made: importing the package makes those that were not.
class All(list):
    def __contains__(self, name):
        return True

fairseq.fwp_mends = All()
import fwp_fairseq.fairseq_mends as mends
for mend in mends.mends():
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "fairseq"]
    before = snapshot(modules)
    importlib.import_module(f"{mends.__name__}.{mend.name}").install()
    changed = {
        name
        for name, value in snapshot(modules).items()
        # What an import adds is a module's name in its package.
        if value is not before.get(name) and (name in before or name not in sys.modules)
    }
    assert changed == set(mend.changes), (mend.name, changed ^ set(mend.changes))
print("all as they say")
"""


def test_each_mend_changes_what_it_names_and_nothing_else(run: Run) -> None:
    assert run("python", "-c", SNAPSHOTS).stdout == "all as they say\n"


# Every line is tried in a process of its own, in which nothing of fairseq and of this package has been imported.
ORDERS = [
    "import fwp_fairseq, fairseq",
    "import fairseq, fwp_fairseq",
    "import fwp_fairseq.ops; assert 'fairseq' not in sys.modules; import fairseq.utils",
    "import fwp_fairseq.models.fwp_transformer",
    "import fwp_fairseq.modules.carried_state",
    "import fwp_fairseq.tasks.token_streams",
    "use_user_dir()",
    "import fwp_fairseq; use_user_dir(); use_user_dir()",
    "import fwp_fairseq, fairseq; importlib.reload(fairseq); importlib.reload(fwp_fairseq)",
    "import fwp_fairseq; importlib.reload(fwp_fairseq); importlib.reload(fwp_fairseq._registration); import fairseq",
    # A model that is unpickled in a spawned process: its class is looked up by name.
    "pickle.loads(b'cfwp_fairseq.models.fwp_transformer\\nFWPTransformerModel\\n.')",
    # An import that fails is tried again.
    "import fwp_fairseq; sys.modules['omegaconf'] = None; fails(); sys.modules['omegaconf'] = omegaconf",
    "import fwp_fairseq; fwp_fairseq._registration._register = None; fails(); fails(); sys.exit()",
    # Whether fairseq is there is asked by other libraries, and it may be imported by two threads at once.
    "import fwp_fairseq; assert find_spec('fairseq')",
    "import fwp_fairseq; at_once((find_spec, 'fairseq'), (import_module, 'fairseq'))",
    "at_once((import_module, 'fairseq'), (import_module, 'fwp_fairseq'))",
    "at_once((import_module, 'fwp_fairseq.models'), (import_module, 'fairseq'))",
]

IN_ORDER = """
import argparse, importlib, os, pickle, sys, threading, traceback
from importlib import import_module
from importlib.util import find_spec
# What fairseq imports takes most of the time, and stays.
import fairseq, omegaconf
for name in [name for name in sys.modules if name.partition(".")[0] == "fairseq"]:
    del sys.modules[name]

def use_user_dir():
    from fairseq import utils
    utils.import_user_module(argparse.Namespace(user_dir="fwp_fairseq"))

def fails():
    try:
        import fairseq
    except (ImportError, TypeError):
        return
    raise AssertionError("fairseq was imported")

def at_once(*calls):
    threads = [threading.Thread(target=function, args=[name]) for function, name in calls]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]

children = {}
for order in sys.stdin.read().splitlines():
    if child := os.fork():
        children[child] = order
        continue
    try:
        exec(order)
        import fairseq
        from fairseq import criterions, models, tasks
        from fairseq.optim import lr_scheduler
        assert {"fwp_transformer", "transformer_xl_lm"} <= set(models.ARCH_MODEL_REGISTRY)
        assert {"fwp_translation", "associative_retrieval"} <= set(tasks.TASK_REGISTRY)
        assert "half_squared_error" in criterions.CRITERION_REGISTRY
        assert "until_solved" in lr_scheduler.LR_SCHEDULER_REGISTRY
        assert fairseq.fwp_mends == list(sys.modules["fwp_fairseq.fairseq_mends"].MENDS)
    except SystemExit:
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
for child, order in children.items():
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), order)
"""


def test_in_whatever_order_the_package_and_fairseq_are_imported_it_is_registered_and_fairseq_mended(run: Run) -> None:
    done = run("python", "-W", "ignore", "-c", IN_ORDER, stdin="\n".join(ORDERS))
    assert done.stdout.splitlines() == [f"0 {order}" for order in ORDERS], done.stderr


def own_trainers() -> Iterator[tuple[str, Any]]:
    """Trainers of others, which fairseq's functions take as well."""
    yield "a mock", MagicMock()
    yield "a mock that says it is a trainer", MagicMock(spec=Trainer, task=MagicMock(), cfg=MagicMock())
    partial = object.__new__(Trainer)
    partial.cfg = OmegaConf.create({"distributed_training": {"distributed_world_size": 1}})
    yield "a trainer with part of a configuration", partial


@pytest.mark.parametrize("name", ["load_checkpoint", "save_checkpoint"])
@pytest.mark.parametrize("trainer", [pytest.param(trainer, id=kind) for kind, trainer in own_trainers()])
def test_a_trainer_of_ones_own_gets_what_fairseq_does(trainer: Any, name: str, tmp_path: Path) -> None:
    """By the functions that the mends have wrapped, down to the one of fairseq's."""
    original = wrapped = getattr(checkpoint_utils, name)
    while hasattr(original, "__wrapped__"):
        original = original.__wrapped__
    assert original.__module__ == "fairseq.checkpoint_utils" and original is not wrapped
    cfg = OmegaConf.create({"save_dir": str(tmp_path)})
    rest = () if name == "load_checkpoint" else (MagicMock(), None)

    def outcome(function: Any) -> str:
        with pytest.raises(Exception) as caught:
            function(cfg, trainer, *rest)
        return repr(caught.value)

    assert outcome(wrapped) == outcome(original)
    assert not list(tmp_path.iterdir())
    if isinstance(trainer, MagicMock):
        assert not trainer.task.before_checkpoint.called


def test_a_program_with_a_trainer_of_its_own_resumes_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    batches = [[index] for index in range(50)]
    trainer = MagicMock(checkpoint_suffix="")
    trainer.get_train_iterator.side_effect = lambda epoch, **_: EpochBatchIterator(
        ListDataset(batches, torch.ones(50)),
        collate_fn=lambda samples: samples,
        batch_sampler=batches,
        epoch=epoch,
        persistent_workers=False,
    )
    iterator = {"version": 2, "epoch": 2, "iterations_in_epoch": 30, "shuffle": False}
    trainer.load_checkpoint.return_value = {"train_iterator": iterator}
    options_of_loading = {
        **{f"reset_{part}": False for part in ("dataloader", "lr_scheduler", "meters", "optimizer")},
        "restore_file": "checkpoint_last.pt",
        "optimizer_overrides": "{}",
        "finetune_from_model": None,
    }
    cfg = OmegaConf.create({"save_dir": str(tmp_path), **options_of_loading})
    _, epoch_itr = checkpoint_utils.load_checkpoint(cfg, trainer)
    assert (epoch_itr.epoch, epoch_itr.iterations_in_epoch) == (2, 30)
    assert next(epoch_itr.next_epoch_itr(shuffle=False)) == [[30]]
    # The iterator that fairseq made is what came back, and the folder is not held.
    assert trainer.get_train_iterator.call_count == 1 and not list(tmp_path.iterdir())


def test_data_sets_that_cannot_be_hashed_train_and_resume(corpus: Corpus, tmp_path: Path) -> None:
    for epoch in (1, 3):
        trainer = trainer_of(corpus.translation, tmp_path, *TRANSLATION)
        load_dataset = trainer.task.load_dataset

        def load(split: str, load_dataset: Any = load_dataset, task: Any = trainer.task, **options: Any) -> None:
            load_dataset(split, **options)
            kind = type(task.datasets[split])
            names = {"__hash__": None, "can_reuse_epoch_itr_across_epochs": False}
            task.datasets[split].__class__ = type("Unhashable", (kind,), names)

        trainer.task.load_dataset = load
        epoch_itr = begin(trainer)
        assert epoch_itr.epoch == epoch and trainer.task.datasets["train"].__hash__ is None
        update(trainer, epoch_itr)
        epoch_itr.epoch = 3
        save(trainer, epoch_itr)


NOT_FINITE = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize(
    "flags", [(), ("--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", "1"), ("--store-ema",)]
)
def test_a_parameter_that_was_never_written_does_not_keep_a_sound_model_from_being_saved(
    corpus: Corpus, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    for updates in (1, 2):
        trainer = trainer_of(corpus.language_model, tmp_path, *LIGHT, *flags)
        (unused,) = (value for name, value in trainer.model.named_parameters() if name.endswith("conv_bias"))
        unused.data.fill_(float("nan"))
        epoch_itr = begin(trainer)
        update(trainer, epoch_itr)
        path = save(trainer, epoch_itr)
        saved = checkpoint_utils.load_checkpoint_to_cpu(str(path))
        assert saved["optimizer_history"][-1]["num_updates"] == updates
        assert [name for name, value in saved["model"].items() if not value.isfinite().all()] == [
            name for name in saved["model"] if name.endswith("conv_bias")
        ]


@pytest.mark.parametrize("value", NOT_FINITE)
def test_parameters_that_a_training_has_broken_replace_no_checkpoint(
    corpus: Corpus, tmp_path: Path, value: float
) -> None:
    trainer = trainer_of(corpus.translation, tmp_path, *TRANSLATION)
    epoch_itr = begin(trainer)
    update(trainer, epoch_itr)
    before = save(trainer, epoch_itr).read_bytes()
    trainer.model.decoder.output_projection.weight.data[0, 0] = value
    with pytest.raises(FloatingPointError, match="output_projection.weight is infinite or not a number.*--lr"):
        save(trainer, epoch_itr)
    assert (tmp_path / "checkpoint_last.pt").read_bytes() == before
    # It is for looking at, and nothing goes on from it.
    trainer.save_checkpoint(str(tmp_path / "crash.pt"), {})
    assert (
        not checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "crash.pt"))["model"][
            "decoder.output_projection.weight"
        ]
        .isfinite()
        .all()
    )


def test_a_parameter_in_use_is_judged_though_it_was_broken_from_the_start(corpus: Corpus, tmp_path: Path) -> None:
    trainer = trainer_of(corpus.translation, tmp_path, *TRANSLATION)
    weight = trainer.model.decoder.output_projection.weight
    weight.data[0, 0] = float("nan")
    epoch_itr = begin(trainer)
    weight.grad = torch.full_like(weight, float("nan"))
    with pytest.raises(FloatingPointError, match="output_projection.weight"):
        save(trainer, epoch_itr)


def evaluated_in(folder: Path) -> Iterator[ast.expr]:
    """What is passed to eval, or to what fairseq has made of it, in the modules of a folder."""
    evaluate = {"eval", "eval_str_list", "eval_str_dict", "eval_bool"}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args:
                function = node.func
                name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
                # model.eval() and editdistance.eval(a, b) are something else.
                if name in evaluate and not (name == "eval" and isinstance(function, ast.Attribute)):
                    yield node.args[0]


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_every_option_that_fairseq_evaluates_is_judged() -> None:
    package = Path(fairseq.__file__).parent
    options, variables = set(), set()
    for value in (*evaluated_in(package), *evaluated_in(package.parent / "fairseq_cli")):
        if isinstance(value, ast.Attribute):
            options.add(value.attr)
        elif isinstance(value, ast.Name):
            variables.add(value.id)
    assert len(options) > 30 and options - safe_loading._EVALUATED == set()
    # Arguments of functions, of which the last three are given options of the same names; lines of data.
    assert variables == {"x", "uf", "line", "xformers_att_config", "conv_enc_config", "feature_encoder_spec"}


def test_parentheses_in_names_and_paths_are_not_taken_for_calls(corpus: Corpus, tmp_path: Path) -> None:
    data = tmp_path / "data(1)"
    data.symlink_to(corpus.translation)
    names = ("--tensorboard-logdir", "run(2)", "--wandb-project", "f(x)", "--suppress-crashes")
    trainer = trainer_of(data, tmp_path / "run(2)", *TRANSLATION, *names, "--adam-betas", "(0.9, 0.98)")
    epoch_itr = begin(trainer)
    update(trainer, epoch_itr)
    loaded = checkpoint_utils.load_checkpoint_to_cpu(str(save(trainer, epoch_itr)))
    assert loaded["cfg"]["task"]["data"] == str(data) and loaded["cfg"]["common"]["tensorboard_logdir"] == "run(2)"


def test_an_option_with_which_no_checkpoint_could_be_loaded_is_refused_at_the_start(
    corpus: Corpus, tmp_path: Path
) -> None:
    trainer = trainer_of(corpus.translation, tmp_path, *TRANSLATION)
    trainer.cfg.optimizer.adam_betas = "tuple([0.9, 0.98])"
    with pytest.raises(ValueError, match="^--adam-betas: fairseq evaluates") as caught:
        begin(trainer)
    assert "\n" not in str(caught.value) and "train" not in trainer.task.datasets
    assert not list(tmp_path.glob("*.pt"))


def test_processes_that_train_alone_are_told_the_flags_that_are_missing(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(corpus.translation, tmp_path, *TRANSLATION)
    assert one_training.why_alone(trainer.cfg) == ""
    monkeypatch.setenv("WORLD_SIZE", "2")
    code = "import sys; from fwp_fairseq.fairseq_mends.one_training import hold_folder; hold_folder(sys.argv[1]); "
    code += "print(flush=True); sys.stdin.read()"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": ROOT}
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], **pipes) as first:
        assert first.stdout is not None and first.stdout.readline()
        with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError) as caught:
            begin(trainer)
        first.communicate()
    for message in (str(caught.value), caplog.text):
        assert "WORLD_SIZE is 2, but each process trains alone" in message
        assert "--distributed-world-size 2" in message and "--distributed-init-method env://" in message
    assert str(caught.value).startswith(f"--save-dir {tmp_path}: another training is writing into this folder. WORLD")
    trainer.cfg.distributed_training.distributed_world_size = 2
    assert one_training.why_alone(trainer.cfg) == ""


QUIET = """
import sys, warnings
import torch
from fairseq_cli.train import cli_main
cli_main()
# What a user's own code has caused stays, though it is of the same kind.
warnings.warn("mine is deprecated", FutureWarning)
import hydra.experimental
with hydra.experimental.initialize(config_path=None):
    pass
list(torch.utils.data.DataLoader([1], pin_memory=True))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory is pinned where there is a GPU")
def test_the_log_of_a_training_has_no_deprecations_and_printouts_but_the_users_own_warnings(
    corpus: Corpus, run: Run, tmp_path: Path
) -> None:
    flags = ("--user-dir", "fwp_fairseq", "--cpu", "--optimizer", "adam", "--batch-size", 500, "--max-update", 1)
    flags += ("--valid-subset", "test", "--share-decoder-input-output-embed", "--save-dir", tmp_path)
    done = run("python", "-c", QUIET, corpus.translation, *TRANSLATION, *flags)
    warned = [line for line in done.stderr.splitlines() if "Warning: " in line]
    assert warned[0].endswith("FutureWarning: mine is deprecated"), done.stderr
    assert "pin_memory" in warned[-1] and any("hydra" in line for line in warned[1:-1]), done.stderr
    assert "write_proj.bias <-" not in done.stdout and "can_reuse_epoch_itr" not in done.stdout
    # What is shared is still said, and so is all else.
    assert "decoder.embed_tokens.weight <- decoder.output_projection.weight" in done.stdout
    assert "creating new batches for epoch 1" in done.stdout and "done training" in done.stdout
