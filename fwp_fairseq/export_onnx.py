"""Export a model to ONNX: python -m fwp_fairseq.export_onnx --path checkpoint_best.pt --output DIR

A translation model becomes ``encoder.onnx`` and ``decoder_step.onnx``, a language model ``step.onnx`` and
``prompt.onnx``, beside its dictionaries and ``model.json``. recipes/onnx has programs that translate and generate with
them and need neither torch nor fairseq. Needs onnx (``pip install onnx``).
"""

import argparse
import logging
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

LOWEST_OPSET = 18
_LANGUAGE_TASKS = ("language_modeling", "fwp_language_modeling", "streaming_language_modeling")
_EXPORTED = ("fwp_transformer", "fwp_transformer_align", "fwp_transformer_lm")
_TRANSLATION_TASKS = ("translation", "fwp_translation")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m fwp_fairseq.export_onnx", description=__doc__)
    add = parser.add_argument
    add("--path", type=Path, required=True, help="checkpoint to export")
    add("--output", type=Path, required=True, help="folder to write, which must not be there, or be empty")
    add("--data", type=Path, help="folder with the dictionaries (default: the checkpoint's, or else its training's)")
    add("--source-lang", help="language of the sources, if the checkpoint does not say it")
    add("--target-lang", help="language of the translations, if the checkpoint does not say it")
    add("--sentencepiece-model", type=Path, help="what the text was encoded with, to go with the model")
    add("--bpe-codes", type=Path, help="subword-nmt's codes, to go with the model")
    add("--quantize", choices=["int8"], help="matrices of weights in 8 bits: a quarter of the size")
    add("--opset", type=int, help=f"version of the operators, from {LOWEST_OPSET} on")
    add(
        "--linear-attention",
        choices=["onnxruntime", "plain", "standard"],
        default="onnxruntime",
        help="the recurrence as onnxruntime's own operator, which is the fastest and there from 1.26 on (the default); "
        "in operators that every runtime has; or as that of opset 27",
    )
    add("--safetensors", action="store_true", help="also write the parameters, as model.safetensors")
    return parser


def check_opset(opset: Optional[int], form: str) -> int:
    """The opset to write. Raises ValueError for one that is not known or does not have what is asked for."""
    from onnx.defs import onnx_opset_version

    from fwp_fairseq.onnx_export.recurrence import STANDARD_OPSET

    lowest, latest = STANDARD_OPSET if form == "standard" else LOWEST_OPSET, onnx_opset_version()
    if opset is None:
        opset = lowest
    if not lowest <= opset <= latest:
        given = f"--opset is {opset}, allowed with --linear-attention {form} and this onnx are {lowest} to {latest}"
        raise ValueError(given)
    return opset


def load_model(path: Path, data: Optional[Path] = None, **languages: Optional[str]) -> tuple[Any, Any, Any]:
    """Model, task and configuration of a checkpoint. ``languages``: source_lang and target_lang, or None.

    Raises ValueError: it is of an architecture that is not exported, or its dictionaries are not found; OSError and
    pickle.UnpicklingError: it cannot be read.
    """
    from fairseq import checkpoint_utils
    from fairseq.data import data_utils
    from fairseq.models import ARCH_MODEL_NAME_REGISTRY
    from omegaconf import open_dict

    import fwp_fairseq.models
    import fwp_fairseq.tasks  # noqa: F401  (registers, as the import before)

    try:
        state = checkpoint_utils.load_checkpoint_to_cpu(str(path))
        cfg = state["cfg"]
        architecture, _ = cfg.model._name, state["model"]
    except (LookupError, AttributeError, TypeError):
        raise ValueError(f"{path} is no checkpoint of fairseq") from None
    if ARCH_MODEL_NAME_REGISTRY.get(architecture, architecture) not in _EXPORTED:
        raise ValueError(
            f"{path} has the architecture {architecture}, exported are {', '.join(_EXPORTED)} and those of their sizes"
        )
    if cfg.task._name not in (*_TRANSLATION_TASKS, *_LANGUAGE_TASKS):
        raise ValueError(f"{path} has the task {cfg.task._name}, exported are translation and language modelling")
    folders = [data] if data else [path.parent, Path(str(cfg.task.data).split(":")[0])]
    found = [folder for folder in folders if any(folder.glob("dict.*txt"))]
    if not found:
        names = " and ".join(map(str, folders))
        raise ValueError(f"there are no dictionaries (dict.*txt) in {names}: --data says where they are")
    with open_dict(cfg):
        cfg.task.data, cfg.model.checkpoint_activations = str(found[0]), False
        if cfg.task._name in _TRANSLATION_TASKS:
            inferred = data_utils.infer_language_pair(found[0])
            for name, language in zip(("source_lang", "target_lang"), inferred):
                cfg.task[name] = languages.get(name) or cfg.task[name] or language
                if cfg.task[name] is None:
                    raise ValueError(f"the language is not known, --{name.replace('_', '-')} says it")
                if not (found[0] / f"dict.{cfg.task[name]}.txt").is_file():
                    raise ValueError(f"{found[0]} has no dict.{cfg.task[name]}.txt")
    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(path)], state=state)
    return model.float(), task, cfg


