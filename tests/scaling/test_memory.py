"""What workers really take, beside the plan: three shapes, and a training set that grows tenfold."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distinfluence import (
    CgInfluence,
    DaskInfluenceCalculator,
    InfluenceFunctionModel,
    InverseHarmonicMeanInfluence,
    NystroemSketchInfluence,
    Recipe,
)
from distinfluence.scaling import ClusterSpec, Plan, connected


@dataclass(frozen=True)
class Shape:
    n_test: int
    n_train: int
    width: int
    features: int

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(self.features, self.width), nn.Tanh(), nn.Linear(self.width, 2))


SHAPES = {
    "many test points": Shape(n_test=30_000, n_train=4_096, width=8, features=64),
    "long p": Shape(n_test=32, n_train=256, width=3_000, features=500),
    "long n": Shape(n_test=64, n_train=120_000, width=4, features=1_000),
}


def samples(n: int, features: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, features, generator=generator), torch.randint(0, 2, (n,), generator=generator)


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Largest resident memory of this process since `forget_peak`, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


Method = Callable[[nn.Module], InfluenceFunctionModel]


def datainf(model: nn.Module) -> InfluenceFunctionModel:
    return InverseHarmonicMeanInfluence(model, nn.CrossEntropyLoss(), 0.1)


def nystroem(model: nn.Module) -> InfluenceFunctionModel:
    return NystroemSketchInfluence(model, nn.CrossEntropyLoss(), 24, 0.1, second_order_mode="ggn", residual_rows=0)


def cg(model: nn.Module) -> InfluenceFunctionModel:
    return CgInfluence(model, nn.CrossEntropyLoss(), 0.1, rtol=1e-3, atol=0.0, maxiter=2, second_order_mode="ggn")


def measured(
    shape: Shape, folder: Path, method: Method = datainf, solve: str = "auto", chunk_size: int | None = None
) -> tuple[Plan, int]:
    """The plan of a run, and the most that its worker took, in bytes."""
    with connected(ClusterSpec(workers=1, memory_limit="4GiB")) as client:
        calculator = DaskInfluenceCalculator(method(shape.model()), client, scratch=folder / "scratch")
        train, test = (
            Recipe("tests.scaling.test_memory:samples", {"n": n, "features": shape.features})
            for n in (shape.n_train, shape.n_test)
        )
        plan = calculator.plan(train, None, test, solve=solve, chunk_size=chunk_size)
        client.run(forget_peak)
        calculator.fit(train, chunk_size=plan.chunks.train)
        sizes = {"test_chunk_size": plan.chunks.test, "panel_size": plan.chunks.panel}
        result = calculator.to_zarr(folder / "i.zarr", test, **sizes, solve=solve, progress=False)
        assert result.complete
        (most,) = client.run(peak).values()
        return plan, int(most)


def at_most(plan: Plan) -> int:
    """Bytes of a worker."""
    return max(stage.bytes for stage in plan.stages)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.soak) for name in SHAPES])
def test_workers_take_what_the_plan_says(name: str, tmp_path: Path) -> None:
    plan, most = measured(SHAPES[name], tmp_path)
    assert abs(most - at_most(plan)) <= 0.25 * at_most(plan)  # allocators keep pages, kernels have work space


SUMS: dict[str, tuple[Shape, Method]] = {
    "of a sketch": (Shape(n_test=8, n_train=32, width=500, features=500), nystroem),
    "of products, by data": (Shape(n_test=24, n_train=32, width=500, features=500), cg),
}


ATTEMPTS = 3  # How many sums are there at once depends on who is faster: the plan is for the most.


@pytest.mark.parametrize("what", SUMS)
def test_workers_hold_as_many_partial_sums_as_the_plan_says(what: str, tmp_path: Path) -> None:
    shape, method = SUMS[what]
    held = 0.0
    for attempt in range(ATTEMPTS):
        plan, most = measured(shape, tmp_path / str(attempt), method, "data", chunk_size=4)
        assert sum(stage.parts.get("sums", 0) for stage in plan.stages) > 0.3 * at_most(plan)
        assert most <= 1.25 * at_most(plan)
        held = max(held, most / at_most(plan))
        if held >= 0.75:
            break
    assert held >= 0.75


@pytest.mark.parametrize("n_train", [4_096, pytest.param(40_960, marks=pytest.mark.soak)])
def test_memory_is_flat_while_the_training_set_grows_tenfold(n_train: int, tmp_path: Path) -> None:
    """Beyond the data set itself, which each worker of this test builds."""
    taken = []
    for n in (n_train, 10 * n_train):
        plan, most = measured(Shape(n_test=512, n_train=n, width=2, features=8), tmp_path / str(n), chunk_size=2048)
        assert plan.machine.process < most
        taken.append(most - plan.work.built_bytes)
    assert taken[1] < 1.1 * taken[0]
