"""What must hold on a GPU as on a CPU; skipped where there is none. The benchmark is run on whatever there is."""

from typing import Any

import numpy as np
import pytest
import torch

from distinfluence import (
    DirectInfluence,
    EkfacInfluence,
    InfluenceFunctionModel,
    KrylovInfluence,
    SequentialInfluenceCalculator,
)
from tests.benchmarks.gpu import table
from tests.zoo import build

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_the_benchmark_of_devices_runs() -> None:
    lines = table(torch.device("cuda" if torch.cuda.is_available() else "cpu"), width=16, n=32, tests=4)
    assert len(lines) == 7
    assert all("%" in line for line in lines[3:])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("method", ["direct", "krylov", "ekfac"])
def test_a_gpu_gives_the_numbers_of_a_cpu(method: str) -> None:
    case = build("mlp classification")

    def influences(device: str) -> Any:
        model = case.model.to(device)
        made: InfluenceFunctionModel
        if method == "direct":
            made = DirectInfluence(model, case.loss, 0.1, second_order_mode="ggn")
        elif method == "krylov":
            made = KrylovInfluence(model, case.loss, 0.1, rtol=1e-9, second_order_mode="ggn")
        else:
            made = EkfacInfluence(model, True, 0.1, loss=case.loss)
        calculator = SequentialInfluenceCalculator(made).fit(*case.train, chunk_size=8)
        return calculator.influences(*case.test).compute()

    np.testing.assert_allclose(influences("cuda"), influences("cpu"), rtol=1e-4, atol=1e-6)
