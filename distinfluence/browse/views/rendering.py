"""Samples shown as what they are: an image, a text, a row of a table. What is shown is plain JSON, never markup.

Two small protocols are open to the user's own code. A `PointSource` says where samples and labels come from: what
`annotate` stored with the result, or a data set. A `Renderer` makes of one input something that can be drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypedDict, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from distinfluence.browse.views.png import data_uri
from distinfluence.errors import DtypeError
from distinfluence.store import Sample

SMALL_SIDE, LARGE_SIDE = 96, 512
SMALL_TEXT, LARGE_TEXT = 280, 20_000
SMALL_TABLE, LARGE_TABLE = 6, 400
MAX_PARTS = 8


@dataclass(frozen=True)
class Tokens:
    """A text in the pieces that the model reads, so that the contribution of each is drawn on it.

    Attributes:
        texts: The pieces, in order.
    """

    texts: tuple[str, ...]


Drawable: TypeAlias = "str | Tokens | NDArray[Any] | Mapping[str, object] | Sequence[Drawable]"
"""What can be drawn: a text, whole or as `Tokens`; an image [h, w], [h, w, 3] or [3, h, w], uint8 or scaled from its
smallest to its largest number; a row of a table, by name or as a flat array; several of these, one below the other."""


@runtime_checkable
class Renderer(Protocol):
    """Makes of one input of a data set what is shown of it.

    It is called once for each sample that is looked at, with the first part of the sample as the data set gives it (an
    array, or a tuple or dict of arrays), never by two threads at once for one axis.
    """

    def __call__(self, sample: Any, /) -> Drawable:
        """Return what to draw for a sample."""


class Shown(TypedDict, total=False):
    """One sample for the page. kind: image (`uri`, `width`, `height`), text (`text`), table (`cells`) or `parts`."""

    kind: str
    uri: str
    width: int
    height: int
    text: str
    cells: list[tuple[str, str]]
    parts: list[Shown]
    cut: bool


class PointSource(Protocol):
    """Labels, names and samples of the points of one axis.

    Attributes:
        range: Smallest and largest number of the images, which are drawn black and white.
        columns: Names of a table's columns.
    """

    range: tuple[float, float]
    columns: list[str]

    @property
    def kind(self) -> str | None:
        """Kind of the samples: image, text or table; None without samples."""

    def labels(self) -> NDArray[Any] | None:
        """Look up all labels.

        Returns:
            The labels, [n], or None if they are not known.
        """

    def self_influence(self) -> NDArray[np.float32] | None:
        """Look up all self-influences.

        Returns:
            The self-influences, [n], or None if they are not known.
        """

    def id_of(self, index: int) -> str | None:
        """Look up the user's own name of a point.

        Args:
            index: Number of the point, from 0.

        Returns:
            The name, or None if there are no names.
        """

    def name_of(self, label: float) -> str:
        """Look up the name of a label.

        Args:
            label: The label.

        Returns:
            Its name, or the number as text.
        """

    def sample(self, index: int) -> Drawable | Sample | None:
        """Look up one sample.

        Args:
            index: Number of the point, from 0.

        Returns:
            The sample, or None if it is not known.
        """


def show(source: PointSource, index: int, *, small: bool) -> Shown | None:
    """Return sample `index` for the page.

    Args:
        source: The samples.
        index: Which sample.
        small: Return a thumbnail, the beginning of a text, or a few columns.
    """
    sample = source.sample(index)
    if sample is None:
        return None
    if not isinstance(sample, Sample):
        return draw(sample, source.columns, small=small)
    if isinstance(sample.values, str):
        return _text(sample.values, small)
    if sample.kind == "table":
        return _row(sample.values, source.columns, small)
    return _image(sample.values, source.range, SMALL_SIDE if small else LARGE_SIDE)


def draw(what: Drawable, columns: Sequence[str] = (), *, small: bool) -> Shown:
    """Convert what a renderer gave for the page.

    Raises:
        DtypeError: It cannot be drawn.
    """
    if isinstance(what, str):
        return _text(what, small)
    if isinstance(what, Tokens):
        return _text("".join(what.texts), small)
    if isinstance(what, Mapping):
        return _cells([(str(name), _cell(value)) for name, value in what.items()], small)
    if isinstance(what, np.ndarray) or hasattr(what, "__array__"):
        values = np.asarray(what)
        if values.dtype.kind not in "fiub":
            raise DtypeError(f"a renderer's array must hold numbers, got {values.dtype}. Return a text instead.")
        if values.ndim < 2:
            return _row(values.reshape(-1), columns, small)
        if values.ndim == 2 or (values.ndim == 3 and {1, 3, 4} & {values.shape[0], values.shape[2]}):
            return _image(values, _ends(values), SMALL_SIDE if small else LARGE_SIDE)
        return _text(f"{values.dtype} {list(values.shape)}, from {_cell(values.min())} to {_cell(values.max())}", small)
    if isinstance(what, Sequence):
        return {"kind": "parts", "parts": [draw(part, columns, small=small) for part in what[:MAX_PARTS]]}
    raise DtypeError(
        f"a renderer must return a text, an array, a mapping, or a list of these, got {type(what).__name__}."
    )


def _ends(image: NDArray[Any]) -> tuple[float, float]:
    """Return the values that are black and white."""
    if image.dtype == np.uint8 or image.size == 0:
        return 0.0, 255.0
    return float(image.min()), float(image.max())


def _cell(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float | np.floating) else str(value)


def _cells(cells: list[tuple[str, str]], small: bool) -> Shown:
    limit = SMALL_TABLE if small else LARGE_TABLE
    return {"kind": "table", "cells": cells[:limit], "cut": len(cells) > limit}


def _text(text: str, small: bool) -> Shown:
    limit = SMALL_TEXT if small else LARGE_TEXT
    return {"kind": "text", "text": text[:limit], "cut": len(text) > limit}


def _row(values: NDArray[Any], names: Sequence[str], small: bool) -> Shown:
    some = values[: LARGE_TABLE + 1].tolist()
    return _cells(
        [(names[i] if i < len(names) else f"column {i}", _cell(value)) for i, value in enumerate(some)], small
    )


def _image(values: NDArray[Any], ends: tuple[float, float], side: int) -> Shown:
    if values.ndim == 3 and values.shape[0] in (1, 3) and values.shape[2] not in (1, 3):
        values = np.moveaxis(values, 0, 2)
    if values.ndim == 3:
        values = values[:, :, :3] if values.shape[2] >= 3 else values[:, :, 0]
    step = max(1, math.ceil(max(values.shape[:2]) / side))
    low, high = ends
    with np.errstate(invalid="ignore", over="ignore"):
        share = (values[::step, ::step].astype(np.float64) - low) / ((high - low) or 1.0)
    pixels = (np.clip(np.nan_to_num(share), 0.0, 1.0) * 255).round().astype(np.uint8)
    return {"kind": "image", "uri": data_uri(pixels), "width": pixels.shape[1], "height": pixels.shape[0]}
