"""The influence model: risk + blocks + curvature + solver behind one interface.

    I[i, j] = ⟨ (A + λI)⁻¹ ∇θ m(z_test_i), ∇θ ℓ(z_train_j) ⟩

Rows are test points, columns training points; positive: the training point helps. The interface is the one that pyDVL
published for its influence models (`fit`, `influence_factors`, `influences`, `influences_from_factors`).
"""

import copy
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor, nn

from distinfluence.curvature import CurvatureOperator, SecondOrderMode, operator_class
from distinfluence.errors import NotFittedError, SettingError, ShapeError
from distinfluence.influence.checks import check_derivatives
from distinfluence.influence.damping import Regularization, RelativeDamping, damping_by_block, resolved
from distinfluence.influence.fitted import Fitted
from distinfluence.influence.report import FitReport, SolveReport
from distinfluence.influence.scores import InfluenceMode, Tile, influence_mode, scores_by_block, tile_of
from distinfluence.influence.self_influence import SelfInfluences, self_influences_of
from distinfluence.model.batch import Batch, as_batch
from distinfluence.model.blocks import BlockMode, BlockStructure, ParameterBlocks
from distinfluence.model.gradients import SampleGradients, loss_gradients, measurement_gradients
from distinfluence.model.identity.probe import Checked
from distinfluence.model.objective import Loss, Objective, as_objective
from distinfluence.model.reducer import ChunkReducer, LocalReducer
from distinfluence.model.risk import EmpiricalRisk
from distinfluence.model.sample_risk import SampleRisk
from distinfluence.model.untouched import check_mode
from distinfluence.solvers.base import Solver
from distinfluence.solvers.demand import Demand, Systems
from distinfluence.solvers.spectrum import Extremes


