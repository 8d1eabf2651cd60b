"""recipes/ui_strings/convert.sh asks run.sh for the models that its table is of."""

import csv
import re
import shutil
import statistics
from pathlib import Path

import pytest
from recipe_scripts import AWKWARD, RECIPES, script

# In the place of run.sh: notes what it was asked for, and has a result of it.
STUB = """
printf '%s\\n' "$*" >>"$NOTES"
while [[ $1 != --output ]]; do shift; done; output=$2
while [[ $1 != --model ]]; do shift; done; folder=$output/models/$2
mkdir -p -- "$folder"
printf '%s\\t%s\\n' S-0 'a b c d' T-0 'a b c d' D-0 '-1	a b c d' >"$folder/test.out"
echo 'Generate test with beam=5: BLEU = 30.50 1/2/3/4' >>"$folder/test.out"
echo 'x | valid | epoch 001 | loss 4.0 | nll_loss 3.25' >"$folder/train.log"
echo 'x | train | epoch 001 | train_wall 60' >>"$folder/train.log"
echo '{}' >"$folder/result.json"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A copy of the recipe whose run.sh does nothing, with a folder for what is made beside it."""
    shutil.copy(RECIPES / "common.sh", tmp_path)
    shutil.copytree(RECIPES / "ui_strings", tmp_path / "ui_strings")
    (tmp_path / "ui_strings" / "run.sh").write_text(STUB)
    return tmp_path / "ui_strings"


def test_every_seed_has_a_parent_and_what_is_made_of_it(recipe: Path, tmp_path: Path) -> None:
    output, notes = tmp_path / AWKWARD, tmp_path / "notes"
    arguments = ("--output", output, "--seeds", "1 4", "--epochs", 5, "--", "--dropout", 0.3)
    done = script(recipe / "convert.sh", *arguments, NOTES=str(notes))
    assert done.returncode == 0, done.stderr
    asked = notes.read_text().splitlines()
    for seed, (parent, *made), scratch in zip((1, 4), (asked[:5], asked[5:10]), (asked[10:12], asked[12:])):
        assert f"--model softmax-seed{seed} --seed {seed} --epochs 5 --softmax" in parent and "--dropout" not in parent
        kinds = [f"{places}-{kind}" for places in ("decoder", "all") for kind in ("converted", "finetuned")]
        for kind, line in zip(kinds, made, strict=True):
            assert f"--model {kind}-seed{seed} --seed {seed}" in line
            assert f"--finetune-from-model models/softmax-seed{seed}/checkpoint_best.pt --convert-attention" in line
            assert ("--cross-attention fast-weight" in line) == kind.startswith("all")
            assert ("--encoder-slots 64 --cross-slots 64" in line) == kind.startswith("all")
            assert ("--lr 0 --max-update 1" in line) == kind.endswith("converted") and "--dropout 0.3" in line
        for places, line in zip(("decoder", "all"), scratch, strict=True):
            assert f"--model {places}-scratch-seed{seed} --seed {seed} --epochs 9 --rule sum" in line
            assert ("--cross-attention fast-weight" in line) == ("--cross-slots 64" in line) == (places == "all")
            assert "--finetune-from-model" not in line and "--dropout" not in line
    table = (output / "convert.md").read_text()
    assert done.stdout.endswith(table) and table.count("| 30.5 \u00b1 0.0 | 100.0 \u00b1 0.0 |") == 7
    assert table.count("| 3.250 \u00b1 0.000 | 1.0 \u00b1 0.0 |") == 7
    assert len((output / "convert.csv").read_text().splitlines()) == 1 + 2 * 7


@pytest.mark.parametrize("option, value", [("--seeds", "1 x"), ("--seeds", " "), ("--epochs", "0")])
def test_bad_values_are_refused_before_any_work(recipe: Path, tmp_path: Path, option: str, value: str) -> None:
    done = script(recipe / "convert.sh", "--output", tmp_path / "out", option, value)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_table_of_the_page_is_that_of_the_results() -> None:
    runs: dict[tuple[str, str], list[dict[str, str]]] = {}
    with (RECIPES / "ui_strings" / "results" / "from_softmax.csv").open(newline="") as file:
        for run in csv.DictReader(file):
            runs.setdefault((run["attention"], run["places"]), []).append(run)
    expected = []
    for names, own in runs.items():
        row = [*names, str(len(own))]
        for figure, digits in (("bleu", 1), ("valid_nll", 3)):
            values = [float(run[figure]) for run in own]
            spread = f" \u00b1 {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            row.append(f"{statistics.mean(values):.{digits}f}{spread}")
        expected.append(row)
    _, section = (RECIPES / "ui_strings" / "README.md").read_text().split("## From a softmax model\n")
    table = section[section.index("| attention |") :].split("\n\n")[0]
    rows = re.findall(r"^\| (.*) \|$", table, re.MULTILINE)
    assert [row.split(" | ") for row in rows[2:]] == expected
