"""A model that ``python -m fwp_fairseq.export_onnx`` wrote: its graphs, its words, and decoding with them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from beam_search import Floats, Hypothesis, Ints, SearchOptions, Special, longest, search
from pieces import load as load_pieces

DESCRIPTION = "model.json"
FORMAT = 1


class BadModel(Exception):
    """The folder holds no model that this program can run."""


class Words:
    """The words of one side and their numbers. File: the words in their order, one a line, each with its count."""

    def __init__(self, file: Path, special: Sequence[str]) -> None:
        lines = file.read_text("utf-8").rstrip("\n").split("\n")
        self._words = [*special, *(line.rsplit(" ", 1)[0] for line in lines if line)]
        self._numbers = {word: number for number, word in enumerate(self._words)}

    def __len__(self) -> int:
        return len(self._words)

    def numbers(self, line: str, unknown: int) -> list[int]:
        """Of the words between spaces."""
        return [self._numbers.get(word, unknown) for word in re.sub(r"\s+", " ", line).strip().split()]

    def text(self, numbers: Sequence[int], left_out: Sequence[int]) -> str:
        return " ".join(self._words[number] for number in numbers if number not in left_out)


class ExportedModel:
    """The model in ``folder``. ``threads``: of onnxruntime, 0 for as many as there are cores.

    Raises BadModel, in one sentence: there is none, it is of another kind, or it is damaged.
    """

    def __init__(self, folder: Path, kind: str, threads: int = 0) -> None:
        try:
            about: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text("utf-8"))
            if about["format"] != FORMAT:
                raise BadModel(f"{folder} has the format {about['format']}, but this program knows {FORMAT}")
            if about["kind"] != kind:
                raise BadModel(f"{folder} holds a {about['kind']} model, but this program is for {kind} models")
            for name, digest in about["sha256"].items():
                if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                    raise BadModel(f"{folder / name} is damaged: it is not what was written")
        except OSError as error:
            raise BadModel(
                f"{error.filename} cannot be read ({error.strerror}): {folder} holds no whole model"
            ) from None
        except (ValueError, LookupError, TypeError, AttributeError):
            raise BadModel(f"{folder / DESCRIPTION} is damaged: it is not what was written") from None
        self.about = about
        special = about["special"]
        self.special = Special(pad=special["pad"], eos=special["eos"], unk=special["unk"])
        self.source = Words(folder / about["dictionaries"]["source"], special["symbols"])
        self.target = Words(folder / about["dictionaries"]["target"], special["symbols"])
        self.pieces = load_pieces(folder, about["subwords"])
        self._sessions = {name: _session(folder / file, threads) for name, file in about["graphs"].items()}

    def run(self, graph: str, **inputs: Any) -> dict[str, Any]:
        """The outputs of a graph by name. Inputs and outputs are onnxruntime's values, which are not copied."""
        session = self._sessions[graph]
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run_with_ort_values(names, inputs)))

    def encode(self, line: str) -> list[int]:
        """Numbers of a line's pieces, without an end."""
        return self.source.numbers(self.pieces.encode(line), self.special.unk)

    def decode(self, numbers: Sequence[int]) -> str:
        """The line of these pieces, without start and end."""
        left_out = (self.about["special"]["bos"], self.special.eos)
        return self.pieces.decode(self.target.text(numbers, left_out))

    def translate(self, sentences: Sequence[list[int]], options: SearchOptions) -> list[list[Hypothesis]]:
        """The best translations of each sentence, given by numbers without an end. Raises ValueError: too long."""
        pad, eos = self.special.pad, self.special.eos
        length = max(map(len, sentences)) + 1
        if length > self.about["max_source_positions"]:
            allowed = self.about["max_source_positions"] - 1
            raise ValueError(f"a sentence has {length - 1} pieces, this model can read {allowed}")
        source = np.array([[pad] * (length - 1 - len(words)) + [*words, eos] for words in sentences], np.int64)
        max_len = longest(options, length, self.about["max_target_positions"])
        kept = self.run("encoder", source_tokens=_value(source))
        decoder = Decoding(self, "decoder_step", self._empty(len(sentences)), kept, np.zeros(len(sentences), np.int64))
        starts = np.full(len(sentences), eos, np.int64)
        return search(decoder, starts, len(self.target), max_len, self.special, options)

    def go_on(self, prompts: Sequence[list[int]], options: SearchOptions) -> list[list[Hypothesis]]:
        """The best continuations of each text, given by numbers. Lengths and scores are of what comes after it.

        Raises ValueError: too long.
        """
        texts = [[self.about["special"]["start"], *words] for words in prompts]
        length = max(map(len, texts))
        positions = self.about["max_target_positions"]
        if length > positions:
            raise ValueError(f"a text has {length - 1} pieces, this model can read {positions - 1}")
        max_len = longest(options, 1, positions - length + 1)
        rows = len(texts)
        states = self._empty(rows)
        read = np.array([[*words[:-1], *[self.special.pad] * (length - len(words))] for words in texts], np.int64)
        if length > 1:
            states = self.run("prompt", tokens=_value(read), position=_value(np.zeros(rows, np.int64)), **states)
            states = {name.removesuffix(".new"): state for name, state in states.items()}
        decoder = Decoding(self, "step", states, {}, np.array([len(words) - 1 for words in texts]))
        starts = np.array([words[-1] for words in texts])
        return search(decoder, starts, len(self.target), max_len, self.special, options)

    def _empty(self, rows: int) -> dict[str, Any]:
        """States of so many rows that have read nothing."""
        return {name: _value(np.zeros((rows, *shape), np.float32)) for name, shape in self.about["states"].items()}


class Decoding:
    """A decoder of a model for the search, with what it keeps of sources and of words so far.

    ``states`` have a row for each sentence; ``positions``, (sentences,): how many words were before.
    """

    def __init__(
        self, model: ExportedModel, graph: str, states: dict[str, Any], kept: dict[str, Any], positions: Ints
    ) -> None:
        self._model = model
        self._graph = graph
        self._states = states
        self._kept = kept
        self._positions = positions
        self._step = 0

    def step(self, tokens: Ints, order: Ints) -> Floats:
        beam = len(tokens) // len(self._positions)
        outputs = self._model.run(
            self._graph,
            tokens=_value(tokens),
            position=_value(np.repeat(self._positions + self._step, beam)),
            order=_value(order),
            **self._states,
            **self._kept,
        )
        self._states = {name: outputs[f"{name}.new"] for name in self._states}
        self._step += 1
        return outputs["log_probabilities"].numpy()

    def keep(self, sentences: Ints) -> None:
        self._positions = self._positions[sentences]
        self._kept = {name: _value(value.numpy()[sentences]) for name, value in self._kept.items()}


def _value(array: Any) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def _session(file: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no common type for what it raises
        reason = " ".join(str(error).split())
        raise BadModel(
            f"{file} cannot be run by this onnxruntime, {onnxruntime.__version__}: take a later one, or export the "
            f"model with --linear-attention plain ({reason})"
        ) from None
