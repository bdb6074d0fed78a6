"""The distribution of targets that a loss is the negative logarithm of, as gradients of the loss by the outputs.

The Fisher matrix of a sample is Σ v̄ v̄ᵀ with v̄ = Jᵀ v, over vectors v in output space with Σ v vᵀ = ∇²_f ℓ: all of them
(`roots`), or one drawn so that its second moment is that sum (`draw`): the loss's gradient at a label drawn from the
prediction. Draws are a function of the sample's content and the seed alone, so that neither batch size nor the order
or place of evaluation changes them.

Reference: Martens (2020), "New insights and perspectives on the natural gradient method", JMLR, sections 5 and 9.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from distinfluence.model.counter_random import Uniform


class Predictive(ABC):
    """Vectors over the outputs of n samples whose second moments are the loss's Hessian in the outputs."""

    @property
    @abstractmethod
    def n_roots(self) -> int:
        """How many vectors `roots` returns."""

    @abstractmethod
    def roots(self) -> Tensor:
        """[n_roots, n, *outputs]: Σ v vᵀ over the first dimension is ∇²_f ℓ of each sample."""

    @abstractmethod
    def draw(self, uniform: Uniform) -> Tensor:
        """[n, *outputs]: one v for each sample with E[v vᵀ] = ∇²_f ℓ."""


@dataclass(frozen=True)
class Categorical(Predictive):
    """Softmax over classes, independently at each position: cross-entropy.

    logits: [n, T, C]. weights: [n, T], of each position's cross-entropy in the sample's loss (1/T for a mean).
    moved: whether the outputs are [n, C, *positions], as torch's losses have them, and not [n, *positions, C].
    shape: of the outputs.
    """

    logits: Tensor
    weights: Tensor
    moved: bool
    shape: torch.Size

    @property
    def n_roots(self) -> int:
        """Positions × classes."""
        return self.logits.shape[1] * self.logits.shape[2]

    def _outputs(self, vectors: Tensor) -> Tensor:
        """[..., n, T, C] → [..., n, *outputs]."""
        inner = vectors.transpose(-1, -2) if self.moved else vectors
        return inner.reshape(*vectors.shape[:-3], *self.shape)

    def roots(self) -> Tensor:
        """√(w_t p_c) (p − e_c) at one position and class after the other: Σ_c p_c (p − e_c)(p − e_c)ᵀ."""
        p = torch.softmax(self.logits.detach(), dim=2)
        n, n_positions, n_classes = p.shape
        each = p.unsqueeze(2) - torch.eye(n_classes, dtype=p.dtype, device=p.device)  # [n, T, class, C]
        each = each * (p * self.weights.unsqueeze(2)).sqrt().unsqueeze(3)
        placed = torch.zeros(n_positions, n_classes, n, n_positions, n_classes, dtype=p.dtype, device=p.device)
        for t in range(n_positions):
            placed[t, :, :, t] = each[:, t].transpose(0, 1)
        return self._outputs(placed.flatten(0, 1))

    def draw(self, uniform: Uniform) -> Tensor:
        """√w_t (p − e_c) with c drawn from p at each position, independently."""
        p = torch.softmax(self.logits.detach(), dim=2)
        below = uniform(p.shape[1]).to(p.device).unsqueeze(2)
        cumulated = p.cumsum(dim=2, dtype=torch.float64)
        labels = (cumulated < below * cumulated[..., -1:]).sum(dim=2).clamp_max(p.shape[2] - 1)
        v = p.scatter_add(2, labels.unsqueeze(2), -torch.ones_like(p[..., :1]))
        return self._outputs(v * self.weights.sqrt().unsqueeze(2))


@dataclass(frozen=True)
class Independent(Predictive):
    """Outputs that are independent of each other: ∇²_f ℓ is diagonal. curvature: [n, *outputs], its diagonal, ≥ 0.

    Squared errors (a normal distribution), or cross-entropies of single probabilities.
    """

    curvature: Tensor

    @property
    def n_roots(self) -> int:
        """Number of outputs."""
        return self.curvature[0].numel()

    def roots(self) -> Tensor:
        """√curvature of one output after the other."""
        flat = self.curvature.sqrt().flatten(1)
        return torch.diag_embed(flat).transpose(0, 1).reshape(-1, *self.curvature.shape)

    def draw(self, uniform: Uniform) -> Tensor:
        """√curvature with random signs."""
        signs = torch.where(uniform(self.n_roots).to(self.curvature.device) < 0.5, -1.0, 1.0)
        return self.curvature.sqrt() * signs.to(self.curvature.dtype).reshape(self.curvature.shape)


@dataclass(frozen=True)
class Dense(Predictive):
    """Any convex loss of few outputs, by the eigenvectors of its Hessian. vectors: [m, n, *outputs]."""

    vectors: Tensor

    @classmethod
    def of(cls, hessians: Tensor, shape: torch.Size) -> "Dense":
        """hessians: [n, m, m], ∇²_f ℓ; what they have of negative curvature is left out. shape: of the outputs."""
        values, basis = torch.linalg.eigh(hessians.double())
        scaled = basis * values.clamp_min(0).sqrt().unsqueeze(1)  # [n, m, eigenvalue]
        return cls(scaled.permute(2, 0, 1).to(hessians.dtype).reshape(-1, *shape))

    @property
    def n_roots(self) -> int:
        """Number of outputs."""
        return self.vectors.shape[0]

    def roots(self) -> Tensor:
        """Return the scaled eigenvectors."""
        return self.vectors

    def draw(self, uniform: Uniform) -> Tensor:
        """Their sum with random signs."""
        signs = torch.where(uniform(self.n_roots).to(self.vectors.device) < 0.5, -1.0, 1.0).to(self.vectors.dtype)
        return torch.einsum("nm,mn...->n...", signs, self.vectors)
