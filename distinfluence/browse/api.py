"""What the page asks, answered as plain values: no sockets, no markup. Reads only what an answer shows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from distinfluence.browse.picture import Permutation, Picture, Pictures, check_window, cluster_order, orders_of
from distinfluence.browse.rendering import PointSource, show
from distinfluence.errors import CorruptStoreError, IndexRangeError, SettingError
from distinfluence.store import InfluenceResult, open_influences
from distinfluence.store.analysis import require_ranked
from distinfluence.store.html import facts

MAX_POINTS, MAX_STRIPS = 2**27, 200_000
MAX_LISTED = 500
WORST = 4  # test points of the largest loss that are shown beside the matrix
MAX_CELL = 2**22  # entries that are read to find the largest one of a cell
SUSPICIONS = ("net_harm", "self_influence", "train_loss")
Json = dict[str, Any]
Axis = Literal["test", "train"]


class ResultApi:
    """Questions about one result. Raises CorruptStoreError or SettingError for what cannot be browsed.

    sources: where samples and labels come from; what is stored with the result if left out.
    """

    def __init__(self, result: InfluenceResult, sources: Mapping[Axis, PointSource] | None = None) -> None:
        require_ranked(result, "browse")
        layout = result.layout
        if max(layout.n_test, layout.n_train) > MAX_POINTS or layout.n_strips > MAX_STRIPS:
            raise SettingError(
                f"`path` {result.path} says that it has {layout.n_test} x {layout.n_train} points in {layout.n_strips} "
                f"strips; at most {MAX_POINTS} points and {MAX_STRIPS} strips can be browsed. Use `open_influences`."
            )
        expanding = result.expanding_arrays()
        if expanding:
            raise SettingError(
                f"`path` {result.path} has arrays ({', '.join(expanding)}) with codecs that the page does not use: a "
                "small file could fill the memory. Copy it without compression, or use `open_influences`."
            )
        self.result = result
        self.pictures = Pictures(result)
        stored: dict[Axis, PointSource] = {"test": result.points("test"), "train": result.points("train")}
        self.sources: dict[Axis, PointSource] = {**stored, **(sources or {})}
        self._kept: dict[str, NDArray[Any]] = {}
        self._read_before = 0

    def summary(self) -> Json:
        """What it is, how far it is, what can be asked."""
        self._look_again()
        n_test, n_train = self.result.shape
        status = self.result.finished_strips()
        return {
            "path": self.result.path.name,
            "n_test": n_test,
            "n_train": n_train,
            "complete": self.result.complete,
            "strip": self.result.layout.strip,
            "n_strips": int(status.size),
            "n_finished": int(status.sum()),
            "k": self.result.layout.k,
            "facts": facts(self.result),
            "orders": {"test": self._order_names("test"), "train": self._order_names("train")},
            "suspicions": list(SUSPICIONS),
            "worst": [self._point("test", i) for i in self._worst_tests()],
            "samples": {axis: source.kind for axis, source in self.sources.items()},
        }

    def _look_again(self) -> None:
        """What a run that goes on has written since."""
        if not self.result.complete:
            before = self.result.bytes_read
            self.result = open_influences(self.result.path)
            self.pictures = Pictures(self.result)
            self._read_before += before
            self.__dict__.pop("_orders", None)

    @property
    def bytes_read(self) -> int:
        """Bytes that were read from the disk for all answers so far."""
        return self._read_before + self.result.bytes_read

    def picture(self, rows: slice, columns: slice, height: int, width: int, orders: tuple[str, str]) -> Picture:
        """A window of the matrix; orders: names for rows and columns."""
        return self.pictures.picture(rows, columns, height, width, self._permutations(orders))

    def cell(self, rows: slice, columns: slice, orders: tuple[str, str]) -> Json:
        """The entry of largest magnitude in a window: which test and training point, and its value."""
        check_window("rows", rows, self.result.shape[0])
        check_window("columns", columns, self.result.shape[1])
        if (rows.stop - rows.start) * (columns.stop - columns.start) > MAX_CELL:
            raise SettingError("the cell covers too many entries to look through. Zoom in first.")
        permutations = self._permutations(orders)
        values, _ = self.pictures.ordered(rows, columns, permutations)
        known = np.where(np.isfinite(values), np.abs(values), -1.0)
        r, c = (int(i) for i in np.unravel_index(int(known.argmax()), known.shape))
        test, train = (
            int(place if order is None else order[place])
            for place, order in zip((rows.start + r, columns.start + c), permutations, strict=True)
        )
        found = {"test": test, "train": train, "value": number(values[r, c])}
        return {**found, "test_point": self._point("test", test), "train_point": self._point("train", train)}

    def test_point(self, index: int, k: int) -> Json:
        """A test point with the training points that help and harm it most."""
        _check_index("test", index, self.result.shape[0])
        k = _listed(k)
        partial = not self.result.complete
        helpful = self.result.top(index, k, partial=partial)
        harmful = self.result.bottom(index, k, partial=partial)
        bound = float(self._column("error_bound")[index])
        ends = {}
        for name, ranking in (("helpful", helpful), ("harmful", harmful)):
            ends[name] = [
                {**self._point("train", j), "value": number(v), "bound": number(bound * self._norm(j))}
                for j, v in zip(ranking.indices.tolist(), ranking.values.tolist(), strict=True)
            ]
        names = ("test_gradient_norm", "relative_residual", "error_bound")
        own = {name: number(self._column(name)[index]) for name in names}
        how = {
            "iterations": int(self._column("iterations")[index]),
            "converged": bool(self._column("converged")[index]),
        }
        return {**self._point("test", index, small=False), **own, **how, **ends, "partial": partial}

    def train_point(self, index: int, k: int) -> Json:
        """A training point with the test points that it helps and harms most. Reads one column."""
        _check_index("train", index, self.result.shape[1])
        found = self._point("train", index, small=False)
        found["train_gradient_norm"] = number(self._norm(index))
        for name in ("net_harm", "self_influence"):
            values = self._suspicion(name)
            found[name] = None if values is None else number(values[index])
        found.update(helpful=[], harmful=[], partial=True)
        if self.result.finished_strips()[index // self.result.layout.strip]:
            found["partial"] = False
            ends = {"helpful": self.result.top_for_train, "harmful": self.result.bottom_for_train}
            for name, rank in ends.items():
                ranking = rank(index, _listed(k))
                pairs = zip(ranking.indices.tolist(), ranking.values.tolist(), strict=True)
                found[name] = [{**self._point("test", i), "value": number(v)} for i, v in pairs]
        return found

    def suspects(self, by: str, k: int) -> Json:
        """The training points that are most suspicious of a wrong label: by net_harm, self_influence or train_loss."""
        values = self._suspicion(by) if by in SUSPICIONS else None
        if values is None:
            raise SettingError(
                f"`by` must be what is known of {', '.join(SUSPICIONS)}; {by[:40]!r} is not recorded. Self-influences "
                "are stored with `annotate(path, 'train', self_influence=…)`."
            )
        numbers = np.where(np.isfinite(values), values, -np.inf)
        k = min(_listed(k), numbers.size)
        first = np.argpartition(-numbers, k - 1)[:k]
        order = first[np.lexsort((first, -numbers[first]))]
        listed = [j for j in order.tolist() if np.isfinite(numbers[j])]
        return {"by": by, "points": [{**self._point("train", j), "score": number(values[j])} for j in listed]}

    def convergence(self) -> Json:
        """Residuals and bounds of the rows, at most 4096 of them, and the state of every strip (runs of equal ones)."""
        n_test = self.result.shape[0]
        rows = np.unique(np.linspace(0, n_test - 1, min(n_test, 4096)).astype(np.int64))
        status = self.result.finished_strips().astype(np.int8)
        status[self.result.lost_strips()] = 2
        apart = {i: reason for i, reason in self.result.quarantined.items() if i < status.size}
        status[list(apart)] = 3
        starts = np.concatenate([[0], np.flatnonzero(np.diff(status)) + 1])
        lengths = np.diff(np.concatenate([starts, [status.size]]))
        runs = [[int(status[s]), int(n)] for s, n in zip(starts, lengths, strict=True)]
        known = {name: self._column(name)[rows] for name in ("relative_residual", "error_bound", "converged")}
        recorded = json.dumps(dict(self.result.provenance), indent=2, default=str)
        columns = {name: [number(v) for v in values.tolist()] for name, values in known.items()}
        return {
            "rows": rows.tolist(),
            **columns,
            "strips": runs,
            "set_apart": apart,
            "provenance": recorded,
        }

    def _point(self, axis: Axis, index: int, *, small: bool = True) -> Json:
        source = self.sources[axis]
        labels = self._labels(axis)
        label = None if labels is None else source.name_of(float(labels[index]))
        loss = number(self._column(f"{axis}_loss")[index])
        return {"index": index, "label": label, "loss": loss, "sample": show(source, index, small=small)}

    def _worst_tests(self) -> list[int]:
        losses = self._column("test_loss")
        order = np.argsort(-np.nan_to_num(losses, nan=-np.inf), kind="stable")[:WORST]
        return [row for row in order.tolist() if np.isfinite(losses[row])]

    def _norm(self, train_index: int) -> float:
        return float(self._column("train_gradient_norm")[train_index])

    def _column(self, name: str) -> NDArray[Any]:
        """A per-point array; kept once the result does not change any more."""
        if name not in self._kept:
            values = np.asarray(getattr(self.result, name))
            if not self.result.complete:
                return values
            self._kept[name] = values
        return self._kept[name]

    def _labels(self, axis: Axis) -> NDArray[Any] | None:
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

    def _suspicion(self, name: str) -> NDArray[Any] | None:
        if name == "net_harm":
            return -self._column("train_total")
        if name == "self_influence":
            return self.sources["train"].self_influence()
        losses = self._column("train_loss")
        return None if np.isnan(losses).all() else losses

    def _order_names(self, axis: Axis) -> list[str]:
        return ["stored", *self._orders[axis]] if self.pictures.can_be_ordered else ["stored"]

    @cached_property
    def _orders(self) -> dict[Axis, dict[str, Permutation]]:
        if not self.pictures.can_be_ordered:
            return {"test": {}, "train": {}}
        found: dict[Axis, dict[str, Permutation]] = {}
        for axis in ("test", "train"):
            known: dict[str, NDArray[Any] | None] = {
                "class": self._labels(axis),
                "norm": self._column(f"{axis}_gradient_norm"),
                "loss": self._column(f"{axis}_loss"),
            }
            if axis == "train":
                known["net harm"] = self._suspicion("net_harm")
            found[axis] = orders_of(known)
        if self.result.complete and min(self.result.shape) <= 1024:
            found["test"]["cluster"] = found["train"]["cluster"] = np.empty(0, np.int64)  # made when it is asked for
        return found

    def _permutations(self, names: tuple[str, str]) -> tuple[Permutation | None, Permutation | None]:
        axes: tuple[Axis, Axis] = ("test", "train")
        return self._permutation(axes[0], names[0]), self._permutation(axes[1], names[1])

    def _permutation(self, axis: Axis, name: str) -> Permutation | None:
        if name == "stored":
            return None
        own = self._orders[axis]
        if name not in own:
            raise SettingError(f"`order` of {axis} points must be one of {self._order_names(axis)}, got {name!r}.")
        if own[name].size == 0:
            matrix = self.result[:]
            own[name] = cluster_order(matrix if axis == "test" else matrix.T)
        return own[name]


def number(value: Any) -> float | None:
    """A number as JSON has it: None where there is none."""
    value = float(value)
    return value if math.isfinite(value) else None


def _listed(k: int) -> int:
    if not 1 <= k <= MAX_LISTED:
        raise SettingError(f"`k` must be from 1 to {MAX_LISTED}, got {k}.")
    return k


def _check_index(axis: str, index: int, n: int) -> None:
    if not 0 <= index < n:
        raise IndexRangeError(f"there is no {axis} point {index}, expected 0 to {n - 1}.")
