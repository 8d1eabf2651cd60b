"""A process that ends while fairseq makes batches ready in the background ends as if there were none."""

import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("fairseq")

# Batches of many small tensors: each of them gives the interpreter up and takes it again.
LOADING = """
import os, sys
import torch
from fairseq.data.iterators import BufferedIterator
import fwp_fairseq.models

class Batches:
    def __len__(self):
        return 10**9

    def __iter__(self):
        while True:
            yield [torch.stack([torch.ones(3)] * 40) for _ in range(100)]

for _ in range(5):
    child = os.fork()
    if not child:
        next(BufferedIterator(10, Batches()))
        sys.exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_process_that_ends_amid_its_data_keeps_its_status() -> None:
    done = subprocess.run([sys.executable, "-c", LOADING], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-5:] == ["7"] * 5, done.stderr[-2000:]
