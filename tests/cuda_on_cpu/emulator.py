"""The kernels for a GPU, compiled for the processor and called with torch tensors: the operators' raw interface."""

import ctypes
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, Optional

import torch
from compiled import compile_once
from torch import Tensor

from fwp_fairseq.ops.native import SEGMENT, AddressFeatures
from fwp_fairseq.ops.numerics import state_dtype

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent.parent / "fwp_fairseq" / "csrc"

_TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


class Sequence(ctypes.Structure):
    """``Sequence`` of csrc/fast_weights.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("batch", "head", "row", "block")),
    ]


class Problem(ctypes.Structure):
    """``Problem`` of csrc/fast_weights.h."""

    _fields_ = [
        *((n, ctypes.c_int64) for n in ("heads", "length", "dk", "dv", "segments", "blocks", "block_columns")),
        *((n, Sequence) for n in ("q", "k", "v", "write", "erase", "decay")),
        ("initial_state", ctypes.c_void_p),
        ("out", Sequence),
        ("final_state", ctypes.c_void_p),
        ("borders", ctypes.c_void_p),
        *((f"grad_{n}", Sequence) for n in ("out", "q", "k", "v", "write", "erase", "decay")),
        ("grad_final_state", ctypes.c_void_p),
        ("grad_initial_state", ctypes.c_void_p),
    ]


class Features(ctypes.Structure):
    """``Features`` of csrc/fast_weights.h."""

    _fields_ = [
        ("map", ctypes.c_int),
        ("normalization", ctypes.c_int),
        *((n, ctypes.c_int64) for n in ("d_key", "dk", "nu")),
        ("projection", ctypes.c_void_p),
    ]


class Step(ctypes.Structure):
    """``Step`` of csrc/fast_weights.h."""

    _fields_ = [
        *((n, ctypes.c_int64) for n in ("rows", "slots", "heads", "dv", "parents")),
        ("features", Features),
        *((n, Sequence) for n in ("q", "k", "v", "out", "write", "erase", "decay")),
        *((n, ctypes.c_void_p) for n in ("state", "normalizer", "order", "places", "new_places")),
    ]


class Read(ctypes.Structure):
    """``Read`` of csrc/fast_weights.h."""

    _fields_ = [
        *((n, ctypes.c_int64) for n in ("rows", "memories", "heads", "dv")),
        ("features", Features),
        ("q", Sequence),
        ("out", Sequence),
        ("state", ctypes.c_void_p),
        ("normalizer", ctypes.c_void_p),
    ]


class ScanLaunch(ctypes.Structure):
    """``ScanLaunch`` of csrc/fast_weights_cuda.h."""

    _fields_ = [
        ("columns", ctypes.c_int),
        *((n, ctypes.c_int64) for n in ("tiles", "blocks", "shared_bytes", "workspace")),
    ]


class LaunchError(RuntimeError):
    """What the emulated device says went wrong."""


def compile_kernels(cache: Path, sources: Path = SOURCES, sanitize: bool = False) -> Path:
    """Path of the library of the kernels in ``sources``, which is built unless ``cache`` has it."""
    flags = ["-fsanitize=address", "-fno-omit-frame-pointer"] if sanitize else []
    command = ["g++", "-std=c++20", "-O1", "-g1", "-shared", "-fPIC", "-Wno-unknown-pragmas", *flags]

    def build(library: Path) -> None:
        folders = [f"-I{HERE}", f"-I{sources}"]
        subprocess.run([*command, *folders, str(HERE / "kernels.cpp"), "-o", str(library)], check=True)

    files = [path for folder in (HERE, sources) for path in folder.iterdir() if path.suffix not in (".py", "")]
    return compile_once(cache, command, files, build)


class Kernels:
    """The kernels of a library. ``multiprocessors`` is that of the pretended device: many make tiles narrow."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.emulator_error.restype = ctypes.c_char_p
        self.library.emulator_bytes.restype = ctypes.c_int64
        for which, structure in enumerate((Problem, Step, Read)):
            assert self.library.emulator_bytes(which) == ctypes.sizeof(structure)
        self.seed(0)

    def seed(self, seed: int) -> None:
        """Draw the order of threads and blocks from here on from ``seed``."""
        self.library.emulator_seed(ctypes.c_uint64(seed))

    def leave_out(self, file: str = "", line: int = 0) -> None:
        """Run without the barrier in a line of a file; by default with all of them."""
        self.library.emulator_leave_out(file.encode(), line)

    def make_mistake(self, which: int) -> None:
        """Of the mistakes that were put into the sources make this one; 0 is none."""
        self.library.emulator_make_mistake(which)

    def plan(self, p: Problem, streams: int, wide: bool, backward: bool, multiprocessors: int) -> ScanLaunch:
        """How the scan of a problem is launched."""
        launch = ScanLaunch()
        self.library.emulator_plan(
            ctypes.byref(p), ctypes.c_int64(streams), int(wide), int(backward), multiprocessors, ctypes.byref(launch)
        )
        return launch

    def scan(self, q: Optional[Tensor], k: Tensor, v: Tensor, *others: Any, multiprocessors: int = 1) -> Any:
        """``torch.ops.fwp_fairseq.scan``: (q, k, v, write, erase, decay, initial_state, keep_borders)."""
        *gates, initial_state, keep_borders = others
        p = _problem(q, k, v, *gates, initial_state)
        dtype = state_dtype(k.dtype)
        out = _empty(0 if q is None else v.shape, v.dtype)
        state = _empty((*k.shape[:2], p.dk, p.dv), dtype)
        borders = _empty((*k.shape[:2], p.segments - 1 if keep_borders else 0, p.dk, p.dv), dtype)
        if q is not None:
            p.out = _rows(out)
        p.final_state = state.data_ptr()
        p.borders = borders.data_ptr() if borders.numel() else None
        self._run(p, k, False, multiprocessors)
        return out, state, borders

    def scan_backward(
        self,
        grad_out: Optional[Tensor],
        grad_state: Optional[Tensor],
        q: Optional[Tensor],
        k: Tensor,
        v: Tensor,
        *others: Any,
        multiprocessors: int = 1,
    ) -> list[Optional[Tensor]]:
        """``torch.ops.fwp_fairseq.scan_backward``, with None for what is not there."""
        *gates, initial_state, borders = others
        p = _problem(q, k, v, *gates, initial_state)
        dtype = state_dtype(k.dtype)
        p.borders = borders.data_ptr() if borders.numel() else None
        p.grad_final_state = None if grad_state is None else grad_state.data_ptr()
        if q is not None:
            assert grad_out is not None
            p.grad_out = _rows(grad_out)
        tiles = self.plan(p, _streams(k), dtype == torch.float64, True, multiprocessors).tiles

        def like(x: Optional[Tensor], dtype: torch.dtype, shared: bool = True) -> Optional[Tensor]:
            if x is None:
                return None
            return _empty((tiles, *x.shape), state_dtype(k.dtype)) if shared and tiles > 1 else _empty(x.shape, dtype)

        grads = [like(q, k.dtype), like(k, k.dtype), like(v, v.dtype, False), *(like(g, dtype) for g in gates)]
        for name, grad in zip(("q", "k", "v", "write", "erase", "decay"), grads):
            if grad is not None:
                setattr(p, f"grad_{name}", _rows(grad) if name in "qkv" else _gate(grad))
        start = like(initial_state, dtype, False)
        p.grad_initial_state = None if start is None else start.data_ptr()
        self._run(p, k, True, multiprocessors)
        inputs = (q, k, v, *gates)
        summed = [
            g.sum(0) if g is not None and x is not None and g.dim() > x.dim() else g for g, x in zip(grads, inputs)
        ]
        return [*summed, start]

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        write: Optional[Tensor],
        erase: Optional[Tensor],
        decay: Optional[Tensor],
        state: Tensor,
        normalizer: Optional[Tensor],
        order: Optional[Tensor],
        places: Optional[Tensor],
        features: AddressFeatures,
    ) -> tuple[Tensor, Optional[Tensor]]:
        """``native.step``."""
        out = _empty(v.shape, v.dtype)
        moved = None if order is None and places is None else torch.full((q.size(0),), -1)
        address, _held = _features(features, q, state)
        p = Step(rows=q.size(0), slots=state.size(0), heads=q.size(1), dv=v.size(2), features=address)
        p.parents = p.slots if places is None else places.size(0)
        gates = (("write", write), ("erase", erase), ("decay", decay))
        for name, x in (("q", q), ("k", k), ("v", v), ("out", out), *gates):
            if x is not None:
                setattr(p, name, _token(x))
        for name, x in (
            ("state", state), ("normalizer", normalizer), ("order", order), ("places", places),
            ("new_places", moved),
        ):  # fmt: skip
            setattr(p, name, None if x is None else x.data_ptr())
        self._check(self.library.emulator_step(ctypes.byref(p), int(state.dtype == torch.float64)))
        return out, moved

    def read(self, q: Tensor, state: Tensor, normalizer: Optional[Tensor], features: AddressFeatures) -> Tensor:
        """``native.read``."""
        out = _empty((*q.shape[:2], state.size(3)), q.dtype)
        address, _held = _features(features, q, state)
        p = Read(q.size(0), state.size(0), q.size(1), state.size(3), address, _token(q), _token(out), state.data_ptr())
        p.normalizer = None if normalizer is None else normalizer.data_ptr()
        self._check(self.library.emulator_read(ctypes.byref(p), int(state.dtype == torch.float64)))
        return out

    def _run(self, p: Problem, k: Tensor, backward: bool, multiprocessors: int) -> None:
        wide = int(state_dtype(k.dtype) == torch.float64)
        self._check(
            self.library.emulator_scan(
                ctypes.byref(p), ctypes.c_int64(_streams(k)), wide, int(backward), multiprocessors
            )
        )

    def _check(self, status: int) -> None:
        if status:
            raise LaunchError(self.library.emulator_error().decode())


