"""Everything that a result holds, read again: what is damaged, and how a run makes it anew."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distinfluence.errors import CorruptStoreError
from distinfluence.store.read.result import open_influences
from distinfluence.store.write.strips import BY_STRIP
from distinfluence.store.write.writer import RANKING_ARRAYS, TEST_ARRAYS, InfluenceWriter

_WHOLE = slice(None)


@dataclass(frozen=True)
class Damage:
    """What is damaged in a result. False if nothing is.

    Attributes:
        strips: Strips whose mark, values, points or overview cells are not those that were written.
        arrays: Names of arrays of test points and rankings that are not those that were written.
    """

    strips: tuple[int, ...]
    arrays: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.strips or self.arrays)

    def __str__(self) -> str:
        some = ", ".join(map(str, self.strips[:10])) + (", …" if len(self.strips) > 10 else "")
        parts = [f"strips {some}"] if self.strips else []
        return " and ".join([*parts, *(f"`{name}`" for name in self.arrays)]) or "nothing"


def find_damage(path: str | os.PathLike[str]) -> Damage:
    """Read the whole result, a strip at a time, and compare the checksums.

    Args:
        path: A folder or a URL. The result may be running: strips that are not marked do not count.

    Returns:
        The damaged strips and arrays.

    Raises:
        StoreNotFoundError: If there is nothing at `path`.
        ForeignStoreError: If something else than a result is at `path`.
        StoreError: If a newer version wrote the result, or it cannot be read.
        CorruptStoreError: If the description of an array is damaged.
    """
    return _Reading(path).damage()


def mend(writer: InfluenceWriter) -> Damage:
    """Reopen what is damaged, so that the run that continues computes it again.

    Args:
        writer: The result.

    Returns:
        The damaged strips and arrays, now reopened.

    Raises:
        CorruptStoreError: If the description of an array is damaged.
        StoreError: If the folder cannot be written.
    """
    damage = find_damage(writer.path)
    writer.reopen(damage.strips, damage.arrays)
    return damage


class _Reading:
    """The arrays of a result, read to see whether they can be."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._result = open_influences(path)
        self._layout = self._result.layout

    def damage(self) -> Damage:
        """Return the damage of all strips and arrays."""
        strips = tuple(i for i in range(self._layout.n_strips) if self._is_damaged(i))
        tests = tuple(name for name in TEST_ARRAYS if self._read(name) is None)
        rankings = RANKING_ARRAYS if self._layout.ranked and self._result.complete else ()
        return Damage(strips, (*tests, *(name for name in rankings if not self._is_ranked(name))))

    def _is_damaged(self, i: int) -> bool:
        mark = self._read("strip_status", i)
        if mark is None or mark != 1:
            return mark is None
        columns = self._layout.strip_slice(i)
        values = self._read("influences", (_WHOLE, columns))
        if values is None or not np.isfinite(values).all():
            return True
        reads: list[tuple[str, Any]] = [(name, columns) for name in BY_STRIP]
        reads += [("strips/index", i), ("strips/value", i)]
        for level in self._layout.levels:
            first = i * level.cells_per_strip
            reads.append((f"overview/{level.name}", (_WHOLE, slice(first, first + level.cells_per_strip))))
        return any(self._read(name, key) is None for name, key in reads)

    def _is_ranked(self, name: str) -> bool:
        values = self._read(name)
        return values is not None and bool((values >= 0).all() if name.endswith("index") else np.isfinite(values).all())

    def _read(self, name: str, key: Any = _WHOLE) -> NDArray[Any] | None:
        """Return the values, none where the result has no such array; None if they are not those that were written."""
        try:
            return self._result.read(name, key) if self._result.has(name) else np.empty(0)
        except CorruptStoreError:
            return None
