"""What several test files share: running fairseq's commands, and a small corpus for them."""

import os
import random
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import forked_python
import pytest

# Before anything imports torch, and for the commands too: the tensors of the tests are too small for several threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from fwp_fairseq.ops import BACKENDS, native  # noqa: E402
from fwp_fairseq.ops.fast_weights import GPU_BACKENDS  # noqa: E402

needs_native = pytest.mark.skipif(native.unavailable is not None, reason=f"no compiled operators: {native.unavailable}")


def backends(*without: str) -> pytest.MarkDecorator:
    """Runs a test with every backend for a processor, except those named."""
    names = sorted(set(BACKENDS) - set(GPU_BACKENDS) - set(without))
    return pytest.mark.parametrize(
        "backend", [pytest.param(n, marks=needs_native if n == "native" else ()) for n in names]
    )


ROOT = Path(__file__).resolve().parent.parent

Run = Callable[..., subprocess.CompletedProcess[str]]

# In the order of their time, for --dist loadfile --no-loadscope-reorder: two processes then end at about the same time.
LONGEST_FILES = (
    *("cuda_on_cpu", "wikitext103_recipe", "triton_compile", "triton_on_cpu", "cuda_compile", "precision_options"),
    *("streaming", "package"),
    *("as_fairseq_binaries", "models", "ops_contract", "end_to_end", "ui_strings_recipe", "native", "ops_transforms"),
    *("wmt14_recipe", "good_citizen", "concurrency", "mends", "resuming", "saving", "damaged_files", "checkpoints"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first."""
    ranks = {f"test_{name}": rank for rank, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


def find_script(name: str) -> str:
    """Path of a console script of the Python that runs the tests."""
    script = shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))
    assert script is not None, f"{name} is not installed"
    return script


@pytest.fixture(scope="session")
def run() -> Run:
    """Run a command in the clone; its output is text, and status 0 is asserted unless ``check`` is False.

    The command is a console script and its arguments, or ``python`` and its arguments; variables are of its
    environment. It is started by ``forked_python``, or ``anew`` where it must not have imported anything.
    """

    def run(
        command: str,
        *args: object,
        check: bool = True,
        stdin: str = "",
        cwd: Path = ROOT,
        anew: bool = False,
        **variables: str,
    ) -> subprocess.CompletedProcess[str]:
        forked = [] if anew else [forked_python.path()]
        program = (forked or [sys.executable]) if command == "python" else [*forked, find_script(command)]
        result = subprocess.run(
            [*program, *map(str, args)],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=300,
            cwd=cwd,
            # A process that is aborted says where it was.
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1", **variables},
        )
        assert not check or result.returncode == 0, f"{result.args}\n{result.stdout}\n{result.stderr}"
        return result

    return run


@pytest.fixture(scope="session")
def side_by_side() -> Callable[..., list[subprocess.CompletedProcess[str]]]:
    """Run thunks two at a time, since most of the time of a command is its start on one core; results in order."""

    def side_by_side(*thunks: Run) -> list[subprocess.CompletedProcess[str]]:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda thunk: thunk(), thunks))

    return side_by_side


@pytest.fixture(scope="session")
def compiled(pytestconfig: pytest.Config) -> Path:
    """Folder with what earlier runs have compiled."""
    assert pytestconfig.cache is not None
    return pytestconfig.cache.mkdir("compiled")


@dataclass(frozen=True)
class Corpus:
    """A corpus in two artificial languages, binarised: every word has one translation, and their order stays."""

    text: Path
    translation: Path
    language_model: Path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, run: Run, side_by_side: Callable[..., object]) -> Corpus:
    """2,000 sentences to train on and 50 each to validate and test, of 2 to 6 words out of 20, drawn with a seed."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(1)
    words = [consonant + vowel for consonant in "bdgk" for vowel in "aeiou"]
    for split, size in {"train": 2000, "valid": 50, "test": 50}.items():
        sentences = [draw.choices(words, k=draw.randint(2, 6)) for _ in range(size)]
        (folder / f"{split}.a").write_text("".join(" ".join(s) + "\n" for s in sentences))
        (folder / f"{split}.b").write_text("".join(" ".join(s).upper() + "\n" for s in sentences))
    splits = [f"--{split}pref={folder / split}" for split in ("train", "valid", "test")]
    texts = [f"--{split}pref={folder / split}.a" for split in ("train", "valid", "test")]
    made = Corpus(folder, folder / "translation", folder / "language_model")
    side_by_side(
        lambda: run("fairseq-preprocess", "-s", "a", "-t", "b", *splits, "--destdir", made.translation),
        lambda: run("fairseq-preprocess", "--only-source", *texts, "--destdir", made.language_model),
    )
    return made


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """As ``corpus``, of 6 words: 48 sentences of 2 to 5 words to train on, and 12 each to validate and test."""
    from fairseq import options
    from fairseq_cli import preprocess

    folder = tmp_path_factory.mktemp("small_corpus")
    draw = random.Random(1)
    for split, size in {"train": 48, "valid": 12, "test": 12}.items():
        sentences = [draw.choices("uvwxyz", k=draw.randint(2, 5)) for _ in range(size)]
        (folder / f"{split}.a").write_text("".join(" ".join(s) + "\n" for s in sentences))
        (folder / f"{split}.b").write_text("".join(" ".join(s).upper() + "\n" for s in sentences))
    made = Corpus(folder, folder / "translation", folder / "language_model")
    for ending, destination, flags in (
        ("", made.translation, ["-s", "a", "-t", "b"]),
        (".a", made.language_model, ["--only-source"]),
    ):
        flags += [f"--{split}pref={folder / split}{ending}" for split in ("train", "valid", "test")]
        preprocess.main(options.get_preprocessing_parser().parse_args([*flags, "--destdir", str(destination)]))
    return made
