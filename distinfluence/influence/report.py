"""What a fit covered and how far a solve got."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distinfluence.influence.bounds import LowerBound, error_bounds
from distinfluence.solvers.base import Outcome, Solution
from distinfluence.solvers.spectrum import Extremes


@dataclass(frozen=True)
class FitReport:
    """What a fit was made of.

    Args:
        second_order_mode: The curvature.
        n_samples: The number of training samples.
        n_parameters: The number of covered parameters, p.
        n_total: The number of all parameters of the model.
        uncovered: The names of omitted parameters (frozen, or not in a custom block structure).
        blocks: Block → size.
        damping: Block → λ.
        positive_definite: Block → whether A + λI is, None where the method does not find out.
        passes: The passes over the training data.
        remarks: How the loss was understood, and what the method has to say.
        seconds: The wall time.
        details: Block → small tensors of the method, for instance eigenvalues and their residuals.
        spectrum: Block → ends of the spectrum of A, once they were asked for.
        treatments: Parameter → how it is represented, for methods that treat parameters differently.
    """

    second_order_mode: str
    n_samples: int
    n_parameters: int
    n_total: int
    uncovered: tuple[str, ...]
    blocks: Mapping[str, int]
    damping: Mapping[str, float]
    positive_definite: Mapping[str, bool | None]
    passes: int
    remarks: tuple[str, ...]
    seconds: float
    details: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    spectrum: Mapping[str, Extremes] = field(default_factory=dict)
    treatments: Mapping[str, str] = field(default_factory=dict)

    @property
    def coverage(self) -> float:
        """Share of the model's parameters that the scores cover, 0 to 1."""
        return self.n_parameters / self.n_total

    def __str__(self) -> str:
        curvature = "no curvature" if self.second_order_mode == "none" else self.second_order_mode
        lines = [
            f"{curvature} over {self.n_samples} samples, {self.passes} "
            f"pass{'' if self.passes == 1 else 'es'}, {self.seconds:.2f} s",
            f"covers {self.n_parameters} of {self.n_total} parameters ({self.coverage:.1%}), "
            f"{len(self.blocks)} block{'s' if len(self.blocks) > 1 else ''}",
        ]
        lines += [
            f"not positive definite: {block}" for block, is_spd in self.positive_definite.items() if is_spd is False
        ]
        lines += [f"{name}: {treatment}" for name, treatment in self.treatments.items()]
        return "\n".join([*lines, *self.remarks])


@dataclass(frozen=True)
class SolveReport:
    """How far the solve of each row got.

    Args:
        relative_residual: ‖g − (A + λI) x‖ / ‖g‖ over all blocks, from a fresh product, [k] float64.
        iterations: The iterations of the block that needed most, [k] int64.
        converged: Whether the row converged in every block, [k] bool; False where its residual was not measured.
        outcome: For each row why it stopped, of the first block that did not converge.
        by_block: The `Solution`s without their x, block by block.
        error_bound: c_i with |Î_ij − I_ij| ≤ c_i·‖g_j‖ for every training point j, [k] float64 (units: influence per
            gradient norm); None where nothing is known of the spectrum.
        rigorous: Whether that bound is rigorous, or rests on an estimate of the smallest eigenvalue.
        remarks: Remarks of the method, in sentences.
    """

    relative_residual: Tensor
    iterations: Tensor
    converged: Tensor
    outcome: tuple[Outcome, ...]
    by_block: Mapping[str, "BlockReport"]
    error_bound: Tensor | None = None
    rigorous: bool = False
    remarks: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        solutions: Mapping[str, Solution],
        rhs: Mapping[str, Tensor],
        bounds: Mapping[str, LowerBound | None],
    ) -> "SolveReport":
        """Put the blocks' solutions together.

        Args:
            solutions: Block → solution.
            rhs: Block → right-hand sides [k, p_block].
            bounds: Block → lower bound of its spectrum.

        Returns:
            The report.
        """
        norms = {block: rows.double().norm(dim=1).cpu() for block, rows in rhs.items()}
        blocks = {block: BlockReport.of(solution) for block, solution in solutions.items()}
        squared = torch.stack([(norms[b] * blocks[b].relative_residual) ** 2 for b in blocks]).sum(dim=0)
        total = torch.stack([norms[b] ** 2 for b in blocks]).sum(dim=0)
        outcomes = zip(*(report.outcome for report in blocks.values()), strict=True)
        return cls(
            relative_residual=torch.where(total > 0, squared / total, squared).sqrt(),
            iterations=torch.stack([report.iterations for report in blocks.values()]).amax(dim=0),
            converged=torch.stack([report.converged for report in blocks.values()]).all(dim=0),
            outcome=tuple(
                next((one for one in row if one is not Outcome.CONVERGED), Outcome.CONVERGED) for row in outcomes
            ),
            by_block=blocks,
            error_bound=error_bounds(solutions, rhs, bounds),
            rigorous=all(bound is not None and bound.rigorous for bound in bounds.values()),
            remarks=named_by_block({block: solution.remarks for block, solution in solutions.items()}),
        )

    def __str__(self) -> str:
        most = int(self.iterations.max()) if self.converged.numel() else 0
        known = ~self.relative_residual.isnan() | self.converged
        k, measured = known.numel(), int(known.sum())
        line = f"approximate, residuals not measured for {k} rows"
        if measured or not k:
            worst = max(self.relative_residual[known].tolist(), default=0.0)
            of = f"{k} rows" if measured == k else f"{measured} measured rows ({k} in all)"
            line = f"{int(self.converged.sum())} of {of} converged, worst relative residual {worst:.1e}"
        if most > 0:  # a factorisation has none to count
            line += f", at most {most} iteration{'' if most == 1 else 's'}"
        return "\n".join([line, *self.remarks])


@dataclass(frozen=True)
class BlockReport:
    """How far the solve of each row got in one block; fields as in `Solution`.

    Args:
        relative_residual: The relative residuals, [k] float64.
        iterations: The iterations, [k] int64.
        converged: Whether each row converged, [k] bool.
        outcome: Why each row stopped.
        curvature: The smallest Rayleigh quotients met, [k] float64.
    """

    relative_residual: Tensor
    iterations: Tensor
    converged: Tensor
    outcome: tuple[Outcome, ...]
    curvature: Tensor

    @classmethod
    def of(cls, solution: Solution) -> "BlockReport":
        """Return the solution without its x, on the CPU.

        Args:
            solution: The solution of the block.

        Returns:
            The report.
        """
        return cls(
            relative_residual=solution.relative_residual.double().cpu(),
            iterations=solution.iterations.cpu(),
            converged=solution.converged.cpu(),
            outcome=solution.outcome,
            curvature=solution.curvature.double().cpu(),
        )


def named_by_block(remarks: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return the blocks' remarks, each once; with the name of the block where there are several."""
    if len(remarks) == 1:
        return tuple(dict.fromkeys(next(iter(remarks.values()))))
    return tuple(dict.fromkeys(f"{block}: {remark}" for block, own in remarks.items() for remark in own))
