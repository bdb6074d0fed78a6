"""The highlights of a result as one file of HTML to send: no script, nothing from a network, everything escaped."""

from __future__ import annotations

from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from distinfluence.browse.export.tables import exported
from distinfluence.browse.server.api import ResultApi
from distinfluence.browse.views.png import colours, data_uri, robust_scale
from distinfluence.browse.views.rendering import Shown
from distinfluence.errors import CorruptStoreError
from distinfluence.store.format.ranking import require_ranked
from distinfluence.store.read.facts import facts


def write_report(api: ResultApi, path: Path, *, tests: int = 8, k: int = 6, suspects: int = 24) -> None:
    """Write what it is, a picture of the matrix, `tests` test points of the largest loss, `suspects` suspicious labels.

    k: how many helpful and harmful training points of each. What is damaged is said in its place. Raises StoreError,
    and ShapeError for a result of mode `perturbation`.
    """
    require_ranked(api.result.layout, "export")
    style = resources.files("distinfluence.browse").joinpath("page", "report.css").read_text()
    document = "".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" ',
            'content="width=device-width, initial-scale=1"><meta http-equiv="Content-Security-Policy" ',
            "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">",
            f"<title>Influences: {escape(api.result.path.name)}</title><style>{style}</style></head><body>",
            f"<h1>Influences: {escape(api.result.path.name)}</h1>{_facts(api)}{_map(api)}",
            *(_test(api, row, k) for row in _worst_rows(api, tests)),
            _suspects(api, suspects),
            "</body></html>\n",
        ]
    )
    with exported(path) as partial:
        partial.write_text(document, encoding="utf-8")


def _facts(api: ResultApi) -> str:
    rows = (f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts(api.result).items())
    return f"<dl>{''.join(rows)}</dl>"


def _map(api: ResultApi) -> str:
    n_test, n_train = api.result.shape
    if not api.result.finished_strips().any():
        return '<p class="damaged">Nothing is computed yet.</p>'
    picture = api.picture(slice(0, n_test), slice(0, n_train), 400, 1000, ("stored", "stored"))
    scale = robust_scale(picture.values)
    uri = data_uri(colours(picture.values, scale))
    strips = ", ".join(map(str, picture.damaged[:20])) + (", …" if len(picture.damaged) > 20 else "")
    damage = " or damaged" if picture.damaged else ""
    warning = (
        f'<p class="damaged">Strips {strips} of the matrix are damaged and are not shown; rankings may name points of '
        "theirs, which were ranked before. Compute them again.</p>"
        if picture.damaged
        else ""
    )
    return warning + (
        f'<h2>The matrix</h2><img class="map" alt="heat map of the influences" src="{uri}"><p class="quiet">Rows are '
        f"test points, columns training points. Blue helps, orange harms, full colour from ±{scale:.3g}; grey is not "
        f"computed{damage}. A cell is the entry of largest magnitude that it covers.</p>"
    )


def _worst_rows(api: ResultApi, count: int) -> list[int]:
    losses = np.nan_to_num(api.result.test_loss, nan=-np.inf)
    return sorted(np.argsort(-losses, kind="stable")[:count].tolist(), key=lambda row: -losses[row])


def _test(api: ResultApi, row: int, k: int) -> str:
    try:
        point = api.test_point(row, k)
    except CorruptStoreError as error:
        return f'<h2>Test point {row}</h2><p class="damaged">{escape(str(error))}</p>'
    helpful = "".join(_card("training", other) for other in point["helpful"])
    harmful = "".join(_card("training", other) for other in point["harmful"])
    return (
        f'<h2>Test point {row}</h2><div class="cards">{_card("test", point)}</div><h3>helped most by</h3>'
        f'<div class="cards">{helpful}</div><h3>harmed most by</h3><div class="cards">{harmful}</div>'
    )


def _suspects(api: ResultApi, count: int) -> str:
    try:
        points = api.suspects("net_harm", count)["points"]
    except CorruptStoreError as error:
        return f'<h2>Suspicious labels</h2><p class="damaged">{escape(str(error))}</p>'
    cards = "".join(_card("training", {**point, "value": -point["score"]}) for point in points)
    return (
        '<h2>Suspicious labels</h2><p class="quiet">The training points with the largest net harm: the sum of their '
        f'influence on all test points is the most negative.</p><div class="cards">{cards}</div>'
    )


def _card(axis: str, point: dict[str, Any]) -> str:
    label = "" if point["label"] is None else f" · “{escape(point['label'])}”"
    value = point.get("value")
    influence = "" if value is None else f"<br>{'helps' if value > 0 else 'harms'} {value:+.4g}"
    loss = "" if point["loss"] is None else f'<br><span class="quiet">loss {point["loss"]:.4g}</span>'
    return f'<div class="card">{_sample(point["sample"])}{axis} {point["index"]}{label}{influence}{loss}</div>'


def _sample(sample: Shown | None) -> str:
    if sample is None:
        return ""
    if sample["kind"] == "image":
        return f'<img alt="the sample" src="{escape(sample["uri"])}"><br>'
    if sample["kind"] == "text":
        return f"<p>{escape(sample['text'])}{' …' if sample['cut'] else ''}</p>"
    if sample["kind"] == "parts":
        return "".join(_sample(part) for part in sample["parts"])
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in sample["cells"])
    return f"<table>{cells}</table>"
