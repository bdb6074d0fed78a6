"""Draws LAYERS of tests/test_architecture.py for docs/design.md: python docs/make_layers.py."""

import sys
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).parents[1]
DRAWING = Path(__file__).parent / "pictures" / "layers.svg"

WIDTH, LINE, PADDING, GAP = 460, 17, 10, 34
WRAP = 66  # characters of a line in a box
ASIDE = ("browse", "store")  # drawn beside the others: what reads a result knows nothing of what made it


class Layer(Protocol):
    """As tests/test_architecture.py has it."""

    about: str
    files: tuple[str, ...]
    sees: tuple[str, ...]
    top: frozenset[str]
    lazily: frozenset[str]


def draw(layers: Mapping[str, Layer]) -> str:
    """The layers as SVG: users above, what they use below, an arrow for each import that no other arrow implies."""
    known = {name: {seen.partition(".")[0] for seen in layer.sees} for name, layer in layers.items()}
    texts = {name: _lines(name, layers, known) for name in layers}
    heights = {name: LINE * len(lines) + 2 * PADDING for name, lines in texts.items()}
    column = sorted((name for name in layers if name not in ASIDE), key=lambda name: -_depth(name, known))
    places, y = {}, 0
    for name in column:
        places[name] = (0, y)
        y += heights[name] + GAP
    for name in ASIDE:
        beside = min((n for n in column if _depth(n, known) <= _depth(name, known) + 2), key=lambda n: places[n][1])
        places[name] = (WIDTH + 2 * GAP, places[beside][1])
    arrows = [
        _arrow(name, other, places, heights)
        for name, seen in known.items()
        for other in seen
        if not any(other in _reach(between, known) for between in seen - {other})
    ]
    boxes = [_box(places[name], heights[name], texts[name]) for name in layers]
    size = (2 * WIDTH + 2 * GAP, y - GAP)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-2 -2 {size[0] + 4} {size[1] + 4}" '
        'font-family="system-ui, sans-serif" font-size="13">\n'
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#888"/></marker></defs>'
    )
    return "\n".join([head, *sorted(arrows), *boxes, "</svg>", ""])


def _reach(name: str, known: Mapping[str, set[str]]) -> set[str]:
    return known[name].union(*(_reach(seen, known) for seen in known[name]))


def _depth(name: str, known: Mapping[str, set[str]]) -> int:
    return 1 + max((_depth(seen, known) for seen in known[name]), default=-1)


def _lines(name: str, layers: Mapping[str, Layer], known: Mapping[str, set[str]]) -> list[str]:
    """Name and purpose, files, third parties, and what lies below but must not be seen."""
    layer = layers[name]
    files = [file.replace(r"(\..*)?", "/") or "__init__" for file in layer.files]
    parts = sorted(seen for seen in layer.sees if "." in seen)
    forbidden = sorted(_reach(name, known) - known[name])
    lines = [f"{name}: {layer.about}", *_wrapped(files)]
    lines += _wrapped(["with " + ", ".join(sorted(layer.top))]) if layer.top else []
    lines += _wrapped(["where it is needed " + ", ".join(sorted(layer.lazily))]) if layer.lazily else []
    lines += [f"of {part.partition('.')[0]} only {part}" for part in parts]
    return lines + ([f"not: {', '.join(forbidden)}"] if forbidden else [])


def _wrapped(words: list[str]) -> list[str]:
    lines = [""]
    for word in ", ".join(words).split(" "):
        if len(lines[-1]) + len(word) > WRAP:
            lines.append("")
        lines[-1] += f"{' ' if lines[-1] else ''}{word}"
    return lines


def _box(place: tuple[int, int], height: int, lines: list[str]) -> str:
    x, y = place
    name, _, about = lines[0].partition(":")
    spans = [f'<tspan font-weight="bold">{escape(name)}</tspan>{escape(": " + about.strip())}', *map(escape, lines[1:])]
    texts = [
        f'<text x="{x + PADDING}" y="{y + PADDING + 13 + LINE * i}" fill="{"#123" if i == 0 else "#456"}">{span}</text>'
        for i, span in enumerate(spans)
    ]
    frame = f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{height}" rx="6" fill="#e8eef7" stroke="#7a93b8"/>'
    return "\n".join([frame, *texts])


def _arrow(user: str, used: str, places: Mapping[str, tuple[int, int]], heights: Mapping[str, int]) -> str:
    (x1, y1), (x2, y2) = places[user], places[used]
    if x1 == x2:
        ends = (x1 + WIDTH // 2, y1 + heights[user], x2 + WIDTH // 2, y2)
    elif x1 < x2:
        ends = (x1 + WIDTH, y1 + heights[user] // 2, x2, y2 + heights[used] // 2)
    else:
        ends = (x1, y1 + heights[user] // 2, x2 + WIDTH, y2 + heights[used] // 2)
    return '<line x1="{}" y1="{}" x2="{}" y2="{}" stroke="#888" stroke-width="1.5" marker-end="url(#tip)"/>'.format(
        *ends
    )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from tests.test_architecture import LAYERS

    DRAWING.write_text(draw(LAYERS))
