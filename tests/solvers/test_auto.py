"""Auto: the solver that fits, the same everywhere, and said."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distinfluence.curvature import CurvatureOperator, MatrixOperator
from distinfluence.errors import SettingError
from distinfluence.solvers import Auto
from distinfluence.solvers.auto import AutoState
from distinfluence.testing import SolverContract
from distinfluence.testing.systems import SYSTEM, dense_solution, relative_error


class Large(CurvatureOperator):
    """Nothing but a size; products would be a defect, since choosing computes nothing."""

    def __init__(self, size: int, positive_semidefinite: bool = True) -> None:
        super().__init__(size, torch.float32, torch.device("cpu"))
        self.positive_semidefinite = positive_semidefinite

    def _product(self, rows: Tensor) -> Tensor:
        raise AssertionError("nothing is computed for a choice")


class TestAuto(SolverContract[AutoState]):
    """Small systems are factorised: as exact as Direct."""

    solver = Auto(damping=0.0, rtol=1e-10)
    accuracy = 1e-8

    def test_small_systems_are_factorised(self) -> None:
        state = self.solver.fit(MatrixOperator(SYSTEM.matrix))
        assert type(state.solver).__name__ == "Direct"
        assert state.remarks[0].startswith("chose Direct: 40 parameters")


GIB = 2**30


@pytest.mark.parametrize(
    ("size", "rows", "memory", "definite", "expected"),
    [
        (9_000, 64, 8 * GIB, True, "Direct"),
        (9_000, 64, GIB, True, "BlockKrylov"),  # 24·p² are 1.8 GiB
        (1_000_000, 64, 16 * GIB, True, "BlockKrylov"),
        (1_000_000, 1024, 56 * GIB, True, "BlockCG"),
        (1_000_000, 1024, 4 * GIB, True, "Chebyshev"),
        (1_000_000, 1024, 4 * GIB, False, "BlockCG"),  # Chebyshev needs a definite matrix
    ],
)
def test_size_and_memory_decide(size: int, rows: int, memory: int, definite: bool, expected: str) -> None:
    operator = Large(size, definite)
    solver, why = Auto(0.1, rtol=1e-4, rows=rows, memory=memory).choose(operator)
    assert type(solver).__name__ == expected
    assert f"chose {expected}" in why
    assert operator.work.passes == 0


def test_without_a_limit_the_free_memory_decides() -> None:
    solver, why = Auto(0.1, rows=10).choose(Large(20_000))
    assert type(solver).__name__ == "BlockKrylov"
    assert "GiB" in why


@pytest.mark.parametrize("rows", [1, 10, 10_000])
def test_every_choice_solves_and_survives_storage(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from distinfluence.solvers import auto

    monkeypatch.setattr(auto, "DIRECT_SIZE", 0)
    kinds = set()
    at_once = min(rows, 40)  # more rows than parameters depend on each other
    for memory in (40 * 8 * 40 * at_once, 40 * 8 * 12 * at_once, 1):
        solver: Auto = Auto(SYSTEM.damping, rtol=1e-10, rows=rows, memory=memory)
        operator = MatrixOperator(SYSTEM.matrix, positive_semidefinite=True)
        state = solver.fit(operator)
        kinds.add(type(state.solver).__name__)
        x = solver.solve(state, SYSTEM.rhs()).x
        assert relative_error(x, dense_solution(SYSTEM.matrix, SYSTEM.damping, SYSTEM.rhs())) <= 1e-6
        fresh = MatrixOperator(SYSTEM.matrix, positive_semidefinite=True)
        restored = solver.restore(fresh, solver.state_arrays(state))
        assert fresh.work.passes == 0
        assert (restored.solver, restored.why) == (state.solver, state.why)
        assert relative_error(solver.solve(restored, SYSTEM.rhs()).x, x) <= 1e-6
    assert kinds == {"BlockKrylov", "BlockCG", "Chebyshev"}


@pytest.mark.parametrize(("name", "value"), [("rows", 0), ("memory", 0), ("rtol", 0.0)])
def test_settings_are_checked(name: str, value: Any) -> None:
    with pytest.raises(SettingError, match=f"`{name}` must be"):
        replace(TestAuto.solver, **{name: value})