def describe(graphs: Any, task: Any, cfg: Any, **options: Any) -> dict[str, Any]:
    """What ``model.json`` says of the model itself."""
    import fwp_fairseq

    words = task.target_dictionary
    translates = graphs.encoder is not None
    begins_with_bos = not translates and getattr(task.args, "add_bos_token", False)
    positions = {"max_target_positions": int(graphs.decoder.max_positions())}
    if translates:
        positions["max_source_positions"] = int(graphs.encoder.max_positions())
    names = ("update_rule", "feature_map", "dpfp_nu", "key_normalization", "attention_normalization")
    places = ("encoder_self_attention", "decoder_self_attention", "cross_attention")
    model = {name: cfg.model.get(name) for name in (*names, *places) if name in cfg.model}
    return {
        "kind": "translation" if translates else "language",
        "version": fwp_fairseq.__version__,
        "architecture": cfg.model._name,
        "model": {name: str(value) if isinstance(value, str) else value for name, value in model.items()},
        "languages": [task.cfg.source_lang, task.cfg.target_lang] if translates else None,
        **options,
        **positions,
        "words": {"source": len(task.source_dictionary), "target": len(words)},
        "special": {
            "symbols": words.symbols[: words.nspecial],
            "bos": words.bos(),
            "pad": words.pad(),
            "eos": words.eos(),
            "unk": words.unk(),
            "start": words.bos() if begins_with_bos else words.eos(),
        },
        "states": graphs.states(),
        "of_source": graphs.kept_of_source(),
    }


def export(args: argparse.Namespace) -> None:
    """Export as the command line says. Raises ValueError, OSError and pickle.UnpicklingError where it cannot."""
    from fwp_fairseq.onnx_export.folder import check_empty, write_folder
    from fwp_fairseq.onnx_export.model_graphs import ModelGraphs
    from fwp_fairseq.safetensors_checkpoint import as_safetensors

    check_empty(args.output)
    opset = check_opset(args.opset, args.linear_attention)
    subwords = None
    for kind, file in (("sentencepiece", args.sentencepiece_model), ("bpe", args.bpe_codes)):
        if file is not None:
            if subwords is not None:
                raise ValueError("--sentencepiece-model and --bpe-codes are both given, text has one of them")
            if not file.is_file():
                raise ValueError(f"{file} is no file")
            subwords = kind, file
    model, task, cfg = load_model(args.path, args.data, source_lang=args.source_lang, target_lang=args.target_lang)
    graphs = ModelGraphs(model, opset, args.linear_attention, quantize=args.quantize is not None)
    description = describe(
        graphs, task, cfg, opset=opset, linear_attention=args.linear_attention, quantize=args.quantize
    )
    dictionaries = {"source": task.source_dictionary, "target": task.target_dictionary}
    extra = {"model.safetensors": as_safetensors(args.path)} if args.safetensors else {}
    write_folder(args.output, graphs.graphs(), dictionaries, subwords, description, extra)


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Export, and say what was written; leave with a message and status 1 if it cannot be done."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)  # some modules of fairseq would have everything logged
    try:
        import onnx  # noqa: F401
    except ImportError:
        sys.exit(f"{parser.prog}: onnx is missing: pip install onnx")
    try:
        export(args)
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        sys.exit(f"{parser.prog}: {str(error).rstrip('.')}.")
    files = sorted(args.output.iterdir())
    print(f"{args.output}: " + ", ".join(f"{file.name} {file.stat().st_size:,}" for file in files))


if __name__ == "__main__":
    main()
