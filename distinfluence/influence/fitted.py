"""A fit: block by block a curvature operator, the solver with its damping, and what the solver keeps."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from distinfluence.curvature import CurvatureOperator
from distinfluence.influence.bounds import ROUNDING, LowerBound, lower_bound
from distinfluence.influence.report import FitReport, SolveReport, named_by_block
from distinfluence.influence.scores import Scorer
from distinfluence.influence.self_influence import (
    SelfInfluences,
    self_influences_in_eigenbases,
    self_influences_of,
)
from distinfluence.influence.settings import check_exact
from distinfluence.model.batch import Batch
from distinfluence.model.reducer import ChunkReducer
from distinfluence.model.sample_risk import SampleRisk
from distinfluence.solvers.base import Solution, Solver, SolverState, row_norms
from distinfluence.solvers.ekfac import ExactSystem
from distinfluence.solvers.spectrum import Extremes, extreme_eigenvalues

Rows = Mapping[str, Tensor]  # block → [k, p_block]
ALL = "all"  # the name of a system over all blocks


@dataclass(frozen=True)
class Curvature:
    """What a fit makes of the training data before it solves.

    operators: block → A. scorer: for scores and gradients from now on. remarks, treatments: for the fit report.
    exact: the system over all blocks, where the operators only approximate it. arrays: what the curvature is made
    of again elsewhere, beside the data. direct: influences [n_test, n_train] of placed samples by a fit, without
    factors; None where factors are less work.
    """

    operators: Mapping[str, CurvatureOperator]
    scorer: Scorer
    remarks: tuple[str, ...] = ()
    treatments: Mapping[str, str] = field(default_factory=dict)
    exact: ExactSystem | None = None
    arrays: Mapping[str, Tensor] = field(default_factory=dict)
    direct: "Callable[[Fitted, Batch, Batch], Tensor] | None" = None


@dataclass(frozen=True)
class Fitted:
    """The fitted part of an influence model."""

    reducer: ChunkReducer
    curvature: Curvature
    solvers: Mapping[str, Solver[Any]]
    states: Mapping[str, Any]
    report: FitReport

    @classmethod
    def of(
        cls,
        risk: SampleRisk,
        reducer: ChunkReducer,
        mode: str,
        curvature: Curvature,
        solvers: Mapping[str, Solver[Any]],
        begun: tuple[float, int],
    ) -> Self:
        """Fit every block. begun: `time.perf_counter()` and the reducer's passes before anything was done."""
        states = {block: solvers[block].fit(operator) for block, operator in curvature.operators.items()}
        blocks = risk.blocks
        report = FitReport(
            second_order_mode=mode,
            n_samples=reducer.n_samples,
            n_parameters=blocks.size,
            n_total=blocks.n_total,
            uncovered=blocks.uncovered,
            blocks={block: columns.stop - columns.start for block, columns in blocks.columns.items()},
            damping={block: solver.damping for block, solver in solvers.items()},
            positive_definite={block: state.positive_definite for block, state in states.items()},
            passes=reducer.passes - begun[1],
            remarks=(*_remarks(reducer, states), *curvature.remarks),
            seconds=time.perf_counter() - begun[0],
            details=_details(states),
            treatments=curvature.treatments,
        )
        return cls(reducer, curvature, solvers, states, report)

    @property
    def operators(self) -> Mapping[str, CurvatureOperator]:
        """Block → A."""
        return self.curvature.operators

    @property
    def scorer(self) -> Scorer:
        """For scores and gradients."""
        return self.curvature.scorer

    @property
    def damping(self) -> dict[str, float]:
        """Block → λ."""
        return dict(self.report.damping)

    def adapted(self, solvers: Mapping[str, Solver[Any]]) -> Self:
        """Return the same fit for solvers with other dampings."""
        states = {block: solver.adapt(self.states[block]) for block, solver in solvers.items()}
        report = replace(
            self.report,
            damping={block: solver.damping for block, solver in solvers.items()},
            positive_definite={block: state.positive_definite for block, state in states.items()},
            remarks=_remarks(self.reducer, states),
            details=_details(states),
        )
        return replace(self, solvers=solvers, states=states, report=report)

    def unmeasured(self) -> Self:
        """Return the same fit without the residuals that approximate methods measure by default."""
        return replace(self, solvers={block: solver.unmeasured() for block, solver in self.solvers.items()})

    def with_spectrum(self) -> Self:
        """Return the same fit with both ends of every block's spectrum, by Lanczos where they are not known yet."""
        extremes: dict[str, Extremes] = {
            block: self.report.spectrum.get(block) or extreme_eigenvalues(operator)
            for block, operator in self.operators.items()
        }
        definite = {
            block: extremes[block].smallest + self.report.damping[block] > 0 if known is None else known
            for block, known in self.report.positive_definite.items()
        }
        return replace(self, report=replace(self.report, positive_definite=definite, spectrum=extremes))

    def solve(self, rhs: Rows) -> tuple[Tensor, SolveReport]:
        """Factors [k, p] of every row, and how far each got."""
        if self.curvature.exact is not None:
            return self._approximately(self.curvature.exact, rhs, self.damping)
        found = {block: self.solvers[block].solve(self.states[block], rows) for block, rows in rhs.items()}
        return self._together(found, rhs, self.damping)

    def solve_at(self, rhs: Rows, dampings: Sequence[Mapping[str, float]]) -> list[tuple[Tensor, SolveReport]]:
        """As `solve`, for each of several dampings by block."""
        if self.curvature.exact is not None:
            return [self._approximately(self.curvature.exact, rhs, damping) for damping in dampings]
        by_block = {
            block: self.solvers[block].solve_at(self.states[block], rows, [damping[block] for damping in dampings])
            for block, rows in rhs.items()
        }
        return [
            self._together({block: found[i] for block, found in by_block.items()}, rhs, damping)
            for i, damping in enumerate(dampings)
        ]

    def lower_bounds(self, damping: Mapping[str, float]) -> dict[str, LowerBound | None]:
        """Block → μ with A + λI ⪰ μI, as far as it is known, and products are exact enough to bound errors with."""
        if self.reducer.risk.autocast is not None:
            return dict.fromkeys(self.operators)
        if (exact := self.curvature.exact) is not None:
            operator, least = exact.damped(damping)
            return {ALL: lower_bound(operator, SolverState(operator), least, None) if exact.is_measured else None}
        return {
            block: lower_bound(operator, self.states[block], damping[block], self.report.spectrum.get(block))
            for block, operator in self.operators.items()
        }

    @property
    def kind_of_bound(self) -> str:
        """ "rigorous", "heuristic" or "none": what error bounds the solves carry."""
        bounds = self.lower_bounds(self.damping).values()
        if any(bound is None for bound in bounds):
            return "none"
        return "rigorous" if all(bound is not None and bound.rigorous for bound in bounds) else "heuristic"

    def self_influences(self, rows: Rows, *, rtol: float, maxiter: int) -> SelfInfluences:
        """Brackets of each row's quadratic form, over all blocks."""
        if self.curvature.exact is not None:
            return self_influences_in_eigenbases(rows, self.states, self.damping)
        check_exact(self.reducer.risk.autocast)
        bounds = self.lower_bounds(self.damping)
        return self_influences_of(rows, self.operators, self.damping, bounds, rtol=rtol, maxiter=maxiter)

    def arrays(self) -> dict[str, Tensor]:
        """Return what must be kept to restore the states: "block/array" → tensor."""
        return dict(self.curvature.arrays) | {
            f"{block}/{name}": tensor
            for block, solver in self.solvers.items()
            for name, tensor in solver.state_arrays(self.states[block]).items()
        }

    @classmethod
    def restored(
        cls,
        reducer: ChunkReducer,
        curvature: Curvature,
        solvers: Mapping[str, Solver[Any]],
        arrays: Mapping[str, Tensor],
        report: FitReport,
    ) -> Self:
        """Restore a fit from its `arrays`, next to operators over the same data, without the work of fitting."""
        states = {
            block: solvers[block].restore(
                operator, {n.removeprefix(f"{block}/"): a for n, a in arrays.items() if n.startswith(f"{block}/")}
            )
            for block, operator in curvature.operators.items()
        }
        return cls(reducer, curvature, solvers, states, report)

    def exact_systems(self, columns: Mapping[str, slice]) -> dict[str, tuple[CurvatureOperator, float, slice]]:
        """Name → (A, λ, columns) of each system that factors should solve. columns: of each block."""
        if (exact := self.curvature.exact) is not None:
            return {ALL: (*exact.damped(self.damping), slice(0, exact.operator.size))}
        return {block: (self.operators[block], self.damping[block], columns[block]) for block in self.operators}

    def _approximately(self, exact: ExactSystem, rhs: Rows, damping: Mapping[str, float]) -> tuple[Tensor, SolveReport]:
        """Solve by blocks that approximate; residuals and bounds are of the exact system, NaN where not measured."""
        solution = exact.solve(self.states, rhs, damping)
        bound = self.lower_bounds(damping).get(ALL)
        error = None
        if bound is not None:
            sizes = row_norms(torch.cat(list(rhs.values()), dim=1)).cpu()
            eps = torch.finfo(solution.x.dtype).eps
            error = solution.relative_residual * sizes / bound.value + ROUNDING * eps * row_norms(solution.x).cpu()
        return solution.x, SolveReport(
            solution.relative_residual,
            solution.iterations,
            solution.converged,
            solution.outcome,
            {},
            error,
            bound is not None,
            solution.remarks,
        )

    def _together(
        self, found: Mapping[str, Solution], rhs: Rows, damping: Mapping[str, float]
    ) -> tuple[Tensor, SolveReport]:
        factors = torch.cat([solution.x for solution in found.values()], dim=1)
        return factors, SolveReport.of(found, rhs, self.lower_bounds(damping))


def _remarks(reducer: ChunkReducer, states: Mapping[str, Any]) -> tuple[str, ...]:
    return (*reducer.remarks, *named_by_block({block: state.remarks for block, state in states.items()}))


def _details(states: Mapping[str, Any]) -> dict[str, Mapping[str, Tensor]]:
    return {block: state.details for block, state in states.items() if state.details}
