"""The pages for readers: their commands run as they are printed, and their links, code and figures hold."""

import csv
import os
import random
import re
import statistics
import subprocess
from pathlib import Path

import forked_python
import pytest
import torch
from conftest import ROOT, Run, find_script

from fwp_fairseq.ops import fast_weight_scan, native

README, REFERENCE = ROOT / "README.md", ROOT / "fwp_fairseq" / "REFERENCE.md"
PAGES = [README, *sorted(page for part in ("fwp_fairseq", "recipes", "tests") for page in (ROOT / part).rglob("*.md"))]
COMMANDS = ("preprocess", "train", "generate", "interactive", "eval-lm", "hydra-train")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def test_the_first_page_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in found:
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", x.lower()).replace(" ", "-") for x in headings}, link


@pytest.mark.parametrize("rule", ["sum", "delta", "gated-delta"])
def test_the_loop_of_the_first_page_is_what_the_operator_computes(rule: str) -> None:
    names = {"torch": torch}
    exec(blocks(README, "python")[0], names)
    k, q = torch.rand(2, 30, 6).softmax(-1)
    v, beta, alpha, one = torch.randn(30, 5), torch.rand(30), torch.rand(30), torch.ones(30)
    gates = {"sum": (one, 0 * one, one), "delta": (beta, beta, one), "gated-delta": (beta, beta, alpha)}[rule]
    found = names["fast_weights"](q, k, v, *gates)
    expected, _ = fast_weight_scan(*(x[None, None] for x in (q, k, v, *gates)))
    torch.testing.assert_close(found, expected[0, 0])


# --- Commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With sentences in two languages, in which each word has one translation."""
    folder = tmp_path_factory.mktemp("pages")
    words = random.Random(1)
    for part, count in (("train", 200), ("valid", 20), ("test", 20)):
        sentences = [[words.randrange(10) for _ in range(words.randint(2, 5))] for _ in range(count)]
        for lang, name in (("en", "{}ing"), ("de", "ge{}t")):
            lines = [" ".join(name.format("bcdfghklmn"[i]) for i in s) for s in sentences]
            (folder / f"{part}.{lang}").write_text("\n".join(lines) + "\n")
    programs = folder / "programs"
    programs.mkdir()
    # As installed, but started by forked_python, which has imported fairseq.
    for name in ("subword-nmt", *(f"fairseq-{command}" for command in COMMANDS), "python"):
        script = f'"{find_script(name)}"' if name != "python" else ""
        (programs / name).write_text(f'#!/bin/sh\nexec "{forked_python.path()}" {script} "$@"\n')
        (programs / name).chmod(0o755)
    return folder


def bash(folder: Path, script: str) -> str:
    path = f"{folder / 'programs'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def translated(folder: Path) -> str:
    """What the first page's commands print that lead from sentences to a score; of so few, three epochs will do."""
    (commands,) = blocks(README, "bash")
    assert "--max-epoch 20" in commands
    return bash(folder, commands.replace("--max-epoch 20", "--max-epoch 3"))


def test_the_first_pages_commands_lead_from_sentences_to_bleu(folder: Path, translated: str) -> None:
    assert re.search(r"^Generate test with beam=5: BLEU = [\d.]+ ", translated, re.MULTILINE)
    generated = re.findall(r"^D-\d+\t\S+\t(.*)$", (folder / "results" / "generate-test.txt").read_text(), re.MULTILINE)
    (one,) = re.findall(r"^D-0\t\S+\t(.*)$", translated, re.MULTILINE)
    assert len(generated) == 20 and "@@" not in "".join([*generated, one])


def test_the_references_commands_train_language_models_that_go_on_with_a_text_and_train_by_hydra(
    folder: Path, translated: str
) -> None:
    (configuration,) = blocks(REFERENCE, "yaml")
    (folder / "translation.yaml").write_text(configuration.replace("max_epoch: 20", "max_epoch: 2"))
    commands = "fwp=$(python -m fwp_fairseq)\n" + "".join(blocks(REFERENCE, "bash"))
    printed = bash(folder, commands.replace("--max-epoch 10", "--max-epoch 2"))
    for trained in ("lm", "by-hydra", "streaming"):
        assert (folder / trained / "checkpoint_best.pt").exists()
    texts = re.findall(r"^D-(\d)\t\S+\t(\S.*)$", printed, re.MULTILINE)
    lines = (folder / "test.de").read_text().splitlines()
    assert [number for number, _ in texts] == ["0", "0", "1", "2"]
    assert texts[0][1].startswith(" ".join(lines[0].split()[:2])) and texts[1][1].startswith(lines[0])
    assert re.search(r"^perplexity: \d", printed, re.MULTILINE)


@pytest.mark.parametrize(
    "message, command",
    [
        ("KeyError: \"'_name'\"", "fairseq-generate data-bin --path average.pt"),
        (
            "Weights only load failed",
            "python -c \"import argparse, torch; torch.save(argparse.Namespace(), 'own.pt')\"\n"
            "fairseq-generate data-bin --path own.pt",
        ),
        ("invalid choice: 'fwp_transformer'", "fairseq-train data-bin --arch fwp_transformer"),
        (
            "Must specify batch size",
            'fairseq-train data-bin --user-dir "$(python -m fwp_fairseq)" --arch fwp_transformer',
        ),
        ("Could not infer language pair", "fairseq-train checkpoints --arch transformer --max-tokens 500"),
    ],
)
def test_messages_are_what_the_first_page_says(message: str, command: str, folder: Path, translated: str) -> None:
    assert f"| `{message}` |" in README.read_text()
    assert message in bash(folder, f"{command} 2>&1 || true")


