"""Every allowed combination of rule, feature map and normalisation, trained at ten times a good learning rate.

    PYTHONPATH=.:tests python tests/campaigns/learning_rates.py --folder FOLDER

500 updates of a small translation model with fast weights in all three places at --lr 3e-2, where 3e-3 is what
recipes/ui_strings trains with, without a warm-up or clipping. A training may end in an error of fairseq's, with status
1; what it may not leave is a checkpoint with a parameter that is not finite. FOLDER keeps learning_rates.jsonl, a line
for each combination; a second call does those that are missing.

--also-unbounded adds the rules that erase with --key-normalization none, of which it is known that they diverge.
"""

import argparse
import math
import re
import shutil
import sys
import time
from pathlib import Path

import torch
from campaigns.training import ROOT, add_records, fairseq, load, make_corpus, read_records, run

from fwp_fairseq.modules.key_features import FEATURE_MAPS
from fwp_fairseq.ops import UPDATE_RULES

Combination = tuple[str, str, str, bool]


def train(data: Path, folder: Path, combination: Combination, updates: int, lr: float) -> dict[str, object]:
    """Train; the exit status, the last loss, the message if it failed, and parameters that are not finite."""
    rule, feature_map, normalization, attention_normalization = combination
    options = ["--update-rule", rule, "--feature-map", feature_map, "--key-normalization", normalization]
    options += ["--attention-normalization"] if attention_normalization else []
    options += ["--favor-features", "8"] if feature_map == "favor" else []
    log = folder / "log"
    begin = time.monotonic()
    status = run(
        log,
        fairseq(
            *("train", data, "--user-dir", ROOT / "fwp_fairseq", "--cpu", "--save-dir", folder, "--num-workers", 0),
            *("--arch", "fwp_transformer", "--encoder-layers", 1, "--decoder-layers", 1, "--encoder-embed-dim", 16),
            *("--encoder-ffn-embed-dim", 32, "--encoder-attention-heads", 2, "--decoder-attention-heads", 2),
            *("--encoder-self-attention", "fast-weight", "--cross-attention", "fast-weight", *options),
            *("--optimizer", "adam", "--lr", lr, "--criterion", "cross_entropy", "--batch-size", 16),
            *("--max-update", updates, "--no-epoch-checkpoints", "--save-interval-updates", 50),
            *("--keep-interval-updates", 1, "--log-format", "simple", "--log-interval", 10, "--seed", 1),
            "--disable-validation",
        ),
    )
    messages = log.read_text()
    losses = re.findall(r"\btrain_inner\b.* loss=([\d.einfa-]+)", messages)
    broken = [
        f"{path.name}: {name}"
        for path in sorted(folder.glob("checkpoint*.pt"))
        for name, value in load(path)["model"].items()
        if not value.isfinite().all()
    ]
    lines = messages.strip().splitlines()
    return {
        "combination": combination,
        "status": status,
        "loss": losses[-1] if losses else "",
        "message": "" if status == 0 else lines[-1],
        "broken": broken,
        "checkpoints": len(list(folder.glob("checkpoint*.pt"))),
        "seconds": round(time.monotonic() - begin, 1),
    }


def is_fault(line: dict[str, object]) -> bool:
    """A broken checkpoint, an end with neither success nor an error, or a loss that is no number at a good end."""
    ended_well = line["status"] == 0 and math.isfinite(float(str(line["loss"]) or "nan"))
    ended_with_error = line["status"] == 1 and re.match(r"\w*Error: ", str(line["message"])) is not None
    return bool(line["broken"]) or not (ended_well or ended_with_error)


def main() -> int:
    from campaigns.numerics import COMBINATIONS

    parser = argparse.ArgumentParser(description="Train every combination at ten times a good learning rate.")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--lr", type=float, default=3e-2)
    parser.add_argument("--also-unbounded", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    import fairseq_cli.train  # noqa: F401  (for all forks)

    import fwp_fairseq.models  # noqa: F401

    home = options.folder.resolve()
    data = make_corpus(home / "corpus")
    log = home / "learning_rates.jsonl"
    lines = read_records(log)
    done = {tuple(line["combination"]) for line in lines}
    wanted = list(COMBINATIONS)
    if options.also_unbounded:
        erasing = [name for name, rule in UPDATE_RULES.items() if rule.erases]
        wanted += [(rule, map_, "none", False) for rule in erasing for map_ in FEATURE_MAPS]
    for combination in wanted:
        if combination in done:
            continue
        done.add(combination)
        folder = home / "-".join(map(str, combination))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        lines.append(train(data, folder, combination, options.updates, options.lr))
        add_records(log, lines[-1:])
        if not is_fault(lines[-1]):
            shutil.rmtree(folder)
    ended = [line for line in lines if line["status"] == 0]
    print(f"{len(lines)} combinations: {len(ended)} trained to the end, {len(lines) - len(ended)} ended in an error")
    for line in lines:
        if line["status"] != 0 or is_fault(line):
            print("FAULT" if is_fault(line) else "error", line["combination"], line["message"], line["broken"])
    faults = sum(map(is_fault, lines))
    print(f"{faults} faults; checkpoints with a parameter that is not finite: {sum(bool(x['broken']) for x in lines)}")
    return faults > 0


if __name__ == "__main__":
    sys.exit(main())
