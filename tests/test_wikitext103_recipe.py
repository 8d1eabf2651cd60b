"""recipes/wikitext103 on a miniature of WikiText-103's archive: from the archive to the tables."""

import json
import random
import re
import sys
import zipfile
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Run
from recipe_scripts import AWKWARD, RECIPES, assert_one_sentence, free_port, script, succeed
from tiny_models import build_lm, build_streaming_lm, tokens

from fwp_fairseq.tasks.streaming_language_modeling import read_text

RECIPE = RECIPES / "wikitext103"
sys.path.insert(0, str(RECIPE))

import sliding_window  # noqa: E402
import tables  # noqa: E402

SCRIPTS = [path for path in sorted(RECIPE.glob("*.sh")) if path.name != "common.sh"]
ROWS = sorted(path.stem for path in (RECIPE / "config" / "row").iterdir())
WORDS = [f"{first}{second}" for first in "bdfgklmnprst" for second in ("a", "e", "i", "o")]

CUTOFFS = ["--adaptive-input-cutoff", "10,20,40", "--adaptive-softmax-cutoff", "10,20,40"]
SIZES = {"layers": 2, "embed-dim": 16, "ffn-embed-dim": 32, "attention-heads": 2}
TINY = [*(f"--decoder-{name}={value}" for name, value in SIZES.items()), "--tokens-per-sample=16", "--max-update=6"]
TINY += ["--warmup-updates=2", "--lr=1e-2", "--num-workers=0"]


def article(draw: random.Random) -> str:
    """Text as it is in WikiText: headings between equals signs, empty lines, rare words replaced."""
    sentences = [" ".join(draw.choices([*WORDS, "<unk>", ","], k=draw.randint(4, 12))) for _ in range(6)]
    return " \n = Title = \n \n" + "".join(f" {sentence} . \n" for sentence in sentences)


def make_archive(folder: Path) -> None:
    """WikiText-103's archive, but small, and with a file that nobody asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(1)
    with zipfile.ZipFile(folder / "wikitext-103-v1.zip", "w") as archive:
        archive.writestr("../outside", "no")
        for part, articles in (("train", 30), ("valid", 2), ("test", 3)):
            text = "".join(article(draw) for _ in range(articles))
            archive.writestr(f"wikitext-103/wiki.{part}.tokens", text)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the archive, in a path with spaces and quotes."""
    home = tmp_path_factory.mktemp("wikitext") / AWKWARD
    make_archive(home / "archives")
    return home


@pytest.fixture(scope="module")
def prepared(home: Path) -> Path:
    out = home / "out"
    succeed(RECIPE / "prepare.sh", "--output", out, "--from", (home / "archives").as_uri(), "--jobs", 1)
    return out


@pytest.fixture(scope="module")
def trained(prepared: Path) -> Path:
    """Two rows, one trained by one process and one by two, with pieces as words."""
    out = ["--output", prepared, "--cpu"]
    archives = (prepared.parent / "archives").as_uri()
    pieces = [*out, "--bpe", 30, "--gpus", 2, "--port", free_port(), "--size", "medium"]
    with ThreadPoolExecutor(1) as pool:
        words = pool.submit(succeed, RECIPE / "train.sh", "delta-elu", *out, "--", *TINY, *CUTOFFS)
        succeed(RECIPE / "prepare.sh", "--output", prepared, "--from", archives, "--bpe", 30)
        succeed(RECIPE / "train.sh", "sum-favor", *pieces, "--", *TINY)
        words.result()
    succeed(RECIPE / "evaluate.sh", *out, "--window", 16)
    return prepared


def result(prepared: Path, name: str) -> dict[str, Any]:
    return json.loads((prepared / "models" / name / "result.json").read_text())


def test_preparing_gives_every_word_its_entry(prepared: Path) -> None:
    words = {line.rsplit(" ", 1)[0] for line in (prepared / "data-bin" / "words" / "dict.txt").read_text().splitlines()}
    assert set(WORDS) | {"=", "Title", ".", ","} <= words
    # It is the dictionary's own.
    assert "<unk>" not in words
    text = (prepared / "raw" / "wikitext-103" / "wiki.test.tokens").read_text()
    count = json.loads((prepared / "data-bin" / "words" / "words.json").read_text())["wiki.test.tokens"]
    assert count == len(text.split()) + text.count("\n")
    assert not (prepared / "outside").exists() and not (prepared.parent / "outside").exists()


def test_what_is_prepared_is_not_prepared_again(prepared: Path) -> None:
    again = succeed(RECIPE / "prepare.sh", "--output", prepared, "--from", (prepared.parent / "archives").as_uri())
    assert again.count("done before") == 3


