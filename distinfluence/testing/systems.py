"""Systems to solve, as data: symmetric matrices of known spectrum, dampings, right-hand sides, and dense solutions."""

from dataclasses import dataclass

import torch
from torch import Tensor

P = 40


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def with_spectrum(eigenvalues: Tensor, seed: int = 1) -> Tensor:
    """Return a symmetric matrix [p, p] with these eigenvalues [p] and random eigenvectors."""
    q, _ = torch.linalg.qr(randn(len(eigenvalues), len(eigenvalues), seed=seed))
    matrix = (q * eigenvalues.double()) @ q.T
    result: Tensor = (matrix + matrix.T) / 2
    return result


def spd(p: int = P, cond: float = 1e4) -> Tensor:
    return with_spectrum(torch.logspace(0, 1, p, base=cond, dtype=torch.float64) / cond)


def low_rank(p: int = P, n: int = 9) -> Tensor:
    """Return a matrix like the empirical Fisher of n samples: (1/n) Σ g gᵀ, rank n."""
    g = randn(n, p, seed=2)
    return g.T @ g / n


def clustered() -> Tensor:
    values = torch.cat([torch.full((20,), 1.0), torch.full((15,), 1e-2), torch.full((P - 35,), 1e-4)]).double()
    return with_spectrum(values * (1 + 1e-9 * randn(P, seed=3)))


def diagonal_with_zeros() -> Tensor:
    return torch.diag(torch.arange(P, dtype=torch.float64).remainder(5))


def indefinite() -> Tensor:
    """Return a matrix with eigenvalues −0.5 … 1; none is near zero."""
    return with_spectrum(torch.cat([torch.linspace(-0.5, -0.1, 8), torch.linspace(0.1, 1.0, P - 8)]))


MATRICES = {
    "random": spd(),
    "low rank": low_rank(),
    "clustered": clustered(),
    "diagonal": diagonal_with_zeros(),
    "one by one": torch.tensor([[3.0]], dtype=torch.float64),
}


@dataclass(frozen=True)
class System:
    """(matrix + damping·I) x = rhs. damping is given relative to ‖matrix‖."""

    name: str
    relative_damping: float

    @property
    def matrix(self) -> Tensor:
        return MATRICES[self.name].clone()

    @property
    def damping(self) -> float:
        return self.relative_damping * float(torch.linalg.matrix_norm(self.matrix, 2))

    def rhs(self, k: int = 5) -> Tensor:
        return randn(k, self.matrix.shape[0], seed=4)

    def __str__(self) -> str:
        return f"{self.name}, {self.relative_damping:g}"


SYSTEMS = [System(name, damping) for name in MATRICES for damping in (1e-1, 1e-2, 1e-4)]
SYSTEM = System("random", 1e-2)


def damped(matrix: Tensor, damping: float) -> Tensor:
    return matrix.double() + damping * torch.eye(matrix.shape[0], dtype=torch.float64)


def dense_solution(matrix: Tensor, damping: float, rhs: Tensor) -> Tensor:
    """Solve (matrix + damping·I) x = rhs for each row by LU in float64: [k, p]."""
    x: Tensor = torch.linalg.solve(damped(matrix, damping), rhs.double().T)
    return x.T


def relative_error(x: Tensor, expected: Tensor) -> float:
    """Return the largest ‖x_i − expected_i‖ / ‖expected_i‖ of all rows; absolute for rows expected to be zero."""
    norm = expected.norm(dim=1)
    return float(((x.double() - expected).norm(dim=1) / torch.where(norm > 0, norm, 1.0)).max())


def relative_residual(matrix: Tensor, damping: float, rhs: Tensor, x: Tensor) -> Tensor:
    """Return ‖rhs − (A + λI) x‖ / ‖rhs‖ of each row, in float64."""
    residual = rhs.double() - x.double() @ damped(matrix, damping)
    result: Tensor = residual.norm(dim=1) / rhs.double().norm(dim=1)
    return result
