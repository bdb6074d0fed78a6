"""Low-rank inverse from the leading eigenvectors of A, found by block Lanczos with thick restarts.

Arnoldi's method for a symmetric matrix is Lanczos'. A ≈ Vᵀ D V with the r eigenvalues of largest modulus, of either
sign, then (A + λI)⁻¹ ≈ Vᵀ(D + λ)⁻¹V: the projection of Schioppa et al., which leaves out all of a right-hand side that
is orthogonal to V; or that and (I − VᵀV)/λ, which takes A for zero there.

Cost: about r/block passes of `block` rows, more where eigenvalues lie close. Memory: the basis, `max_basis`·p numbers,
in the fit, r·p after it. References: Schioppa, Zablotskaia, Vilar and Sokolov (2022), "Scaling up influence functions",
AAAI 36; Wu and Simon (2000), "Thick-restart Lanczos method", SIAM J. Matrix Anal. Appl. 22.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from distinfluence.curvature.base import CurvatureOperator, PlannedWork
from distinfluence.errors import NonFiniteError, SettingError
from distinfluence.solvers.base import (
    Outcome,
    Solution,
    Solver,
    SolverState,
    check_count,
    check_damping,
    check_rhs,
    check_tolerance,
    row_norms,
)
from distinfluence.solvers.demand import GROWING, USUAL_STEPS, Demand, SolveWork, Systems, search_work
from distinfluence.solvers.lanczos import BlockLanczos
from distinfluence.solvers.residuals import (
    MOST_MEASURED,
    approximation,
    check_residual_rows,
    rows_to_measure,
)
from distinfluence.solvers.spectrum import random_rows

BLOCK = 16  # rows of a pass, unless the rank asks for more
BASIS_BYTES = 2 * 2**30  # of the basis where `max_basis` is None
MOST_BLOCKS = 40  # of the basis where `max_basis` is None: a longer one costs more in r × r work than it saves
MOST_PASSES = 100  # beyond those that the rank needs, where `maxiter` is None


@dataclass(frozen=True)
class Eigenpairs(SolverState):
    """The leading eigenpairs of A. vectors: V [r, p], orthonormal rows. values: D [r] float64, by falling modulus.

    residuals: ‖A v − D v‖ [r] float64. n_missed: how many have not converged. damping: λ, for what is said about
    A + λI; the pairs do not depend on it.
    """

    vectors: Tensor
    values: Tensor
    residuals: Tensor
    n_missed: int
    damping: float

    def noise(self, damping: float) -> float:
        """Eigenvalues of A + λI within ± this are zero to the rounding of the products: 10·√p·eps·‖A + λI‖."""
        eps = float(torch.finfo(self.vectors.dtype).eps)
        norm = float((self.values + damping).abs().max())
        return 10 * eps * math.sqrt(self.operator.size) * norm

    @property
    def positive_definite(self) -> bool | None:
        """False where an eigenvalue is negative; True where all are known to be positive; else None."""
        least = float(self.values.min()) + self.damping
        if len(self.values) == self.operator.size:
            return least > self.noise(self.damping)
        if self.operator.positive_semidefinite:
            return True if self.damping > 0 else None
        return False if least < 0 else None

    @property
    def smallest_eigenvalue(self) -> float | None:
        """Known where it is negative and among those of largest modulus, and at full rank."""
        least = float(self.values.min())
        return least if least < 0 or len(self.values) == self.operator.size else None

    @property
    def remarks(self) -> tuple[str, ...]:
        """Eigenvectors that have not converged, and eigenvalues that are negative; whatever the damping."""
        said, rank = [], len(self.values)
        if self.n_missed:
            said.append(
                f"{self.n_missed} of {rank} eigenvectors have not converged: residuals up to "
                f"{float(self.residuals.max() / self.values.abs().max()):.1e} of ‖A‖. Allow more passes by `maxiter`, "
                "a larger `tol`, or a larger `max_basis`."
            )
        negative = int((self.values < -self.noise(0.0)).sum())
        if negative:
            least = float(self.values.min())
            said.append(
                f"A is indefinite: {negative} of the {rank} eigenvalues found are negative, the least is {least:.3g}. "
                f'Use second_order_mode="ggn", or a damping above {-least:.3g}.'
            )
        return tuple(said)

    @property
    def details(self) -> Mapping[str, Tensor]:
        """The eigenvalues, and the residuals of their vectors."""
        return {"eigenvalues": self.values.cpu(), "residuals": self.residuals.cpu()}


@dataclass(frozen=True)
class Arnoldi(Solver[Eigenpairs]):
    """Solves in the span of the leading eigenvectors.

    Args:
        damping: λ ≥ 0.
        rank_estimate: r, the number of eigenpairs of largest modulus; at most p.
        tol: The residual ‖A v − θ v‖, relative to the largest |θ|, up to which a pair counts as converged.
        complement: Whether (I − VᵀV)/λ is added, for which λ > 0 is needed; otherwise what lies outside of V is lost.
        indefinite: "keep" or "drop" the directions where D + λ is negative.
        block_size: The rows of a pass; if None 16, r/8 if that is more, r if that is less. Of eigenvalues that are
            repeated more often than that, some may be missed.
        max_basis: The rows of the basis before a thick restart; if None 40 blocks as far as they fit into 2 GiB, with
            room for r in any case.
        maxiter: The largest number of passes of the fit; 100 more than r needs if None.
        seed: The seed of the start vectors.
        rtol: The relative residual of a row, of A + λI, up to which it counts as converged.
        residual_rows: For how many right-hand sides of each solve the residual is measured, in one pass; if None 8,
            or a tenth of the rows that a fit usually multiplies if that is less.

    Raises:
        SettingError: If a hyperparameter is out of range.

    >>> import torch
    >>> from distinfluence.curvature import MatrixOperator
    >>> solver = Arnoldi(damping=1.0, rank_estimate=1)
    >>> state = solver.fit(MatrixOperator(torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))))
    >>> rhs = torch.tensor([[2.0, 4.0]], dtype=torch.float64)
    >>> solver.solve(state, rhs).x.abs().round(decimals=6)
    tensor([[0., 1.]], dtype=torch.float64)
    >>> Arnoldi(damping=1.0, rank_estimate=1, complement=True).solve(state, rhs).x.round(decimals=6)
    tensor([[2., 1.]], dtype=torch.float64)
    """

    damping: float
    rank_estimate: int = 10
    tol: float = 1e-6
    complement: bool = False
    indefinite: Literal["keep", "drop"] = "keep"
    block_size: int | None = None
    max_basis: int | None = None
    maxiter: int | None = None
    seed: int = 0
    rtol: float = 1e-6
    residual_rows: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damping(self.damping)
        check_count("rank_estimate", self.rank_estimate)
        check_tolerance("tol", self.tol)
        check_tolerance("rtol", self.rtol)
        check_residual_rows(self.residual_rows)
        check_count("seed", self.seed, least=0)
        if self.complement and self.damping == 0:
            raise SettingError(
                "`complement` needs a `damping` above 0, got 0: what lies outside of V is divided by it."
            )
        if self.indefinite not in ("keep", "drop"):
            raise SettingError(f'`indefinite` must be "keep" or "drop", got {self.indefinite!r}.')
        if self.block_size is not None:
            check_count("block_size", self.block_size)
        if self.maxiter is not None:
            check_count("maxiter", self.maxiter)
        if self.max_basis is not None:
            check_count("max_basis", self.max_basis, least=self.rank_estimate + 2 * self.block(self.rank_estimate))

    def block(self, rank: int) -> int:
        """Return the rows of a pass for so many eigenpairs.

        Args:
            rank: The number of eigenpairs.

        Returns:
            The number of rows.
        """
        # 16 rows find 200 pairs in 25 passes, 32 in 14 with 12 % more products: wider for more pairs
        return self.block_size or min(max(BLOCK, rank // 8), rank)

    def most_basis(self, size: int, itemsize: int) -> int:
        """Return how many rows the basis may have before a thick restart.

        Args:
            size: The numbers of a vector, p.
            itemsize: The bytes of a number.

        Returns:
            The number of rows.
        """
        rank = min(self.rank_estimate, size)
        block = min(self.block(rank), size)
        fitting = BASIS_BYTES // (size * itemsize)
        return self.max_basis or max(min(MOST_BLOCKS * block, fitting), 2 * rank, rank + 4 * block)

    @property
    @override
    def solves_over_data(self) -> bool:
        return self._measured > 0  # only for residuals

    @property
    def _measured(self) -> int:
        return rows_to_measure(self.residual_rows, USUAL_STEPS * self.block(self.rank_estimate))

    @override
    def demand(self, systems: Systems) -> Demand:
        # the eigenvectors, and the basis that they are found in, as large as it may grow
        state = self.rank_estimate * systems.vector_bytes
        basis = self.most_basis(sum(systems.sizes), systems.itemsize) * systems.vector_bytes
        measured = 5.0 if self._measured > MOST_MEASURED else 4.0  # residuals of all rows take as much as the rows
        rows, block = measured + self.complement, self.block(self.rank_estimate)
        fit = sum((search_work(size, block) for size in systems.sizes), PlannedWork())
        row_flops = (8.0 if self.complement else 4.0) * self.rank_estimate * sum(systems.sizes)
        solve = SolveWork(0, self._measured, self.residual_rows is None, row_flops=row_flops)
        return Demand(GROWING * basis + state, state, rows, 0, fit, solve, False, block)

    @override
    def fit(self, operator: CurvatureOperator) -> Eigenpairs:
        # The leading eigenpairs, until they have converged, the whole space is searched, or `maxiter` passes spent.
        search = _Search(self, operator)
        while search.goes_on():
            search.step()
        values, vectors, residuals = search.pairs()
        n_missed = int((residuals > self.tol * values.abs().max()).sum())
        return Eigenpairs(operator, vectors, values, residuals, n_missed, self.damping)

    @override
    def adapt(self, state: Eigenpairs) -> Eigenpairs:
        return replace(state, damping=self.damping)

    def inverse_values(self, state: Eigenpairs) -> Tensor:
        """Return 1/(D + λ); 0 where D + λ is zero to rounding, and where it is negative and to be dropped.

        Args:
            state: The eigenpairs.

        Returns:
            The values, [r] float64.
        """
        values = state.values + self.damping
        left_out = values.abs() <= state.noise(self.damping)
        if self.indefinite == "drop":
            left_out |= values < 0
        return torch.where(left_out, 0.0, 1 / torch.where(left_out, 1.0, values))

    @override
    def solve(self, state: Eigenpairs, rhs: Tensor) -> Solution:
        # Two products with V, four with the complement, and one pass for the true residual.
        check_rhs(rhs, state.operator)
        vectors = state.vectors
        inside = rhs @ vectors.T
        x = (inside * self.inverse_values(state).to(rhs.dtype)) @ vectors
        remarks = self._negative(state)
        if self.complement:
            outside = rhs - inside @ vectors
            outside -= (outside @ vectors.T) @ vectors  # what rounding leaves inside would be divided by λ alone
            x += outside / self.damping
        else:
            remarks += _lost(inside, rhs, state)
        values = state.values + self.damping
        curvature, largest = float(values.min()), float(values.abs().max())
        solution = approximation(
            state.operator,
            self.damping,
            rhs,
            x,
            self.rtol,
            curvature=curvature,
            remarks=remarks,
            residual_rows=self._measured,
        )
        solution = replace(solution, largest=largest)
        return self._singular(solution, row_norms(inside[:, values.abs() <= state.noise(self.damping)]), row_norms(rhs))

    def _negative(self, state: Eigenpairs) -> tuple[str, ...]:
        negative = int((state.values + self.damping < -state.noise(self.damping)).sum())
        if not negative:
            return ()
        done = "kept" if self.indefinite == "keep" else "dropped"
        return (f"A + λI has {negative} negative eigenvalues at λ = {self.damping:g}: their directions were {done}.",)

    def _singular(self, solution: Solution, flat: Tensor, norms: Tensor) -> Solution:
        """Rows [k] that have a part in flat directions, of which `flat` [k] are the norms, are said to be singular."""
        parts = (flat > self.rtol * norms).tolist()
        outcome = (
            Outcome.SINGULAR if part and one is Outcome.APPROXIMATE else one
            for one, part in zip(solution.outcome, parts, strict=True)
        )
        return replace(solution, outcome=tuple(outcome))

    @override
    def state_arrays(self, state: Eigenpairs) -> dict[str, Tensor]:
        missed = torch.tensor([state.n_missed])
        return {"vectors": state.vectors, "values": state.values, "residuals": state.residuals, "n_missed": missed}

    @override
    def restore(self, operator: CurvatureOperator, arrays: Mapping[str, Tensor]) -> Eigenpairs:
        vectors, values, residuals = arrays["vectors"], arrays["values"], arrays["residuals"]
        return Eigenpairs(operator, vectors, values, residuals, int(arrays["n_missed"]), self.damping)


def _lost(inside: Tensor, rhs: Tensor, state: Eigenpairs) -> tuple[str, ...]:
    """Say what share of the rows' norm the projection drops, unless that is rounding."""
    norms = row_norms(rhs)
    inside_norms = row_norms(inside)[norms > 0]
    norms = norms[norms > 0]
    share = (1 - (inside_norms / norms) ** 2).clamp_min(0.0).sqrt()
    if not len(share) or float(share.max()) <= 10 * (rhs.shape[1] * torch.finfo(rhs.dtype).eps) ** 0.5:
        return ()
    return (
        f"The projection on {len(state.values)} eigenvectors leaves out {float(share.min()):.0%} to "
        f"{float(share.max()):.0%} of the norm of the rows. `complement=True` keeps it, divided by λ.",
    )