def test_pieces_leave_unknown_words_whole(trained: Path, home: Path) -> None:
    archives = (home / "archives").as_uri()
    succeed(RECIPE / "prepare.sh", "--output", trained, "--from", archives, "--sentencepiece", 30)
    for name in ("bpe-30", "sentencepiece-30"):
        pieces = (trained / "pieces" / name / "train").read_text()
        assert len(pieces.splitlines()) == 30 * 9
        assert len(pieces.split()) > len((trained / "raw" / "wikitext-103" / "wiki.train.tokens").read_text().split())
        assert (trained / "data-bin" / name / "dict.txt").exists()
    assert " <unk> " in (trained / "pieces" / "bpe-30" / "train").read_text()


def test_the_public_archive_has_its_published_checksum(home: Path, tmp_path: Path) -> None:
    sums = ["--checksums", RECIPE / "md5sums"]
    done = script(RECIPE / "prepare.sh", "--output", tmp_path / "out", "--from", home / "archives", *sums)
    assert_one_sentence(done, "wikitext-103-v1.zip", "md5", "9ddaacaf6af0710eda8c456decff7832")


def test_every_trained_row_is_evaluated(trained: Path) -> None:
    words, pieces = result(trained, "small-delta-elu-seed1"), result(trained, "medium-sum-favor-bpe-30-seed1")
    assert words["row"] == "delta-elu" and words["finished"] and words["epochs"] >= 1 and words["updates"] == 6
    # 2 layers of 2 heads with memories of 8 x 8, and of 2 m x (8 + 1) with attention normalisation, m = 16.
    assert words["state"] == 2 * 2 * 8 * 8 and pieces["state"] == 2 * 2 * 32 * 9
    assert words["parameters"] > 0 and words["words_per_second"] > 0
    assert words["test"]["perplexity_per_word"] == pytest.approx(words["test"]["perplexity"], abs=2e-3)
    assert pieces["test"]["perplexity_per_word"] > pieces["test"]["perplexity"] > 1
    assert pieces["test"]["tokens"] > words["test"]["tokens"]
    assert (
        "'distributed_world_size': 2"
        in (trained / "models" / "medium-sum-favor-bpe-30-seed1" / "train.log").read_text()
    )


def test_what_is_evaluated_is_not_evaluated_again_and_another_training_does_not_replace_it(trained: Path) -> None:
    again = succeed(RECIPE / "evaluate.sh", "small-delta-elu-seed1", "--output", trained, "--cpu", "--window", 16)
    assert again.count("done before") == 1
    assert re.search(r"small-delta-elu-seed1: test perplexity = \d+\.\d\d \(\d+ tokens\)", again)
    assert_one_sentence(
        script(RECIPE / "train.sh", "delta-elu", "--output", trained, "--cpu"), "small-delta-elu-seed1", "--model"
    )


def test_the_tables_have_every_row_of_the_paper_and_what_was_found(trained: Path) -> None:
    printed = succeed(RECIPE / "tables.sh", "--output", trained)
    assert printed == (trained / "tables.md").read_text()
    found = result(trained, "small-delta-elu-seed1")
    figures = [found["valid"]["perplexity_per_word"], found["test"]["perplexity_per_word"]]
    cells = [
        "small",
        "delta-elu",
        "34.1",
        "35.5",
        "small-delta-elu-seed1",
        found["epochs"],
        found["parameters"],
        found["state"],
    ]
    line = "| " + " | ".join(map(str, cells)) + f" | {figures[0]:.2f} | {figures[1]:.2f} |"
    assert line in printed.splitlines()
    assert "| medium | sum-elu-streaming | > 260 | > 260 |" in printed
    # A line for each figure of the paper; of the two runs each is in one of them.
    lines = (trained / "tables.csv").read_text().splitlines()
    assert len(lines) == 1 + sum(map(len, tables.PAPER.values()))


