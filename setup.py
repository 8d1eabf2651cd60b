"""Packaging; the settings of the tools are in pyproject.toml."""

import fcntl
import importlib.util
import os
import re
import site
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path
from typing import Any, Optional

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "fwp_fairseq" / "csrc"
CUDA_IS_WANTED = os.environ.get("FWP_CUDA") == "1"
# Read, not imported: the package cannot be imported before its dependencies are there.
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "fwp_fairseq" / "__init__.py").read_text("utf-8"), re.M)[1]


def uncover_torch() -> None:
    """Let this build find the torch that it is for, which lies where the package will be installed.

    pip builds where nothing can be imported but what pyproject.toml requires. torch cannot be required there: pip would
    download another one, of another version perhaps, and the operators fit the version that they were built with only.
    """
    if importlib.util.find_spec("torch") is None:
        sys.path += [sysconfig.get_path("platlib"), site.getusersitepackages()]


def compiled_operators() -> list[Extension]:
    """The C++ operators, if torch is here to build them for; without them the package works, only slower."""
    uncover_torch()
    try:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError:
        print("fwp-fairseq: no torch in this environment, so without compiled operators", file=sys.stderr)
        return []
    version = torch.__version__.split("+")[0].replace(".", "_")
    sanitize = ["-fsanitize=address", "-fno-omit-frame-pointer"] if os.environ.get("FWP_SANITIZE") == "1" else []
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return [
        Extension(
            # Named for its version of torch: what ops/native.py finds it by.
            f"fwp_fairseq._native_for_torch_{version}",
            sources=[str(path.relative_to(ROOT)) for path in sorted(CSRC.glob("*.cpp")) if "cuda" not in path.name],
            depends=[str(path.relative_to(ROOT)) for path in sorted(CSRC.glob("*.*h"))],
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=["torch_cpu", "c10"],
            # OpenMP is compiled for but not linked: its runtime is the one that torch brings, with torch's threads.
            extra_compile_args=["-std=c++20", "-O3", "-g0", "-fopenmp", "-Wno-psabi", abi, *sanitize],
            extra_link_args=sanitize or ["-s"],
            language="c++",
            optional=True,  # no compiler, or one that fails: a warning, and the package without it
        )
    ]


def cuda_toolkit() -> Optional[Path]:
    """Folder of a CUDA toolkit, if the torch that is here is one for CUDA; what was found, or missed, is said.

    With FWP_CUDA=1 none is an error, and so is a failure to build with it.
    """
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    # What torch finds may be the folder of a script that calls nvcc, with nothing else of the toolkit around.
    usual = ["/usr/local/cuda", *sorted(glob("/usr/local/cuda-*"), reverse=True), "/opt/cuda"]
    folders = [named] if named else [CUDA_HOME, *usual]
    candidates = [Path(folder) for folder in dict.fromkeys(folders) if folder is not None]
    parts = ("bin/nvcc", "include/cuda_runtime_api.h")
    whole = next((path for path in candidates if all((path / part).exists() for part in parts)), None)
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} is not for CUDA"
    elif whole is None:
        why = f"no CUDA toolkit ({' and '.join(parts)}) in {', '.join(map(str, candidates))}; CUDA_HOME can name one"
    else:
        print(f"fwp-fairseq: with kernels for a GPU, by the CUDA toolkit in {whole}", file=sys.stderr)
        return whole
    if CUDA_IS_WANTED:
        raise SystemExit(f"fwp-fairseq: FWP_CUDA=1, but {why}")
    print(f"fwp-fairseq: without kernels for a GPU: {why}", file=sys.stderr)
    return None


