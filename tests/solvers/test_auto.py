"""Auto: the solver that fits, the same everywhere, and said."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distinfluence.curvature import CurvatureOperator, MatrixOperator
from distinfluence.errors import SettingError
from distinfluence.solvers import Auto
from distinfluence.solvers.auto import AutoState, about
from distinfluence.solvers.demand import System, Systems
from distinfluence.testing import SolverContract
from distinfluence.testing.systems import SYSTEM, dense_solution, relative_error


class Large(CurvatureOperator):
    """Nothing but sizes; products would be a defect, since choosing computes nothing."""

    def __init__(self, size: int, n_samples: int = 1_000, positive_semidefinite: bool = True) -> None:
        super().__init__(size, torch.float32, torch.device("cpu"))
        self.positive_semidefinite = positive_semidefinite
        self._n_samples = n_samples

    @property
    def product_flops(self) -> float:
        return 12.0 * self.size * self._n_samples

    def _product(self, rows: Tensor) -> Tensor:
        raise AssertionError("nothing is computed for a choice")


class TestAuto(SolverContract[AutoState]):
    """Small systems are factorised: as exact as Direct."""

    solver = Auto(damping=0.0, rtol=1e-10)
    accuracy = 1e-8

    def test_small_systems_are_factorised(self) -> None:
        state = self.solver.fit(MatrixOperator(SYSTEM.matrix))
        assert type(state.solver).__name__ == "Direct"
        assert state.remarks[0].startswith("chose Direct for 1024 rows of 40 parameters (under 1 s, 0.1 MiB); rejected")


GIB = 2**30
KINDS = ("Direct", "BlockKrylov", "BlockCG", "Chebyshev")


@pytest.mark.parametrize(
    ("size", "n_samples", "rows", "memory", "definite", "expected"),
    [
        (387, 340, 102, GIB, True, "Direct"),  # a tabular model: 387 products, fewer than any iteration makes
        (1_810, 1_200, 597, GIB, True, "Direct"),
        (5_386, 4_000, 34, 8 * GIB, True, "BlockCG"),  # some 400 products, not 5,386
        (5_386, 4_000, 34, 8 * GIB, False, "BlockCG"),
        (50_000, 200, 16, 8 * GIB, True, "BlockKrylov"),
        (5_386, 4_000, 4, 8 * GIB, True, "BlockKrylov"),  # so few that a sketch does not pay
        (5_386, 4_000, 20_000, 8 * GIB, True, "Direct"),  # 5,386 products for all rows
        (5_386, 4_000, 20_000, GIB // 2, True, "BlockCG"),  # 24·p² are 0.65 GiB
        (6_570, 1_500, 297, 8 * GIB, True, "BlockCG"),
        (1_000_000, 1_000, 8, 16 * GIB, True, "BlockKrylov"),
        (1_000_000, 1_000, 8, GIB, True, "BlockCG"),  # a basis of 1.2 GiB does not fit
        (1_000_000, 1_000, 1024, 4 * GIB, True, "Chebyshev"),  # nothing fits
        (1_000_000, 1_000, 1024, 4 * GIB, False, "BlockCG"),  # Chebyshev needs a definite matrix
    ],
)
def test_products_and_memory_decide(
    size: int, n_samples: int, rows: int, memory: int, definite: bool, expected: str
) -> None:
    operator = Large(size, n_samples, definite)
    auto = Auto(0.1, rtol=1e-4, rows=rows, memory=memory)
    solver, why = auto.choose(operator)
    assert type(solver).__name__ == expected
    assert why.startswith(f"chose {expected} for {rows} rows of {size} parameters (")
    rejected = {kind for kind in KINDS if kind != expected and (definite or kind != "Chebyshev")}
    assert set(re.findall(r"(\w+): (?:about|under)", why)) == rejected
    assert operator.work.passes == 0
    systems = Systems((System.of(operator),), operator.dtype, operator.device)
    assert auto.demand(systems) == solver.demand(systems)  # the plan is that of what a fit chooses


def test_the_report_says_what_was_rejected_and_what_it_would_have_taken() -> None:
    _, why = Auto(0.1, rtol=1e-4, rows=34, memory=GIB // 2).choose(Large(5_386, 4_000))
    # 5,386 products of 12 · 5,386 · 4,000 flops, at 4e10 a second, are 35 s
    assert re.fullmatch(
        r"chose BlockCG for 34 rows of 5386 parameters \(about 2 s, 10\.8 MiB\); rejected Direct: about 3\d s, 0\.6 "
        r"GiB \(too much\); BlockKrylov: about 2 s, 27\.9 MiB; Chebyshev: about \d+ s, 7\.0 MiB",
        why,
    )


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "under 1 s"), (90.0, "about 90 s"), (1_260.0, "about 21 min"), (9e4, "about 25 h")],
)
def test_times_are_said_to_the_digits_that_they_are_worth(seconds: float, said: str) -> None:
    assert about(seconds) == said


def test_blocks_of_different_sizes_are_planned_by_the_choice_for_each() -> None:
    small, large = (Systems((System.of(Large(p, 500)),), torch.float32, torch.device("cpu")) for p in (20, 20_000))
    auto = Auto(0.1, rtol=1e-4, rows=4, memory=GIB)
    both = replace(small, blocks=(*small.blocks, *large.blocks))
    demand = auto.demand(both)
    assert demand.fit == auto.demand(small).fit + auto.demand(large).fit
    assert auto.demand(small).fit.rows == 20  # dense
    assert auto.demand(large).fit.rows == 0  # a basis that begins with the right-hand sides
    assert demand.state_bytes == 16 * 20**2
    assert demand.row_vectors == auto.demand(large).row_vectors


def test_without_a_limit_the_free_memory_decides() -> None:
    solver, why = Auto(0.1, rtol=1e-4, rows=4).choose(Large(20_000))
    assert type(solver).__name__ == "BlockKrylov"
    assert "MiB" in why


@pytest.mark.parametrize("kind", KINDS)
def test_every_choice_solves_and_survives_storage(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Auto, "_best", lambda *_: (kind, 2**20))
    solver: Auto = Auto(SYSTEM.damping, rtol=1e-10)
    operator = MatrixOperator(SYSTEM.matrix, positive_semidefinite=True)
    state = solver.fit(operator)
    assert type(state.solver).__name__ == kind
    x = solver.solve(state, SYSTEM.rhs()).x
    assert relative_error(x, dense_solution(SYSTEM.matrix, SYSTEM.damping, SYSTEM.rhs())) <= 1e-6
    monkeypatch.undo()  # another choice now does not touch what was stored
    fresh = MatrixOperator(SYSTEM.matrix, positive_semidefinite=True)
    restored = solver.restore(fresh, solver.state_arrays(state))
    assert fresh.work.passes == 0
    assert (restored.solver, restored.why) == (state.solver, state.why)
    assert relative_error(solver.solve(restored, SYSTEM.rhs()).x, x) <= 1e-6


@pytest.mark.parametrize(("name", "value"), [("rows", 0), ("memory", 0), ("rtol", 0.0)])
def test_settings_are_checked(name: str, value: Any) -> None:
    with pytest.raises(SettingError, match=f"`{name}` must be"):
        replace(TestAuto.solver, **{name: value})
