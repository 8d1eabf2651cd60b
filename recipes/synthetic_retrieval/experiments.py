"""The runs behind figures 2 to 5 of the paper, what fairseq-train is told for each, and the files of results."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

RECIPE = Path(__file__).resolve().parent
AUTHORS = RECIPE / "authors.csv"
AUTHORS_CURVES = RECIPE / "authors_curves.csv"
RESULTS = "runs.csv"

EVALUATE_EVERY = 100  # updates
TARGET_LOSS = 0.001
# The paper's "10 evaluations without progress" ended a training at the eleventh: in the authors' logs a loss that stays
# as it was at step 100 ends it at step 1200.
PATIENCE = 11
MAX_STEPS = 100_000
KEY_SIZE = 64

FEATURES = {
    "elu": "--feature-map elu",
    "tanh": "--feature-map tanh",
    **{f"favor{m}": f"--feature-map favor --favor-features {m}" for m in (64, 128, 512)},
    **{f"dpfp{nu}": f"--feature-map dpfp --dpfp-nu {nu}" for nu in (1, 2, 3)},
}
_SUM_FEATURES = ("elu", "favor64", "favor128", "favor512", "dpfp1", "dpfp2", "dpfp3")
CAPACITY_MODELS = ("softmax", *(f"{features}_sum" for features in _SUM_FEATURES))
_DELTA_FEATURES = ("elu", "favor64", "favor128", "dpfp1", "dpfp2")
UPDATE_MODELS = ("dpfp1_sum", *(f"{features}_delta" for features in _DELTA_FEATURES), "dpfp1_fwm")


@dataclass(frozen=True, order=True)
class Run:
    """One training. ``model`` is "softmax", or feature map and update rule: "dpfp1_delta"."""

    model: str
    with_replacement: bool
    num_keys: int
    seed: int = 1

    @property
    def name(self) -> str:
        return f"{self.model}-setting{1 + self.with_replacement}-S{self.num_keys}-seed{self.seed}"

    @property
    def seq_len(self) -> int:
        return self.num_keys * (2 if self.with_replacement else 1)

    @property
    def batch_size(self) -> int:
        return 128 if self.model == "tanh_fwm" else 32

    def flags(self, user_dir: str) -> list[str]:
        """The arguments of fairseq-train."""
        learning_rate = 1e-4 if self.model == "tanh_fwm" else 1e-3
        features, _, rule = self.model.partition("_")
        attention = f"--update-rule {rule} {FEATURES[features]}" if rule else "--attention softmax"
        replacement = "--with-replacement" if self.with_replacement else ""
        flags = f"""
            --task associative_retrieval --num-keys {self.num_keys} {replacement}
            --epoch-sequences {EVALUATE_EVERY * self.batch_size} --batch-size {self.batch_size}
            --arch associative_memory {attention} --criterion half_squared_error
            --optimizer adam --lr {learning_rate} --lr-scheduler until_solved --target-loss {TARGET_LOSS}
            --stop-min-lr 0 --patience {PATIENCE} --max-update {MAX_STEPS} --seed {self.seed}
            --no-save --num-workers 0 --log-format json --log-interval {EVALUATE_EVERY} --cpu
        """
        return ["--user-dir", user_dir, *flags.split()]


@dataclass(frozen=True)
class Result:
    """What came of a run: ``curve`` has the evaluation losses after 100, 200, ... updates."""

    seconds: float
    curve: tuple[float, ...]

    @property
    def best(self) -> float:
        return min((loss for loss in self.curve if not math.isnan(loss)), default=math.nan)

    @property
    def last_step(self) -> int:
        return EVALUATE_EVERY * len(self.curve)


@dataclass(frozen=True)
class Figure:
    """Which runs a figure of the paper consists of."""

    models: tuple[str, ...]
    with_replacement: bool
    sizes: tuple[int, ...]
    seeds: tuple[int, ...] = (1,)
    quick_sizes: tuple[int, ...] = ()
    more_models: tuple[str, ...] = ()  # which run only where they are named

    def runs(self, sizes: Iterable[int], seeds: Iterable[int], models: Iterable[str]) -> list[Run]:
        return [Run(model, self.with_replacement, size, seed) for size in sizes for seed in seeds for model in models]


FIGURES = {
    "figure2": Figure(CAPACITY_MODELS, False, tuple(range(20, 601, 20)), quick_sizes=(20, 60, 100, 160, 240)),
    "figure3": Figure(("dpfp1_sum", "dpfp1_delta", "dpfp1_fwm", "tanh_fwm"), True, (20,), (1, 2, 3), (20,)),
    "figure4": Figure(CAPACITY_MODELS, False, (600,), quick_sizes=(240,)),
    # The losses of tanh with FWM, up to 95, are beyond what the figure shows.
    "figure5": Figure(UPDATE_MODELS, True, tuple(range(20, 201, 20)), quick_sizes=(20, 60), more_models=("tanh_fwm",)),
}

FIELDS = [
    *("model", "with_replacement", "num_keys", "seq_len", "seed"),
    *("best_eval_loss", "last_step", "seconds", "eval_losses"),
]


def to_row(run: Run, result: Result) -> list[str]:
    """A line of runs.csv. Its first columns are those of authors.csv."""
    return [
        run.model,
        str(int(run.with_replacement)),
        str(run.num_keys),
        str(run.seq_len),
        str(run.seed),
        f"{result.best:.6g}",
        str(result.last_step),
        f"{result.seconds:.0f}",
        " ".join(f"{loss:.6g}" for loss in result.curve),
    ]


def read_results(folder: Path) -> dict[Run, Result]:
    """The finished runs in a folder. A last line that was not written to its end does not count."""
    path = folder / RESULTS
    if not path.exists():
        return {}
    lines = path.read_text("utf-8").splitlines(keepends=True)
    whole = lines if not lines or lines[-1].endswith("\n") else lines[:-1]
    results = {}
    for row in csv.DictReader(whole):
        run = Run(row["model"], row["with_replacement"] == "1", int(row["num_keys"]), int(row["seed"]))
        results[run] = Result(float(row["seconds"]), tuple(float(loss) for loss in row["eval_losses"].split()))
    return results


def _our_name(model: str) -> str:
    return model.replace("linear", "elu").replace("_ours", "_delta").replace("_cat", "")


def read_authors() -> dict[tuple[str, bool, int], tuple[float, int]]:
    """Best evaluation loss (perhaps NaN) and last step of the authors, by model, setting and number of keys."""
    with AUTHORS.open(newline="") as file:
        return {
            (_our_name(row["model"]), row["with_replacement"] == "1", int(row["num_keys"])): (
                float(row["best_eval_loss"]),
                int(row["last_step"]),
            )
            for row in csv.DictReader(file)
        }


def read_authors_curves() -> dict[tuple[str, bool, int], tuple[float, ...]]:
    """Evaluation losses after 100, 200, ... steps in the authors' logs, for the runs of figures 3 and 4."""
    if not AUTHORS_CURVES.exists():
        return {}
    with AUTHORS_CURVES.open(newline="") as file:
        return {
            (_our_name(row["model"]), row["with_replacement"] == "1", int(row["num_keys"])): tuple(
                float(loss) for loss in row["eval_losses"].split()
            )
            for row in csv.DictReader(file)
        }


