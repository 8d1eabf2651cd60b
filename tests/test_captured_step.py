"""A decoder's step that is captured and replayed gives what the step gives, in searches and in loops of one's own.

There is no GPU here. What stands for a graph is as strict as one: capturing changes nothing, replaying runs the same
operators on the same tensors, without any Python, and what would ask the device is an error while it is captured.
"""

import argparse
import gc
import math
import unittest.mock
import weakref
from contextlib import contextmanager

import pytest
import torch
from conftest import needs_native
from fairseq.sequence_generator import SequenceGenerator
from tiny_models import PLACES, build_lm, build_translation, places, tokens, translation_batch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from fwp_fairseq.models import captured_step

ASKING = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "lift_fresh", "unique")


class Recorder(TorchDispatchMode):
    """Notes what is called, and what tensors that were there before are to be again."""

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.made = [], [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.__name__.partition(".")[0] in ASKING:
            raise RuntimeError(f"{function} asks the device")
        kwargs = kwargs or {}
        aliases = [argument.alias_info for argument in function._schema.arguments]
        for alias, x in zip(aliases, args):
            if alias is not None and alias.is_write and x is not None and x.untyped_storage()._cdata not in self.made:
                self.before.append((x, x.clone()))
        result = function(*args, **kwargs)
        outputs = [x for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor)]
        views = any(x.alias_info is not None for x in function._schema.returns)
        if not views:
            self.made.update((x.untyped_storage()._cdata, x) for x in outputs)
        written = any(alias is not None and alias.is_write for alias in aliases)
        if written or not views:
            self.calls.append((function, args, kwargs, [] if views else outputs))
        return result


class RecordedGraph:
    """Stands for captured_step.Graph."""

    captures = 0

    def __init__(self, device):
        self.replays = 0

    @contextmanager
    def aside(self):
        yield

    def capture(self, function):
        RecordedGraph.captures += 1
        recorder = Recorder()
        with recorder:
            function()
        self.calls, self.made = recorder.calls, recorder.made
        for x, before in reversed(recorder.before):
            x.copy_(before)

    def is_here(self):
        return True

    def replay(self):
        RecordedGraph.replayed += 1
        for function, args, kwargs, outputs in self.calls:
            for x, new in zip(outputs, tree_flatten(function(*args, **kwargs))[0]):
                x.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """Steps are captured, and the class counts how often, and how many are replayed."""
    monkeypatch.setattr(captured_step, "_is_on_gpu", lambda x: True)
    monkeypatch.setattr(captured_step, "Graph", RecordedGraph)
    RecordedGraph.captures = RecordedGraph.replayed = 0
    return RecordedGraph


def sharpened(model, beam=5):
    """Random, but with predictions far from uniform, so that hypotheses differ, and prepared for generation."""
    with torch.no_grad():
        model.decoder.output_projection.weight.mul_(4)
    model.eval().prepare_for_inference_(argparse.Namespace(generation=argparse.Namespace(beam=beam)))
    return model


def search(model, batch, beam=5, max_len=12):
    generator = SequenceGenerator(
        [model], model.decoder.dictionary, beam_size=beam, max_len_b=max_len, unk_penalty=math.inf
    )
    net_input = {key: batch[key] for key in ("src_tokens", "src_lengths") if key in batch}
    return generator.generate([model], {"net_input": net_input})


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert [h["tokens"].tolist() for h in ours] == [h["tokens"].tolist() for h in theirs]
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a["positional_scores"], b["positional_scores"], rtol=0, atol=1e-5)
            torch.testing.assert_close(a["attention"], b["attention"], rtol=0, atol=1e-5)


def without_graphs(function, *args, **kwargs):
    with unittest.mock.patch.dict("os.environ", {captured_step.SWITCH: "0"}):
        return function(*args, **kwargs)


MODELS = {
    "decoder": [],
    "all places": places("fast-weight", *PLACES),
    "attention normalisation": [*places("fast-weight", *PLACES), "--update-rule", "sum", "--feature-map", "elu"]
    + ["--attention-normalization"],
    "stages": [*places("fast-weight", *PLACES), "--short-convolution", "3", "--output-gate", "--read-layer-norm"],
    "gated delta": ["--update-rule", "gated-delta", "--decoder-learned-pos"],
    "favor": ["--feature-map", "favor", "--favor-features", "4"],
    "fwm": ["--update-rule", "fwm", "--feature-map", "tanh", "--key-normalization", "none"],
    "chunk": ["--fast-weight-backend", "chunk", *places("fast-weight", *PLACES)],
    "no positions": ["--no-token-positional-embeddings", "--decoder-normalize-before"],
    "other widths": ["--decoder-embed-dim", "16", "--decoder-input-dim", "12", "--decoder-output-dim", "12"],
}


@pytest.mark.parametrize("flags", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("beam", [1, 5])
def test_beam_search_finds_the_same(flags, beam, graphs):
    torch.manual_seed(3)
    model = sharpened(build_translation("--decoder-layers", "2", *flags), beam)
    batch = translation_batch(model, batch=4, source=9)
    expected = without_graphs(search, model, batch, beam)
    assert not graphs.captures
    found = search(model, batch, beam)
    assert graphs.captures == 1 and graphs.replayed > 4
    assert_same(found, expected)
