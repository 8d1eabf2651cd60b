#!/usr/bin/env python3
"""Time exported models beside fairseq with this package's compiled operators, taking turns in one process.

benchmark.py operators                                  LinearAttention of onnxruntime, and the native operators
benchmark.py decoding                                   beam search: a model of the quick start's size, fixed lengths
benchmark.py start --path CHECKPOINT --data BIN MODEL   from the start of the program to the translation of one line

Needs torch, fairseq and onnxruntime. Parameters are random in the first two, which changes no speed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import torch
from beam_search import SearchOptions
from exported import ExportedModel

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from fairseq import models, options, tasks  # noqa: E402
from fairseq.data import Dictionary  # noqa: E402
from fairseq.dataclass.utils import convert_namespace_to_omegaconf  # noqa: E402
from fairseq.sequence_generator import SequenceGenerator  # noqa: E402

from fwp_fairseq import export_onnx  # noqa: E402
from fwp_fairseq.onnx_export.folder import write_folder  # noqa: E402
from fwp_fairseq.onnx_export.graph import Graph  # noqa: E402
from fwp_fairseq.onnx_export.model_graphs import ModelGraphs  # noqa: E402
from fwp_fairseq.onnx_export.recurrence import FORMS, STANDARD_OPSET, Recurrence  # noqa: E402
from fwp_fairseq.ops import dpfp, fast_weight_scan, native, sum_normalize  # noqa: E402
from fwp_fairseq.ops.update_rules import Gates  # noqa: E402

FORM_OPSET = {form: STANDARD_OPSET if form == "standard" else 18 for form in FORMS}


def cpu_time() -> float:
    """Seconds of the processor that this program, and those it has run, have used."""
    return time.process_time() + sum(os.times()[2:4])


def take_turns(
    calls: Mapping[str, Callable[[], object]], repetitions: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """The median of the seconds of each call, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(repetitions + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if repetition:
                seconds[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


# --- Operators -------------------------------------------------------------------------------------------------------


def recurrence_graph(form: str, rule: str, rows: int, heads: int, length: int, d_k: int, d_v: int) -> Any:
    """What runs the recurrence in one form."""
    graph = Graph(FORM_OPSET[form], {})
    sizes = {"q": (length, heads, d_k), "k": (length, heads, d_k), "v": (length, heads, d_v)}
    q, k, v = (graph.input(name, [rows, *size]) for name, size in sizes.items())
    write = graph.input("write", [rows, length, heads])
    state = graph.input("state", [rows, heads, d_k * (2 if length == 1 else 1), d_v])
    gates = Gates(write, write if rule == "delta" else None, None)
    if length == 1:
        q, k = (sum_normalize(dpfp(x)) for x in (q, k))
        d_k *= 2
    out, new_state = Recurrence(graph, form, False).causal(q, k, v, gates, state, one_token=length == 1)
    graph.output("out", out, [rows, length, heads, d_v])
    graph.output("new_state", new_state, [rows, heads, d_k, d_v])
    return graph.finish("recurrence")


def time_operators(args: Any) -> None:
    """Print a table of milliseconds: the recurrence over 512 tokens, and a step with DPFP-1 and its normalisation."""
    print(f"onnxruntime {onnxruntime.__version__}, torch {torch.__version__}, {args.threads} threads, milliseconds")
    for rows, heads, length, d_k, d_v in ((8, 8, 512, 64, 64), (40, 8, 1, 64, 64), (1, 8, 1, 64, 64)):
        draw = np.random.default_rng(1)
        x = {name: draw.normal(size=(rows, length, heads, d_k)).astype(np.float32) for name in "qk"}
        x = {name: value / np.linalg.norm(value, axis=-1, keepdims=True) for name, value in x.items()}
        x["v"] = draw.normal(size=(rows, length, heads, d_v)).astype(np.float32)
        x["write"] = draw.uniform(size=(rows, length, heads)).astype(np.float32)
        size = 2 * d_k if length == 1 else d_k
        x["state"] = draw.normal(size=(rows, heads, size, d_v)).astype(np.float32)
        for rule in ("sum", "delta"):
            calls: dict[str, Callable[[], object]] = {}
            outputs = {}
            for form in FORMS:
                session = onnx_session(recurrence_graph(form, rule, rows, heads, length, d_k, d_v), args.threads)
                given = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in x.items()}
                calls[form] = partial(session.run_with_ort_values, None, given)
                outputs[form] = session.run(None, x)[0]
            calls["native"] = native_call(x, rule == "delta")
            expected: Any = calls["native"]()
            for form, out in outputs.items():
                difference = np.abs(np.moveaxis(out, 1, 2).reshape(expected.shape) - expected.numpy()).max()
                assert difference < 1e-2, (form, difference)
            found = take_turns(calls, args.repetitions, args.clock)
            times = "  ".join(f"{name} {1000 * seconds:8.3f}" for name, seconds in found.items())
            print(f"{rule:5} ({rows}, {heads}, {length}, {d_k}/{d_v})  {times}")


def native_call(x: dict[str, Any], erases: bool) -> Callable[[], torch.Tensor]:
    """The compiled operators on the same numbers."""
    q, k, v, write = (torch.from_numpy(x[name]).transpose(1, 2).contiguous() for name in ("q", "k", "v", "write"))
    state = torch.from_numpy(x["state"]).clone()
    erase = write if erases else None
    if q.size(2) > 1:
        return lambda: fast_weight_scan(q, k, v, write, erase, initial_state=state, backend="native")[0]
    features = native.AddressFeatures("dpfp", 1, "sum")
    q, k, v, write = q[:, :, 0], k[:, :, 0], v[:, :, 0], write[:, :, 0]
    erase = None if erase is None else write

    def step() -> torch.Tensor:
        nonlocal state
        state.copy_(torch.from_numpy(x["state"]))
        return native.step(q, k, v, write, erase, None, state, None, None, None, features)[0]

    return step


def onnx_session(model: Any, threads: int) -> Any:
    """What runs a graph."""
    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads = threads
    made.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), made, providers=["CPUExecutionProvider"])


