"""Exported models translate and generate as fairseq does: same words, same scores, whatever the search."""

import itertools
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT, Run
from fairseq import models
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.sequence_generator import SequenceGenerator
from fairseq.tasks.translation import TranslationTask
from omegaconf import OmegaConf
from tiny_models import build_lm, build_streaming_lm, build_translation, dictionary, parse, places, tokens

from fwp_fairseq import export_onnx, safetensors_checkpoint
from fwp_fairseq.onnx_export import folder as onnx_folder
from fwp_fairseq.onnx_export.model_graphs import ModelGraphs

RECIPE = ROOT / "recipes" / "onnx"
sys.path.insert(0, str(RECIPE))

import agreement  # noqa: E402
from beam_search import SearchOptions, Special, batches, search, top  # noqa: E402
from exported import BadModel, ExportedModel  # noqa: E402
from pieces import MergedPairs  # noqa: E402

RULES = ("sum", "delta", "gated", "gated-delta")
SEARCHES = [
    SearchOptions(beam=1, max_len_b=9),
    SearchOptions(beam=5, max_len_a=0.5, max_len_b=6),
    SearchOptions(beam=3, max_len_b=12, lenpen=2.0, unkpen=3.0, min_len=4),
    SearchOptions(beam=4, max_len_b=7, lenpen=0.3, unkpen=-2.0),
    SearchOptions(beam=2, max_len_b=10, unnormalized=True),
    SearchOptions(beam=40, max_len_b=5, min_len=0),  # more than there are words
]


def write(model: Any, target: Path, form: str = "plain", opset: int = 18) -> Path:
    """Export a model that was not trained."""
    graphs = ModelGraphs(model, opset, form)
    words = model.decoder.dictionary
    task = SimpleNamespace(
        args=SimpleNamespace(add_bos_token=False),
        cfg=SimpleNamespace(source_lang="a", target_lang="b"),
        source_dictionary=words,
        target_dictionary=words,
    )
    cfg = SimpleNamespace(model=type("Options", (dict,), {"_name": "fwp_transformer"})())
    description = export_onnx.describe(graphs, task, cfg)
    onnx_folder.write_folder(target, graphs.graphs(), {"source": words, "target": words}, None, description, {})
    return target


def sharpen(model: Any, seed: int) -> Any:
    """Random parameters of a size that makes outputs differ, and end early or late."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.7 if parameter.dim() > 1 else 0.3))
        model.decoder.output_projection.weight[2] += 0.2 * (seed % 3)
    return model.eval()


def generator_of(model: Any, options: SearchOptions, **more: Any) -> SequenceGenerator:
    """fairseq's search with these options."""
    return SequenceGenerator(
        [model],
        model.decoder.dictionary,
        beam_size=options.beam,
        max_len_a=options.max_len_a,
        max_len_b=options.max_len_b,
        min_len=options.min_len,
        normalize_scores=not options.unnormalized,
        len_penalty=options.lenpen,
        unk_penalty=options.unkpen,
        **more,
    )


def by_fairseq(model: Any, sentences: Sequence[list[int]], options: SearchOptions) -> list[list[dict[str, Any]]]:
    words = model.decoder.dictionary
    length = max(map(len, sentences)) + 1
    source = torch.tensor([[words.pad()] * (length - 1 - len(s)) + [*s, words.eos()] for s in sentences])
    sample = {"net_input": {"src_tokens": source, "src_lengths": torch.tensor([len(s) + 1 for s in sentences])}}
    return generator_of(model, options).generate([model], sample)


def assert_same(ours: Any, theirs: Any) -> None:
    """That all hypotheses of all sentences are the same, in the same order but for those that tie."""
    assert len(ours) == len(theirs)
    for found, expected in zip(ours, theirs):
        assert len(found) == len(expected)
        np.testing.assert_allclose([h.score for h in found], [float(h["score"]) for h in expected], atol=1e-4)
        by_words = {tuple(h["tokens"].tolist()): h for h in expected}
        for place, hypothesis in enumerate(found):
            words = tuple(hypothesis.tokens.tolist())
            tied = [h for h in expected if abs(float(h["score"]) - hypothesis.score) < 1e-4]
            assert words == tuple(expected[place]["tokens"].tolist()) or len(tied) > 1
            if words in by_words:
                expected_log_p = by_words[words]["positional_scores"].numpy()
                np.testing.assert_allclose(hypothesis.log_probabilities, expected_log_p, atol=1e-4)


