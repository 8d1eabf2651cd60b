"""The loss of the synthetic experiments (sec. 6.1): half the squared distance to the one-hot answer."""

from typing import Any

import torch
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from torch import Tensor


@register_criterion("half_squared_error", dataclass=FairseqDataclass)
class HalfSquaredError(FairseqCriterion):
    """½ ‖v* − v̂‖², summed over queries; fairseq divides by their number.

    The model returns (B, Q, S) for the sample's ``net_input``; ``target`` (B, Q) has the class of each answer, below
    zero where there is none.
    """

    def forward(self, model: Any, sample: dict[str, Any], reduce: bool = True) -> tuple[Tensor, int, dict[str, Any]]:
        target = sample["target"]
        answered = target >= 0
        error = model(**sample["net_input"])[answered].float()
        count = len(error)
        error = error.scatter_add(1, target[answered].unsqueeze(1), error.new_full((count, 1), -1.0))
        loss = error.square().sum() / 2
        log = {
            "loss": loss.detach(),
            "sample_size": count,
            "nsentences": sample["nsentences"],
            "ntokens": sample["ntokens"],
        }
        return loss, count, log

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        count = sum(int(log.get("sample_size", 0)) for log in logging_outputs)
        loss = sum(float(torch.as_tensor(log.get("loss", 0))) for log in logging_outputs)
        # Not rounded, as fairseq's losses are: the smallest are of the order of 1e-6.
        metrics.log_scalar("loss", loss / max(count, 1), count)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True
