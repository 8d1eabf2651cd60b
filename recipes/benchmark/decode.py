#!/usr/bin/env python3
"""Time fairseq-generate, token by token: a table, decode.csv and decode.png.

Translation models of base width (512, feed-forward 2,048, 8 heads, 6 + 6 layers) and a language model of the paper's
medium shape (width 256, feed-forward 2,048, 8 heads, 16 layers), with random weights and a vocabulary of 10,000 words,
write outputs of a fixed length (--min-len). Softmax is fairseq's own transformer and transformer_lm. Each run is
fairseq-generate in a process of its own; tokens/s are those of a batch, encoder and search included, and for outputs of
up to 256 words those of a second batch, since the first finds nothing ready. A step's time is that from one call of the
decoder to the next. The state is what the decoder carries from token to token, cross-attention apart, for each
hypothesis. CTranslate2, where it is installed, translates with the same softmax model, converted.

With --busy a process for every core does nothing but compute meanwhile; the table is decode-busy.csv.

With --gpu all runs are in this process, with and without captured steps (", eager"); the table is gpu-decode.csv, or,
with --fp16, gpu-decode-fp16.csv, and memory is the GPU's.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import json
import logging
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from shared import WORDS, import_pyplot, preprocess, save_figure, write_csv, write_lines

SOURCE_LENGTH = 25
POSITIONS = 9000
# For longer outputs what the first batch has to prepare is little.
LONGEST_SECOND_BATCH = 256
# Sentences of a batch, and what fairseq-preprocess calls the test set that has as many.
SUBSETS = {16: "test", 4: "test1", 1: "test2", 64: "test3", 512: "test4"}

LM_SIZE = "--decoder-layers 16 --decoder-embed-dim 256 --decoder-input-dim 256 --decoder-output-dim 256 "
LM_SIZE += "--decoder-ffn-embed-dim 2048 --decoder-attention-heads 8"
FAST = "--feature-map dpfp --dpfp-nu 1 --update-rule delta"
EVERYWHERE = "--encoder-self-attention fast-weight --decoder-self-attention fast-weight --cross-attention fast-weight"
MODELS = {
    "softmax": "--arch transformer",
    "decoder": f"--arch fwp_transformer --decoder-self-attention fast-weight {FAST}",
    "all places": f"--arch fwp_transformer {EVERYWHERE} {FAST}",
    "lm softmax": f"--arch transformer_lm {LM_SIZE}",
    "lm delta": f"--arch fwp_transformer_lm {LM_SIZE} {FAST}",
    "lm sum": f"--arch fwp_transformer_lm {LM_SIZE} --feature-map elu --update-rule sum",
}
# What a run without captured steps is called beside the model's name.
EAGER = ", eager"
# And one with products of 8-bit integers.
INT8 = ", int8"
# The softmax model in another program for processors, with the numbers that it computes with.
PEER = "CTranslate2 "


@dataclass(frozen=True)
class Run:
    """One call of fairseq-generate."""

    model: str
    beam: int
    sentences: int
    length: int


# Long outputs with fewer sentences; softmax at 4,096 tokens takes ten minutes as it is.
RUNS = [
    Run(model, beam, sentences, length)
    for length, batches in ((64, (1, 16)), (256, (1, 16)), (1024, (1, 4)), (4096, (1,)))
    for sentences in batches
    for beam in (1, 5)
    for model in (
        *("softmax", "decoder", f"decoder{INT8}", "all places", f"all places{INT8}"),
        *(f"{PEER}float32", f"{PEER}int8"),
    )
] + [Run(model, 1, 1, 8192) for model in ("lm softmax", "lm delta", f"lm delta{INT8}", "lm sum")]
# The most telling first: there is not always time for all.
GPU_RUNS = [
    Run(model, beam, sentences, length)
    for length, batches in ((64, (1, 16, 64, 512)), (256, (1, 64)), (1024, (1, 16)), (4096, (1,)))
    for sentences in batches
    for beam in (5, 1)
    for model in ("softmax", f"decoder{EAGER}", "decoder", f"all places{EAGER}", "all places")
] + [Run(model, 1, 1, 1024) for model in ("lm softmax", f"lm delta{EAGER}", "lm delta")]


@dataclass(frozen=True)
class Row:
    """One line of the table. Times are milliseconds for a step, which is one token of every hypothesis."""

    model: str
    beam: int
    sentences: int
    length: int
    tokens_per_second: float
    first_tenth_ms: float
    last_tenth_ms: float
    state_bytes: int
    peak_mib: float


def make_data(folder: Path) -> None:
    """Binarise sentences of random words, two batches of each size, for translation and for language models."""
    generator = random.Random(1)
    for split, lines in ("train", None), *((f"test{count}", count) for count in SUBSETS):
        words = WORDS if lines is None else generator.choices(WORDS, k=2 * lines * SOURCE_LENGTH)
        for language in "ab":
            write_lines(folder / f"{split}.{language}", words, SOURCE_LENGTH)
    # A language model goes on from a prompt of one word.
    write_lines(folder / "test.lm", WORDS[:2], 1)
    tests = ",".join(f"{folder}/test{count}" for count in SUBSETS)
    languages = ["-s", "a", "-t", "b", "--joined-dictionary"]
    preprocess("--trainpref", f"{folder}/train", "--testpref", tests, *languages, "--destdir", f"{folder}/pair")
    text = ["--trainpref", f"{folder}/train.a", "--testpref", f"{folder}/test.lm", "--only-source"]
    preprocess(*text, "--destdir", f"{folder}/text")


def is_lm(model: str) -> bool:
    return model.startswith("lm ")


def save_model(folder: Path, model: str) -> Path:
    """A checkpoint with random weights, as fairseq-train would write it."""
    import torch
    from fairseq import checkpoint_utils, options, tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from omegaconf import OmegaConf

    import fwp_fairseq.models  # noqa: F401  (registers the architectures)

    model = model.removesuffix(EAGER).removesuffix(INT8)
    path = folder / f"{model.replace(' ', '-')}.pt"
    if path.exists():
        return path
    task = f"--task language_modeling --tokens-per-sample {POSITIONS}" if is_lm(model) else "--task translation"
    data = folder / ("text" if is_lm(model) else "pair")
    flags = f"{data} {task} {MODELS[model]} --max-target-positions {POSITIONS} --optimizer adam"
    flags += "" if is_lm(model) else " --share-all-embeddings --max-source-positions 1024"
    parser = options.get_training_parser()
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, flags.split()))
    torch.manual_seed(1)
    built = tasks.setup_task(cfg.task).build_model(cfg.model)
    state = {
        "args": None,
        "cfg": OmegaConf.to_container(cfg, resolve=True),
        "model": built.state_dict(),
        "optimizer_history": [{"optimizer_name": "none", "lr_scheduler_state": {}, "num_updates": 0}],
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
    }
    checkpoint_utils.torch_persistent_save(state, str(path))
    return path


def generate(folder: Path, run: Run, device: Sequence[str] = ("--cpu",)) -> Row:
    """Run fairseq-generate in this process and look at the clock at every call of the decoder."""
    import torch
    from fairseq import sequence_generator
    from fairseq_cli import generate as command

    on_gpu = "--cpu" not in device
    clock: list[float] = []
    batches: list[float] = []
    state: dict[str, int] = {}
    ensemble: Any = sequence_generator.EnsembleModel
    search: Any = sequence_generator.SequenceGenerator
    plain, plain_search = ensemble.forward_decoder, search.generate

    def generate_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        clock.clear()
        begun = time.perf_counter()
        found = plain_search(self, *args, **kwargs)
        batches.append(time.perf_counter() - begun)
        return found

    def forward_decoder(self: Any, tokens: Any, encoder_outs: Any, incremental_states: Any, *rest: Any) -> Any:
        clock.append(time.perf_counter())
        result = plain(self, tokens, encoder_outs, incremental_states, *rest)
        if tokens.size(1) == run.length:
            state["bytes"] = bytes_of_state(self.models[0], incremental_states[0]) // tokens.size(0)
            state["captured"] = any(type(x).__name__ == "CapturedStep" for x in incremental_states[0].values())
        return result

    checkpoint = save_model(folder, run.model)
    data = folder / ("text" if is_lm(run.model) else "pair")
    task = ["--task", "language_modeling", "--sample-break-mode", "eos"] if is_lm(run.model) else []
    limits = ["--min-len", run.length, "--max-len-a", 0, "--max-len-b", run.length]
    size = ["--beam", run.beam, "--batch-size", run.sentences, "--max-tokens", 100000]
    sys.argv = ["fairseq-generate", str(data), "--path", str(checkpoint), *task]
    subset = "test" if is_lm(run.model) else SUBSETS[run.sentences]
    sys.argv += [str(x) for x in [*limits, *size, "--gen-subset", subset, "--required-batch-size-multiple", 1, *device]]
    if run.length > LONGEST_SECOND_BATCH:
        sys.argv += ["--num-shards", "2", "--shard-id", "0"]  # the first of the two batches
    if run.model.endswith(INT8):
        sys.argv += ["--model-overrides", "{'decoding_weights': 'int8'}"]
    sys.argv += ["--num-workers", "0", "--results-path", str(folder / "results")]
    os.environ["FWP_CUDA_GRAPHS"] = "0" if run.model.endswith(EAGER) else "1"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    ensemble.forward_decoder, search.generate = forward_decoder, generate_batch
    try:
        command.cli_main()
    finally:
        ensemble.forward_decoder, search.generate = plain, plain_search
        logging.getLogger().handlers.clear()  # fairseq's writes to the file of results, which is closed
    if state["captured"] != (on_gpu and "softmax" not in run.model and not run.model.endswith(EAGER)):
        raise SystemExit(f"decode.py: {run.model} was{'' if state['captured'] else ' not'} decoded in a captured graph")
    steps = [(b - a) * 1e3 for a, b in zip(clock, clock[1:])][: run.length - 1]
    tenth = max(1, len(steps) // 10)
    # The first steps fill caches.
    first, last = statistics.median(steps[2 : tenth + 2]), statistics.median(steps[-tenth:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if on_gpu:
        peak = torch.cuda.max_memory_allocated() / 2**20
    speed = run.sentences * run.length / batches[-1]
    return Row(run.model, run.beam, run.sentences, run.length, speed, first, last, state["bytes"], peak)


def translate_by_peer(folder: Path, run: Run) -> Row:
    """The softmax model converted for CTranslate2, with as many threads as torch has. Time is that of all tokens."""
    import ctranslate2
    import torch
    from ctranslate2.converters import FairseqConverter

    numbers = run.model.removeprefix(PEER)
    converted = folder / f"ctranslate2-{numbers}"
    if not converted.exists():
        checkpoint = save_model(folder, "softmax")
        # Its file holds a namespace, which torch has to be told.
        with torch.serialization.safe_globals([argparse.Namespace]):
            converter = FairseqConverter(str(checkpoint), str(folder / "pair"), source_lang="a", target_lang="b")
            converter.convert(str(converted), quantization=numbers)
    translator = ctranslate2.Translator(str(converted), compute_type=numbers, intra_threads=torch.get_num_threads())
    name = f"test{run.sentences}.a"
    sources = [line.split() for line in (folder / name).read_text().splitlines()[: run.sentences]]
    options = {"beam_size": run.beam, "max_batch_size": run.sentences}
    translator.translate_batch(sources, min_decoding_length=4, max_decoding_length=4, **options)
    begun = time.perf_counter()
    found = translator.translate_batch(
        sources, min_decoding_length=run.length, max_decoding_length=run.length, **options
    )
    seconds = time.perf_counter() - begun
    written = sum(len(result.hypotheses[0]) for result in found)
    if written != run.sentences * run.length:
        raise SystemExit(f"decode.py: {run.model} has written {written} words, not {run.sentences * run.length}")
    step = 1e3 * seconds / run.length
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Row(run.model, run.beam, run.sentences, run.length, written / seconds, step, step, 0, peak)


def bytes_of_state(model: Any, incremental_state: dict[str, Any]) -> int:
    """What the decoder's self-attention keeps, in bytes."""
    kept = (layer.self_attn._get_input_buffer(incremental_state).values() for layer in model.decoder.layers)
    return sum(x.nbytes for tensors in kept for x in tensors if x is not None and x.is_floating_point())


