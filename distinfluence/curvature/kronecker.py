"""Kronecker-factored curvature: A = Q diag(Λ) Qᵀ, block-diagonal over layers, with Q = Q_left ⊗ Q_right in each unit.

KFAC takes Λ from the factors' own eigenvalues; EKFAC takes the mean squared gradient in the eigenbasis, the best
diagonal there is for that basis (in the Frobenius norm). A product, and the inverse with any damping, cost
4·(o²·i + o·i²) flops a row and unit. Two sums over the data make it.

References: Martens & Grosse (2015), KFAC; Grosse & Martens (2016), convolutions; George et al. (2018), EKFAC;
Eschenhagen et al. (2023), weight sharing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distinfluence.curvature.base import CurvatureOperator
from distinfluence.curvature.fisher_sums import CovarianceSums, EigenvalueSums, FisherVectors
from distinfluence.errors import DecompositionError, NonFiniteError
from distinfluence.layers.layout import LayerLayout
from distinfluence.layers.units import Unit
from distinfluence.model.reducer import ChunkReducer

Function = Callable[[Tensor], Tensor]
JITTER = 1e-10  # of the mean eigenvalue, added to a factor whose decomposition failed


@dataclass(frozen=True)
class Eigenbasis:
    """One unit's part of A. left: [g, o, o] and right: [g, i, i], eigenvectors in columns; None for the identity.

    values: [g, o, i] float64, Λ ≥ 0.
    """

    unit: Unit
    left: Tensor | None
    right: Tensor | None
    values: Tensor

    def coordinates(self, matrix: Tensor) -> Tensor:
        """Q_leftᵀ M Q_right of M [k, g, o, i]."""
        if self.left is not None:
            matrix = _left_product(self.left.transpose(1, 2), matrix)
        return matrix if self.right is None else _right_product(matrix, self.right)

    def matrix(self, coordinates: Tensor) -> Tensor:
        """Q_left C Q_rightᵀ of C [k, g, o, i]."""
        if self.left is not None:
            coordinates = _left_product(self.left, coordinates)
        return coordinates if self.right is None else _right_product(coordinates, self.right.transpose(1, 2))

    def scaled(self, matrix: Tensor, function: Function) -> Tensor:
        """f(A) M for each M of [k, g, o, i]; function: of the eigenvalues, element by element."""
        return self.matrix(self.coordinates(matrix) * function(self.values).to(matrix.dtype))


def _left_product(factor: Tensor, matrices: Tensor) -> Tensor:
    """[g, o, o] · [k, g, o, i]; one by one, since a batched product would copy the factor for each of k."""
    product = torch.empty_like(matrices)
    for one, out in zip(matrices, product, strict=True):
        torch.bmm(factor, one, out=out)
    return product


def _right_product(matrices: Tensor, factor: Tensor) -> Tensor:
    """[k, g, o, i] · [g, i, i]; for one group as one product."""
    if factor.shape[0] == 1:
        return matrices @ factor[0]
    return torch.stack([torch.bmm(one, factor) for one in matrices]) if len(matrices) else matrices


class KroneckerOperator(CurvatureOperator):
    """One block of a Kronecker-factored matrix as a linear operator. Positive semi-definite; nothing touches the data.

    Args:
        bases: The eigenbases of the block's units.
        shapes: Parameter name → shape, in the order of the block's columns.
        dtype: The dtype of rows and products.
    """

    positive_semidefinite = True

    def __init__(self, bases: Sequence[Eigenbasis], shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> None:
        self.bases = tuple(bases)
        self.shapes = dict(shapes)
        super().__init__(sum(shape.numel() for shape in shapes.values()), dtype, self.bases[0].values.device)

    def _product(self, rows: Tensor) -> Tensor:
        return self.in_eigenbasis(rows, lambda values: values)

    def in_eigenbasis(self, rows: Tensor, function: Function) -> Tensor:
        """Multiply rows with f(A).

        Args:
            rows: Vectors, [k, p].
            function: f, which is applied to each eigenvalue.

        Returns:
            rows · f(A), [k, p].
        """
        tensors = self._tensors(rows)
        found: dict[str, Tensor] = {}
        for basis in self.bases:
            scaled = basis.scaled(basis.unit.matrix(tensors), function)
            found |= basis.unit.tensors(scaled, self.shapes)
        return torch.cat([found[name].flatten(1) for name in self.shapes], dim=1)

    def in_double(self) -> "KroneckerOperator":
        """Return the same matrix with rows and products in float64.

        Returns:
            The operator in float64.
        """
        wide = [
            Eigenbasis(
                basis.unit,
                None if basis.left is None else basis.left.double(),
                None if basis.right is None else basis.right.double(),
                basis.values,
            )
            for basis in self.bases
        ]
        return KroneckerOperator(wide, self.shapes, torch.float64)

    def quadratic_forms(self, rows: Tensor, function: Function) -> Tensor:
        """Compute ⟨row, f(A) row⟩ of each row.

        Args:
            rows: Vectors, [k, p].
            function: f, which is applied to each eigenvalue.

        Returns:
            The quadratic forms, [k] in float64.
        """
        tensors = self._tensors(rows)
        total = torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
        for basis in self.bases:
            coordinates = basis.coordinates(basis.unit.matrix(tensors)).double()
            total += (coordinates.square() * function(basis.values)).flatten(1).sum(dim=1)
        return total

    def eigenvalues(self) -> Tensor:
        """Return all eigenvalues, in no particular order.

        Returns:
            [p] in float64.
        """
        return torch.cat([basis.values.flatten() for basis in self.bases])

    def _tensors(self, rows: Tensor) -> dict[str, Tensor]:
        parts = rows.split([shape.numel() for shape in self.shapes.values()], dim=1)
        return {
            name: part.reshape(rows.shape[0], *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }


def fitted_bases(
    reducer: ChunkReducer, layout: LayerLayout, fisher: FisherVectors, *, corrected: bool, reduce: bool = False
) -> tuple[Eigenbasis, ...]:
    """Fit the eigenbases of all units: one sum over the data, and a second one for corrected eigenvalues (EKFAC).

    Args:
        reducer: Sums over the training data.
        layout: The units of the model.
        fisher: Which Fisher matrix.
        corrected: Whether the eigenvalues are mean squared gradients (EKFAC), instead of the factors' own (KFAC).
        reduce: Whether sides are summed or averaged over positions first (see `CovarianceSums`).

    Returns:
        One eigenbasis for each unit, in the order of the layout.

    Raises:
        NonFiniteError: If the second moments have NaN or infinity.
        DecompositionError: If a factor cannot be decomposed; names the layer.
    """
    sums = list(reducer.sum(CovarianceSums(layout, fisher, reduce)))
    bases = []
    for unit in layout.units:
        own = [sums.pop(0) for _ in range(3 if unit.treatment in ("kronecker", "moments") else 1)]
        _check_finite(unit, own)
        bases.append(_eigenbasis(unit, own, reducer.n_samples, reducer.risk.dtype))
    if not corrected:
        return tuple(bases)
    factored = [basis for basis in bases if basis.unit.treatment in ("kronecker", "moments")]
    nothing = torch.zeros(0, dtype=reducer.risk.dtype, device=reducer.risk.device)
    sides = [nothing if side is None else side for basis in factored for side in (basis.left, basis.right)]
    values = iter(reducer.sum(EigenvalueSums(layout, fisher), *sides)) if factored else iter(())
    return tuple(
        Eigenbasis(basis.unit, basis.left, basis.right, next(values) / reducer.n_samples)
        if basis.unit.treatment in ("kronecker", "moments")
        else basis
        for basis in bases
    )


def _check_finite(unit: Unit, sums: Sequence[Tensor]) -> None:
    if not all(torch.isfinite(total).all() for total in sums):
        raise NonFiniteError(
            f"`model` gives NaN or infinity in the second moments of {list(unit.parameters)}. Look at the inputs and "
            "gradients of that layer; half precision overflows easily."
        )


def _eigenbasis(unit: Unit, sums: Sequence[Tensor], n_samples: int, dtype: torch.dtype) -> Eigenbasis:
    if unit.treatment == "diagonal":
        return Eigenbasis(unit, None, None, (sums[0] / n_samples).reshape(unit.shape))
    if unit.treatment == "dense":
        values, basis = _decomposed(sums[0].unsqueeze(0) / n_samples, unit)
        assert basis is not None
        return Eigenbasis(unit, None, basis.to(dtype), values.reshape(unit.shape))
    left_sum, right_sum, positions = sums
    left_values, left = _decomposed(left_sum, unit)
    right_values, right = _decomposed(right_sum, unit)
    products = left_values.unsqueeze(2) * right_values.unsqueeze(1)
    # A = Σ aaᵀ / N and G = Σ δδᵀ / (number of positions): one factor 1/T in all. Of gradient matrices: L ⊗ R / tr L
    scale = left_values.sum() if unit.treatment == "moments" else positions
    values = products / (n_samples * scale) if float(scale) > 0 else products
    return Eigenbasis(
        unit, None if left is None else left.to(dtype), None if right is None else right.to(dtype), values
    )


def _decomposed(moment: Tensor, unit: Unit) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues [g, d] ≥ 0 and eigenvectors [g, d, d] in float64; a diagonal [g, d] is its own.

    A decomposition that fails is tried again with a small multiple of the identity added, and then on the CPU.
    """
    if moment.ndim == 2:
        return moment, None
    symmetric = (moment + moment.transpose(1, 2)) / 2
    mean = symmetric.diagonal(dim1=1, dim2=2).mean()
    for device, jitter in ((symmetric.device, 0.0), (symmetric.device, JITTER), (torch.device("cpu"), JITTER)):
        shifted = symmetric.to(device)
        if jitter:
            shifted = shifted + jitter * mean.to(device) * torch.eye(shifted.shape[1], device=device).double()
        try:
            values, vectors = torch.linalg.eigh(shifted)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # torch's error for what did not converge
            continue
        # contiguous, as they are when read again: products round differently in another memory layout
        return values.clamp_min(0).to(moment.device), vectors.contiguous().to(moment.device)
    raise DecompositionError(
        f"`fit` could not decompose a factor of {list(unit.parameters)} ({symmetric.shape[1]} rows), also with "
        f"{JITTER:g} of its mean eigenvalue added. Look at the scale of that layer's inputs and gradients."
    )


@dataclass(frozen=True)
class KroneckerInverse:
    """(A + λI)⁻¹ over all blocks, without the model and the data: what a preconditioner keeps of a fit.

    blocks: block → its operator, in the order of the columns. order: [p] int64, the column of the blocks that each
    column of the rows stands in, None if they are the same. fitted: what was fitted, in words.
    """

    blocks: Mapping[str, KroneckerOperator]
    order: Tensor | None
    fitted: str

    @property
    def n_parameters(self) -> int:
        """p."""
        return sum(operator.size for operator in self.blocks.values())

    def inverse(self, rows: Tensor, damping: float) -> Tensor:
        """rows [k, p] · (A + λI)⁻¹; damping: λ > 0."""
        columns = rows if self.order is None else torch.empty_like(rows).index_copy_(1, self.order, rows)
        parts, start = [], 0
        for operator in self.blocks.values():
            part = columns[:, start : start + operator.size].to(operator.dtype)
            parts.append(operator.in_eigenbasis(part, lambda values: 1.0 / (values + damping)))
            start += operator.size
        solved = torch.cat(parts, dim=1).to(rows.dtype)
        return solved if self.order is None else solved.index_select(1, self.order)

    def __repr__(self) -> str:
        return self.fitted
