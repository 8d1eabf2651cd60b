"""fairseq's options for precision, memory and data parallelism: each trains every kind of model for a few updates."""

import json
import logging

import pytest
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_cli.train import main as fairseq_train
from test_end_to_end import logged
from tiny_streams import DISTRIBUTED

import fwp_fairseq.models
import fwp_fairseq.tasks  # noqa: F401

LANGUAGE_MODEL = (
    *("--decoder-layers", 2, "--decoder-embed-dim", 16, "--decoder-ffn-embed-dim", 32),
    *("--decoder-attention-heads", 2, "--tokens-per-sample", 16),
)
STREAMING = ("--task", "streaming_language_modeling", "--no-token-positional-embeddings", *LANGUAGE_MODEL)
FAST_WEIGHTS = [f"--{p}-attention" for p in ("encoder-self", "decoder-self", "cross")]
MODELS = {
    "translation": (
        *("--arch", "fwp_transformer", "--encoder-layers", 1, "--decoder-layers", 1, "--encoder-embed-dim", 16),
        *("--encoder-ffn-embed-dim", 32, "--encoder-attention-heads", 2, "--decoder-attention-heads", 2),
        *(part for flag in FAST_WEIGHTS for part in (flag, "fast-weight")),
    ),
    "language model": ("--task", "language_modeling", "--arch", "fwp_transformer_lm", *LANGUAGE_MODEL),
    "streams": (*STREAMING, "--arch", "fwp_transformer_lm"),
    "streams, sum with normalisation": (
        *(*STREAMING, "--arch", "fwp_transformer_lm", "--update-rule", "sum", "--feature-map", "elu"),
        "--attention-normalization",
    ),
    "Transformer-XL": (*STREAMING, "--arch", "transformer_xl_lm", "--memory-length", 8),
}
TRAINING = (
    *("--cpu", "--optimizer", "adam", "--lr", 1e-2, "--seed", 1, "--criterion", "cross_entropy", "--dropout", 0),
    *("--log-format", "json", "--log-interval", 1, "--no-save", "--disable-validation", "--num-workers", 0),
    *("--batch-size", 20, "--max-update", 6),
)
# Else fairseq puts the parameters of the optimizer on a GPU.
ON_A_PROCESSOR = ["--fp16-no-flatten-grads"]
OPTIONS = {
    "bf16": ["--bf16", *ON_A_PROCESSOR],
    "memory-efficient bf16": ["--memory-efficient-bf16"],
    "fp16": ["--fp16", *ON_A_PROCESSOR],
    "memory-efficient fp16": ["--memory-efficient-fp16"],
    "amp": ["--amp"],
    "activation checkpoints": ["--checkpoint-activations"],
}


@pytest.fixture
def train(corpus, caplog):
    """Train in this process; the losses of the updates."""

    def train(*flags):
        data = corpus.language_model if "--task" in flags else corpus.translation
        parser = options.get_training_parser()
        args = options.parse_args_and_arch(parser, input_args=[str(flag) for flag in (data, *flags, *TRAINING)])
        caplog.clear()
        cfg = convert_namespace_to_omegaconf(args)
        # Of fairseq's two commands fairseq-train takes --bf16 for an order to use a TPU; fairseq-hydra-train does not.
        cfg.common.tpu = False
        with caplog.at_level(logging.INFO):
            fairseq_train(cfg)
        return [float(json.loads(r.message)["loss"]) for r in caplog.records if r.name == "train_inner"]

    return train


@pytest.fixture(scope="module")
def in_float32():
    """Losses of each model without any of the options, as they become known."""
    return {}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_trains_as_float32_does(option, model, train, in_float32):
    if model not in in_float32:
        in_float32[model] = train(*MODELS[model])
    losses = train(*MODELS[model], *OPTIONS[option])
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert losses == pytest.approx(in_float32[model], rel=1e-3 if "checkpoints" in option else 0.02)


# On a processor, fairseq 0.12.3 tells torch's wrapper a number of a GPU, which the wrapper refuses.
WITHOUT_DEVICES = """
from fairseq_cli.train import cli_main
from fairseq.models import distributed_fairseq_model as wrappers
whole = wrappers.DistributedDataParallel
wrappers.DistributedDataParallel = lambda module, device_ids, output_device, **options: whole(module, **options)
cli_main()
"""


@pytest.mark.parametrize("backend, model", [("pytorch_ddp", "streams"), ("legacy_ddp", "Transformer-XL")])
def test_two_processes_train_as_one_with_either_wrapper(backend, model, corpus, run, train, in_float32, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(WITHOUT_DEVICES)
    flags = (*MODELS[model], *TRAINING, "--user-dir", "fwp_fairseq", "--batch-size", 10, "--ddp-backend", backend)
    torchrun = ("torchrun", "--standalone", "--nproc_per_node", 2, script, corpus.language_model)
    losses = logged(run(*torchrun, *flags, *DISTRIBUTED), "train_inner", "loss")
    expected = in_float32[model] if model in in_float32 else train(*MODELS[model])
    assert list(map(float, losses)) == pytest.approx(expected, abs=2e-3)
