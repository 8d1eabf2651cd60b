"""fairseq finds what it asks of numpy, in the one that is installed and in one from the other side of version 2."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, Run

pytest.importorskip("fairseq")
from fairseq.data import Dictionary, LanguagePairDataset, ListDataset, TokenBlockDataset, data_utils  # noqa: E402
from fairseq.modules import DynamicCRF  # noqa: E402
from tiny_streams import Lines  # noqa: E402

import fwp_fairseq  # noqa: E402, F401  (mends fairseq)
from fwp_fairseq.fairseq_mends.safe_loading import load_checkpoint_file  # noqa: E402

LINES = Lines(3, 1, 5)
ARRAYS = {code: np.array([0, 1, 1]).astype(code) for code in ("bool", "i4", "i8", "f4", "f8")}
OTHER_NUMPY = "1.26.4" if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else "2.4.6"


def blocks(mode: str, size: int, **options: Any) -> list[Any]:
    """All items of the lines in blocks."""
    dictionary = Dictionary()
    made = TokenBlockDataset(LINES, LINES.sizes, size, dictionary.pad(), dictionary.eos(), break_mode=mode, **options)
    return [made[index] for index in range(len(made))]


def test_a_language_model_gets_its_sentences_one_by_one() -> None:
    assert [item.tolist() for item in blocks("eos", 0)] == [line.tolist() for line in LINES]


@pytest.mark.parametrize("mode, sizes", [("none", [4, 4, 1]), ("complete", [4, 5])])
def test_a_language_model_gets_blocks_of_its_text(mode: str, sizes: list[int]) -> None:
    items = blocks(mode, 4, include_targets=True)
    assert [len(target) for _, target, _ in items] == sizes
    assert all(torch.equal(source[1:], target[:-1]) for source, target, _ in items)


def test_sources_are_sorted_into_buckets_of_lengths() -> None:
    side = (ListDataset(LINES, LINES.sizes), LINES.sizes, Dictionary())
    made = LanguagePairDataset(*side, *side, num_buckets=2, shuffle=False)
    assert [size for _, size in made.buckets] == sorted({int(n) for n in made.bucketed_num_tokens})
    assert all(bucket >= size for bucket, size in zip(made.bucketed_num_tokens, LINES.sizes))


def test_the_loss_of_a_conditional_random_field_is_a_number() -> None:
    layer = DynamicCRF(9, low_rank=2, beam_size=3)
    words = torch.randint(9, (2, 4))
    assert layer(torch.randn(2, 4, 9), words, torch.ones(2, 4, dtype=torch.bool)).isfinite().all()


def test_numpy_itself_is_left_as_it_is() -> None:
    assert data_utils.np is not np and not hasattr(np, "float")
    assert data_utils.np.random is np.random


def arrays_in(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {name: (array.dtype, array.tolist()) for name, array in load_checkpoint_file(file).items()}


def write_arrays(path: Path) -> dict[str, Any]:
    """Write a checkpoint of arrays; what ``arrays_in`` finds in it."""
    torch.save(ARRAYS, path)
    return {name: (array.dtype, array.tolist()) for name, array in ARRAYS.items()}


ON_THE_OTHER_SIDE = """
import sys
from pathlib import Path
import numpy, pytest, test_numpy_2 as tests
version, folder = sys.argv[1], Path(sys.argv[2])
assert numpy.__version__ == version, numpy.__version__
assert tests.arrays_in(folder / "here.pt") == tests.write_arrays(folder / "there.pt")
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", tests.__file__, "-k", "not other_side"]))
"""


def test_it_is_the_same_on_the_other_side_of_version_2_and_arrays_in_checkpoints_load_on_both(
    run: Run, tmp_path: Path
) -> None:
    """In a process that has another numpy. That comes from pip's cache or from the network; without either: skipped."""
    site = tmp_path / "site"
    wheel = ("--no-deps", "--no-compile", "--only-binary=:all:", f"numpy=={OTHER_NUMPY}")
    if run("python", "-m", "pip", "install", "--target", site, *wheel, check=False).returncode != 0:
        pytest.skip(f"numpy {OTHER_NUMPY} could not be installed")
    written = write_arrays(tmp_path / "here.pt")
    path = os.pathsep.join(map(str, (site, ROOT, ROOT / "tests")))
    run("python", "-W", "ignore", "-c", ON_THE_OTHER_SIDE, OTHER_NUMPY, tmp_path, anew=True, PYTHONPATH=path)
    assert arrays_in(tmp_path / "there.pt") == written