class _Search:
    """The growing basis of a fit, and when to stop, restart or start afresh."""

    def __init__(self, solver: Arnoldi, operator: CurvatureOperator) -> None:
        self._operator = operator
        self._rank = min(solver.rank_estimate, operator.size)
        self._block = min(solver.block(self._rank), operator.size)
        self._tol = solver.tol
        self._seed = solver.seed
        self._most = solver.most_basis(operator.size, operator.dtype.itemsize)
        self._maxiter = solver.maxiter or MOST_PASSES + math.ceil(self._rank / self._block)
        self._passes = 0
        self._invariant: Tensor | None = None  # the values that were wanted when the space was invariant last
        start = random_rows(operator, self._block, self._seed)
        self._lanczos = BlockLanczos(operator, start, self._most)

    def goes_on(self) -> bool:
        """Whether there is a block to go on with and something to find. Starts afresh in an invariant space."""
        lanczos = self._lanczos
        if lanczos.size == self._operator.size or self._passes >= self._maxiter:
            return False
        if lanczos.size == 0 or lanczos.outflow > self._tol * lanczos.largest:
            return self._invariant is not None or lanczos.size < self._rank or not self._converged()
        # in an invariant space all residuals are small, while copies of its eigenvalues may lie outside
        values = self._wanted()[0]
        before, self._invariant = self._invariant, values
        if before is not None and len(before) == len(values) == self._rank:
            change = (values.abs() - before.abs()).abs().max()
            if float(change) <= self._tol * float(values.abs().max()):
                return False
        lanczos.widen(random_rows(self._operator, self._block, self._seed + self._passes))
        return not lanczos.exhausted

    def step(self) -> None:
        """One pass; before it, a thick restart where the basis would not hold another block."""
        lanczos = self._lanczos
        if lanczos.size + lanczos.next.shape[0] > self._most:
            # half of the other vectors speeds the wanted ones up; with room for one block alone it would stand still
            half = self._rank + max(0, self._most - self._rank - self._block) // 2
            kept = max(self._rank, min(half, self._most - 2 * self._block))
            lanczos.restart(self._wanted(kept)[1])
        lanczos.step()
        self._passes += 1
        if not lanczos.projected.isfinite().all():
            raise NonFiniteError(
                "`operator` must be finite, got NaN or infinity in its products. Look at the loss and its derivatives."
            )

    def _wanted(self, n: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the n Ritz values of largest modulus, `rank` if None, their coordinates [m, n] and residuals [n]."""
        values, coordinates, residuals = self._lanczos.ritz()
        order = values.abs().argsort(descending=True)[: self._rank if n is None else n]
        return values[order], coordinates[:, order], residuals[order]

    def _converged(self) -> bool:
        values, _, residuals = self._wanted()
        return bool(residuals.max() <= self._tol * values.abs().max())

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values [r], vectors [r, p] and residuals [r]."""
        values, coordinates, residuals = self._wanted()
        basis = self._lanczos.basis
        return values, coordinates.T.to(basis.dtype) @ basis, residuals
