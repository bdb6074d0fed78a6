"""Every solver × curvature matrix × kind of layer × dtype against dense float64 matrices.

The matrices are made by plain autograd, one sample at a time (tests/reference.py, which shares no code with the
package). An error is the largest of an influence of 6 tests on 23 training samples, relative to the largest influence.
"""

import sys
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from distinfluence import (
    ArnoldiInfluence,
    CgInfluence,
    ChebyshevInfluence,
    DirectInfluence,
    EkfacInfluence,
    InfluenceFunctionModel,
    InverseHarmonicMeanInfluence,
    KrylovInfluence,
    LissaInfluence,
    NystroemSketchInfluence,
)
from distinfluence.errors import DistinfluenceError
from tests.benchmarks.truth.cases import NAMES, batches, case_of, damping, reference
from tests.influence.test_ekfac import bases, eigenvectors, in_row_order
from tests.reference import Reference
from tests.zoo import Case

MODES = ("hessian", "ggn", "empirical_fisher")
NONE = "–"  # a cell that there cannot be
ALL = 10_000  # more than there are parameters

Make = Callable[[Case, float, str], InfluenceFunctionModel]
SOLVERS: Mapping[str, Make] = {
    "direct": lambda c, d, m: DirectInfluence(c.model, c.loss, d, second_order_mode=m),
    "arnoldi": lambda c, d, m: ArnoldiInfluence(
        c.model, c.loss, d, rank_estimate=ALL, complement=True, second_order_mode=m
    ),
    "nyström": lambda c, d, m: NystroemSketchInfluence(c.model, c.loss, ALL, d, second_order_mode=m),
    "cg": lambda c, d, m: CgInfluence(c.model, c.loss, d, rtol=_rtol(c), atol=0.0, second_order_mode=m),
    "row cg": lambda c, d, m: CgInfluence(
        c.model, c.loss, d, rtol=_rtol(c), atol=0.0, use_block_cg=False, second_order_mode=m
    ),
    "krylov": lambda c, d, m: KrylovInfluence(c.model, c.loss, d, rtol=_rtol(c), second_order_mode=m),
    "chebyshev": lambda c, d, m: ChebyshevInfluence(c.model, c.loss, d, rtol=_rtol(c), second_order_mode=m),
    "lissa": lambda c, d, m: LissaInfluence(
        c.model, c.loss, d, scale=None, full_batch=True, rtol=1e-4 if _single(c) else 1e-6, second_order_mode=m
    ),
}
OWN: Mapping[str, Callable[[Case, float], InfluenceFunctionModel]] = {
    "kfac": lambda c, d: EkfacInfluence(c.model, False, d, loss=c.loss),
    "ekfac": lambda c, d: EkfacInfluence(c.model, True, d, loss=c.loss, fisher="exact"),
    "ekfac, empirical": lambda c, d: EkfacInfluence(c.model, True, d, loss=c.loss, fisher="empirical"),
    "datainf": lambda c, d: InverseHarmonicMeanInfluence(c.model, c.loss, d),
}
# Factorisations err by rounding times the condition number, which is at most about 60 here; iterations by that times
# their tolerance, 1e-10 (1e-4 in float32; LiSSA 1e-6, and 1e-4 in float32 as well).
FACTORED, ITERATED = ("direct", "arnoldi", "nyström", *OWN), ("cg", "row cg", "krylov", "chebyshev")
TOLERANCES: Mapping[str, Mapping[str, float]] = {
    "float64": {**dict.fromkeys(FACTORED, 1e-8), **dict.fromkeys(ITERATED, 1e-6), "lissa": 1e-4},
    "float32": {**dict.fromkeys(FACTORED, 1e-3), **dict.fromkeys(ITERATED, 1e-2), "lissa": 1e-2},
}


def _single(case: Case) -> bool:
    return next(case.model.parameters()).dtype is torch.float32


def _rtol(case: Case) -> float:
    return 1e-4 if _single(case) else 1e-10


def relative(found: Tensor, exact: Tensor) -> float:
    """Largest error, relative to the largest number."""
    return float((found.double() - exact).abs().max() / exact.abs().max())


def error_of(solver: str, mode: str, name: str, dtype: str) -> float | None:
    """Of the influences; None for a Nyström sketch of a Hessian, which clips what is negative of it."""
    if solver == "nyström" and mode == "hessian":
        return None
    case, at = case_of(name, dtype), damping(name, mode)
    found = SOLVERS[solver](case, at, mode).fit(batches(case)).influences(*case.test, *case.train)
    return relative(found, reference(name).influences(mode, at))


