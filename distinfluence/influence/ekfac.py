"""Influence by KFAC and EKFAC: two sums over the training data, then every solve is a few small products.

Work: one forward pass and one reverse pass for each vector in output space, twice (once for KFAC); a solve touches no
data. Memory: the factors, o² + i² numbers for a layer [o, i], and for each query p numbers. Scores are made layer by
layer from inputs and output gradients, without matrices of samples × parameters.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from distinfluence.curvature import KroneckerOperator, SecondOrderMode
from distinfluence.curvature.base import CurvatureOperator
from distinfluence.curvature.fisher_sums import MOST_EXACT, FisherKind, FisherVectors, LayoutOf
from distinfluence.curvature.ggn import GGNOperator
from distinfluence.curvature.kronecker import BlockDamped, Eigenbasis, KroneckerInverse, fitted_bases
from distinfluence.curvature.queries import joined_queries, query_of
from distinfluence.errors import SettingError
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.damping import Regularization, damping_by_block, resolved
from distinfluence.influence.fitted import Fitted
from distinfluence.influence.report import FitReport, SolveReport
from distinfluence.influence.scores import InfluenceMode, Tile, influence_mode
from distinfluence.influence.self_influence import SelfInfluences
from distinfluence.layers.layout import MOST_DENSE, LayerLayout
from distinfluence.layers.scores import (
    LayerScores,
    QueryFactors,
    RankOne,
    layer_gradients,
    layer_scores,
    recorded,
    token_scores,
)
from distinfluence.layers.units import Unit
from distinfluence.model.batch import Batch
from distinfluence.model.blocks import BlockMode, ParameterBlocks
from distinfluence.model.gradients import SampleGradients
from distinfluence.model.objective import Loss, Objective
from distinfluence.model.reducer import ChunkReducer
from distinfluence.model.risk import EmpiricalRisk
from distinfluence.solvers.base import Outcome, check_count, check_rhs, relative_residuals, row_norms, rtol_for
from distinfluence.solvers.cg import CG
from distinfluence.solvers.demand import DECOMPOSING, Demand
from distinfluence.solvers.ekfac import Ekfac, inverse_values

APPROXIMATE = (
    "The Kronecker-factored matrix approximates the Gauss–Newton matrix; residuals refer to the latter, and were "
    "measured for {measured} of {k} rows (`residual_rows`)."
)


class EkfacInfluence(InfluenceFunctionModel):
    """Influence by a Kronecker-factored approximation of the Fisher (Gauss–Newton) matrix, layer by layer.

    update_diagonal: correct the eigenvalues by a second sum over the data (EKFAC); without it KFAC. loss: any loss or
    `Objective`; cross-entropy unless given. hessian_regularization: λ, also by layer; not sure: `RelativeDamping(0.1)`,
    a tenth of each layer's mean eigenvalue. fisher: "exact" takes the expectation over the predictive distribution,
    "sampled" draws `n_draws` labels for each sample (and position) from it, "empirical" takes the observed ones; "auto"
    is exact where that needs 16 reverse passes or fewer, else sampled, else (a loss whose distribution is not known)
    empirical. seed: of the draws, which do not depend on batches, chunks or workers. weight_sharing: "expand" or
    "reduce", what KFAC's factors make of positions. cg_iterations: so many conjugate gradient steps on the Gauss–Newton
    matrix with EKFAC as preconditioner, one pass each and one for the residuals. residual_rows: for so many rows of
    each solve the residual against the Gauss–Newton matrix is measured, in one pass; it is NaN for others.
    query_energy: share of the squared norm that low-rank factors of queries keep, where they save work; None keeps them
    whole. most_dense: parameters up to which a block without Kronecker structure is kept whole. recognise: False to
    look for no layers, for models that use them differently from batch to batch (a LayoutError says so).

    Linear layers, convolutions, embeddings, norms, attention and whatever else multiplies an activation with a weight
    are recognised by what the forward pass does with each parameter, and the recognised is compared with autograd; the
    rest is treated by second moments of its gradients. `fit_report.treatments` names the treatment of every parameter.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> data = torch.eye(2), torch.zeros(2, 1)
    >>> influence = EkfacInfluence(model, True, 1.0, loss=torch.nn.MSELoss()).fit(data)
    >>> influence.operators["Linear"].dense().diagonal().round()  # Gauss–Newton: mean of 2x²
    tensor([1., 1.], dtype=torch.float64)
    """

    brackets_self_influence = False

    def __init__(
        self,
        model: nn.Module,
        update_diagonal: bool = False,
        hessian_regularization: Regularization = 0.0,
        *,
        loss: Loss | Objective | None = None,
        fisher: FisherKind | str = "auto",
        n_draws: int = 1,
        seed: int = 0,
        weight_sharing: str = "expand",
        cg_iterations: int = 0,
        residual_rows: int = 0,
        query_energy: float | None = None,
        most_dense: int = MOST_DENSE,
        recognise: bool = True,
    ) -> None:
        _check_choice("fisher", fisher, ("auto", "exact", "sampled", "empirical"))
        _check_choice("weight_sharing", weight_sharing, ("expand", "reduce"))
        check_count("n_draws", n_draws)
        check_count("cg_iterations", cg_iterations, 0)
        check_count("residual_rows", residual_rows, 0)
        check_count("most_dense", most_dense, 0)
        if query_energy is not None and not 0 < query_energy <= 1:
            raise SettingError(f"`query_energy` must be above 0 and at most 1, or None, got {query_energy!r}.")
        self.update_diagonal = update_diagonal
        self.fisher = fisher
        self.n_draws = n_draws
        self.seed = seed
        self.weight_sharing = weight_sharing
        self.cg_iterations = cg_iterations
        self.residual_rows = residual_rows
        self.query_energy = query_energy
        self.most_dense = most_dense
        self.recognise = recognise
        self._layout: LayerLayout | None = None
        self._queries: tuple[Tensor, QueryFactors] | None = None
        super().__init__(
            model,
            nn.CrossEntropyLoss() if loss is None else loss,
            hessian_regularization,
            functools.partial(Ekfac),
            block_structure=BlockMode.LAYER_WISE,
            second_order_mode=SecondOrderMode.GGN,
        )

    @property
    @override
    def solves_over_data(self) -> bool:  # only for conjugate gradients and residuals
        return self.cg_iterations > 0 or self.residual_rows > 0

    @property
    def _products(self) -> SecondOrderMode | None:
        return self.second_order_mode if self.solves_over_data else None

    def demand(self) -> Demand:
        """Two factors for each weight matrix, in float64 in the fit, and what the largest takes to be decomposed."""
        squares, largest, p = 0, 0, self.risk.size
        for shape in self.risk.blocks.shapes.values():
            sides = (shape[0], shape.numel() // shape[0] + 1) if len(shape) > 1 else (1, 1)
            squares += sum(side * side for side in sides)
            largest = max(largest, *sides)
        state = squares * self.risk.dtype.itemsize + 8 * p  # eigenvectors, and eigenvalues in float64
        fit = 8 * squares + DECOMPOSING * largest**2 + 8 * p
        solve = 0 if not self.solves_over_data else max(1, self.cg_iterations + 1)
        return Demand(fit, state, 5.0, 0, 2 if self.update_diagonal else 1, solve, True, sum_bytes=state)

    def settings(self) -> dict[str, object]:
        """The common settings and those of the factors."""
        own = ("update_diagonal", "fisher", "n_draws", "seed", "weight_sharing", "cg_iterations", "residual_rows")
        return self._common_settings() | {
            name: getattr(self, name) for name in (*own, "query_energy", "most_dense", "recognise")
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.settings().items() if k != 'method')})"

    def fit(self, data: object) -> Self:
        """As `InfluenceFunctionModel.fit`: one sum over the data, two with `update_diagonal`."""
        super().fit(data)
        fitted, layout = self._fitted(), self.layout
        named = {name: _in_words(unit) for unit in layout.units for name in unit.parameters}
        order = [name for name in self.risk.blocks.shapes if name in named]
        report = replace(fitted.report, treatments={name: named[name] for name in order}, remarks=self._remarks())
        self._fit = replace(fitted, report=report)
        return self

    def _remarks(self) -> tuple[str, ...]:
        by_treatment: dict[str, int] = {}
        for unit in self.layout.units:
            by_treatment[unit.treatment] = by_treatment.get(unit.treatment, 0) + unit.size
        shares = ", ".join(f"{t} {size / self.n_parameters:.1%}" for t, size in sorted(by_treatment.items()))
        kind = f"{self._vectors.kind} Fisher matrix, parameters by treatment: {shares}"
        return (*self._fitted().report.remarks, kind)

    @property
    def layout(self) -> LayerLayout:
        """What the fit found out of the model's layers. Raises NotFittedError before `fit`."""
        self._fitted()
        assert self._layout is not None
        return self._layout

    def _operators(self, reducer: ChunkReducer) -> dict[str, CurvatureOperator]:
        bytes_, n_vectors = reducer.one(0, LayoutOf(self.most_dense, self.recognise))
        self._layout, self._queries = LayerLayout.from_tensor(bytes_), None
        self._vectors = self._chosen(int(n_vectors))
        bases = fitted_bases(
            reducer,
            self._layout,
            self._vectors,
            corrected=self.update_diagonal,
            reduce=self.weight_sharing == "reduce",
        )
        return self._as_operators(bases)

    def _chosen(self, n_vectors: int) -> FisherVectors:
        kind = self.fisher
        if kind == "auto":
            kind = "empirical" if n_vectors < 0 else "exact" if n_vectors <= MOST_EXACT else "sampled"
        return FisherVectors(kind, self.n_draws, self.seed)  # type: ignore[arg-type]

    def _as_operators(self, bases: Sequence[Eigenbasis]) -> dict[str, CurvatureOperator]:
        blocks = self.risk.blocks
        return {
            block: KroneckerOperator(
                [basis for basis in bases if basis.unit.block == block],
                {name: blocks.shapes[name] for name in names},
                self.risk.dtype,
            )
            for block, names in blocks.names.items()
        }

    def kronecker_inverse(self) -> KroneckerInverse:
        """(A + λI)⁻¹ without model and data, over rows in the order of the model's parameters."""
        operators = {b: o for b, o in self._fitted().operators.items() if isinstance(o, KroneckerOperator)}
        layers, full = self.risk.blocks, ParameterBlocks.of(self.risk.module)
        order = None
        if list(layers.shapes) != list(full.shapes):
            start, columns = 0, {}
            for name, shape in layers.shapes.items():
                columns[name] = torch.arange(start, start + shape.numel(), device=self.risk.device)
                start += shape.numel()
            order = torch.cat([columns[name] for name in full.shapes])
        return KroneckerInverse(operators, order, repr(self))

    def solve(self, gradients: Tensor) -> tuple[Tensor, SolveReport]:
        """As `InfluenceFunctionModel.solve`; residuals refer to the Gauss–Newton matrix, NaN where not measured."""
        return self._solved(gradients, self.damping)

    def solve_at(self, gradients: Tensor, dampings: Sequence[Regularization]) -> list[tuple[Tensor, SolveReport]]:
        """As `solve`, for each of several dampings from the one fit."""
        blocks, operators = self.risk.blocks, self._fitted().operators
        return [self._solved(gradients, resolved(damping_by_block(blocks, one), operators)) for one in dampings]

    def _solved(self, gradients: Tensor, damping: Mapping[str, float]) -> tuple[Tensor, SolveReport]:
        """Factors in the eigenbasis, refined if asked, and how far they are from solving the Gauss–Newton system."""
        for block, rows in super()._by_block(gradients[:1]).items():
            check_rhs(rows, self._fitted().operators[block], "gradients")
        factors = torch.empty_like(gradients)
        for block, columns in self.risk.blocks.columns.items():
            operator = self._fitted().operators[block]
            assert isinstance(operator, KroneckerOperator)
            noise = self._fitted().states[block].noise
            own = functools.partial(inverse_values, damping=damping[block], noise=noise)
            factors[:, columns] = operator.in_eigenbasis(gradients[:, columns], own)
        return self._beside_gauss_newton(gradients, factors, damping)

    def _beside_gauss_newton(
        self, gradients: Tensor, factors: Tensor, damping: Mapping[str, float]
    ) -> tuple[Tensor, SolveReport]:
        k = gradients.shape[0]
        operator = self._gauss_newton(damping)
        least = min(damping.values())
        iterations, remarks = torch.zeros(k, dtype=torch.int64), tuple[str, ...]()
        if self.cg_iterations and k:
            inverse = _Inverse(self.kronecker_inverse(), damping)
            steps = CG(least, rtol=self._rtol, maxiter=self.cg_iterations, preconditioner=inverse)
            solution = steps.solve(steps.fit(operator), gradients)
            factors, relative = solution.x, solution.relative_residual
            iterations, remarks = solution.iterations, solution.remarks
        else:
            measured = min(k, self.residual_rows)
            relative = torch.full((k,), torch.nan, dtype=torch.float64)
            if measured:
                product = operator.matmat(factors[:measured]).add_(factors[:measured], alpha=least)
                relative[:measured] = relative_residuals(gradients[:measured], product)
            remarks = (APPROXIMATE.format(measured=measured, k=k),)
        converged = relative <= self._rtol
        outcome = tuple(Outcome.CONVERGED if done else Outcome.APPROXIMATE for done in converged.tolist())
        bound, rigorous = None, False
        if self.kind_of_bound != "none":
            bound = relative * row_norms(gradients).cpu() / least
            bound = bound + 16 * torch.finfo(gradients.dtype).eps * row_norms(factors).cpu()
            rigorous = True
        return factors, SolveReport(relative, iterations, converged, outcome, {}, bound, rigorous, remarks)

    @property
    def _rtol(self) -> float:
        return rtol_for(None, self.risk.dtype)

    @property
    def kind_of_bound(self) -> str:
        """ "rigorous" where residuals are measured, the loss is convex and λ > 0; else "none"."""
        known = self.objective.convex and min(self.damping.values()) > 0
        return "rigorous" if self.solves_over_data and known else "none"

    def _gauss_newton(self, damping: Mapping[str, float]) -> CurvatureOperator:
        """The Gauss–Newton matrix with what each block's λ is above the least."""
        operator: CurvatureOperator = GGNOperator(EmpiricalRisk.over(self.reducer))
        least = min(damping.values())
        if all(value == least for value in damping.values()):
            return operator
        added = torch.zeros(self.n_parameters, dtype=self.risk.dtype, device=self.risk.device)
        for block, columns in self.risk.blocks.columns.items():
            added[columns] = damping[block] - least
        return BlockDamped(operator, added)

    def exact_systems(self) -> dict[str, tuple[CurvatureOperator, float, slice]]:
        """The Gauss–Newton matrix, over all blocks at once."""
        least = min(self.damping.values())
        return {"all": (self._gauss_newton(self.damping), least, slice(0, self.n_parameters))}

    def self_influences(
        self, x: object, y: Tensor | None = None, *, rtol: float = 1e-3, maxiter: int = 500
    ) -> SelfInfluences:
        """Influence of each sample's training loss on itself by the Kronecker-factored matrix: [n]; no pass.

        Both bounds are the value: they are of this matrix, not of the curvature that it approximates.
        """
        rows = super()._by_block(self.loss_gradients(self.place(x, y)).rows)
        total = torch.zeros(next(iter(rows.values())).shape[0], dtype=torch.float64, device=self.risk.device)
        for block, own in rows.items():
            operator, state = self._fitted().operators[block], self._fitted().states[block]
            assert isinstance(operator, KroneckerOperator)
            damping, noise = self.damping[block], state.noise
            total += operator.quadratic_forms(
                own,
                lambda values, d=damping, n=noise: inverse_values(values, d, n),  # type: ignore[misc]
            )
        total = total.cpu()
        return SelfInfluences(total, total, total, torch.zeros(total.shape[0], dtype=torch.int64), False)

    def tile(self, factors: Tensor, batch: Batch, mode: InfluenceMode | str = InfluenceMode.UP) -> Tile:
        """As `InfluenceFunctionModel.tile`, layer by layer."""
        if influence_mode(mode) is not InfluenceMode.UP:
            return super().tile(factors, batch, mode)
        parts = list(self._layer_scores(factors, batch))
        values = torch.cat([torch.stack(part.by_unit).sum(dim=0) for part in parts], dim=1)
        return Tile(
            values, torch.cat([part.losses for part in parts]), torch.cat([part.gradient_norms for part in parts])
        )

    def influences(
        self,
        x_test: object,
        y_test: Tensor | None = None,
        x: object | None = None,
        y: Tensor | None = None,
        mode: InfluenceMode | str = InfluenceMode.UP,
    ) -> Tensor:
        """As `InfluenceFunctionModel.influences`; without factors where a query is one outer product in a layer."""
        refused = x is None and y is not None  # by the general way, with its error
        exact = self.cg_iterations == 0 and self.query_energy is None and self._measures_loss
        if influence_mode(mode) is not InfluenceMode.UP or refused or not exact:
            return super().influences(x_test, y_test, x, y, mode)
        tests = self.place(x_test, y_test)
        queries = self._coordinates(tests)
        parts = list(layer_scores(self.risk, self.layout, queries, tests if x is None else self.place(x, y)))
        return torch.cat([torch.stack(part.by_unit).sum(dim=0) for part in parts], dim=1)

    def _coordinates(self, batch: Batch) -> QueryFactors:
        """The batch as queries, unit by unit: as outer products in the eigenbasis, or as factors."""
        found: list[list[Tensor | RankOne]] = [[] for _ in self.layout.units]
        functions = [self._inverse_of(unit.block) for unit in self.layout.units]
        for part, record in recorded(self.risk, self.layout, batch):
            deltas = record.of_losses()
            for unit, basis, function, own in zip(self.layout.units, self._bases(), functions, found, strict=True):
                own.append(query_of(self.risk, unit, basis, function, record, deltas, part))
        whole = tuple(joined_queries(own, self.risk.dtype, separate=not self.update_diagonal) for own in found)
        none = torch.zeros(0, dtype=torch.float64)
        return QueryFactors(whole, (None,) * len(whole), none)

    def _inverse_of(self, block: str) -> Callable[[Tensor], Tensor]:
        noise: float = self._fitted().states[block].noise
        return functools.partial(inverse_values, damping=self.damping[block], noise=noise)

    def _bases(self) -> list[Eigenbasis]:
        """In the order of the layout's units."""
        operators = self._fitted().operators.values()
        by_name = {b.unit.parameters: b for o in operators if isinstance(o, KroneckerOperator) for b in o.bases}
        return [by_name[unit.parameters] for unit in self.layout.units]

    def influences_from_factors(
        self, factors: Tensor, x: object, y: Tensor | None = None, mode: InfluenceMode | str = InfluenceMode.UP
    ) -> Tensor:
        """As `InfluenceFunctionModel.influences_from_factors`, layer by layer."""
        if influence_mode(mode) is not InfluenceMode.UP:
            return super().influences_from_factors(factors, x, y, mode)
        return self.tile(self._check_factors(factors, slice(0, self.n_parameters)), self.place(x, y)).values

    def influences_from_factors_by_block(
        self,
        factors: Mapping[str, Tensor],
        x: object,
        y: Tensor | None = None,
        mode: InfluenceMode | str = InfluenceMode.UP,
    ) -> "OrderedDict[str, Tensor]":
        """As `InfluenceFunctionModel.influences_from_factors_by_block`, from one pass over the samples."""
        if influence_mode(mode) is not InfluenceMode.UP:
            return super().influences_from_factors_by_block(factors, x, y, mode)
        rows = self._rows_of_blocks(factors)
        parts = list(self._layer_scores(rows, self.place(x, y)))
        by_unit = [torch.cat(own, dim=1) for own in zip(*(part.by_unit for part in parts), strict=True)]
        found: OrderedDict[str, Tensor] = OrderedDict()
        for unit, scores in zip(self.layout.units, by_unit, strict=True):
            found[unit.block] = found[unit.block] + scores if unit.block in found else scores
        return OrderedDict((block, found[block]) for block in self.risk.blocks.names)

    def influences_by_token(
        self, x_test: object, y_test: Tensor | None = None, x: object | None = None, y: Tensor | None = None
    ) -> Tensor:
        """Influence by position of the training samples, [n_test, n_train, T]; positions sum to the samples' influence.

        A position's share is that of the gradient that its activations and their gradients make in each layer. Raises
        UnsupportedOperatorError where layers do not share the same positions (pooling, parameters without a layer).
        """
        train = (x_test, y_test) if x is None else (x, y)
        return self.influences_from_factors_by_token(self.influence_factors(x_test, y_test), *train)

    def influences_from_factors_by_token(self, factors: Tensor, x: object, y: Tensor | None = None) -> Tensor:
        """As `influences_by_token`, from factors [n_test, p]."""
        rows = self._check_factors(factors, slice(0, self.n_parameters))
        return token_scores(self.risk, self.layout, QueryFactors.of(self.risk, self.layout, rows), self.place(x, y))

    def query_error(self, factors: Tensor) -> Tensor:
        """‖M − M̃‖ / ‖M‖ of each query's factor [n_test] that `query_energy` costs: |ΔI_ij| ≤ ‖M_i − M̃_i‖·‖g_j‖."""
        return self._prepared(self._check_factors(factors, slice(0, self.n_parameters))).relative_error

    def loss_gradients(self, batch: Batch) -> SampleGradients:
        """As `InfluenceFunctionModel.loss_gradients`, put together from the layers once the model is fitted."""
        if not self.is_fitted:
            return super().loss_gradients(batch)
        return SampleGradients(*layer_gradients(self.risk, self.layout, batch))

    def measurement_gradients(self, batch: Batch) -> SampleGradients:
        """As `InfluenceFunctionModel.measurement_gradients`; by layer where the loss is what is measured."""
        return self.loss_gradients(batch) if self._measures_loss else super().measurement_gradients(batch)

    @property
    def _measures_loss(self) -> bool:
        return type(self.objective).measurements is Objective.measurements

    def _layer_scores(self, factors: Tensor, batch: Batch) -> Iterator[LayerScores]:
        return layer_scores(self.risk, self.layout, self._prepared(factors), batch)

    def _prepared(self, factors: Tensor) -> QueryFactors:
        """The factors unit by unit; those of the last call are kept, since strips share them."""
        if self._queries is None or self._queries[0] is not factors:
            self._queries = factors, QueryFactors.of(self.risk, self.layout, factors, self.query_energy)
        return self._queries[1]

    def state_arrays(self) -> dict[str, Tensor]:
        """The layout and every unit's eigenvectors and eigenvalues."""
        arrays = {"layout": self.layout.to_tensor()}
        bases = (b for o in self._fitted().operators.values() if isinstance(o, KroneckerOperator) for b in o.bases)
        for basis in bases:
            name = basis.unit.parameters[0]
            arrays[f"{name}/values"] = basis.values
            arrays |= {
                f"{name}/{side}": t for side, t in (("left", basis.left), ("right", basis.right)) if t is not None
            }
        return arrays

    def restore(self, reducer: ChunkReducer, arrays: Mapping[str, Tensor], report: FitReport) -> Self:
        """The fitted state again, without a sum over the data."""
        self._layout, self._queries = LayerLayout.from_tensor(arrays["layout"]), None
        bases = [
            Eigenbasis(
                unit,
                arrays.get(f"{unit.parameters[0]}/left"),
                arrays.get(f"{unit.parameters[0]}/right"),
                arrays[f"{unit.parameters[0]}/values"],
            )
            for unit in self._layout.units
        ]
        operators, solvers = self._as_operators(bases), self._solvers(report.damping)
        states = {block: solvers[block].fit(operator) for block, operator in operators.items()}
        self._fit = Fitted(reducer, operators, solvers, states, report)
        return self

    def unbound(self) -> Self:
        """As `InfluenceFunctionModel.unbound`."""
        bare = super().unbound()
        bare._layout = bare._queries = None
        return bare