class InfluenceFunctionModel:
    """Influence of training points on test points, for one model, loss and curvature.

    model: any `nn.Module`; read only. loss: a torch loss of (outputs, targets), or an `Objective`.
    hessian_regularization: damping λ added to the curvature of the mean loss: a number, a `RelativeDamping` rule, or a
    mapping block → number or rule. block_structure: "full", "layer_wise", "parameter_wise" or a mapping block →
    parameter names; the curvature is taken block-diagonal. second_order_mode: "hessian", "ggn" or "empirical_fisher".

    solver: makes the solver of each block from a `damping`, with the hyperparameters that the user can set as keywords.

    Raises SettingError for an unknown name or a negative damping, and what
    `ParameterBlocks.of` and `SampleRisk` raise for a model that cannot be used.
    """

    is_thread_safe = False
    brackets_self_influence = True  # whether `self_influences` has bounds on the curvature's own values
    _autocast: torch.dtype | None = None  # what the model's passes run in, if not in the risk's own dtype

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | Objective,
        hessian_regularization: Regularization,
        solver: partial[Any],
        *,
        block_structure: BlockStructure = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
    ) -> None:
        self._template: Solver[Any] = solver(damping=1.0)  # its checks of the settings, before anything is computed
        self._hyperparameters = tuple(solver.keywords)  # those of the template that the user can set
        self.objective = as_objective(loss)
        self.objective_settings = self.objective.settings()  # as it is now: a loss may count its calls
        self.second_order_mode = _second_order_mode(second_order_mode)
        self.block_structure = block_structure
        self.hessian_regularization = hessian_regularization
        self._fit: Fitted | None = None
        self._risk: SampleRisk | None = None
        self._bind(model)

    def _bind(self, model: nn.Module, device: torch.device | None = None) -> None:
        blocks = ParameterBlocks.of(model, self.block_structure)
        self._asked = damping_by_block(blocks, self.hessian_regularization)
        self._risk = SampleRisk(model, self.objective, blocks, device, autocast=self._autocast)

    def solver(self, damping: float) -> Solver[Any]:
        """Return the solver for this damping."""
        return self._template.at(damping)

    def block_solver(self, block: str, damping: float) -> Solver[Any]:
        """Return the solver of a block."""
        return self.solver(damping)

    @property
    def solves_over_data(self) -> bool:
        """Whether a solve sweeps over the training data."""
        return self._template.solves_over_data

    def settings(self) -> dict[str, object]:
        """What fixes the numbers besides model, loss and data, in JSON's types: for provenance and fingerprints."""
        return self._common_settings() | {name: getattr(self._template, name) for name in self._hyperparameters}

    def asked_settings(self) -> dict[str, object]:
        """As `settings`, with the damping as it was asked for: the same before and after a fit."""
        bare = copy.copy(self)
        bare._fit = None
        return bare.settings()

    def demand(self) -> Demand:
        """What a fit and a solve will need, before anything is computed: for plans."""
        # a dense Hessian is compared with products; the sketch of one, which may be indefinite, is seen from both sides
        looks = len(self.risk.blocks.names) * (2 if self.second_order_mode is SecondOrderMode.HESSIAN else 1)
        sizes = tuple(self.risk.blocks.sizes)
        return self._template.demand(Systems(sizes, self.risk.dtype.itemsize, looks, self.risk.device))

    def _common_settings(self) -> dict[str, object]:
        structure = self.block_structure
        rules = {block: str(rule) for block, rule in self._asked.items() if isinstance(rule, RelativeDamping)}
        common: dict[str, object] = {
            "method": type(self).__name__,
            "second_order_mode": str(self.second_order_mode),
            "block_structure": {k: list(v) for k, v in structure.items()}
            if isinstance(structure, Mapping)
            else structure,
            "hessian_regularization": self.damping if self.is_fitted or not rules else rules,
        }
        mixed = {} if self._autocast is None else {"mixed_precision": str(self._autocast).removeprefix("torch.")}
        return common | mixed | ({"damping_rule": rules} if rules else {})

    @property
    def damping(self) -> dict[str, float]:
        """Block → λ. Raises NotFittedError for a rule that is not worked out before `fit`."""
        if self._fit is not None:
            return dict(self._fit.damping)
        rules = [block for block, value in self._asked.items() if isinstance(value, RelativeDamping)]
        if rules:
            raise NotFittedError(f"`damping` of {rules} is relative to the curvature. Call `fit(data)` first.")
        return resolved(self._asked, {})

    @property
    def risk(self) -> SampleRisk:
        """The risk of single samples that this model differentiates."""
        if self._risk is None:
            raise NotFittedError("This influence model is without its `model`. Call `bound_to(model)` first.")
        return self._risk

    @property
    def n_parameters(self) -> int:
        """p, the number of covered parameters."""
        return self.risk.size

    @property
    def is_fitted(self) -> bool:
        """Whether `fit` has been called."""
        return self._fit is not None

    @property
    def fit_report(self) -> FitReport:
        """What the fit covered. Raises NotFittedError before `fit`."""
        return self._fitted().report

    @property
    def reducer(self) -> ChunkReducer:
        """The training data that the model was fitted to. Raises NotFittedError before `fit`."""
        return self._fitted().reducer

    @property
    def operators(self) -> Mapping[str, CurvatureOperator]:
        """Block → the curvature A of the block, without damping. Raises NotFittedError before `fit`."""
        return self._fitted().operators

    def exact_systems(self) -> dict[str, tuple[CurvatureOperator, float, slice]]:
        """What factors are compared with by `verify`: block → (A, λ, columns) of the systems (A + λI) x = g."""
        columns = self.risk.blocks.columns
        return {block: (self.operators[block], self.damping[block], columns[block]) for block in self.operators}

    def _fitted(self) -> Fitted:
        if self._fit is None:
            raise NotFittedError(f"`{type(self).__name__}` has not been fitted. Call `fit(data)` first.")
        return self._fit

    def fit(self, data: object) -> Self:
        """Do the work that needs no test point; returns the influence model itself.

        data: the training set as a DataLoader, a list of batches, one (x, y) pair, or a `ChunkReducer`.
        Raises EmptyDataError, NonFiniteError, LossError, DtypeError for data or losses that cannot be used.
        """
        start = time.perf_counter()
        if isinstance(data, ChunkReducer):
            reducer = data
        else:
            self._bind(self.risk.module, self.risk.device)  # buffers and mode as they are now
            reducer = LocalReducer(self.risk, data)
        if reducer.drawn and (reducer.checked is None or reducer.checked.products != self._products):
            reducer.checked = self.check(reducer.drawn)
            reducer.remarks = tuple(dict.fromkeys((*reducer.remarks, *reducer.checked.remarks)))
        begun, operators = (start, reducer.passes), self._operators(reducer)
        solvers = self._solvers(resolved(self._asked, operators))
        self._fit = Fitted.of(self.risk, reducer, str(self.second_order_mode), operators, solvers, begun)
        return self

    def check(self, drawn: Sequence[Batch]) -> Checked:
        """Check the derivatives that a fit will use, at samples from all over its data; see `influence.checks`."""
        return check_derivatives(self.risk, drawn, self._products)

    @property
    def _products(self) -> SecondOrderMode | None:
        """The matrix whose products with rows the fit or the solves will use."""
        return self.second_order_mode

    def _solvers(self, damping: Mapping[str, float]) -> dict[str, Solver[Any]]:
        return {block: self.block_solver(block, value) for block, value in damping.items()}

    def with_damping(self, hessian_regularization: Regularization) -> Self:
        """A copy with another damping and the same fit: no products where the method's mathematics allow it.

        Direct, Arnoldi, Nyström and Krylov models re-use everything, preconditioners that can do so too.
        """
        fitted = self._fitted()
        other = copy.copy(self)
        other.hessian_regularization = hessian_regularization
        other._asked = damping_by_block(self.risk.blocks, hessian_regularization)
        other._fit = fitted.adapted(other._solvers(resolved(other._asked, fitted.operators)))
        return other

    def in_mixed_precision(self, dtype: torch.dtype = torch.bfloat16) -> Self:
        """A copy, not fitted, whose passes through the model run in bfloat16 or float16 where torch's autocast does so.

        Parameters, losses, gradients and all sums stay in float32, so do the solver and the scores' products. Scores
        then have about two digits; no error bounds are given, since those know nothing of the passes' rounding. Faster
        on GPUs with matrix units for these types, slower on most CPUs. Raises SettingError for another dtype.
        """
        if dtype not in (torch.bfloat16, torch.float16):
            raise SettingError(
                f"`dtype` of mixed precision must be torch.bfloat16 or torch.float16, got {dtype}. Take bfloat16: its "
                "range is float32's."
            )
        if self.risk.dtype != torch.float32:
            raise SettingError(
                f"mixed precision is for a `model` that is evaluated in float32, got {self.risk.dtype}. Convert it, or "
                "leave mixed precision out."
            )
        other = self.unbound()
        other._autocast = dtype
        other._bind(self.risk.module, self.risk.device)
        return other

    def spectrum(self) -> dict[str, Extremes]:
        """Both ends of the spectrum of A, block by block, by Lanczos: 5 to 40 passes of 4 rows, once.

        From then on, solve reports of an A that is not positive semi-definite by what it is carry error bounds as well
        (heuristic ones), and `fit_report` says whether A + λI is positive definite.
        """
        self._fit = self._fitted().with_spectrum()
        return dict(self._fit.report.spectrum)

    def _operators(self, reducer: ChunkReducer) -> dict[str, CurvatureOperator]:
        risk = EmpiricalRisk.over(reducer)
        operator = operator_class(self.second_order_mode)
        # one block over everything needs no restriction: its products are the whole matrix
        names = list(self.risk.blocks.names)
        return {block: operator(risk, block if len(names) > 1 else None) for block in names}

    @overload
    def influence_factors(
        self, x: object, y: Tensor | None = ..., *, return_report: Literal[False] = ...
    ) -> Tensor: ...
    @overload
    def influence_factors(
        self, x: object, y: Tensor | None = ..., *, return_report: Literal[True]
    ) -> tuple[Tensor, SolveReport]: ...
    def influence_factors(
        self, x: object, y: Tensor | None = None, *, return_report: bool = False
    ) -> Tensor | tuple[Tensor, SolveReport]:
        """(A + λI)⁻¹ ∇θ m for each test sample: [n_test, p], and how far each row got if asked.

        x, y: inputs and targets [n_test, ...]; or a whole batch (tuple, dict) as x alone.
        """
        gradients = self.measurement_gradients(self.place(x, y))
        factors, report = self.solve(gradients.rows)
        return (factors, report) if return_report else factors

    def influence_factors_by_block(self, x: object, y: Tensor | None = None) -> "OrderedDict[str, Tensor]":
        """The factors of each block: block → [n_test, p_block]."""
        factors = self.influence_factors(x, y)
        return OrderedDict((block, factors[:, columns]) for block, columns in self.risk.blocks.columns.items())

    def solve(self, gradients: Tensor) -> tuple[Tensor, SolveReport]:
        """(A + λI)⁻¹ applied to each row: gradients [k, p] → factors [k, p] and how far each row got."""
        return self._fitted().solve(self._by_block(gradients))

    def solve_at(self, gradients: Tensor, dampings: Sequence[Regularization]) -> list[tuple[Tensor, SolveReport]]:
        """As `solve`, for each of several dampings from the one fit; methods that can share their work between them."""
        fitted, blocks = self._fitted(), self.risk.blocks
        asked = [resolved(damping_by_block(blocks, damping), fitted.operators) for damping in dampings]
        return fitted.solve_at(self._by_block(gradients), asked)

    def _by_block(self, gradients: Tensor) -> dict[str, Tensor]:
        return {block: gradients[:, columns].contiguous() for block, columns in self.risk.blocks.columns.items()}

    @property
    def kind_of_bound(self) -> str:
        """ "rigorous", "heuristic" or "none": what error bounds the solves of this fit carry."""
        fitted = self._fitted()
        bounds = fitted.lower_bounds(fitted.damping).values()
        if any(bound is None for bound in bounds):
            return "none"
        return "rigorous" if all(bound is not None and bound.rigorous for bound in bounds) else "heuristic"

    def self_influences(
        self, x: object, y: Tensor | None = None, *, rtol: float = 1e-3, maxiter: int = 500
    ) -> SelfInfluences:
        """Influence of each sample's training loss on itself, ⟨(A + λI)⁻¹ g, g⟩, with certified bounds: [n] each.

        By Gauss and Gauss–Radau quadrature, until the brackets are rtol wide, relative to the value; one pass over the
        training data for each step, whatever the method of this model. A memory of four rows [p] for each sample.
        Raises SettingError unless A + λI is known to be positive definite: for a Hessian, call `spectrum()` first.
        """
        if self._autocast is not None:
            raise SettingError(
                "`self_influences` brackets values by products that must be exact to rounding; this `model` runs in "
                "mixed precision. Make the influence model without it."
            )
        gradients = self.loss_gradients(self.place(x, y)).rows
        fitted = self._fitted()
        bounds = fitted.lower_bounds(fitted.damping)
        return self_influences_of(
            self._by_block(gradients), fitted.operators, fitted.damping, bounds, rtol=rtol, maxiter=maxiter
        )

    def self_influences_by_solve(self, x: object, y: Tensor | None = None) -> SelfInfluences:
        """As `self_influences`, by this model's own solver: what it gives a training sample that is a test sample too.

        One solve for each sample. The bounds are those of its report, infinite where it has none. Memory: the
        gradients and factors [n, p], and what the solve takes.
        """
        gradients = self.loss_gradients(self.place(x, y))
        factors, report = self.solve(gradients.rows)
        pairs = zip(factors, gradients.rows, strict=True)
        values = torch.stack([torch.dot(own.double(), g.double()) for own, g in pairs]).cpu()
        bound = (
            torch.full_like(values, torch.inf)
            if report.error_bound is None
            else report.error_bound.nan_to_num(nan=torch.inf)
        )
        half = bound * gradients.norms.double().cpu()
        return SelfInfluences(values, values - half, values + half, report.iterations, report.rigorous)

    def influences(
        self,
        x_test: object,
        y_test: Tensor | None = None,
        x: object | None = None,
        y: Tensor | None = None,
        mode: InfluenceMode | str = InfluenceMode.UP,
    ) -> Tensor:
        """Influence of each training sample on each test sample.

        x_test, y_test: test samples; x, y: training samples, the test samples themselves if left out. mode "up":
        [n_test, n_train]; "perturbation": [n_test, n_train, *input], the derivative by the training input.
        """
        train, mode = _or_tests(x_test, y_test, x, y), influence_mode(mode)  # before anything is solved
        factors = self.influence_factors(x_test, y_test)
        return self.influences_from_factors(factors, *train, mode)

    def influences_by_block(
        self,
        x_test: object,
        y_test: Tensor | None = None,
        x: object | None = None,
        y: Tensor | None = None,
        mode: InfluenceMode | str = InfluenceMode.UP,
    ) -> "OrderedDict[str, Tensor]":
        """As `influences`, block by block; they sum to it."""
        train, mode = _or_tests(x_test, y_test, x, y), influence_mode(mode)  # before anything is solved
        factors = self.influence_factors_by_block(x_test, y_test)
        return self.influences_from_factors_by_block(factors, *train, mode)

    def influences_at(
        self,
        dampings: Sequence[Regularization],
        x_test: object,
        y_test: Tensor | None = None,
        x: object | None = None,
        y: Tensor | None = None,
        mode: InfluenceMode | str = InfluenceMode.UP,
    ) -> Tensor:
        """As `influences`, for several dampings at once: [n_damping, n_test, n_train, ...].

        One fit and one set of gradients serve them all.
        """
        train, mode = _or_tests(x_test, y_test, x, y), influence_mode(mode)
        gradients = self.measurement_gradients(self.place(x_test, y_test)).rows
        factors = [factors for factors, _ in self.solve_at(gradients, dampings)]
        together = self.influences_from_factors(torch.cat(factors), *train, mode)
        stacked: Tensor = together.unflatten(0, (len(factors), gradients.shape[0]))
        return stacked

    def influences_from_factors(
        self, factors: Tensor, x: object, y: Tensor | None = None, mode: InfluenceMode | str = InfluenceMode.UP
    ) -> Tensor:
        """Influence of training samples on the test points of these factors [n_test, p]; shapes as `influences`."""
        columns = slice(0, self.n_parameters)
        rows, batch = self._check_factors(factors, columns), self.place(x, y)
        if influence_mode(mode) is InfluenceMode.UP:
            return tile_of(self.risk, rows, batch).values
        return scores_by_block(self.risk, rows, {"": columns}, batch, mode)[""]

    def influences_from_factors_by_block(
        self,
        factors: Mapping[str, Tensor],
        x: object,
        y: Tensor | None = None,
        mode: InfluenceMode | str = InfluenceMode.UP,
    ) -> "OrderedDict[str, Tensor]":
        """As `influences_from_factors`, from block → [n_test, p_block], block by block."""
        rows = self._rows_of_blocks(factors)
        return scores_by_block(self.risk, rows, self.risk.blocks.columns, self.place(x, y), mode)

    def _rows_of_blocks(self, factors: Mapping[str, Tensor]) -> Tensor:
        """block → [n_test, p_block], checked, side by side."""
        blocks = self.risk.blocks
        if list(factors) != list(blocks.names):
            raise ShapeError(
                f"`factors` must have the blocks {list(blocks.names)}, got {list(factors)}. "
                "Pass what `influence_factors_by_block` returned."
            )
        return torch.cat([self._check_factors(factors[b], columns) for b, columns in blocks.columns.items()], dim=1)

    def tile(self, factors: Tensor, batch: Batch, mode: InfluenceMode | str = InfluenceMode.UP) -> Tile:
        """Influences of a batch of training samples, with their losses and gradient norms; one gradient pass.

        factors: [n_test, p]; batch: as `place` returns it.
        """
        return tile_of(self.risk, factors, batch, mode)

    def loss_gradients(self, batch: Batch) -> SampleGradients:
        """Gradient of each sample's training loss, [n, p], and the losses; batch as `place` returns it."""
        return loss_gradients(self.risk, batch)

    def measurement_gradients(self, batch: Batch) -> SampleGradients:
        """Gradient of each sample's measurement, [n, p], and the measurements; batch as `place` returns it."""
        return measurement_gradients(self.risk, batch)

    def place(self, x: object, y: Tensor | None = None) -> Batch:
        """(x, y), or x alone where it is the whole batch, checked and on the model's device.

        Raises ModelModeError if the model has been put in train mode since `fit`, NotFittedError if its parameters have
        been written to.
        """
        check_mode(self.risk.module)
        self.risk.check_unchanged()
        return self.risk.place(as_batch(x if y is None else (x, y)))

    def _check_factors(self, factors: Tensor, columns: slice) -> Tensor:
        size = columns.stop - columns.start
        if factors.ndim != 2 or factors.shape[1] != size:
            raise ShapeError(
                f"`factors` must be [n_test, {size}], got {tuple(factors.shape)}. "
                "Pass what `influence_factors` returned."
            )
        return factors.to(self.risk.device, self.risk.dtype)

    def to(self, device: torch.device | str) -> Self:
        """Compute on another device from now on, with the fitted state; the user's model stays where it is."""
        device = torch.device(device)
        arrays = {name: tensor.to(device) for name, tensor in self.state_arrays().items()} if self.is_fitted else {}
        self._risk = self.risk.to(device)
        if self._fit is not None:
            self.restore(self._fit.reducer.to(self._risk), arrays, self._fit.report)
        return self

    def state_arrays(self) -> dict[str, Tensor]:
        """What of the fitted state must be kept to `restore` it elsewhere: "block/array" → tensor."""
        return self._fitted().arrays()

    def restore(self, reducer: ChunkReducer, arrays: Mapping[str, Tensor], report: FitReport) -> Self:
        """The fitted state again from `state_arrays`, from a reducer over the same data, without the work of `fit`."""
        solvers = self._solvers(report.damping)
        self._fit = Fitted.restored(reducer, self._operators(reducer), solvers, arrays, report)
        return self

    def unbound(self) -> Self:
        """A copy of the settings without the model and the fitted state: small, and free to travel."""
        bare = copy.copy(self)
        bare._fit = None
        bare._risk = None
        return bare

    def bound_to(self, model: nn.Module, device: torch.device | None = None) -> Self:
        """A copy of the settings for this model, not fitted."""
        other = self.unbound()
        other._bind(model, device)
        return other


def _second_order_mode(mode: SecondOrderMode | str) -> SecondOrderMode:
    try:
        return SecondOrderMode(mode)
    except ValueError:
        raise SettingError(
            f"`second_order_mode` must be one of {[m.value for m in SecondOrderMode]}, got {mode!r}. "
            "Choose one of these."
        ) from None


def _or_tests(
    x_test: object, y_test: Tensor | None, x: object | None, y: Tensor | None
) -> tuple[object, Tensor | None]:
    """The training samples, the test samples if left out. Raises SettingError for targets without inputs."""
    if x is not None:
        return x, y
    if y is not None:
        raise SettingError("`x` must come with `y`, got `y` alone. Pass both, or neither for the test samples.")
    return x_test, y_test