# --- Evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("flags", ["--decoder-self-attention softmax", "--update-rule delta --feature-map elu"])
def test_a_sliding_window_scores_each_token_once_with_its_context(adaptive: bool, flags: str) -> None:
    tied = ["--adaptive-input", "--tie-adaptive-weights"]
    tied += [f"--adaptive-{of}-{name}" for of in ("input", "softmax") for name in ("factor=1", "cutoff=8,14")]
    model = build_lm(*flags.split(), *(tied if adaptive else []), words=20).eval()
    text = tokens(model, 1, 23)[0]
    eos = 2
    window = 6

    def naive(position: int) -> float:
        """-log p of one token given what the window has before it, from the scores of all words at all positions."""
        start = max(0, position + 1 - window)
        inputs = torch.cat([torch.tensor([eos]), text])[start : position + 1]
        with torch.no_grad():
            scores = model.get_normalized_probs(model(inputs[None]), log_probs=True)
        return -float(scores[0, -1, text[position]])

    expected = sum(naive(position) for position in range(len(text)))
    for batch in (1, 4, 100):
        found = sliding_window.evaluate(model.decoder, text, eos, window, batch)
        assert found == pytest.approx(expected, rel=1e-5)
    # A window that is longer than the text is one window.
    with torch.no_grad():
        scores = model.get_normalized_probs(model(torch.cat([torch.tensor([eos]), text[:-1]])[None]), log_probs=True)
    whole = -float(scores[0].gather(1, text[:, None]).sum())
    assert sliding_window.evaluate(model.decoder, text, eos, 99, 4) == pytest.approx(whole, rel=1e-5)


def test_what_a_text_keeps_is_counted_as_streaming_counts_it() -> None:
    model, _ = build_streaming_lm("--short-convolution", "3", "--attention-normalization", "--update-rule", "sum")
    state = read_text(model, torch.tensor([[4, 5, 6, 7]]), segment_length=2)
    assert state
    kept = sum(x.numel() for layer in state for x in layer.values())
    assert sliding_window.state_size(model.decoder, window=9) == kept


def test_fairseq_eval_lm_finds_the_same_with_a_context_window(trained: Path, run: Run) -> None:
    model = trained / "models" / "small-delta-elu-seed1"
    done = run(
        "fairseq-eval-lm",
        *(trained / "data-bin" / "words", "--path", model / "checkpoint_best.pt", "--gen-subset", "valid"),
        *("--user-dir", ROOT / "fwp_fairseq", "--tokens-per-sample", 16, "--context-window", 15, "--batch-size", 8),
        *("--required-batch-size-multiple", 1, "--cpu"),
    )
    found = re.search(r"Perplexity: ([\d.]+)", done.stdout + done.stderr)
    assert found
    assert float(found[1]) == pytest.approx(result(trained, model.name)["valid"]["perplexity"], abs=0.01)


def test_what_the_streaming_evaluation_prints_is_read() -> None:
    lines = [
        "perplexity: 27.4000",
        "tokens: 245569",
        "tokens per second: 1000.0",
        "state: 131072 numbers, 524288 bytes",
    ]
    found = tables.read_streaming("\n".join(lines) + "\n")
    assert found["perplexity"] == 27.4 and found["tokens"] == 245569 and found["state"] == 131072


def test_the_speed_of_a_training_is_that_of_its_middle_epoch(trained: Path, tmp_path: Path) -> None:
    model = trained / "models" / "small-delta-elu-seed1"
    for name in ("settings", "valid.out", "test.out"):
        (tmp_path / name).write_text((model / name).read_text())
    epochs = [f"INFO | train | epoch 00{i} | ppl 9 | wps {wps} | ups 3 |" for i, wps in enumerate((500, 600.5, 7.5))]
    (tmp_path / "train.log").write_text("\n".join(epochs))
    assert tables.read_result(tmp_path, trained / "data-bin" / "words")["words_per_second"] == 500


# --- Python's documentation ------------------------------------------------------------------------------------------


def test_pythons_documentation_is_a_corpus_for_language_models(tmp_path: Path) -> None:
    folder = tmp_path / AWKWARD
    options = ["--output", folder, "--cpu", "--only", "softmax converted-sum continued-softmax"]
    options += ["--pieces", 2000, "--window", 4]
    few = ["--decoder-layers", 1, "--conversion-updates", 2, "--max-update", 2, "--max-valid-steps", 4]
    printed = succeed(RECIPE / "python_docs.sh", *options, "--batch-size", 2048, "--", *few)
    parts = [(folder / "text" / part).read_text().splitlines() for part in ("train", "valid", "test")]
    assert sum(len(line.split()) for part in parts for line in part) > 300_000
    assert len(set().union(*parts)) == sum(map(len, parts))
    table = (folder / "python_docs.md").read_text()
    assert printed.endswith(table)
    _, row, continued = (line.split(" | ") for line in table.splitlines()[2:])
    found = result(folder, "converted-sum-seed1")
    assert row[:3] == ["| converted-sum-seed1", *(f"{found[part]['perplexity_per_word']:.1f}" for part in tables.PARTS)]
    # A matrix of 64 x 16 in each of 8 heads, and what divides what is read of it.
    assert row[4] == "8,704"
    log = (folder / "models" / "converted-sum-seed1" / "train.log").read_text()
    assert re.search(r"\| decoder.layers.\*.self_attn \| .*k_proj.bias.* \| features, features.bias \| - \|", log)
    assert continued[0] == "| continued-softmax-seed1"
    log = (folder / "models" / "continued-softmax-seed1" / "train.log").read_text()
    assert "loading pretrained model from models/softmax-seed1/checkpoint_best.pt: optimizer, lr scheduler" in log
    # The second step of a warm-up of 100 updates to 1e-3.
    assert re.search(r"\| num_updates 2 \| lr 2e-05 \|", log)
    again = succeed(RECIPE / "python_docs.sh", *options, "--batch-size", 2048, "--", *few)
    assert again.count("done before") == 8


