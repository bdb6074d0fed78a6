"""How far the solves came: residuals and bounds of the rows, the worst of them, and the state of every strip."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distinfluence.store import InfluenceResult

MAX_DRAWN = 4096  # rows that are sent to be drawn; of more, the worst of each range
WORST_ROWS = 12
MAX_RECORDED = 2**18


def drawn_rows(residual: NDArray[np.float32], bound: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the rows to draw, ascending: all, or of each range the one of largest residual (or else bound)."""
    n = residual.size
    if n <= MAX_DRAWN:
        return np.arange(n)
    known = residual if np.isfinite(residual).any() else bound
    height = np.nan_to_num(known, nan=-1.0, posinf=np.inf)
    edges = np.arange(MAX_DRAWN + 1) * n // MAX_DRAWN
    return np.array(
        [a + int(height[a:b].argmax()) for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)]
    )


def worst_rows(columns: Mapping[str, NDArray[Any]]) -> list[int]:
    """Return rows that did not converge first, then by residual, the largest first; none without residuals."""
    residual, converged = columns["relative_residual"], columns["converged"]
    known = np.flatnonzero(np.isfinite(residual))  # rows that were not measured are neither good nor bad
    order = np.lexsort((-residual[known], converged[known]))
    return [int(row) for row in known[order[:WORST_ROWS]]]


def strip_runs(result: InfluenceResult) -> tuple[list[list[int]], dict[int, str]]:
    """Return runs of strips in one state, [state, how many], and why strips were quarantined.

    States: 0 not computed yet, 1 computed, 2 file lost, 3 quarantined.
    """
    status = result.finished_strips().astype(np.int8)
    status[result.lost_strips()] = 2
    apart = {i: reason for i, reason in result.quarantined.items() if i < status.size}
    status[list(apart)] = 3
    starts = np.concatenate([[0], np.flatnonzero(np.diff(status)) + 1])
    lengths = np.diff(np.concatenate([starts, [status.size]]))
    return [[int(status[s]), int(n)] for s, n in zip(starts, lengths, strict=True)], apart


def recorded(result: InfluenceResult) -> str:
    """Return everything that is recorded of the result, as text; cut where it is longer than anyone reads."""
    text = json.dumps(dict(result.provenance), indent=2, default=str)
    return text if len(text) <= MAX_RECORDED else text[:MAX_RECORDED] + "\n… cut; `distinfluence info --json` has all"
