"""The influence model: risk + blocks + curvature + solver behind one interface.

    I[i, j] = ⟨ (A + λI)⁻¹ ∇θ m(z_test_i), ∇θ ℓ(z_train_j) ⟩

Rows are test points, columns training points; positive: the training point helps. The interface is the one that pyDVL
published for its influence models (`fit`, `influence_factors`, `influences`, `influences_from_factors`).
"""

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Literal, Self, overload

import torch
from torch import Tensor

from distinfluence.influence.damping import Regularization
from distinfluence.influence.report import SolveReport
from distinfluence.influence.scores import InfluenceMode, Scorer, Tile, trains_or_tests
from distinfluence.influence.self_influence import SelfInfluences, self_influences_by_factors
from distinfluence.influence.systems import CurvatureSystems
from distinfluence.model.batch import Batch
from distinfluence.model.gradients import SampleGradients


class InfluenceFunctionModel(CurvatureSystems):
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

    normalised = False  # whether scores are divided by the norms of factors and gradients

    @property
    def brackets_self_influence(self) -> bool:
        """Whether `self_influences` bounds the values of the curvature itself, not of a matrix in its place."""
        return not self._template.makes_matrix

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.settings().items() if k != 'method')})"

    @property
    def _scorer(self) -> Scorer:
        return Scorer(self.risk) if self._fit is None else self._fit.scorer

    def unmeasured(self) -> Self:
        """Return a copy with the same fit that measures no residuals unless a number of them was asked for.

        A run of many solves measures residuals in its first solve only: they cost passes over the training data.

        Returns:
            The copy.

        Raises:
            NotFittedError: If the model is not fitted.
        """
        other = copy.copy(self)
        other._fit = self._fitted().unmeasured()
        return other

    @overload
    def influence_factors(
        self, x: object, y: object | None = ..., *, return_report: Literal[False] = ...
    ) -> Tensor: ...
    @overload
    def influence_factors(
        self, x: object, y: object | None = ..., *, return_report: Literal[True]
    ) -> tuple[Tensor, SolveReport]: ...
    def influence_factors(
        self, x: object, y: object | None = None, *, return_report: bool = False
    ) -> Tensor | tuple[Tensor, SolveReport]:
        """Return (A + λI)⁻¹ ∇θ m for each test sample.

        Args:
            x: The inputs [n, ...], or data that have the targets, as for `fit`.
            y: The targets [n, ...]; None where `x` has them.
            return_report: Whether to return how far the solve of each row got.

        Returns:
            The factors [n_test, p]; with `return_report` a pair of them and the `SolveReport`.

        Raises:
            NotFittedError: If the model is not fitted.
        """
        gradients = self.measurement_gradients(self.place(x, y))
        factors, report = self.solve(gradients.rows)
        return (factors, report) if return_report else factors

    def influence_factors_by_block(self, x: object, y: object | None = None) -> "OrderedDict[str, Tensor]":
        """Return the factors of each block.

        Args:
            x: The inputs [n, ...], or data that have the targets, as for `fit`.
            y: The targets [n, ...]; None where `x` has them.

        Returns:
            Block → factors [n_test, p_block].
        """
        factors = self.influence_factors(x, y)
        return OrderedDict((block, factors[:, columns]) for block, columns in self.risk.blocks.columns.items())

    def self_influences(
        self, x: object, y: object | None = None, *, rtol: float = 1e-3, maxiter: int = 500
    ) -> SelfInfluences:
        """Bracket the influence of each sample's training loss on itself, ⟨(A + λI)⁻¹ g, g⟩.

        Gauss and Gauss–Radau quadrature need one pass over the training data for each step, whatever the method of this
        model, and the memory of four rows [p] for each sample. A model that makes a matrix of its own (EKFAC) needs no
        pass: both bounds are the value by that matrix.

        Args:
            x: The inputs [n, ...], or data that have the targets, as for `fit`.
            y: The targets [n, ...]; None where `x` has them.
            rtol: The width of the brackets, relative to the value, at which a sample is done.
            maxiter: The largest number of steps.

        Returns:
            Values with certified bounds, [n] each.

        Raises:
            SettingError: If A + λI is not known to be positive definite (for a Hessian, call `spectrum` first), or in
                mixed precision.
        """
        rows = self._by_block(self.loss_gradients(self.place(x, y)).rows)
        return self._fitted().self_influences(rows, rtol=rtol, maxiter=maxiter)

    def self_influences_by_solve(self, x: object, y: object | None = None) -> SelfInfluences:
        """Return the influence of each sample's training loss on itself, by this model's own solver.

        A training sample gets the value that it has as a test sample too. Costs one solve for each sample, and the
        memory of the gradients and factors [n, p].

        Args:
            x: The inputs [n, ...], or data that have the targets, as for `fit`.
            y: The targets [n, ...]; None where `x` has them.

        Returns:
            Values [n] with the bounds of the solve report; the bounds are infinite where it has none.
        """
        gradients = self.loss_gradients(self.place(x, y))
        return self_influences_by_factors(gradients, *self.solve(gradients.rows))

    def influences(
        self,
        x_test: object,
        y_test: object | None = None,
        x: object | None = None,
        y: object | None = None,
        mode: InfluenceMode | str = InfluenceMode.UP,
    ) -> Tensor:
        """Return the influence of each training sample on each test sample.

        Args:
            x_test: The inputs of the test samples [n_test, ...], or data that have the targets.
            y_test: The targets of the test samples; None where `x_test` has them.
            x: The inputs of the training samples [n_train, ...], or data that have the targets; the test samples if
                None.
            y: The targets of the training samples; None where `x` has them.
            mode: "up" for weighting training samples up, "perturbation" for moving their inputs.

        Returns:
            The influences [n_test, n_train]; for "perturbation" their derivatives by the training inputs, [n_test,
                n_train, *input].

        Raises:
            NotFittedError: If the model is not fitted.
            SettingError: If the mode is unknown, or `y` comes without `x`.
        """
        train, mode = trains_or_tests(x_test, y_test, x, y), self.checked_mode(mode)  # before anything is solved
        fitted = self._fitted()
        if mode is InfluenceMode.UP and fitted.curvature.direct is not None:
            tests = self.place(x_test, y_test)
            return fitted.curvature.direct(fitted, tests, tests if x is None else self.place(x, y))
        factors = self.influence_factors(x_test, y_test)
        return self.influences_from_factors(factors, *train, mode)

    def influences_by_block(
        self,
        x_test: object,
        y_test: object | None = None,
        x: object | None = None,
        y: object | None = None,
        mode: InfluenceMode | str = InfluenceMode.UP,
    ) -> "OrderedDict[str, Tensor]":
        """Return the influences that each block contributes; they sum to `influences`.

        Args:
            x_test: The inputs of the test samples [n_test, ...], or data that have the targets.
            y_test: The targets of the test samples; None where `x_test` has them.
            x: The inputs of the training samples [n_train, ...], or data that have the targets; the test samples if
                None.
            y: The targets of the training samples; None where `x` has them.
            mode: "up" for weighting training samples up, "perturbation" for moving their inputs.

        Returns:
            Block → [n_test, n_train, ...].
        """
        train, mode = trains_or_tests(x_test, y_test, x, y), self.checked_mode(mode)  # before anything is solved
        factors = self.influence_factors_by_block(x_test, y_test)
        return self.influences_from_factors_by_block(factors, *train, mode)

    def influences_at(
        self,
        dampings: Sequence[Regularization],
        x_test: object,
        y_test: object | None = None,
        x: object | None = None,
        y: object | None = None,
        mode: InfluenceMode | str = InfluenceMode.UP,
    ) -> Tensor:
        """Return the influences for several dampings from one fit and one set of gradients.

        Args:
            dampings: The dampings λ; each is a number, a rule or a mapping, as for the model itself.
            x_test: The inputs of the test samples [n_test, ...], or data that have the targets.
            y_test: The targets of the test samples; None where `x_test` has them.
            x: The inputs of the training samples [n_train, ...], or data that have the targets; the test samples if
                None.
            y: The targets of the training samples; None where `x` has them.
            mode: "up" for weighting training samples up, "perturbation" for moving their inputs.

        Returns:
            The influences [n_damping, n_test, n_train, ...].
        """
        train, mode = trains_or_tests(x_test, y_test, x, y), self.checked_mode(mode)
        gradients = self.measurement_gradients(self.place(x_test, y_test)).rows
        factors = [factors for factors, _ in self.solve_at(gradients, dampings)]
        together = self.influences_from_factors(torch.cat(factors), *train, mode)
        stacked: Tensor = together.unflatten(0, (len(factors), gradients.shape[0]))
        return stacked

    def influences_from_factors(
        self, factors: Tensor, x: object, y: object | None = None, mode: InfluenceMode | str = InfluenceMode.UP
    ) -> Tensor:
        """Return the influence of training samples on the test points of these factors.

        Args:
            factors: The factors of the test points, [n_test, p].
            x: The inputs of the training samples [n_train, ...], or data that have the targets.
            y: The targets of the training samples; None where `x` has them.
            mode: "up" or "perturbation", as for `influences`.

        Returns:
            The influences, with the shapes of `influences`.

        Raises:
            ShapeError: If the factors are not [n_test, p].
        """
        return self._scorer.scores(self._scorer.checked(factors), self.place(x, y), mode)

    def influences_from_factors_by_block(
        self,
        factors: Mapping[str, Tensor],
        x: object,
        y: object | None = None,
        mode: InfluenceMode | str = InfluenceMode.UP,
    ) -> "OrderedDict[str, Tensor]":
        """Return the influences that each block contributes, from the factors of each block.

        Args:
            factors: Block → factors [n_test, p_block].
            x: The inputs of the training samples [n_train, ...], or data that have the targets.
            y: The targets of the training samples; None where `x` has them.
            mode: "up" or "perturbation", as for `influences`.

        Returns:
            Block → [n_test, n_train, ...].

        Raises:
            ShapeError: If the blocks or the shapes of the factors are others.
        """
        return self._scorer.by_block(self._scorer.joined(factors), self.place(x, y), mode)

    def influences_by_columns(
        self, factors: Tensor, columns: Mapping[str, slice], batch: Batch
    ) -> "OrderedDict[str, Tensor]":
        """Return what some columns of the factors contribute to the influences of a batch of training samples.

        Args:
            factors: The factors of the test points, [n_test, p].
            columns: Name → columns.
            batch: The samples, as `place` returns them.

        Returns:
            Name → [n_test, n].
        """
        return self._scorer.by_columns(factors, columns, batch, InfluenceMode.UP)

    def checked_mode(self, mode: InfluenceMode | str) -> InfluenceMode:
        """Return the mode of that name, if the method has it.

        Args:
            mode: "up" or "perturbation".

        Returns:
            The mode.

        Raises:
            SettingError: If there is no such mode, or the method has no influences of it.
        """
        return self._scorer.checked_mode(mode)

    def tile(self, factors: Tensor, batch: Batch, mode: InfluenceMode | str = InfluenceMode.UP) -> Tile:
        """Return the influences of a batch of training samples; one gradient pass.

        Args:
            factors: The factors of the test points, [n_test, p].
            batch: The samples, as `place` returns them.
            mode: "up" or "perturbation", as for `influences`.

        Returns:
            The influences with the samples' losses and gradient norms.
        """
        return self._scorer.tile(factors, batch, mode)

    def loss_gradients(self, batch: Batch) -> SampleGradients:
        """Return the gradient of each sample's training loss.

        Args:
            batch: The samples, as `place` returns them.

        Returns:
            The gradients [n, p] and the losses [n].
        """
        return self._scorer.loss_gradients(batch)

    def measurement_gradients(self, batch: Batch) -> SampleGradients:
        """Return the gradient of each sample's measurement.

        Args:
            batch: The samples, as `place` returns them.

        Returns:
            The gradients [n, p] and the measurements [n].
        """
        return self._scorer.measurement_gradients(batch)
