"""Whether a trainer trains on the points that it is given.

1. The same seed on two subsets must not give the same losses, bit for bit (`Watch`): a trainer that ignores the subset,
   or looks at its size alone, is found after its second model.
2. Models must fit the points that they were trained on better than the others (`member_effect`): a trainer that
   ignores both, and is random, is not found by 1, nor is one that counts the training points in another order.
3. If the members are not fitted better, models of one subset must be more alike than models of different subsets
   (`agree`); otherwise the losses do not depend on the subset, as far as so many can tell.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distinfluence.errors import RetrainingError
from distinfluence.evaluate.bank.rows import BankRow
from distinfluence.evaluate.retraining import Retraining

APART = 0.05  # Part of the training points by which two subsets differ that must not give equal losses.
ALL_ALIKE = 20  # Subsets, however alike, that must not all give equal losses.
FEWEST_SUBSETS = 10  # With fewer, nothing is said of members.
FEWEST_POINTS = 0.2  # Part of the drawn points that must be in a subset, and out of it, for it to count.
REVERSED = 5.0  # Standard errors below 0 at which models surely fit the points outside better.
CLEAR = 3.0  # Standard errors from 0 at which an effect is not chance.
PERMUTATIONS = 99  # Of the rows, in the test whether seeds of one subset agree.
QUERIES = 64  # Test points that the test looks at.
ADVICE = (
    "Train on `train_data[indices]`, with `indices` counted in the order of the training data, and give the corrected "
    "callable a new bank."
)


def describe(retraining: Retraining) -> str:
    """Return how messages name a retraining."""
    weighted = ", weighted" if retraining.is_weighted else ""
    return f"{len(retraining.indices)} of {len(retraining.weights)} points{weighted}, seed {retraining.seed}"


class Watch:
    """Compares losses as they come."""

    def __init__(self) -> None:
        self._first: dict[tuple[int, str], Retraining] = {}
        self._subsets: dict[int, set[str]] = {}
        self._outcomes: dict[int, set[str]] = {}

    def add(self, row: BankRow) -> None:
        """Look at one more row.

        Raises:
            RetrainingError: Other subsets gave the same losses with the same seed.
        """
        own = row.retraining
        other = self._first.setdefault((own.seed, row.outcome), own)
        apart = int(((own.weights != 0) != (other.weights != 0)).sum())
        subsets = self._subsets.setdefault(own.seed, set())
        outcomes = self._outcomes.setdefault(own.seed, set())
        subsets.add(row.subset)
        outcomes.add(row.outcome)
        if apart >= max(2, APART * len(own.weights)):
            raise RetrainingError(
                f"`train` must depend on `indices`, got the same losses, bit for bit, for two subsets that differ in "
                f"{apart} points ({describe(other)}; {describe(own)}). {ADVICE}"
            )
        if len(subsets) >= ALL_ALIKE and len(outcomes) == 1 and own.is_weighted:
            raise RetrainingError(
                f"`train` must depend on `weights`, got the same losses, bit for bit, for {len(subsets)} choices of "
                f"them with seed {own.seed}. Weight each point's loss; where they differ by little, train in float64."
            )
        if len(subsets) >= ALL_ALIKE and len(outcomes) == 1:
            raise RetrainingError(
                f"`train` must depend on `indices`, got the same losses, bit for bit, for {len(subsets)} subsets with "
                f"seed {own.seed}. {ADVICE}"
            )


@dataclass(frozen=True)
class MemberEffect:
    """How much better models fit the training points that they were trained on.

    Attributes:
        value: Mean loss at drawn training points outside the subset minus the mean inside, in standard deviations of a
            point's loss over retrainings; NaN if it cannot be told.
        standard_error: Its standard error, over subsets; NaN for fewer than two.
        n_subsets: Number of subsets that it rests on: those with enough points inside and outside.
    """

    value: float
    standard_error: float
    n_subsets: int

    @property
    def is_clear(self) -> bool:
        """Whether members are fitted better, beyond chance."""
        return self.value > CLEAR * self.standard_error


def member_effect(rows: Sequence[BankRow], probe: NDArray[np.int64]) -> MemberEffect:
    """Compare the losses of drawn training points inside and outside the subsets.

    Each point's losses are compared with its own mean over retrainings, so that hard points do not matter.

    Args:
        rows: Retrained models, r of them.
        probe: The drawn training points, [n_probe].

    Returns:
        The effect.
    """
    rows = _telling(rows, probe)
    subsets = _groups(rows)
    if len(subsets) < 2:
        return MemberEffect(float("nan"), float("nan"), len(subsets))
    losses = _standardised(np.stack([row.member_losses for row in rows]))
    inside = np.stack([row.retraining.weights[probe] != 0 for row in rows])
    by_row = (losses * ~inside).sum(axis=1) / (~inside).sum(axis=1) - (losses * inside).sum(axis=1) / inside.sum(axis=1)
    by_subset = np.array([by_row[group].mean() for group in subsets])
    return MemberEffect(float(by_subset.mean()), float(by_subset.std(ddof=1) / np.sqrt(len(subsets))), len(subsets))


def check_members(rows: Sequence[BankRow], probe: NDArray[np.int64]) -> str:
    """Check that losses depend on the subset in the way that training does.

    Args:
        rows: Retrained models.
        probe: The drawn training points.

    Returns:
        A warning, or an empty text.

    Raises:
        RetrainingError: If members are fitted worse, or no better while seeds of one subset agree no more than
            different subsets.
    """
    effect = member_effect(rows, probe)
    if effect.n_subsets < FEWEST_SUBSETS or effect.is_clear:
        return ""
    found = (
        f"{effect.value:.2g} ± {effect.standard_error:.2g} standard deviations of a point's loss, over "
        f"{effect.n_subsets} subsets"
    )
    if effect.value < -REVERSED * effect.standard_error:
        raise RetrainingError(
            f"`train` must train on the points that it is given, and models fit these worse than the others ({found}). "
            f"It seems to leave `indices` out. {ADVICE}"
        )
    alike = agree(_telling(rows, probe))
    if alike is False:
        raise RetrainingError(
            f"`train` must depend on which points it is given, and nothing shows that it does: models fit the points "
            f"that they were trained on no better than others ({found}), and seeds of one subset agree no more than "
            f"different subsets. {ADVICE} If training is only this noisy, train longer or on larger subsets."
        )
    so_far = "the losses do depend on the subset" if alike else "one seed each does not tell more"
    return (
        f"models fit the points that they were trained on no better than others ({found}); {so_far}. Either a single "
        "point hardly matters to this model, or `train` counts `indices` in another order than that of the training "
        "data."
    )


def agree(rows: Sequence[BankRow]) -> bool | None:
    """Say whether models of one subset are more alike than models of different subsets, beyond chance.

    The variance between subsets is compared with its values for rows of the same seed that are exchanged; what a seed
    does to all subsets alike is taken out before.

    Args:
        rows: Retrained models.

    Returns:
        Whether they are; None where too few subsets have several seeds.
    """
    groups = [group for group in _groups(rows) if len(group) > 1]
    if len(groups) < FEWEST_SUBSETS:
        return None
    order = np.concatenate(groups)
    columns = np.linspace(0, len(rows[0].losses) - 1, min(QUERIES, len(rows[0].losses))).astype(int)
    losses = np.stack([rows[i].losses[columns] for i in order])
    seeds = np.array([rows[i].retraining.seed for i in order])
    # rows that chance may exchange: those of one seed, and those whose seed no other row has
    repeated = [np.flatnonzero(seeds == seed) for seed in np.unique(seeds) if (seeds == seed).sum() > 1]
    alone = np.setdiff1d(np.arange(len(seeds)), np.concatenate([*repeated, np.zeros(0, dtype=np.int64)]))
    for own in repeated:
        losses[own] -= losses[own].mean(axis=0)
    losses = _standardised(losses)
    sizes = np.array([len(group) for group in groups])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])

    def between(values: NDArray[np.float64]) -> float:
        return float((np.add.reduceat(values, starts, axis=0) ** 2 / sizes[:, None]).sum())

    def exchanged() -> NDArray[np.float64]:
        order = np.arange(len(losses))
        for own in (*repeated, alone):
            order[own] = generator.permutation(own)
        return losses[order]

    generator = np.random.default_rng(0)
    return between(losses) > max(between(exchanged()) for _ in range(PERMUTATIONS))


def seeds_are_equal(rows: Sequence[BankRow]) -> bool:
    """Say whether all seeds of a subset give the same losses, bit for bit, in each of several subsets."""
    groups = [group for group in _groups(rows) if len(group) > 1]
    equal = (np.array_equal(rows[group[0]].losses, rows[i].losses) for group in groups for i in group[1:])
    return bool(groups) and all(equal)


def _telling(rows: Sequence[BankRow], probe: NDArray[np.int64]) -> list[BankRow]:
    """Return the rows without weights whose subset has enough of the drawn points, inside and outside."""
    least = max(1.0, FEWEST_POINTS * len(probe))
    counts = [(row, int((row.retraining.weights[probe] != 0).sum())) for row in rows if not row.retraining.is_weighted]
    return [row for row, inside in counts if least <= inside <= len(probe) - least]


def _groups(rows: Sequence[BankRow]) -> list[NDArray[np.int64]]:
    """Return the rows of each subset, as indices."""
    found: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        found.setdefault(row.subset, []).append(i)
    return [np.array(group) for group in found.values()]


def _standardised(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return each column with mean 0 and standard deviation 1; zeros where it is constant."""
    centred = values - values.mean(axis=0)
    spread = centred.std(axis=0)
    usual = spread > 1e-12 * np.abs(values).max(axis=0)
    scaled: NDArray[np.float64] = centred * np.divide(1.0, spread, out=np.zeros_like(spread), where=usual)
    return scaled
