"""The ranking of a test point, or of a set of them, for the terminal."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distinfluence.errors import SettingError
from distinfluence.store import InfluenceResult, Ranking
from distinfluence.store.format.ranking import checked_index
from distinfluence.store.read.analysis import checked_rows
from distinfluence.store.read.tables import KnownPoints, Table

_COLUMNS = {"train": "train", "influence": "influence", "bound": "±", "train_id": "id", "train_label": "label"}


@dataclass(frozen=True)
class Ranked:
    """Holds the rankings to print.

    Attributes:
        rows: The test points that were asked for.
        helpful: Columns of equal length, one line for each point.
        harmful: As `helpful`.
    """

    rows: NDArray[np.int64]
    helpful: dict[str, NDArray[Any]]
    harmful: dict[str, NDArray[Any]]


def asked_tests(
    result: InfluenceResult, test_index: int | None, tests: str | None, label: str | None
) -> NDArray[np.int64]:
    """Return the test points that the shell's user means, sorted.

    Raises:
        SettingError: The options contradict each other or name nothing.
        IndexRangeError: A test point lies outside the axis.
    """
    if sum(given is not None for given in (test_index, tests, label)) != 1:
        raise SettingError("`top` needs a test sample, `--tests` or `--label`: pass one of them.")
    n_test = result.shape[0]
    if test_index is not None:
        return np.array([checked_index("test_index", test_index, n_test)])
    if label is not None:
        return _of_class(result, label)
    assert tests is not None
    try:
        if ":" in tests:
            start, _, stop = tests.partition(":")
            rows = np.arange(n_test)[int(start or 0) : int(stop or n_test)]
        else:
            rows = np.array([int(part) for part in tests.split(",")])
    except ValueError:
        raise SettingError(f"`--tests` must be a range as 0:100, or a list as 3,7,12, got {tests!r}.") from None
    return checked_rows(rows, n_test)


def ranked(result: InfluenceResult, rows: NDArray[np.int64], k: int, partial: bool) -> Ranked:
    """Rank the k most helpful and most harmful training points of one test point, or by the mean over several."""
    if rows.size == 1:
        row = int(rows[0])
        ends = result.top(row, k, partial=partial), result.bottom(row, k, partial=partial)
    else:
        ends = result.top_of(rows, k, partial=partial), result.bottom_of(rows, k, partial=partial)
    known = KnownPoints(result)
    return Ranked(rows, *(_lines(known, rows, ranking) for ranking in ends))


def ranking_json(found: Ranked) -> str:
    """Return both ends as JSON: train and influence of each point, and what else is known."""
    both = {"helpful": found.helpful, "harmful": found.harmful}
    ends = {
        name: [dict(zip(columns, values, strict=True)) for values in zip(*map(_plain, columns.values()), strict=True)]
        for name, columns in both.items()
    }
    return json.dumps(ends, indent=2)


def ranking_table(result: InfluenceResult, found: Ranked) -> str:
    """Return both ends next to each other, with what is known of the test points above."""
    helpful, harmful = _block(found.helpful), _block(found.harmful)
    wide = max(map(len, helpful), default=0)
    lines = [f"{a:<{wide}}   {b}".rstrip() for a, b in zip(helpful, harmful, strict=True)]
    return "\n".join([_title(result, found.rows), f"{'most helpful':>{wide}}   {'most harmful':>{wide}}", *lines])


def _of_class(result: InfluenceResult, label: str) -> NDArray[np.int64]:
    points = result.points("test")
    labels = points.labels()
    if labels is None:
        raise SettingError("`--label` needs labels of the test samples, and none are stored. Call `annotate` first.")
    names = {float(value): points.name_of(float(value)) for value in np.unique(labels)}
    meant = [value for value, name in names.items() if label in (name, f"{value:g}")]
    if not meant:
        some = ", ".join(list(names.values())[:10])
        raise SettingError(f"`--label` must be a label of the test samples ({some}), got {label!r}.")
    return np.flatnonzero(np.isin(labels, meant))


def _lines(known: KnownPoints, rows: NDArray[np.int64], ranking: Ranking) -> dict[str, NDArray[Any]]:
    n = ranking.indices.size
    table: Table = {"test": np.repeat(rows[:1], n), "train": ranking.indices, "influence": ranking.values}
    columns = known.beside(table)
    if rows.size > 1:  # a mean is off by no more than the mean of the bounds
        tests = np.repeat(rows, n)
        every = known.beside({**table, "test": tests, "train": np.tile(ranking.indices, rows.size)})
        columns["bound"] = every["bound"].reshape(rows.size, n).mean(axis=0)
    if np.isnan(columns["bound"]).all():
        del columns["bound"]
    return {name: columns[name] for name in _COLUMNS if name in columns}


def _plain(values: NDArray[Any]) -> list[Any]:
    if values.dtype.kind == "f":
        return [float(value) if np.isfinite(value) else None for value in values]
    return list(values.tolist())


def _block(columns: dict[str, NDArray[Any]]) -> list[str]:
    written = [[_COLUMNS[name], *map(_written, values.tolist())] for name, values in columns.items()]
    wide = [max(map(len, column), default=0) for column in written]
    return [
        "  ".join(f"{cell:>{w}}" for cell, w in zip(line, wide, strict=True)) for line in zip(*written, strict=True)
    ]


def _written(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    # an escape sequence in a name would be obeyed by the terminal
    return "".join(c if c.isprintable() else "�" for c in str(value))


def _title(result: InfluenceResult, rows: NDArray[np.int64]) -> str:
    loss, is_baseline = float(result.test_loss[rows].mean()), bool(result.provenance.get("baseline"))
    if rows.size > 1:
        mean = "" if np.isnan(loss) else f": mean loss {loss:.4g}"
        return f"{rows.size} test samples, by the mean of their influences{mean}"
    row = int(rows[0])
    points, residual = result.points("test"), float(result.relative_residual[row])
    labels, own = points.labels(), points.id_of(row)
    name = "" if own is None else f" ({_written(own)})"
    known = [] if is_baseline and np.isnan(loss) else [f"loss {loss:.4g}"]
    if not is_baseline:  # which solves nothing
        known.append("residual not measured" if np.isnan(residual) else f"relative residual {residual:.1e}")
    known += [] if labels is None else [f"label {_written(points.name_of(float(labels[row])))}"]
    return f"test sample {row}{name}{': ' if known else ''}{', '.join(known)}"
