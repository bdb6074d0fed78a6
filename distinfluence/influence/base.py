"""The influence model: risk + blocks + curvature + solver behind one interface.

    I[i, j] = ⟨ (A + λI)⁻¹ ∇θ m(z_test_i), ∇θ ℓ(z_train_j) ⟩

Rows are test points, columns training points; positive: the training point helps. The interface is the one that pyDVL
published for its influence models (`fit`, `influence_factors`, `influences`, `influences_from_factors`).
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from distinfluence.influence.damping import Regularization
from distinfluence.influence.report import SolveReport
from distinfluence.influence.scores import InfluenceMode, Tile, influence_mode
from distinfluence.influence.scoring import Scorer, trains_or_tests
from distinfluence.influence.self_influence import SelfInfluences, self_influences_by_factors
from distinfluence.influence.settings import check_exact
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
