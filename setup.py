"""Packaging; the settings of the tools are in pyproject.toml."""

import os
import re
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "fwp_fairseq" / "csrc"
# Read, not imported: the package cannot be imported before its dependencies are there.
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "fwp_fairseq" / "__init__.py").read_text("utf-8"), re.M)[1]


def compiled_operators() -> list[Extension]:
    """The C++ operators, if torch is here to build them for; without them the package works, only slower.

    pip hides an installed torch from the build, unless it is told --no-build-isolation.
    """
    try:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError:
        print("fwp-fairseq: no torch in this build, so without compiled operators", file=sys.stderr)
        return []
    version = torch.__version__.split("+")[0].replace(".", "_")
    sanitize = ["-fsanitize=address", "-fno-omit-frame-pointer"] if os.environ.get("FWP_SANITIZE") == "1" else []
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return [
        Extension(
            # Named for its version of torch: what ops/native.py finds it by.
            f"fwp_fairseq._native_for_torch_{version}",
            sources=[str(path.relative_to(ROOT)) for path in sorted(CSRC.glob("*.cpp"))],
            depends=[str(path.relative_to(ROOT)) for path in sorted(CSRC.glob("*.h"))],
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
    package_data={"fwp_fairseq": ["csrc/*"]},
    install_requires=["torch>=2.6", "sacrebleu", "sentencepiece", "subword-nmt"],
    extras_require={
        # Not required of everyone, since many have a fairseq from source. fairseq does not work with numpy 2.
        "fairseq": ["ve-fairseq; python_version>='3.11'", "fairseq; python_version<'3.11'", "numpy<2"],
        "test": ["pytest", "hypothesis", "ruff", "mypy", "babel", "polib", "setuptools"],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
