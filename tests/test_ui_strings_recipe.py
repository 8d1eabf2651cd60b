"""recipes/ui_strings/*.sh on a miniature archive of wheels, with the Python and the packages that run the tests."""

import csv
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("babel")
import recipe_scripts  # noqa: E402
from recipe_scripts import AWKWARD, environment  # noqa: E402
from test_ui_strings_collect import DE, RECIPE, catalogue, make_wheel, phrases  # noqa: E402

SMALL = ["--vocab-size", "70", "--valid-size", "10", "--test-size", "10", "--epochs", "3"]


def script(name: str, *arguments: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the recipe to its end."""
    return recipe_scripts.script(RECIPE / name, *arguments, stdin=stdin, **variables)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an archive of wheels, in a path with spaces and quotes."""
    home = tmp_path_factory.mktemp("ui_strings") / AWKWARD
    make_wheel(home / "wheels", "app", {DE + ".po": catalogue(phrases(12, 12))})
    return home


@pytest.fixture(scope="module")
def options(home: Path) -> list[str]:
    """The options of run.sh for a small model of this archive."""
    return ["--output", str(home / "out"), "--wheels", str(home / "wheels"), *SMALL]


@pytest.fixture(scope="module")
def killed(home: Path, options: list[str]) -> None:
    """A first run of run.sh, killed with all its processes once its training has a checkpoint."""
    command = ["bash", str(RECIPE / "run.sh"), *options]
    with (home / "killed.log").open("w") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log, env=environment(), start_new_session=True)
        try:
            end = time.monotonic() + 120
            while not list(home.glob("out/models/*/checkpoint_last.pt")) and time.monotonic() < end:
                assert run.poll() is None, (home / "killed.log").read_text()
                time.sleep(0.02)
        finally:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    (checkpoint,) = home.glob("out/models/*/checkpoint_last.pt")
    # What a kill in the middle of a later step would leave.
    (checkpoint.parent / "test.out.new").write_text("half a line")


@pytest.fixture(scope="module")
def first(options: list[str], killed: None) -> subprocess.CompletedProcess[str]:
    """The first run of run.sh that comes to its end."""
    done = script("run.sh", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def snapshot(folder: Path) -> dict[str, int]:
    """Names of the files that training and scoring make, with the times of their last change."""
    kept = ("corpus", "text", "data-bin", "models")
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for part in kept
        for path in (folder / part).rglob("*")
        if path.is_file() and path.name != "settings"
    }


def test_run_ends_with_translations_and_bleu(first: subprocess.CompletedProcess[str], home: Path) -> None:
    lines = first.stdout.splitlines()
    assert re.fullmatch(r"BLEU = \d+\.\d", lines[-1])
    assert sum(line.startswith("ours ") for line in lines) >= 3
    model = home / "out" / (home / "out" / "latest").read_text().strip()
    # All ten of them: fairseq is quick to leave out an incomplete batch.
    assert sum(line.startswith("D-") for line in (model / "test.out").read_text().splitlines()) == 10
    assert any(line.startswith("train | epoch 003 |") for line in lines), "training shows its progress"
    result = json.loads((model / "result.json").read_text())
    assert f"BLEU = {result['bleu']:.1f}" == lines[-1]
    assert result["valid_nll"] > 0


def test_run_leaves_nothing_half_written(first: subprocess.CompletedProcess[str], home: Path) -> None:
    assert not [path for path in (home / "out").rglob("*.*") if path.name.startswith(("settings.", "latest."))]
    assert not list((home / "out" / "models").rglob("*.new"))


def test_a_killed_training_goes_on_from_its_last_epoch(first: subprocess.CompletedProcess[str], home: Path) -> None:
    assert first.stdout.count("done before") == 3
    (log,) = home.glob("out/models/*/train.log")
    resumed = log.read_text().split("fairseq_cli.train | task:")[-1]
    assert re.search(r"Loaded checkpoint .* \(epoch [2-4] ", resumed)
    assert "begin training epoch 1\n" not in resumed
    assert "train | epoch 001" not in first.stdout


def test_a_second_run_does_nothing_again(
    first: subprocess.CompletedProcess[str], home: Path, options: list[str]
) -> None:
    before = snapshot(home / "out")
    again = script("run.sh", *options)
    assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
    assert again.stdout.count("done before") == 5
    assert snapshot(home / "out") == before


def test_translate_gives_a_line_for_each_argument_or_line(
    first: subprocess.CompletedProcess[str], home: Path, tmp_path: Path
) -> None:
    out = ["--output", str(home / "out")]
    sentences = ["Save the file", "", 'Find\nthe  user\'s $HOME "link"', "D-0\t-1\tOpen the folder"]
    given = script("translate.sh", *out, "--", *sentences)
    assert given.returncode == 0, given.stderr
    piped = script("translate.sh", *out, stdin="".join(s.replace("\n", " ") + "\n" for s in sentences))
    assert given.stdout == piped.stdout
    assert len(given.stdout.splitlines()) == 4
    assert given.stdout.splitlines()[1] == ""


