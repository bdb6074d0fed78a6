"""What a process keeps between tasks: read once, given back in time."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distinfluence import DirectInfluence
from distinfluence.influence.arrays import HostCopies, to_numpy_batch
from distinfluence.model.batch import Batch
from distinfluence.model.sample_risk import SampleRisk
from distinfluence.scaling.dispatch.kernel_tasks import run_kernel
from distinfluence.scaling.stages.strips import Panels
from distinfluence.scaling.worker import cache
from distinfluence.scaling.worker.context import LocalContext
from tests.zoo import build


@dataclass(frozen=True)
class Adds:
    def __call__(self, risk: SampleRisk, batch: Batch, *broadcast: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (len(batch[0]) * (broadcast[0] + broadcast[1]),)


def test_broadcasts_are_read_once_in_a_process_and_dropped_with_the_next_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = build("mlp classification")
    context = LocalContext("here", DirectInfluence(case.model, case.loss, 0.1))
    chunk: Any = to_numpy_batch((case.train[0][:5], case.train[1][:5]))
    read: list[str] = []
    load = np.load

    def counting(file: str, **settings: Any) -> Any:
        read.append(Path(file).stem)
        return load(file, **settings)

    def sums(*names: str) -> Any:
        files = tuple(str(tmp_path / f"{name}.npy") for name in names)
        return run_kernel(context, Adds(), files, [(chunk, 0, 0, 5), (chunk, 1, 5, 5)])[0]

    for number, name in enumerate("abcd"):
        np.save(tmp_path / f"{name}.npy", np.full(3, float(number)))
    monkeypatch.setattr(np, "load", counting)
    cache.forget_broadcasts()
    for _ in range(3):
        np.testing.assert_array_equal(sums("a", "b"), np.full(3, 10.0))
    assert read == ["a", "b"]
    np.testing.assert_array_equal(sums("c", "d"), np.full(3, 50.0))
    assert read == ["a", "b", "c", "d"]
    assert len(cache._broadcasts) == 1
    list(Panels(str(tmp_path / "a.npy"), 3).resident(torch.device("cpu")))
    assert cache._broadcasts == {}


def test_copies_to_the_host_come_in_their_order_on_any_device() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    copies = HostCopies()
    made = [torch.full((2, 3), float(i), device=device, requires_grad=True) for i in range(4)]
    for tensor in made:
        copies.add(tensor * 2)
    np.testing.assert_array_equal(np.stack(copies.arrays())[:, 0, 0], [0.0, 2.0, 4.0, 6.0])
    assert HostCopies().arrays() == []
