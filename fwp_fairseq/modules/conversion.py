"""Softmax attention made into fast weights (Kasai et al. 2021, "Finetuning Pretrained Transformers into RNNs").

Both project queries, keys, values and outputs in the same way, so that a model with fast weights can begin with all
that one with softmax has learned.
"""

import copy
import itertools
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from fairseq import utils
from fairseq.modules import MultiheadAttention
from torch import Tensor
from torch.nn import functional as F

from fwp_fairseq.modules.fast_weight_attention import FastWeightAttention

logger = logging.getLogger(__name__)

# With which attention begins to learn what softmax attention gives; a learned feature map has further to go.
_LEARNING_RATE = 5e-3
_LEARNING_RATE_OF_FEATURES = 2e-2


def check_shapes(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise ValueError for the first parameter of a checkpoint that has another shape than that of a model."""
    for name, parameter in own.items():
        if name in given and given[name].shape != parameter.shape:
            raise ValueError(
                f"{name} has the shape {tuple(given[name].shape)} in the checkpoint and {tuple(parameter.shape)} in "
                "this model: give it the flags and the dictionaries of its training."
            )


def convert(parameters: dict[str, Tensor], checkpoint: str, places: Collection[str], trainer: Any) -> None:
    """Make of the ``parameters`` of a ``checkpoint`` with softmax attention in ``places`` those of a trainer's model.

    They are completed in place. What fast-weight attention does not have is left out, and what it has besides is as it
    is in the model; a table in the log says what. Then all of the attention learns what softmax attention gives, for
    --conversion-updates. Raises ValueError if the checkpoint differs from the model in anything else.
    """
    model = trainer.get_model()
    model.upgrade_state_dict(parameters)
    own = model.state_dict()
    check_shapes(parameters, own)
    attentions = {name: module for name, module in model.named_modules() if isinstance(module, FastWeightAttention)}
    table: dict[str, dict[str, list[str]]] = {}
    for name in {**own, **parameters}:
        fate = "left out" if name not in own else "taken" if name in parameters else "new"
        module = next((module for module in attentions if name.startswith(f"{module}.")), None)
        if module is not None:
            row, part = re.sub(r"\d+", "*", module), name[len(module) + 1 :].removesuffix(".weight")
            table.setdefault(row, {}).setdefault(fate, []).append(part)
        elif fate != "taken":
            raise ValueError(
                f"{checkpoint} cannot be converted, since only {'this model' if fate == 'new' else 'it'} has {name}: "
                "give this model the flags of its training."
            )
    teachers = {
        name: _softmax_attention(attention, _part(parameters, name))
        for name, attention in attentions.items()
        if attention.place in places
    }
    for name in own.keys() - parameters.keys():
        parameters[name] = own[name].cpu()
    for name in parameters.keys() - own.keys():
        del parameters[name]
    fates = "taken", "new", "left out"
    rows = [[row, *(", ".join(dict.fromkeys(parts.get(fate, "-"))) for fate in fates)] for row, parts in table.items()]
    rows = [["attention", *fates], *rows, ["all else", "all", "-", "-"]]
    logger.info("%s is converted:\n%s", checkpoint, "\n".join(f"| {' | '.join(row)} |" for row in rows))
    updates = trainer.cfg.model.conversion_updates
    if updates:
        model.load_state_dict(parameters)
        learn(model, teachers, _batches(trainer, updates), updates)
        for name in teachers:
            learned = model.get_submodule(name).state_dict()
            parameters.update({f"{name}.{part}": x.cpu() for part, x in learned.items()})


def learn(model: Any, teachers: Mapping[str, Any], batches: Iterator[Any], updates: int) -> None:
    """Let attention of a model, by name, give what its teacher gives, as far as it can (Zhang et al. 2024, "LoLCATs").

    Each learns by itself, of the inputs that it has where all of the teachers are in its place.
    """
    training = model.training
    model.eval()
    pupils = {name: _Pupil(model.get_submodule(name), teacher, updates) for name, teacher in teachers.items()}
    with ExitStack() as stack, torch.no_grad():
        for name, pupil in pupils.items():
            attention = model.get_submodule(name)
            attention.forward = pupil
            stack.callback(delattr, attention, "forward")
        for batch in batches:
            model(**batch["net_input"])
    for name, pupil in pupils.items():
        # What begins as its teacher has nothing to learn, and steps that only lead away from it.
        if pupil.errors[-1] <= pupil.errors[0]:
            model.get_submodule(name).load_state_dict(pupil.attention.state_dict())
    model.train(training)
    errors = [f"{name} {pupil.errors[0]:.2f} -> {pupil.errors[-1]:.2f}" for name, pupil in pupils.items()]
    logger.info("of the mean square of what softmax attention gives, this misses: %s", ", ".join(errors))


class _Pupil:
    """Stands for the forward pass of attention: gives what its teacher gives, and learns to do so itself."""

    def __init__(self, attention: FastWeightAttention, teacher: MultiheadAttention, updates: int) -> None:
        self.attention = copy.deepcopy(attention).float()
        self.teacher = teacher
        self.errors: list[float] = []
        features = list(self.attention.features.parameters())
        others = [parameter for name, parameter in self.attention.named_parameters() if "features." not in name]
        groups: list[dict[str, Any]] = [{"params": others}, {"params": features, "lr": _LEARNING_RATE_OF_FEATURES}]
        self.optimizer = torch.optim.Adam(groups, _LEARNING_RATE)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, updates)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Any = None, attn_mask: Any = None, **_: Any
    ) -> tuple[Tensor, None]:
        inputs = query.float(), key.float(), value.float(), key_padding_mask
        if attn_mask is None and self.attention.causal:
            attn_mask = torch.ones(query.size(0), key.size(0), dtype=torch.bool, device=query.device).triu(1)
        expected, _ = self.teacher(*inputs, attn_mask=attn_mask, need_weights=False)
        with torch.enable_grad():
            found, _ = self.attention(*inputs)
            error = F.mse_loss(found, expected)
            self.optimizer.zero_grad()
            error.backward()
        self.optimizer.step()
        self.schedule.step()
        self.errors.append(float(error / expected.square().mean()))
        return expected.to(query.dtype), None


def _part(parameters: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    return {name[len(module) + 1 :]: x for name, x in parameters.items() if name.startswith(f"{module}.")}


def _softmax_attention(attention: FastWeightAttention, parameters: Mapping[str, Tensor]) -> MultiheadAttention:
    cross = attention.encoder_decoder_attention
    softmax = MultiheadAttention(
        *(attention.embed_dim, attention.num_heads, attention.kdim, attention.vdim),
        bias="q_proj.bias" in parameters,
        self_attention=not cross,
        encoder_decoder_attention=cross,
    )
    softmax.load_state_dict(parameters)
    return softmax.float().eval().to(next(attention.parameters()).device)


def _batches(trainer: Any, number: int) -> Iterator[Any]:
    """So many batches as the training has them, in an order of their own.

    Not by the trainer: in a training of several processes this one may be the only one here.
    """
    task, cfg, model = trainer.task, trainer.cfg, trainer.get_model()
    task.load_dataset(cfg.dataset.train_subset, epoch=1, combine=True)
    epochs = task.get_batch_iterator(
        task.dataset(cfg.dataset.train_subset),
        max_tokens=cfg.dataset.max_tokens,
        max_sentences=cfg.dataset.batch_size,
        max_positions=utils.resolve_max_positions(task.max_positions(), model.max_positions(), cfg.dataset.max_tokens),
        ignore_invalid_inputs=True,
        seed=cfg.common.seed,
        epoch=1,
        disable_iterator_cache=True,
    )
    samples = itertools.chain.from_iterable(epochs.next_epoch_itr() for _ in itertools.count())
    return (trainer._prepare_sample(sample)[0] for sample in itertools.islice(samples, number))
