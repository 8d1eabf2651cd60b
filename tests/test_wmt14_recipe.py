"""recipes/wmt14_en_de on a miniature of WMT14's archives: from the archives to table 1."""

import hashlib
import io
import json
import random
import re
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from recipe_scripts import AWKWARD, RECIPES, assert_one_sentence, free_port, script, succeed

pytest.importorskip("sacremoses")
RECIPE = RECIPES / "wmt14_en_de"
SCRIPTS = sorted(RECIPE.glob("*.sh"))

WORDS = """the/das a/ein house/Haus tree/Baum river/Fluss old/alt new/neu well-known/wohl-bekannt green/grün sees/sieht
    takes/nimmt finds/findet has/hat not/nicht and/und under/unter house's/Häuser it/es"""
ENGLISH, GERMAN = zip(*(pair.split("/") for pair in WORDS.split()))
# A line separator of Unicode, and a carriage return, are no ends of lines.
ODD = [("one\u2028two three .", "eins\u2028zwei drei ."), ("a \r b c", "ein \r b c")]
# Empty on one side, and out of proportion.
BAD = [("", "nichts"), ("house", " ".join(["Haus"] * 9))]

SIZES = "--{0}-layers 2 --{0}-embed-dim 16 --{0}-ffn-embed-dim 32 --{0}-attention-heads 2 "
TINY = f"{SIZES.format('encoder')} {SIZES.format('decoder')} --max-update 3 --num-workers 0 --batch-size 16".split()


def pairs(count: int, seed: int) -> list[tuple[str, str]]:
    """Sentences in two artificial languages, word by word."""
    draw = random.Random(seed)
    drawn = [draw.choices(range(len(ENGLISH)), k=draw.randint(3, 9)) for _ in range(count)]
    return [(" ".join(ENGLISH[i] for i in s) + " .", " ".join(GERMAN[i] for i in s) + " .") for s in drawn]


def make_archive(path: Path, members: dict[str, str]) -> None:
    """A .tgz of these files, among others that nobody asked for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, text in {"../outside": "no", "training/europarl-v7.fr-en.fr": "non\n", **members}.items():
            data = text.encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def sides(name: str, text: list[tuple[str, str]]) -> dict[str, str]:
    return {f"{name}.{language}": "".join(pair[i] + "\n" for pair in text) for i, language in enumerate(("en", "de"))}


def sgm(kind: str, language: str, text: list[str]) -> str:
    """A test set as WMT publishes it."""
    segments = "".join(f'<seg id="{i}"> {line} </seg>\n' for i, line in enumerate(text, 1))
    head = f'<{kind} trglang="{language}" setid="newstest2014" srclang="any">\n<doc sysid="ref" docid="1">\n<p>\n'
    return f"{head}{segments}</p>\n</doc>\n</{kind}>\n"


def make_archives(folder: Path) -> None:
    test = [("the old house’s tree &amp; river .", "der alte Baum &amp; Fluss ."), *pairs(11, seed=4)]
    make_archive(folder / "training-parallel-europarl-v7.tgz", sides("training/europarl-v7.de-en", pairs(150, 1) + BAD))
    make_archive(folder / "training-parallel-commoncrawl.tgz", sides("commoncrawl.de-en", pairs(80, 2) + ODD))
    make_archive(folder / "training-parallel-nc-v12.tgz", sides("training/news-commentary-v12.de-en", pairs(70, 3)))
    make_archive(folder / "dev.tgz", sides("dev/newstest2013", pairs(10, seed=5)))
    texts = {
        "test-full/newstest2014-deen-src.en.sgm": sgm("srcset", "any", [pair[0] for pair in test]),
        "test-full/newstest2014-deen-ref.de.sgm": sgm("refset", "de", [pair[1] for pair in test]),
    }
    make_archive(folder / "test-full.tgz", texts)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with archives, in a path with spaces and quotes."""
    home = tmp_path_factory.mktemp("wmt14") / AWKWARD
    make_archives(home / "archives")
    return home


@pytest.fixture(scope="module")
def options(home: Path) -> list[object]:
    archives = home / "archives"
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in archives.iterdir()]
    (home / "sums").write_text("".join(sums))
    return ["--output", home / "out", "--from", archives, "--checksums", home / "sums", "--merges", 60, "--jobs", 2]