def expected_seconds(run: Run, authors: dict[tuple[str, bool, int], tuple[float, int]]) -> float:
    """A guess for one core, from the authors' number of steps and the work of a step; only ratios of them are used."""
    known = authors.get((run.model, run.with_replacement, run.num_keys))
    if known is None:
        near = [key for key in authors if key[0] == run.model]
        known = authors[min(near, key=lambda key: abs(key[2] - run.num_keys))] if near else (0.0, 3000)
    features, _, rule = run.model.partition("_")
    kind, number = features.rstrip("0123456789"), int("0" + features.lstrip("abcdefghijklmnopqrstuvwxyz"))
    rows = {"favor": 2 * number, "dpfp": 2 * KEY_SIZE * number}.get(kind, KEY_SIZE)
    tokens = run.batch_size * run.seq_len
    fwm = 2e-4 / run.batch_size + 2.2e-10 * rows * run.num_keys
    per_token = {"delta": 4e-10 * rows * run.num_keys, "fwm": fwm}.get(rule, 1.2e-8 * rows)
    return 5.0 + known[1] * (0.006 + tokens * per_token)


def group_by_point(results: dict[Run, Result]) -> Iterator[tuple[tuple[str, bool, int], list[Result]]]:
    """Results of all seeds of each model, setting and number of keys."""
    points: dict[tuple[str, bool, int], list[Result]] = {}
    for run in sorted(results):
        points.setdefault((run.model, run.with_replacement, run.num_keys), []).append(results[run])
    yield from points.items()
