"""What the kernels for a GPU compute, tested without one: compiled for the processor (cuda_on_cpu/cuda_runtime.h).

That a race between threads would be noticed is tested, too: without any one of the barriers some result is wrong.
"""

import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent / "cuda_on_cpu"))

import test_decoding  # noqa: E402
from cases import all_is_right, in_child, scan_errors  # noqa: E402
from emulator import SOURCES, Kernels, Problem, compile_kernels  # noqa: E402
from mistakes import compile_with_mistakes  # noqa: E402
from registered import UNBOUNDED_RULES  # noqa: E402
from test_ops_contract import make_inputs  # noqa: E402

from fwp_fairseq.ops import native  # noqa: E402

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="needs g++ and an x86-64 processor"
)

ALL_USES = list(itertools.product([False, True], repeat=3))
MANY = 10_000  # multiprocessors, so that tiles are the narrowest
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(scope="session")
def kernels(compiled: Path) -> Kernels:
    sanitize = os.environ.get("FWP_SANITIZE") == "1"
    return Kernels(compile_kernels(compiled, sanitize=sanitize))


def check_scan(kernels: Kernels, shape, uses, dtype, **options) -> None:
    errors = scan_errors(kernels, shape, uses, dtype, **options)
    assert all(error <= TOLERANCE[dtype] for error in errors.values()), errors


# --- The recurrence ---------------------------------------------------------------------------------------------------

# One token; a chunk, and one more; over a segment's border; several slabs of keys; several tiles of values, with tails.
SHAPES = [
    (2, 3, 1, 4, 5),
    (1, 1, 16, 8, 8),
    (2, 1, 17, 3, 9),
    (1, 2, 150, 16, 1),
    (1, 1, 145, 40, 33),
    (1, 1, 20, 70, 75),
]


@pytest.mark.parametrize("uses", ALL_USES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "dtype, multiprocessors", [(torch.float64, 1), (torch.float32, 1), (torch.float32, MANY)], ids=str
)
def test_values_and_gradients_agree_with_the_float64_loop(kernels, uses, shape, dtype, multiprocessors):
    check_scan(kernels, shape, uses, dtype, multiprocessors=multiprocessors)


@pytest.mark.parametrize("uses", ALL_USES)
@pytest.mark.parametrize(
    "options", [{"initial": False}, {"queries": False}, {"grad_state": False}, {"initial": False, "grad_state": False}]
)
def test_what_is_not_there_is_not_needed(kernels, uses, options):
    check_scan(kernels, (1, 2, 35, 6, 5), uses, torch.float64, **options)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 150), st.integers(1, 70), st.integers(1, 70)),
    uses=st.sampled_from(ALL_USES),
    seed=st.integers(0, 2**20),
)
def test_any_shape_and_order_of_threads(kernels, shape, uses, seed):
    kernels.seed(seed)
    check_scan(kernels, shape, uses, torch.float64)


