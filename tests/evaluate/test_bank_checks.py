"""Trainers that do not train on the points that they are given are found; those that do are not accused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import nn

from distinfluence.errors import RetrainingError
from distinfluence.evaluate import Retraining, RetrainingBank, random_subsets, retrainings_of
from distinfluence.evaluate.bank.checks import Watch, agree, check_members, member_effect
from distinfluence.evaluate.bank.rows import BankRow
from tests.evaluate.bank_trainers import (
    N_TRAIN,
    TEST,
    TRAIN,
    Callback,
    Counting,
    Noisy,
    asked,
    complement,
    convex,
    first_points,
    honest,
    ignores_subset,
    other_order,
    untrained,
)

SUBSETS, SEEDS = 10, [0, 1]


def bank(path: Path, train: Callback, **settings: Any) -> RetrainingBank:
    return RetrainingBank(path / "bank.zarr", train, nn.MSELoss(), TRAIN, TEST, **settings)


@pytest.mark.parametrize("train", [ignores_subset, first_points])
def test_a_trainer_that_ignores_the_subset_is_found_at_its_second_model(tmp_path: Path, train: Callback) -> None:
    counting = Counting(train)
    match = "same losses, bit for bit, for two subsets .* seed 0"
    with pytest.raises(RetrainingError, match=match):
        bank(tmp_path, counting).losses(asked(SUBSETS, [0]))
    assert len(counting.calls) == 2
    with pytest.raises(RetrainingError, match=match):  # nor are its rows taken afterwards
        bank(tmp_path, counting).losses(asked(2, [0]))
    assert len(counting.calls) == 2


def test_a_trainer_that_ignores_the_subset_is_found_among_subsets_that_lack_one_point(tmp_path: Path) -> None:
    x, y = torch.randn(60, 4), torch.randn(60, 1)
    retrainings = retrainings_of(~np.eye(60, dtype=bool), [0])
    counting = Counting(ignores_subset)
    with pytest.raises(RetrainingError, match="bit for bit, for 20 subsets with seed 0"):
        RetrainingBank(tmp_path / "bank.zarr", counting, nn.MSELoss(), (x, y), TEST).losses(retrainings)
    assert len(counting.calls) == 20


def test_a_point_that_changes_nothing_is_no_ground_for_suspicion() -> None:
    watch, rng = Watch(), np.random.default_rng(0)
    for left_out in range(19):  # support vector machines do not see most points
        weights = np.ones(60)
        weights[left_out] = 0
        watch.add(BankRow(Retraining(weights, 0), np.ones(3), np.ones(4)))
    watch.add(BankRow(Retraining(np.ones(60), 0), rng.random(3), np.ones(4)))
    for left_out in range(19, 60):
        weights = np.ones(60)
        weights[left_out] = 0
        watch.add(BankRow(Retraining(weights, 0), np.ones(3), np.ones(4)))


def test_a_trainer_that_ignores_weights_is_found_and_one_that_divides_by_their_sum_is_not() -> None:
    watch, row = Watch(), np.arange(3.0)
    for step in range(19):
        watch.add(BankRow(Retraining(np.full(8, 1.0 + step), 0), row, row))  # to scale them all changes nothing
    with pytest.raises(RetrainingError, match="depend on `weights`.* 20 choices of them with seed 0"):
        watch.add(BankRow(Retraining(np.full(8, 0.5), 0), row, row))


def test_a_trainer_that_is_random_whatever_it_is_given_is_found_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distinfluence.evaluate.bank.retraining_bank.EARLY", 24)
    own = bank(tmp_path, Noisy(steps=0))
    with pytest.raises(RetrainingError, match="depend on which points .* no better than others .* 12 subsets"):
        own.losses(asked(40, SEEDS))
    assert own.trained == 24  # of 80
    assert not own.member_effect().is_clear


def test_with_one_seed_each_a_random_trainer_is_warned_about(tmp_path: Path) -> None:
    own = bank(tmp_path, Noisy(steps=0))
    with pytest.warns(RuntimeWarning, match="no better than others .* one seed each does not tell more"):
        own.losses(asked(SUBSETS, [0]))
    assert "no better than others" in own.remarks[0]
    assert "training is not deterministic" in own.remarks[1]


def test_a_trainer_that_counts_in_another_order_is_warned_about(tmp_path: Path) -> None:
    own = bank(tmp_path, other_order)
    with pytest.warns(RuntimeWarning, match="do depend on the subset.* in another order than that of the training"):
        own.losses(asked(SUBSETS, SEEDS))
    assert "another order" in own.remarks[0]


def test_a_trainer_that_leaves_the_subset_out_is_found(tmp_path: Path) -> None:
    with pytest.raises(RetrainingError, match="fit these worse than the others .* leave `indices` out"):
        bank(tmp_path, complement).losses(asked(3 * SUBSETS, [0]))


def test_an_honest_trainer_is_left_alone_and_its_effect_is_that_of_its_members(tmp_path: Path) -> None:
    own = bank(tmp_path, honest)
    retrainings = asked(SUBSETS, SEEDS)
    own.losses(retrainings)
    assert own.remarks == ()
    effect = own.member_effect()
    assert effect.n_subsets == SUBSETS
    assert effect.is_clear
    inside = np.stack([one.weights for one in retrainings]).astype(bool)  # all points are drawn
    losses = np.stack(
        [(honest(one.indices, one.seed)(TRAIN[0]) - TRAIN[1]).square().detach().numpy()[:, 0] for one in retrainings]
    )
    scaled = (losses - losses.mean(0)) / losses.std(0)
    each = [row[~own].mean() - row[own].mean() for row, own in zip(scaled, inside, strict=True)]
    by_subset = np.reshape(each, (SUBSETS, len(SEEDS))).mean(1)
    np.testing.assert_allclose(effect.value, by_subset.mean(), rtol=1e-4)
    np.testing.assert_allclose(effect.standard_error, by_subset.std(ddof=1) / SUBSETS**0.5, rtol=1e-4)


def test_an_honest_trainer_with_noise_of_its_own_is_told_by_how_much(tmp_path: Path) -> None:
    own = bank(tmp_path, Noisy(steps=8))
    own.losses(asked(SUBSETS, SEEDS))
    (remark,) = own.remarks
    assert "not deterministic: once more on the same points with the same seed changed losses by up to" in remark
    later = bank(tmp_path, Noisy(steps=8))
    later.losses(asked(SUBSETS, SEEDS))
    assert later.remarks == (remark,)


def test_a_convex_training_needs_one_seed_and_says_so(tmp_path: Path) -> None:
    own = bank(tmp_path, convex)
    losses = own.losses(asked(SUBSETS, [0, 1]))
    np.testing.assert_array_equal(losses[::2], losses[1::2])
    assert own.remarks == ("all seeds give the same losses, so more seeds add nothing",)


def test_drawn_training_points_are_apart_from_the_subsets(tmp_path: Path) -> None:
    x, y = torch.randn(600, 4), torch.randn(600, 1)
    own = RetrainingBank(tmp_path / "bank.zarr", untrained, nn.MSELoss(), (x, y), TEST)
    own.losses(retrainings_of(random_subsets(600, 4), [0]))
    assert own.member_effect().n_subsets == 4
    stored: Any = zarr.open_group(tmp_path / "bank.zarr", mode="r")["member_losses"]
    probe = np.array(zarr.open_group(tmp_path / "bank.zarr", mode="r").attrs["probe"])
    assert stored.shape[1] == len(np.unique(probe)) == 256
    for row, subset in zip(stored[:4], random_subsets(600, 4), strict=True):
        model = untrained(np.flatnonzero(subset), 0)
        np.testing.assert_allclose(row, (model(x[probe]) - y[probe]).square().detach()[:, 0], rtol=1e-5)


def made(effect: float, agreement: float, n_subsets: int = 30, seeds: int = 3) -> list[BankRow]:
    """Rows of a known effect on members and a known agreement between the seeds of a subset, in units of the noise."""
    rng = np.random.default_rng(4)
    by_seed = 5 * rng.standard_normal((seeds, 8))
    rows = []
    for subset in random_subsets(N_TRAIN, n_subsets):
        common = rng.standard_normal(8)
        for seed in range(seeds):
            members = rng.standard_normal(N_TRAIN) - effect * subset
            losses = agreement * common + by_seed[seed] + rng.standard_normal(8)
            rows.append(BankRow(Retraining(subset.astype(float), seed), losses, members))
    return rows


def test_the_effect_and_the_agreement_are_measured_as_they_were_made() -> None:
    probe = np.arange(N_TRAIN)
    estimate = member_effect(made(0.5, 0.0), probe)
    expected = 0.5 / np.sqrt(1 + 0.5**2 / 4)  # in standard deviations, which the effect itself widens
    assert abs(estimate.value - expected) < 3 * estimate.standard_error
    assert estimate.standard_error < 0.05
    assert agree(made(0.0, 0.0)) is False  # what a seed does to all subsets alike is no agreement
    assert agree(made(0.0, 1.0)) is True
    assert agree(made(0.0, 1.0, seeds=1)) is None
    assert check_members(made(0.5, 0.0), probe) == ""
    with pytest.raises(RetrainingError, match="agree no more"):
        check_members(made(0.0, 0.0), probe)


@pytest.mark.parametrize("own_seeds", [False, True])
def test_chance_rarely_looks_like_agreement(own_seeds: bool) -> None:
    rng, found = np.random.default_rng(2), 0
    for _ in range(20):
        common = rng.standard_normal((8, 8))
        rows = list[BankRow]()
        for subset in random_subsets(N_TRAIN, 10):
            for seed in range(5):  # test points whose losses go together, with heavy tails
                losses = (rng.standard_normal(8) @ common) ** 2
                own = Retraining(subset.astype(float), len(rows) if own_seeds else seed)
                rows.append(BankRow(own, losses, np.zeros(N_TRAIN)))
        found += agree(rows) is True
    assert found <= 1


@pytest.mark.parametrize("rows", [made(0.0, 0.0, n_subsets=9), []])
def test_too_few_subsets_say_nothing(rows: list[BankRow]) -> None:
    assert check_members(rows, np.arange(N_TRAIN)) == ""


def test_subsets_that_lack_few_points_or_are_weighted_say_nothing_of_members() -> None:
    rng, rows = np.random.default_rng(0), []
    for point in range(N_TRAIN):
        for weights in (np.ones(N_TRAIN), np.full(N_TRAIN, 0.5)):
            weights[point] = 0
            rows += [BankRow(Retraining(weights, seed), rng.random(3), rng.random(N_TRAIN)) for seed in range(2)]
    assert member_effect(rows, np.arange(N_TRAIN)).n_subsets == 0
    assert check_members(rows, np.arange(N_TRAIN)) == ""
