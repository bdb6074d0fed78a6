"""Randomised Nyström sketch: A ≈ U Λ Uᵀ of low rank, from one pass over the data.

Y = ΩA for r random orthonormal rows Ω, then Â = Yᵀ (Ω Yᵀ)⁻¹ Y. Of a positive semi-definite A this is the best that Y
allows: Â ⪯ A, and what it misses is a few times what the best approximation of rank r would. An indefinite A has no
Nyström approximation: the core Ω Yᵀ is then inverted near zero, and what comes out is larger than A without bound. So
what is not known to be semi-definite costs a second pass, which replaces the values by Rayleigh quotients; the positive
ones stay, the others are clipped and reported.

Cost: 1 or 2 passes with r rows. Memory: about 4·r·p numbers in the fit, r·p after it. Reference: Frangella, Tropp and
Udell (2023), "Randomized Nyström preconditioning", SIAM J. Matrix Anal. Appl. 44, Algorithms 2.1 and E.2.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from distinfluence.curvature.base import CurvatureOperator, PlannedWork
from distinfluence.errors import NonFiniteError
from distinfluence.solvers.base import (
    Outcome,
    Solution,
    Solver,
    SolverState,
    check_count,
    check_damping,
    check_rhs,
    check_tolerance,
)
from distinfluence.solvers.block_cg import orthonormal_rows
from distinfluence.solvers.demand import SKETCHING, Demand, SolveWork, Systems
from distinfluence.solvers.residuals import (
    approximation,
    check_residual_rows,
    rows_to_measure,
)
from distinfluence.solvers.spectrum import random_rows

COLUMNS = 2**18  # of Ω and Y that are widened to float64 at once
ESTIMATE_PASSES = 5  # of an estimate of ‖A − Â‖, where nobody says better
PROBES = 4  # rows of the power iteration for ‖A − Â‖: more than one, as one may miss the direction

ON_ITS_RANGE = "Without damping, the sketch is inverted on its own range, and what lies outside is lost."


@dataclass(frozen=True)
class Sketch:
    """Ω and its products: what a larger rank can use again. omega: [r, p] orthonormal rows; product: ΩA [r, p]."""

    omega: Tensor
    product: Tensor
    seed: int


@dataclass(frozen=True)
class LowRank:
    """Â = Uᵀ Λ U, positive semi-definite. basis: U [r, p], orthonormal rows. values: Λ [r] float64, descending, ≥ 0.

    shift: ν that was added to A for the factorisation and taken off the values again. clipped: the most negative
    Rayleigh quotient, which Â cannot represent; 0 if there is none.
    """

    basis: Tensor
    values: Tensor
    shift: float
    clipped: float

    def matmat(self, rows: Tensor) -> Tensor:
        """rows [k, p] · Â; no pass."""
        return (rows @ self.basis.T * self.values.to(rows.dtype)) @ self.basis


def nystroem(operator: CurvatureOperator, rank: int, *, seed: int = 0) -> LowRank:
    """Compute the Nyström approximation of A of this rank, or of p if that is less; at rank p, A itself up to rounding.

    The sketch costs one pass of `rank` rows where the operator is known to be positive semi-definite, else two.

    Args:
        operator: The matrix A.
        rank: The rank, at least 1.
        seed: The seed of the sketch, which is the same for the same operator on every device.

    Returns:
        The approximation.

    Raises:
        SettingError: If `rank` is below 1.
        NonFiniteError: If the products have NaN or infinity.
    """
    return low_rank(operator, sketched(operator, rank, seed=seed))


def sketched(operator: CurvatureOperator, rank: int, *, seed: int = 0) -> Sketch:
    """Ω and ΩA; one pass of min(rank, p) rows."""
    check_count("rank", rank)
    nothing = torch.zeros(0, operator.size, dtype=operator.dtype, device=operator.device)
    return extend(operator, Sketch(nothing, nothing, seed), rank)


def extend(operator: CurvatureOperator, sketch: Sketch, rank: int) -> Sketch:
    """Extend the sketch to `rank` rows in all, or p; one pass of the new rows alone. The old rows stay as they are."""
    old = sketch.omega.shape[0]
    n_new = min(rank, operator.size) - old
    if n_new <= 0:
        return sketch
    rows = random_rows(operator, n_new, sketch.seed + old)
    for _ in range(2):  # twice is enough (Kahan and Parlett)
        rows = rows - (rows @ sketch.omega.T) @ sketch.omega
        rows = torch.linalg.qr(rows.T).Q.T.contiguous()
    product = operator.matmat(rows)
    if not product.isfinite().all():
        raise NonFiniteError(
            "`operator` must be finite, got NaN or infinity in its products. Look at the loss and its derivatives."
        )
    return Sketch(torch.cat([sketch.omega, rows]), torch.cat([sketch.product, product]), sketch.seed)


def low_rank(operator: CurvatureOperator, sketch: Sketch) -> LowRank:
    """Â from its sketch: no pass where A is known to be positive semi-definite, else one."""
    found = _whitened(sketch)
    if operator.positive_semidefinite:
        return found
    product = operator.matmat(found.basis)
    quotients = _gram(product, found.basis)
    values, vectors = torch.linalg.eigh((quotients + quotients.T) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    basis = vectors.T.to(found.basis.dtype) @ found.basis
    clipped = float(values[-1]) if float(values[-1]) < -_noise(found.shift, values) else 0.0
    return LowRank(basis, _cut(values, found.shift), found.shift, clipped)


def _whitened(sketch: Sketch) -> LowRank:
    """Algorithm 2.1 with the tall factorisation by QR in the operator's dtype, and all that is r × r in float64."""
    omega, product = sketch.omega, sketch.product
    norm = float(torch.linalg.eigvalsh(_gram(product, product))[-1].clamp_min(0.0)) ** 0.5
    shift = omega.shape[1] ** 0.5 * float(torch.finfo(omega.dtype).eps) * norm
    shifted = torch.add(product, omega, alpha=shift)
    q, r = torch.linalg.qr(shifted.T)
    core = _gram(omega, shifted)
    b = _half_inverse((core + core.T) / 2, shift) @ r.double().T
    _, sigma, vectors = torch.linalg.svd(b, full_matrices=False)
    basis = (q @ vectors.T.to(q.dtype)).T.contiguous()
    return LowRank(basis, _cut(sigma**2 - shift, shift), shift, 0.0)


