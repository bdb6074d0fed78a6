"""The influence model: risk + blocks + curvature + solver behind one interface.

    I[i, j] = ⟨ (A + λI)⁻¹ ∇θ m(z_test_i), ∇θ ℓ(z_train_j) ⟩

Rows are test points, columns training points; positive: the training point helps. The interface is the one that pyDVL
published for its influence models (`fit`, `influence_factors`, `influences`, `influences_from_factors`).
"""

import copy
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor, nn

from distinfluence.batch import Batch, as_batch
from distinfluence.blocks import BlockMode, BlockStructure, ParameterBlocks
from distinfluence.curvature import DataOperator, SecondOrderMode, operator_class
from distinfluence.dataplane import DataPlane, LocalPlane
from distinfluence.errors import NotFittedError, SettingError, ShapeError
from distinfluence.gradients import (
    SampleGradients,
    loss_gradients,
    measurement_gradients,
    micro_batches,
    mixed_gradients,
)
from distinfluence.influence.report import FitReport, SolveReport
from distinfluence.objective import Loss, Objective, as_objective
from distinfluence.risk import EmpiricalRisk
from distinfluence.sample_risk import SampleRisk, check_mode
from distinfluence.solvers.base import Solution, Solver


class InfluenceMode(StrEnum):
    """What is done to the training point: weighted up, or its input moved."""

    UP = "up"
    PERTURBATION = "perturbation"

    Up = "up"  # the seed interface's spelling
    Perturbation = "perturbation"


