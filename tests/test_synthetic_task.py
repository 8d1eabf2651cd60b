"""The synthetic retrieval task: its data, model, criterion and schedule, and their training with fairseq-train."""

import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, backends
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import fwp_fairseq.tasks  # noqa: F401  (registers task, criterion and schedule)
from fwp_fairseq.criterions.half_squared_error import HalfSquaredError
from fwp_fairseq.models.associative_memory import AssociativeMemory, AssociativeMemoryConfig
from fwp_fairseq.optim.until_solved import UntilSolved, UntilSolvedConfig
from fwp_fairseq.tasks.associative_retrieval import (
    NO_ANSWER,
    AssociativeRetrievalConfig,
    AssociativeRetrievalTask,
    RetrievalDataset,
)

# --- Data ------------------------------------------------------------------------------------------------------------


@st.composite
def datasets(draw: Any) -> RetrievalDataset:
    num_keys = draw(st.integers(1, 12))
    with_replacement = draw(st.booleans())
    return RetrievalDataset(
        draw(st.integers(1, 6)),
        draw(st.integers(1, 3 * num_keys if with_replacement else num_keys)),
        num_keys,
        with_replacement,
        seed=(draw(st.integers(0, 1000)), 0),
        max_queries=draw(st.none() | st.integers(1, 15)),
    )


@given(datasets())
@settings(max_examples=100, deadline=None)
def test_the_answer_is_the_value_that_came_last_with_the_key(dataset: RetrievalDataset) -> None:
    for example in range(len(dataset)):
        keys, values, queries, targets = (part.tolist() for part in dataset[example])
        assert len(keys) == len(values) == dataset.length
        latest = dict(zip(keys, values))
        assert [latest.get(query, NO_ANSWER) for query in queries] == targets
        assert all(0 <= symbol < dataset.num_keys for symbol in (*keys, *values, *queries))


@given(datasets())
@settings(max_examples=100, deadline=None)
def test_training_asks_for_one_key_and_evaluation_for_every_key_that_is_there(dataset: RetrievalDataset) -> None:
    for example in range(len(dataset)):
        keys, _, queries, targets = (part.tolist() for part in dataset[example])
        if dataset.max_queries is None:
            assert len(queries) == 1 and queries[0] in keys
        else:
            asked = [query for query, target in zip(queries, targets) if target != NO_ANSWER]
            assert asked == sorted(set(keys))[: dataset.max_queries]
            assert len(queries) == len(set(queries))


@given(datasets())
@settings(max_examples=50, deadline=None)
def test_without_replacement_no_symbol_comes_twice(dataset: RetrievalDataset) -> None:
    for example in range(len(dataset)):
        for symbols in dataset[example][:2]:
            assert dataset.with_replacement or len(set(symbols.tolist())) == dataset.length


def parts(dataset: RetrievalDataset) -> list[list[int]]:
    return [part.tolist() for example in range(len(dataset)) for part in dataset[example]]


def test_sequences_depend_on_seed_split_and_epoch_and_on_nothing_else() -> None:
    def drawn(seed: int, split: str, epoch: int) -> list[list[int]]:
        task = AssociativeRetrievalTask(AssociativeRetrievalConfig(num_keys=9, epoch_sequences=5, seed=seed))
        np.random.seed(epoch)
        task.load_dataset(split)
        task.dataset(split).set_epoch(3)
        task.dataset(split).set_epoch(epoch)
        return parts(task.dataset(split))

    base = drawn(1, "train", 1)
    assert drawn(1, "train", 1) == base
    assert base not in (drawn(2, "train", 1), drawn(1, "train", 2))
    assert drawn(1, "valid", 1)[0] != base[0]


@pytest.mark.parametrize(("with_replacement", "length"), [(False, 7), (True, 14)])
def test_default_lengths_are_those_of_the_paper_and_of_the_authors_evaluation(
    with_replacement: bool, length: int
) -> None:
    task = AssociativeRetrievalTask(AssociativeRetrievalConfig(num_keys=7, with_replacement=with_replacement, seed=1))
    for split in ("train", "valid"):
        task.load_dataset(split)
    assert task.dataset("train").length == length
    assert task.dataset("valid").length == 7
    assert len(task.dataset("train")) == 3200 and len(task.dataset("valid")) == 20


