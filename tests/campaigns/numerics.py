"""Random cases of operators and attention: finite in gives finite out, at a bounded distance from the definition.

    PYTHONPATH=.:tests python tests/campaigns/numerics.py --cases 10000 --log numerics.jsonl

runs the cases 0 to 9999, each drawn from its number alone, adds a line for each to the log, and sums the log up. Cases
that the log has already are not run again. Status 1 if a case failed.

What is measured. Keys and queries go through feature map and normalisation in the type of the case, and are compared
with the same in float64. Then a backend reads and writes them, and is compared with ops/token_loop.py in float64 on the
same features. The error is in units of the largest that a read could be: the largest sum of the features of a query,
times the largest number that was in the memory; with attention normalisation, which takes means of values, the largest
value. BOUND holds it at every length.

What is allowed. Every rule x feature map x normalisation that FastWeightConfig.check allows, but for
- rules that erase with --key-normalization none: a key longer than one writes more of what it retrieves than it erases,
  and a memory that grows by a factor with every token leaves the range of any type. fwm stays bounded with tanh.
Only finite results are asked for, and no distance, from
- rules that erase with attention normalisation, which divide what is erased by a sum that can come close to zero;
- fwm with --key-normalization none, for the same reason as above: the bound on the memory hides the factor.

A float16 result whose exact value float16 cannot hold (above 65504) is infinite, as in torch's own products, with the
right sign: it is what a loss scaler looks for. Inside, everything is float32, and such a value can be anything that
float32 holds.
"""

import argparse
import math
import random
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from campaigns.training import add_records, read_records
from registered import defaults, features_of
from torch import Tensor

from fwp_fairseq.modules import FastWeightAttention, FastWeightConfig
from fwp_fairseq.modules.key_features import KeyFeatures
from fwp_fairseq.ops import (
    FEATURE_MAPS,
    KEY_NORMALIZATIONS,
    UPDATE_RULES,
    Gates,
    fast_weight_memory,
    fast_weight_scan,
    fast_weight_step,
    native,
    normalized_memory,
    normalized_read,
    normalized_scan,
    normalized_step,
    token_loop,
)
from fwp_fairseq.ops.numerics import smallest_divisor, state_dtype

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
# Of a read, in the units above, before it is rounded to the type of the values: half precision accumulates in float32.
BOUND = {torch.float32: 1e-5, torch.float64: 2e-14}
# Of a feature, relative to the largest of its vector. Exponents lose digits with their size, which is allowed for.
FEATURE_BOUND = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-6, torch.float64: 4e-15}

KEY_PATTERNS = ("random", "random", "random", "identical", "zero", "some zero", "opposite", "one coordinate")
GATE_PATTERNS = ("random", "random", "zero", "one", "zero or one")


@dataclass(frozen=True)
class Case:
    """One random case; ``seed`` draws its tensors."""

    level: str
    rule: str
    feature_map: str
    normalization: str
    attention_normalization: bool
    causal: bool
    backend: str
    dtype: str
    batch: int
    heads: int
    length: int
    d_key: int
    d_value: int
    nu: int
    m: int
    size_q: float
    size_k: float
    size_v: float
    keys: str
    beta: str
    alpha: str
    seed: int

    @property
    def compared(self) -> bool:
        """Whether there is a bound on the distance from the definition."""
        erases = UPDATE_RULES[self.rule].erases
        return not (erases and (self.attention_normalization or self.normalization == "none"))


def is_allowed(rule: str, feature_map: str, normalization: str, attention_normalization: bool) -> bool:
    """Whether finite results are promised for such an attention."""
    config = FastWeightConfig(
        update_rule=rule,
        feature_map=feature_map,
        key_normalization=normalization,
        attention_normalization=attention_normalization,
    )
    try:
        config.check(64, 1, "decoder")
    except ValueError:
        return False
    return not config.rule.erases or normalization != "none" or (rule == "fwm" and feature_map == "tanh")