class InfluenceFunctionModel(ABC):
    """Influence of training points on test points, for one model, loss and curvature.

    model: any `nn.Module`; read only. loss: a torch loss of (outputs, targets), or an `Objective`.
    hessian_regularization: damping λ added to the curvature of the mean loss, one number or a mapping block → λ.
    block_structure: "full", "layer_wise", "parameter_wise" or a mapping block → parameter names; the curvature is
    taken block-diagonal. second_order_mode: "hessian", "ggn" or "empirical_fisher".

    Subclasses say which solver they use. Raises SettingError for an unknown name or a negative damping, and what
    `ParameterBlocks.of` and `SampleRisk` raise for a model that cannot be used.
    """

    is_thread_safe = False
    solves_over_data = True  # whether a solve sweeps over the training data

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | Objective,
        hessian_regularization: float | Mapping[str, float] = 0.0,
        *,
        block_structure: BlockStructure = BlockMode.FULL,
        second_order_mode: SecondOrderMode | str = SecondOrderMode.HESSIAN,
    ) -> None:
        self.objective = as_objective(loss)
        self.second_order_mode = _second_order_mode(second_order_mode)
        self.block_structure = block_structure
        self.hessian_regularization = hessian_regularization
        self._fit: _Fit | None = None
        self._risk: SampleRisk | None = None
        self._bind(model)

    def _bind(self, model: nn.Module, device: torch.device | None = None) -> None:
        blocks = ParameterBlocks.of(model, self.block_structure)
        self.damping = blocks.spread(self.hessian_regularization, "hessian_regularization")
        self._risk = SampleRisk(model, self.objective, blocks, device)

    @abstractmethod
    def solver(self, damping: float) -> Solver[Any]:
        """The solver for a block with this damping."""

    @abstractmethod
    def settings(self) -> dict[str, object]:
        """What fixes the numbers besides model, loss and data, in JSON's types: for provenance and fingerprints."""

    def _common_settings(self) -> dict[str, object]:
        structure = self.block_structure
        return {
            "method": type(self).__name__,
            "second_order_mode": str(self.second_order_mode),
            "block_structure": {k: list(v) for k, v in structure.items()}
            if isinstance(structure, Mapping)
            else structure,
            "hessian_regularization": dict(self.damping),
        }

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
    def plane(self) -> DataPlane:
        """The training data that the model was fitted to. Raises NotFittedError before `fit`."""
        return self._fitted().plane

    def _fitted(self) -> "_Fit":
        if self._fit is None:
            raise NotFittedError(f"`{type(self).__name__}` has not been fitted. Call `fit(data)` first.")
        return self._fit

    def fit(self, data: object) -> Self:
        """Do the work that needs no test point; returns the influence model itself.

        data: the training set as a DataLoader, a list of batches, one (x, y) pair, or a `DataPlane`.
        Raises EmptyDataError, NonFiniteError, LossError, DtypeError for data or losses that cannot be used.
        """
        start = time.perf_counter()
        if isinstance(data, DataPlane):
            plane = data
        else:
            self._bind(self.risk.module, self.risk.device)  # buffers and mode as they are now
            plane = LocalPlane(self.risk, data)
        passes = plane.passes
        operators = self._operators(plane)
        states = {block: self.solver(self.damping[block]).fit(operator) for block, operator in operators.items()}
        blocks = self.risk.blocks
        report = FitReport(
            second_order_mode=str(self.second_order_mode),
            n_samples=plane.n_samples,
            n_parameters=blocks.size,
            n_total=blocks.n_total,
            uncovered=blocks.uncovered,
            blocks={block: columns.stop - columns.start for block, columns in blocks.columns.items()},
            damping=dict(self.damping),
            positive_definite={block: getattr(state, "positive_definite", None) for block, state in states.items()},
            passes=plane.passes - passes,
            remarks=plane.remarks,
            seconds=time.perf_counter() - start,
        )
        self._fit = _Fit(plane, operators, states, report)
        return self

    def _operators(self, plane: DataPlane) -> dict[str, DataOperator]:
        risk = EmpiricalRisk.over(plane)
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
        fitted = self._fitted()
        rhs = {block: gradients[:, columns].contiguous() for block, columns in self.risk.blocks.columns.items()}
        solutions: dict[str, Solution] = {
            block: self.solver(self.damping[block]).solve(fitted.states[block], rows) for block, rows in rhs.items()
        }
        factors = torch.cat([solution.x for solution in solutions.values()], dim=1)
        return factors, SolveReport.of(solutions, rhs)

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

    def influences_from_factors(
        self, factors: Tensor, x: object, y: Tensor | None = None, mode: InfluenceMode | str = InfluenceMode.UP
    ) -> Tensor:
        """Influence of training samples on the test points of these factors [n_test, p]; shapes as `influences`."""
        columns = slice(0, self.n_parameters)
        return self._from_factors(self._check_factors(factors, columns), {"": columns}, self.place(x, y), mode)[""]

    def influences_from_factors_by_block(
        self,
        factors: Mapping[str, Tensor],
        x: object,
        y: Tensor | None = None,
        mode: InfluenceMode | str = InfluenceMode.UP,
    ) -> "OrderedDict[str, Tensor]":
        """As `influences_from_factors`, from block → [n_test, p_block], block by block."""
        blocks = self.risk.blocks
        if list(factors) != list(blocks.names):
            raise ShapeError(
                f"`factors` must have the blocks {list(blocks.names)}, got {list(factors)}. "
                "Pass what `influence_factors_by_block` returned."
            )
        rows = torch.cat([self._check_factors(factors[b], columns) for b, columns in blocks.columns.items()], dim=1)
        return self._from_factors(rows, blocks.columns, self.place(x, y), mode)

    def _from_factors(
        self, factors: Tensor, columns: Mapping[str, slice], batch: Batch, mode: InfluenceMode | str
    ) -> "OrderedDict[str, Tensor]":
        if influence_mode(mode) is InfluenceMode.UP:
            tiles = [self._up(factors, columns, part) for part in micro_batches(self.risk, batch)]
            return OrderedDict((block, torch.cat([tile[block] for tile in tiles], dim=1)) for block in columns)
        whole = len(columns) == 1
        return OrderedDict(
            (block, mixed_gradients(self.risk, batch, factors if whole else _only(factors, c)))
            for block, c in columns.items()
        )

    def _up(self, factors: Tensor, columns: Mapping[str, slice], batch: Batch) -> dict[str, Tensor]:
        rows = self.loss_gradients(batch).rows
        return {block: factors[:, c] @ rows[:, c].T for block, c in columns.items()}

    def tile(self, factors: Tensor, batch: Batch, mode: InfluenceMode | str = InfluenceMode.UP) -> "Tile":
        """Influences of a batch of training samples, with their losses and gradient norms; one gradient pass.

        factors: [n_test, p]; batch: as `place` returns it.
        """
        values, losses, norms = [], [], []
        for part in micro_batches(self.risk, batch):
            gradients = self.loss_gradients(part)
            losses.append(gradients.values)
            norms.append(gradients.norms)
            if influence_mode(mode) is InfluenceMode.UP:
                values.append(factors @ gradients.rows.T)
            else:
                values.append(mixed_gradients(self.risk, part, factors))
        return Tile(torch.cat(values, dim=1), torch.cat(losses), torch.cat(norms))

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
            self.restore(self._fit.plane.to(self._risk), arrays, self._fit.report)
        return self

    def state_arrays(self) -> dict[str, Tensor]:
        """What of the fitted state must be kept to `restore` it elsewhere: "block/array" → tensor."""
        fitted = self._fitted()
        return {
            f"{block}/{name}": tensor
            for block, state in fitted.states.items()
            for name, tensor in self.solver(self.damping[block]).state_arrays(state).items()
        }

    def restore(self, plane: DataPlane, arrays: Mapping[str, Tensor], report: FitReport) -> Self:
        """The fitted state again from `state_arrays`, beside a plane over the same data, without the work of `fit`."""
        operators = self._operators(plane)
        states = {
            block: self.solver(self.damping[block]).restore(
                operator, {n.removeprefix(f"{block}/"): a for n, a in arrays.items() if n.startswith(f"{block}/")}
            )
            for block, operator in operators.items()
        }
        self._fit = _Fit(plane, operators, states, report)
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


@dataclass(frozen=True)
class Tile:
    """Influences [n_test, n, ...] of n training samples, with their losses [n] and gradient norms [n]."""

    values: Tensor
    losses: Tensor
    gradient_norms: Tensor


class _Fit:
    """The fitted part of an influence model."""

    def __init__(
        self, plane: DataPlane, operators: dict[str, DataOperator], states: dict[str, Any], report: FitReport
    ) -> None:
        self.plane = plane
        self.operators = operators
        self.states = states
        self.report = report


def influence_mode(mode: InfluenceMode | str) -> InfluenceMode:
    """The mode of that name. Raises SettingError for another."""
    try:
        return InfluenceMode(mode)
    except ValueError:
        raise SettingError(
            f"`mode` must be one of {[m.value for m in InfluenceMode]}, got {mode!r}. Choose one of these."
        ) from None


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


def _only(factors: Tensor, columns: slice) -> Tensor:
    alone = torch.zeros_like(factors)
    alone[:, columns] = factors[:, columns]
    return alone
