"""The highlights of a result as one file of HTML to send: no script, nothing from a network, everything escaped."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from distinfluence.browse.export.tables import exported
from distinfluence.browse.server.api import ResultApi
from distinfluence.browse.views.png import colours, data_uri, robust_scale
from distinfluence.errors import CorruptStoreError
from distinfluence.store.format.ranking import require_ranked
from distinfluence.store.read.facts import facts


def write_report(api: ResultApi, path: Path, *, tests: int = 8, k: int = 6, suspects: int = 24) -> None:
    """Write a summary, a picture of the matrix, the test points of largest loss and suspicious labels.

    The report says in its place what is damaged.

    Args:
        api: Questions about the result.
        path: The file to write.
        tests: How many test points of the largest loss.
        k: How many helpful and harmful training points of each.
        suspects: How many suspicious labels.

    Raises:
        StoreError: The result cannot be read, or the file cannot be written.
        ShapeError: The result has mode `perturbation`.
    """
    require_ranked(api.result.layout, "export")
    page = resources.files("distinfluence.browse").joinpath("page")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    document = environment.from_string(page.joinpath("report.html").read_text()).render(
        name=api.result.path.name,
        style=page.joinpath("report.css").read_text(),
        facts=facts(api.result),
        map=_map(api),
        tests=[_or_damage(lambda row=row: api.test_point(row, k), index=row) for row in _worst_rows(api, tests)],
        suspects=_or_damage(lambda: api.suspects("net_harm", suspects)),
    )
    with exported(path) as partial:
        partial.write_text(document, encoding="utf-8")


def _map(api: ResultApi) -> dict[str, Any] | None:
    """Return the picture of the matrix; None where nothing is computed yet."""
    n_test, n_train = api.result.shape
    if not api.result.finished_strips().any():
        return None
    picture = api.picture(slice(0, n_test), slice(0, n_train), 400, 1000, ("stored", "stored"))
    scale = robust_scale(picture.values)
    return {"damaged": picture.damaged, "scale": scale, "uri": data_uri(colours(picture.values, scale))}


def _or_damage(ask: Any, **known: Any) -> dict[str, Any]:
    """Return an answer, or the damage that prevents it."""
    try:
        return {"damage": None, **ask(), **known}
    except CorruptStoreError as error:
        return {"damage": str(error), **known}


def _worst_rows(api: ResultApi, count: int) -> list[int]:
    losses = np.nan_to_num(api.result.test_loss, nan=-np.inf)
    return sorted(np.argsort(-losses, kind="stable")[:count].tolist(), key=lambda row: -losses[row])
