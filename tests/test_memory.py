"""What solvers hold: what plans reserve is what they take, and what the pages say."""

from pathlib import Path

import pytest
import torch
from torch import nn

from distinfluence import ArnoldiInfluence, DirectInfluence, EkfacInfluence, InverseHarmonicMeanInfluence
from distinfluence.influence.checks.products import check_bytes
from distinfluence.model.identity.probe import PROBE_BYTES
from distinfluence.model.reducer import LocalReducer
from distinfluence.solvers import BlockKrylov, Direct, NystroemSketch
from tests.benchmarks.memory import METHODS, ROWS, SIZE, Spread, blocks, peak, peak_bytes

SOLVERS = Path(__file__).parents[1] / "docs" / "solvers"
PAGES = {
    "block conjugate gradients": "cg",
    "row by row": "cg",
    "row by row, preconditioned": "cg",
    "Chebyshev": "chebyshev",
    "LiSSA, full batches": "lissa",
    "LiSSA, mini-batches": "lissa",
    "Krylov, 17 passes": "krylov",
    "Nyström sketch": "nystroem",
    "Arnoldi": "arnoldi",
}


def close(measured: float, reserved: float) -> None:
    """Reserved is enough, and not much more than enough."""
    assert 0.85 * reserved <= measured <= 1.02 * reserved


@pytest.mark.parametrize("name", METHODS)
def test_a_solve_holds_the_vectors_that_plans_reserve(name: str) -> None:
    found = peak(name)
    close(found.measured, found.reserved)


def test_a_bounded_basis_and_what_goes_on_after_it_stay_within_what_plans_reserve() -> None:
    vector = 4 * SIZE
    solver = BlockKrylov(1.0, rtol=1e-4, basis_bytes=8 * ROWS * vector)
    reserved = METHODS["Krylov, 17 passes"](nn.Linear(1, 1), nn.MSELoss()).demand().beside_vectors
    assert blocks(solver, ROWS, SIZE) <= 2 * 8 + reserved


@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_a_dense_factorisation_takes_what_is_reserved_for_a_decomposition(shift: float) -> None:
    """A matrix that is indefinite is decomposed by its eigenvalues, after a Cholesky factor that failed."""
    p = 600
    operator = Spread(p)
    operator._values -= shift
    demand = DirectInfluence(nn.Linear(p - 1, 1), nn.MSELoss(), 1.0).demand()
    kept = 16 * p * p
    assert demand.state_bytes == kept
    assert kept <= peak_bytes(lambda: Direct(1.0).fit(operator)) <= 1.02 * demand.fit_bytes


def test_a_sketch_is_made_in_the_memory_that_is_reserved() -> None:
    demand = METHODS["Nyström sketch"](nn.Linear(SIZE - 1, 1), nn.MSELoss()).demand()
    close(peak_bytes(lambda: NystroemSketch(1.0, 20).fit(Spread(SIZE))), demand.fit_bytes)
    assert demand.state_bytes == 20 * SIZE * 4


def test_eigenvectors_are_found_in_the_memory_that_is_reserved() -> None:
    influence = ArnoldiInfluence(nn.Linear(SIZE - 1, 1), nn.MSELoss(), 1.0, 10)
    measured = peak_bytes(lambda: influence.solver(1.0).fit(Spread(SIZE)))
    assert measured <= influence.demand().fit_bytes


@pytest.mark.parametrize("sides", [(100, 100), (50, 200)])
def test_ekfac_is_fitted_and_solves_in_the_memory_that_is_reserved(sides: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Linear(*sides))
    data = torch.randn(20, sides[0]), torch.randint(10, (20,))
    influence = EkfacInfluence(model, True, 1.0, fisher="empirical")
    demand, reducer = influence.demand(), LocalReducer(influence.risk, data)
    checks = peak_bytes(lambda: setattr(reducer, "checked", influence.check(reducer.drawn)))
    assert checks <= check_bytes(influence.n_parameters, 4) + 3 * PROBE_BYTES
    assert 0.8 * demand.fit_bytes <= peak_bytes(lambda: influence.fit(reducer)) <= 1.1 * demand.fit_bytes
    held = sum(array.numel() * array.element_size() for array in influence.state_arrays().values())
    assert 0.98 * held <= demand.state_bytes <= 1.1 * held  # the layout, some hundred bytes, is not counted
    rhs = torch.randn(64, influence.n_parameters)
    close(1 + peak_bytes(lambda: influence.solve(rhs)) / (4 * rhs.numel()), demand.row_vectors)


@pytest.mark.parametrize("mode", ["hessian", "ggn", "empirical_fisher"])
@pytest.mark.parametrize("width", [60, 800])
def test_checks_take_no_more_than_plans_reserve(mode: str, width: int) -> None:
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
    influence = DirectInfluence(model, nn.CrossEntropyLoss(), 1.0, second_order_mode=mode)
    reducer = LocalReducer(influence.risk, (torch.randn(20, width), torch.arange(20) % 10))
    taken = peak_bytes(lambda: influence.check(reducer.drawn))
    assert taken <= check_bytes(influence.n_parameters, 4) + 3 * PROBE_BYTES


@pytest.mark.parametrize("residual_rows", [None, 40])
def test_datainf_solves_in_the_memory_that_is_reserved(residual_rows: int | None) -> None:
    model = nn.Sequential(nn.Linear(200, 200))
    data = torch.randn(1, 200), torch.randint(10, (1,))  # one sample: plans count its gradients apart
    influence = InverseHarmonicMeanInfluence(model, nn.CrossEntropyLoss(), 1.0, residual_rows=residual_rows).fit(data)
    rhs = torch.randn(40, influence.n_parameters)
    close(1 + peak_bytes(lambda: influence.solve(rhs)) / (4 * rhs.numel()), influence.demand().row_vectors)


@pytest.mark.parametrize("name", METHODS)
def test_the_pages_name_the_same_numbers(name: str) -> None:
    reserved = f"{METHODS[name](nn.Linear(1, 1), nn.MSELoss()).demand().row_vectors:g}"
    page = " ".join((SOLVERS / f"{PAGES[name]}.md").read_text().split())
    assert f"{reserved} blocks of rows" in page
    overview = (SOLVERS / "choose.md").read_text()
    if PAGES[name] != "krylov":  # its memory depends on the passes
        lines = [line for line in overview.splitlines() if f"({PAGES[name]}.md)" in line or "row by row" in line]
        assert any(f"{reserved} blocks of rows" in line or f"{reserved} in full batches" in line for line in lines)
