"""The compiled operators beyond the contract that all backends share: what torch, threads and installers see."""

import itertools
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from conftest import ROOT, needs_native
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops_contract import assert_agree, make_inputs, results
from torch import Tensor

from fwp_fairseq.ops import fast_weight_memory, fast_weight_scan, native
from fwp_fairseq.ops.fast_weights import choose_backend

ALL_USES = list(itertools.product([False, True], repeat=3))


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_native
@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 150), st.integers(1, 40), st.integers(1, 40)),
    uses=st.sampled_from(ALL_USES),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**20),
)
def test_any_shape_and_number_of_threads_agrees_with_the_loop(shape, uses, threads, seed):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        inputs = make_inputs(shape, uses, torch.float64, seed)
        assert_agree(results(inputs, "native"), results(inputs, "loop"), 1e-11)
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("d_k, d_v", [(512, 512), (512, 1), (1, 512), (257, 130), (64, 129)])
def test_large_heads_agree_with_the_loop(d_k, d_v, threads):
    threads(2)
    inputs = make_inputs((1, 1, 35, d_k, d_v), (True, True, True), torch.float64)
    assert_agree(results(inputs, "native"), results(inputs, "loop"), 1e-11)


@needs_native
def test_without_an_initial_state_it_starts_from_zero():
    for uses, length in itertools.product(ALL_USES, (5, 40)):
        inputs = {n: x for n, x in make_inputs((2, 1, length, 6, 5), uses, torch.float64).items() if x is not None}
        del inputs["initial_state"]
        leaves = [x.requires_grad_() for x in inputs.values()]
        found = {}
        for backend in ("native", "loop"):
            out, _ = fast_weight_scan(**{"write": None, **inputs}, backend=backend)
            found[backend] = torch.autograd.grad(out.sin().sum(), leaves, allow_unused=True)
        for actual, expected in zip(found["native"], found["loop"]):
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def operator_arguments(uses: tuple[bool, bool, bool], dtype: torch.dtype, **change: Any) -> list[Any]:
    inputs = {**make_inputs((1, 2, 135, 5, 4), uses, dtype), **change}
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for name in ("write", "erase", "decay"):
        inputs[name] = None if inputs[name] is None else inputs[name].to(state_dtype)
    return [None if x is None else x.detach().requires_grad_() for x in inputs.values()]


