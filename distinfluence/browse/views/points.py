"""What is known of the points of a result next to the matrix: columns, labels, classes, samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from distinfluence.browse.views.aggregates import Classes, classes_of
from distinfluence.browse.views.rendering import PointSource, show
from distinfluence.errors import CorruptStoreError, SettingError
from distinfluence.store import InfluenceResult

SUSPICIONS = ("net_harm", "self_influence", "train_loss")
MAX_NAME = 120  # letters of a label's name
Json = dict[str, Any]
Axis = Literal["test", "train"]


class PagePoints:
    """Points of one result. sources: where samples and labels come from. `result` may be opened again."""

    def __init__(self, result: InfluenceResult, sources: Mapping[Axis, PointSource]) -> None:
        self.result = result
        self.sources = sources
        self._kept: dict[str, NDArray[Any]] = {}
        self._known_classes: dict[Axis, Classes | None] = {}

    def point(self, axis: Axis, index: int, *, small: bool = True) -> Json:
        """Return a point as a card shows it: index, id, label, loss and sample."""
        loss = number(self.column(f"{axis}_loss")[index])
        sample = show(self.sources[axis], index, small=small)
        named = self.sources[axis].id_of(index)
        return {"index": index, "id": named, "label": self.label(axis, index), "loss": loss, "sample": sample}

    def label(self, axis: Axis, index: int) -> str | None:
        """Return the name of a point's label."""
        labels = self.labels(axis)
        return None if labels is None else self.name(axis, float(labels[index]))

    def name(self, axis: Axis, label: float | None) -> str | None:
        """Return the name of a label, not longer than anyone reads."""
        return None if label is None else self.sources[axis].name_of(label)[:MAX_NAME]

    def classes(self, axis: Axis) -> Classes | None:
        """Return the classes of an axis; None without labels."""
        if axis not in self._known_classes:
            self._known_classes[axis] = classes_of(self.labels(axis))
        return self._known_classes[axis]

    def class_list(self, axis: Axis) -> list[Json] | None:
        """Return label, name and size of each class, in the order of `by class`."""
        found = self.classes(axis)
        if found is None:
            return None
        pairs = zip(found.labels.tolist(), found.counts.tolist(), strict=True)
        return [{"label": float(label), "name": self.name(axis, float(label)), "n": n} for label, n in pairs]

    def of_class(self, axis: Axis, label: float) -> NDArray[np.bool_]:
        """Return which points have this label, [n].

        Raises:
            SettingError: No point has the label.
        """
        labels = self.labels(axis)
        members: NDArray[np.bool_] = np.zeros(0, np.bool_) if labels is None else labels == label
        if not members.any():
            raise SettingError(f"no {axis} point has the label {label:g}. Take one of those that `classes` shows.")
        return members

    def norm(self, train_index: int) -> float:
        """Return the gradient norm of a training point."""
        return float(self.column("train_gradient_norm")[train_index])

    def column(self, name: str) -> NDArray[Any]:
        """Return a per-point array; it is kept once the result does not change any more."""
        if name not in self._kept:
            values = np.asarray(getattr(self.result, name))
            if not self.result.complete:
                return values
            self._kept[name] = values
        return self._kept[name]

    def labels(self, axis: Axis) -> NDArray[Any] | None:
        """Return the labels, [n], None if not known.

        Raises:
            CorruptStoreError: The number of labels differs from n.
        """
        key = f"{axis} labels"
        if key not in self._kept:
            labels = self.sources[axis].labels()
            if labels is None:
                return None
            n = self.result.shape[0 if axis == "test" else 1]
            if labels.shape != (n,):
                raise CorruptStoreError(f"labels of {axis} points must be ({n},), got {labels.shape}.")
            self._kept[key] = labels
        return self._kept[key]

    def suspicion(self, name: str) -> NDArray[Any] | None:
        """Return one of `SUSPICIONS`, [n_train]; None if not known."""
        if name == "net_harm":
            return -self.column("train_total")
        if name == "self_influence":
            return self.sources["train"].self_influence()
        losses = self.column("train_loss")
        return None if np.isnan(losses).all() else losses

    def is_known(self, name: str) -> bool:
        """Whether training points can be ranked by this suspicion."""
        if not self.result.layout.ranked:
            return False
        return name == "net_harm" or self.suspicion(name) is not None


def number(value: Any) -> float | None:
    """Return a number as JSON has it: None where there is none."""
    value = float(value)
    return value if math.isfinite(value) else None
