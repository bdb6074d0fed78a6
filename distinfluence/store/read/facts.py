"""What a result says of itself: method, model, sizes, residuals."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distinfluence.store.format.html import cut
from distinfluence.store.read.arrays import ResultArrays


def result_as_html(result: ResultArrays) -> str:
    """Describe the result: what made it, how far it converged, and what it cost."""
    rows = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(text)}</td></tr>'
        for name, text in facts(result).items()
    )
    return f"<table><caption>Influences, {escape(str(result.path))}</caption><tbody>{rows}</tbody></table>"


def facts(result: ResultArrays) -> dict[str, str]:
    """Return text by name, what one asks first. Any attributes are taken: a result may be of an older version."""
    provenance = result.provenance
    done, n_strips = result.layout.n_strips - result.n_missing, result.layout.n_strips
    found = {
        **({"model": model} if (model := model_of(provenance)) else {}),
        "shape": f"{' × '.join(f'{n:,}' for n in result.shape)} (test × train{' × input' if result.shape[2:] else ''})",
        "state": "complete" if result.complete else f"running, {done} of {n_strips} strips",
        "method": method_of(provenance),
        "converged": "nothing is solved: a baseline"
        if provenance.get("baseline")
        else how_solved(result.read("converged"), result.read("relative_residual")),
        "error bounds": _bounds(result),
    }
    covered = _mapping(provenance.get("parameters"))
    if "coverage" in covered:
        found["parameters"] = f"{covered.get('covered')} of {covered.get('total')} covered"
    seconds = _mapping(_mapping(provenance.get("summary")).get("seconds"))
    times = [f"{name} {value:.1f} s" for name, value in seconds.items() if isinstance(value, int | float)]
    if times:
        found["time"] = ", ".join(times)
    for name in ("created", "sign_convention"):
        if name in provenance:
            found[name.replace("_", " ")] = str(provenance[name])
    return found


def model_of(provenance: Mapping[str, Any]) -> str:
    """Return the model's class and the factory that a job names, as far as they are recorded; else empty."""
    kind = _mapping(provenance.get("model")).get("class")
    if kind is None and provenance.get("baseline"):  # whose job names a model that was not used
        return ""
    factory = _mapping(_mapping(_mapping(provenance.get("job")).get("model")).get("factory")).get("target")
    named = [str(kind)] if isinstance(kind, str) else []
    return cut(" from ".join([*named, *([str(factory)] if isinstance(factory, str) else [])]), 400)


def method_of(provenance: Mapping[str, Any]) -> str:
    """Return the method and its settings, as far as they are recorded."""
    solver = _mapping(provenance.get("solver"))
    name = solver.get("method", solver.get("name", "not recorded"))
    details = {key: value for key, value in solver.items() if key not in ("method", "name")}
    text = ", ".join(f"{key} {value}" for key, value in details.items())
    name = f"{name}, a baseline" if provenance.get("baseline") else name
    return f"{name}{': ' if text else ''}{cut(text, 400)}"


def how_solved(converged: NDArray[np.bool_], residual: NDArray[np.float32]) -> str:
    """Say how many rows converged, of those that were measured: NaN is neither a success nor a failure."""
    measured = converged | ~np.isnan(residual)
    if not measured.any():
        return f"approximate, residuals not measured for {converged.size} rows"
    known = residual[~np.isnan(residual)]
    worst = f"worst relative residual {float(known.max()):.1e}" if known.size else "residuals not recorded"
    n, rows = int(measured.sum()), f"{converged.size} rows"
    of = rows if n == converged.size else f"{n} measured rows ({rows} in all)"
    return f"{int(converged.sum())} of {of} converged, {worst}"


def _bounds(result: ResultArrays) -> str:
    known = np.isfinite(result.read("error_bound"))
    kind = result.provenance.get("error_bound")
    return f"{int(known.sum())} of {known.size} rows{f', {kind}' if isinstance(kind, str) else ''}"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
