"""Plots of a result as PNG files: the matrix, the spectrum of its scores, the residuals of its solves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distinfluence.browse.views.picture import Pictures
from distinfluence.browse.views.png import HARMS, HELPS, robust_scale
from distinfluence.errors import MissingDependencyError, StoreError
from distinfluence.store import InfluenceResult
from distinfluence.store.format.ranking import require_ranked

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN_SCORES = 2**21


def plot(result: InfluenceResult, what: str, path: Path) -> None:
    """Draw `what` ("heatmap", "scores" or "residuals") to the file `path`.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ShapeError: The result has mode `perturbation`.
        StoreError: The result cannot be read, or the file cannot be written.
    """
    require_ranked(result.layout, "plot")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "plots need matplotlib, which is not installed. Run pip install matplotlib."
        ) from error
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    PLOTS[what](result, figure.subplots())
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise StoreError(f"cannot write `{path}`: {error.strerror or error}. Pass another path.") from error


def _heatmap(result: InfluenceResult, axes: Axes) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    n_test, n_train = result.shape
    values = Pictures(result).picture(slice(0, n_test), slice(0, n_train), 500, 900).values
    values = np.where(np.isfinite(values), values, np.nan)
    scale = robust_scale(values)
    ends = [tuple(part / 255 for part in colour) for colour in (HARMS, (255, 255, 255), HELPS)]
    colours = LinearSegmentedColormap.from_list("influence", ends).with_extremes(bad="0.7")
    extent = (-0.5, n_train - 0.5, n_test - 0.5, -0.5)
    image = axes.imshow(
        values, cmap=colours, vmin=-scale, vmax=scale, aspect="auto", extent=extent, interpolation="nearest"
    )
    axes.figure.colorbar(image, ax=axes, label="influence: positive helps, negative harms", extend="both")
    axes.set(xlabel="training point", ylabel="test point", title=f"Influences, {n_test} × {n_train}")


def _scores(result: InfluenceResult, axes: Axes) -> None:
    n_test, n_train = result.shape
    rows = np.unique(np.linspace(0, n_test - 1, max(1, min(n_test, _SHOWN_SCORES // n_train))).astype(np.int64))
    values = np.concatenate([result[int(row)] for row in rows])
    magnitudes = values[np.isfinite(values) & (values != 0)]
    for sign, colour, name in ((1, HELPS, "helpful"), (-1, HARMS, "harmful")):
        own = np.sort(np.abs(magnitudes[np.sign(magnitudes) == sign]))[::-1]
        if own.size:
            places = np.unique(np.geomspace(1, own.size, min(own.size, 2000)).astype(np.int64))
            axes.plot(places / max(1, values.size), own[places - 1], color=[c / 255 for c in colour], label=name)
    axes.set(xlabel="share of all pairs", ylabel="|influence|", title=f"Spectrum of scores, {rows.size} test points")
    if magnitudes.size:
        axes.set(xscale="log", yscale="log")
        axes.legend()


def _residuals(result: InfluenceResult, axes: Axes) -> None:
    residuals, converged = result.relative_residual, result.converged
    known = np.isfinite(residuals) & (residuals > 0)
    for mask, colour, name in ((converged, HELPS, "converged"), (~converged, HARMS, "did not converge")):
        rows = np.flatnonzero(mask & known)
        n = int((mask & (converged | np.isfinite(residuals))).sum())  # NaN: not measured, so not a failure
        axes.plot(rows, residuals[rows], ".", color=[c / 255 for c in colour], label=f"{name}: {n}")
    axes.set(xlabel="test point", ylabel="relative residual", title="Residuals of the solves")
    if known.any():
        axes.set_yscale("log")
    else:
        axes.text(0.5, 0.5, "residuals not measured", ha="center", transform=axes.transAxes)
    axes.legend()


PLOTS: dict[str, Callable[[InfluenceResult, Axes], None]] = {
    "heatmap": _heatmap,
    "residuals": _residuals,
    "scores": _scores,
}