# --- Options ---------------------------------------------------------------------------------------------------------


def flags_of(prepared: Path, *arguments: str) -> list[str]:
    """What train.sh gives to fairseq-train."""
    return succeed(RECIPE / "train.sh", *arguments, "--output", prepared, "--cpu", "--dry-run").splitlines()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("size", ["small", "medium"])
def test_hydra_gives_the_models_and_settings_of_the_shell(prepared: Path, size: str) -> None:
    from fairseq import options
    from fairseq.dataclass.initialize import add_defaults, hydra_init
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    import fwp_fairseq.models  # noqa: F401

    hydra_init(size)
    # What a row adds is the same for both sizes.
    for row in ROWS if size == "small" else ROWS[::4]:
        flags = ["data", "--required-batch-size-multiple", "1", "--no-epoch-checkpoints"]
        flags += ["--log-format", "simple", "--log-interval", "200", *flags_of(prepared, row, "--size", size)]
        args: Namespace = options.parse_args_and_arch(options.get_training_parser(), flags)
        shell = OmegaConf.to_container(convert_namespace_to_omegaconf(args), resolve=True, enum_to_str=True)
        with initialize_config_dir(str(RECIPE / "config"), version_base="1.1"):
            cfg = compose(config_name=size, overrides=[f"row={row}", "task.data=data"])
        add_defaults(cfg)
        by_hydra = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
        for section in shell:
            ours, theirs = by_hydra[section], shell[section]
            if isinstance(theirs, dict) and section not in ("bpe", "tokenizer", "scoring"):
                differing = {k: (ours.get(k), theirs[k]) for k in theirs if k != "_name" and ours.get(k) != theirs[k]}
                # Widths that follow another one are filled in when the model is built; what argparse has besides.
                for follows in ("decoder_input_dim", "decoder_output_dim"):
                    differing.pop(follows, None)
                if section == "model" and ours["feature_map"] != "favor":
                    differing.pop("favor_features", None)
                assert not differing, (row, section, differing)


def assert_hydra_trains_the_same(row: str, prepared: Path, run: Run, folder: Path) -> None:
    """fairseq-hydra-train makes the model that train.sh made of this row, small and with TINY's settings."""
    sizes = [f"model.decoder_{name.replace('-', '_')}={value}" for name, value in SIZES.items()]
    cutoffs = [f'model.adaptive_{kind}_cutoff="10,20,40"' for kind in ("input", "softmax")]
    # Hydra's grammar has no quotes in names: a link is in their place.
    (folder / "data").symlink_to(prepared / "data-bin" / "words")
    run(
        "fairseq-hydra-train",
        *("--config-dir", RECIPE / "config", "--config-name", "small", f"row={row}", *sizes, *cutoffs),
        *(f"task.data={folder / 'data'}", "task.tokens_per_sample=16", "common.cpu=true", "dataset.num_workers=0"),
        *("optimization.max_update=6", "optimization.lr=[0.01]", "lr_scheduler.warmup_updates=2"),
        *(f"common.user_dir={ROOT / 'fwp_fairseq'}", f"checkpoint.save_dir={folder / 'hydra'}"),
        f"hydra.run.dir={folder / 'hydra'}",
    )
    paths = (folder / "hydra", prepared / "models" / f"small-{row}-seed1")
    by_hydra, by_shell = (torch.load(p / "checkpoint_last.pt", weights_only=False)["model"] for p in paths)
    assert by_hydra.keys() == by_shell.keys()
    for name, weight in by_shell.items():
        # fairseq's buffers of this name are uninitialised memory.
        assert "_float_tensor" in name or torch.equal(by_hydra[name], weight), name


def test_hydra_trains_the_model_that_the_shell_trains(trained: Path, run: Run, tmp_path: Path) -> None:
    assert_hydra_trains_the_same("delta-elu", trained, run, tmp_path)


