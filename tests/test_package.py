"""What a user gets from pip: the files, the versions, the user dir, and a clear word where fairseq is missing."""

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from conftest import ROOT, Corpus, Run, needs_native
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fwp_fairseq


@pytest.fixture(scope="module")
def installed(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the package as pip installs it from a wheel."""
    folder = tmp_path_factory.mktemp("installed")
    # Built from a copy: the build leaves files beside setup.py, and would take in those of an earlier one.
    source = folder / "source"
    skipped = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "fwp_fairseq", source / "fwp_fairseq", ignore=skipped)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    site = folder / "site"
    run("python", "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", site, source)
    return site


def python_without_fairseq(code: str) -> subprocess.CompletedProcess[str]:
    """Run code where fairseq cannot be imported."""
    block = "import sys; sys.modules['fairseq'] = None\n"
    return subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, cwd=ROOT)


def test_the_module_prints_the_user_dir_and_nothing_else(run: Run, tmp_path: Path) -> None:
    assert run("python", "-m", "fwp_fairseq", cwd=tmp_path).stdout == f"{ROOT / 'fwp_fairseq'}\n"


def test_an_installed_package_has_every_file_of_the_clone(installed: Path) -> None:
    def files(folder: Path) -> set[str]:
        found = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts and p.suffix != ".so")
        return {str(p.relative_to(folder)) for p in found}

    assert files(installed / "fwp_fairseq") == files(ROOT / "fwp_fairseq")
    assert "models/fwp_transformer.py" in files(installed / "fwp_fairseq")


@needs_native
def test_an_installed_package_has_its_compiled_operators(installed: Path, run: Run, tmp_path: Path) -> None:
    code = "from fwp_fairseq.ops import native; print(native.__file__, native.unavailable)"
    found = run("python", "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).stdout.split()
    assert found == [str(installed / "fwp_fairseq" / "ops" / "native.py"), "None"]


def test_an_installed_package_serves_as_user_dir(corpus: Corpus, installed: Path, run: Run, tmp_path: Path) -> None:
    path = {"PYTHONPATH": str(installed), "cwd": tmp_path}
    user_dir = run("python", "-m", "fwp_fairseq", **path).stdout.strip()
    assert user_dir == str(installed / "fwp_fairseq")
    options = (
        "--arch",
        "fwp_transformer",
        "--encoder-embed-dim",
        16,
        "--optimizer",
        "adam",
        "--batch-size",
        2,
        "--cpu",
    )
    command = ("fairseq-train", corpus.translation, "--user-dir", user_dir, *options, "--max-update", 1, "--no-save")
    result = run(*command, "--disable-validation", **path)
    assert "done training" in result.stdout + result.stderr


def test_the_package_has_the_version_of_the_module(installed: Path) -> None:
    (found,) = metadata.distributions(name="fwp-fairseq", path=[str(installed)])
    assert found.version == fwp_fairseq.__version__
    assert found.metadata["License"] == "MIT"
    assert found.metadata["Requires-Python"] == ">=3.10"


def test_everything_that_pip_installs_for_the_tests_is_pinned_to_the_version_that_is_installed(installed: Path) -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    (package,) = metadata.distributions(name="fwp-fairseq", path=[str(installed)])
    pending, needed = [Requirement(text) for text in package.requires or []], {}
    while pending:
        requirement = pending.pop()
        extras = ["fairseq", "test", *requirement.extras]
        applies = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in extras)
        name = canonicalize_name(requirement.name)
        if not applies or name in needed:
            continue
        distribution = metadata.distribution(name)
        # A build of torch for one kind of hardware has a suffix: 2.13.0+cpu.
        needed[name] = distribution.version.split("+")[0]
        inner = [Requirement(text) for text in distribution.requires or []]
        pending += [r for r in inner if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert needed.keys() >= {"torch", "sacrebleu", "numpy", "pytest"}
    if sys.version_info >= (3, 11):
        assert "ve-fairseq" in needed
    # torch for GPUs comes with packages that it pins itself.
    needed = {name: version for name, version in needed.items() if not re.match("nvidia-|cuda-|triton", name)}
    assert {name: versions.get(name) for name in needed} == needed


@pytest.mark.parametrize("module", ["fwp_fairseq.models", "fwp_fairseq.models.fwp_transformer", "fwp_fairseq.modules"])
def test_without_fairseq_the_models_say_in_one_sentence_how_to_install_it(module: str) -> None:
    result = python_without_fairseq(f"import {module}")
    assert result.returncode != 0
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError: fwp_fairseq needs fairseq")
    assert "pip install 'fwp-fairseq[fairseq]'" in last_line
    assert "ModuleNotFoundError" not in result.stderr


def test_without_fairseq_operators_and_averaging_of_checkpoints_can_be_imported() -> None:
    assert python_without_fairseq("import fwp_fairseq.ops, fwp_fairseq.average_checkpoints").returncode == 0


def test_a_fairseq_that_lacks_a_dependency_is_not_reported_as_missing() -> None:
    code = "del sys.modules['fairseq']; sys.modules['hydra'] = None\nimport fwp_fairseq.models"
    result = python_without_fairseq(code)
    assert "ModuleNotFoundError" in result.stderr and "hydra" in result.stderr.splitlines()[-1]
    assert "needs fairseq" not in result.stderr
