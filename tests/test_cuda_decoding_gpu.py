"""The operators of decoding on a GPU: those of the processor's tests, moved there, and a captured graph."""

import pytest
import torch

pytest.importorskip("fairseq")  # of which the attention is made, whose features these tests compare with

import test_decoding
from registered import UNBOUNDED_RULES
from torch import Tensor

from fwp_fairseq.ops import native

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(not native.supports("cuda"), reason="the library was built without kernels for a GPU"),
]


@pytest.fixture
def plain_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the tests of the decoding operators, which compare with plain tensors on the processor, call those here."""
    step, read = native.step, native.read

    def moved(x):
        return (
            x._replace(projection=moved(x.projection))
            if hasattr(x, "_replace")
            else x.cuda()
            if torch.is_tensor(x)
            else x
        )

    def step_here(*arguments, **options):
        there = [moved(x) for x in arguments]
        out, places = step(*there, **options)
        for index in (6, 7):  # state and normalizer are updated in place
            if arguments[index] is not None:
                arguments[index].copy_(there[index])
        return out.cpu(), None if places is None else places.cpu()

    monkeypatch.setattr(native, "step", step_here)
    monkeypatch.setattr(native, "read", lambda *arguments: read(*(moved(x) for x in arguments)).cpu())


@pytest.mark.parametrize("rule", UNBOUNDED_RULES)
@test_decoding.readings
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_steps_in_any_order(plain_on_cpu, rule, feature_map, normalization, normalized, dtype, tolerance):
    test_decoding.test_steps_in_any_order_equal_plain_steps_of_gathered_memories(
        rule, feature_map, normalization, normalized, dtype, tolerance
    )


@pytest.mark.parametrize("rule", UNBOUNDED_RULES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_steps(plain_on_cpu, rule, dtype, tolerance):
    test_decoding.test_half_precision_steps_keep_a_float32_memory(rule, dtype, tolerance)


@pytest.mark.parametrize("rows", [257, 1000])
def test_more_rows_than_a_block_has_threads(plain_on_cpu, rows):
    features = test_decoding.make_features("dpfp", "sum", 6)
    hypotheses = test_decoding.Hypotheses("delta", features, rows, 5, True, torch.float32)
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        found, expected = hypotheses.step(torch.randint(rows, (rows,), generator=generator))
        test_decoding.assert_close(found, expected, 1e-4)
        test_decoding.assert_close(hypotheses.rows(), hypotheses.exact, 1e-4)


@test_decoding.readings
def test_reads(plain_on_cpu, feature_map, normalization, normalized):
    test_decoding.test_rows_read_the_memory_they_share(feature_map, normalization, normalized)


def test_a_step_is_captured_in_a_graph():
    def step(state: Tensor, places: Tensor) -> Tensor:
        features = native.AddressFeatures("dpfp", 1, "sum")
        out, moved = native.step(q, k, v, beta, beta, None, state, None, order, places, features)
        places.copy_(moved)
        return out

    generator = torch.Generator("cuda").manual_seed(1)
    q, k, v = (torch.randn(6, 2, 8, device="cuda", generator=generator) for _ in range(3))
    beta = torch.rand(6, 2, device="cuda", generator=generator)
    order = torch.tensor([1, 1, 0, 5, 5, 5], device="cuda")
    start = torch.randn(6, 2, 16, 8, device="cuda", generator=generator)

    state, places = start.clone(), torch.arange(6, device="cuda")
    expected = [step(state, places) for _ in range(4)]

    replayed, replayed_places = start.clone(), torch.arange(6, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(start.clone(), torch.arange(6, device="cuda"))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(replayed, replayed_places)
    for wanted in expected:
        graph.replay()
        assert torch.equal(out, wanted)
    assert torch.equal(replayed, state) and torch.equal(replayed_places, places)
