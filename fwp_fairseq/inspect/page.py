"""One HTML page with all pictures in it, which needs nothing beside it."""

import base64
from collections.abc import Sequence
from html import escape

from fwp_fairseq.inspect.pictures import mean
from fwp_fairseq.inspect.recorder import MOST_WEIGHTS, Memory

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
table { border-collapse: collapse; } th, td { padding: .2rem .8rem .2rem 0; text-align: left; }
td.number { font-variant-numeric: tabular-nums; text-align: right; }
img { background: white; display: block; height: auto; margin: 1rem 0; max-width: 100%; }
code { overflow-wrap: anywhere; }
"""


def make_page(title: str, lines: Sequence[tuple[str, str]], memories: Sequence[tuple[Memory, list[bytes]]]) -> str:
    """``lines`` say what was looked at; each memory comes with its pictures."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td><code>{escape(text)}</code></td></tr>" for name, text in lines)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1><table>{rows}</table>\n"
        f"<h2>All memories</h2>{_table([memory for memory, _ in memories])}\n"
        + "\n".join(_section(memory, pictures) for memory, pictures in memories)
        + "</body></html>\n"
    )


def _table(memories: Sequence[Memory]) -> str:
    head = ("attention", "β", "kept", "norm at the end", "effective rank at the end", "of", "found / new value")
    rows = []
    for memory in memories:
        numbers = [
            "" if memory.write is None else f"{mean(memory.write):.3f}",
            "" if memory.decay is None else f"{mean(memory.decay):.3f}",
            f"{mean(memory.last_norm):.2f}",
            f"{mean(memory.last_rank):.1f}",
            str(memory.bound),
            f"{mean(memory.found):.2f}",
        ]
        link = f'<a href="#{escape(memory.name)}">{escape(memory.name)}</a>'
        rows.append(f"<tr><td>{link}</td>" + "".join(f'<td class="number">{x}</td>' for x in numbers) + "</tr>")
    titles = "".join(f"<th>{x}</th>" for x in head)
    return f"<table><tr>{titles}</tr>{''.join(rows)}</table><p>Means over the heads.</p>"


def _section(memory: Memory, pictures: Sequence[bytes]) -> str:
    images = "".join(
        f'<img alt="{escape(memory.name)}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
        for picture in pictures
    )
    missing = ""
    if memory.weights is None:
        missing = f"<p>No attention weights: fwm has none, and above {MOST_WEIGHTS} tokens they are not drawn.</p>"
    return f'<h2 id="{escape(memory.name)}">{escape(memory.name)}</h2>{missing}{images}'