@needs_native
@pytest.mark.parametrize("uses", [(False, False, False), (True, True, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_operators_keep_torchs_rules_for_operators(uses, dtype):
    arguments = operator_arguments(uses, dtype)
    torch.library.opcheck(torch.ops.fwp_fairseq.scan.default, (*arguments, True))
    no_queries = operator_arguments(uses, dtype, q=None)
    torch.library.opcheck(torch.ops.fwp_fairseq.scan.default, (*no_queries, True))
    detached = [None if x is None else x.detach() for x in arguments]
    out, state, borders = torch.ops.fwp_fairseq.scan(*detached, True)
    torch.library.opcheck(torch.ops.fwp_fairseq.scan_backward.default, (out, state, *detached, borders))


@needs_native
def test_a_compiled_function_gives_the_same_values_and_gradients():
    inputs = make_inputs((2, 2, 140, 6, 4), (True, True, False), torch.float32)

    def loss(q: Tensor, k: Tensor, v: Tensor, write: Tensor, erase: Tensor) -> Tensor:
        out, state = fast_weight_scan(q, k, v, write, erase)
        return out.square().sum() + state.sum()

    leaves = [inputs[n].requires_grad_() for n in ("q", "k", "v", "write", "erase")]
    # The "aot_eager" compiler traces forward and backward as all others do, and needs no C++ compiler of its own.
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(
        [compiled(*leaves), *torch.autograd.grad(compiled(*leaves), leaves)],
        [loss(*leaves), *torch.autograd.grad(loss(*leaves), leaves)],
    ):
        torch.testing.assert_close(actual, expected)


@needs_native
@pytest.mark.parametrize("shape", [(3, 5, 150, 16, 16), (1, 1, 400, 33, 70)])
@pytest.mark.parametrize("count", [1, 2])
def test_the_same_input_gives_the_same_bits(shape, count, threads):
    threads(count)
    inputs = make_inputs(shape, (True, True, True), torch.float32)
    first = results(inputs, "native")
    for _ in range(3):
        assert all(torch.equal(x, first[name]) for name, x in results(inputs, "native").items())


@needs_native
def test_one_sequence_is_divided_among_threads_and_gives_the_same(threads):
    inputs = make_inputs((1, 1, 300, 20, 64), (True, True, True), torch.float32)
    found = []
    for count in (1, 2, 4):
        threads(count)
        found.append(results(inputs, "native"))
    assert_agree(found[1], found[0], 1e-5)
    assert_agree(found[2], found[0], 1e-5)


@needs_native
def test_it_follows_the_number_of_threads_of_torch():
    """A second OpenMP runtime in the process would have threads of its own, beyond torch.set_num_threads."""
    code = """
import threading, torch, os
from fwp_fairseq.ops import fast_weight_scan
torch.set_num_threads(1)
x = torch.rand(4, 4, 256, 64)
fast_weight_scan(x, x, x, backend="native")
print(len(os.listdir("/proc/self/task")))
torch.set_num_threads(3)
fast_weight_scan(x, x, x, backend="native")
print(len(os.listdir("/proc/self/task")))
"""
    if not Path("/proc/self/task").exists():
        pytest.skip("threads are counted in /proc")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    alone, three = (int(line) for line in run.stdout.split())
    assert three == alone + 2


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_without_a_copy_and_rounded_once(dtype):
    inputs = make_inputs((1, 2, 150, 8, 8), (True, True, False), dtype)
    wide = {n: None if x is None else x.float() for n, x in inputs.items()}
    actual, expected = fast_weight_scan(**inputs, backend="native"), fast_weight_scan(**wide, backend="native")
    assert torch.equal(actual[0], expected[0].to(dtype))
    assert torch.equal(actual[1], expected[1])


@needs_native
def test_views_of_projections_are_read_in_place():
    """(L, B, H D) projections seen as (B, H, L, D), as the attention module passes them."""
    whole = torch.rand(30, 2, 3 * 8, dtype=torch.float64)
    x = whole.unflatten(-1, (3, 8)).permute(1, 2, 0, 3)
    out, state = fast_weight_scan(x, x, x, x[..., 0], x[..., 1] / 8, backend="native")
    plain = x.contiguous()
    expected, expected_state = fast_weight_scan(plain, plain, plain, plain[..., 0], plain[..., 1] / 8, backend="loop")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(state, expected_state)


@needs_native
def test_nothing_is_written_outside_the_outputs():
    """Inputs lie between guards in one buffer, and neither they nor the guards may change."""
    shape = (2, 1, 19, 5, 7)
    inputs = make_inputs(shape, (True, True, True), torch.float32)
    sizes = [x.numel() for x in inputs.values()]
    buffer = torch.full((sum(sizes) + 64 * (len(sizes) + 1),), 7.0)
    guarded: dict[str, Optional[Tensor]] = {}
    at = 64
    for (name, x), size in zip(inputs.items(), sizes):
        buffer[at : at + size] = x.reshape(-1)
        guarded[name] = buffer[at : at + size].view(x.shape)
        at += size + 64
    before = buffer.clone()
    results(guarded, "native")
    assert torch.equal(buffer, before)


@needs_native
def test_gradients_of_gradients_are_refused_in_words():
    q, k, v, *_ = (x.requires_grad_() for x in make_inputs((1, 1, 4, 2, 2), (True, True, True), torch.float32).values())
    (grad,) = torch.autograd.grad(fast_weight_scan(q, k, v, backend="native")[0].sum(), k, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again; backend 'loop' can"):
        torch.autograd.grad(grad.sum(), v)


@needs_native
def test_nothing_is_kept_for_a_backward_pass_that_will_not_come():
    arguments = [x.detach() for x in operator_arguments((True, True, True), torch.float32)]
    assert torch.ops.fwp_fairseq.scan(*arguments, True)[2].numel() > 0
    assert torch.ops.fwp_fairseq.scan(*arguments, False)[2].numel() == 0


@needs_native
@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.rand(1, 2, 3)}, "four dimensions"),
        ({"v": torch.rand(1, 2, 3, 4)}, "differ in B, H or L"),
        ({"q": torch.rand(1, 2, 135, 6)}, "q and k differ"),
        ({"q": torch.rand(1, 2, 135, 5).double()}, "differ in type"),
        ({"write": torch.rand(2, 1, 135)}, "write is not of shape"),
        ({"initial_state": torch.rand(1, 2, 4, 5)}, "initial_state must be"),
        ({"initial_state": torch.rand(1, 2, 5, 4).double()}, "initial_state must be"),
    ],
)
def test_the_raw_operator_refuses_what_would_be_read_out_of_bounds(change, message):
    arguments = operator_arguments((True, True, True), torch.float32, **change)
    with pytest.raises(ValueError, match=message):
        torch.ops.fwp_fairseq.scan(*arguments, False)


