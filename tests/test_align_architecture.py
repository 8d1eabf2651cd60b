"""fwp_transformer_align: fairseq's model that learns to align, and the same with fast weights."""

import pytest
import torch
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.criterions.label_smoothed_cross_entropy_with_alignment import (
    LabelSmoothedCrossEntropyCriterionWithAlignmentConfig as Settings,
)
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from tiny_models import build_translation, dictionary, parse, places, translation_batch

from fwp_fairseq.models.fwp_transformer_align import FWPTransformerAlignConfig, FWPTransformerAlignModel

SUPERVISED = ["--decoder-layers", "2", "--alignment-layer", "1", "--alignment-heads", "2"]
ALIGN = {"arch": "fwp_transformer_align"}


@pytest.mark.parametrize("full_context", [[], ["--full-context-alignment"]])
def test_with_softmax_it_is_fairseqs(full_context):
    flags = [*SUPERVISED, *full_context]
    ours = build_translation(*flags, *places("softmax"), **ALIGN).eval()
    fairseqs = build_translation(*flags, arch="transformer_align").eval()
    fairseqs.load_state_dict(ours.state_dict())
    inputs = translation_batch(ours)
    (logits, extra), (expected, expected_extra) = ours(**inputs), fairseqs(**inputs)
    assert torch.equal(logits, expected) and torch.equal(extra["attn"][0], expected_extra["attn"][0])


def test_the_criterion_moves_implied_attention_towards_the_alignments():
    task = TranslationTask(TranslationConfig(load_alignments=True), dictionary(20), dictionary(20))
    flags = [*places("fast-weight", "cross-attention"), *SUPERVISED, "--encoder-embed-dim", "16", "--dropout", "0"]
    args = parse("translation", "fwp_transformer_align", *flags)
    for name in ("encoder", "decoder"):
        setattr(args, f"{name}_attention_heads", 2)
    torch.manual_seed(1)
    model = FWPTransformerAlignModel.build_model(FWPTransformerAlignConfig.from_namespace(args), task)
    criterion = CRITERION_REGISTRY["label_smoothed_cross_entropy_with_alignment"].build_criterion(
        Settings(label_smoothing=0.1, sentence_avg=False, report_accuracy=False, alignment_lambda=20.0), task
    )
    inputs = translation_batch(model, batch=1)
    target = inputs["prev_output_tokens"]
    pairs = [[t, 6 - t] for t in range(target.size(1))]  # the other way round, in one sentence of 7 words
    sample = {
        "net_input": inputs,
        "target": target,
        "alignments": torch.tensor(pairs).flip(1),
        "align_weights": torch.ones(len(pairs)),
        "ntokens": target.numel(),
    }
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss, _, log = criterion(model, sample)
        losses.append(float(log["alignment_loss"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--alignment-layer", "2"], "--alignment-layer is 2, it must be between 0 and 0"),
        (["--alignment-layer", "0", "--alignment-heads", "3"], "--alignment-heads is 3, it must be between 1 and 2"),
        (
            ["--alignment-layer", "0", "--full-context-alignment", *places("fast-weight", "decoder-self-attention")],
            "--full-context-alignment lets .*--decoder-self-attention can be softmax",
        ),
    ],
)
def test_what_cannot_be_aligned_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        build_translation(*flags, **ALIGN)