SENTENCES = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 4, 4, 4], [], [19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8]]


@pytest.mark.parametrize("feature_map", ["elu", "dpfp", "favor", "tanh"])
@pytest.mark.parametrize("rule", RULES)
def test_translations_and_scores_are_those_of_fairseq(rule: str, feature_map: str, tmp_path: Path) -> None:
    flags = ["--update-rule", rule, "--feature-map", feature_map, "--favor-features", "4"]
    flags += ["--key-normalization", "l2"] if feature_map == "tanh" else []
    combinations = list(itertools.product(["softmax", "fast-weight"], repeat=2))
    draw = random.Random(f"{rule} {feature_map}")
    for seed, (encoder, cross) in enumerate(draw.sample(combinations, 2)):
        flags += ["--encoder-self-attention", encoder, "--cross-attention", cross]
        model = sharpen(build_translation(*flags), seed)
        form = ("plain", "onnxruntime")[seed]
        exported = ExportedModel(write(model, tmp_path / form, form), "translation", threads=1)
        for options in SEARCHES:
            assert_same(exported.translate(SENTENCES, options), by_fairseq(model, SENTENCES, options))


@pytest.mark.parametrize("options", SEARCHES)
def test_the_search_is_fairseqs_for_any_log_probabilities(options: SearchOptions) -> None:
    """Of tables of numbers, among them some that are infinite or not a number, in place of a model."""
    words = 12
    for seed in range(25):
        table = np.random.default_rng(seed).gumbel(size=(5, 16, words, words)).astype(np.float32) * 2
        table[:, :, :, 7] = -np.inf if seed % 3 else np.nan
        decoder = _Tables(table)
        theirs = generator_of(_TableModel(table, words), options).generate(
            None, {"net_input": {"src_tokens": torch.full((5, 3), 4), "src_lengths": torch.full((5,), 3)}}
        )
        max_len = int(options.max_len_a * 3 + options.max_len_b)
        ours = search(decoder, np.full(5, 2), words, max_len, Special(pad=1, eos=2, unk=3), options)
        assert_same(ours, theirs)