@needs_native
def test_auto_takes_the_compiled_operators_on_a_processor_and_chunks_elsewhere():
    assert choose_backend("auto") == "native"
    assert choose_backend("auto", device_type="meta") == "chunk"
    assert choose_backend("auto", max_norm=1.0) == "chunk"


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch):
    """As if the package had been installed without a compiler, or with libraries of the names given."""

    def pretend(folder: Path, *names: str) -> None:
        for name in names:
            (folder / name).write_bytes(b"not a library")
        monkeypatch.setattr(native, "copies", lambda: [folder])
        monkeypatch.setattr(native, "unavailable", native._load())
        monkeypatch.setattr(native, "_noted", False)

    return pretend


def test_without_a_library_chunks_are_used_and_it_is_said_once(no_library, tmp_path, caplog):
    no_library(tmp_path)
    x = torch.rand(1, 1, 3, 2)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            fast_weight_memory(x, x)
    (record,) = caplog.records
    assert "not built at installation" in record.message and native.REMEDY in record.message
    with pytest.raises(RuntimeError, match="backend is 'native'.*--force-reinstall"):
        fast_weight_memory(x, x, backend="native")


def test_a_library_of_another_torch_is_not_loaded(no_library, tmp_path):
    no_library(tmp_path, "_native_for_torch_1_2_3.cpython-311-x86_64-linux-gnu.so")
    assert choose_backend("auto") == "chunk"
    assert "built for torch 1.2.3, this is torch " + torch.__version__ in str(native.unavailable)


def test_a_damaged_library_is_named(no_library, tmp_path):
    name = native.LIBRARY_PREFIX + torch.__version__.split("+")[0].replace(".", "_") + ".so"
    no_library(tmp_path, name)
    assert choose_backend("auto") == "chunk"
    assert name in str(native.unavailable) and "cannot be loaded" in str(native.unavailable)


@pytest.mark.parametrize("missing", ["torch", "compiler"])
def test_the_package_installs_without_torch_or_compiler(missing, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "fwp_fairseq", source / "fwp_fairseq", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = "import runpy, sys; sys.argv = ['setup.py', '-q', 'build']\n"
    if missing == "torch":
        code += "sys.modules['torch'] = None\n"
    environment = {"PATH": "/nowhere", "CC": "no-such-compiler", "CXX": "no-such-compiler"}
    run = subprocess.run(
        [sys.executable, "-c", code + "runpy.run_path('setup.py', run_name='__main__')"],
        cwd=source, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert ("without compiled operators" if missing == "torch" else "no-such-compiler") in run.stderr
    assert list(source.glob("build/lib*/fwp_fairseq/ops/native.py"))
    assert not list(source.glob("build/**/*.so"))
