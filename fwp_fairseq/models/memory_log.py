"""What memories are like while a model trains, in fairseq's logs and wherever these go (--log-memory)."""

from functools import partial
from typing import Any

import torch
from fairseq.logging import metrics
from torch import nn

from fwp_fairseq.inspect.recorder import effective_rank, inputs_by_name, written
from fwp_fairseq.modules.fast_weight_attention import FastWeightAttention


class LogsMemory:
    """Mixed into a model: every ``log_memory`` updates each fast-weight attention logs its next pass once.

    Under the attention's name: beta and decay (means over heads and the first row's tokens, where the rule has them),
    norm and rank, the Frobenius norm and the effective rank of the memory after them, means over heads.
    """

    log_memory = 0

    def set_num_updates(self, num_updates: int) -> None:
        """fairseq calls this before each batch."""
        super().set_num_updates(num_updates)  # type: ignore[misc]
        if not self.log_memory or num_updates % self.log_memory:
            return
        for name, module in self.named_modules():  # type: ignore[attr-defined]
            if isinstance(module, FastWeightAttention) and module.training:
                handle: list[Any] = []
                handle.append(module.register_forward_pre_hook(partial(_log, name, handle), with_kwargs=True))


@torch.no_grad()
def _log(name: str, handle: list[Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    handle.pop().remove()
    attention: Any = module
    inputs = inputs_by_name(args, kwargs)
    padding = inputs.get("key_padding_mask")
    first = {part: inputs[part][:, :1] for part in ("query", "key", "value")}
    # Training goes on with the random numbers that it would have had.
    with torch.random.fork_rng():
        _, k, v, gates = written(attention, {**first, "key_padding_mask": None if padding is None else padding[:1]})
    memory, _ = attention.recurrence.write(k, v, gates)
    found = {"beta": gates.write, "decay": gates.decay, "norm": memory.square().sum(dim=(2, 3)).sqrt()}
    found["rank"] = effective_rank(memory)
    for what, values in found.items():
        if values is not None:
            metrics.log_scalar(f"{name}.{what}", float(values.mean()), priority=10_000, round=3)