@pytest.mark.parametrize("d_k, d_v", [(512, 20), (300, 40), (160, 70), (128, 64), (1, 512)])
def test_large_heads(kernels, d_k, d_v):
    check_scan(kernels, (1, 1, 19, d_k, d_v), (True, True, True), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d_v", [8, 40])
def test_half_precision(kernels, dtype, d_v):
    check_scan(kernels, (1, 2, 150, 8, d_v), (True, True, False), dtype)
    inputs = list(make_inputs((1, 2, 40, 8, d_v), (True, True, False), dtype).values())
    inputs[3:5] = [x.float() for x in inputs[3:5]]
    wide = [None if x is None else x.float() for x in inputs]
    (out, state, _), (wide_out, wide_state, _) = kernels.scan(*inputs, False), kernels.scan(*wide, False)
    assert torch.equal(out, wide_out.to(dtype)) and torch.equal(state, wide_state)


def test_strided_and_expanded_inputs_are_read_in_place(kernels):
    whole = torch.rand(35, 2, 3 * 8, dtype=torch.float64)
    x = whole.unflatten(-1, (3, 8)).permute(1, 2, 0, 3)
    k = torch.rand(1, 3, 35, 8, dtype=torch.float64).softmax(-1).expand(2, -1, -1, -1)
    gate = x[..., 3]
    check_scan(kernels, (2, 3, 35, 8, 8), (True,) * 3, torch.float64, q=x, k=k, v=x, write=gate, erase=gate, decay=gate)


@pytest.mark.parametrize("erase", [False, True])
def test_a_decay_of_zero_is_exact(kernels, erase):
    inputs = make_inputs((1, 1, 70, 4, 3), (True, erase, True), torch.float64)
    inputs["decay"][:, :, [3, 4, 64]] = 0.0
    check_scan(kernels, (1, 1, 70, 4, 3), (True, erase, True), torch.float64, decay=inputs["decay"])


def test_the_same_input_gives_the_same_bits_in_any_order_of_threads(kernels):
    inputs = list(make_inputs((1, 2, 140, 36, 40), (True, True, True), torch.float32).values())
    results = []
    for seed in range(3):
        kernels.seed(seed)
        out, state, borders = kernels.scan(*inputs, True)
        results.append([out, state, borders, *kernels.scan_backward(out, state, *inputs, borders)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_every_size_of_head_finds_a_kernel_and_few_ask_for_more_than_48_kilobytes(kernels):
    for d_k, d_v, backward, streams in itertools.product(range(1, 513), (1, 20, 64, 512), (False, True), (1, 500)):
        launch = kernels.plan(Problem(dk=d_k, dv=d_v), streams, False, backward, 132)
        assert launch.columns and launch.shared_bytes <= 64 * 1024
        assert launch.shared_bytes <= 48 * 1024 or d_k > (384 if backward else 480)
        assert launch.tiles * launch.columns >= d_v > (launch.tiles - 1) * launch.columns


# --- Decoding ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_cpu(kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the tests of the decoding operators call these kernels."""
    monkeypatch.setattr(native, "step", kernels.step)
    monkeypatch.setattr(native, "read", kernels.read)


# The rules differ in scalars alone: all of them with one reading, and all readings with the rule that has most.
STEPS = [
    (rule, *reading)
    for rule in UNBOUNDED_RULES
    for reading in (test_decoding.READINGS if rule == "gated-delta" else test_decoding.READINGS[:2])
]


@pytest.mark.parametrize("rule, feature_map, normalization, normalized", STEPS)
def test_steps_in_any_order(on_cpu, rule, feature_map, normalization, normalized):
    test_decoding.test_steps_in_any_order_equal_plain_steps_of_gathered_memories(
        rule, feature_map, normalization, normalized, torch.float32, 1e-4
    )


@pytest.mark.parametrize("rule", UNBOUNDED_RULES)
@pytest.mark.parametrize("normalized", [False, True])
def test_steps_accumulate_in_double_for_doubles(on_cpu, rule, normalized):
    test_decoding.test_steps_in_any_order_equal_plain_steps_of_gathered_memories(
        rule, "dpfp", "sum", normalized, torch.float64, 1e-12
    )


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    d_key=st.integers(1, 7),
    d_v=st.integers(1, 70),
    rule=st.sampled_from(UNBOUNDED_RULES),
    normalized=st.booleans(),
    draw=st.data(),
)
def test_any_shape_orders_and_padding(kernels, rows, d_key, d_v, rule, normalized, draw):
    features = test_decoding.make_features("dpfp", "sum", d_key, nu=draw.draw(st.integers(1, 2 * d_key - 1)))
    hypotheses = test_decoding.Hypotheses(rule, features, rows, d_v, normalized, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "step", kernels.step)
        for _ in range(4):
            order = draw.draw(st.none() | st.lists(st.integers(0, rows - 1), min_size=1, max_size=rows))
            rows = rows if order is None else len(order)
            padding = draw.draw(st.none() | st.lists(st.booleans(), min_size=rows, max_size=rows))
            found, expected = hypotheses.step(
                None if order is None else torch.tensor(order), None if padding is None else torch.tensor(padding)
            )
            test_decoding.assert_close(found, expected, 1e-9)
            test_decoding.assert_close(hypotheses.rows(), hypotheses.exact, 1e-9)


@pytest.mark.parametrize(
    "order, places, goes_on",
    [
        ([1, 0], [2, 0], True),
        ([1, 2], [2, 0], False),
        ([1, -1], [2, 0], False),
        ([1, 0], [2, 3], False),
        ([3], None, False),
    ],
)
def test_an_order_that_points_nowhere_ends_the_kernel(kernels, order, places, goes_on):
    q, v, state = torch.randn(len(order), 2, 3), torch.randn(len(order), 2, 5), torch.randn(3, 2, 3, 5)
    order, places = (None if x is None else torch.tensor(x) for x in (order, places))
    features = native.AddressFeatures("none")

    def step() -> bool:
        kernels.step(q, q, v, None, None, None, state, None, order, places, features)
        return True

    assert in_child(step) == goes_on


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", UNBOUNDED_RULES)
def test_half_precision_steps(on_cpu, rule, dtype):
    test_decoding.test_half_precision_steps_keep_a_float32_memory(rule, dtype, TOLERANCE[dtype])


@test_decoding.readings
def test_reads(on_cpu, feature_map, normalization, normalized):
    test_decoding.test_rows_read_the_memory_they_share(feature_map, normalization, normalized)


@pytest.mark.parametrize("feature_map, normalization", test_decoding.MAPS)
def test_zero_and_extreme_vectors(on_cpu, feature_map, normalization):
    test_decoding.test_zero_and_extreme_vectors_stay_finite_and_equal_the_plain_features(feature_map, normalization)


@pytest.mark.parametrize("d_key, nu", [(64, 1), (50, 2), (64, 4), (5, 3)])
def test_steps_of_large_memories(on_cpu, d_key, nu):
    """Dk of 128, 200, 512 and 30: as many registers as each needs."""
    features = test_decoding.make_features("dpfp", "sum", d_key, nu)
    hypotheses = test_decoding.Hypotheses("gated-delta", features, 2, 70, True, torch.float32)
    for order in (None, [1, 1], [1, 0]):
        found, expected = hypotheses.step(None if order is None else torch.tensor(order))
        test_decoding.assert_close(found, expected, 1e-5)
        test_decoding.assert_close(hypotheses.rows(), hypotheses.exact, 1e-5)


def test_more_rows_than_threads_find_places(on_cpu):
    """Also fewer rows than places, and parents with hundreds of children."""
    features = test_decoding.make_features("elu", "sum", 2)
    hypotheses = test_decoding.Hypotheses("delta", features, 700, 3, False, torch.float32)
    generator = torch.Generator().manual_seed(2)
    rows = 700
    for more, parents in ((700, 700), (600, 30), (520, 1), (300, 520)):
        order = torch.randint(min(parents, rows), (more,), generator=generator)
        rows = more
        found, expected = hypotheses.step(order)
        test_decoding.assert_close(found, expected, 1e-5)
        test_decoding.assert_close(hypotheses.rows(), hypotheses.exact, 1e-5)
        assert hypotheses.places.unique().numel() == rows


# --- What these tests notice ------------------------------------------------------------------------------------------


def barriers() -> list[tuple[str, int]]:
    return [
        (path.name, number)
        for path in sorted(SOURCES.glob("*.cuh"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"__sync(threads|warp)\(\);", line)
    ]


@pytest.mark.parametrize("file, line", barriers())
def test_without_any_one_barrier_results_are_wrong(kernels, file, line):
    def right() -> bool:
        kernels.leave_out(file, line)
        return all(all_is_right(kernels, file, seed) for seed in range(4))

    assert not in_child(right), f"{file}, line {line}: nothing depends on this barrier"


def test_nothing_leaves_its_buffers_and_mistakes_are_noticed(tmp_path, compiled):
    """With the address sanitizer, which is a library that has to be there before Python is."""
    runtime = [
        subprocess.check_output(["g++", f"-print-file-name={n}"], text=True) for n in ("libasan.so", "libstdc++.so.6")
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LD_PRELOAD": " ".join(path.strip() for path in runtime),
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
    }
    script = ROOT / "tests" / "cuda_on_cpu" / "mistakes.py"
    run = subprocess.run(
        [sys.executable, script, compile_with_mistakes(tmp_path, compiled)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout + run.stderr