@contextlib.contextmanager
def busy_cores(wanted: bool) -> Iterator[None]:
    """Within this context every core has something else to do, if that is wanted."""
    cores = range(len(os.sched_getaffinity(0)) if wanted else 0)
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in cores]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def in_a_process_of_its_own(folder: Path, run: Run) -> Row:
    log = folder / "run.json"
    command = [sys.executable, __file__, "--output", str(folder), "--worker", json.dumps(vars(run))]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"decode.py: fairseq-generate failed:\n{result.stderr[-3000:]}")
    return Row(**json.loads(log.read_text()))


def write_rows(path: Path, rows: list[Row]) -> None:
    write_csv(path, [f.name for f in fields(Row)], [vars(row).values() for row in rows])


def read_csv(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        kinds = {"model": str, "beam": int, "sentences": int, "length": int, "state_bytes": int}
        return [Row(**{k: kinds.get(k, float)(v) for k, v in line.items()}) for line in csv.DictReader(file)]


def format_row(row: Row) -> str:
    return (
        f"  {row.model:<17} beam {row.beam}  sentences {row.sentences:>3}  length {row.length:>4}  "
        f"{row.tokens_per_second:8.1f} tokens/s   step {row.first_tenth_ms:7.2f} ms in the first tenth, "
        f"{row.last_tenth_ms:7.2f} ms in the last   state {row.state_bytes:>10,} bytes   peak {row.peak_mib:6.0f} MiB"
    )


def claims(rows: list[Row]) -> list[str]:
    """How fast weights compare with softmax, and captured steps with others, from what was measured."""
    measured = {(row.model, row.beam, row.sentences, row.length): row for row in rows}
    found = []
    for row in rows:
        plain = row.model.removesuffix(INT8)
        for baseline in ("lm softmax" if is_lm(row.model) else "softmax", row.model + EAGER, plain):
            other = measured.get((baseline, row.beam, row.sentences, row.length), row)
            if other is not row:
                found.append(
                    f"{row.model}, beam {row.beam}, {row.sentences} sentences, length {row.length}: "
                    f"{row.tokens_per_second / other.tokens_per_second:.2f} x {baseline}; "
                    f"last / first tenth {row.last_tenth_ms / row.first_tenth_ms:.3f}"
                )
    return found


def plot(rows: list[Row], path: Path) -> None:
    """Speed and state against the length of the output, for beams of five and a single sentence."""
    plt = import_pyplot()
    if plt is None or not any((row.model, row.beam, row.sentences) == ("softmax", 5, 1) for row in rows):
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for model, label in (
        ("softmax", "softmax"),
        ("decoder", "fast weights, decoder"),
        ("all places", "fast weights, all places"),
    ):
        line = sorted((r for r in rows if (r.model, r.beam, r.sentences) == (model, 5, 1)), key=lambda r: r.length)
        if line:
            lengths = [r.length for r in line]
            left.loglog(lengths, [r.tokens_per_second for r in line], marker="o", markersize=3, label=label)
            right.loglog(lengths, [r.state_bytes / 2**20 for r in line], marker="o", markersize=3, label=label)
    for axes, label in (left, "tokens / s"), (right, "state of a hypothesis, MiB"):
        axes.set_xscale("log", base=2)
        axes.set_xticks([64, 256, 1024, 4096], ["64", "256", "1024", "4096"])
        axes.set_xlabel("tokens written, beam 5")
        axes.set_ylabel(label)
        axes.yaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(plt.NullFormatter())
        axes.grid(alpha=0.3, which="both")
    left.legend(fontsize=8)
    save_figure(figure, path)


def gpu_is_there() -> bool:
    import torch

    return torch.cuda.is_available()


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for the CSV file and the plot"
    )
    for flag, name, what in (
        ("--lengths", "length", "output lengths"),
        ("--beams", "beam", "beam sizes"),
        ("--sentences", "sentences", "batch sizes"),
    ):
        allowed = sorted({getattr(run, name) for run in RUNS + GPU_RUNS})
        parser.add_argument(flag, type=int, nargs="+", choices=allowed, help=f"only these {what}")
    names = list(dict.fromkeys(run.model for run in RUNS + GPU_RUNS))
    parser.add_argument("--models", nargs="+", choices=names, metavar="NAME", help="only these models")
    parser.add_argument("--busy", action="store_true", help="while other processes compute; one sentence, 64 words")
    parser.add_argument("--gpu", action="store_true", help="on the GPU, in this process")
    parser.add_argument("--fp16", action="store_true", help="in half precision; with --gpu")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fp16 and not options.gpu:
        parser.error("--fp16 is for --gpu: on a processor half precision is not quicker")
    if options.gpu and not gpu_is_there():
        parser.error("--gpu needs a GPU, and torch finds none")
    if options.busy:
        if options.gpu:
            parser.error("--busy is for the processor, not for --gpu")
        options.sentences, options.lengths = options.sentences or [1], options.lengths or [64]
    if options.worker:
        run = Run(**json.loads(options.worker))
        row = (translate_by_peer if run.model.startswith(PEER) else generate)(options.output, run)
        (options.output / "run.json").write_text(json.dumps(vars(row)))
        return 0
    wanted = [
        run
        for run in (GPU_RUNS if options.gpu else RUNS)
        if (not options.lengths or run.length in options.lengths)
        and (not options.models or run.model in options.models)
        and (not options.beams or run.beam in options.beams)
        and (not options.sentences or run.sentences in options.sentences)
    ]
    if any(run.model.startswith(PEER) for run in wanted) and importlib.util.find_spec("ctranslate2") is None:
        print("decode.py: left out: CTranslate2, which is not installed", file=sys.stderr)
        wanted = [run for run in wanted if not run.model.startswith(PEER)]
    if not wanted:
        parser.error("no run has all of what was asked for: RUNS in this file has what there is")
    options.output.mkdir(parents=True, exist_ok=True)
    device = (["--fp16"] if options.fp16 else []) if options.gpu else ["--cpu"]
    kind = "-fp16" if options.fp16 else "-busy" if options.busy else ""
    table = options.output / f"{'gpu-' if options.gpu else ''}decode{kind}.csv"
    rows = read_csv(table)
    done = {(r.model, r.beam, r.sentences, r.length) for r in rows}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder)
        for run in wanted:
            # A run that is in the table is not done again: remove the file to start anew.
            if tuple(vars(run).values()) not in done:
                with busy_cores(options.busy):
                    one = generate(folder, run, device) if options.gpu else in_a_process_of_its_own(folder, run)
                rows.append(one)
                write_rows(table, rows)
                print(format_row(rows[-1]), flush=True)
    print()
    print("\n".join(claims(rows)))
    if not (options.gpu or options.busy):
        plot(rows, options.output / "decode.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