# --- Decoding --------------------------------------------------------------------------------------------------------


def quick_start_model(flags: Sequence[str]) -> Any:
    """A model of the quick start's size with random parameters."""
    sizes = "--encoder-layers 2 --encoder-embed-dim 128 --encoder-ffn-embed-dim 512 --encoder-attention-heads 4 "
    sizes += "--decoder-layers 2 --decoder-attention-heads 4 --share-all-embeddings"
    command = ["data", "--task", "translation", "--arch", "fwp_transformer", *sizes.split(), *flags]
    args = options.parse_args_and_arch(options.get_training_parser(), command)
    cfg = convert_namespace_to_omegaconf(args)
    words = Dictionary()
    for number in range(4000 - len(words)):
        words.add_symbol(f"w{number}")
    task = tasks.translation.TranslationTask(cfg.task, words, words)
    torch.manual_seed(1)
    return models.build_model(cfg.model, task).eval(), task


def time_decoding(args: Any) -> None:
    """Print words per second of the beam search."""
    made = "onnxruntime {}, torch {}, {} threads, {} sentences of 16 words, beam 5, outputs of {} words: words/s"
    print(made.format(onnxruntime.__version__, torch.__version__, args.threads, args.sentences, args.length))
    draw = np.random.default_rng(1)
    sentences = [draw.integers(4, 4000, 16).tolist() for _ in range(args.sentences)]
    search = SearchOptions(beam=5, max_len_b=args.length, min_len=args.length)
    everywhere = "--encoder-self-attention fast-weight --cross-attention fast-weight"
    for name, flags in (("quick start", ""), ("fast weights everywhere", everywhere)):
        model, task = quick_start_model(flags.split())
        exported = {}
        with tempfile.TemporaryDirectory() as folder:
            for form in (*FORMS, "int8"):
                recurrence = "onnxruntime" if form == "int8" else form
                graphs = ModelGraphs(model, FORM_OPSET[recurrence], recurrence, quantize=form == "int8")
                words = {"source": task.source_dictionary, "target": task.target_dictionary}
                about_cfg = SimpleNamespace(model=type("Options", (dict,), {"_name": "fwp_transformer"})())
                about = export_onnx.describe(graphs, task, about_cfg)
                write_folder(Path(folder, form), graphs.graphs(), words, None, about, {})
                exported[form] = ExportedModel(Path(folder, form), "translation", args.threads)
        model.make_generation_fast_()
        limits = {"beam_size": 5, "max_len_b": args.length, "min_len": args.length}
        generate = partial(SequenceGenerator([model], task.target_dictionary, **limits).generate, [model])
        source = torch.tensor([[*sentence, 2] for sentence in sentences])
        sample = {"net_input": {"src_tokens": source, "src_lengths": torch.full((len(sentences),), source.size(1))}}
        calls: dict[str, Callable[[], object]] = {"fairseq": partial(generate, sample)}
        for form, program in exported.items():
            calls[form] = partial(program.translate, sentences, search)
        found = take_turns(calls, args.repetitions, args.clock)
        total = args.sentences * (args.length + 1)
        print(f"{name}: " + "  ".join(f"{form} {total / seconds:,.0f}" for form, seconds in found.items()))


# --- Starting --------------------------------------------------------------------------------------------------------


def time_start(args: Any) -> None:
    """Print the seconds that it takes to translate one line."""
    fairseq = "import sys; from fairseq_cli.interactive import cli_main; cli_main()"
    package = str(ROOT / "fwp_fairseq")
    commands = {
        "fairseq-interactive": [sys.executable, "-c", fairseq, args.data, "--path", args.path, "--user-dir", package],
        "translate.py": [args.python or sys.executable, str(Path(__file__).with_name("translate.py")), args.model],
    }

    run = partial(subprocess.run, input="a\n", text=True, capture_output=True, check=True)
    calls = {name: partial(run, [str(part) for part in command]) for name, command in commands.items()}
    for name, seconds in take_turns(calls, args.repetitions, args.clock).items():
        print(f"{name}: {seconds:.2f} s to the translation of one line")


def main() -> None:
    """Time what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["operators", "decoding", "start"])
    parser.add_argument("model", nargs="?", help="start: folder of an exported model")
    parser.add_argument("--path", help="start: checkpoint that it was made of")
    parser.add_argument("--data", help="start: folder of binarised data")
    parser.add_argument("--python", help="start: Python of an environment without torch and fairseq")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--sentences", type=int, default=32)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--cpu-time", action="store_true", help="of the processor, where others use the machine, too")
    args = parser.parse_args()
    args.clock = cpu_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(args.threads)
    if args.what == "start" and not (args.model and args.path and args.data):
        parser.error("start needs the folder of an exported model, --path and --data")
    {"operators": time_operators, "decoding": time_decoding, "start": time_start}[args.what](args)


if __name__ == "__main__":
    main()