COMBINATIONS = [
    combination
    for combination in (
        (rule, feature_map, normalization, attention_normalization)
        for rule in UPDATE_RULES
        for feature_map in FEATURE_MAPS
        for normalization in KEY_NORMALIZATIONS
        for attention_normalization in (False, True)
    )
    if is_allowed(*combination)
]


def draw_case(draw: random.Random, longest: int = 20_000) -> Case:
    """A case; most are short, one in fifty is longer than 2,000 tokens."""
    rule, feature_map, normalization, attention_normalization = draw.choice(COMBINATIONS)
    bounded = UPDATE_RULES[rule].max_norm is not None
    backends = ["chunk", "chunk", "step"] + ["native"] * (3 if native.unavailable is None and not bounded else 0)
    level = draw.choice(["operators", "operators", "operators", "attention"])
    dtype = draw.choice(list(DTYPES))
    shortest, length = draw.choice([(1, 64)] * 30 + [(65, 400)] * 15 + [(401, 2000)] * 4 + [(2001, longest)])
    d_key = draw.randint(1, 16)
    largest = 4
    if level == "attention" and dtype == "float16":
        # Projections overflow by themselves, and so does what is read without any normalisation.
        largest = 2 if attention_normalization or normalization != "none" else 0
    size_q, size_k, size_v = (10 ** draw.uniform(-6, largest) for _ in range(3))
    return Case(
        level=level,
        rule=rule,
        feature_map=feature_map,
        normalization=normalization,
        attention_normalization=attention_normalization,
        causal=draw.random() < 0.7,
        backend=draw.choice(backends),
        dtype=dtype,
        batch=draw.randint(1, 2),
        heads=draw.randint(1, 2),
        length=min(longest, draw.randint(shortest, max(shortest, length))),
        d_key=d_key,
        d_value=draw.randint(1, 16),
        nu=draw.randint(1, min(3, 2 * d_key - 1)),
        m=draw.randint(1, 16),
        size_q=size_q,
        size_k=size_k,
        size_v=size_v,
        keys=draw.choice(KEY_PATTERNS),
        beta=draw.choice(GATE_PATTERNS),
        alpha=draw.choice(GATE_PATTERNS),
        seed=draw.randrange(2**31),
    )


def run_case(case: Case) -> dict[str, Any]:
    """What was wrong, a list of sentences, and the errors as shares of their bounds."""
    torch.manual_seed(case.seed)
    outcome: dict[str, Any] = {"wrong": [], "features": 0.0, "reads": 0.0}
    (_run_attention if case.level == "attention" else _run_operators)(case, outcome)
    return outcome


# --- Operators --------------------------------------------------------------------------------------------------------


def _run_operators(case: Case, outcome: dict[str, Any]) -> None:
    dtype, rule, wrong = DTYPES[case.dtype], UPDATE_RULES[case.rule], outcome["wrong"]
    shape = (case.batch, case.heads, case.length)
    queries = (case.size_q * torch.randn(*shape, case.d_key)).to(dtype)
    keys = _patterned_keys(case, (*shape, case.d_key)).to(dtype)
    values = (case.size_v * torch.randn(*shape, case.d_value)).to(dtype)
    beta = _gate(case.beta, shape, dtype) if "beta" in rule.takes else None
    alpha = _gate(case.alpha, shape, dtype) if "alpha" in rule.takes else None
    with_gradients = case.length <= 400 and case.backend != "step"
    leaves = [x.requires_grad_(with_gradients) for x in (queries, keys, values, beta, alpha) if x is not None]

    options = {"dpfp_nu": case.nu, "favor_features": case.m}
    module = features_of(case.feature_map, case.normalization, case.d_key, **options).eval()
    q, k = module(queries, keys)
    gates = rule.gates(beta, alpha, **defaults(rule))
    out, state = _backend(case, q, k, values, gates)
    if not state.isfinite().all():
        wrong.append("the memory is not finite")
    with torch.no_grad():
        for name, x, features in (("query", queries, q), ("key", keys, k)):
            outcome["features"] = max(outcome["features"], _feature_error(case, module, name, x, features, wrong))
        wide = Gates(*(None if gate is None else gate.double() for gate in gates))
        inputs = (q.double(), k.double(), values.double(), wide)
        exact, unit, sure = _definition(case, *inputs)
        if not _is_in_range(out, exact, sure):
            wrong.append("what is read is not finite")
        elif case.compared:
            outcome["reads"] = _read_error(case, out, exact, unit, sure)
            if outcome["reads"] > 1:
                wrong.append(f"what is read differs by {outcome['reads']:.1f} times the bound")
    if with_gradients and dtype != torch.float16:
        weights = torch.randn_like(out, dtype=state_dtype(dtype))
        gradients = torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)
        if not all(x is None or x.isfinite().all() for x in gradients):
            wrong.append("a gradient is not finite")


