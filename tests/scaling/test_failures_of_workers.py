"""Workers that are killed or stand still in each stage: the same bits, and nothing made twice."""

import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from distributed import Client

from distinfluence import (
    ArnoldiInfluence,
    CgInfluence,
    DaskInfluenceCalculator,
    DirectInfluence,
    InfluenceFunctionModel,
    InfluenceResult,
    ModelRecipe,
    Recipe,
)
from distinfluence.scaling import LogToFolder
from distinfluence.scaling.dispatch import executor
from tests.scaling import sources
from tests.scaling.chaos import DEADLINE, KILLS, SEED, Killer, Staged, forked, made, quick_workers, wait_for
from tests.zoo import Case, build


@pytest.fixture(scope="module")
def case() -> Case:
    return build("mlp classification")


@pytest.fixture(scope="module")
def quick() -> Iterator[Client]:
    with quick_workers() as client:
        yield client


@pytest.fixture(scope="module")
def quiet_runs(quick: Client, case: Case, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], InfluenceResult]:
    """The result of a run that nobody disturbs, made once for both tests."""

    @functools.cache
    def result(name: str) -> InfluenceResult:
        quick.wait_for_workers(2, timeout=DEADLINE)
        return RUNS[name](quick, case, tmp_path_factory.mktemp("quiet") / "quiet.zarr", Staged())

    return result


def arnoldi(case: Case) -> InfluenceFunctionModel:
    return ArnoldiInfluence(sources.slow_model(0.0), case.loss, 0.1, rank_estimate=5, second_order_mode="ggn")


def cg(case: Case) -> InfluenceFunctionModel:
    return CgInfluence(sources.slow_model(0.0), case.loss, 0.1, rtol=1e-8, atol=0.0, maxiter=4, second_order_mode="ggn")


def direct(case: Case) -> InfluenceFunctionModel:
    return DirectInfluence(sources.slow_model(0.0), case.loss, 0.01, second_order_mode="ggn")


@dataclass(frozen=True)
class Run:
    """stages: in which workers are killed. seconds: of an evaluation. times: how often the test points are repeated."""

    stages: set[str]
    method: Callable[[Case], InfluenceFunctionModel]
    chunk: int
    test_chunk: int
    solve: str
    seconds: float
    times: int = 1

    def __call__(self, client: Client, case: Case, path: Path, progress: Staged) -> InfluenceResult:
        client.register_plugin(LogToFolder(path.with_suffix(".logs")))
        recipe = ModelRecipe(Recipe("tests.scaling.sources:slow_model", {"seconds": self.seconds}))
        calculator = DaskInfluenceCalculator(
            self.method(case), client, recipe=recipe, scratch=path.with_suffix(".scratch")
        )
        calculator.fit(*case.train, chunk_size=self.chunk, progress=progress)
        tests = (torch.cat([part] * self.times) for part in case.test)
        return calculator.to_zarr(path, *tests, test_chunk_size=self.test_chunk, solve=self.solve, progress=progress)


RUNS = {
    "look and fit": Run({"look at training data", "fit"}, arnoldi, 1, 6, "rows", 0.03),
    "factors by rows": Run({"factors"}, cg, 12, 1, "rows", 0.01, times=4),
    "factors by data": Run({"factors"}, cg, 1, 3, "data", 0.02),
    "strips": Run({"strips"}, direct, 1, 6, "rows", 0.1),
}


@pytest.mark.chaos
@pytest.mark.parametrize("name", RUNS)
def test_workers_killed_at_random_in_a_stage_cost_their_tasks_and_nothing_else(
    quick: Client, case: Case, tmp_path: Path, name: str, quiet_runs: Callable[[str], InfluenceResult]
) -> None:
    run, kills, quiet = RUNS[name], 0, quiet_runs(name)
    for attempt in range(20):
        if kills == KILLS:
            break
        progress, path = Staged(), tmp_path / f"{attempt}.zarr"
        with Killer(quick, progress, run.stages, KILLS - kills, seed=SEED + attempt) as killer:
            result = run(quick, case, path, progress)
        kills += killer.kills
        assert result.complete
        np.testing.assert_array_equal(result[:], quiet[:])
        np.testing.assert_array_equal(result.top(0).indices, quiet.top(0).indices)
        _, again = made(path.with_suffix(".logs"), "strip", "write")
        assert not again
        _, again = made(path.with_suffix(".logs"), "solve", "solve")
        assert not again
    assert kills == KILLS


@pytest.mark.parametrize("name", RUNS)
def test_a_worker_that_stands_still_in_a_stage_costs_nothing(
    quick: Client,
    case: Case,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    quiet_runs: Callable[[str], InfluenceResult],
) -> None:
    monkeypatch.setattr(executor, "SLOW_SECONDS", 1.0)
    run, progress, stopped, quiet = RUNS[name], Staged(), list[psutil.Process](), quiet_runs(name)
    quick.wait_for_workers(2, timeout=DEADLINE)
    pids = sorted(quick.run(os.getpid).values())

    def stop() -> None:
        wait_for(lambda: progress.now in run.stages)
        os.kill(pids[0], signal.SIGSTOP)
        stopped.append(psutil.Process(pids[0]))

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        result = run(quick, case, tmp_path / "i.zarr", progress)
    finally:
        thread.join(DEADLINE)
        os.kill(pids[0], signal.SIGCONT)
    assert stopped
    assert stopped[0] in forked()  # it may come back
    np.testing.assert_array_equal(result[:], quiet[:])
