"""All figures of an evaluation, as a table and as JSON."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from distinfluence.evaluate.figure import Figure

_HEADS = ("check", "method", "value", "95 % interval", "ceiling", "queries", "trainings", "")


@dataclass(frozen=True)
class Evaluation:
    """What the checks of several methods say.

    Attributes:
        figures: The figures, in the order of the checks.
        remarks: What holds for all of them: how models were trained again, and what was noticed.
    """

    figures: tuple[Figure, ...]
    remarks: tuple[str, ...] = ()

    def of(self, check: str, method: str) -> Figure:
        """Return the figure of a check of a method.

        Args:
            check: Name of the check.
            method: Name of the method.

        Returns:
            The figure.

        Raises:
            KeyError: If there is none.
        """
        for figure in self.figures:
            if (figure.check, figure.method) == (check, method):
                return figure
        raise KeyError(f"no {check!r} of {method!r}; there are {[(f.check, f.method) for f in self.figures]}")

    def to_json(self) -> dict[str, object]:
        """Return figures and remarks as JSON values.

        Returns:
            {"figures": […], "remarks": […]}.
        """
        return {"figures": [figure.to_json() for figure in self.figures], "remarks": list(self.remarks)}

    def __str__(self) -> str:
        rows = [_HEADS, *(_row(figure) for figure in self.figures)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADS) - 1)]
        lines = [_line(row, widths) for row in rows]
        return "\n".join([*lines, *([""] if self.remarks else []), *self.remarks])


def _row(figure: Figure) -> tuple[str, ...]:
    interval = "" if math.isnan(figure.low) else f"{figure.low:.3f} … {figure.high:.3f}"
    ceiling = "" if math.isnan(figure.ceiling) else f"{figure.ceiling:.3f}"
    counts = (str(n) if n else "" for n in (figure.n_queries, figure.n_retrainings))
    return (figure.check, figure.method, f"{figure.value:.3f}", interval, ceiling, *counts, figure.remark)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        cell.ljust(width) if i < 2 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=False))
    ]
    return "  ".join([*cells, row[-1]]).rstrip()
