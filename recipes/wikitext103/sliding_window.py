#!/usr/bin/env python3
"""Perplexity of a language model by the paper's protocol: a window that slides by one token.

    python recipes/wikitext103/sliding_window.py DATA_BIN --path CHECKPOINT --user-dir fwp_fairseq --window 256

All tokens of the first window are scored, and of each later window the last one, so that every token but the first ones
has the same number of tokens, the window's, as its context. A text of n tokens has n - window + 1 windows, and costs as
many forward passes over one. Windows do not depend on each other: --batch-size of them are computed at once.

fairseq-eval-lm with --context-window reads the same windows, but computes the scores of all words of the vocabulary at
all positions, context included, before it drops them: 267,744 numbers for each. Here it is one score for each window.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq import checkpoint_utils, utils
from fairseq.data import data_utils
from torch import Tensor


def read_tokens(data: Path, part: str, dictionary: Any) -> Tensor:
    """All tokens of a part of binarised data, lines one after the other with their ends."""
    lines = data_utils.load_indexed_dataset(str(data / part), dictionary)
    if lines is None:
        sys.exit(f"sliding_window.py: there is no part '{part}' in {data}.")
    return torch.from_numpy(np.concatenate([np.asarray(lines[i]) for i in range(len(lines))])).long()


def state_size(decoder: Any, window: int) -> int:
    """Numbers that the model keeps of one text: a matrix for each head, or the keys and values of the window.

    A short convolution keeps the projections of some tokens besides.
    """
    size = 0
    for layer in decoder.layers:
        attention = layer.self_attn
        if hasattr(attention, "features"):
            columns = attention.head_dim + bool(attention.attention_normalization)
            size += attention.num_heads * attention.features.size * columns
            convolution = attention.short_convolution
            if convolution is not None:
                size += len(convolution.later) * (convolution.width - 1) * attention.embed_dim
        else:
            size += 2 * window * attention.embed_dim
    return size


@torch.no_grad()
def evaluate(decoder: Any, tokens: Tensor, start: int, window: int, batch: int, device: Any = "cpu") -> float:
    """Sum of -log p of all tokens, in nats; ``start`` is the token that stands before the first one."""
    # Once fairseq has the plugin: a program that imports it before must import the models.
    from fwp_fairseq.eval_lm import negative_log_likelihood

    pad = decoder.dictionary.pad()
    inputs = torch.cat([tokens.new_tensor([start]), tokens[:-1]])
    window = min(window, len(tokens))
    first, _ = decoder(inputs[None, :window].to(device), features_only=True)
    total = negative_log_likelihood(decoder, first[0], tokens[:window].to(device), pad)
    # A view: window i is tokens i to i + window, and its last target is token i + window - 1.
    windows = inputs.unfold(0, window, 1)
    began = said = time.perf_counter()
    for i in range(1, len(windows), batch):
        chunk = windows[i : i + batch]
        features, _ = decoder(chunk.to(device), features_only=True)
        targets = tokens[i + window - 1 : i + window - 1 + len(chunk)]
        total += negative_log_likelihood(decoder, features[:, -1], targets.to(device), pad)
        now = time.perf_counter()
        if now - said > 30:
            said = now
            left = (now - began) / (i + len(chunk)) * (len(windows) - i - len(chunk))
            print(f"{i + len(chunk)} of {len(windows)} windows, {left / 60:.0f} minutes left", file=sys.stderr)
    return total


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; what was found is printed as JSON."""
    parser = argparse.ArgumentParser(description="Perplexity with a window that slides by one token.")
    parser.add_argument("data", type=Path, metavar="DATA_BIN", help="folder that fairseq-preprocess has made")
    parser.add_argument("--path", required=True, metavar="CHECKPOINT")
    parser.add_argument("--user-dir", required=True, metavar="DIR", help="folder of the plugin")
    parser.add_argument("--gen-subset", default="test", metavar="PART", help="part of the data (default: test)")
    parser.add_argument("--window", type=int, required=True, metavar="TOKENS")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="windows at once (default: 64)")
    parser.add_argument("--cpu", action="store_true", help="on the processor")
    parser.add_argument("--fp16", action="store_true", help="in half precision")
    options = parser.parse_args(arguments)
    for name in ("window", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, it must be at least 1")
    utils.import_user_module(options)
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task(
        [options.path], arg_overrides={"data": str(options.data)}
    )
    device = "cuda" if torch.cuda.is_available() and not options.cpu else "cpu"
    model.eval().to(device)
    if options.fp16:
        model.half()
    if model.max_positions() < options.window:
        sys.exit(f"sliding_window.py: --window is {options.window}, the model has {model.max_positions()} positions.")
    tokens = read_tokens(options.data, options.gen_subset, task.source_dictionary)
    began = time.perf_counter()
    loss = evaluate(model.decoder, tokens, task.source_dictionary.eos(), options.window, options.batch_size, device)
    seconds = time.perf_counter() - began
    result = {
        "loss": loss,
        "tokens": len(tokens),
        "perplexity": math.exp(loss / len(tokens)),
        "windows": max(1, len(tokens) - options.window + 1),
        "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "state": state_size(model.decoder, options.window),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
