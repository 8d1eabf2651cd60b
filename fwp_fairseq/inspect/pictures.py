"""Pictures of what a memory did, as PNG files."""

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fwp_fairseq.inspect.recorder import Memory

# More labels than that would be on top of each other.
_MOST_LABELS = 60


def weights_picture(memory: Memory, asked: Sequence[str], written: Sequence[str]) -> bytes:
    """Implied attention: a map for the mean over the heads, and one for each head."""
    assert memory.weights is not None
    maps = [("mean", memory.weights.mean(dim=0)), *((f"head {i}", head) for i, head in enumerate(memory.weights))]
    most = max(float(memory.weights.abs().max()), 1e-12)
    size = min(4.5, 1.4 + 0.22 * max(len(asked), len(written)))
    figure, axes = _subplots(len(maps), size)
    for place, (title, weights) in zip(axes, maps):
        image = place.imshow(
            weights.cpu(), cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto", interpolation="nearest"
        )
        place.set_title(title, fontsize=8)
        _label(place, written, "x")
        _label(place, asked, "y")
        place.set_xlabel("written", fontsize=8)
        place.set_ylabel("asked with", fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.6, label="weight of the value")
    return _png(figure)


def lines_picture(memory: Memory, written: Sequence[str]) -> bytes:
    """Along the tokens, a line for each head: β, α, norm, effective rank, and what each write found."""
    lines: list[tuple[str, Tensor]] = []
    if memory.write is not None:
        lines.append(("write strength β", memory.write))
    if memory.decay is not None:
        lines.append(("kept share of the memory", memory.decay))
    lines += [
        ("norm of the memory", memory.norm),
        (f"effective rank, of {memory.bound} at most", memory.rank),
        ("length of what is found, of the new value", memory.found),
        ("cosine of what is found and the new value", memory.agreement),
    ]
    figure, axes = _subplots(len(lines), min(6.0, 2.5 + 0.12 * len(written)), height=2.2)
    for place, (title, values) in zip(axes, lines):
        for head, line in enumerate(values.cpu()):
            place.plot(line, marker="o" if len(line) < 40 else None, markersize=3, linewidth=1, label=f"head {head}")
        place.set_title(title, fontsize=8)
        place.grid(alpha=0.3)
        _label(place, written, "x")
    axes[0].legend(fontsize=7)
    return _png(figure)


def _subplots(count: int, width: float, height: float = 0.0) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    columns = min(3, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(columns * width, rows * (height or width)), layout="constrained", dpi=110)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for empty in axes[count:]:
        empty.set_visible(False)
    return figure, axes[:count]


def _label(place: Any, tokens: Sequence[str], axis: str) -> None:
    step = -(-len(tokens) // _MOST_LABELS)
    ticks = list(range(0, len(tokens), step))
    # A dollar sign would begin a formula.
    labels = [tokens[i].replace("$", r"\$") for i in ticks]
    if axis == "x":
        place.set_xticks(ticks, labels, rotation=90, fontsize=7)
    else:
        place.set_yticks(ticks, labels, fontsize=7)


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def mean(values: Tensor) -> float:
    """Over heads and tokens."""
    return float(values.to(torch.float64).mean())
