"""100,000 tokens from one state: memory stays flat, and what is computed stays with the definition.

    PYTHONPATH=.:tests python tests/campaigns/long_decoding.py --tokens 100000

For each update rule a language model of one layer reads random words one at a time, as in decoding, in float32. The
resident memory of the process is looked at on the way; the logits are compared with those of the same weights in
float64, where the fast weights are computed by ops/token_loop.py. The error is in units of the largest logit. Status 1
if the memory grew by more than a megabyte after the first hundredth of the tokens, or an error is above its bound.
"""

import argparse
import copy
import resource
import sys
from pathlib import Path

import torch
from tiny_models import build_lm, tokens

from fwp_fairseq.ops import UPDATE_RULES

# Of the logits at every length, for rules that erase or forget. The sum rule adds up all tokens, one after the other,
# and may lose half a unit in the last place with each.
BOUND = 1e-5
LOST_BY_A_SUM = 2.0**-24
GROWTH = 2**20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@torch.no_grad()
def decode(rule: str, length: int, *flags: str) -> tuple[list[int], list[float]]:
    """Resident bytes, and the largest error, at and up to 1 %, 10 % and 100 % of the tokens."""
    torch.manual_seed(1)
    model = build_lm("--update-rule", rule, "--no-token-positional-embeddings", *flags).eval()
    exact = copy.deepcopy(model).double()
    for layer in exact.decoder.layers:
        layer.self_attn.backend = "loop"
    words = tokens(model, 1, length)
    model.make_generation_fast_()
    state: dict = {}
    logits = torch.zeros(length, len(model.decoder.dictionary))
    memory, marks = [], [length // 100, length // 10, length]
    for t in range(length):
        logits[t] = model(words[:, t : t + 1], incremental_state=state)[0][0, 0]
        if t + 1 in marks:
            memory.append(resident())
    expected = exact.decoder(words)[0][0]
    error = (logits - expected).abs().amax(dim=-1) / expected.abs().max()
    return memory, [error[:mark].max().item() for mark in marks]


def main() -> int:
    parser = argparse.ArgumentParser(description="Decode many tokens from one state.")
    parser.add_argument("--tokens", type=int, default=100_000, metavar="N", help="(%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    for rule in UPDATE_RULES:
        memory, errors = decode(rule, options.tokens)
        growth = memory[-1] - memory[0]
        bound = options.tokens * LOST_BY_A_SUM if rule == "sum" else BOUND
        failed |= growth > GROWTH or not max(errors) <= bound
        print(
            f"{rule:<12} resident {memory[-1] / 2**20:.1f} MiB, {growth / 1024:+.0f} KiB since token "
            f"{options.tokens // 100}; error up to 1 %, 10 %, all: " + ", ".join(f"{x:.1e}" for x in errors),
            flush=True,
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())
