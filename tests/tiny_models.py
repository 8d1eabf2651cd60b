"""Tiny models for tests, built from command-line flags as fairseq-train would build them."""

import argparse
from pathlib import Path
from typing import Any

import torch
from fairseq import models, options
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from omegaconf import OmegaConf
from torch import Tensor

import fwp_fairseq.models  # noqa: F401  (registers the architectures)
from fwp_fairseq.safetensors_checkpoint import checkpoint_state
from fwp_fairseq.tasks.streaming_language_modeling import StreamingLanguageModelingTask

PLACES = ("encoder-self-attention", "decoder-self-attention", "cross-attention")


def dictionary(words: int) -> Dictionary:
    """A dictionary of this many entries, fairseq's four special symbols among them."""
    made = Dictionary()
    for word in range(words - len(made)):
        made.add_symbol(f"w{word}")
    return made


def places(kind: str, *chosen: str) -> list[str]:
    """Flags that put one kind of attention into the chosen places, or all."""
    return [flag for place in chosen or PLACES for flag in (f"--{place}", kind)]


def parse(task: str, arch: str, *flags: str) -> argparse.Namespace:
    """The namespace of fairseq-train for these flags, architecture defaults included."""
    command = ["unused-data", "--task", task, "--arch", arch, *flags]
    return options.parse_args_and_arch(options.get_training_parser(), command)


def build_translation(*flags: str, arch: str = "fwp_transformer", words: int = 20, tiny: bool = True) -> Any:
    """A translation model; ``tiny``: one layer on each side, width 8, two heads, unless flags say otherwise."""
    sizes = "--encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 8 --encoder-ffn-embed-dim 16 "
    sizes += "--encoder-attention-heads 2 --decoder-attention-heads 2"
    args = parse("translation", arch, *(sizes.split() if tiny else []), *flags)
    vocabulary = dictionary(words)
    return _build(args, TranslationTask(TranslationConfig(), vocabulary, vocabulary))


def build_lm(*flags: str, arch: str = "fwp_transformer_lm", words: int = 20, tiny: bool = True) -> Any:
    """A language model; ``tiny``: one layer, width 8, two heads, unless flags say otherwise."""
    sizes = "--decoder-layers 1 --decoder-embed-dim 8 --decoder-ffn-embed-dim 16 --decoder-attention-heads 2"
    if arch == "transformer_lm":
        sizes += " --decoder-input-dim 8 --decoder-output-dim 8"
    args = parse("language_modeling", arch, *(sizes.split() if tiny else []), *flags)
    args.max_target_positions = 64
    return _build(args, LanguageModelingTask(LanguageModelingConfig(), dictionary(words)))


def build_streaming_lm(
    *flags: str, arch: str = "fwp_transformer_lm", words: int = 20, tiny: bool = True, positions: bool = False
) -> Any:
    """A language model whose state can be carried, of two layers, and its task."""
    sizes = "--decoder-layers 2 --decoder-embed-dim 8 --decoder-ffn-embed-dim 16 --decoder-attention-heads 2"
    no_positions = [] if positions else ["--no-token-positional-embeddings"]
    args = parse("streaming_language_modeling", arch, *(sizes.split() if tiny else []), *no_positions, *flags)
    cfg = convert_namespace_to_omegaconf(args)
    task = StreamingLanguageModelingTask(cfg.task, dictionary(words))
    return task.build_model(cfg.model), task


def _build(args: argparse.Namespace, task: Any) -> Any:
    model = models.ARCH_MODEL_REGISTRY[args.arch]
    options_of_model = models.MODEL_DATACLASS_REGISTRY.get(models.ARCH_MODEL_NAME_REGISTRY[args.arch])
    return model.build_model(args if options_of_model is None else options_of_model.from_namespace(args), task)


def tokens(model: Any, batch: int, length: int, seed: int = 0) -> Tensor:
    """Random words, (batch, length), without special symbols."""
    size = len(model.decoder.dictionary)
    return torch.randint(4, size, (batch, length), generator=torch.Generator().manual_seed(seed))


def translation_batch(model: Any, batch: int = 3, source: int = 7, target: int = 6) -> dict[str, Tensor]:
    """Inputs of the model: sources of different lengths, padded on the left as fairseq does."""
    pad, eos = model.decoder.dictionary.pad(), model.decoder.dictionary.eos()
    src_tokens, prev_output_tokens = tokens(model, batch, source), tokens(model, batch, target, seed=1)
    src_tokens[:, -1] = prev_output_tokens[:, 0] = eos
    lengths = torch.tensor([max(2, source - 2 * row) for row in range(batch)])
    for row, length in enumerate(lengths):
        src_tokens[row, : source - length] = pad
    return {"src_tokens": src_tokens, "src_lengths": lengths, "prev_output_tokens": prev_output_tokens}


def decode_step_by_step(decoder: Any, prev_output_tokens: Tensor, encoder_out: Any = None) -> tuple[Tensor, dict]:
    """Logits of every position from incremental decoding, one token at a time, and the state at the end."""
    incremental_state: dict = {}
    steps = []
    with torch.no_grad():
        for length in range(1, prev_output_tokens.size(1) + 1):
            logits, _ = decoder(
                prev_output_tokens[:, :length], encoder_out=encoder_out, incremental_state=incremental_state
            )
            steps.append(logits)
    return torch.cat(steps, dim=1), incremental_state


def assert_decodes_as_in_the_parallel_pass(model: Any, batch: dict) -> None:
    """Of a translation model, in evaluation."""
    model.eval()
    with torch.no_grad():
        encoder_out = model.encoder(batch["src_tokens"], batch["src_lengths"])
        parallel, _ = model.decoder(batch["prev_output_tokens"], encoder_out=encoder_out)
    steps, _ = decode_step_by_step(model.decoder, batch["prev_output_tokens"], encoder_out)
    torch.testing.assert_close(steps, parallel, rtol=1e-4, atol=1e-5)


def save_checkpoint(folder: Path, task: str, arch: str, *flags: str, words: int = 30) -> Path:
    """A checkpoint of random parameters, beside its dictionaries: of languages a and b, if it translates."""
    made = dictionary(words)
    for name in ("dict.a.txt", "dict.b.txt") if task == "translation" else ("dict.txt",):
        made.save(str(folder / name))
    cfg = convert_namespace_to_omegaconf(parse(task, arch, *flags))
    if task == "translation":
        cfg.task.source_lang, cfg.task.target_lang = "a", "b"
        built: Any = TranslationTask(cfg.task, made, made)
    else:
        built = LanguageModelingTask(cfg.task, made)
    state = {
        "model": models.build_model(cfg.model, built).state_dict(),
        "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True),
    }
    torch.save(checkpoint_state(**state), folder / "checkpoint.pt")
    return folder / "checkpoint.pt"
