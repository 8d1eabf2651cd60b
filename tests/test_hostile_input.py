"""Checkpoints and archives made to do harm: nothing runs, nothing is written elsewhere, memory stays bounded."""

import argparse
import builtins
import codecs
import functools
import importlib
import io
import operator
import os
import pickle
import pydoc
import resource
import runpy
import shutil
import struct
import subprocess
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fwp_fairseq.average_checkpoints import main as average_main
from fwp_fairseq.fairseq_mends.safe_loading import load_checkpoint_file

pytest.importorskip("fairseq")
pytest.importorskip("babel")
from fairseq import checkpoint_utils  # noqa: E402
from test_ui_strings_collect import DE, catalogue, make_wheel, phrases, run  # noqa: E402


class Calls:
    """Pickles to a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


class Plain:
    """A class of no use to a checkpoint."""


def attacks(target: Path) -> dict[str, Any]:
    """Values that write the target when they are unpickled without protection, or begin to."""
    code = f"open({str(target)!r}, 'w')"
    return {
        "system": Calls(os.system, f"touch {target}"),
        "popen": Calls(subprocess.Popen, ["touch", str(target)]),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "open": Calls(open, str(target), "w"),
        "compile": Calls(builtins.compile, code, "x", "exec"),
        "import": Calls(importlib.import_module, "antigravity"),
        "run a file": Calls(runpy.run_path, str(target)),
        "locate": Calls(pydoc.locate, "os.system"),
        "getattr": Calls(getattr, "x", "__class__"),
        "partial": Calls(functools.partial, os.system, f"touch {target}"),
        "attrgetter": Calls(operator.attrgetter, "system"),
        "copy": Calls(shutil.copyfile, "/etc/hostname", str(target)),
        "mkdir": Calls(os.mkdir, str(target)),
        "chained": Calls(Calls, Calls(os.system, f"touch {target}")),
        "torch.load": Calls(torch.load, str(target)),
        "pickle.loads": Calls(pickle.loads, pickle.dumps(Calls(os.system, f"touch {target}"))),
        "codecs": Calls(codecs.decode, b"x", "zip"),
        "namespace": Calls(types.SimpleNamespace),
        "a class": Plain,
        "an object": Plain(),
        "build": Calls(Plain, state={"__class__": "evil"}),
        "bytes that are read as a file": Calls(io.FileIO, str(target), "w"),
    }


def place(value: Any, where: str) -> dict[str, Any]:
    """A checkpoint with the value in one place."""
    state: dict[str, Any] = {"model": {"weight": torch.zeros(2)}, "args": None, "extra_state": {}}
    if where == "parameter":
        state["model"]["evil"] = value
    elif where == "argument":
        state["args"] = argparse.Namespace(arch="fwp_transformer", nested=[{"deep": (value,)}])
    elif where == "optimizer":
        state["last_optimizer_state"] = {"param_groups": [{"betas": [value]}], "state": {0: {"exp_avg": value}}}
    else:
        state["cfg"] = {"model": {"_name": "fwp_transformer", "list": [[value]]}}
    return state


@pytest.mark.parametrize("where", ["parameter", "argument", "optimizer", "configuration"])
@pytest.mark.parametrize("name", list(attacks(Path("x"))))
def test_no_kind_of_call_is_made(name: str, where: str, tmp_path: Path) -> None:
    target, file = tmp_path / "target", tmp_path / "evil.pt"
    torch.save(place(attacks(target)[name], where), file)
    with pytest.raises(pickle.UnpicklingError, match="was not loaded"):
        checkpoint_utils.load_checkpoint_to_cpu(str(file))
    with pytest.raises(SystemExit, match="was not loaded"):
        average_main(["--inputs", str(file), "--output", str(target)])
    assert os.listdir(tmp_path) == ["evil.pt"]


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'touch target'\ntR.",  # GLOBAL, REDUCE of protocol 0
        b"(S'touch target'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch target'\no.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch target\x85R.",  # STACK_GLOBAL
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x02cargparse\nNamespace\n)\x81}X\x07\x00\x00\x00__class__cos\nsystem\nsb.",  # BUILD
        b"\x80\x02]q\x00h\x00a.",  # a list that holds itself, which is no checkpoint either
        b"\x80\x02" + b"(" * 100_000,  # marks without end
        b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",  # deeper than any stack
        b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"x.",  # a text that is longer than the file
        b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b"x.",  # a byte array likewise
        b"\x80\x02J\xff\xff\xff\x7fr\xff\xff\xff\xff.",  # a memo with gaps
    ],
)
def test_programs_in_the_language_of_pickles_are_refused_within_bounds(program: bytes, tmp_path: Path) -> None:
    inside, bare = tmp_path / "inside.pt", tmp_path / "bare.pt"
    torch.save({"model": {}}, inside)
    with zipfile.ZipFile(inside) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(inside, "w") as archive:
        for entry, content in entries.items():
            archive.writestr(entry, program if entry.endswith("data.pkl") else content)
    bare.write_bytes(program)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in (inside, bare):
        try:
            with path.open("rb") as file:
                state = load_checkpoint_file(file)
        except pickle.UnpicklingError as error:
            assert "was not loaded" in str(error)
        else:
            assert not isinstance(state, dict)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    assert sorted(os.listdir(tmp_path)) == ["bare.pt", "inside.pt"] and not Path("target").exists()


SIZES = ("--valid-size", "1", "--test-size", "1")


def test_a_line_of_ten_megabytes_and_nul_bytes_in_a_catalogue_are_left_out_or_named(tmp_path: Path) -> None:
    sound = catalogue(phrases(4, 4))
    long = b'msgid "Long"\nmsgstr "' + b"x" * 10_000_000 + b'"\n'
    make_wheel(tmp_path / "wheels", "app", {DE + ".po": sound + b"\n" + long})
    assert run(tmp_path, *SIZES) == 0
    assert all(len(path.read_bytes()) < 10_000 for path in (tmp_path / "corpus").glob("*.de"))
    nul = b'msgid "Save\\0 all the files"\nmsgstr "Alle\x00 Dateien speichern"\n'
    make_wheel(tmp_path / "wheels", "app", {DE + ".po": sound + b"\n" + nul})
    assert run(tmp_path, *SIZES) in (0, 1)
    assert all(b"\0" not in path.read_bytes() for path in (tmp_path / "corpus").glob("*.[de][en]"))


def test_an_archive_that_lies_about_the_size_of_a_catalogue_does_not_fill_the_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wheels" / "bad-1.0-py3-none-any.whl"
    path.parent.mkdir()
    size = 300_000_000
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(DE + ".po", bytes(size))
    data = path.read_bytes().replace(struct.pack("<L", size), struct.pack("<L", 1000))
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert run(tmp_path, *SIZES) == 1
    assert "cannot be read" in capsys.readouterr().err
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
