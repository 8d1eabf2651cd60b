"""Softmax attention made into fast weights (Kasai et al. 2021, "Finetuning Pretrained Transformers into RNNs").

Both project queries, keys, values and outputs in the same way, so that a model with fast weights can begin with all
that one with softmax has learned.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fwp_fairseq.modules.fast_weight_attention import FastWeightAttention

logger = logging.getLogger(__name__)


def check_shapes(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise ValueError for the first parameter of a checkpoint that has another shape than that of a model."""
    for name, parameter in own.items():
        if name in given and given[name].shape != parameter.shape:
            raise ValueError(
                f"{name} has the shape {tuple(given[name].shape)} in the checkpoint and {tuple(parameter.shape)} in "
                "this model: give it the flags and the dictionaries of its training."
            )


def convert(parameters: dict[str, Tensor], model: Any, checkpoint: str) -> None:
    """Complete the ``parameters`` of a ``checkpoint`` with softmax attention, in place, for ``model``, fairseq's.

    What fast-weight attention has besides is as it is in the model, and what it does not have is left out; a table in
    the log says what. Raises ValueError if the checkpoint differs from the model in anything else.
    """
    model.upgrade_state_dict(parameters)
    own = model.state_dict()
    check_shapes(parameters, own)
    attentions = [name for name, module in model.named_modules() if isinstance(module, FastWeightAttention)]
    table: dict[str, dict[str, list[str]]] = {}
    for name in {**own, **parameters}:
        fate = "left out" if name not in own else "taken" if name in parameters else "new"
        attention = next((prefix for prefix in attentions if name.startswith(f"{prefix}.")), None)
        if attention is not None:
            row, part = re.sub(r"\d+", "*", attention), name[len(attention) + 1 :].removesuffix(".weight")
            table.setdefault(row, {}).setdefault(fate, []).append(part)
        elif fate != "taken":
            raise ValueError(
                f"{checkpoint} cannot be converted, since only {'this model' if fate == 'new' else 'it'} has {name}: "
                "give this model the flags of its training."
            )
    for name in own.keys() - parameters.keys():
        parameters[name] = own[name].cpu()
    for name in parameters.keys() - own.keys():
        del parameters[name]
    fates = "taken", "new", "left out"
    rows = [[row, *(", ".join(dict.fromkeys(parts.get(fate, "-"))) for fate in fates)] for row, parts in table.items()]
    rows = [["attention", *fates], *rows, ["all else", "all", "-", "-"]]
    logger.info("%s is converted:\n%s", checkpoint, "\n".join(f"| {' | '.join(row)} |" for row in rows))
