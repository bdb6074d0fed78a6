"""All figures of an evaluation, as a table and as JSON."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from numpy.typing import ArrayLike

from distinfluence.errors import SettingError
from distinfluence.evaluate.agreement import rank_agreement
from distinfluence.evaluate.figure import Figure
from distinfluence.evaluate.mislabel import PLAIN_LOSS, detect_mislabelled, net_harm
from distinfluence.evaluate.planted import planted_recall
from distinfluence.evaluate.retraining import Retrainer
from distinfluence.evaluate.statistics import remarks_on_baselines
from distinfluence.evaluate.tiles import Scores

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


class Check(Protocol):
    """A check of scores against retrained models."""

    def figures(
        self, scores: Mapping[str, Scores], baselines: Collection[str], retrainer: Retrainer
    ) -> tuple[Figure, ...]:
        """Measure all methods.

        Args:
            scores: Method or baseline → scores, [n_test, n_train].
            baselines: The names in `scores` that are baselines.
            retrainer: What trains.

        Returns:
            The figures.
        """


def evaluate(
    scores: Mapping[str, Scores],
    *,
    baselines: Collection[str] = (),
    retrainer: Retrainer | None = None,
    checks: Sequence[Check] = (),
    mislabelled: ArrayLike | None = None,
    losses: ArrayLike | None = None,
    planted: Mapping[int, Sequence[int]] | Sequence[int] | None = None,
) -> Evaluation:
    """Make checks of the scores of several methods, each next to the baselines.

    Args:
        scores: Method or baseline → scores, [n_test, n_train]; arrays, or results on disk.
        baselines: The names in `scores` that are baselines. A method that does not beat them is said not to.
        retrainer: What trains models again, such as a `RetrainingBank`; needed for `checks`.
        checks: Checks that need retrained models: `LinearDatamodeling`, `QueryLossDifference`, `LeaveOneOut`,
            `WeightSteps`.
        mislabelled: Indices of training points with wrong labels, to be found by the net harm of each method.
        losses: The plain loss of each training point, [n_train], which `mislabelled` is compared with.
        planted: Test point → training points that were planted for it, or training points planted for all.

    Returns:
        The figures of all checks, and the agreement of the methods with each other.

    Raises:
        SettingError: If a baseline has no scores, or an argument lacks what belongs to it.
        ShapeError: If scores are not about the same points.
        NonFiniteError: If scores or losses hold NaN or infinity.
        RetrainingError: If models could not be trained again.
    """
    if unknown := [name for name in baselines if name not in scores]:
        raise SettingError(f"`baselines` must be names in `scores`, got {unknown}. The names are {list(scores)}.")
    if checks and retrainer is None:
        raise SettingError("`retrainer` must be given for `checks`. Pass a `RetrainingBank`.")
    if mislabelled is not None and losses is None:
        raise SettingError("`losses` must be given with `mislabelled`: the plain loss is what methods have to beat.")
    figures: list[Figure] = []
    if retrainer is not None and checks:
        figures += [figure for check in checks for figure in check.figures(scores, baselines, retrainer)]
    if mislabelled is not None and losses is not None:
        suspicions = {name: net_harm(own) for name, own in scores.items() if name != PLAIN_LOSS}
        for one in detect_mislabelled(suspicions, mislabelled, losses):
            own = one.figures()
            figures += [replace(each, remark="baseline") for each in own] if one.method in baselines else own
    if planted is not None:
        recalls = {name: planted_recall(own, planted) for name, own in scores.items()}
        remarks = remarks_on_baselines({name: one.recall for name, one in recalls.items()}, baselines)
        figures += [figure for name, one in recalls.items() for figure in one.figures(name, remarks[name])]
    methods = {name: own for name, own in scores.items() if name not in baselines}
    if len(methods) > 1:
        figures += [figure for one in rank_agreement(methods) for figure in one.figures()]
    return Evaluation(tuple(figures))


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
