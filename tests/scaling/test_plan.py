"""The plan is a pure function: what it chooses, what it refuses, what it says."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from distributed import Client
from torch import nn

from distinfluence import CgInfluence, DirectInfluence, EkfacInfluence, SequentialInfluenceCalculator
from distinfluence.curvature import PlannedWork
from distinfluence.errors import PlanError, SettingError
from distinfluence.influence.checks.products import check_bytes
from distinfluence.scaling import Machine, make_plan
from distinfluence.scaling.plan.costs import STAGE_SECONDS
from distinfluence.scaling.plan.problem import FixedSizes, Problem, Rates
from distinfluence.scaling.plan.tree_shape import pass_tasks, results_held
from distinfluence.scaling.worker.device import device_memory, smallest_device
from distinfluence.solvers.demand import Demand, SolveWork
from tests.zoo import build

GIB = 2**30
WORK = Problem(
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
            assert max(stage.bytes for stage in plan.stages) <= 0.95 * machine.memory


def test_what_cannot_fit_is_refused_with_what_would_make_it_fit() -> None:
    with pytest.raises(PlanError, match=r"'factors' needs .* most of it is the solve.*test_chunk_size.*at least"):
        make_plan(WORK, MACHINE, FixedSizes(test=1_000, solve="rows"))
    with pytest.raises(PlanError, match=r"'strips' needs .* most of it is a strip, .*chunk_size"):
        make_plan(replace(WORK, n_test=2_000), MACHINE, FixedSizes(train=1_000_000))
    with pytest.raises(PlanError, match=r"the fitted state.*iterative"):
        make_plan(replace(WORK, demand=Demand(state_bytes=8 * 10**12), over_data=False), MACHINE, FixedSizes(test=1))


def test_sizes_that_are_asked_for_stay() -> None:
    plan = make_plan(WORK, MACHINE, FixedSizes(train=500, test=10, panel=100, solve="rows"))
    assert (plan.chunks.train, plan.chunks.test, plan.chunks.panel, plan.solve) == (500, 10, 100, "rows")
    assert plan.n_solves == 100
    assert plan.n_panels == 10
    assert plan.stages[1].passes == 100 * (Demand().solve.steps + 1)
    assert plan.stages[1].products == 1_000 * (Demand().solve.steps + 1)


def test_a_row_is_multiplied_whole_however_long_it_is() -> None:
    huge = Machine(workers=2, memory=16_384 * GIB, process=350 * 2**20)
    for rows, at_once in ((1, 1), (24, 24), (100, 32)):
        demand = Demand(fit=PlannedWork(1, rows), fit_rows=rows, by_method=True)
        for p in (1_000_000, 1_000_000_000):
            work = replace(WORK, n_test=8, n_train=1_000, n_fit=1_000, p=p, demand=demand)
            products = make_plan(work, huge).stages[0].parts["products"]
            assert products == max(4 * 4 * p * (at_once if p == 1_000_000 else 1), check_bytes(p, 4))
    many = replace(WORK, p=100_000, demand=replace(demand, fit_rows=1_000))
    on_gpu = make_plan(many, replace(huge, device_memory=16 * GIB))
    assert on_gpu.stages[0].parts["products"] == 4 * 400_000 * 256
    assert make_plan(many, huge).stages[0].parts["products"] == 4 * 400_000 * 32 > check_bytes(100_000, 4)
    with pytest.raises(PlanError, match=r"'factors' needs .*"):
        make_plan(
            replace(WORK, n_test=8, n_train=1_000, n_fit=1_000, p=1_000_000_000), MACHINE, FixedSizes(solve="data")
        )


def test_a_pass_is_a_few_hundred_tasks_and_its_partial_sums_are_counted() -> None:
    sketch = Demand(fit=PlannedWork(1, 100), fit_rows=100, by_method=True, solve=SolveWork(10, 0))
    plan = make_plan(replace(WORK, demand=sketch), MACHINE, FixedSizes(train=250, test=8, solve="data"))
    assert plan.n_strips == 4_000
    assert plan.stages[0].tasks == 4_000 + pass_tasks(4_000)
    assert plan.stages[1].tasks == plan.n_solves * (1 + 10 * pass_tasks(4_000))
    assert pass_tasks(4_000) == pass_tasks(10**6) == 341
    held = 3 + results_held(4_000, MACHINE.workers)  # and two in the making, and the broadcast rows
    assert plan.stages[0].parts["sums"] == held * 100 * plan.work.row
    assert plan.stages[1].parts["sums"] == held * 8 * plan.work.row
    matrix = replace(WORK, p=1_000, demand=Demand(fit=PlannedWork(1), sum_bytes=4 * 1_000**2))
    matrix_plan = make_plan(matrix, MACHINE, FixedSizes(train=250))
    assert matrix_plan.stages[0].parts["sums"] == (held - 1) * 4 * 1_000**2 + 4 * 1_000
    alone = make_plan(matrix, replace(MACHINE, workers=1, alone=True))
    assert alone.stages[0].parts["sums"] == 2 * 4 * 1_000**2 + 4 * 1_000


def test_times_are_given_where_something_was_measured() -> None:
    assert make_plan(WORK, MACHINE).seconds is None
    slow = make_plan(WORK, MACHINE, rates=Rates(gradients=1e3, products=1e3, flops=1e11))
    fast = make_plan(WORK, MACHINE, rates=Rates(gradients=2e3, products=2e3, flops=2e11))
    assert fast.seconds is not None and slow.seconds is not None
    fixed = 3 * STAGE_SECONDS
    assert slow.seconds - fixed == pytest.approx(2 * (fast.seconds - fixed))


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
    assert direct.solve.passes_for(10, 105) == 0
    assert direct.by_method
    assert CgInfluence(model, loss, 0.1).demand().state_bytes == 0
    ekfac = EkfacInfluence(model, True, 0.1).demand()
    assert ekfac.fit.passes == 2
    assert ekfac.solve.passes_for(10, 105) == 0
    assert ekfac.state_bytes == 4 * (5**2 + 21**2 + 1 + 1) + 8 * 105  # eigenvectors, and eigenvalues in float64


def test_settings_that_mean_nothing_are_refused() -> None:
    case = build("mlp classification")
    calculator = SequentialInfluenceCalculator(DirectInfluence(case.model, case.loss, 0.01))
    with pytest.raises(SettingError, match="`solve`"):
        calculator.plan(*case.train, *case.test, solve="columns")
    with pytest.raises(SettingError, match="`panel_size`"):
        calculator.plan(*case.train, *case.test, panel_size=0)


# --- GPUs, whose memory is given ------------------------------------------------------------------------------------


def test_a_gpu_with_less_memory_than_its_host_decides_chunks_and_panels() -> None:
    wide = replace(WORK, p=10_000_000, model_bytes=40_000_000)
    host, gpu = make_plan(wide, MACHINE), make_plan(wide, replace(MACHINE, device_memory=8 * GIB))
    assert gpu.chunks.panel == (8 * GIB // 4) // wide.row < host.chunks.panel
    assert gpu.chunks.train <= host.chunks.train
    assert gpu.chunks.test < host.chunks.test
    for stage in gpu.stages:
        assert sum(stage.on_device.values()) <= 0.95 * 8 * GIB
        assert not {"an idle process", "PyTorch at work", "kept chunks", "data sets"} & set(stage.on_device)
    assert "of 32.00 GiB with 8.00 GiB on a GPU" in str(gpu)
    assert make_plan(wide, replace(MACHINE, device_memory=80 * GIB)).chunks == host.chunks


def test_what_does_not_fit_on_a_gpu_is_refused_with_the_change_that_would() -> None:
    small = replace(MACHINE, device_memory=2 * GIB)
    with pytest.raises(PlanError, match=r"95 % of its GPU.*chunks\.panel.*of GPU memory\."):
        make_plan(replace(WORK, p=10_000_000), small, FixedSizes(panel=200))


def test_the_memory_of_a_gpu_is_what_is_free_and_of_the_host_nothing_is_said() -> None:
    assert device_memory(torch.device("cpu")) is None
    assert device_memory(torch.device("meta"), read=lambda device: (3 * GIB, 8 * GIB)) == 3 * GIB


class Reporting:
    """A client whose workers answer as they are told."""

    def __init__(self, *answers: int | None) -> None:
        self.answers = answers

    def run(self, function: Any, *arguments: Any, on_error: str) -> dict[str, int | None]:
        assert arguments == ("auto",)
        return {str(number): answer for number, answer in enumerate(self.answers)}


def test_of_many_workers_the_smallest_gpu_counts() -> None:
    assert smallest_device(cast(Client, Reporting(8, None, 5)), "auto") == 5
    assert smallest_device(cast(Client, Reporting(None, None)), "auto") is None
    assert smallest_device(cast(Client, Reporting()), "cpu") is None


def test_what_is_asked_for_beside_the_matrix_is_planned_as_stages_of_its_own() -> None:
    plain = make_plan(WORK, MACHINE, FixedSizes(train=512, test=256), Rates(1e4, 1e5, 1e11))
    more = replace(WORK, contributions=10, self_influence=True)
    plan = make_plan(more, MACHINE, FixedSizes(train=512, test=256), Rates(1e4, 1e5, 1e11))
    assert plan.stages[:3] == plain.stages
    own, apart = plan.stages[3:]
    assert (own.name, apart.name) == ("self-influence", "contributions")
    full, rest = divmod(WORK.n_train, 512)
    assert own.tasks == apart.tasks == plan.n_strips
    assert own.passes == (WORK.demand.solve.steps + 1) * (2 * full + -(-rest // 256))
    assert own.parts["the solve"] == plain.stages[1].parts.get("the solve", own.parts["the solve"])
    assert own.seconds is not None and apart.seconds is not None and plain.seconds is not None
    assert own.seconds > 0 and apart.seconds > 0
    assert plan.seconds == pytest.approx(plain.seconds + own.seconds + apart.seconds)
    free = make_plan(replace(more, over_data=False), MACHINE, FixedSizes(train=512, test=256))
    assert free.stages[3].passes == 0
    assert "the solve" in free.stages[3].parts
    assert "self-influence" in str(plan)


def test_a_self_influence_that_cannot_be_held_is_refused_before_anything_is_computed() -> None:
    alone = Machine(1, 8 * GIB, 350 * 2**20, alone=True)
    work = replace(WORK, n_test=64, p=2_500_000, model_bytes=10_000_000)
    # the driver holds the solve, but for self-influences workers do
    asked = FixedSizes(train=512, test=64, solve="data")
    assert make_plan(work, alone, asked)
    with pytest.raises(PlanError, match=r"'self-influence' needs .* most of it is the solve.* `test_chunk_size`"):
        make_plan(replace(work, self_influence=True), alone, asked)
