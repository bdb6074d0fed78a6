"""Query loss difference (QLD): how much the loss of a query rises when the points that are said to help it are removed.

For each query, the training points of the highest scores are removed and the model is trained again. The figure is the
rise of the query's loss, less its rise after as many random points are removed. Both are measured from the same seeds,
and the random removals serve every query and every method. It is 0 for scores that know nothing, and negative for
scores of the wrong sign.

Cost: for q queries, f fractions, c random removals and r seeds, (q + c)·f·r + r retrainings, of which (c·f + 1)·r serve
all methods. With `together`, one removal serves all queries.

References:
    Bae et al. (2024), "Training data attribution via approximate unrolled differentiation", section 5.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from distinfluence.errors import SettingError
from distinfluence.evaluate.checks.effects import (
    FEWEST,
    counts_of_draws,
    depends_on_seed,
    interval,
    split_half_spearman,
)
from distinfluence.evaluate.checks.score_tiles import (
    Chosen,
    RetrainedLosses,
    check_chosen,
    check_seeds,
    chosen_indices,
    distinct_retrainings,
    read_scores,
)
from distinfluence.evaluate.figure import Figure
from distinfluence.evaluate.retraining import Retrainer, Retraining
from distinfluence.evaluate.statistics import PerQuery, remarks_on_baselines
from distinfluence.evaluate.tiles import Scores


@dataclass(frozen=True)
class LossRises:
    """What removing one fraction of the training points does to queries.

    Attributes:
        fraction: The fraction that was removed.
        queries: The test points, [q].
        rises: Rise of each query's loss after removing the points of its highest scores, [q, r], for each seed.
        random_rises: The same after removing random points, [c, q, r], for each random removal.
        figure: The mean rise less the mean rise after random removals.
    """

    fraction: float
    queries: NDArray[np.int64]
    rises: NDArray[np.float64]
    random_rises: NDArray[np.float64]
    figure: Figure


@dataclass(frozen=True)
class QueryLossDifference:
    """A check of scores by removing what they say helps.

    Attributes:
        fractions: Fractions of the training points to remove.
        seeds: Seeds to train from, each time.
        queries: How many test points to draw (all if there are not more), which test points, or None for all.
        together: Whether to remove the points of the highest summed scores once for all queries, instead of the points
            of the highest scores for each query by itself.
        n_controls: Number of random removals for each fraction.
        draw_seed: Seed of the draws: of queries, random removals, the order of equal scores, and the bootstrap.

    Raises:
        SettingError: If a setting is outside of what is possible.
    """

    fractions: Sequence[float] = (0.01, 0.05)
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    queries: Chosen = 20
    together: bool = False
    n_controls: int = 5
    draw_seed: int = 0

    def __post_init__(self) -> None:
        check_chosen("queries", self.queries)
        check_seeds(self.seeds)
        if not len(self.fractions) or not all(0 < fraction < 1 for fraction in self.fractions):
            raise SettingError(
                f"`fractions` must lie between 0 and 1, got {list(self.fractions)}. 0.01 is one percent."
            )
        if len(set(self.fractions)) < len(self.fractions):
            raise SettingError(f"`fractions` must be distinct, got {list(self.fractions)}.")
        if self.n_controls < 1:
            raise SettingError(f"`n_controls` must be at least 1, got {self.n_controls}.")

    def retrainings(self, influences: Scores, retrainer: Retrainer) -> list[Retraining]:
        """List all retrainings that `measure` asks for. Nothing is trained.

        Args:
            influences: Scores, [n_test, n_train]; positive where a training point helps. Rows of the queries are read.
            retrainer: The retrainer whose data the scores are about.

        Returns:
            The retrainings, each once. Those of several methods overlap.

        Raises:
            SettingError: If a fraction of the training points is less than one point, or all of them.
            IndexRangeError: If there is no such query.
            ShapeError: If the scores are not about the data of the retrainer.
            NonFiniteError: If a score is not finite.
        """
        removals = self._removals(influences, retrainer)
        return self._retrainings(removals, retrainer.n_train)

    def measure(self, method: str, influences: Scores, retrainer: Retrainer) -> tuple[LossRises, ...]:
        """Measure how much the losses of the queries rise.

        Args:
            method: Name of the method that the scores are of.
            influences: Scores, [n_test, n_train]; positive where a training point helps. Rows of the queries are read.
            retrainer: The retrainer whose data the scores are about. It is asked once, for all losses.

        Returns:
            The rises, for each fraction.

        Raises:
            SettingError: If a fraction of the training points is less than one point, or all of them.
            IndexRangeError: If there is no such query.
            ShapeError: If the scores are not about the data of the retrainer.
            NonFiniteError: If a score or a loss is not finite.
        """
        removals = self._removals(influences, retrainer)
        retrainings = self._retrainings(removals, retrainer.n_train)
        queries = self._queries(retrainer)
        losses = RetrainedLosses.made(retrainer, retrainings, queries)
        full = losses.of(np.ones(retrainer.n_train), self.seeds)
        measured = []
        for removal in removals:
            # [removals, q, r]: the rise of every query after every removal
            own, random = (
                np.stack([losses.of(weights, self.seeds) - full for weights in each])
                for each in (removal.own, removal.random)
            )
            rises = own[0] if self.together else own[np.arange(len(queries)), np.arange(len(queries))]
            figure = self._figure(method, removal, rises, own, random)
            measured.append(LossRises(removal.fraction, queries, rises, random, figure))
        return tuple(measured)

    def figures(
        self, scores: Mapping[str, Scores], baselines: Collection[str], retrainer: Retrainer
    ) -> tuple[Figure, ...]:
        """Measure all methods.

        Args:
            scores: Method or baseline → scores, [n_test, n_train].
            baselines: The names in `scores` that are baselines.
            retrainer: What trains.

        Returns:
            The figures of `measure` for each method.

        Raises:
            SettingError: If a fraction of the training points is less than one point, or all of them.
            IndexRangeError: If there is no such query.
            ShapeError: If scores are not about the data of the retrainer.
            NonFiniteError: If scores or losses are not finite.
        """
        wanted = {one.key: one for own in scores.values() for one in self.retrainings(own, retrainer)}
        retrainer.losses(list(wanted.values()))  # together, so that all workers have something to do
        measured = {name: self.measure(name, own, retrainer) for name, own in scores.items()}
        found = []
        for i in range(len(self.fractions)):
            rises = {name: PerQuery.of(each[i].rises.mean(axis=1)) for name, each in measured.items()}
            remarks = remarks_on_baselines(rises, baselines) if not self.together else dict.fromkeys(scores, "")
            for name, each in measured.items():
                said = "; ".join(text for text in (remarks[name], each[i].figure.remark) if text)
                found.append(replace(each[i].figure, remark=said))
        return tuple(found)

    def _queries(self, retrainer: Retrainer) -> NDArray[np.int64]:
        return chosen_indices("queries", self.queries, retrainer.n_test, self.draw_seed)

    def _removals(self, influences: Scores, retrainer: Retrainer) -> "list[_Removals]":
        n_train = retrainer.n_train
        for fraction in self.fractions:
            if fraction * n_train < 1 - 1e-9 or round(fraction * n_train) >= n_train:
                raise SettingError(
                    f"`fractions` must leave some points out and some in, got {fraction:g} of {n_train} training "
                    f"points. Take at least {1 / n_train:.2g}."
                )
        scores = read_scores(influences, retrainer, self._queries(retrainer))
        if self.together:
            scores = scores.sum(axis=0, keepdims=True)
        generator = np.random.default_rng(self.draw_seed)
        order = generator.permutation(n_train)  # of equal scores: by index would prefer whatever the data begin with
        ranked = [order[np.argsort(-row[order], kind="stable")] for row in scores]
        shuffled = [generator.permutation(n_train) for _ in range(self.n_controls)]
        removals = []
        for fraction in self.fractions:
            k = round(fraction * n_train)
            own, random = ([_without(each[:k], n_train) for each in orders] for orders in (ranked, shuffled))
            tied = sum(row[each[k - 1]] == row[each[k]] for row, each in zip(scores, ranked, strict=True))
            unhelpful = sum(row[each[k - 1]] <= 0 for row, each in zip(scores, ranked, strict=True))
            removals.append(_Removals(fraction, k, own, random, int(tied), int(unhelpful)))
        return removals

    def _retrainings(self, removals: "list[_Removals]", n_train: int) -> list[Retraining]:
        weights = [each for removal in removals for each in (*removal.own, *removal.random)]
        return distinct_retrainings([np.ones(n_train), *weights], self.seeds)

    def _figure(
        self,
        method: str,
        removal: "_Removals",
        rises: NDArray[np.float64],
        own: NDArray[np.float64],
        random: NDArray[np.float64],
    ) -> Figure:
        n_queries = len(rises)
        low, high, error = math.nan, math.nan, math.nan
        remarks = [f"loss rises by {rises.mean():.3g}, after random removals by {random.mean():.3g}"]
        if n_queries < FEWEST:
            remarks.append(f"no interval: it needs at least {FEWEST} queries, got {n_queries}")
        else:
            low, high, error = interval(_draws(rises, random, self.draw_seed))
        if self.together:
            below = int((random.mean(axis=(1, 2)) < rises.mean()).sum())
            remarks.append(f"more than after {below} of {len(random)} random removals")
        if not depends_on_seed(rises):
            remarks.append("no ceiling: one seed, or training does not depend on it")
        else:
            agreement = split_half_spearman(rises[np.newaxis])
            remarks.append(f"rises of two halves of the seeds have rank correlation {agreement:.2f} over queries")
        owners = "summed scores" if self.together else f"{len(removal.own)} queries"
        for count, what in (
            (removal.tied, "equal scores at the cut, where a random order decides"),
            (removal.unhelpful, f"fewer positive scores than the {removal.n_removed} points that are removed"),
        ):
            if count:
                remarks.append(f"{what}: {owners if self.together else f'{count} of {owners}'}")
        return Figure(
            check=f"QLD {100 * removal.fraction:g} %" + (", queries together" if self.together else ""),
            method=method,
            value=float(rises.mean() - random.mean()),
            low=low,
            high=high,
            standard_error=error,
            ceiling=math.nan if self.together else _ceiling(np.concatenate([own, random]), random),
            n_queries=n_queries,
            n_retrainings=len(self._retrainings([removal], removal.own[0].size)),
            remark="; ".join(remarks),
        )


@dataclass(frozen=True)
class _Removals:
    """own, random: weights [n_train] of each retraining. tied, unhelpful: rows of scores that a remark is due for."""

    fraction: float
    n_removed: int
    own: list[NDArray[np.float64]]
    random: list[NDArray[np.float64]]
    tied: int
    unhelpful: int


def _without(removed: NDArray[np.int64], n_train: int) -> NDArray[np.float64]:
    weights = np.ones(n_train)
    weights[removed] = 0.0
    return weights


def _draws(rises: NDArray[np.float64], random: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Return the difference of mean rises for queries, seeds and random removals that are drawn with replacement."""
    generator = np.random.default_rng(seed)
    controls, queries, seeds = (counts_of_draws(generator, n) / n for n in random.shape)
    ours = np.einsum("bq,qr,br->b", queries, rises, seeds, optimize=True)
    theirs = np.einsum("bc,cqr,bq,br->b", controls, random, queries, seeds, optimize=True)
    draws: NDArray[np.float64] = ours - theirs
    return draws


def _ceiling(candidates: NDArray[np.float64], random: NDArray[np.float64]) -> float:
    """Return the difference that is reached if the other seeds choose a removal for each query.

    The removals to choose from are all that were tried for this method: for each of the queries, and at random.

    Args:
        candidates: Rises after every removal, [u, q, r].
        random: Rises after random removals, [c, q, r].

    Returns:
        The mean over seeds; NaN where there is one seed, or seeds make no difference.
    """
    if not depends_on_seed(candidates):
        return math.nan
    n_queries, n_seeds = candidates.shape[1:]
    reached = []
    for left_out in range(n_seeds):
        others = [seed for seed in range(n_seeds) if seed != left_out]
        best = candidates[:, :, others].mean(axis=2).argmax(axis=0)
        reached.append(candidates[best, np.arange(n_queries), left_out] - random[:, :, left_out].mean(axis=0))
    return float(np.mean(reached))