class _Tables:
    """A decoder whose next word depends on the sentence, the step and the word before."""

    def __init__(self, table: np.ndarray) -> None:
        self.table, self.sentences, self.now = table, np.arange(len(table)), 0

    def step(self, words: np.ndarray, order: np.ndarray) -> np.ndarray:
        rows = np.repeat(self.sentences, len(words) // len(self.sentences))
        self.now += 1
        return self.table[rows, self.now - 1, words].copy()

    def keep(self, sentences: np.ndarray) -> None:
        self.sentences = self.sentences[sentences]


class _TableModel(torch.nn.Module):
    """The same as a model of fairseq."""

    def __init__(self, table: np.ndarray, words: int) -> None:
        super().__init__()
        self.encoder = _TableEncoder()
        self.decoder = _TableDecoder(table, dictionary(words))

    def max_decoder_positions(self) -> int:
        return 1000

    def get_normalized_probs(self, out: Any, log_probs: bool, sample: Any) -> torch.Tensor:
        return out[0]


class _TableEncoder(torch.nn.Module):
    def forward_torchscript(self, net_input: Any) -> Any:
        return torch.arange(len(net_input["src_tokens"]))

    def reorder_encoder_out(self, out: Any, order: torch.Tensor) -> Any:
        return out[order]


class _TableDecoder(torch.nn.Module):
    def __init__(self, table: np.ndarray, words: Any) -> None:
        super().__init__()
        self.table, self.dictionary = torch.from_numpy(table), words

    def forward(self, words: torch.Tensor, encoder_out: Any) -> Any:
        return self.table[encoder_out, words.size(1) - 1, words[:, -1]][:, None].clone(), None


def test_the_best_of_many_are_the_best() -> None:
    draw = np.random.default_rng(1)
    for size, k in itertools.product((7, 640, 5000), (1, 5, 10)):
        for scores in (draw.normal(size=(3, size)), draw.integers(0, 3, (3, size)), np.full((3, size), -np.inf)):
            best, places_ = top(scores.astype(np.float32), k)
            expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            np.testing.assert_array_equal(places_, expected)
            np.testing.assert_array_equal(best, np.take_along_axis(scores.astype(np.float32), expected, axis=1))


def test_a_batch_gives_what_its_sentences_give_alone(tmp_path: Path) -> None:
    model = sharpen(build_translation(*places("fast-weight")), 3)
    exported = ExportedModel(write(model, tmp_path / "model"), "translation", threads=1)
    together = exported.translate(SENTENCES, SEARCHES[2])
    for sentence, hypotheses in zip(SENTENCES, together):
        (alone,) = exported.translate([sentence], SEARCHES[2])
        assert [h.tokens.tolist() for h in alone] == [h.tokens.tolist() for h in hypotheses]


@pytest.mark.parametrize(("rule", "options"), zip(RULES, SEARCHES))
def test_continuations_are_those_of_the_streaming_task(rule: str, options: SearchOptions, tmp_path: Path) -> None:
    model, task = build_streaming_lm("--update-rule", rule, "--feature-map", "elu")
    sharpen(model, RULES.index(rule))
    exported = ExportedModel(write(model, tmp_path / rule, "onnxruntime"), "language", threads=1)
    texts = [tokens(model, 1, length, seed=length)[0].tolist() for length in (1, 40, 7)]
    for text, found in zip(texts, exported.go_on(texts, options)):
        # What fairseq finds has the text in front.
        sample = {"net_input": {"src_tokens": torch.tensor([[2, *text]])}}
        (theirs,) = task.inference_step(generator_of(model, options), [model], sample)
        for hypothesis in theirs:
            hypothesis["tokens"] = hypothesis["tokens"][len(text) :]
        assert_same([found], [theirs])


def test_a_text_with_positions_goes_on_where_fairseq_goes_on(tmp_path: Path) -> None:
    for flags in ([], ["--decoder-learned-pos"], ["--adaptive-softmax-cutoff", "6,12"]):
        model = build_lm(*flags)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.7)
        exported = ExportedModel(write(model.eval(), tmp_path / "-".join(["lm", *flags[:1]])), "language", threads=1)
        options = SearchOptions(beam=1, max_len_b=8, min_len=8)
        for found, text in zip(exported.go_on([[5, 6, 7], [8]], options), ([5, 6, 7], [8])):
            prefix = torch.tensor([text])
            generator = generator_of(model, SearchOptions(beam=1, max_len_b=len(text) + 8, min_len=len(text) + 8))
            (theirs,) = generator.generate([model], {"net_input": {"src_tokens": prefix}}, prefix_tokens=prefix)
            assert found[0].tokens.tolist() == theirs[0]["tokens"].tolist()[len(text) :]


def test_batches_are_those_of_fairseq() -> None:
    assert [batch.tolist() for batch in batches([3, 1, 3, 2, 1], 2)] == [[1, 4], [3, 0], [2]]


def test_byte_pair_merges_split_words_as_subword_nmt_does(tmp_path: Path) -> None:
    from io import StringIO

    from subword_nmt.apply_bpe import BPE
    from subword_nmt.learn_bpe import learn_bpe

    draw = random.Random(1)
    words = ["".join(draw.choices("abcd\u00e9\u4e2d-", k=draw.randint(1, 9))) for _ in range(400)]
    codes = tmp_path / "codes"
    with codes.open("w", encoding="utf-8") as file:
        learn_bpe(StringIO("\n".join(words[:300])), file, 60)
    for text in (codes.read_text("utf-8"), codes.read_text("utf-8").replace("#version: 0.2\n", "")):
        codes.write_text(text, "utf-8")
        theirs, ours = BPE(StringIO(text)), MergedPairs(codes)
        for word in words:
            assert ours.encode(word) == theirs.process_line(word).strip()
            assert ours.decode(ours.encode(word)) == word