def _token(x: Tensor) -> Sequence:
    assert x.dim() == 2 or x.stride(-1) == 1 or x.size(-1) == 1
    return Sequence(x.data_ptr(), _TYPES.index(x.dtype), *x.stride()[:2])


@cache
def _feature_maps() -> list[str]:
    """Names in the order of the enumeration, from where the operators have them."""
    (names,) = re.findall(r"names\[\] = \{(.*?)\}", (SOURCES / "fast_weights_decoding.h").read_text())
    return re.findall(r'"(\w+)"', names)


def _features(features: AddressFeatures, x: Tensor, state: Tensor) -> tuple[Features, Optional[Tensor]]:
    feature_map, nu, normalization, projection = features
    projection = None if projection is None else projection.to(state.dtype)
    address = Features(
        _feature_maps().index(feature_map),
        ["none", "sum", "l2"].index(normalization),
        x.size(2),
        state.size(2),
        nu,
        None if projection is None else projection.data_ptr(),
    )
    return address, projection


def _streams(k: Tensor) -> int:
    return k.size(0) * k.size(1)


def _empty(shape: Any, dtype: torch.dtype) -> Tensor:
    """Filled with what must not be found in it afterwards."""
    return torch.full(shape if isinstance(shape, tuple) else tuple(torch.empty(shape).shape), float("nan"), dtype=dtype)


def _rows(x: Tensor) -> Sequence:
    assert x.stride(-1) == 1 or x.size(-1) == 1
    parts = x.stride(0) if x.dim() == 5 else 0
    return Sequence(x.data_ptr(), _TYPES.index(x.dtype), *x.stride()[-4:-1], parts)


def _gate(x: Tensor) -> Sequence:
    parts = x.stride(0) if x.dim() == 4 else 0
    return Sequence(x.data_ptr(), _TYPES.index(x.dtype), *x.stride()[-3:], parts)


def _problem(q: Optional[Tensor], k: Tensor, v: Tensor, *others: Optional[Tensor]) -> Problem:
    *gates, initial_state = others
    p = Problem(heads=k.size(1), length=k.size(2), dk=k.size(3), dv=v.size(3))
    p.segments = (p.length + SEGMENT - 1) // SEGMENT
    for name, x in zip(("q", "k", "v"), (q, k, v)):
        if x is not None:
            setattr(p, name, _rows(x))
    for name, x in zip(("write", "erase", "decay"), gates):
        if x is not None:
            setattr(p, name, _gate(x))
    p.initial_state = None if initial_state is None else initial_state.data_ptr()
    return p
