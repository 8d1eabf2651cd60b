"""Files that are cut short or have bits turned over, given to the commands that read them.

    PYTHONPATH=.:tests python tests/campaigns/damage.py --cases 200 --folder FOLDER

trains a small model; then each case damages a copy of its checkpoint, of a dictionary, or of the binarised test set, in
one of several ways, and translates the test set with it. What may come out: an error with status 1 whose last line
names it ("refused"), or the translations of the sound files ("same"). "other" are translations of another text, which
only binarised data and dictionaries can give, since neither has checksums; "crash" (a signal), "hang" (a minute) and
"huge" (2 GB) may not be. FOLDER keeps damage.jsonl, a line for each case; a second call goes on from there. Status 1 if
there was a crash, a hang, a huge one, or a damaged checkpoint that was used.
"""

import argparse
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from campaigns.training import ROOT, add_records, fairseq, in_child, make_corpus, read_records, run

MODEL = (
    *("--arch", "fwp_transformer", "--encoder-layers", 1, "--decoder-layers", 1, "--encoder-embed-dim", 16),
    *("--encoder-ffn-embed-dim", 32, "--encoder-attention-heads", 2, "--decoder-attention-heads", 2),
)
FILES = ("checkpoint.pt", "checkpoint.pt", "dict.a.txt", "dict.b.txt", "test.a-b.a.bin", "test.a-b.a.idx")
DAMAGES = ("cut", "cut", "one bit", "one bit", "many bits", "zeros", "empty", "other bytes", "longer")
MEMORY = 2 * 2**30


def damage(path: Path, how: str, draw: random.Random) -> None:
    """Spoil a file in place."""
    data = bytearray(path.read_bytes())
    if how == "cut":
        data = data[: draw.randrange(len(data))]
    elif how in ("one bit", "many bits"):
        for _ in range(1 if how == "one bit" else max(8, len(data) // 100)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif how == "zeros":
        start = draw.randrange(len(data))
        end = min(len(data), start + draw.choice([16, 512, 4096]))
        data[start:end] = bytes(end - start)
    elif how == "longer":
        data += draw.randbytes(draw.choice([1, 100, 5000]))
    else:
        data = bytearray(b"" if how == "empty" else draw.randbytes(len(data)))
    path.write_bytes(data)


def translate(folder: Path, log: Path, seconds: float = 60) -> dict[str, Any]:
    """Translate the test set with the files of a folder; what came of it."""

    def work() -> None:
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (virtual_memory() + MEMORY, before[1]))
        fairseq(
            *("generate", folder, "--user-dir", ROOT / "fwp_fairseq", "--cpu", "--path", folder / "checkpoint.pt"),
            *("--beam", 1, "--max-len-b", 10, "--required-batch-size-multiple", 1, "--num-workers", 0),
        )()

    log.write_text("")
    child, end = in_child(log, work), time.monotonic() + seconds
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"outcome": "hang", "message": ""}
        time.sleep(0.01)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    messages = log.read_text(errors="replace")
    # A message may quote the line of a dictionary, with its end.
    errors = re.findall(r"^[\w.]*(?:Error|Exception)\b.*$", messages, re.M)
    last = errors[-1] if errors else messages.strip()[-300:]
    outcome = "crash" if status < 0 else "translated" if status == 0 else "refused" if errors else "unclear"
    if "MemoryError" in last or "not enough memory" in last:
        outcome = "huge"
    return {"outcome": outcome, "message": last[:300], "text": re.findall(r"^[SH]-.*$", messages, re.M)}


def virtual_memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main() -> int:
    parser = argparse.ArgumentParser(description="Damage files and translate with them.")
    parser.add_argument("--cases", type=int, default=200, metavar="N")
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    import fairseq_cli.generate
    import fairseq_cli.train  # noqa: F401  (for all forks)

    import fwp_fairseq.models  # noqa: F401

    home = options.folder.resolve()
    data, sound, case_folder = make_corpus(home / "corpus"), home / "sound", home / "case"
    if not (sound / "checkpoint.pt").exists():
        shutil.rmtree(sound, ignore_errors=True)
        shutil.copytree(data, sound)
        work = fairseq(
            *("train", data, "--user-dir", ROOT / "fwp_fairseq", "--cpu", *MODEL, "--save-dir", home / "model"),
            *("--optimizer", "adam", "--lr", 1e-2, "--criterion", "cross_entropy", "--batch-size", 16, "--max-epoch"),
            *(2, "--no-epoch-checkpoints", "--num-workers", 0, "--seed", 1),
        )
        if run(home / "train.log", work):
            sys.exit(f"the training failed: {home / 'train.log'}")
        shutil.copy(home / "model" / "checkpoint_last.pt", sound / "checkpoint.pt")
    expected = translate(sound, home / "sound.log")
    if expected["outcome"] != "translated":
        sys.exit(f"translation with the sound files failed: {home / 'sound.log'}")
    log = home / "damage.jsonl"
    lines = read_records(log)
    for number in range(len(lines), options.cases):
        draw = random.Random(number)
        name, how = draw.choice(FILES), draw.choice(DAMAGES)
        shutil.rmtree(case_folder, ignore_errors=True)
        shutil.copytree(sound, case_folder)
        damage(case_folder / name, how, draw)
        found = translate(case_folder, home / "case.log")
        if found["outcome"] == "translated":
            found["outcome"] = "same" if found["text"] == expected["text"] else "other"
        found.pop("text", None)
        lines.append({"number": number, "file": name, "damage": how, **found})
        add_records(log, lines[-1:])
    for kind in sorted({line["file"] for line in lines}):
        counts = Counter(line["outcome"] for line in lines if line["file"] == kind)
        print(f"{kind:<16}", ", ".join(f"{count} {name}" for name, count in counts.most_common()))
    faults = [line for line in lines if line["outcome"] in ("crash", "hang", "huge", "unclear")]
    faults += [line for line in lines if line["outcome"] == "other" and line["file"] == "checkpoint.pt"]
    print("\n".join(map(str, faults)))
    print(f"{len(lines)} cases, {len(faults)} faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
