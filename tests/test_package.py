"""What a user gets from pip: the files, the versions, the user dir, and a clear word where fairseq is missing."""

import logging
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from importlib import metadata
from pathlib import Path

import numpy
import pytest
import torch
from compiled import caching_compiler
from conftest import ROOT, Corpus, Run, needs_native
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fwp_fairseq
from fwp_fairseq.__main__ import main
from fwp_fairseq.ops import native


@pytest.fixture(scope="module")
def installed(run: Run, tmp_path_factory: pytest.TempPathFactory, compiled: Path) -> Path:
    """Folder with the package as pip installs it from a wheel."""
    folder = tmp_path_factory.mktemp("installed")
    # Built from a copy: the build leaves files beside setup.py, and would take in those of an earlier one.
    source = folder / "source"
    skipped = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "fwp_fairseq", source / "fwp_fairseq", ignore=skipped)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    site = folder / "site"
    compiler = caching_compiler(compiled, folder, versions=Path(torch.version.__file__))
    install = ("-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", site, source)
    run("python", *install, **({"CXX": str(compiler)} if shutil.which("g++") else {}))
    return site


def python_without_fairseq(code: str) -> subprocess.CompletedProcess[str]:
    """Run code where fairseq cannot be imported."""
    block = "import sys; sys.modules['fairseq'] = None\n"
    return subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, cwd=ROOT)


def module(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """What ``python -m fwp_fairseq`` with these arguments returns, in this process."""
    monkeypatch.setattr(sys, "argv", ["fwp_fairseq", *arguments])
    # The level that it sets stays with a process.
    monkeypatch.setattr(logging, "disable", lambda level: None)
    return main()


def test_the_module_prints_the_user_dir_and_nothing_else(run: Run, tmp_path: Path) -> None:
    assert run("python", "-m", "fwp_fairseq", cwd=tmp_path).stdout == f"{ROOT / 'fwp_fairseq'}\n"


@pytest.mark.parametrize("arguments, word", [(["--chekc"], "--chekc"), (["--check", "--mends"], "not allowed with")])
def test_the_module_refuses_other_arguments(
    arguments: list[str], word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        module(monkeypatch, *arguments)
    assert stopped.value.code == 2 and word in capsys.readouterr().err


def test_the_module_lists_what_is_changed_in_fairseq(run: Run) -> None:
    pytest.importorskip("fairseq")
    from fwp_fairseq.fairseq_mends import MENDS

    blocks = run("python", "-m", "fwp_fairseq", "--mends", anew=True).stdout.strip().split("\n\n")
    assert [block.split(":")[0] for block in blocks] == list(MENDS)
    assert all("\n    changes: " in block and "\n    It can go " in block for block in blocks)


def test_the_module_prints_every_flag_of_its_own_and_none_of_fairseqs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("fairseq")
    from fwp_fairseq.modules.fast_weight_config import FastWeightConfig
    from fwp_fairseq.modules.places import PLACE_FIELDS

    assert module(monkeypatch, "--options") == 0
    printed = capsys.readouterr().out
    own = (
        {option.name for option in fields(FastWeightConfig)} - {"_name", "cpu"} | set(PLACE_FIELDS) | {"memory_length"}
    )
    flags = re.findall(r"^  --(\S+)", printed, re.MULTILINE)
    assert own <= {flag.replace("-", "_") for flag in flags}
    assert not {"dropout", "encoder-layers", "cpu", "adaptive-input", "tokens-per-sample"} & set(flags)
    assert "--update-rule {sum,delta,gated,gated-delta,fwm} (default: delta)\n" in printed


@needs_native
def test_check_names_what_a_training_would_use_and_where_it_lies(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fairseq = pytest.importorskip("fairseq")
    assert module(monkeypatch, "--check") == 0
    printed = capsys.readouterr().out
    for library in (torch, numpy, fairseq):
        assert f"{library.__name__} {library.__version__}: {Path(str(library.__file__)).parent}\n" in printed
    assert f"fwp_fairseq {fwp_fairseq.__version__}: {ROOT / 'fwp_fairseq'}\n" in printed
    assert f": {native.library_in(ROOT / 'fwp_fairseq')}\n" in printed
    assert "Problem" not in printed


def test_check_fails_without_operators_or_fairseq_and_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "unavailable", "they were not built")
    monkeypatch.setitem(sys.modules, "fairseq", None)
    assert module(monkeypatch, "--check") == 1
    printed = capsys.readouterr().out
    assert "Problem: no compiled operators: they were not built\n" in printed
    assert "Problem: fairseq cannot be imported: " in printed and "pip install 'fwp-fairseq[fairseq]'" in printed


def test_a_copy_without_operators_names_the_one_that_has_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clone, installed = tmp_path / "clone" / "fwp_fairseq", tmp_path / "site" / "fwp_fairseq"
    for copy in (clone, installed):
        copy.mkdir(parents=True)
        (copy / "__init__.py").touch()
    monkeypatch.setattr(native, "__file__", str(clone / "ops" / "native.py"))
    monkeypatch.setattr(sys, "path", [str(clone.parent), str(installed.parent)])
    monkeypatch.setattr(sys, "meta_path", [])
    assert native.copies() == [clone, installed]
    assert str(installed) not in str(native._load())
    version = torch.__version__.split("+")[0].replace(".", "_")
    (installed / f"{native.LIBRARY_PREFIX}{version}.so").touch()
    reason = str(native._load())
    assert str(clone) in reason and str(installed) in reason and native.REMEDY in reason


def test_a_build_that_pip_isolates_finds_the_torch_of_the_environment() -> None:
    """pip builds where the environment's folder of packages is not on Python's path."""
    code = """
import runpy, setuptools, setuptools.command.build_ext, sys
setuptools.setup = lambda **package: print(*(extension.name for extension in package["ext_modules"]))
sys.path = [folder for folder in sys.path if not folder.endswith("-packages")]
runpy.run_path("setup.py")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert f"fwp_fairseq.{native.LIBRARY_PREFIX}" in result.stdout, result.stderr


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