@pytest.fixture(scope="module")
def prepared(home: Path, options: list[object]) -> Path:
    """What prepare.sh makes, in a second run, after the first was stopped in the middle."""
    (home / "out").mkdir()
    (home / "out" / ".wmt14-en-de").touch()
    (home / "out" / "data-bin.new").mkdir()
    (home / "out" / "data-bin.new" / "dict.en.txt").write_text("half a file")
    succeed(RECIPE / "prepare.sh", *options)
    return home / "out"


@pytest.fixture(scope="module")
def trained(prepared: Path) -> Path:
    """Two rows, one trained by one process, and one by two on what they take for two machines with one disk."""
    out = ["--output", prepared, "--cpu"]
    two = ["softmax", *out, "--nodes", 2, "--master", "127.0.0.1", "--port", free_port()]
    with ThreadPoolExecutor(2) as pool:
        ranks = [pool.submit(succeed, RECIPE / "train.sh", *two, "--node-rank", i, "--", *TINY) for i in (0, 1)]
        for rank in ranks:
            rank.result()
    succeed(RECIPE / "train.sh", "dpfp-2", *out, "--size", "base", "--", *TINY)
    succeed(RECIPE / "evaluate.sh", *out)
    return prepared


def test_preparing_gives_the_data_of_the_recipe(prepared: Path) -> None:
    for language in ("en", "de"):
        assert len((prepared / "tokens" / f"train.{language}").read_text().splitlines()) == 304
        assert len((prepared / "references" / f"test.{language}").read_text().splitlines()) == 12
    assert (prepared / "tokens" / "test.en").read_text().splitlines()[0] == "the old house &apos;s tree &amp; river ."
    assert "well @-@ known" in (prepared / "tokens" / "train.en").read_text()
    assert "@@ " in (prepared / "pieces" / "test.de").read_text()
    assert (prepared / "data-bin" / "dict.en.txt").read_bytes() == (prepared / "data-bin" / "dict.de.txt").read_bytes()
    assert not list(prepared.rglob("*.new")) and not list(prepared.rglob("*.part"))
    assert not (prepared.parent / "outside").exists()


def test_pairs_out_of_proportion_are_left_out(prepared: Path) -> None:
    def read(folder: str) -> list[tuple[str, str]]:
        english, german = ((prepared / folder / f"train.{language}").read_text() for language in ("en", "de"))
        return list(zip(english.splitlines(), german.splitlines()))

    def is_good(pair: tuple[str, str]) -> bool:
        short, long = sorted(len(side.split()) for side in pair)
        return short > 0 and long / short <= 1.5

    assert read("clean") == [pair for pair in read("pieces") if is_good(pair)]
    assert 200 < len(read("clean")) <= 302


def test_what_is_prepared_is_not_prepared_again(prepared: Path, options: list[object]) -> None:
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    again = succeed(RECIPE / "prepare.sh", *options)
    assert again.count("done before") == 15
    after = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    assert {path for path in after if path.is_file() and after[path] != before.get(path)} == set()


