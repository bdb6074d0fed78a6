"""Influence by KFAC and EKFAC: two sums over the training data, then every solve is a few small products.

Work: one forward pass and one reverse pass for each vector in output space, twice (once for KFAC); a solve touches no
data. Memory: the factors, o² + i² numbers for a layer [o, i], and for each query p numbers. Scores are made layer by
layer from inputs and output gradients, without matrices of samples × parameters.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from typing_extensions import override

from distinfluence.curvature import KroneckerOperator, SecondOrderMode
from distinfluence.curvature.fisher_sums import FisherKind, LayoutOf
from distinfluence.curvature.ggn import GGNOperator
from distinfluence.curvature.kronecker import Eigenbasis, KroneckerInverse, fitted_bases
from distinfluence.curvature.queries import joined_queries, query_of
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.damping import Regularization
from distinfluence.influence.fitted import Curvature, Fitted
from distinfluence.influence.layer_scoring import LayerScorer
from distinfluence.influence.scores import layer_tile
from distinfluence.influence.settings import KroneckerFactored
from distinfluence.layers.gradients import layer_gradients
from distinfluence.layers.layout import MOST_DENSE, LayerLayout
from distinfluence.layers.queries import RankOne, UnitQueries
from distinfluence.layers.units import Unit
from distinfluence.model.batch import Batch
from distinfluence.model.blocks import BlockMode, ParameterBlocks
from distinfluence.model.objective import Loss, Objective
from distinfluence.model.reducer import ChunkReducer
from distinfluence.model.risk import EmpiricalRisk
from distinfluence.solvers.ekfac import ExactSystem


class EkfacInfluence(InfluenceFunctionModel):
    """Influence by a Kronecker-factored approximation of the Fisher (Gauss–Newton) matrix, layer by layer.

    Linear layers, convolutions, embeddings, norms, attention and whatever else multiplies an activation with a weight
    are recognised by what the forward pass does with each parameter, and the result is compared with autograd. The rest
    is treated by second moments of its gradients. `fit_report.treatments` names the treatment of every parameter.

    Args:
        model: Any `nn.Module`. It is only read.
        update_diagonal: Whether a second sum over the data corrects the eigenvalues (EKFAC); without it KFAC.
        hessian_regularization: λ, also by layer. If you are not sure, `RelativeDamping(0.1)`, a tenth of each layer's
            mean eigenvalue.
        loss: A torch loss of (outputs, targets), or an `Objective`; cross-entropy if None.
        fisher: "exact" takes the expectation over the predictive distribution, "sampled" draws labels from it,
            "empirical" takes the observed ones. "auto" is exact where that needs 16 reverse passes or fewer, else
            sampled, and empirical for a loss whose distribution is not known.
        n_draws: The labels drawn for each sample (and position) by "sampled".
        seed: The seed of the draws, which do not depend on batches, chunks or workers.
        weight_sharing: "expand" or "reduce": what KFAC's factors make of positions.
        cg_iterations: The conjugate gradient steps on the Gauss–Newton matrix with EKFAC as preconditioner; one pass
            each, and one for the residuals.
        residual_rows: For how many rows of each solve the residual against the Gauss–Newton matrix is measured, in one
            pass; it is NaN for the others. If None 0: a fit multiplies no rows with that matrix.
        query_energy: The share of the squared norm that low-rank factors of queries keep, where they save work; None
            keeps them whole.
        most_dense: The largest number of parameters of a block without Kronecker structure that is kept whole.
        recognise: False looks for no layers, for models that use them differently from batch to batch (a LayoutError
            says so).

    Raises:
        SettingError: If a setting is unknown or out of range.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> data = torch.eye(2), torch.zeros(2, 1)
    >>> influence = EkfacInfluence(model, True, 1.0, loss=torch.nn.MSELoss()).fit(data)
    >>> influence.operators["Linear"].dense().diagonal().round()  # Gauss–Newton: mean of 2x²
    tensor([1., 1.], dtype=torch.float64)
    """

    _template: KroneckerFactored

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
        residual_rows: int | None = None,
        query_energy: float | None = None,
        most_dense: int = MOST_DENSE,
        recognise: bool = True,
    ) -> None:
        solver = functools.partial(
            KroneckerFactored,
            update_diagonal=update_diagonal,
            fisher=fisher,
            n_draws=n_draws,
            seed=seed,
            weight_sharing=weight_sharing,
            cg_iterations=cg_iterations,
            residual_rows=residual_rows,
            query_energy=query_energy,
            most_dense=most_dense,
            recognise=recognise,
        )
        super().__init__(
            model,
            nn.CrossEntropyLoss() if loss is None else loss,
            hessian_regularization,
            solver,
            BlockMode.LAYER_WISE,
            SecondOrderMode.GGN,
        )

    @property
    def layout(self) -> LayerLayout:
        """The layers that the fit has recognised.

        Raises:
            NotFittedError: If the model is not fitted.
        """
        return self._layers.layout

    @property
    def _layers(self) -> LayerScorer:
        scorer = self._fitted().scorer
        assert isinstance(scorer, LayerScorer)
        return scorer

    @override
    def _curvature(self, reducer: ChunkReducer, arrays: Mapping[str, Tensor] | None = None) -> Curvature:
        """One sum over the data, two with `update_diagonal`; none with arrays."""
        if arrays is not None:
            return self._restored(reducer, arrays)
        settings = self._template
        bytes_, n_vectors = reducer.one(0, LayoutOf(settings.most_dense, settings.recognise))
        layout, vectors = LayerLayout.from_tensor(bytes_), settings.vectors(int(n_vectors))
        reduce = settings.weight_sharing == "reduce"
        bases = fitted_bases(reducer, layout, vectors, corrected=settings.update_diagonal, reduce=reduce)
        made = self._of_bases(reducer, layout, bases)
        named = {name: _in_words(unit) for unit in layout.units for name in unit.parameters}
        treatments = {name: named[name] for name in self.risk.blocks.shapes if name in named}
        return replace(made, remarks=(self._kind(layout, vectors.kind),), treatments=treatments)

    def _restored(self, reducer: ChunkReducer, arrays: Mapping[str, Tensor]) -> Curvature:
        layout = LayerLayout.from_tensor(arrays["layout"])
        bases = [
            Eigenbasis(
                unit,
                arrays.get(f"{unit.parameters[0]}/left"),
                arrays.get(f"{unit.parameters[0]}/right"),
                arrays[f"{unit.parameters[0]}/values"],
            )
            for unit in layout.units
        ]
        return self._of_bases(reducer, layout, bases)

    def _kind(self, layout: LayerLayout, kind: str) -> str:
        by_treatment: dict[str, int] = {}
        for unit in layout.units:
            by_treatment[unit.treatment] = by_treatment.get(unit.treatment, 0) + unit.size
        shares = ", ".join(f"{t} {size / self.n_parameters:.1%}" for t, size in sorted(by_treatment.items()))
        return f"{kind} Fisher matrix, parameters by treatment: {shares}"

    def _of_bases(self, reducer: ChunkReducer, layout: LayerLayout, bases: Sequence[Eigenbasis]) -> Curvature:
        blocks, settings = self.risk.blocks, self._template
        operators = {
            block: KroneckerOperator(
                [basis for basis in bases if basis.unit.block == block],
                {name: blocks.shapes[name] for name in names},
                self.risk.dtype,
            )
            for block, names in blocks.names.items()
        }
        gauss_newton = GGNOperator(EmpiricalRisk.over(reducer))
        exact = ExactSystem(gauss_newton, blocks.columns, settings.cg_iterations, settings.measured)
        scorer = LayerScorer(self.risk, layout, settings.query_energy)
        factorless = settings.cg_iterations == 0 and settings.query_energy is None and scorer.measures_loss
        direct = _FromQueries(scorer, bases, not settings.update_diagonal) if factorless else None
        return Curvature(operators, scorer, exact=exact, arrays=_arrays(layout, bases), direct=direct)

    def kronecker_inverse(self) -> KroneckerInverse:
        """Return (A + λI)⁻¹ without model and data.

        Returns:
            The inverse, over rows in the order of the model's parameters.

        Raises:
            NotFittedError: If the model is not fitted.
        """
        blocks = {b: o for b, o in self._fitted().operators.items() if isinstance(o, KroneckerOperator)}
        layers, full = self.risk.blocks, ParameterBlocks.of(self.risk.module)
        order = None
        if list(layers.shapes) != list(full.shapes):
            start, columns = 0, {}
            for name, shape in layers.shapes.items():
                columns[name] = torch.arange(start, start + shape.numel(), device=self.risk.device)
                start += shape.numel()
            order = torch.cat([columns[name] for name in full.shapes])
        return KroneckerInverse(blocks, order, repr(self))

    def influences_by_token(
        self, x_test: object, y_test: object | None = None, x: object | None = None, y: object | None = None
    ) -> Tensor:
        """Return the influence by position of the training samples; positions sum to the samples' influence.

        A position's share is the part of the gradient that its activations and their gradients make in each layer.

        Args:
            x_test: The inputs of the test samples [n_test, ...], or a whole batch.
            y_test: The targets of the test samples; None where `x_test` is the whole batch.
            x: The inputs of the training samples [n_train, T, ...], or a whole batch; the test samples if None.
            y: The targets of the training samples; None where `x` is the whole batch.

        Returns:
            The influences [n_test, n_train, T].

        Raises:
            UnsupportedOperatorError: If layers do not share the same positions (pooling, parameters without a layer).
        """
        train = (x_test, y_test) if x is None else (x, y)
        return self.influences_from_factors_by_token(self.influence_factors(x_test, y_test), *train)

    def influences_from_factors_by_token(self, factors: Tensor, x: object, y: object | None = None) -> Tensor:
        """Return the influence by position of the training samples, from factors.

        Args:
            factors: The factors of the test points, [n_test, p].
            x: The inputs of the training samples [n_train, T, ...], or a whole batch.
            y: The targets of the training samples; None where `x` is the whole batch.

        Returns:
            The influences [n_test, n_train, T].

        Raises:
            UnsupportedOperatorError: If layers do not share the same positions.
        """
        return self._layers.by_token(self._layers.checked(factors), self.place(x, y))

    def query_error(self, factors: Tensor) -> Tensor:
        """Return the error that `query_energy` costs: |ΔI_ij| ≤ ‖M_i − M̃_i‖·‖g_j‖.

        Args:
            factors: The factors of the test points, [n_test, p].

        Returns:
            ‖M − M̃‖ / ‖M‖ of each query's factor, [n_test].
        """
        return self._layers.error(self._layers.checked(factors))


@dataclass(frozen=True)
class _FromQueries:
    """Influences without factors: a query that is one outer product in a layer needs none.

    bases: of each unit, in the order of the layout. separate: whether to look for weights that are separable.
    """

    scorer: LayerScorer
    bases: Sequence[Eigenbasis]
    separate: bool

    def __call__(self, fitted: Fitted, tests: Batch, trains: Batch) -> Tensor:
        """[n_test, n_train], for the damping of the fit."""
        return layer_tile(self.scorer.risk, self.scorer.layout, self.queries(fitted, tests), trains).values

    def queries(self, fitted: Fitted, batch: Batch) -> Sequence[UnitQueries]:
        """Return the batch as queries, unit by unit: as outer products in the eigenbasis, or as factors."""
        parts: list[list[Tensor | RankOne]] = [[] for _ in self.bases]
        for gradients in layer_gradients(self.scorer.risk, self.scorer.layout, batch):
            for basis, made in zip(self.bases, parts, strict=True):
                block = basis.unit.block
                inverse = fitted.states[block].inverse_values(fitted.damping[block])
                made.append(query_of(basis, inverse, gradients))
        shapes, joined = self.scorer.risk.blocks.shapes, zip(self.bases, parts, strict=True)
        return [joined_queries(basis, made, shapes, separate=self.separate) for basis, made in joined]


def _arrays(layout: LayerLayout, bases: Sequence[Eigenbasis]) -> dict[str, Tensor]:
    arrays = {"layout": layout.to_tensor()}
    for basis in bases:
        sides = {"values": basis.values, "left": basis.left, "right": basis.right}
        arrays |= {f"{basis.unit.parameters[0]}/{side}": t for side, t in sides.items() if t is not None}
    return arrays


def _in_words(unit: Unit) -> str:
    groups, rows, columns = unit.shape
    if unit.treatment in ("dense", "diagonal"):
        of = f" with {len(unit.parameters) - 1} others" if len(unit.parameters) > 1 else ""
        return f"{unit.treatment} block of {unit.size}{of}"
    of_groups = f"{groups} groups of " if groups > 1 else ""
    shared = f", used {len(unit.uses)} times" if len(unit.uses) > 1 else ""
    what = "Kronecker factors" if unit.treatment == "kronecker" else "factors of its gradients' moments"
    return f"{what} {of_groups}{rows}×{columns}{' with bias' if unit.has_bias else ''}{shared}"
