"""The recipe of docs/design.md for a new solver, carried out: its contract, a job file, the command line."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from distinfluence import DirectInfluence, open_influences
from distinfluence.app.yaml_file import to_yaml
from distinfluence.influence.registry import METHODS
from tests.processes import ROOT, finished
from tests.test_cli import command

JOB = {
    "model": {"factory": "given:model"},
    "loss": "torch.nn:CrossEntropyLoss",
    "method": {"name": "spectral", "hessian_regularization": 0.1, "second_order_mode": "ggn"},
    "data": {"train": "given:train", "test": "given:test"},
    "cluster": {"kind": "local", "workers": 1},
    "output": "spectral.zarr",
}
GIVEN = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

def train():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(20, 4, generator=generator), torch.randint(3, (20,), generator=generator)

def test():
    x, y = train()
    return x[:3] + 0.1, y[:3]
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the recipe's solver and test class, as somebody would write them down."""
    section = (ROOT / "docs" / "design.md").read_text().partition("## To add a solver")[2].partition("\n## ")[0]
    solver, contract = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    (tmp_path / "spectral.py").write_text(solver)
    (tmp_path / "test_spectral.py").write_text(f"from spectral import Spectral\n{contract}")
    (tmp_path / "given.py").write_text(GIVEN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for module in ("spectral", "given"):
        sys.modules.pop(module, None)


def test_the_recipe_keeps_the_contract(recipe: Path) -> None:
    done = finished([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_spectral.py"], cwd=recipe)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^\d{2,} passed", done.stdout, re.MULTILINE)


def test_the_recipe_runs_from_a_job_file_by_one_line(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import given  # type: ignore[import-not-found]
    from spectral import SpectralInfluence  # type: ignore[import-not-found]

    monkeypatch.setitem(METHODS, "spectral", SpectralInfluence)
    (recipe / "job.yaml").write_text(to_yaml(JOB))
    outcome = command("run", recipe / "job.yaml", "--quiet")
    assert outcome.exit_code == 0, outcome.output
    scores = open_influences(recipe / "spectral.zarr").influences[:]
    exact = DirectInfluence(given.model(), nn.CrossEntropyLoss(), 0.1, second_order_mode="ggn").fit(given.train())
    expected = exact.influences(*given.test(), *given.train()).numpy()
    # float32 factors: rounding times a condition of about 100
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