def test_what_is_not_as_it_was_made_is_made_again(prepared: Path, options: list[object]) -> None:
    paths = [prepared / name for name in ("codes", "tokens/test.de", "data-bin/train.en-de.en.bin")]
    sound = [path.read_bytes() for path in paths]
    for path, data in zip(paths, sound):
        path.write_bytes(data[: len(data) // 2])
    again = succeed(RECIPE / "prepare.sh", *options)
    assert again.count("done before") == 15 - 3
    assert [path.read_bytes() for path in paths] == sound


def test_any_number_of_processes_gives_the_same_text(prepared: Path, tmp_path: Path) -> None:
    inputs = [prepared / "raw" / f"{name}.de" for name in ("training/europarl-v7.de-en", "commoncrawl.de-en")]
    inputs.append(prepared / "raw" / "training" / "news-commentary-v12.de-en.de")
    command = [sys.executable, RECIPE / "corpus.py", "tokenize", "--lang", "de", *inputs, tmp_path / "de"]
    subprocess.run(list(map(str, command)), check=True)
    assert (tmp_path / "de").read_bytes() == (prepared / "tokens" / "train.de").read_bytes()


def test_archives_with_another_checksum_are_refused(home: Path, tmp_path: Path) -> None:
    sums = tmp_path / "sums"
    sums.write_text("".join(f"{'0' * 64}  {path.name}\n" for path in (home / "archives").iterdir()))
    done = script(RECIPE / "prepare.sh", "--output", tmp_path / "out", "--from", home / "archives", "--checksums", sums)
    assert_one_sentence(done, "europarl-v7.tgz", "sha256", "0" * 64)
    assert not (tmp_path / "out" / "raw").exists()


def test_scores_are_those_of_tokens_with_compounds_split_and_of_plain_text(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "settings").write_text("elu\nbig\n")
    (model / "train.log").write_text("x | INFO | valid | epoch 007 | valid on 'valid' subset | bleu 1\n")
    plain = ["Das ist ein wohl-bekanntes Haus, nicht wahr?", 'Er sagte: "Es ist alt."', "Drei ganz neue Bäume."]
    # The first reference has its compound split, as Moses' -a does; in the first translation it is whole.
    tokens = [
        "Das ist ein wohl @-@ bekanntes Haus , nicht wahr ?",
        "Er sagte : &quot; Es ist alt . &quot;",
        "Drei ganz neue Bäume .",
    ]
    translations = [tokens[0].replace(" @-@ ", "-"), *tokens[1:]]
    # fairseq writes them in another order than that of the text.
    out = "".join(f"H-{i}\t-0.5\t{translations[i]}\nD-{i}\t-0.5\t{translations[i]}\n" for i in (2, 0, 1))
    for part in ("valid", "test"):
        (model / f"{part}.out").write_text(out)
        (tmp_path / f"{part}.de").write_text("".join(line + "\n" for line in plain))
        (tmp_path / "tokens").mkdir(exist_ok=True)
        (tmp_path / "tokens" / f"{part}.de").write_text("".join(line + "\n" for line in tokens))
    command = [sys.executable, RECIPE / "score.py", model, "--references", tmp_path, "--tokens", tmp_path / "tokens"]
    subprocess.run(list(map(str, command)), check=True)
    result = json.loads((model / "result.json").read_text())
    assert result["epochs"] == 7 and not result["finished"]
    assert result["test"]["tokenized_bleu"] == result["test"]["sacrebleu"] == 100
    (model / "test.out").write_text(out.replace("H-1\t", "X-1\t"))
    lost = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert "lacks some of the translations" in lost.stderr


def test_every_trained_row_is_scored(trained: Path) -> None:
    for name, row in (("base-dpfp-2-seed1", "dpfp-2"), ("big-softmax-seed1", "softmax")):
        result = json.loads((trained / "models" / name / "result.json").read_text())
        assert result["row"] == row and result["finished"] and result["epochs"] >= 1
        assert result["test"]["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
        text = (trained / "models" / name / "result.txt").read_text()
        assert re.search(r"^newstest2014: tokenised BLEU, compounds split = \d+\.\d+$", text, re.MULTILINE)
        assert re.search(r"^newstest2014: sacreBLEU = \d+\.\d+ \(nrefs:1\|.*\)$", text, re.MULTILINE)
    log = (trained / "models" / "big-softmax-seed1" / "train.log").read_text()
    assert "'distributed_world_size': 2" in log and "training on 2 devices" in log


def test_the_best_checkpoint_is_that_of_the_best_validation_bleu(trained: Path) -> None:
    log = (trained / "models" / "base-dpfp-2-seed1" / "train.log").read_text()
    assert re.search(r"\| valid \| .* best_bleu \d", log)


def test_what_is_scored_is_not_scored_again_and_another_training_does_not_replace_it(trained: Path) -> None:
    again = succeed(RECIPE / "evaluate.sh", "--output", trained, "--cpu")
    assert again.count("done before") == 2
    assert again.count("newstest2014: sacreBLEU") == 2
    done = script(RECIPE / "train.sh", "dpfp-2", "--output", trained, "--cpu", "--size", "base", "--", "--lr", "1")
    assert_one_sentence(done, "base-dpfp-2-seed1", "--model")


def test_table_1_has_every_row_of_the_paper_and_what_was_found(trained: Path) -> None:
    printed = succeed(RECIPE / "table1.sh", "--output", trained)
    assert printed == (trained / "table1.md").read_text()
    found = json.loads((trained / "models" / "base-dpfp-2-seed1" / "result.json").read_text())
    figures = [found[part][score] for score in ("tokenized_bleu", "sacrebleu") for part in ("valid", "test")]
    cells = ["dpfp-2", "256", "26.2", "26.9", "base-dpfp-2-seed1", "3", *(f"{figure:.1f}" for figure in figures)]
    assert "| " + " | ".join(cells) + " |" in printed.splitlines()
    assert len(printed.splitlines()) == 2 + 7
    assert (trained / "table1.csv").read_text().count("\n") == 1 + 7


@pytest.mark.parametrize(
    ("machines", "batches", "tokens"),
    [("--gpus 3", 16, 3584), ("--gpus 8", 6, 3584), ("--gpus 5", 10, 3440), ("--gpus 8 --nodes 8 --master x", 1, 2688)],
)
def test_any_number_of_gpus_has_the_same_batch(prepared: Path, machines: str, batches: int, tokens: int) -> None:
    done = succeed(RECIPE / "train.sh", "elu", "--output", prepared, "--dry-run", *machines.split()).splitlines()
    assert done[done.index("--update-freq") + 1] == str(batches)
    assert done[done.index("--max-tokens") + 1] == str(tokens)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("prepare.sh", ["--merges", "0"], ["--merges", "'0'"]),
        ("prepare.sh", ["--from", "/no/such/folder"], ["--from", "/no/such/folder"]),
        ("prepare.sh", ["--checksums", "/no/such/file"], ["--checksums", "/no/such/file"]),
        ("prepare.sh", ["--news-commentary", "v1"], ["--news-commentary", "v12, v9"]),
        ("prepare.sh", ["stray"], ["stray"]),
        ("train.sh", [], ["name one row", "dpfp-4"]),
        ("train.sh", ["dpfp-3"], ["dpfp-3", "favor-256"]),
        ("train.sh", ["elu", "--size", "small"], ["--size", "big, base"]),
        ("train.sh", ["elu", "--gpus", "none"], ["--gpus", "none"]),
        ("train.sh", ["elu", "--nodes", "2"], ["--nodes 2", "--master"]),
        ("train.sh", ["elu", "--node-rank", "1"], ["--node-rank", "--nodes"]),
        ("train.sh", ["elu", "--port", "99999"], ["--port"]),
        ("train.sh", ["elu", "--precision", "int8"], ["--precision", "fp32, fp16"]),
        ("train.sh", ["elu", "--model", "../away"], ["--model", "../away"]),
        ("train.sh", ["elu"], ["no data", "prepare.sh"]),
        ("evaluate.sh", ["--lenpen", "long"], ["--lenpen", "long"]),
        ("evaluate.sh", [], ["no data", "prepare.sh"]),
        ("table1.sh", ["--no-such-option"], ["--no-such-option"]),
    ],
)
def test_a_bad_option_gives_one_sentence_and_no_work(
    tmp_path: Path, name: str, arguments: list[str], words: list[str]
) -> None:
    assert_one_sentence(script(RECIPE / name, "--output", tmp_path / "out", *arguments), *words)
    assert not (tmp_path / "out").exists()


def test_too_many_gpus_for_the_batch_are_refused(prepared: Path) -> None:
    many = ["--gpus", "999", "--dry-run"]
    assert_one_sentence(script(RECIPE / "train.sh", "elu", "--output", prepared, *many), "999 GPUs", "172032")


def test_a_model_that_is_not_trained_is_not_evaluated(prepared: Path) -> None:
    assert_one_sentence(script(RECIPE / "evaluate.sh", "nothing", "--output", prepared), "models/nothing", "train.sh")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_help_lists_every_option_and_does_no_work(path: Path, tmp_path: Path) -> None:
    if path.name == "common.sh":
        return
    printed = succeed(path, "--help", FWP_OUTPUT=str(tmp_path / "out"))
    assert f"Usage: bash {path.name}" in printed
    for option in re.findall(r"^option ([a-z-]+)", path.read_text(), re.MULTILINE):
        assert f"--{option}" in printed
    assert not (tmp_path / "out").exists()