def test_all_keys_and_positions_are_asked_for_alike() -> None:
    dataset = RetrievalDataset(20_000, 5, 5, False, seed=(1,))
    keys, _, queries, _ = dataset._examples
    for counts in (queries.flatten().bincount(), (keys == queries).int().argmax(dim=1).bincount()):
        assert counts.float().sub(4000).abs().max() < 5 * (20_000 * 0.2 * 0.8) ** 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_keys": 0}, ["--num-keys is 0", "at least 1"]),
        ({"eval_queries": 0}, ["--eval-queries is 0", "at least 1"]),
        ({"sequence_length": 21}, ["--sequence-length is 21", "1 to 20"]),
        ({"eval_sequence_length": 0, "with_replacement": True}, ["--eval-sequence-length is 0", "at least 1"]),
    ],
)
def test_wrong_options_of_the_task_are_named(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        AssociativeRetrievalTask(AssociativeRetrievalConfig(**options))
    assert all(word in str(error.value) for word in words)


# --- Model -----------------------------------------------------------------------------------------------------------


def sample(with_replacement: bool, max_queries: Any, num_keys: int = 6, seed: int = 1) -> dict[str, Any]:
    dataset = RetrievalDataset(
        4, 2 * num_keys if with_replacement else num_keys, num_keys, with_replacement, seed=(seed,),
        max_queries=max_queries,
    )  # fmt: skip
    return dataset.collater([dataset[i] for i in range(4)])


def answers_of_the_paper(model: AssociativeMemory, batch: dict[str, Tensor], attention: str, rule: str) -> Tensor:
    """The equations of sec. 3 and 6.1, pair by pair and query by query, on the parameters of a model."""
    answers = []
    size, d = model.num_keys, model.key.out_features
    for keys, values, queries in zip(batch["keys"], batch["values"], batch["queries"]):
        one_hot = torch.eye(size, dtype=model.key.weight.dtype)[values]
        x = torch.cat([one_hot, model.embedding(keys)], dim=1)
        k, q = model.key(x), model.query(model.embedding(queries))
        if attention == "softmax":
            answers.append((q @ k.T / d**0.5).softmax(dim=1) @ one_hot)
            continue
        phi = features_of_the_paper(model, rule)
        k, q = phi(k), phi(q)
        W, z = torch.zeros(size, k.size(1), dtype=k.dtype), torch.zeros(k.size(1), dtype=k.dtype)
        if rule == "delta":
            k, q = k / k.sum(dim=1, keepdim=True), q / q.sum(dim=1, keepdim=True)
        for i in range(len(keys)):
            if rule == "sum":
                W, z = W + torch.outer(one_hot[i], k[i]), z + k[i]
                continue
            beta, old = torch.sigmoid(model.strength(x[i])), W @ k[i]
            new = beta * one_hot[i] + (1 - beta) * old
            W = W - torch.outer(old, k[i]) + torch.outer(new, k[i])
            if rule == "fwm":
                W = W / max(1.0, W.detach().norm())
        read = q @ W.T
        if rule == "sum":
            read = read / (q @ z)[:, None]
        answers.append(F.layer_norm(read, [size]) if rule == "fwm" else read)
    return torch.stack(answers)


def features_of_the_paper(model: AssociativeMemory, rule: str) -> Any:
    features = model.features
    assert features is not None

    def dpfp(x: Tensor) -> Tensor:
        u = torch.cat([x, -x], dim=-1).relu()
        return torch.cat([u * u.roll(j, -1) for j in range(1, features.choices["dpfp_nu"] + 1)], dim=-1)

    def favor(x: Tensor) -> Tensor:
        r = features.projection.to(x)
        scale = torch.exp(-x.square().sum(dim=-1, keepdim=True) / 2) / (2 * len(r)) ** 0.5
        return scale * torch.cat([torch.exp(x @ r.T), torch.exp(-x @ r.T)], dim=-1)

    return {"dpfp": dpfp, "favor": favor, "elu": lambda x: F.elu(x) + 1, "tanh": torch.tanh}[features.feature_map]


MODELS = [
    ("softmax", "sum", "elu"),
    *(("fast-weight", rule, feature_map) for rule in ("sum", "delta", "fwm") for feature_map in ("elu", "dpfp")),
    ("fast-weight", "sum", "favor"),
    ("fast-weight", "delta", "favor"),
    ("fast-weight", "fwm", "tanh"),
]


@pytest.mark.parametrize(("attention", "rule", "feature_map"), MODELS)
@pytest.mark.parametrize("max_queries", [None, 6])
def test_the_model_is_the_papers(attention: str, rule: str, feature_map: str, max_queries: Any) -> None:
    torch.manual_seed(1)
    cfg = AssociativeMemoryConfig(
        attention=attention, update_rule=rule, feature_map=feature_map, key_size=5, dpfp_nu=2, favor_features=7
    )
    model = AssociativeMemory(cfg, 6).double().eval()
    batch = sample(rule != "sum", max_queries)["net_input"]
    torch.testing.assert_close(model(**batch), answers_of_the_paper(model, batch, attention, rule))


@backends()
def test_a_single_query_reads_the_same_as_one_among_others(backend: str) -> None:
    batch = sample(False, 6)["net_input"]
    for rule in ("sum", "delta"):
        model = AssociativeMemory(AssociativeMemoryConfig(update_rule=rule, fast_weight_backend=backend), 6).eval()
        together = model(**batch)
        apart = [model(**{**batch, "queries": batch["queries"][:, i : i + 1]}) for i in range(6)]
        torch.testing.assert_close(torch.cat(apart, dim=1), together, atol=1e-6, rtol=1e-5)


def test_sizes_and_ranges_of_the_parameters_are_the_papers() -> None:
    model = AssociativeMemory(AssociativeMemoryConfig(), 20)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        "embedding.weight": (20, 44),
        "key.weight": (64, 64),
        "key.bias": (64,),
        "query.weight": (64, 44),
        "query.bias": (64,),
        "strength.weight": (1, 64),
        "strength.bias": (1,),
    }
    assert 0.12 < model.key.weight.abs().max() <= 0.125
    softmax = AssociativeMemory(AssociativeMemoryConfig(attention="softmax"), 20)
    assert 0.2 < softmax.key.weight.abs().max() <= (6 / 128) ** 0.5