def perturbation_error_of(solver: str, mode: str, name: str, dtype: str) -> float | None:
    """Of the derivatives of the influences by the training inputs; None for inputs that have none, token ids."""
    case, at = case_of(name, dtype), damping(name, mode)
    made = SOLVERS[solver](case, at, mode).fit(batches(case))
    if not case.train[0].is_floating_point():
        try:
            made.influences(*case.test, *case.train, mode="perturbation")
        except DistinfluenceError:
            return None
        raise AssertionError(f"{name}: derivatives by whole numbers were given")
    found = made.influences(*case.test, *case.train, mode="perturbation")
    return relative(found, _perturbation(name, mode))


_MADE: dict[tuple[str, str], Tensor] = {}


def _perturbation(name: str, mode: str) -> Tensor:
    if (name, mode) not in _MADE:
        _MADE[name, mode] = reference(name).perturbation(mode, damping(name, mode))
    return _MADE[name, mode]


def own_error_of(method: str, name: str, dtype: str) -> float | None:
    """Of a method that stands for a matrix of its own, against that matrix made densely.

    EKFAC's is Q Λ Qᵀ with Λ the diagonal of the exact Gauss–Newton matrix, or of the empirical Fisher matrix, in the
    eigenvectors that it found; KFAC's has its own eigenvalues; DataInf's inverse is the mean of the samples' inverses,
    each made densely. None for EKFAC of a loss that has no predictive distribution to take the expectation over.
    """
    case, exact = case_of(name, dtype), reference(name)
    if method == "ekfac" and isinstance(case.loss, torch.nn.SmoothL1Loss):
        return None
    at = damping(name, "empirical_fisher" if method in ("datainf", "ekfac, empirical") else "ggn")
    made = OWN[method](case, at).fit(batches(case))
    found = made.influences(*case.test, *case.train)
    test, train = (exact.gradients(data) for data in (exact.case.test, exact.case.train))
    if method == "datainf":
        eye = at * torch.eye(train.shape[1], dtype=torch.float64)
        inverse = torch.stack([torch.linalg.inv(torch.outer(g, g) + eye) for g in train]).mean(dim=0)
        return relative(found, test @ inverse @ train.T)
    assert isinstance(made, EkfacInfluence)
    dense = kronecker(made, method, exact) + at * torch.eye(test.shape[1], dtype=torch.float64)
    test, train = (in_row_order(made, rows, exact) for rows in (test, train))
    return relative(found, torch.linalg.solve(dense, test.T).T @ train.T)


def kronecker(made: EkfacInfluence, method: str, exact: Reference) -> Tensor:
    """The matrix of (E)KFAC made densely, [p, p] in the order of the influence model's rows; see `own_error_of`."""
    matrix = in_row_order(made, exact.matrix("ggn" if method == "ekfac" else "empirical_fisher"), exact)
    dense = torch.zeros_like(matrix)
    for basis in bases(made):
        q = eigenvectors(made, basis).double()
        values = basis.values.flatten().double() if method == "kfac" else (q * (matrix @ q)).sum(dim=0)
        dense += q * values @ q.T
    return dense


def table(title: str, tolerances: Mapping[str, float], error: Callable[[str, str], float | None]) -> list[str]:
    """Kinds of layers down, methods across. error: of a method and a kind."""
    lines = [f"**{title}**", "", f"| | {' | '.join(tolerances)} |", "|---" * (len(tolerances) + 1) + "|"]
    for name in NAMES:
        print(f"{title}, {name}", file=sys.stderr, flush=True)
        cells = [error(method, name) for method in tolerances]
        lines.append(f"| {name} | {' | '.join(NONE if cell is None else f'{cell:.1e}' for cell in cells)} |")
    return [*lines, f"| *tolerance* | {' | '.join(f'{most:.0e}' for most in tolerances.values())} |", ""]


def dense() -> list[str]:
    """A table for each dtype and matrix, one for derivatives by inputs, one for matrices of their own."""
    lines = []
    for dtype in TOLERANCES:
        solvers, own = ({m: TOLERANCES[dtype][m] for m in methods} for methods in (SOLVERS, OWN))
        for mode in MODES:
            title = f"{dtype}, {mode.replace('_', ' ')}"
            lines += table(title, solvers, lambda m, n, mode=mode, dtype=dtype: error_of(m, mode, n, dtype))  # type: ignore[misc]
        lines += table(
            f"{dtype}, perturbation mode on the ggn",
            solvers,
            lambda m, n, dtype=dtype: perturbation_error_of(m, "ggn", n, dtype),  # type: ignore[misc]
        )
        lines += table(f"{dtype}, matrices of their own", own, lambda m, n, dtype=dtype: own_error_of(m, n, dtype))  # type: ignore[misc]
    return lines
