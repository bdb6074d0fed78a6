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
from distinfluence.errors import NotFittedError
from distinfluence.influence.checks import check_derivatives
from distinfluence.influence.damping import Regularization, RelativeDamping, damping_by_block, resolved
from distinfluence.influence.fitted import Curvature, Fitted
from distinfluence.influence.report import FitReport, SolveReport
from distinfluence.influence.scores import InfluenceMode, Tile, influence_mode
from distinfluence.influence.scoring import Scorer, trains_or_tests
from distinfluence.influence.self_influence import SelfInfluences, self_influences_by_factors
from distinfluence.influence.settings import check_exact, check_precision, checked_mode, common_settings
from distinfluence.model.batch import Batch, as_batch
from distinfluence.model.blocks import BlockMode, BlockStructure, ParameterBlocks
from distinfluence.model.gradients import SampleGradients
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

    Args:
        model: Any `nn.Module`. It is only read.
        loss: A torch loss of (outputs, targets), or an `Objective`.
        hessian_regularization: Damping λ added to the curvature of the mean loss: a number, a `RelativeDamping` rule,
            or a mapping block → number or rule.
        solver: Makes the solver from a `damping`. Its keywords are the hyperparameters that the user can set.
        block_structure: "full", "layer_wise", "parameter_wise" or a mapping block → parameter names. The curvature is
            block-diagonal.
        second_order_mode: "hessian", "ggn" or "empirical_fisher".

    Raises:
        SettingError: If a name is unknown or the damping is negative.
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
        self.second_order_mode = checked_mode(second_order_mode)
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
        return self.unbound().settings()

    def demand(self) -> Demand:
        """What a fit and a solve will need, before anything is computed: for plans."""
        # a dense Hessian is compared with products; the sketch of one, which may be indefinite, is seen from both sides
        looks = len(self.risk.blocks.names) * (2 if self.second_order_mode is SecondOrderMode.HESSIAN else 1)
        sizes = tuple(self.risk.blocks.sizes)
        return self._template.demand(Systems(sizes, self.risk.dtype.itemsize, looks, self.risk.device))

    def _common_settings(self) -> dict[str, object]:
        damping = None if self._fit is None and self._rules() else self.damping
        common = common_settings(self.second_order_mode, self.block_structure, self._asked, damping, self._autocast)
        return {"method": type(self).__name__} | common

    def _rules(self) -> list[str]:
        """The blocks whose damping is relative to the curvature."""
        return [block for block, value in self._asked.items() if isinstance(value, RelativeDamping)]

    @property
    def damping(self) -> dict[str, float]:
        """Block → λ. Raises NotFittedError for a rule that is not worked out before `fit`."""
        if self._fit is not None:
            return dict(self._fit.damping)
        if rules := self._rules():
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
        begun, curvature = (start, reducer.passes), self._curvature(reducer)
        solvers = self._solvers(resolved(self._asked, curvature.operators))
        self._fit = Fitted.of(self.risk, reducer, str(self.second_order_mode), curvature, solvers, begun)
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
        check_precision(dtype, self.risk.dtype)
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

    def _curvature(self, reducer: ChunkReducer, arrays: Mapping[str, Tensor] | None = None) -> Curvature:
        """The matrices of the blocks over the training data, and the scorer. arrays: `state_arrays` of a fit."""
        risk = EmpiricalRisk.over(reducer)
        operator = operator_class(self.second_order_mode)
        # one block over everything needs no restriction: its products are the whole matrix
        names = list(self.risk.blocks.names)
        operators = {block: operator(risk, block if len(names) > 1 else None) for block in names}
        return Curvature(operators, Scorer(self.risk))

    @property
    def _scorer(self) -> Scorer:
        return Scorer(self.risk) if self._fit is None else self._fit.scorer

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
        return self._fitted().kind_of_bound

    def self_influences(
        self, x: object, y: Tensor | None = None, *, rtol: float = 1e-3, maxiter: int = 500
    ) -> SelfInfluences:
        """Influence of each sample's training loss on itself, ⟨(A + λI)⁻¹ g, g⟩, with certified bounds: [n] each.

        By Gauss and Gauss–Radau quadrature, until the brackets are rtol wide, relative to the value; one pass over the
        training data for each step, whatever the method of this model. A memory of four rows [p] for each sample.
        Raises SettingError unless A + λI is known to be positive definite: for a Hessian, call `spectrum()` first.
        """
        check_exact(self._autocast)
        rows = self._by_block(self.loss_gradients(self.place(x, y)).rows)
        return self._fitted().self_influences(rows, rtol=rtol, maxiter=maxiter)

    def self_influences_by_solve(self, x: object, y: Tensor | None = None) -> SelfInfluences:
        """As `self_influences`, by this model's own solver: what it gives a training sample that is a test sample too.

        One solve for each sample. The bounds are those of its report, infinite where it has none. Memory: the
        gradients and factors [n, p], and what the solve takes.
        """
        gradients = self.loss_gradients(self.place(x, y))
        return self_influences_by_factors(gradients, *self.solve(gradients.rows))

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
        train, mode = trains_or_tests(x_test, y_test, x, y), influence_mode(mode)  # before anything is solved
        if mode is InfluenceMode.UP and self._is_factorless:
            tests = self.place(x_test, y_test)
            return self._between(tests, tests if x is None else self.place(x, y))
        factors = self.influence_factors(x_test, y_test)
        return self.influences_from_factors(factors, *train, mode)

    @property
    def _is_factorless(self) -> bool:
        """Whether `_between` gives influences with less work than factors take."""
        return False

    def _between(self, tests: Batch, trains: Batch) -> Tensor:
        """Influences [n_test, n_train] of placed samples, without factors."""
        raise NotImplementedError

    def influences_by_block(
        self,
        x_test: object,
        y_test: Tensor | None = None,
        x: object | None = None,
        y: Tensor | None = None,
        mode: InfluenceMode | str = InfluenceMode.UP,
    ) -> "OrderedDict[str, Tensor]":
        """As `influences`, block by block; they sum to it."""
        train, mode = trains_or_tests(x_test, y_test, x, y), influence_mode(mode)  # before anything is solved
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
        train, mode = trains_or_tests(x_test, y_test, x, y), influence_mode(mode)
        gradients = self.measurement_gradients(self.place(x_test, y_test)).rows
        factors = [factors for factors, _ in self.solve_at(gradients, dampings)]
        together = self.influences_from_factors(torch.cat(factors), *train, mode)
        stacked: Tensor = together.unflatten(0, (len(factors), gradients.shape[0]))
        return stacked

    def influences_from_factors(
        self, factors: Tensor, x: object, y: Tensor | None = None, mode: InfluenceMode | str = InfluenceMode.UP
    ) -> Tensor:
        """Influence of training samples on the test points of these factors [n_test, p]; shapes as `influences`."""
        return self._scorer.scores(self._scorer.checked(factors), self.place(x, y), mode)

    def influences_from_factors_by_block(
        self,
        factors: Mapping[str, Tensor],
        x: object,
        y: Tensor | None = None,
        mode: InfluenceMode | str = InfluenceMode.UP,
    ) -> "OrderedDict[str, Tensor]":
        """As `influences_from_factors`, from block → [n_test, p_block], block by block."""
        return self._scorer.by_block(self._scorer.joined(factors), self.place(x, y), mode)

    def tile(self, factors: Tensor, batch: Batch, mode: InfluenceMode | str = InfluenceMode.UP) -> Tile:
        """Influences of a batch of training samples, with their losses and gradient norms; one gradient pass.

        factors: [n_test, p]; batch: as `place` returns it.
        """
        return self._scorer.tile(factors, batch, mode)

    def loss_gradients(self, batch: Batch) -> SampleGradients:
        """Gradient of each sample's training loss, [n, p], and the losses; batch as `place` returns it."""
        return self._scorer.loss_gradients(batch)

    def measurement_gradients(self, batch: Batch) -> SampleGradients:
        """Gradient of each sample's measurement, [n, p], and the measurements; batch as `place` returns it."""
        return self._scorer.measurement_gradients(batch)

    def place(self, x: object, y: Tensor | None = None) -> Batch:
        """(x, y), or x alone where it is the whole batch, checked and on the model's device.

        Raises ModelModeError if the model has been put in train mode since `fit`, NotFittedError if its parameters have
        been written to.
        """
        check_mode(self.risk.module)
        self.risk.check_unchanged()
        return self.risk.place(as_batch(x if y is None else (x, y)))

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
        self._fit = Fitted.restored(reducer, self._curvature(reducer, arrays), solvers, arrays, report)
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
