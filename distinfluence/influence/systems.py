"""What an influence model solves: the systems (A + λI) x = g of a model and a loss, block by block.

They are made by a fit, solved for rows, moved between devices, and kept without the model.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from distinfluence.curvature import CurvatureOperator, SecondOrderMode, operator_class
from distinfluence.errors import NotFittedError
from distinfluence.influence.checks.derivatives import check_derivatives
from distinfluence.influence.damping import Regularization, RelativeDamping, damping_by_block, resolved
from distinfluence.influence.fitted import Curvature, Fitted
from distinfluence.influence.report import FitReport, SolveReport
from distinfluence.influence.scores import Scorer
from distinfluence.influence.settings import check_precision, checked_mode, common_settings
from distinfluence.model.batch import Batch
from distinfluence.model.blocks import BlockMode, BlockStructure, ParameterBlocks
from distinfluence.model.data.door import whole
from distinfluence.model.identity.probe import Checked
from distinfluence.model.objective import Loss, Objective, as_objective
from distinfluence.model.reducer import ChunkReducer, LocalReducer, Unread
from distinfluence.model.risk import EmpiricalRisk, forward_flops
from distinfluence.model.sample_risk import SampleRisk
from distinfluence.model.untouched import check_mode
from distinfluence.solvers.base import Solver
from distinfluence.solvers.demand import USUAL_SAMPLES, Demand, System, Systems
from distinfluence.solvers.spectrum import Extremes


class CurvatureSystems:
    """The systems (A + λI) x = g of a model and a loss; arguments as for `InfluenceFunctionModel`."""

    is_thread_safe = False
    _autocast: torch.dtype | None = None  # what the model's passes run in, if not in the risk's own dtype

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | Objective,
        hessian_regularization: Regularization,
        solver: partial[Any],
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

    def _bind(self, model: nn.Module, device: torch.device | None = None, *, timed: bool = False) -> None:
        blocks = ParameterBlocks.of(model, self.block_structure)
        self._asked = damping_by_block(blocks, self.hessian_regularization)
        self._risk = SampleRisk(model, self.objective, blocks, device, autocast=self._autocast, timed=timed)

    def solver(self, damping: float) -> Solver[Any]:
        """Return the solver for this damping.

        Args:
            damping: The damping λ.

        Returns:
            The solver.
        """
        return self._template.at(damping)

    def block_solver(self, block: str, damping: float) -> Solver[Any]:
        """Return the solver of a block.

        Args:
            block: The name of the block.
            damping: The damping λ of the block.

        Returns:
            The solver.
        """
        return self.solver(damping)

    @property
    def solves_over_data(self) -> bool:
        """Whether a solve sweeps over the training data."""
        return self._template.solves_over_data

    def settings(self) -> dict[str, object]:
        """Return what fixes the numbers besides model, loss and data, for provenance and fingerprints.

        Returns:
            Name → value, in JSON's types.
        """
        return self._common_settings() | {name: getattr(self._template, name) for name in self._hyperparameters}

    def asked_settings(self) -> dict[str, object]:
        """Return `settings` with the damping as it was asked for: the same before and after a fit.

        Returns:
            Name → value, in JSON's types.
        """
        return self.unbound().settings()

    def demand(self, n_samples: int = USUAL_SAMPLES, sample_flops: float = 0.0) -> Demand:
        """Return what a fit and a solve will need, before anything is computed.

        Args:
            n_samples: The samples of the fit.
            sample_flops: The flops of the model's outputs for one sample; 0 if they were not counted.

        Returns:
            Bytes, passes over the training data, and other work.
        """
        blocks = tuple(System.of(o) for o in self._operators(Unread(self.risk, n_samples, sample_flops)).values())
        risk, n_solved = self.risk, 1 if self._template.makes_matrix else len(blocks)
        demand = self._demand(Systems(blocks, risk.dtype, risk.device, tuple(risk.blocks.shapes.values())))
        return replace(demand, solve=replace(demand.solve, blocks=n_solved))

    def _demand(self, systems: Systems) -> Demand:
        return self._template.demand(systems)

    def _common_settings(self) -> dict[str, object]:
        damping = None if self._fit is None and self._rules() else self.damping
        common = common_settings(self.second_order_mode, self.block_structure, self._asked, damping, self._autocast)
        return {"method": type(self).__name__} | common

    def _rules(self) -> list[str]:
        """Return the blocks whose damping is relative to the curvature."""
        return [block for block, value in self._asked.items() if isinstance(value, RelativeDamping)]

    @property
    def damping(self) -> dict[str, float]:
        """Block → λ.

        Raises:
            NotFittedError: If a rule relative to the curvature is not worked out before `fit`.
        """
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
        """Return the systems that `verify` compares factors with.

        Returns:
            Name → (A, λ, columns) of each system (A + λI) x = g.
        """
        return self._fitted().exact_systems(self.risk.blocks.columns)

    def _fitted(self) -> Fitted:
        if self._fit is None:
            raise NotFittedError(f"`{type(self).__name__}` has not been fitted. Call `fit(data)` first.")
        return self._fit

    def fit(self, data: object) -> Self:
        """Do the work that needs no test point.

        Args:
            data: The training set: arrays as one (x, y) pair or a dict, a data set, a DataLoader, a list of samples or
                batches, or a `ChunkReducer`.

        Returns:
            The influence model itself.

        Raises:
            EmptyDataError: If there are no samples.
            NonFiniteError: If losses or derivatives are NaN or infinite.
            LossError: If the loss is not one of single samples.
            DtypeError: If the data have a type that cannot be used.
        """
        start = time.perf_counter()
        reducer = self.reducer_of(data)
        if reducer.drawn and (reducer.checked is None or reducer.checked.products != self._products):
            reducer.checked = self.check(reducer.drawn)
            reducer.remarks = tuple(dict.fromkeys((*reducer.remarks, *reducer.checked.remarks)))
        if not reducer.sample_flops and reducer.drawn:
            reducer.sample_flops = forward_flops(self.risk, reducer.drawn[0])
        begun, curvature = (start, reducer.passes), self._curvature(reducer)
        solvers = self._solvers(resolved(self._asked, curvature.operators))
        self._fit = Fitted.of(self.risk, reducer, str(self.second_order_mode), curvature, solvers, begun)
        return self

    def reducer_of(self, data: object) -> ChunkReducer:
        """Return a training set as a reducer: in this process, with the model's buffers and mode as they are now.

        Args:
            data: The training set, as for `fit`; a `ChunkReducer` is returned as it is.

        Returns:
            The reducer.
        """
        if isinstance(data, ChunkReducer):
            return data
        self._bind(self.risk.module, self.risk.device, timed=True)  # one process does all of every sum
        return LocalReducer(self.risk, data)

    def check(self, drawn: Sequence[Batch]) -> Checked:
        """Check the derivatives that a fit will use; see `influence.checks`.

        Args:
            drawn: Samples from all over the data of the fit, in batches.

        Returns:
            What was checked.
        """
        return check_derivatives(self.risk, drawn, self._products)

    @property
    def _products(self) -> SecondOrderMode | None:
        """The matrix whose products with rows the fit or the solves will use."""
        return None if self._template.makes_matrix and not self.solves_over_data else self.second_order_mode

    def _solvers(self, damping: Mapping[str, float]) -> dict[str, Solver[Any]]:
        return {block: self.block_solver(block, value) for block, value in damping.items()}

    def with_damping(self, hessian_regularization: Regularization) -> Self:
        """Return a copy with another damping and the same fit, without products where the mathematics allow it.

        Direct, Arnoldi, Nyström and Krylov models re-use everything. Preconditioners that can do so re-use everything
        too.

        Args:
            hessian_regularization: The damping, as for the model itself.

        Returns:
            The copy.

        Raises:
            NotFittedError: If the model is not fitted.
        """
        fitted = self._fitted()
        other = copy.copy(self)
        other.hessian_regularization = hessian_regularization
        other._asked = damping_by_block(self.risk.blocks, hessian_regularization)
        other._fit = fitted.adapted(other._solvers(resolved(other._asked, fitted.operators)))
        return other

    def in_mixed_precision(self, dtype: torch.dtype = torch.bfloat16) -> Self:
        """Return a copy, not fitted, whose passes through the model run in a narrow dtype where torch's autocast does
        so.

        Parameters, losses, gradients and all sums stay in float32. So do the solver and the products of the scores.
        Scores then have about two digits. No error bounds are given, since they know nothing of the passes' rounding.
        Faster on GPUs with matrix units for these types, slower on most CPUs.

        Args:
            dtype: torch.bfloat16 or torch.float16.

        Returns:
            The copy.

        Raises:
            SettingError: If the dtype is another, or the model is not evaluated in float32.
        """
        check_precision(dtype, self.risk.dtype)
        other = self.unbound()
        other._autocast = dtype
        other._bind(self.risk.module, self.risk.device)
        return other

    def spectrum(self) -> dict[str, Extremes]:
        """Find both ends of the spectrum of A, block by block, by Lanczos: 5 to 40 passes of 4 rows, once.

        From then on, solve reports carry (heuristic) error bounds also for an A that is not positive semi-definite by
        construction, and `fit_report` says whether A + λI is positive definite.

        Returns:
            Block → ends of the spectrum.

        Raises:
            NotFittedError: If the model is not fitted.
        """
        self._fit = self._fitted().with_spectrum()
        return dict(self._fit.report.spectrum)

    def _curvature(self, reducer: ChunkReducer, arrays: Mapping[str, Tensor] | None = None) -> Curvature:
        """Return the blocks' matrices over the training data, and the scorer. arrays: `state_arrays` of a fit."""
        return Curvature(self._operators(reducer), Scorer(self.risk))

    def _operators(self, reducer: ChunkReducer) -> dict[str, CurvatureOperator]:
        risk = EmpiricalRisk.over(reducer)
        operator = operator_class(self.second_order_mode)
        # one block over everything needs no restriction: its products are the whole matrix
        names = list(self.risk.blocks.names)
        return {block: operator(risk, block if len(names) > 1 else None) for block in names}

    def solve(self, gradients: Tensor) -> tuple[Tensor, SolveReport]:
        """Apply (A + λI)⁻¹ to each row.

        Args:
            gradients: The right-hand sides, [k, p].

        Returns:
            The factors [k, p] and how far each row got.

        Raises:
            NotFittedError: If the model is not fitted.
        """
        return self._fitted().solve(self._by_block(gradients))

    def solve_at(self, gradients: Tensor, dampings: Sequence[Regularization]) -> list[tuple[Tensor, SolveReport]]:
        """Solve for several dampings from one fit; methods that can do so share their work between them.

        Args:
            gradients: The right-hand sides, [k, p].
            dampings: The dampings, each as for the model itself.

        Returns:
            What `solve` returns, for each damping.
        """
        fitted, blocks = self._fitted(), self.risk.blocks
        asked = [resolved(damping_by_block(blocks, damping), fitted.operators) for damping in dampings]
        return fitted.solve_at(self._by_block(gradients), asked)

    def _by_block(self, gradients: Tensor) -> dict[str, Tensor]:
        return {block: gradients[:, columns].contiguous() for block, columns in self.risk.blocks.columns.items()}

    @property
    def kind_of_bound(self) -> str:
        """ "rigorous", "heuristic" or "none": what error bounds the solves of this fit carry."""
        return self._fitted().kind_of_bound

    def place(self, x: object, y: object | None = None) -> Batch:
        """Check a batch and move it to the model's device.

        Args:
            x: The inputs [n, ...], or data that have the targets, as for `fit`.
            y: The targets [n, ...]; None where `x` has them.

        Returns:
            The batch: (x, y), or x alone where it is the whole batch.

        Raises:
            ModelModeError: If the model has been put in train mode since `fit`.
            NotFittedError: If the model's parameters have been written to since `fit`.
        """
        check_mode(self.risk.module)
        self.risk.check_unchanged()
        return self.risk.place(whole(x, y))

    def to(self, device: torch.device | str) -> Self:
        """Compute on another device from now on, with the fitted state. The user's model stays where it is.

        Args:
            device: The device.

        Returns:
            The influence model itself.
        """
        device = torch.device(device)
        arrays = {name: tensor.to(device) for name, tensor in self.state_arrays().items()} if self.is_fitted else {}
        self._risk = self.risk.to(device)
        if self._fit is not None:
            self.restore(self._fit.reducer.to(self._risk), arrays, self._fit.report)
        return self

    def state_arrays(self) -> dict[str, Tensor]:
        """Return what of the fitted state must be kept to `restore` it elsewhere.

        Returns:
            "block/array" → tensor.

        Raises:
            NotFittedError: If the model is not fitted.
        """
        return self._fitted().arrays()

    def restore(self, reducer: ChunkReducer, arrays: Mapping[str, Tensor], report: FitReport) -> Self:
        """Take over a fitted state without the work of `fit`.

        Args:
            reducer: A reducer over the same data.
            arrays: What `state_arrays` returned.
            report: The report of the fit.

        Returns:
            The influence model itself.
        """
        solvers = self._solvers(report.damping)
        self._fit = Fitted.restored(reducer, self._curvature(reducer, arrays), solvers, arrays, report)
        return self

    def unbound(self) -> Self:
        """Return a copy of the settings without the model and the fitted state: small, and free to travel.

        Returns:
            The copy.
        """
        bare = copy.copy(self)
        bare._fit = None
        bare._risk = None
        return bare

    def bound_to(self, model: nn.Module, device: torch.device | None = None) -> Self:
        """Return a copy of the settings for this model, not fitted.

        Args:
            model: The model, of the same form.
            device: Where to compute; the device of the model if None.

        Returns:
            The copy.
        """
        other = self.unbound()
        other._bind(model, device)
        return other
