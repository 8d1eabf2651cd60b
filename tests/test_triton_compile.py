"""The Triton kernels compile for A100, H100 and B200, to tensor-core instructions, and (almost) nothing is spilled.

They are compiled as they are launched, by the compiler that Triton brings, which needs no GPU.
`python -m pytest -s tests/test_triton_compile.py` prints registers, shared memory and instructions of each.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from fwp_fairseq.ops import triton_scan

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
}
TENSOR_CORES = ("wgmma.mma_async", "mma.sync", "tcgen05.mma")
# Dynamic shared memory of the smallest: GPUs of 8.6, 8.9 and 12.0.
SHARED_MEMORY = 99 * 1024
# Bytes for each thread, of addresses mostly, where smaller tiles would have more to load.
SPILLS = {
    (90, "retreat", 256, "delta"): 256,
    (80, "advance", 64, "gated-delta"): 256,
    (80, "retreat", 64, "gated-delta"): 128,
}
RULES = {"sum": (False, False), "delta": (True, False), "gated": (False, True), "gated-delta": (True, True)}


@pytest.fixture(autouse=True)
def cache(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(compiled / "triton"))


def launches(
    monkeypatch: pytest.MonkeyPatch, sequences: int, d_k: int, d_v: int, dtype: torch.dtype, rule: str
) -> list[Any]:
    """The kernels that a training step launches, each with its arguments by name."""
    found = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append((kernel, {**dict(zip(kernel.arg_names, args)), **options}))

    erases, decays = RULES[rule]
    q, k, v = (torch.empty(1, sequences, 192, size, dtype=dtype) for size in (d_k, d_k, d_v))
    gate, state = torch.empty(1, sequences, 192), torch.empty(1, sequences, d_k, d_v)
    inputs = (q, k, v, gate, gate if erases else None, gate if decays else None, state)
    with monkeypatch.context() as patch:
        patch.setattr(triton.runtime.jit.JITFunction, "run", run)
        out, final, *kept = triton_scan._forward(*inputs, True)
        triton_scan._backward(out, final, *inputs, *kept)
    return found


def compile_for(architecture: int, kernel: Any, given: dict[str, Any]) -> tuple[dict[str, int], Any]:
    """Resources that a kernel takes, and what it was compiled to."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, given.pop(parameter.name)
        if value is None or parameter.is_constexpr:
            signature[name], constants[index,] = "constexpr", value
        elif torch.is_tensor(value):
            signature[name], attributes[index,] = f"*{TYPES[value.dtype]}", [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    # What is left are the options of the compiler.
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=given)
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = next(Path(path) for path in built.metadata_group.values() if str(path).endswith(".cubin"))
    report = subprocess.check_output([program, "--dump-resource-usage", path], text=True)
    resources = {name: int(re.search(rf"\b{name}:(\d+)", report)[1]) for name in ("REG", "STACK", "LOCAL")}
    return {**resources, "SHARED": built.metadata.shared}, built.asm


@pytest.mark.parametrize(
    "architecture, sequences, d_k, d_v, dtype, rule",
    [
        *((90, 256, d_k, d_v, torch.bfloat16, "gated-delta") for d_k, d_v in [(16, 16), (64, 64)]),
        (90, 256, 256, 64, torch.bfloat16, "delta"),
        (90, 64, 64, 64, torch.float16, "sum"),
        (80, 256, 64, 64, torch.float32, "delta"),
        *((architecture, 256, 64, 64, torch.bfloat16, "gated-delta") for architecture in (80, 100)),
    ],
)
def test_kernels_use_tensor_cores_and_do_not_spill(architecture, sequences, d_k, d_v, dtype, rule, monkeypatch):
    found = launches(monkeypatch, sequences, d_k, d_v, dtype, rule)
    names = [kernel.__name__ for kernel, _ in found]
    assert names == ["prepare", "advance", "retreat", "differentiate"][rule == "sum" :]
    for name, (kernel, given) in zip(names, found):
        resources, code = compile_for(architecture, kernel, given)
        instructions = {kind: len(re.findall(kind, code["ptx"])) for kind in TENSOR_CORES}
        print(
            f"sm_{architecture} {sequences} x {d_k}/{d_v} {TYPES[dtype]} {rule:<11} {name:<14}", resources, instructions
        )
        assert resources["SHARED"] <= SHARED_MEMORY
        assert sum(instructions.values()) > 0 or (name == "prepare" and rule == "gated")
        spilled = resources["STACK"] + resources["LOCAL"]
        assert spilled <= SPILLS.get((architecture, name, d_k, rule), 0), f"{name} spills {spilled} bytes"


@pytest.mark.parametrize(
    "d_k, dtype, rule, spills",
    [
        (64, torch.bfloat16, "gated-delta", 0),
        (128, torch.float16, "delta", 0),
        (64, torch.float32, "delta", 256),
    ],
)
def test_where_the_assembler_is_not_sound_hopper_gets_no_products_by_four_warps(d_k, dtype, rule, spills, monkeypatch):
    monkeypatch.setattr(triton_scan, "warpgroups_are_sound", lambda device: False)
    for kernel, given in launches(monkeypatch, 256, d_k, 64, dtype, rule):
        resources, code = compile_for(90, kernel, given)
        print(f"sm_90, two warps, {d_k}/64 {TYPES[dtype]} {rule:<11} {kernel.__name__:<14}", resources)
        assert "wgmma" not in code["ptx"] and "mma.sync" in code["ptx"]
        assert resources["STACK"] + resources["LOCAL"] <= spills
