"""Rankings and slices of a result as CSV or Parquet, written strip by strip; the matrix is never held whole."""

from __future__ import annotations

import contextlib
import csv
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distinfluence.atomic import appearing
from distinfluence.errors import IncompleteResultError, MissingDependencyError, StoreError
from distinfluence.store import InfluenceResult
from distinfluence.store.format.ranking import require_ranked
from distinfluence.store.read.tables import KnownPoints, ranking_table

Table = Mapping[str, NDArray[Any]]
_ROWS_AT_ONCE = 64


def rankings(result: InfluenceResult, tests: slice, k: int, partial: bool) -> Iterator[Table]:
    """Yield the k most helpful and most harmful training points of test points, some test points at a time.

    The columns are the same as in `InfluenceResult.to_dataframe`.

    Raises:
        IncompleteResultError: A ranking is not computed yet.
    """
    known = KnownPoints(result)
    for start in range(tests.start, tests.stop, _ROWS_AT_ONCE):
        rows = np.arange(start, min(start + _ROWS_AT_ONCE, tests.stop))
        yield ranking_table(result, rows, k, partial, known)


def entries(result: InfluenceResult, tests: slice, trains: slice, partial: bool) -> Iterator[Table]:
    """Yield the entries of a slice, strip by strip: test, train, influence, bound, and ids and labels that are known.

    Raises:
        IncompleteResultError: A strip is missing, unless `partial`, which omits its entries.
    """
    require_ranked(result.layout, "export")
    known = KnownPoints(result)
    rows, finished, strip = np.arange(tests.start, tests.stop), result.finished_strips(), result.layout.strip
    for i in range(trains.start // strip, -(-trains.stop // strip)):
        if not finished[i]:
            if partial:
                continue
            raise IncompleteResultError(
                f"strip {i} is not written yet. Finish the run, or pass --partial for the strips that are there."
            )
        own = result.layout.strip_slice(i)
        columns = np.arange(max(own.start, trains.start), min(own.stop, trains.stop))
        for start in range(0, rows.size, _ROWS_AT_ONCE):
            some = rows[start : start + _ROWS_AT_ONCE]
            values = result[int(some[0]) : int(some[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
            table = {
                "test": np.repeat(some, columns.size),
                "train": np.tile(columns, some.size),
                "influence": values.ravel(),
            }
            yield known.beside(table)


def write_csv(path: Path, tables: Iterator[Table]) -> int:
    """Write tables with the same columns one below the other; return the number of lines.

    Texts that a spreadsheet would run as a formula get an apostrophe in front.

    Raises:
        StoreError: The file cannot be written.
    """
    written = 0
    with exported(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for table in tables:
            if not written:
                writer.writerow(table)
            columns = [_harmless(values) for values in table.values()]
            writer.writerows(zip(*columns, strict=True))
            written += len(columns[0])
    return written


def write_parquet(path: Path, tables: Iterator[Table]) -> int:
    """Write tables as `write_csv` does, but as Parquet.

    Raises:
        MissingDependencyError: The package that writes Parquet is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            "Parquet needs pyarrow, which is not installed. Run pip install pyarrow, or export CSV."
        ) from error
    contents = (pyarrow.table({name: pyarrow.array(v) for name, v in table.items()}) for table in tables)
    first, written = next(contents, None), 0
    if first is None:  # an empty slice
        return 0
    with exported(path) as partial, pyarrow.parquet.ParquetWriter(partial, first.schema) as writer:
        for content in itertools.chain([first], contents):
            writer.write_table(content)
            written += content.num_rows
    return written


@contextlib.contextmanager
def exported(path: Path) -> Iterator[Path]:
    """Yield a path to write to that becomes `path` at the end.

    Raises:
        StoreError: The file system raised an error.
    """
    try:
        with appearing(path) as partial:
            yield partial
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"cannot write `{path}`: {error.strerror or error}. Pass another path.") from error


def _harmless(values: NDArray[Any]) -> list[Any]:
    if values.dtype.kind == "f":
        return [f"{value:.9g}" for value in values.tolist()]
    if values.dtype.kind not in "OU":
        return list(values.tolist())
    return [f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text for text in values.tolist()]