# --- The commands ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    data: Path  # only dictionaries
    text: str


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A checkpoint with random parameters, and lines of its words and others."""
    target = tmp_path_factory.mktemp("checkpoint")
    words = dictionary(30)
    for language in "ab":
        words.save(str(target / f"dict.{language}.txt"))
    sizes = "--encoder-layers 1 --decoder-layers 2 --encoder-embed-dim 16 --encoder-ffn-embed-dim 32 "
    sizes += "--encoder-attention-heads 2 --decoder-attention-heads 2 --share-decoder-input-output-embed"
    args = parse("translation", "fwp_transformer", *sizes.split())
    cfg = convert_namespace_to_omegaconf(args)
    cfg.task.source_lang, cfg.task.target_lang = "a", "b"
    model = sharpen(cfg_model(cfg, words), 1)
    state = {"model": model.state_dict(), "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)}
    torch.save(safetensors_checkpoint.checkpoint_state(**state), target / "checkpoint.pt")
    draw = random.Random(1)
    lines = [" ".join(draw.choices([*words.symbols[4:], "other"], k=draw.randint(1, 12))) for _ in range(60)]
    return Checkpoint(target / "checkpoint.pt", target, "\n".join(lines) + "\n")


def cfg_model(cfg: Any, words: Any) -> Any:
    return models.build_model(cfg.model, TranslationTask(cfg.task, words, words))


@pytest.fixture(scope="module")
def model_folder(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("exported") / "model"
    export_onnx.main(f"--path {checkpoint.path} --output {target} --safetensors".split())
    return target


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program of the recipe where only numpy, onnxruntime and sentencepiece can be imported."""
    packages = tmp_path_factory.mktemp("packages")
    for name in ("numpy", "onnxruntime", "sentencepiece"):
        source = Path(__import__(name).__file__ or "").parent
        (packages / name).symlink_to(source)
        libraries = source.parent / f"{name}.libs"
        if libraries.exists():
            (packages / libraries.name).symlink_to(libraries)

    environment = {"PYTHONPATH": str(packages), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
    for name in ("torch", "fairseq", "fwp_fairseq", "onnx"):
        there = subprocess.run(
            [sys.executable, "-S", "-c", f"import {name}"], env=environment, cwd=packages, capture_output=True
        )
        assert b"No module named" in there.stderr

    def run_bare(script: str, *arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-S", str(RECIPE / script), *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            env=environment,
        )

    return run_bare


def test_the_program_needs_no_torch_and_no_fairseq_and_translates_as_fairseq_interactive(
    checkpoint: Checkpoint, model_folder: Path, run: Run, bare_python: Any
) -> None:
    theirs = run(
        "fairseq-interactive", checkpoint.data, "-s", "a", "-t", "b", "--path", checkpoint.path, "--cpu",
        "--user-dir", "fwp_fairseq",
        "--beam", 3, "--max-len-a", 1.5, "--max-len-b", 5, "--lenpen", 0.7, "--buffer-size", 20, "--batch-size", 7,
        stdin=checkpoint.text,
    )  # fmt: skip
    expected = [line.split("\t")[1:] for line in theirs.stdout.splitlines() if line.startswith("D-")]
    ours = bare_python(
        "translate.py", model_folder, "--beam", 3, "--max-len-a", 1.5, "--max-len-b", 5, "--lenpen", 0.7,
        "--buffer-size", 20, "--batch-size", 7, "--scores", "--threads", 1, stdin=checkpoint.text,
    )  # fmt: skip
    assert ours.returncode == 0, ours.stderr
    found = [line.split("\t") for line in ours.stdout.splitlines()]
    assert [text for _, text in found] == [text for _, text in expected]
    np.testing.assert_allclose([float(s) for s, _ in found], [float(s) for s, _ in expected], atol=2e-4)
    assert bare_python("translate.py", model_folder, "--threads", 1, stdin="").stdout == ""


def test_how_far_fairseq_and_exported_models_agree_can_be_shown(
    checkpoint: Checkpoint, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, other = tmp_path / "source", tmp_path / "other"
    source.write_text(checkpoint.text)
    export_onnx.main(f"--path {checkpoint.path} --output {other} --quantize int8".split())
    capsys.readouterr()
    command = ["--path", str(checkpoint.path), "--source", str(source), "--reference", str(source), "--max-len-b", "9"]
    agreement.main([*command, str(model_folder), str(other)])
    head, fairseq, same, quantized = capsys.readouterr().out.splitlines()
    assert head == "60 lines, beam 5" and re.fullmatch(r"fairseq: BLEU [\d.]+", fairseq)
    assert re.search(
        r"the same words in 60, a tie in 0, others in 0, log-probabilities differ by [\d.]+e-0[5-9] at", same
    )
    assert float(re.search(r"differ by (\S+)", quantized)[1]) > 1e-3
    source.write_text("w1\n")
    with pytest.raises(SystemExit, match="has 60 lines, .* has 1"):
        (tmp_path / "reference").write_text(checkpoint.text)
        agreement.main([*command[:5], str(tmp_path / "reference"), str(model_folder)])


def test_a_line_without_words_gives_an_empty_line(model_folder: Path, bare_python: Any) -> None:
    out = bare_python("translate.py", model_folder, "--threads", 1, stdin="\nba\n  \n").stdout.split("\n")
    assert (out[0], out[2], len(out)) == ("", "", 4) and out[1]


def test_safetensors_become_a_checkpoint_that_translates_alike(
    checkpoint: Checkpoint, model_folder: Path, tmp_path: Path
) -> None:
    back = tmp_path / "back.pt"
    safetensors_checkpoint.main([str(model_folder / "model.safetensors"), "--output", str(back)])
    (model, _, _), (original, _, _) = (
        export_onnx.load_model(path, checkpoint.data) for path in (back, checkpoint.path)
    )
    for name, value in original.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    assert model.decoder.output_projection.weight is model.decoder.embed_tokens.weight
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((model_folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(SystemExit, match="damaged"):
        safetensors_checkpoint.main([str(damaged), "--output", str(back)])


def test_a_model_too_large_for_one_file_has_its_weights_beside_it(tmp_path: Path) -> None:
    graph = ModelGraphs(build_translation(words=200), 18).graphs()["decoder_step"]
    onnx_folder.save_graph(graph, tmp_path / "large.onnx", largest=1000)
    assert (tmp_path / "large.onnx.data").stat().st_size > 200 * 8 * 4
    onnx.checker.check_model(str(tmp_path / "large.onnx"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--opset 5", "--opset is 5, allowed"),
        ("--opset 18 --linear-attention standard", "--opset is 18, allowed with --linear-attention standard"),
        ("--data {empty}", "no dictionaries"),
        ("--output {full}", "not empty"),
        ("--path {full}/file", "not loaded"),
        ("--path {empty}/nothing", "nothing"),
        ("--path {full}/list.pt", "no checkpoint of fairseq"),
        ("--target-lang x", "has no dict.x.txt"),
        ("--bpe-codes {empty}/codes", "no file"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    arguments: str, reason: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    full, empty = tmp_path / "full", tmp_path / "empty"
    for folder in (full, empty):
        folder.mkdir()
    (full / "file").write_text("text")
    torch.save([1], full / "list.pt")
    given = f"--path {checkpoint.path} --output {tmp_path / 'out'} " + arguments
    with pytest.raises(SystemExit, match=reason) as stopped:
        export_onnx.main(given.format(full=full, empty=empty).split())
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "out").exists()


def test_another_architecture_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    state = torch.load(checkpoint.path, weights_only=True)
    state["cfg"]["model"]["_name"] = "transformer"
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(SystemExit, match="architecture transformer, exported are"):
        export_onnx.main(f"--path {tmp_path}/other.pt --data {checkpoint.data} --output {tmp_path}/out".split())


def test_a_damaged_folder_is_refused_by_its_file(model_folder: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(model_folder, tmp_path / name))

    cut = copy("cut")
    (cut / "encoder.onnx").write_bytes((cut / "encoder.onnx").read_bytes()[:-9])
    with pytest.raises(BadModel, match="encoder.onnx is damaged"):
        ExportedModel(cut, "translation")
    gone = copy("gone")
    (gone / "decoder_step.onnx").unlink()
    with pytest.raises(BadModel, match="decoder_step.onnx cannot be read"):
        ExportedModel(gone, "translation")
    for content in ("{", "[]", '{"format": 1}'):
        broken = copy(f"broken{len(content)}")
        (broken / "model.json").write_text(content)
        with pytest.raises(BadModel, match="model.json is damaged"):
            ExportedModel(broken, "translation")
    later = copy("later")
    about = json.loads((later / "model.json").read_text())
    (later / "model.json").write_text(json.dumps({**about, "format": 2}))
    with pytest.raises(BadModel, match="format 2"):
        ExportedModel(later, "translation")
    with pytest.raises(BadModel, match="this program is for language models"):
        ExportedModel(model_folder, "language")
    with pytest.raises(BadModel, match="nowhere"):
        ExportedModel(tmp_path / "nowhere", "language")
