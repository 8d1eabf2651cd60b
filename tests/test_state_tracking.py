"""The state-tracking task: states are products of the moves, and its models can be built and trained."""

import itertools

import numpy as np
import pytest
import torch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

import fwp_fairseq.models  # noqa: F401  (registers the architectures)
from fwp_fairseq.tasks.state_tracking import GROUPS, StateTrackingConfig, StateTrackingTask, multiplication_table

SIZES = ["--decoder-layers", "1", "--decoder-embed-dim", "8", "--decoder-ffn-embed-dim", "16"]
SIZES += ["--decoder-attention-heads", "2", "--no-token-positional-embeddings"]


def make(**options) -> StateTrackingTask:
    return StateTrackingTask(StateTrackingConfig(**{"epoch_sequences": 30, "eval_sequences": 9, "seed": 1, **options}))


@pytest.mark.parametrize("group", GROUPS)
def test_the_tables_are_groups(group):
    table = multiplication_table(group)
    elements = range(len(table))
    assert all(table[0, a] == table[a, 0] == a for a in elements)
    assert all(table[table[a, b], c] == table[a, table[b, c]] for a, b, c in itertools.product(elements, repeat=3))
    assert all(sorted(row) == list(elements) for row in [*table, *table.T])
    assert len(table) == {"parity": 2, "s3": 6}[group] and (table == table.T).all() == (group == "parity")


@pytest.mark.parametrize("group", GROUPS)
def test_targets_are_products_of_all_moves_so_far(group):
    task = make(group=group, longest=12)
    task.load_dataset("train")
    dataset, special, table = task.dataset("train"), task.dictionary.nspecial, multiplication_table(group)
    assert len({len(moves) for moves, _ in map(dataset.__getitem__, range(30))}) > 5
    for moves, states in map(dataset.__getitem__, range(30)):
        state = 0
        for move, expected in zip(moves - special, states - special):
            state = table[state, move]
            assert state == expected
    if group == "parity":
        assert torch.equal((moves - special).cumsum(0) % 2, states - special)


def test_splits_have_their_lengths_and_sequences_of_their_own():
    task = make(longest=5)
    for split, length in {"valid": 5, "test": 5, "length_9": 9}.items():
        task.load_dataset(split)
        assert set(task.dataset(split).sizes) == {length} and len(task.dataset(split)) == 9
    first = task.dataset("valid")[0][0]
    assert any(not torch.equal(task.dataset("valid")[i][0], task.dataset("test")[i][0]) for i in range(9))
    task.dataset("valid").set_epoch(2)
    others = [task.dataset("valid")[i][0] for i in range(9)]
    assert any(not torch.equal(first, other) for other in others)
    again = make(longest=5)
    again.load_dataset("valid")
    assert torch.equal(again.dataset("valid")[0][0], first)
    batch = task.dataset("valid").collater([task.dataset("valid")[i] for i in (0, 1)])
    assert batch["net_input"]["src_tokens"].shape == batch["target"].shape == (2, 5) and batch["ntokens"] == 10
    assert task.dataset("valid").num_tokens_vec(np.array([0, 1])).tolist() == [5, 5]


@pytest.mark.parametrize(
    "options, split, message",
    [
        ({"longest": 0}, "train", "--longest is 0, it must be at least 1"),
        ({"group": "s4"}, "train", "--group is s4, allowed are parity, s3"),
        ({}, "length_0", "length_0 is no split of state_tracking"),
        ({}, "length_5000", "length_5000 is longer than --tokens-per-sample 1024"),
    ],
)
def test_what_cannot_be_is_refused(options, split, message):
    with pytest.raises(ValueError, match=message):
        make(**options).load_dataset(split)


def test_a_language_model_learns_from_it():
    args = parse_without_data(
        *SIZES, "--no-token-positional-embeddings", "--longest", "4", "--write-strength-range", "2"
    )
    cfg = convert_namespace_to_omegaconf(args)
    torch.manual_seed(0)
    task = StateTrackingTask(cfg.task)
    model = task.build_model(cfg.model).train()
    task.load_dataset("train")
    dataset = task.dataset("train")
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.02), []
    for _ in range(40):
        batch = dataset.collater([dataset[i] for i in range(30)])
        log_p = model(**batch["net_input"])[0].log_softmax(-1)
        loss = torch.nn.functional.nll_loss(log_p.flatten(0, 1), batch["target"].flatten(), ignore_index=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


def parse_without_data(*flags: str):
    command = ["--task", "state_tracking", "--arch", "fwp_transformer_lm", *flags]
    return options.parse_args_and_arch(options.get_training_parser(), command)
