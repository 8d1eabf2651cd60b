"""Packaging; the settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
# Read, not imported: the package cannot be imported before its dependencies are there.
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "fwp_fairseq" / "__init__.py").read_text("utf-8"), re.M)[1]

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