def cuda_architectures(nvcc: Path) -> list[str]:
    """Options of nvcc: as in TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"), or for this machine's GPUs, or from Volta on."""
    import torch

    wanted = re.findall(r"(\d+)\.(\d+[af]?)(\+PTX)?", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    if not wanted and torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
        wanted = [(str(major), str(minor), "") for major, minor in sorted(found)]
    if not wanted:
        known = subprocess.check_output([str(nvcc), "--list-gpu-arch"], text=True)
        numbers = sorted(int(number) for number in re.findall(r"compute_(\d+)\b", known) if int(number) >= 70)
        # The first of each generation runs on all of it.
        first = {number // 10: number for number in reversed(numbers)}
        wanted = [(str(major), str(number % 10), "") for major, number in sorted(first.items())]
    return [
        f"-gencode=arch=compute_{major}{minor},code={kind}_{major}{minor}"
        for major, minor, ptx in wanted
        for kind in (("sm", "compute") if ptx else ("sm",))
    ]


class BuildOperators(build_ext):
    """Builds the kernels for a GPU into the library, where there is a CUDA toolkit and they compile; else without.

    Of several builds in one folder at once each waits for the one before it, and finds its work done.
    """

    def run(self) -> None:
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            super().run()

    def copy_file(self, infile: str, outfile: str, *args: Any, **kwargs: Any) -> Any:
        """Into the clone: whole or not at all, since a training that starts meanwhile may load it."""
        target = Path(outfile)
        unfinished = target.with_name(f"new{target.name}")
        result = super().copy_file(infile, str(unfinished), *args, **kwargs)
        if unfinished.exists():
            os.replace(unfinished, target)
        return result

    def build_extension(self, extension: Extension) -> None:
        toolkit = cuda_toolkit()
        if toolkit is not None:
            plain = {name: list(getattr(extension, name)) for name in CUDA_ADDS}
            try:
                self.add_cuda(extension, toolkit)
                return super().build_extension(extension)
            except Exception as error:  # from nvcc, the compiler or the linker
                if CUDA_IS_WANTED:
                    raise SystemExit(f"fwp-fairseq: FWP_CUDA=1, but the kernels could not be built: {error}") from error
                print(f"fwp-fairseq: without kernels for a GPU, they could not be built: {error}", file=sys.stderr)
                for name, value in plain.items():
                    setattr(extension, name, value)
        super().build_extension(extension)

    def add_cuda(self, extension: Extension, toolkit: Path) -> None:
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        kernels = folder / "fast_weights_cuda_kernels.o"
        nvcc = toolkit / "bin" / "nvcc"
        command = [str(nvcc), "-c", "-std=c++17", "-O3", "-Xcompiler=-fPIC", "--threads=2"]
        source = CSRC / "fast_weights_cuda_kernels.cu"
        subprocess.run([*command, *cuda_architectures(nvcc), str(source), "-o", str(kernels)], check=True)
        extension.sources = [*extension.sources, str((CSRC / "fast_weights_cuda.cpp").relative_to(ROOT))]
        extension.extra_objects = [*extension.extra_objects, str(kernels)]
        extension.include_dirs = [*extension.include_dirs, str(toolkit / "include")]
        extension.library_dirs = [*extension.library_dirs, str(toolkit / "lib64")]
        extension.libraries = [*extension.libraries, "c10_cuda", "cudart"]


CUDA_ADDS = ("sources", "extra_objects", "include_dirs", "library_dirs", "libraries")

setup(
    name="fwp-fairseq",
    version=VERSION,
    description="Fast-weight Transformers (Schlag, Irie and Schmidhuber, ICML 2021) as a plugin for fairseq",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["fwp_fairseq", "fwp_fairseq.*"]),
    ext_modules=compiled_operators(),
    cmdclass={"build_ext": BuildOperators},
    package_data={"fwp_fairseq": ["csrc/*", "*.md"]},
    install_requires=["torch>=2.6", "sacrebleu", "sentencepiece", "subword-nmt"],
    extras_require={
        # Not required of everyone, since many have a fairseq from source.
        "fairseq": ["ve-fairseq; python_version>='3.11'", "fairseq; python_version<'3.11'"],
        "onnx": ["onnx>=1.18", "onnxruntime>=1.26", "safetensors"],
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "babel",
            "polib",
            "sacremoses",
            "matplotlib",
            "setuptools",
            "onnx",
            "onnxruntime",
            "safetensors",
            # Of Triton's kernels the tests run some on the processor, and compile all.
            "triton; sys_platform == 'linux'",
        ],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