def _half_inverse(core: Tensor, shift: float) -> Tensor:
    """H [r, r] with Hᵀ H the inverse of the core; of its positive part where it has another one."""
    factor, failed = torch.linalg.cholesky_ex(core)
    eye = torch.eye(core.shape[0], dtype=core.dtype, device=core.device)
    if not int(failed) and float(factor.diagonal().min()) > 0:
        inverse: Tensor = torch.linalg.solve_triangular(factor, eye, upper=False)
        return inverse
    # the shift is in the core already: adding it again, or another one, would be subtracted too little afterwards
    values, vectors = torch.linalg.eigh(core)
    sound = values > max(shift / 2, core.shape[0] * torch.finfo(core.dtype).eps * float(values.abs().max()))
    half: Tensor = torch.where(sound, 1 / torch.where(sound, values, 1.0).sqrt(), 0.0)[:, None] * vectors.T
    return half


def _cut(values: Tensor, shift: float) -> Tensor:
    """Values [r] without what is negative, or rounding: the shift is as large as the error of the products."""
    kept: Tensor = torch.where(values > _noise(shift, values), values, 0.0)
    return kept


def _noise(shift: float, values: Tensor) -> float:
    return max(shift, values.shape[0] * torch.finfo(values.dtype).eps * float(values.abs().amax()))


def _gram(a: Tensor, b: Tensor) -> Tensor:
    """Compute a bᵀ [r, s] in float64, for rows a [r, p], b [s, p]."""
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float64, device=a.device)
    for left, right in zip(a.split(COLUMNS, dim=1), b.split(COLUMNS, dim=1), strict=True):
        total += left.double() @ right.double().T
    return total


