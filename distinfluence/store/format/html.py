"""A result as a small table of HTML, for notebooks. Everything that comes from the disk is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np


def table_as_html(caption: str, columns: Mapping[str, Sequence[object]]) -> str:
    """Return a table with a header and one row for each entry; everything is escaped."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    rows = zip(*columns.values(), strict=True)
    body = "".join(f"<tr>{''.join(f'<td>{escape(_cell(value))}</td>' for value in row)}</tr>" for row in rows)
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float | np.floating) else cut(str(value), 80)


def cut(text: str, most: int) -> str:
    """Return the text, shortened to `most` characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