def _patterned_keys(case: Case, shape: tuple[int, ...]) -> Tensor:
    keys = case.size_k * torch.randn(shape)
    if case.keys == "identical":
        return keys[:, :, :1].expand(shape).clone()
    if case.keys == "zero":
        return torch.zeros(shape)
    if case.keys == "some zero":
        return keys * (torch.rand(*shape[:3], 1) < 0.5)
    if case.keys == "opposite":
        signs = 1 - 2 * (torch.arange(shape[2]) % 2)
        return keys[:, :, :1] * signs[:, None]
    if case.keys == "one coordinate":
        return keys * torch.nn.functional.one_hot(torch.randint(shape[3], shape[:3]), shape[3])
    return keys


def _gate(pattern: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    made = {
        "zero": lambda: torch.zeros(shape),
        "one": lambda: torch.ones(shape),
        "zero or one": lambda: torch.randint(2, shape).float(),
        "random": lambda: torch.rand(shape),
    }[pattern]()
    return made.to(state_dtype(dtype))


def _backend(case: Case, q: Tensor, k: Tensor, v: Tensor, gates: Gates) -> tuple[Tensor, Tensor]:
    max_norm = UPDATE_RULES[case.rule].max_norm
    if case.backend == "step":
        return _steps(case, q, k, v, gates)
    if case.attention_normalization and case.causal:
        out, state, _ = normalized_scan(q, k, v, gates, backend=case.backend)
    elif case.attention_normalization:
        state, normalizer = normalized_memory(k, v, gates, backend=case.backend)
        out = normalized_read(q, state, normalizer).to(v.dtype)
    elif case.causal:
        out, state = fast_weight_scan(q, k, v, *gates, backend=case.backend, max_norm=max_norm)
    else:
        state = fast_weight_memory(k, v, *gates, backend=case.backend, max_norm=max_norm)
        out = (q.to(state.dtype) @ state).to(v.dtype)
    return out, state


@torch.no_grad()
def _steps(case: Case, q: Tensor, k: Tensor, v: Tensor, gates: Gates) -> tuple[Tensor, Tensor]:
    """One token at a time, as in decoding."""
    state = v.new_zeros(*k.shape[:2], k.size(3), v.size(3), dtype=state_dtype(v.dtype))
    normalizer = state.new_zeros(*state.shape[:3], 1)
    outputs = []
    for t in range(k.size(2)):
        now = Gates(*(None if gate is None else gate[:, :, t] for gate in gates))
        if case.attention_normalization:
            outputs.append(normalized_step(q[:, :, t], k[:, :, t], v[:, :, t], now, state, normalizer))
        else:
            max_norm = UPDATE_RULES[case.rule].max_norm
            outputs.append(fast_weight_step(q[:, :, t], k[:, :, t], v[:, :, t], *now, state, max_norm=max_norm))
    if not case.causal:
        q = q.to(state.dtype)
        read = normalized_read(q, state, normalizer) if case.attention_normalization else q @ state
        return read.to(v.dtype), state
    return torch.stack(outputs, dim=2), state


def _definition(case: Case, q: Tensor, k: Tensor, v: Tensor, gates: Gates) -> tuple[Tensor, Tensor, Tensor]:
    """What is read, by the token loop in float64; the unit of errors; where the divisor is one that float32 has.

    With attention normalisation, of rules that do not erase, the loop carries a column of ones, by whose read the
    others are divided (eq. 17-19). For rules that erase it is left out: only their range is of interest.
    """
    means = case.attention_normalization and gates.erase is None
    if means:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    memory = v.new_zeros(*k.shape[:2], k.size(3), v.size(3))
    largest = memory.new_zeros(())
    outputs = []
    for t in range(k.size(2)):
        now = (None if gate is None else gate[:, :, t] for gate in gates)
        memory = token_loop.write_token(memory, k[:, :, t], v[:, :, t], *now, UPDATE_RULES[case.rule].max_norm)
        largest = torch.maximum(largest, memory.abs().amax())
        if case.causal:
            outputs.append(token_loop.read_token(memory, q[:, :, t]))
    read = torch.stack(outputs, dim=2) if case.causal else q @ memory
    if not means:
        return read, q.abs().sum(dim=-1).amax() * largest, torch.ones_like(read, dtype=torch.bool)
    total = read[..., -1:]
    # Products with features near the floor leave float32 before their sum does.
    sure = (total > 1e3 * smallest_divisor(torch.float32)).expand_as(read[..., :-1])
    return read[..., :-1] / total.clamp(min=1e-300), v.abs().amax(), sure


def _is_in_range(out: Tensor, exact: Tensor, sure: Tensor) -> bool:
    """Whether all is finite that the type can hold, and the rest infinite with the right sign."""
    if out.dtype != torch.float16:
        return bool(out.isfinite().all())
    largest = torch.finfo(out.dtype).max
    infinite = out.isinf() & (exact.abs() > 0.99 * largest) & (out.sign() == exact.sign())
    return bool((out.isfinite() | infinite | (~sure & ~out.isnan())).all())


def _read_error(case: Case, out: Tensor, exact: Tensor, unit: Tensor, sure: Tensor) -> float:
    """The largest error as a share of the bound."""
    accumulated = BOUND[state_dtype(out.dtype)] * unit
    # A processor may flush each product below the smallest normal number to zero.
    flushed = case.length * torch.finfo(out.dtype).smallest_normal
    rounded = torch.finfo(out.dtype).eps * exact.abs() + flushed
    error = (out.double() - exact).abs() / (accumulated + rounded)
    return float(error[sure & out.isfinite()].max()) if (sure & out.isfinite()).any() else 0.0


def _feature_error(case: Case, module: KeyFeatures, name: str, x: Tensor, features: Tensor, wrong: list[str]) -> float:
    """The largest error of the features as a share of the bound."""
    if not features.isfinite().all():
        wrong.append(f"the features of a {name} are not finite")
        return 0.0
    (exact,) = module(x.double())
    largest = exact.abs().amax(dim=-1, keepdim=True)
    exponent = torch.zeros_like(largest)
    if module.projection is not None:
        exponent = (x.double().abs() @ module.projection.double().abs().T).amax(dim=-1, keepdim=True)
        if case.normalization == "none":
            exponent = exponent + x.double().square().sum(dim=-1, keepdim=True)
    elif case.feature_map == "learned":
        weight, bias = (x.detach().double().abs() for x in (module.weight, module.bias))
        exponent = (x.double().abs() @ weight.transpose(-1, -2) + bias).amax(dim=-1, keepdim=True)
    exact = exact.clamp(max=torch.finfo(features.dtype).max)
    exact_digits = FEATURE_BOUND[features.dtype] * largest
    digits = exact_digits + 2 * torch.finfo(state_dtype(features.dtype)).eps * exponent * largest
    # elu and silu of very negative keys: their size is below the floor of a divisor, and they count as zero.
    counts = largest > torch.finfo(features.dtype).smallest_normal
    if case.feature_map in ("elu", "silu") and case.normalization != "none":
        counts = module.map.apply(x.double()).abs().amax(dim=-1, keepdim=True) > math.exp(-40)
    error = (features.double() - exact).abs() / (digits + torch.finfo(features.dtype).smallest_normal)
    error = error * counts
    found = float(error.max())
    if found > 1:
        wrong.append(f"the features of a {name} differ by {found:.1f} times the bound")
    return found


# --- Attention --------------------------------------------------------------------------------------------------------


def _run_attention(case: Case, outcome: dict[str, Any]) -> None:
    """A whole attention module on random inputs, with padding: at once, and token by token as in decoding."""
    dtype, heads, width = DTYPES[case.dtype], case.heads, case.heads * case.d_key
    config = FastWeightConfig(
        update_rule=case.rule,
        feature_map=case.feature_map,
        key_normalization=case.normalization,
        attention_normalization=case.attention_normalization,
        dpfp_nu=case.nu,
        favor_features=case.m,
        fast_weight_backend="auto" if case.backend == "step" else case.backend,
    )
    module = FastWeightAttention(width, heads, config, causal=case.causal).eval().to(dtype)
    length = min(case.length, 200) if case.backend == "step" else case.length
    x = (case.size_k * torch.randn(length, case.batch, width)).to(dtype)
    padding = torch.rand(case.batch, length) < {"zero": 1.0, "some zero": 0.5}.get(case.keys, 0.0)
    with torch.no_grad():
        if case.backend == "step" and case.causal:
            state: dict[str, dict[str, Optional[Tensor]]] = {}
            steps = [(x[t : t + 1], padding[:, t : t + 1]) for t in range(length)]
            read = torch.cat([module(now, now, now, mask, incremental_state=state)[0] for now, mask in steps])
        else:
            read = module(x, x, x, padding)[0]
    if not read.isfinite().all():
        # Features that are exponentials, read without any division, can be beyond what float16 has.
        with torch.no_grad():
            exact = module.double()(*(x.double(),) * 3, padding)[0]
        if exact.abs().max() < torch.finfo(dtype).max:
            outcome["wrong"].append("what attention gives is not finite")


# --- The campaign -----------------------------------------------------------------------------------------------------


def summarise(lines: list[dict[str, Any]]) -> list[str]:
    """The worst errors by type and length, and the failures."""
    worst: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for line in lines:
        length = line["case"]["length"]
        bin_ = next(f"{most:>6}" for most in (64, 400, 2000, 20_000) if length <= most)
        entry = worst[line["case"]["dtype"], bin_]
        entry[0] += 1
        entry[1], entry[2] = max(entry[1], line["features"]), max(entry[2], line["reads"])
    table = [f"{len(lines)} cases; the largest errors as shares of their bounds:"]
    table.append(f"{'type':<9} {'tokens':>8} {'cases':>6} {'features':>9} {'reads':>6}")
    for (dtype, bin_), (count, features, reads) in sorted(worst.items()):
        table.append(f"{dtype:<9} <={bin_} {count:>6} {features:>9.3f} {reads:>6.3f}")
    failed = [line for line in lines if line["wrong"]]
    table += [f"case {line['number']}: {'; '.join(line['wrong'])}: {line['case']}" for line in failed]
    return [*table, f"{len(failed)} failed"]


def main(run: Callable[[Case], dict[str, Any]] = run_case) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Random cases of operators and attention.")
    parser.add_argument("--cases", type=int, default=10_000, metavar="N", help="run cases 0 to N - 1 (%(default)s)")
    parser.add_argument("--log", type=Path, required=True, metavar="FILE", help="a line for each case that was run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = read_records(options.log)
    done = {line["number"] for line in lines}
    for number in range(options.cases):
        if number not in done:
            case = draw_case(random.Random(number))
            lines.append({"number": number, "case": asdict(case), **run(case)})
            add_records(options.log, lines[-1:])
    print("\n".join(summarise(lines)))
    return any(line["wrong"] for line in lines)


if __name__ == "__main__":
    sys.exit(main())