def test_rows_of_table_4_stream(prepared: Path) -> None:
    for row, segment in (("delta-elu-streaming", "384"), ("xl-64", "64")):
        flags = flags_of(prepared, row, "--size", "medium")
        assert flags[flags.index("--task") + 1] == "streaming_language_modeling"
        assert flags[flags.index("--tokens-per-sample") + 1] == segment
        assert "--attention-normalization" not in flags
        assert ("--no-token-positional-embeddings" in flags) == (row == "delta-elu-streaming")


@pytest.mark.parametrize(("row", "size"), [("delta-elu-streaming", "small"), ("xl-8", "medium")])
def test_rows_of_table_4_are_trained_and_evaluated(
    prepared: Path, row: str, size: str, run: Run, tmp_path: Path
) -> None:
    out, name = ["--output", prepared, "--cpu"], f"{size}-{row}-seed1"
    succeed(RECIPE / "train.sh", row, "--size", size, *out, "--", *TINY, *CUTOFFS)
    # Another plugin that is installed is not in the way.
    (tmp_path / "fwp_fairseq").mkdir()
    (tmp_path / "fwp_fairseq" / "__init__.py").touch()
    printed = succeed(RECIPE / "evaluate.sh", name, *out, PYTHONPATH=str(tmp_path))
    assert re.search(rf"{name}: test perplexity = \d+\.\d\d", printed)
    found = result(prepared, name)
    assert found["updates"] == 6 and found["test"]["perplexity"] > 1
    # Two layers: two heads with memories of 8 x 8 each; 8 positions of width 16.
    assert found["state"] == 256
    if size == "small":
        assert_hydra_trains_the_same(row, prepared, run, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "batch", "update_freq"),
    [("--gpus 1", 96, 1), ("--gpus 8", 12, 1), ("--gpus 4 --update-freq 3", 8, 3), ("--size medium --gpus 7", 8, 1)],
)
def test_any_number_of_gpus_that_divides_it_has_the_same_batch(
    prepared: Path, arguments: str, batch: int, update_freq: int
) -> None:
    flags = flags_of(prepared, "delta-elu", *arguments.split())
    assert flags[flags.index("--batch-size") + 1] == str(batch)
    assert flags[flags.index("--update-freq") + 1] == str(update_freq)


def test_numbers_of_gpus_that_do_not_divide_the_batch_are_refused(prepared: Path) -> None:
    done = script(RECIPE / "train.sh", "softmax", "--output", prepared, "--gpus", "5", "--dry-run")
    assert_one_sentence(done, "5 GPUs", "96")


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("prepare.sh", ["--bpe", "many"], ["--bpe", "many"]),
        ("prepare.sh", ["--bpe", "9", "--sentencepiece", "9"], ["--bpe", "--sentencepiece"]),
        ("prepare.sh", ["--from", "/no/such/folder"], ["--from", "/no/such/folder"]),
        ("train.sh", [], ["name one row", "delta-dpfp-1"]),
        ("train.sh", ["delta-tanh"], ["delta-tanh", "sum-elu"]),
        ("train.sh", ["softmax", "--size", "large"], ["--size", "small, medium"]),
        ("train.sh", ["softmax", "--epochs", "x"], ["--epochs", "'x'"]),
        ("train.sh", ["softmax", "--update-freq", "0"], ["--update-freq", "'0'"]),
        ("train.sh", ["delta-elu-streaming", "--update-freq", "2"], ["--update-freq is 2", "delta-elu-streaming"]),
        ("train.sh", ["xl-8"], ["xl-8", "--size medium"]),
        ("train.sh", ["softmax"], ["no data", "prepare.sh"]),
        ("evaluate.sh", ["--window", "0"], ["--window", "'0'"]),
        ("evaluate.sh", [], ["no trained model", "train.sh"]),
        ("tables.sh", ["stray"], ["stray"]),
        ("python_docs.sh", ["--minutes", "0"], ["--minutes", "'0'"]),
        ("python_docs.sh", ["--only", "hebb"], ["--only", "hebb", "delta-dpfp-1"]),
    ],
)
def test_a_bad_option_gives_one_sentence_and_no_work(
    tmp_path: Path, name: str, arguments: list[str], words: list[str]
) -> None:
    assert_one_sentence(script(RECIPE / name, "--output", tmp_path / "out", *arguments), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_help_lists_every_option_and_does_no_work(path: Path, tmp_path: Path) -> None:
    printed = succeed(path, "--help", FWP_OUTPUT=str(tmp_path / "out"))
    assert f"Usage: bash {path.name}" in printed
    for option in re.findall(r"^option ([a-z-]+)", path.read_text(), re.MULTILINE):
        assert f"--{option}" in printed
    assert not (tmp_path / "out").exists()
