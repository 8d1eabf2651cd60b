"""Steps captured in CUDA graphs: what test_captured_step.py says of a stand-in, and what only a GPU has.

Skipped without a GPU, and without fairseq.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("fairseq")
import test_captured_step as on_cpu  # noqa: E402
from test_captured_step import MODELS, ORDERS, assert_same, loop, search, sources, translation, without_graphs  # noqa: E402

from fwp_fairseq.models import captured_step  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
captured = pytest.mark.parametrize("flags", MODELS.values(), ids=MODELS)
typical = pytest.mark.parametrize("flags", [MODELS[name] for name in ("decoder", "all places", "stages")])


@pytest.fixture
def graphs(monkeypatch):
    """Models are on the GPU, and it is counted how often steps are captured and replayed."""

    class Counted(captured_step.Graph):
        captures = replayed = 0

        def __init__(self, *args):
            Counted.captures += 1
            super().__init__(*args)

        def replay(self):
            Counted.replayed += 1
            super().replay()

    monkeypatch.setattr(captured_step, "Graph", Counted)
    monkeypatch.setattr(on_cpu, "DEVICE", "cuda")
    monkeypatch.setattr(on_cpu, "TOLERANCE", 1e-4)
    return Counted


@captured
@pytest.mark.parametrize("beam", [1, 5])
def test_beam_search_finds_the_same(flags, beam, graphs):
    on_cpu.test_beam_search_finds_the_same(flags, beam, graphs)


@typical
@pytest.mark.parametrize("orders", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float16, 2e-2)])
def test_logits_are_the_same_whatever_rows_do(flags, orders, dtype, tolerance, graphs, monkeypatch):
    monkeypatch.setattr(on_cpu, "DTYPE", dtype)
    monkeypatch.setattr(on_cpu, "TOLERANCE", tolerance)
    on_cpu.test_logits_are_the_same_whatever_rows_do(flags, orders, 0, graphs, monkeypatch)


@pytest.mark.parametrize("read_ahead", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_language_model_continues_its_prompt_as_before(adaptive, read_ahead, graphs):
    flags = ["--adaptive-input", "--adaptive-input-cutoff", "8,14", "--adaptive-input-factor", "1"] * adaptive
    flags += ["--adaptive-softmax-cutoff", "8,14", "--adaptive-softmax-factor", "1"] * adaptive
    on_cpu.test_a_language_model_continues_its_prompt_as_before(flags, read_ahead, graphs)


@pytest.mark.parametrize(
    "test",
    [
        on_cpu.test_a_batch_that_shrinks_is_replayed_with_fewer_rows_and_captured_anew_for_half,
        lambda graphs, monkeypatch: on_cpu.test_searches_in_turn_do_not_meet(MODELS["all places"], graphs),
        lambda graphs, monkeypatch: on_cpu.test_attention_is_that_of_the_token(MODELS["all places"], graphs),
        lambda graphs, monkeypatch: on_cpu.test_a_copy_of_a_search_goes_on_as_the_search_does([], graphs),
        lambda graphs, monkeypatch: on_cpu.test_the_next_search_has_the_weights_that_there_are_then(graphs),
        lambda graphs, monkeypatch: on_cpu.test_padding_among_the_tokens_leaves_the_memory_as_it_is([], graphs),
        lambda graphs, monkeypatch: on_cpu.test_words_are_drawn_as_before(graphs),
        on_cpu.test_nothing_of_a_step_outlives_its_search,
    ],
    ids=["shrinks", "in turn", "attention", "copy", "weights", "padding", "drawn", "outlives"],
)
def test_as_on_a_processor(test, graphs, monkeypatch):
    test(graphs, monkeypatch)


def test_memory_goes_with_the_search(graphs):
    """What graphs have beside it is kept for the next one, and does not grow."""
    model = translation(["--decoder-embed-dim", "256", "--decoder-ffn-embed-dim", "1024", *MODELS["all places"]])
    batch = sources(model, 8)
    used = []
    for _ in range(12):
        search(model, batch)
        torch.cuda.synchronize()
        used.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert graphs.captures == 12 and used[2] == used[-1], used


def test_threads_and_streams_of_their_own_find_what_one_finds(graphs):
    model = translation(MODELS["all places"])
    batches = [sources(model, count) for count in (2, 3, 4, 5)] * 3
    expected = [without_graphs(search, model, batch) for batch in batches]
    torch.cuda.synchronize()

    def on_a_stream(batch):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found = search(model, batch)
        stream.synchronize()
        return found

    for searching in (lambda batch: search(model, batch), on_a_stream):
        with ThreadPoolExecutor(4) as pool:
            for found, alone in zip(pool.map(searching, batches), expected):
                assert_same(found, alone)
    assert graphs.replayed > 24


def test_a_search_that_changes_its_stream_goes_on_without_a_graph(graphs):
    model = translation([])
    other = torch.cuda.Stream()

    def before(token, words, state):
        if token == 3:
            torch.cuda.synchronize()
            torch.cuda.set_stream(other)

    here = torch.cuda.current_stream()
    try:
        expected = without_graphs(loop, model, ORDERS["beams move"])
        found = loop(model, ORDERS["beams move"], before)
        torch.cuda.synchronize()
    finally:
        torch.cuda.set_stream(here)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert graphs.replayed == 1


def test_what_cannot_be_captured_after_all_is_decoded_without_and_disturbs_nothing_later(graphs, caplog):
    """The last one: should it leave a mark on this process, then not on the other tests."""
    on_cpu.test_what_cannot_be_captured_after_all_is_said_and_decoded_without(graphs, caplog)
    on_cpu.test_words_are_drawn_as_before(graphs)
