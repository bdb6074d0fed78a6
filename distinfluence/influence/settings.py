"""What users ask of every influence model: checked, and as JSON for provenance and fingerprints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from typing_extensions import override

from distinfluence.curvature import SecondOrderMode
from distinfluence.curvature.base import PlannedWork
from distinfluence.curvature.fisher_sums import MOST_EXACT, FisherKind, FisherVectors
from distinfluence.errors import SettingError
from distinfluence.influence.damping import RelativeDamping
from distinfluence.model.blocks import BlockStructure
from distinfluence.solvers.base import check_count
from distinfluence.solvers.demand import DECOMPOSING, EIGEN_FLOPS, Demand, SolveWork, Systems
from distinfluence.solvers.ekfac import Ekfac
from distinfluence.solvers.residuals import check_residual_rows, rows_to_measure


def checked_mode(mode: SecondOrderMode | str) -> SecondOrderMode:
    """Return the mode of that name. Raises SettingError for another."""
    try:
        return SecondOrderMode(mode)
    except ValueError:
        raise SettingError(
            f"`second_order_mode` must be one of {[m.value for m in SecondOrderMode]}, got {mode!r}. "
            "Choose one of these."
        ) from None


def check_precision(passes: torch.dtype, own: torch.dtype) -> None:
    """Raise SettingError unless passes of a model that is evaluated in `own` may run in this dtype."""
    if passes not in (torch.bfloat16, torch.float16):
        raise SettingError(
            f"`dtype` of mixed precision must be torch.bfloat16 or torch.float16, got {passes}. Take bfloat16: its "
            "range is float32's."
        )
    if own != torch.float32:
        raise SettingError(
            f"mixed precision is for a `model` that is evaluated in float32, got {own}. Convert it, or leave mixed "
            "precision out."
        )


def check_exact(autocast: torch.dtype | None) -> None:
    """Raise SettingError for passes in mixed precision."""
    if autocast is not None:
        raise SettingError(
            "`self_influences` brackets values by products that must be exact to rounding; this `model` runs in "
            "mixed precision. Make the influence model without it."
        )


def common_settings(
    mode: SecondOrderMode,
    structure: BlockStructure,
    asked: Mapping[str, float | RelativeDamping],
    damping: Mapping[str, float] | None,
    autocast: torch.dtype | None,
) -> dict[str, object]:
    """Return the settings that all methods have. damping: block → λ, None where rules are not worked out yet."""
    rules = {block: str(rule) for block, rule in asked.items() if isinstance(rule, RelativeDamping)}
    common: dict[str, object] = {
        "second_order_mode": str(mode),
        "block_structure": {k: list(v) for k, v in structure.items()} if isinstance(structure, Mapping) else structure,
        "hessian_regularization": rules if damping is None else damping,
    }
    mixed = {} if autocast is None else {"mixed_precision": str(autocast).removeprefix("torch.")}
    return common | mixed | ({"damping_rule": rules} if rules else {})


@dataclass(frozen=True, kw_only=True)
class KroneckerFactored(Ekfac):
    """EKFAC with the hyperparameters of its matrix and of its refinement; `EkfacInfluence` says what they mean."""

    makes_matrix = True
    update_diagonal: bool
    fisher: FisherKind | str
    n_draws: int
    seed: int
    weight_sharing: str
    cg_iterations: int
    residual_rows: int | None
    query_energy: float | None
    most_dense: int
    recognise: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("update_diagonal", "recognise"):
            if not isinstance(getattr(self, name), bool):
                got = type(getattr(self, name)).__name__
                raise SettingError(f"`{name}` must be True or False, got {got}. Pass other arguments by their names.")
        _check_choice("fisher", self.fisher, ("auto", "exact", "sampled", "empirical"))
        _check_choice("weight_sharing", self.weight_sharing, ("expand", "reduce"))
        check_count("n_draws", self.n_draws)
        check_residual_rows(self.residual_rows)
        for name in ("cg_iterations", "most_dense"):
            check_count(name, getattr(self, name), 0)
        if self.query_energy is not None and not 0 < self.query_energy <= 1:
            raise SettingError(f"`query_energy` must be above 0 and at most 1, or None, got {self.query_energy!r}.")

    @property
    def measured(self) -> int:
        """For how many rows of a solve the residual is measured."""
        return rows_to_measure(self.residual_rows, own=0)

    @property
    @override
    def solves_over_data(self) -> bool:  # only for conjugate gradients and residuals
        return self.cg_iterations > 0 or self.measured > 0

    @override
    def demand(self, systems: Systems) -> Demand:
        # Two factors for each weight matrix, in float64 in the fit, and what the largest takes to be decomposed.
        squares, largest, p = 0, 0, sum(systems.sizes)
        cubes = row_flops = 0.0
        for shape in systems.shapes:
            sides = (shape[0], shape.numel() // shape[0] + 1) if len(shape) > 1 else (1, 1)
            squares += sum(side * side for side in sides)
            cubes += sum(EIGEN_FLOPS * side**3 for side in sides)
            row_flops += 4.0 * sides[0] * sides[1] * sum(sides)
            largest = max(largest, *sides)
        state = squares * systems.itemsize + 8 * p  # eigenvectors, and eigenvalues in float64
        fit = 8 * squares + DECOMPOSING * largest**2 + 8 * p
        passes, steps = 2 if self.update_diagonal else 1, self.cg_iterations
        vectors = self.vectors_guessed(sum(systems.shapes[-1][:1]))
        work = PlannedWork(passes, derivatives=passes * vectors, flops=cubes)
        solve = SolveWork(steps, None if steps else self.measured, row_flops=row_flops)
        return Demand(fit, state, 4.5, 0, work, solve, True, sum_bytes=state)

    def vectors_guessed(self, width: int) -> int:
        """Return the reverse derivatives of a sample before its outputs are known. width: outputs of the last layer."""
        if self.fisher == "empirical":
            return 1
        exact = self.fisher == "exact" or (self.fisher == "auto" and width <= MOST_EXACT)
        return width if exact else self.n_draws

    def vectors(self, n_vectors: int) -> FisherVectors:
        """Return the Fisher matrix's vectors. n_vectors: for the exact one; below 0 if the distribution is unknown."""
        kind = self.fisher
        if kind == "auto":
            kind = "empirical" if n_vectors < 0 else "exact" if n_vectors <= MOST_EXACT else "sampled"
        return FisherVectors(kind, self.n_draws, self.seed)  # type: ignore[arg-type]


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise SettingError(f"`{name}` must be one of {list(choices)}, got {value!r}. Choose one of these.")
