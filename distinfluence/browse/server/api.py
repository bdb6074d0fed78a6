"""What the page asks, answered as plain values: no sockets, no markup. Reads only what an answer shows."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distinfluence.browse.views.aggregates import (
    MAX_CLASSES,
    ClassTable,
    Totals,
    class_table,
    largest,
    totals,
)
from distinfluence.browse.views.contributions import on_tokens, strongest_blocks
from distinfluence.browse.views.convergence import drawn_rows, recorded, strip_runs, worst_rows
from distinfluence.browse.views.picture import Permutation, Picture, Pictures, check_window, cluster_order, orders_of
from distinfluence.browse.views.points import SUSPICIONS, Axis, Json, PagePoints, number
from distinfluence.browse.views.rendering import PointSource
from distinfluence.browse.views.saliency import check_pair, saliency, strongest
from distinfluence.errors import IndexRangeError, SettingError
from distinfluence.store import InfluenceResult, open_influences
from distinfluence.store.format.ranking import require_ranked
from distinfluence.store.read.facts import facts

MAX_POINTS, MAX_STRIPS = 2**27, 200_000
MAX_LISTED = 500
SHOWN_OF_SET = 12
KEPT_SETS = 4
WORST = 4  # test points of the largest loss that are shown next to the matrix
MAX_CELL = 2**22  # entries that are read to find the largest one of a cell


class ResultApi:
    """Answer questions about one result.

    Args:
        result: The result.
        sources: Where samples and labels come from; by default what is stored with the result.

    Raises:
        CorruptStoreError: The result is damaged.
        SettingError: The result cannot be browsed.
    """

    def __init__(self, result: InfluenceResult, sources: Mapping[Axis, PointSource] | None = None) -> None:
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
        self.known = PagePoints(result, self.sources)
        self._sets: dict[bytes, Totals] = {}
        self._tables: dict[str, ClassTable] = {}
        self._read_before = 0

    def summary(self) -> Json:
        """Describe the result: its kind, how far it is, and which questions it answers."""
        self._look_again()
        n_test, n_train = self.result.shape[:2]
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
            "input_shape": list(self.result.layout.input_shape),
            "classes": {"test": self.known.class_list("test"), "train": self.known.class_list("train")},
            "suspicions": [name for name in SUSPICIONS if self.known.is_known(name)],
            "worst": [self.known.point("test", i) for i in self._worst_tests()],
            "samples": {axis: source.kind for axis, source in self.sources.items()},
        }

    def _look_again(self) -> None:
        """Read again what a run that goes on has written since."""
        if not self.result.complete:
            before = self.result.bytes_read
            self.result = open_influences(self.result.path)
            self.pictures = Pictures(self.result)
            self.known.result = self.result
            self._read_before += before
            self.__dict__.pop("_orders", None)

    @property
    def bytes_read(self) -> int:
        """Bytes that were read from the disk for all answers so far."""
        return self._read_before + self.result.bytes_read

    def picture(self, rows: slice, columns: slice, height: int, width: int, orders: tuple[str, str]) -> Picture:
        """Return a window of the matrix.

        Args:
            rows: The test points, by their places.
            columns: The training points, by their places.
            height: The largest number of cells down.
            width: The largest number of cells across.
            orders: Names of the orders of rows and columns.
        """
        require_ranked(self.result.layout, "picture")
        return self.pictures.picture(rows, columns, height, width, self._permutations(orders))

    def cell(self, rows: slice, columns: slice, orders: tuple[str, str]) -> Json:
        """Return the entry of largest magnitude in a window: its test and training point, its value, and its place."""
        require_ranked(self.result.layout, "cell")
        check_window("rows", rows, self.result.shape[0])
        check_window("columns", columns, self.result.shape[1])
        if (rows.stop - rows.start) * (columns.stop - columns.start) > MAX_CELL:
            raise SettingError("the cell covers too many entries to look through. Zoom in first.")
        permutations = self._permutations(orders)
        values, _ = self.pictures.ordered(rows, columns, permutations)
        known = np.where(np.isfinite(values), np.abs(values), -1.0)
        r, c = (int(i) for i in np.unravel_index(int(known.argmax()), known.shape))
        places = (rows.start + r, columns.start + c)
        test, train = (
            int(place if order is None else order[place]) for place, order in zip(places, permutations, strict=True)
        )
        return {**self._pair(test, train, values[r, c]), "place": list(places)}

    def pair(self, test: int, train: int, orders: tuple[str, str]) -> Json:
        """Answer as `cell` does, for a test and a training point, wherever they stand in these orders."""
        require_ranked(self.result.layout, "pair")
        _check_index("test", test, self.result.shape[0])
        _check_index("train", train, self.result.shape[1])
        permutations = self._permutations(orders)
        places = [
            index if order is None else int(np.flatnonzero(order == index)[0])
            for index, order in zip((test, train), permutations, strict=True)
        ]
        values, _ = self.pictures.ordered(slice(test, test + 1), slice(train, train + 1), (None, None))
        return {**self._pair(test, train, values[0, 0]), "place": places}

    def _pair(self, test: int, train: int, value: np.float32) -> Json:
        found = {"test": test, "train": train, "value": number(value)}
        return {**found, "test_point": self.known.point("test", test), "train_point": self.known.point("train", train)}

    def test_point(self, index: int, k: int) -> Json:
        """Return a test point with the training points that help and harm it most."""
        _check_index("test", index, self.result.shape[0])
        k = _listed(k)
        partial = not self.result.complete
        helpful = self.result.top(index, k, partial=partial)
        harmful = self.result.bottom(index, k, partial=partial)
        bound = float(self.known.column("error_bound")[index])
        ends = {}
        for name, ranking in (("helpful", helpful), ("harmful", harmful)):
            ends[name] = [
                {**self.known.point("train", j), "value": number(v), "bound": number(bound * self.known.norm(j))}
                for j, v in zip(ranking.indices.tolist(), ranking.values.tolist(), strict=True)
            ]
        if not partial:
            self._take_apart(index, ends)
        names = ("test_gradient_norm", "relative_residual", "error_bound")
        own = {name: number(self.known.column(name)[index]) for name in names}
        how = {
            "iterations": int(self.known.column("iterations")[index]),
            "converged": bool(self.known.column("converged")[index]),
        }
        return {**self.known.point("test", index, small=False), **own, **how, **ends, "partial": partial}

    def train_point(self, index: int, k: int) -> Json:
        """Return a training point with the test points that it helps and harms most. Reads one column."""
        _check_index("train", index, self.result.shape[1])
        found = self.known.point("train", index, small=False)
        found["train_gradient_norm"] = number(self.known.norm(index))
        for name in ("net_harm", "self_influence"):
            values = self.known.suspicion(name)
            found[name] = None if values is None else number(values[index])
        found.update(helpful=[], harmful=[], partial=True)
        if self.result.finished_strips()[index // self.result.layout.strip]:
            found["partial"] = False
            ends = {"helpful": self.result.top_for_train, "harmful": self.result.bottom_for_train}
            for name, rank in ends.items():
                ranking = rank(index, _listed(k))
                pairs = zip(ranking.indices.tolist(), ranking.values.tolist(), strict=True)
                found[name] = [{**self.known.point("test", i), "value": number(v)} for i, v in pairs]
        return found

    def suspects(self, by: str, k: int) -> Json:
        """Return the training points that are most suspicious of a wrong label.

        Args:
            by: Sort by "net_harm", "self_influence" or "train_loss".
            k: How many to return.
        """
        values = self.known.suspicion(by) if by in SUSPICIONS else None
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
        return {"by": by, "points": [{**self.known.point("train", j), "score": number(values[j])} for j in listed]}

    def test_set(self, tests: slice | None, of: float | None, among: float | None, k: int) -> Json:
        """Return the training points that help and harm a set of test points most; reads the set's rows.

        Args:
            tests: A range of test points, all if None; ignored if `of` is given.
            of: The label of the test points, instead of a range.
            among: Only training points of this label are ranked.
            k: How many training points at each end.
        """
        rows = self._rows(tests, of)
        found = self._totals(rows)
        means = found.values / rows.size
        eligible = np.ones(means.size, np.bool_) if among is None else self.known.of_class("train", among)
        bound = float(np.mean(self.known.column("error_bound")[rows], dtype=np.float64))
        ends = {
            name: [
                {**self.known.point("train", j), "value": number(means[j]), "bound": number(bound * self.known.norm(j))}
                for j in largest(sign * means, eligible, _listed(k))
            ]
            for name, sign in (("helpful", 1.0), ("harmful", -1.0))
        }
        losses = self.known.column("test_loss")[rows]
        return {
            "n": int(rows.size),
            "first": [self.known.point("test", i) for i in rows[:SHOWN_OF_SET].tolist()],
            "loss": number(np.mean(losses, dtype=np.float64)),
            "names": {"of": self.known.name("test", of), "among": self.known.name("train", among)},
            "n_among": int(eligible.sum()),
            "partial": bool(self.result.n_missing),
            "damaged": found.damaged[:100],
            **ends,
        }

    def class_table(self, everything: bool) -> Json:
        """Return the mean influences of classes on classes.

        Args:
            everything: Read all strips, not some.
        """
        require_ranked(self.result.layout, "classes")
        tests, trains = self.known.classes("test"), self.known.classes("train")
        if tests is None or trains is None:
            raise SettingError(
                "classes are shown of test and training points with labels. Store them with `distinfluence annotate`, "
                f"at most {MAX_CLASSES} classes."
            )
        key = f"table {everything}"
        table = self._tables.get(key) or class_table(self.result, tests, trains, everything)
        if self.result.complete:
            self._tables[key] = table
        return {
            "values": [[number(v) for v in row] for row in table.values.tolist()],
            "n_read": table.n_strips,
            "damaged": table.damaged[:100],
        }

    def saliency(self, test: int, train: int, k: int) -> Json:
        """Return the influences by input of a pair (mode `perturbation`), and whose inputs move the test point."""
        check_pair(self.result)
        _check_index("test", test, self.result.shape[0])
        _check_index("train", train, self.result.shape[1])
        ranked = strongest(self.result, test, _listed(k))
        values = self.result[test, train]
        return {
            "test_point": self.known.point("test", test, small=False),
            "train_point": self.known.point("train", train, small=False),
            "known": bool(np.isfinite(values).all()),
            **saliency(values),
            "strongest": None if ranked is None else [{**self.known.point("train", j), "norm": v} for j, v in ranked],
        }

    def convergence(self) -> Json:
        """Return residuals and bounds of the rows, the worst of them, and the state of every strip in runs."""
        names = ("relative_residual", "error_bound", "converged", "iterations")
        known = {name: self.known.column(name) for name in names}
        rows = drawn_rows(known["relative_residual"], known["error_bound"])
        runs, quarantined = strip_runs(self.result)
        worst = [
            {"index": row, **{name: number(known[name][row]) for name in names}, "label": self.known.label("test", row)}
            for row in worst_rows(known)
        ]
        return {
            "rows": rows.tolist(),
            **{name: [number(v) for v in known[name][rows].tolist()] for name in names[:3]},
            "worst": worst,
            "strips": runs,
            "quarantined": quarantined,
            "provenance": recorded(self.result),
        }

    def _take_apart(self, index: int, ends: Mapping[str, list[Json]]) -> None:
        """Add to what is ranked what it is made of, by block and by position, where the run kept it."""
        found = self.result.contributions(index)
        if found is None:
            return
        for name, shares in (("helpful", found.helpful), ("harmful", found.harmful)):
            for r, (point, by_block) in enumerate(zip(ends[name], shares.by_block, strict=False)):
                point["blocks"] = strongest_blocks(found.blocks, by_block)
                if shares.by_token is not None:
                    point["tokens"] = on_tokens(self.sources["train"], point["index"], shares.by_token[r])

    def _rows(self, tests: slice | None, of: float | None) -> NDArray[np.int64]:
        if of is not None:
            return np.flatnonzero(self.known.of_class("test", of))
        tests = slice(0, self.result.shape[0]) if tests is None else tests
        check_window("tests", tests, self.result.shape[0])
        return np.arange(tests.start, tests.stop)

    def _totals(self, rows: NDArray[np.int64]) -> Totals:
        """Return the totals of a set; those of the last sets are kept once the result does not change any more."""
        require_ranked(self.result.layout, "test sets")
        key = rows.tobytes()
        found = self._sets.pop(key, None) or totals(self.result, rows)
        if self.result.complete:
            self._sets[key] = found
            while len(self._sets) > KEPT_SETS:
                self._sets.pop(next(iter(self._sets)), None)
        return found

    def _worst_tests(self) -> list[int]:
        losses = self.known.column("test_loss")
        order = np.argsort(-np.nan_to_num(losses, nan=-np.inf), kind="stable")[:WORST]
        return [row for row in order.tolist() if np.isfinite(losses[row])]

    def _order_names(self, axis: Axis) -> list[str]:
        return ["stored", *self._orders[axis]] if self.pictures.can_be_ordered else ["stored"]

    @cached_property
    def _orders(self) -> dict[Axis, dict[str, Permutation]]:
        if not self.pictures.can_be_ordered:
            return {"test": {}, "train": {}}
        found: dict[Axis, dict[str, Permutation]] = {}
        for axis in ("test", "train"):
            known: dict[str, NDArray[Any] | None] = {
                "class": self.known.labels(axis),
                "norm": self.known.column(f"{axis}_gradient_norm"),
                "loss": self.known.column(f"{axis}_loss"),
            }
            if axis == "train":
                known["net harm"] = self.known.suspicion("net_harm")
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


def _listed(k: int) -> int:
    if not 1 <= k <= MAX_LISTED:
        raise SettingError(f"`k` must be from 1 to {MAX_LISTED}, got {k}.")
    return k


def _check_index(axis: str, index: int, n: int) -> None:
    if not 0 <= index < n:
        raise IndexRangeError(f"there is no {axis} point {index}, expected 0 to {n - 1}.")