def test_a_memory_without_compiled_operators_says_what_the_first_page_says(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "unavailable", "they were not built")
    monkeypatch.setattr(native, "_noted", False)
    fast_weight_scan(*torch.rand(3, 1, 1, 2, 4))
    (message,) = re.findall(r"\| `(fast weights [^`]*)` \|", README.read_text())
    assert message in caplog.text


# What a command of the pages begins with, and the test file that runs it, or why none does.
RUN_BY = {
    "bash recipes/ui_strings/": "test_ui_strings_recipe.py",
    "bash recipes/wikitext103/": "test_wikitext103_recipe.py",
    "bash recipes/wmt14_en_de/": "test_wmt14_recipe.py",
    "bash recipes/synthetic_retrieval/": "test_synthetic_recipe.py",
    "bash recipes/state_tracking/": "test_state_tracking.py",
    "bash recipes/benchmark/gpu.sh": "test_benchmark_gpu_script.py",
    "fairseq-hydra-train --config-dir recipes/wikitext103": "test_wikitext103_recipe.py",
    "fairseq-train --user-dir fwp_fairseq --task associative_retrieval": "test_synthetic_task.py",
    "torchrun --nproc_per_node 2": "test_end_to_end.py",
    "python -m fwp_fairseq": "test_package.py",
    "python -m fwp_fairseq.average_checkpoints": "test_end_to_end.py",
    "python -m fwp_fairseq.eval_lm": "test_eval_lm.py",
    "python -m fwp_fairseq.export_onnx": "test_onnx_translate.py",
    "python -m fwp_fairseq.inspect": "test_inspect.py",
    "python -m fwp_fairseq.safetensors_checkpoint": "test_onnx_translate.py",
    "python recipes/onnx/translate.py": "test_onnx_translate.py",
    "python recipes/pictures/memory.py": "test_readme.py",
    "python recipes/ui_strings/report.py table": "test_ui_strings_recipe.py",
}
NOT_RUN = {
    "bash tests/": "runs tests",
    "python -m pytest": "runs tests",
    "python tests/campaigns/": "takes hours",
    "fairseq-eval-lm --tokens-per-sample L": "a form, which recipes/wikitext103/evaluate.sh fills in",
    "pip install": "the environment of the tests is installed so",
    "python setup.py build_ext": "the operators of the tests are built so",
    "bash recipes/benchmark/run.sh": "measures for half an hour",
    "bash recipes/benchmark/decode.sh": "measures for more than an hour",
    "python recipes/synthetic_retrieval/speed.py": "measures",
    "python recipes/onnx/agreement.py": "needs a trained model and minutes",
    "python recipes/ui_strings/alignment.py": "needs nltk, which is not in the environment of the tests",
    "export TRITON_PTXAS_PATH": "needs a GPU",
}


def commands_of(page: Path) -> list[str]:
    """In indented blocks, and within lines; what is in fenced blocks is run as it is."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE).replace("\\\n", "")
    lines = re.findall(r"^ {4,}(.*)$", text, re.MULTILINE) + re.findall(r"`([^`\n]+)`", text)
    commands = [command.strip() for line in lines for command in line.split(" && ")]
    commands = [re.sub(r"^(OMP_NUM_THREADS=1|CUDA_VISIBLE_DEVICES=\S*) ", "", x) for x in commands]
    started = re.compile(r"(bash|pip install|torchrun|export|fairseq-\S+) \S|python3? (-m \S+|\S+\.py)")
    return [x for x in commands if started.match(x)]


def test_every_command_of_the_pages_is_run_by_a_test_or_says_why_not() -> None:
    unknown = []
    for page in PAGES:
        for command in commands_of(page):
            if not any(command.startswith(start) for start in (*RUN_BY, *NOT_RUN)):
                unknown.append(f"{page.relative_to(ROOT)}: {command}")
    assert not unknown, "\n".join(unknown)
    everything = "\n".join(command for page in PAGES for command in commands_of(page))
    assert not [start for start in (*RUN_BY, *NOT_RUN) if start not in everything]
    for start, name in RUN_BY.items():
        # That file speaks of what it runs: of the recipe's folder, or of the module.
        what = re.split(r"[ ./]", start.removesuffix("/").removesuffix(".sh").removesuffix(".py"))[-1]
        assert what.lstrip("-") in (ROOT / "tests" / name).read_text(), (start, name)


def test_the_picture_of_the_first_page_is_drawn(tmp_path: Path, run: Run) -> None:
    run("python", ROOT / "recipes" / "pictures" / "memory.py", "--output", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory-dark.png", "memory-light.png"]


@pytest.mark.parametrize("page", [README, ROOT / "recipes" / "ui_strings" / "README.md"], ids=["first", "recipe"])
def test_the_table_of_translation_is_that_of_the_results(page: Path) -> None:
    with (ROOT / "recipes" / "ui_strings" / "results" / "three_seeds.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    spread = r"([\d.]+) ± ([\d.]+)"
    # The recipe's has more columns between them.
    row = rf"^\| ([^|]+) \| ([^|]+) \| {spread} \|(?:[^|]*\|)*? {spread} \|$"
    rows = re.findall(row, page.read_text(), re.MULTILINE)
    assert len(rows) >= 4
    for attention, places, *figures in rows:
        runs = [x for x in lines if (x["attention"], x["places"]) == (attention, places)]
        bleu, nll = ([float(x[name]) for x in runs] for name in ("bleu", "valid_nll"))
        assert len(runs) == 3, attention
        expected = [f"{f(bleu):.1f}" for f in (statistics.mean, statistics.stdev)]
        expected += [f"{f(nll):.3f}" for f in (statistics.mean, statistics.stdev)]
        assert figures == expected, attention
