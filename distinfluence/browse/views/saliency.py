"""What a result of mode `perturbation` shows: how each number of a training input moves the loss of a test point."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from distinfluence.browse.views.png import colours, data_uri, robust_scale
from distinfluence.errors import SettingError
from distinfluence.store import InfluenceResult

MAX_ROW = 2**24  # entries of one test point's row that are read to rank training points
MAX_INPUT = 2**22
MAX_NUMBERS = 40
_IMAGE_SIDE = 512


class Saliency(TypedDict, total=False):
    """Holds one pair's influences by input.

    Attributes:
        norm: The norm over the input.
        shape: The shape of the input.
        uri: A picture of the influences, where the input is a picture.
        width: The width of the picture.
        height: The height of the picture.
        scale: The magnitude at which colours are full.
        numbers: Place and value of the influences of largest magnitude, the largest first.
    """

    norm: float
    shape: list[int]
    uri: str
    width: int
    height: int
    scale: float
    numbers: list[tuple[str, float]]


def saliency(values: NDArray[np.float32]) -> Saliency:
    """Return what is shown of one pair.

    Args:
        values: [*input_shape].
    """
    known = np.where(np.isfinite(values), values, np.float32(0.0))
    flat = np.abs(known).ravel()
    first = np.argsort(-flat, kind="stable")[: min(MAX_NUMBERS, flat.size)]
    places = [", ".join(map(str, place)) for place in zip(*np.unravel_index(first, values.shape), strict=True)]
    found: Saliency = {
        "norm": float(np.linalg.norm(known.astype(np.float64))),
        "shape": list(values.shape),
        "numbers": [(place, float(v)) for place, v in zip(places, known.ravel()[first].tolist(), strict=True)],
    }
    plane = _plane(known)
    if plane is not None:
        scale = robust_scale(plane)
        pixels = colours(plane, scale)
        found |= {"uri": data_uri(pixels), "height": plane.shape[0], "width": plane.shape[1], "scale": scale}
    return found


def check_pair(result: InfluenceResult) -> None:
    """Pass for a result of influences by input whose inputs can be read.

    Raises:
        SettingError: The result has no influences by input, or too many inputs.
    """
    n = int(np.prod(result.layout.input_shape, dtype=np.float64))
    if result.layout.ranked or n > MAX_INPUT:
        raise SettingError(
            f"influences by input are shown of results of mode 'perturbation' with at most {MAX_INPUT} numbers in an "
            f"input, got inputs {result.layout.input_shape}."
        )


def strongest(result: InfluenceResult, test_index: int, k: int) -> list[tuple[int, float]] | None:
    """Return the k training points whose inputs move a test point most, with norms; None if the row is too large."""
    n_inputs = int(np.prod(result.layout.input_shape, dtype=np.float64))
    if result.layout.n_train * n_inputs > MAX_ROW:
        return None
    row = result[test_index].reshape(result.layout.n_train, -1)
    norms = np.linalg.norm(row.astype(np.float64), axis=1)
    order = np.argsort(-np.nan_to_num(norms, nan=-1.0), kind="stable")[:k]
    return [(j, float(norms[j])) for j in order.tolist() if np.isfinite(norms[j])]


def _plane(values: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """Return an input as a plane of signed numbers: channels summed, large ones thinned; None if not a picture."""
    if values.ndim == 3 and values.shape[0] in (1, 3, 4):
        values = values.sum(axis=0)
    elif values.ndim == 3 and values.shape[2] in (1, 3, 4):
        values = values.sum(axis=2)
    if values.ndim != 2:
        return None
    step = max(1, -(-max(values.shape) // _IMAGE_SIDE))
    return values[::step, ::step]