def approximation_error(
    operator: CurvatureOperator, found: LowRank, *, passes: int = ESTIMATE_PASSES, seed: int = 1
) -> float:
    """Estimate ‖A − Â‖ by power iterations with a block of PROBES rows, from below; a pass for each (Algorithm E.2)."""
    rows = orthonormal_rows(random_rows(operator, min(PROBES, operator.size), seed))
    error = 0.0
    for _ in range(passes):
        rest = operator.matmat(rows) - found.matmat(rows)
        error = max(error, float(torch.linalg.eigvalsh(_gram(rest, rest))[-1].clamp_min(0.0)) ** 0.5)
        rows = orthonormal_rows(rest)
        if not rows.shape[0]:
            break
    return error


@dataclass(frozen=True)
class NystroemState(SolverState):
    """Â of one operator. damping: λ, for what is said about A + λI; Â does not depend on it.

    error: an estimate of ‖A − Â‖ from below, NaN if it was not asked for.
    """

    found: LowRank
    damping: float
    error: float

    @property
    def positive_definite(self) -> bool | None:
        """Certain where A is semi-definite by what it is, or where a negative Rayleigh quotient was met."""
        if self.operator.positive_semidefinite:
            return True if self.damping > 0 else None
        return False if self.found.clipped + self.damping < 0 else None

    @property
    def remarks(self) -> tuple[str, ...]:
        """What Â lacks, whatever the damping."""
        found, said = self.found, []
        if found.clipped:
            said.append(
                f"A is indefinite: a sketch holds no negative eigenvalues, and one of {found.clipped:.3g} or below was "
                f'clipped (the largest is {float(found.values[0]):.3g}). Use second_order_mode="ggn".'
            )
        if self.error == self.error:
            said.append(f"The sketch is about {self.error:.3g} off the matrix, in the spectral norm.")
        return tuple(said)

    @property
    def details(self) -> Mapping[str, Tensor]:
        """The eigenvalues of Â, and the estimate of ‖A − Â‖ if there is one."""
        values = {"eigenvalues": self.found.values.cpu()}
        estimated = {"error": torch.tensor(self.error, dtype=torch.float64)} if self.error == self.error else {}
        return values | estimated


