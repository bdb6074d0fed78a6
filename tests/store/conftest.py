"""A small result to write and read, and its values."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from distinfluence.store import InfluenceWriter, Layout

ATTRIBUTES = {
    "fingerprints": {"model parameters": "aa", "training data": "bb"},
    "solver": {"name": "cg", "damping": 0.1},
    "versions": {"torch": "2.9"},
}


def matrix(layout: Layout, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(layout.shape).astype(np.float32)


def write_all(writer: InfluenceWriter, values: NDArray[np.float32], skip: tuple[int, ...] = ()) -> None:
    for i in range(writer.layout.n_strips):
        if i not in skip:
            columns = writer.layout.strip_slice(i)
            points = np.arange(columns.start, columns.stop, dtype=np.float32)
            writer.write_strip(i, values[:, columns], loss=points, gradient_norm=points + 0.5)


@pytest.fixture
def layout() -> Layout:
    return Layout(n_test=5, n_train=23, strip=8, top_k=4)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., tuple[InfluenceWriter, NDArray[np.float32]]]:
    def make(layout: Layout, finish: bool = True, skip: tuple[int, ...] = ()) -> Any:
        writer = InfluenceWriter.create(tmp_path / "result.zarr", layout, ATTRIBUTES)
        values = matrix(layout)
        write_all(writer, values, skip)
        if finish:
            writer.finish()
        return writer, values

    return make
