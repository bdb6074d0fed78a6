"""The plan is a pure function: what it chooses, what it refuses, what it says."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from distinfluence import CgInfluence, DirectInfluence, EkfacInfluence, SequentialInfluenceCalculator
from distinfluence.errors import PlanError, SettingError
from distinfluence.influence.demand import Demand
from distinfluence.scaling import Machine, make_plan
from distinfluence.scaling.plan import Asked, Rates, Work
from tests.zoo import build

GIB = 2**30
WORK = Work(
    n_test=1_000,
    n_train=1_000_000,
    n_fit=1_000_000,
    p=1_000_000,
    itemsize=4,
    train_bytes=3_000,
    model_bytes=4_000_000,
    demand=Demand(),
)
MACHINE = Machine(workers=8, memory=32 * GIB, process=350 * 2**20)


def test_a_million_training_points_are_few_tasks() -> None:
    plan = make_plan(WORK, MACHINE)
    assert plan.n_strips * plan.chunks.train >= WORK.n_train
    assert plan.n_strips <= 4000
    assert plan.n_strips >= 4 * MACHINE.workers
    huge = make_plan(replace(WORK, n_train=2_000_000_000, n_fit=1_000_000), MACHINE)
    assert huge.n_strips <= 4000


def test_factors_that_fit_are_one_panel_and_others_as_many_as_their_bytes_ask_for() -> None:
    assert make_plan(WORK, MACHINE).n_panels == 1  # 4 GB of 8
    wide = make_plan(replace(WORK, p=10_000_000), MACHINE)  # 40 GB
    budget = MACHINE.memory // 4
    assert wide.n_panels == -(-WORK.n_test // (budget // (4 * 10_000_000)))
    assert "gradients are made" in str(wide)
    assert wide.stages[-1].passes == wide.n_panels


def test_every_stage_fits_into_what_the_plan_chooses() -> None:
    for memory in (2, 4, 16, 64):
        for p in (1_000, 1_000_000, 30_000_000):
            machine = Machine(4, memory * GIB, 350 * 2**20)
            work = replace(WORK, p=p, model_bytes=4 * p)
            try:
                plan = make_plan(work, machine)
            except PlanError:
                assert p == 30_000_000
                assert memory <= 4
                continue
            assert plan.peak <= 0.95 * machine.memory


def test_what_cannot_fit_is_refused_with_what_would_make_it_fit() -> None:
    with pytest.raises(PlanError, match=r"'factors' needs .* most of it is the solve.*test_chunk_size.*at least"):
        make_plan(WORK, MACHINE, Asked(test=1_000, solve="rows"))
    with pytest.raises(PlanError, match=r"'strips' needs .* most of it is a strip, .*chunk_size"):
        make_plan(replace(WORK, n_test=2_000), MACHINE, Asked(train=1_000_000))
    with pytest.raises(PlanError, match=r"the fitted state.*iterative"):
        make_plan(replace(WORK, demand=Demand(state_bytes=8 * 10**12), over_data=False), MACHINE, Asked(test=1))


def test_sizes_that_are_asked_for_stay() -> None:
    plan = make_plan(WORK, MACHINE, Asked(train=500, test=10, panel=100, solve="rows"))
    assert (plan.chunks.train, plan.chunks.test, plan.chunks.panel, plan.solve) == (500, 10, 100, "rows")
    assert plan.n_solves == 100
    assert plan.n_panels == 10
    assert plan.stages[1].passes == 100 * Demand().solve_passes


def test_times_are_given_where_something_was_measured() -> None:
    assert make_plan(WORK, MACHINE).seconds is None
    slow = make_plan(WORK, MACHINE, rates=Rates(gradients=1e3, products=1e3, flops=1e11))
    fast = make_plan(WORK, MACHINE, rates=Rates(gradients=2e3, products=2e3, flops=2e11))
    assert fast.seconds is not None
    assert slow.seconds == pytest.approx(2 * fast.seconds)


def test_bytes_on_disk_are_those_of_the_result(tmp_path: Path) -> None:
    case = build("mlp classification")
    calculator = SequentialInfluenceCalculator(DirectInfluence(case.model, case.loss, 0.01))
    plan = calculator.plan(*case.train, *case.test, chunk_size=12)
    result = calculator.fit(*case.train, chunk_size=12).to_zarr(tmp_path / "i.zarr", *case.test, progress=False)
    assert result.shape == (plan.work.n_test, plan.work.n_train)
    written = sum(file.stat().st_size for file in (tmp_path / "i.zarr").rglob("c/**/*") if file.is_file())
    assert 0.5 * plan.disk_bytes < written < 2 * plan.disk_bytes  # small arrays, padded to whole chunks
    times = calculator.plan(*case.train, *case.test, calibrate=True)
    assert times.seconds is not None
    assert times.seconds > 0


def test_methods_say_what_they_need() -> None:
    torch.manual_seed(0)
    model = nn.Linear(20, 5)
    loss = nn.CrossEntropyLoss()
    direct = DirectInfluence(model, loss, 0.1).demand()
    assert direct.state_bytes == 16 * 105**2  # float64, whatever the model has
    assert direct.solve_passes == 0
    assert direct.by_method
    assert CgInfluence(model, loss, 0.1).demand().state_bytes == 0
    ekfac = EkfacInfluence(model, True, 0.1).demand()
    assert ekfac.fit_passes == 2
    assert ekfac.solve_passes == 0
    assert ekfac.state_bytes == 4 * (5**2 + 21**2 + 1 + 1) + 8 * 105  # eigenvectors, and eigenvalues in float64


def test_settings_that_mean_nothing_are_refused() -> None:
    case = build("mlp classification")
    calculator = SequentialInfluenceCalculator(DirectInfluence(case.model, case.loss, 0.01))
    with pytest.raises(SettingError, match="`solve`"):
        calculator.plan(*case.train, *case.test, solve="columns")
    with pytest.raises(SettingError, match="`panel_size`"):
        calculator.plan(*case.train, *case.test, panel_size=0)