@dataclass(frozen=True)
class NystroemSketch(Solver[NystroemState]):
    """Sketch and solve: x = Uᵀ(Λ + λ)⁻¹U b + (b − UᵀU b)/λ, the inverse of Â + λI, for rows U.

    Args:
        damping: λ ≥ 0; at 0 the pseudo-inverse of Â.
        rank: The rows of the sketch; at most p are used.
        seed: The seed of Ω.
        rtol: The relative residual of a row, of A + λI and not of its sketch, up to which it counts as converged.
        estimate_error: The passes of 4 rows to spend on an estimate of ‖A − Â‖ for the fit report; 5 usually give two
            digits.
        residual_rows: For how many right-hand sides of each solve the residual is measured, in one pass; if None 8,
            or a tenth of the rank if that is less.

    Raises:
        SettingError: If a hyperparameter is out of range.

    References:
        Frangella, Tropp and Udell (2023), section 2, and section 5.1 for the inverse.

    >>> import torch
    >>> from distinfluence.curvature import MatrixOperator
    >>> solver = NystroemSketch(damping=1.0, rank=2)
    >>> state = solver.fit(MatrixOperator(torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))))
    >>> solver.solve(state, torch.tensor([[2.0, 4.0]], dtype=torch.float64)).x
    tensor([[1., 1.]], dtype=torch.float64)
    """

    damping: float
    rank: int = 10
    seed: int = 0
    rtol: float = 1e-6
    estimate_error: int = 0
    residual_rows: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damping(self.damping)
        check_count("rank", self.rank)
        check_count("seed", self.seed, least=0)
        check_tolerance("rtol", self.rtol)
        check_count("estimate_error", self.estimate_error, least=0)
        check_residual_rows(self.residual_rows)

    @property
    @override
    def solves_over_data(self) -> bool:
        return self._measured > 0  # only for residuals

    @property
    def _measured(self) -> int:
        return rows_to_measure(self.residual_rows, self.rank)

    @override
    def demand(self, systems: Systems) -> Demand:
        # the sketch, its image and their orthonormal basis; passes for the sketch, one for the residual
        state = self.rank * systems.vector_bytes
        fit = PlannedWork()
        for block in systems.blocks:
            looks, rank = 1 if block.positive_semidefinite else 2, min(self.rank, block.size)
            probes = self.estimate_error * min(PROBES, block.size)
            flops = 16.0 * rank**2 * block.size
            fit += PlannedWork(looks + self.estimate_error, looks * rank + probes, flops=flops)
        row_flops = 4.0 * self.rank * sum(systems.sizes)
        solve = SolveWork(0, self._measured, self.residual_rows is None, row_flops=row_flops)
        return Demand(SKETCHING * state, state, 5.0, 0, fit, solve, True, self.rank)

    @override
    def fit(self, operator: CurvatureOperator) -> NystroemState:
        # One pass of `rank` rows, a second one where A is not known to be semi-definite, and those of the estimate.
        found = nystroem(operator, self.rank, seed=self.seed)
        passes, seed = self.estimate_error, self.seed + 1
        error = approximation_error(operator, found, passes=passes, seed=seed) if passes else float("nan")
        return NystroemState(operator, found, self.damping, error)

    @override
    def adapt(self, state: NystroemState) -> NystroemState:
        return replace(state, damping=self.damping)

    @override
    def solve(self, state: NystroemState, rhs: Tensor) -> Solution:
        # Two products with U, or four, and one pass for the true residual.
        check_rhs(rhs, state.operator)
        found = state.found
        largest = float(found.values[0]) + self.damping
        x = self._inverse(found, rhs)
        remarks = (ON_ITS_RANGE,) if self.damping == 0 else ()
        solution = approximation(
            state.operator,
            self.damping,
            rhs,
            x,
            self.rtol,
            remarks=remarks,
            residual_rows=self._measured,
        )
        solution = replace(solution, largest=largest)
        # a sketch whose values end above its rank has seen the whole range of A: what is not solved has no solution
        if self.damping == 0 and not state.found.clipped and float(found.values[-1]) == 0:
            known = (~solution.relative_residual.isnan()).tolist()
            outcome = (
                Outcome.SINGULAR if one is Outcome.APPROXIMATE and measured else one
                for one, measured in zip(solution.outcome, known, strict=True)
            )
            return replace(solution, outcome=tuple(outcome))
        return solution

    def _inverse(self, found: LowRank, rhs: Tensor) -> Tensor:
        basis, values = found.basis, found.values
        inside = rhs @ basis.T
        if self.damping == 0:
            inverse = torch.where(values > 0, 1 / torch.where(values > 0, values, 1.0), 0.0)
            return (inside * inverse.to(rhs.dtype)) @ basis
        outside = rhs - inside @ basis
        outside -= (outside @ basis.T) @ basis  # what rounding leaves inside would be divided by λ alone
        return (inside * (1 / (values + self.damping)).to(rhs.dtype)) @ basis + outside / self.damping

    @override
    def state_arrays(self, state: NystroemState) -> dict[str, Tensor]:
        found = state.found
        numbers = torch.tensor([found.shift, found.clipped, state.error], dtype=torch.float64)
        return {"basis": found.basis, "values": found.values, "numbers": numbers}

    @override
    def restore(self, operator: CurvatureOperator, arrays: Mapping[str, Tensor]) -> NystroemState:
        shift, clipped, error = arrays["numbers"].tolist()
        return NystroemState(operator, LowRank(arrays["basis"], arrays["values"], shift, clipped), self.damping, error)