class _Inverse:
    """EKFAC with each block's own λ as a preconditioner of the matrix over all blocks."""

    def __init__(self, inverse: KroneckerInverse, damping: Mapping[str, float]) -> None:
        self._inverse = replace(inverse, order=None)
        self._damping = damping

    def fit(self, operator: CurvatureOperator, damping: float) -> Self:
        """Nothing to fit."""
        return self

    def apply(self, rows: Tensor) -> Tensor:
        """rows [k, p] · M⁻¹, with columns in the order of the blocks."""
        return self._inverse.inverse(rows, self._damping)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise SettingError(f"`{name}` must be one of {list(choices)}, got {value!r}. Choose one of these.")


def _in_words(unit: Unit) -> str:
    groups, rows, columns = unit.shape
    if unit.treatment in ("dense", "diagonal"):
        of = f" with {len(unit.parameters) - 1} others" if len(unit.parameters) > 1 else ""
        return f"{unit.treatment} block of {unit.size}{of}"
    of_groups = f"{groups} groups of " if groups > 1 else ""
    shared = f", used {len(unit.uses)} times" if len(unit.uses) > 1 else ""
    what = "Kronecker factors" if unit.treatment == "kronecker" else "factors of its gradients' moments"
    return f"{what} {of_groups}{rows}×{columns}{' with bias' if unit.has_bias else ''}{shared}"