def test_translate_answers_each_line_that_somebody_types(
    first: subprocess.CompletedProcess[str], home: Path, tmp_path: Path
) -> None:
    ours, theirs = os.openpty()
    with (tmp_path / "messages").open("w") as messages:
        command = ["bash", str(RECIPE / "translate.sh"), "--output", str(home / "out")]
        typing = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=messages, env=environment())
    os.close(theirs)
    assert typing.stdout is not None
    try:
        for sentence in ("Save the file", "Open the folder"):
            os.write(ours, sentence.encode() + b"\n")
            # The next one is typed when the answer is there.
            assert select.select([typing.stdout], [], [], 120)[0], (tmp_path / "messages").read_text()
            assert typing.stdout.readline().endswith(b"\n")
        os.write(ours, b"\x04")
        assert typing.wait(120) == 0
    finally:
        typing.kill()
        os.close(ours)


def test_translate_with_a_damaged_vocabulary_says_so(
    first: subprocess.CompletedProcess[str], home: Path, tmp_path: Path
) -> None:
    vocabulary = home / "out" / (home / "out" / "latest").read_text().strip() / "spm.model"
    sound = vocabulary.read_bytes()
    vocabulary.write_bytes(sound[: len(sound) // 2])
    try:
        done = script("translate.sh", "--output", str(home / "out"), "--", "Save the file")
    finally:
        vocabulary.write_bytes(sound)
    assert done.returncode != 0 and not done.stdout
    assert "spm.model" in done.stderr


def test_translate_without_a_trained_model_says_so(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        done = script("translate.sh", "--output", str(folder), "Save")
        assert done.returncode != 0
        assert done.stdout == ""
        assert "no trained model" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rule", "hebb"], ["--rule", "hebb", "sum, delta, gated, gated-delta, fwm"]),
        (["--feature-map=cosine"], ["--feature-map", "cosine", "elu, favor, dpfp"]),
        (["--dpfp-nu", "0"], ["--dpfp-nu", "'0'"]),
        (["--epochs", "many"], ["--epochs", "many"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--cross-attention", "none"], ["--cross-attention", "softmax, fast-weight"]),
        (["--no-such-option"], ["--no-such-option"]),
        (["--epochs"], ["--epochs needs a value"]),
        (["--softmax=yes"], ["--softmax takes no value"]),
        (["-x"], ["-x"]),
        (["stray"], ["stray"]),
        (["--model", "../away"], ["--model", "../away"]),
        (["--wheels", "/no/such/folder"], ["--wheels", "/no/such/folder"]),
        (["--threads", "0"], ["--threads"]),
        (["--target-language", "en"], ["--target-language", "'en'"]),
        (["--target-language", "../x"], ["--target-language", "'../x'"]),
        (["--python", "/no/such/python"], ["--python", "/no/such/python"]),
    ],
)
def test_a_bad_option_gives_one_sentence_and_no_work(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    out = tmp_path / "out"
    done = script("run.sh", "--output", str(out), *arguments)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    for word in words:
        assert word in done.stderr
    assert not out.exists() or [path.name for path in out.iterdir()] in ([], [".ui-strings"])


def test_a_bad_environment_variable_gives_one_sentence(tmp_path: Path) -> None:
    done = script("run.sh", "--output", str(tmp_path / "out"), FWP_SOFTMAX="maybe")
    assert done.returncode == 1
    assert "--softmax" in done.stderr and "maybe" in done.stderr


def test_a_combination_that_the_package_rejects_is_rejected_before_any_work(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = script("run.sh", "--output", str(out), "--dpfp-nu", "64")
    assert done.returncode == 1
    assert "--dpfp-nu is 64" in done.stderr and len(done.stderr.splitlines()) == 1
    assert [path.name for path in out.iterdir()] == [".ui-strings"]


def test_files_of_somebody_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data-bin").mkdir()
    done = script("run.sh", "--output", str(tmp_path))
    assert done.returncode == 1
    assert "--output" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["data-bin"]


def test_an_environment_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "pyvenv.cfg").touch()
    done = script("run.sh", "--output", str(tmp_path / "out"), "--venv", str(tmp_path / "env"))
    recipe_scripts.assert_one_sentence(done, f"--venv {tmp_path / 'env'}", "none")
    assert [path.name for path in (tmp_path / "env").iterdir()] == ["pyvenv.cfg"]


@pytest.mark.parametrize("name", ["run.sh", "translate.sh", "compare.sh", "convert.sh", "lm.sh"])
def test_help_lists_every_option_and_does_no_work(name: str, tmp_path: Path) -> None:
    done = script(name, "--help", FWP_OUTPUT=str(tmp_path / "out"))
    assert done.returncode == 0
    assert f"Usage: bash {name}" in done.stdout
    for option in re.findall(r"^option ([a-z-]+)", (RECIPE / name).read_text(), re.MULTILINE):
        assert f"--{option}" in done.stdout
    assert not (tmp_path / "out").exists()


def test_compare_writes_the_same_figures_as_table_and_csv(
    first: subprocess.CompletedProcess[str], home: Path, options: list[str]
) -> None:
    # In the folder of run.sh, whose data it takes over.
    out = home / "out"
    done = script("compare.sh", *options, "--epochs", "1", "--only", "softmax", "--seeds", "7")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done before") == 3
    result = json.loads((out / "models" / "softmax-seed7" / "result.json").read_text())
    assert (out / "compare.csv").read_text().splitlines()[1].split(",")[2:4] == ["7", str(result["bleu"])]
    table = (out / "compare.md").read_text()
    assert done.stdout.endswith(table)
    assert f"| softmax | nowhere | {result['bleu']:.1f} |" in table


def test_another_target_language_is_learned_compared_and_translated_into(tmp_path: Path) -> None:
    french = {"app/locale/fr/LC_MESSAGES/django.po": catalogue(phrases(12, 12))}
    make_wheel(tmp_path / "wheels", "app", french)
    out = ["--output", str(tmp_path / "out")]
    data = ["--wheels", str(tmp_path / "wheels"), "--target-language", "fr"]
    done = script("compare.sh", *out, *data, *SMALL, "--epochs", "1", "--only", "softmax", "--seeds", "7")
    assert done.returncode == 0, done.stdout + done.stderr
    translated = script("translate.sh", *out, "--model", "softmax-seed7", "Save the file")
    assert translated.returncode == 0 and len(translated.stdout.splitlines()) == 1, translated.stderr


def test_a_table_tells_what_differs_from_its_first_row_by_more_than_chance(tmp_path: Path) -> None:
    references = [f"{verb} the {thing} of number {n}" for n, (verb, thing) in enumerate(phrases(12, 12))]
    kinds = {"first": 20, "same": 21, "better": 100}  # percent of what is right
    for kind, right in kinds.items():
        for seed in (1, 2):
            model = tmp_path / "models" / f"{kind}-seed{seed}"
            model.mkdir(parents=True)
            lines = [
                f"S-{n}\tx\nT-{n}\t{y}\nD-{n}\t-1\t{y if n % 100 < right else 'no'}" for n, y in enumerate(references)
            ]
            (model / "test.out").write_text("\n".join([*lines, f"Generate test with beam=5: BLEU = {right}.0 1/2/3/4"]))
            (model / "train.log").write_text("x | valid | epoch 001 | loss 2.0 | nll_loss 1.5\n")
            (model / "result.json").write_text("{}")
    rows = [option for kind in kinds for option in ("--row", kind, "nowhere", kind)]
    command = [
        sys.executable,
        str(RECIPE / "report.py"),
        "table",
        "--output",
        str(tmp_path),
        "--seeds",
        "1",
        "2",
        *rows,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    with (tmp_path / "compare.csv").open(newline="") as file:
        found = {(line["attention"], line["seed"]): line for line in csv.DictReader(file)}
    assert found["first", "1"]["p"] == "" and float(found["same", "1"]["p"]) > 0.05
    assert float(found["better", "2"]["p"]) < 0.01 and found["better", "2"]["chrf"] == "100.0"
    assert (
        "| better | nowhere | 100.0 \u00b1 0.0 | 100.0 \u00b1 0.0 | 0.001, 0.001 | 1.500 \u00b1 0.000 |" in done.stdout
    )


@pytest.mark.parametrize(
    ("option", "value"), [("--only", "hebb"), ("--seeds", "1 x"), ("--seeds", " "), ("--jobs", "0")]
)
def test_compare_rejects_bad_values_before_any_work(tmp_path: Path, option: str, value: str) -> None:
    done = script("compare.sh", "--output", str(tmp_path / "out"), option, value)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_language_model_ends_with_a_continuation_and_its_perplexity(home: Path) -> None:
    options = ["--output", str(home / "lm"), "--vocab-size", "400", "--epochs", "1", "--length", "5"]
    small = ["--decoder-layers", "1", "--max-update", "2"]
    done = script("lm.sh", *options, "--prompt", "The while", "--", *small)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line]
    assert re.match(r"perplexity on held-out text = \d+\.\d+ ", lines[-1])
    assert lines[-2].startswith("The while")


def test_the_parts_of_the_language_model_text_share_no_paragraph(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(RECIPE / "python_text.py"), "--output", str(tmp_path)], check=True)
    parts = [(tmp_path / part).read_text("utf-8").splitlines() for part in ("train", "valid", "test")]
    assert all(len(part) > 20 for part in parts)
    assert len(set().union(*parts)) == sum(map(len, parts))


@pytest.mark.parametrize("path", sorted(RECIPE.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_valid_bash(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
