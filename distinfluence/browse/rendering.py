"""Samples shown as what they are: an image, a text, a row of a table. What is shown is plain JSON, never markup.

Where samples come from is a small protocol, `PointSource`: what `annotate` stored with the result, or a data set.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

from distinfluence.browse.png import data_uri
from distinfluence.store import Sample

SMALL_SIDE, LARGE_SIDE = 96, 512
SMALL_TEXT, LARGE_TEXT = 280, 20_000
SMALL_TABLE, LARGE_TABLE = 6, 400


class Shown(TypedDict, total=False):
    """One sample for the page. kind: image (`uri`, `width`, `height`), text (`text`) or table (`cells`)."""

    kind: str
    uri: str
    width: int
    height: int
    text: str
    cells: list[tuple[str, str]]
    cut: bool


class PointSource(Protocol):
    """What is known of the points of one axis."""

    range: tuple[float, float]
    columns: list[str]

    @property
    def kind(self) -> str | None:
        """image, text, table, or None without samples."""

    def labels(self) -> NDArray[Any] | None:
        """[n], None if not known."""

    def self_influence(self) -> NDArray[np.float32] | None:
        """[n], None if not known."""

    def name_of(self, label: float) -> str:
        """A label as it is called."""

    def sample(self, index: int) -> Sample | None:
        """One sample, None if not known."""


def show(source: PointSource, index: int, *, small: bool) -> Shown | None:
    """Sample `index` for the page; small: a thumbnail, the beginning of a text, a few columns."""
    sample = source.sample(index)
    if sample is None:
        return None
    if isinstance(sample.values, str):
        return _text(sample.values, SMALL_TEXT if small else LARGE_TEXT)
    if sample.kind == "table":
        return _table(sample.values, source.columns, SMALL_TABLE if small else LARGE_TABLE)
    return _image(sample.values, source.range, SMALL_SIDE if small else LARGE_SIDE)


def _text(text: str, limit: int) -> Shown:
    return {"kind": "text", "text": text[:limit], "cut": len(text) > limit}


def _table(values: NDArray[Any], names: list[str], limit: int) -> Shown:
    cells = [
        (names[i] if i < len(names) else f"column {i}", f"{value:.5g}" if isinstance(value, float) else str(value))
        for i, value in enumerate(values[:limit].tolist())
    ]
    return {"kind": "table", "cells": cells, "cut": values.size > limit}


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
