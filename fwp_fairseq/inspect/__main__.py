"""Look inside: python -m fwp_fairseq.inspect --path checkpoint_best.pt --source "..." --output DIR

Writes DIR/index.html, a page that needs nothing beside it, and its pictures as PNG files: for each fast-weight
attention the implied attention weights, write strengths and kept shares by token, norm and effective rank of the memory
after each token, and what each key found before its value was written. Needs matplotlib.
"""

import argparse
import logging
import pickle
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m fwp_fairseq.inspect", description=__doc__)
    add = parser.add_argument
    add("--path", type=Path, required=True, help="checkpoint of a translation or language model")
    add("--source", required=True, help="the sentence, or the text of a language model")
    add("--target", help="the translation to look at (default: the model's own)")
    add("--output", type=Path, required=True, help="folder to write; files of the same names are replaced")
    add("--data", type=Path, help="folder with the dictionaries (default: the checkpoint's, or else its training's)")
    add("--source-lang", help="language of the source, if the checkpoint does not say it")
    add("--target-lang", help="language of the translation, if the checkpoint does not say it")
    add("--sentencepiece-model", type=Path, help="to cut the text into pieces, if it is not")
    add("--beam", type=int, default=5, help="of the search for the translation")
    return parser


def _encode(text: str, pieces: Optional[Path]) -> str:
    if pieces is None:
        return text
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    except RuntimeError:
        raise ValueError(f"--sentencepiece-model is {pieces}, which is no model of sentencepiece") from None
    return " ".join(model.encode(text, out_type=str))


def _words(dictionary: Any, tokens: Any) -> list[str]:
    return [dictionary[int(token)] for token in tokens]


def _write(path: Path, content: bytes) -> None:
    from fwp_fairseq.fairseq_mends.whole_checkpoints import replace_atomically

    replace_atomically(str(path), lambda file: file.write(content))


def inspect(args: argparse.Namespace) -> list[Path]:
    """Write page and pictures; the files. Raises ValueError, OSError and pickle.UnpicklingError where it cannot."""
    import torch
    from fairseq.sequence_generator import SequenceGenerator
    from tqdm import tqdm

    from fwp_fairseq.export_onnx import load_model
    from fwp_fairseq.inspect.page import make_page
    from fwp_fairseq.inspect.pictures import lines_picture, weights_picture
    from fwp_fairseq.inspect.recorder import look, recorded

    if args.beam < 1:
        raise ValueError(f"--beam is {args.beam}, it must be at least 1")
    if args.sentencepiece_model is not None and not args.sentencepiece_model.is_file():
        raise ValueError(f"--sentencepiece-model is {args.sentencepiece_model}, which is no file")
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output is {args.output}, which is no folder")
    model, task, _ = load_model(args.path, args.data, source_lang=args.source_lang, target_lang=args.target_lang)
    model.eval()
    words = task.target_dictionary
    source = task.source_dictionary.encode_line(
        _encode(args.source, args.sentencepiece_model), add_if_not_exist=False, append_eos=True
    ).long()[None]
    said = [("source", " ".join(_words(task.source_dictionary, source[0])))]
    if hasattr(model, "encoder"):
        if source.size(1) > model.encoder.max_positions():
            raise ValueError(f"the source is longer than the {model.encoder.max_positions()} tokens of the encoder")
        batch: dict[str, Any] = {"src_tokens": source, "src_lengths": torch.tensor([source.size(1)])}
        if args.target is None:
            generator = SequenceGenerator([model], words, beam_size=args.beam, max_len_a=2, max_len_b=20)
            target = generator.generate([model], {"net_input": batch})[0][0]["tokens"][None].cpu()
        else:
            encoded = _encode(args.target, args.sentencepiece_model)
            target = words.encode_line(encoded, add_if_not_exist=False, append_eos=True).long()[None]
        batch["prev_output_tokens"] = torch.cat([target[:, -1:], target[:, :-1]], dim=1)
        said.append(("target", " ".join(_words(words, target[0]))))
    else:
        if args.target is not None:
            raise ValueError("--target is given, and this is a language model, which has none")
        batch = {"src_tokens": torch.cat([source[:, -1:], source[:, :-1]], dim=1)}
    if batch.get("prev_output_tokens", batch["src_tokens"]).size(1) > model.max_decoder_positions():
        raise ValueError(f"the text is longer than the {model.max_decoder_positions()} tokens that the model can read")

    with recorded(model) as calls, torch.no_grad():
        model(**batch)
    if not calls:
        raise ValueError(f"{args.path} has softmax in all places: there is no memory to look into")
    sides = {
        "encoder": _words(task.source_dictionary, source[0]),
        "decoder": _words(words, batch.get("prev_output_tokens", batch["src_tokens"])[0]),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    memories, files = [], []
    for number, (name, (attention, inputs)) in enumerate(calls.items(), 1):
        asked = sides["encoder" if name.startswith("encoder") else "decoder"]
        written = sides["encoder"] if attention.encoder_decoder_attention else asked
        title = f"{name} ({number} of {len(calls)})"
        memory = look(
            name, attention, inputs, progress=partial(tqdm, desc=title, disable=len(written) < 200, leave=False)
        )
        pictures = {} if memory.weights is None else {"weights": weights_picture(memory, asked, written)}
        pictures["memory"] = lines_picture(memory, written)
        for kind, picture in pictures.items():
            files.append(args.output / f"{re.sub('[^a-z0-9_.]', '_', name)}.{kind}.png")
            _write(files[-1], picture)
        memories.append((memory, list(pictures.values())))
    files.append(args.output / "index.html")
    _write(files[-1], make_page(args.path.name, said, memories).encode())
    return files


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Look, and say what was written; leave with a message and status 1 if it cannot be done."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)  # some modules of fairseq would have everything logged
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        sys.exit(f"{parser.prog}: matplotlib is missing: pip install matplotlib")
    try:
        files = inspect(args)
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        sys.exit(f"{parser.prog}: {str(error).rstrip('.')}.")
    print(f"{files[-1]} and {len(files) - 1} pictures")


if __name__ == "__main__":
    main()
