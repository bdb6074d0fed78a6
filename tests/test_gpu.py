"""What must hold on a GPU as on a CPU; skipped where there is none. The benchmark is run on whatever there is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster
from torch import Tensor

from distinfluence import (
    DaskInfluenceCalculator,
    DirectInfluence,
    EkfacInfluence,
    InfluenceFunctionModel,
    KrylovInfluence,
    SequentialInfluenceCalculator,
)
from distinfluence.influence.scores import tile_of
from distinfluence.model.blocks import ParameterBlocks
from distinfluence.model.objective import as_objective
from distinfluence.model.sample_risk import SampleRisk
from distinfluence.scaling import ClusterSpec, connected
from tests.benchmarks.gpu import table
from tests.reference import Reference
from tests.zoo import BUILDERS, build

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_the_benchmark_of_devices_runs() -> None:
    lines = list(table(torch.device("cuda" if torch.cuda.is_available() else "cpu"), widths=[16], n=32, m=4))
    timed = [line for line in lines if line.count("|") == 7 and "---" not in line][1:]
    assert len(timed) == 11
    assert all(line.count("%") == 2 and "nan" not in line for line in timed)
    assert sum("Influence" in line for line in lines) == 2


def made(method: str, device: str) -> InfluenceFunctionModel:
    """An influence model in float32, on a device."""
    case = build("mlp classification")
    model = case.model.float().to(device)
    if method == "direct":
        return DirectInfluence(model, case.loss, 0.1, second_order_mode="ggn")
    if method == "krylov":
        return KrylovInfluence(model, case.loss, 0.1, rtol=1e-6, second_order_mode="ggn")
    return EkfacInfluence(model, True, 0.1, loss=case.loss)


def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test data in float32, on the host."""
    case = build("mlp classification")
    return (case.train[0].float(), case.train[1]), (case.test[0].float(), case.test[1])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def device(request: pytest.FixtureRequest) -> str:
    """Every test here runs on the CPU, too: it must be right before it is of use on a GPU."""
    return str(request.param)


def on_cpu(method: str) -> Any:
    train, test = data()
    return SequentialInfluenceCalculator(made(method, "cpu")).fit(*train, chunk_size=8).influences(*test).compute()


def close(found: Any, expected: Any, digits: float = 1e-4) -> None:
    np.testing.assert_allclose(found, expected, rtol=digits, atol=digits * np.abs(expected).max())


@pytest.mark.parametrize("method", ["direct", "krylov", "ekfac"])
def test_a_gpu_gives_the_numbers_of_a_cpu(method: str, device: str) -> None:
    train, test = data()
    calculator = SequentialInfluenceCalculator(made(method, device)).fit(*train, chunk_size=8)
    close(calculator.influences(*test).compute(), on_cpu(method), 1e-3)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_scores_of_every_kind_of_model_are_those_of_plain_autograd(name: str, device: str) -> None:
    case = build(name)
    risk = SampleRisk(case.model, as_objective(case.loss), ParameterBlocks.of(case.model), torch.device(device))
    batch, factors = risk.place(case.train), torch.ones(3, risk.size, dtype=torch.float64, device=device)
    expected = Reference(case).gradients(case.train).sum(dim=1).expand(3, -1)
    close(tile_of(risk, factors, batch).values.cpu(), expected.numpy(), 1e-9)


@pytest.mark.parametrize("panel", [6, 4])
def test_strips_are_written_in_panels_whose_copies_overlap(panel: int, device: str, tmp_path: Path) -> None:
    train, test = data()
    calculator = SequentialInfluenceCalculator(made("direct", device)).fit(*train, chunk_size=8)
    result = calculator.to_zarr(tmp_path / "i.zarr", *test, panel_size=panel, progress=False)
    close(result[:], on_cpu("direct"), 1e-3)
    plan = calculator.plan(*train, *test)
    assert (plan.machine.device_memory is None) == (device == "cpu")


def test_workers_of_a_cluster_compute_on_their_device(device: str, tmp_path: Path) -> None:
    train, test = data()
    one = LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0")
    with one as cluster, Client(cluster) as client:
        calculator = DaskInfluenceCalculator(made("krylov", device), client).fit(*train, chunk_size=8)
        result = calculator.to_zarr(tmp_path / "i.zarr", *test, solve="data", progress=False)
        close(result[:], on_cpu("krylov"), 1e-3)


def taken_on_gpu() -> int:
    """Bytes that this process has taken on its GPU at most."""
    return torch.cuda.max_memory_allocated()


@pytest.mark.gpu
@needs_gpu
def test_dask_cuda_starts_a_worker_for_each_gpu(tmp_path: Path) -> None:
    pytest.importorskip("dask_cuda")
    train, test = data()
    with connected(ClusterSpec("cuda")) as client:
        calculator = DaskInfluenceCalculator(made("krylov", "cpu"), client, device="auto").fit(*train, chunk_size=8)
        assert calculator.plan(*train, *test).machine.device_memory is not None
        result = calculator.to_zarr(tmp_path / "i.zarr", *test, progress=False)
        taken = client.run(taken_on_gpu)
    close(result[:], on_cpu("krylov"), 1e-3)
    assert len(taken) == torch.cuda.device_count()
    assert all(taken.values())


def test_mixed_precision_has_two_digits(device: str, tmp_path: Path) -> None:
    train, test = data()
    calculator = SequentialInfluenceCalculator(made("direct", device).in_mixed_precision()).fit(*train, chunk_size=8)
    result = calculator.to_zarr(tmp_path / "i.zarr", *test, progress=False)
    expected = on_cpu("direct")
    assert np.linalg.norm(result[:] - expected) < 0.05 * np.linalg.norm(expected)
