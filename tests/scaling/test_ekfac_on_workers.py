"""EKFAC fitted and scored on Dask workers."""

from pathlib import Path

import numpy as np
import pytest
from distributed import Client

from distinfluence import DaskInfluenceCalculator, EkfacInfluence, RelativeDamping
from tests.layers.networks import network


@pytest.mark.parametrize("name", ["conv2d, two groups", "a residual network"])
def test_on_workers_as_here(name: str, client: Client, tmp_path: Path) -> None:
    case = network(name, n_train=12)
    here = EkfacInfluence(case.model, True, RelativeDamping(0.1), loss=case.loss, fisher="sampled").fit(case.train)
    model = EkfacInfluence(case.model, True, RelativeDamping(0.1), loss=case.loss, fisher="sampled")
    calculator = DaskInfluenceCalculator(model, client, scratch=tmp_path / "scratch")
    calculator.fit(*case.train, chunk_size=5)
    assert calculator.model.fit_report.passes == 2
    result = calculator.to_zarr(tmp_path / "out.zarr", *case.test, test_chunk_size=2)
    expected = here.influences(*case.test, *case.train).numpy()
    np.testing.assert_allclose(result.influences[:], expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
