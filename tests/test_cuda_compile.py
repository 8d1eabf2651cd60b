"""The kernels for a GPU compile for old and new ones, and nothing of theirs is spilled; their binding compiles, too.

`python -m pytest -s tests/test_cuda_compile.py` prints registers for each kernel and architecture.
"""

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from compiled import compile_once
from conftest import ROOT
from torch.utils import cpp_extension

SOURCES = ROOT / "fwp_fairseq" / "csrc"
# nvcc on the PATH may be a link, or a script that calls it.
TOOLKITS = [Path(p) for p in (cpp_extension.CUDA_HOME, "/usr/local/cuda") if p is not None]
TOOLKIT = next((p for p in TOOLKITS if (p / "bin/nvcc").exists() and (p / "include/cuda_runtime_api.h").exists()), None)
NVCC = TOOLKIT / "bin" / "nvcc" if TOOLKIT is not None else None

pytestmark = pytest.mark.skipif(TOOLKIT is None, reason="needs a CUDA toolkit, for its nvcc")


def architectures() -> list[str]:
    """The oldest that this nvcc knows, the newest, and that of H100, on which they have run."""
    known = subprocess.check_output([str(NVCC), "--list-gpu-arch"], text=True)
    numbers = sorted({int(n) for n in re.findall(r"compute_(\d+)", known)})
    return [str(n) for n in numbers if n in (numbers[0], 90, numbers[-1])]


def test_no_kernel_spills_registers_or_uses_local_memory(tmp_path, compiled):
    wanted = architectures()
    command = [str(NVCC), "-std=c++17", "-O3", "-fatbin", "--threads=2", "-Xptxas=-v,-warn-spills"]
    command += [f"-gencode=arch=compute_{n},code=sm_{n}" for n in wanted]

    def write_report(path: Path) -> None:
        source = SOURCES / "fast_weights_cuda_kernels.cu"
        run = subprocess.run(
            [*command, str(source), "-o", str(tmp_path / "kernels.fatbin")], capture_output=True, text=True, timeout=600
        )
        assert run.returncode == 0, run.stderr
        path.write_text(run.stdout + run.stderr)

    report = compile_once(compiled, command, [*SOURCES.glob("*.cu*"), *SOURCES.glob("*.h")], write_report).read_text()
    found = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        report,
        flags=re.DOTALL,
    )
    assert len(found) == report.count("Compiling entry function")
    registers: dict[str, dict[str, int]] = defaultdict(dict)
    for kernel, architecture, stack, stores, loads, used in found:
        assert (stack, stores, loads) == ("0", "0", "0"), f"{kernel} spills on sm_{architecture}"
        registers[readable(kernel)][architecture] = int(used)
    for kernel, by_architecture in sorted(registers.items()):
        assert sorted(by_architecture) == sorted(wanted), kernel
        print(f"{kernel:<24}" + "".join(f"  sm_{n} {by_architecture[n]:>3}" for n in wanted))
    names = [kernel.split("<")[0] for kernel in registers]
    assert {name: names.count(name) for name in set(names)} == {
        "scan_forward": 4, "scan_backward": 3, "write_and_read": 5, "read_memories": 5, "plan_step": 1,
    }  # fmt: skip


def readable(mangled: str) -> str:
    """Name and template arguments of one of our kernels."""
    match = re.match(r"_ZN3fwp3gpu\d+([a-z_]+?)(?:I([fd])Li(\d+)E)?E", mangled)
    assert match is not None, mangled
    name, kind, size = match.groups()
    return name if kind is None else f"{name}<{'float' if kind == 'f' else 'double'}, {size}>"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_binding_compiles(compiled):
    includes = cpp_extension.include_paths()
    if torch.version.cuda is None:
        # The one header that a torch for the CPU lacks.
        includes = [str(ROOT / "tests" / "cuda_stub"), *includes]
    includes.append(f"{TOOLKIT}/include")
    command = ["g++", "-std=c++20", "-fsyntax-only", "-Wall", "-Werror", "-Wno-psabi"]
    command += [f"-I{SOURCES}", *(f"-isystem{path}" for path in includes), str(SOURCES / "fast_weights_cuda.cpp")]

    def check(path: Path) -> None:
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        path.touch()

    stubs = [path for path in (ROOT / "tests" / "cuda_stub").rglob("*") if path.is_file()]
    versions = [Path(torch.version.__file__), TOOLKIT / "include" / "cuda_runtime_api.h"]
    sources = [*SOURCES.glob("*.h"), SOURCES / "fast_weights_cuda.cpp", *versions, *stubs]
    compile_once(compiled, command, sources, check)
