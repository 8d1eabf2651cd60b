"""Puts mistakes into the kernels, off by one each, and says which of them nobody notices.

Its argument is the library that compile_with_mistakes() made. Run with the runtime of the address sanitizer loaded,
since some of them only read or write where they must not. Exit status 0: without a mistake all is right and nothing
leaves its buffers, and every mistake is noticed.
"""

import shutil
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from cases import all_is_right, in_child  # noqa: E402
from emulator import SOURCES, Kernels, compile_kernels  # noqa: E402

# File, what stands there, and what to put in its place: M is 1 where the mistake is made, else 0.
SCAN, STEP, FEATURES = (f"fast_weights_{name}.cuh" for name in ("scan", "step", "features"))
MISTAKES = [
    (SCAN, "there && t < count ? widen", "there && t < count + M ? widen"),
    (SCAN, "const bool there = feature + i < p.dk;", "const bool there = feature + i < p.dk + M;"),
    (SCAN, "const bool there = t < count && kColumns", "const bool there = t < count + M && kColumns"),
    (SCAN, "if (t < count && kColumns", "if (t < count + M && kColumns"),
    (SCAN, " * group + n < columns)\n", " * group + n < columns + M)\n"),
    (SCAN, "if (t < count && feature + group", "if (t < count + M && feature + group"),
    (SCAN, "n * kGroups < p.dk)", "n * kGroups < p.dk + M)"),
    (SCAN, "t == s ? T(1) : product * decay", "t <= s + M ? T(1) : product * decay"),
    (SCAN, "= s < t ? left * kk", "= s < t + M ? left * kk"),
    (SCAN, "for (int s = 0; s < t; ++s) sum +=", "for (int s = M; s < t; ++s) sum +="),
    (SCAN, "for (int s = 0; s < t; ++s) x[s] -=", "for (int s = M; s < t; ++s) x[s] -="),
    (SCAN, "token / kSegment - 1), p.dv", "token / kSegment - 1 + M), p.dv"),
    (SCAN, "memory_at(p.segments - 1, segment - 1)", "memory_at(p.segments - 1, segment - 1 + M)"),
    (SCAN, "+ 3 * kChunk * kPairsRow;", "+ (3 - M) * kChunk * kPairsRow;"),
    (SCAN, "(kSegmentChunks + 1) * dk * N", "(kSegmentChunks + 1) * dk * N - M"),
    (SCAN, "for (int t = r; t < kChunk; ++t) later", "for (int t = r + M; t < kChunk; ++t) later"),
    (SCAN, "dp[t * kPairsRow + s + 1] =", "dp[t * kPairsRow + s + 1 - M] ="),
    (SCAN, "if (token + kChunk < end) advance", "if (token + (1 + M) * kChunk < end) advance"),
    (FEATURES, "at < shift ? at - shift + 2 * d_key", "at < shift - M ? at - shift + 2 * d_key"),
    (FEATURES, "int shift = i / (2 * d_key) + 1,", "int shift = i / (2 * d_key) + 1 - M,"),
    (FEATURES, "for (int w = 0; w < kStepWarps; ++w) x[i] +=", "for (int w = M; w < kStepWarps; ++w) x[i] +="),
    (STEP, "if (i < dk) *at =", "if (i < dk + M) *at ="),
    (STEP, "if (column < dv) {", "if (column < dv + M) {"),
    (STEP, "+ warp < dk && column < dv ?", "+ warp < dk + M && column < dv ?"),
    (STEP, "(thread < distance ? 0", "(thread < distance + M ? 0"),
    (STEP, "return rows + 3 * slots;", "return rows + 3 * slots - 4 * M;"),
    (STEP, "blockIdx.x) / tiles / int(read.heads);", "blockIdx.x) / tiles / (int(read.heads) + M);"),
]


def compile_with_mistakes(folder: Path, cache: Path) -> Path:
    """The library with all of them, none of which is made until it is asked for; ``folder`` is for its sources."""
    sources = Path(shutil.copytree(SOURCES, folder / "csrc"))
    for number, (file, right, wrong) in enumerate(MISTAKES, 1):
        text = (sources / file).read_text()
        assert text.count(right) == 1, f"{file} has {text.count(right)} times: {right}"
        (sources / file).write_text(text.replace(right, wrong.replace("M", f"emulated::mistake({number})")))
    return compile_kernels(cache, sources, sanitize=True)


def main() -> int:
    """Each mistake is made in a process of its own."""
    kernels = Kernels(Path(sys.argv[1]))
    missed = [f"{file}: wrong without a mistake" for file in (SCAN, STEP) if not all_is_right(kernels, file, seed=0)]

    def right(number: int, file: str) -> bool:
        kernels.make_mistake(number)
        return all_is_right(kernels, file, seed=0)

    for number, (file, _, wrong) in enumerate(MISTAKES, 1):
        if in_child(lambda number=number, file=file: right(number, file)):  # type: ignore[misc]
            missed.append(f"not noticed: {file}: {wrong}")
    print("\n".join(missed))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