def test_favor_draws_for_every_batch_in_training_and_stays_in_evaluation() -> None:
    model = AssociativeMemory(AssociativeMemoryConfig(feature_map="favor", favor_features=4), 6)
    batch = sample(True, 6)["net_input"]
    assert not torch.equal(model(**batch), model(**batch))
    model.eval()
    assert torch.equal(model(**batch), model(**batch))


def test_favor_draws_for_every_evaluation_sequence_where_that_is_asked_for() -> None:
    config = AssociativeMemoryConfig(feature_map="favor", favor_features=4, favor_redraw_in_evaluation=True)
    model = AssociativeMemory(config, 6).eval()
    # The same sequence twice.
    batch = {name: tensor[:1].repeat(2, 1) for name, tensor in sample(True, 6)["net_input"].items()}
    torch.manual_seed(1)
    both = model(**batch)
    assert not torch.equal(both[0], both[1])
    torch.manual_seed(1)
    assert torch.equal(model(**{name: tensor[:1] for name, tensor in batch.items()}), both[:1])


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e3])
@pytest.mark.parametrize(("attention", "rule", "feature_map"), MODELS)
def test_keys_of_any_size_give_neither_nan_nor_infinite_gradients(
    attention: str, rule: str, feature_map: str, scale: float
) -> None:
    torch.manual_seed(1)
    model = AssociativeMemory(
        AssociativeMemoryConfig(attention=attention, update_rule=rule, feature_map=feature_map), 6
    )
    nn.init.normal_(model.embedding.weight, std=scale)
    for max_queries in (None, 6):
        loss, _, _ = HalfSquaredError(None)(model, sample(True, max_queries))
        model.zero_grad()
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"feature_map": "tanh"}, ["--feature-map tanh", "--update-rule delta", "elu, favor, dpfp"]),
        ({"dpfp_nu": 128}, ["--dpfp-nu is 128", "127"]),
        ({"favor_redraw_in_evaluation": True}, ["--favor-redraw-in-evaluation", "dpfp"]),
        ({"feature_map": "favor", "favor_features": 0}, ["--favor-features is 0", "at least 1"]),
        ({"key_size": 0}, ["--key-size is 0", "at least 1"]),
        ({"update_rule": "gated"}, ["--update-rule is gated", "sum, delta, fwm"]),
        ({"update_rule": "fwm", "fast_weight_backend": "native"}, ["--fast-weight-backend", "fwm", "chunk"]),
    ],
)
def test_wrong_options_of_the_model_are_named(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        AssociativeMemory(AssociativeMemoryConfig(**options), 20)
    assert all(word in str(error.value) for word in words)


# --- Criterion and schedule ------------------------------------------------------------------------------------------


def test_the_loss_is_half_the_squared_distance_summed_over_queries_that_have_an_answer() -> None:
    out = torch.tensor([[[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]], [[0.0, 0.0, 2.0], [9.0, 9.0, 9.0]]], requires_grad=True)
    batch = {"net_input": {}, "target": torch.tensor([[0, 1], [0, NO_ANSWER]]), "nsentences": 2, "ntokens": 8}
    loss, count, log = HalfSquaredError(None)(lambda: out, batch)
    assert (loss.item(), count) == (0.25 + 0 + 2.5, 3)
    loss.backward()
    assert out.grad is not None
    assert out.grad.tolist() == [[[-0.5, 0.5, 0.0], [0.0, 0.0, 0.0]], [[-1.0, 0.0, 2.0], [0.0, 0.0, 0.0]]]
    assert log["loss"].item() == loss.item()


def test_the_learning_rate_is_zero_once_the_loss_is_reached() -> None:
    optimizer = SimpleNamespace(rate=None)
    optimizer.set_lr, optimizer.get_lr = lambda rate: setattr(optimizer, "rate", rate), lambda: optimizer.rate
    schedule = object.__new__(UntilSolved)
    schedule.cfg, schedule.optimizer, schedule.solved = UntilSolvedConfig(target_loss=0.1, lr=[0.5]), optimizer, False
    rates = [schedule.step(epoch, loss) for epoch, loss in enumerate([None, 0.2, float("nan"), 0.1, 0.2], start=1)]
    assert rates == [0.5, 0.5, 0.5, 0.0, 0.0]
    assert schedule.state_dict() == {"solved": True}


# --- fairseq-train ---------------------------------------------------------------------------------------------------

TRAIN = (
    *("--user-dir", "fwp_fairseq", "--cpu", "--task", "associative_retrieval", "--arch", "associative_memory"),
    *("--criterion", "half_squared_error", "--optimizer", "adam", "--lr", 1e-3, "--lr-scheduler", "until_solved"),
    *("--stop-min-lr", 0, "--patience", 11, "--batch-size", 32, "--num-workers", 0, "--log-format", "json"),
    *("--log-interval", 1, "--num-keys", 8, "--with-replacement", "--epoch-sequences", 320),
)


def losses(result: subprocess.CompletedProcess[str], kind: str, name: str) -> dict[int, float]:
    records = [json.loads(text) for text in re.findall(rf"\| {kind} \| (\{{.*\}})$", result.stdout, re.M)]
    steps = "valid_num_updates" if kind == "valid" else "num_updates"
    return {int(record[steps]): float(record[name]) for record in records}


def test_a_training_resumes_where_it_was_and_ends_when_the_loss_is_reached(
    run: Run, side_by_side: Any, tmp_path: Path
) -> None:
    save = ("--save-dir", tmp_path, "--no-epoch-checkpoints")
    first, whole = side_by_side(
        lambda: run("fairseq-train", *TRAIN, *save, "--max-update", 20),
        lambda: run("fairseq-train", *TRAIN, "--no-save", "--target-loss", 0.3),
    )
    rest = run("fairseq-train", *TRAIN, *save, "--target-loss", 0.3)
    for kind, name in ("train_inner", "loss"), ("valid", "valid_loss"):
        expected = losses(whole, kind, name)
        assert losses(first, kind, name) | losses(rest, kind, name) == pytest.approx(expected, rel=1e-5)
    valid = losses(whole, "valid", "valid_loss")
    *earlier, last = valid.values()
    assert last <= 0.3 < min(earlier)
    assert set(valid) == set(range(10, 10 * len(valid) + 1, 10))
    assert "done training" in whole.stdout
