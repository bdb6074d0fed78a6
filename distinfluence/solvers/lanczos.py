"""Block Lanczos with full reorthogonalisation: one orthonormal basis of a Krylov space, grown a block for each pass.

A symmetric: V A Vᵀ = T is block tridiagonal in exact arithmetic; here T is kept full in float64, and every new block
is made orthogonal to all earlier ones twice, so that what is read off T holds in float32 too. Every block's product
lies in the span of the basis and the block that waits for its own product, so residuals cost no pass. Memory: the
basis, m·p numbers, or what `restart` leaves of it. References: Golub & Van Loan (2013), Matrix Computations, section
10.3.6; Wu & Simon (2000), "Thick-restart Lanczos method", SIAM J. Matrix Anal. Appl. 22.
"""

import torch
from torch import Tensor

from distinfluence.curvature.base import CurvatureOperator
from distinfluence.solvers.block_cg import orthonormal_rows

COLUMNS = 2**16  # of the basis that a restart rotates at once


class BlockLanczos:
    """The basis V [m, p] of K(A, start) with T = V A Vᵀ [m, m], and the block that comes next.

    start: [k, p], any rows; dependent ones are dropped. `step` costs one pass, with as many rows as the block has.
    most: vectors that the basis will hold at most, where that is known: no memory is reserved for more.
    """

    def __init__(self, operator: CurvatureOperator, start: Tensor, most: int | None = None) -> None:
        self._operator = operator
        self._most = operator.size if most is None else most
        self.next = orthonormal_rows(start)
        self.coupling = torch.zeros(0, self.next.shape[0], dtype=torch.float64, device=start.device)
        self.projected = torch.zeros(0, 0, dtype=torch.float64, device=start.device)
        self._storage = start.new_empty(0, start.shape[1])
        self.size = 0
        self.largest = 0.0

    @property
    def basis(self) -> Tensor:
        """V [m, p]: orthonormal rows whose products are known."""
        return self._storage[: self.size]

    @property
    def exhausted(self) -> bool:
        """Whether the space is invariant: the basis cannot grow."""
        return self.next.shape[0] == 0

    @property
    def outflow(self) -> float:
        """‖coupling‖: how far the products of the basis lead out of it; 0 where it is invariant."""
        return float(torch.linalg.matrix_norm(self.coupling, 2)) if self.coupling.numel() else 0.0

    def step(self) -> None:
        """Multiply the block that waits with A, take it into the basis, and find the next one."""
        block = self.next
        product = self._operator.matmat(block)
        self._append(block)
        basis, n_new = self.basis, block.shape[0]
        against = (product @ basis.T).double()
        rest = product - against.to(product.dtype) @ basis
        again = (rest @ basis.T).double()  # twice is enough (Kahan and Parlett): once leaves eps·‖A‖/‖rest‖
        rest -= again.to(rest.dtype) @ basis
        self._project(against + again, n_new)
        self.next, coupling = self._split(rest)
        old = self.size - n_new
        self.coupling = torch.cat([coupling.new_zeros(old, coupling.shape[1]), coupling])

    def restart(self, coordinates: Tensor) -> None:
        """Keep of the basis only the vectors with these coordinates, orthonormal columns [m, k] of `ritz`.

        The block that waits stays, and with it what their products miss: the space goes on growing as if it had held
        nothing else. No pass, and no memory in addition to the basis.
        """
        kept = coordinates.shape[1]
        rotation = coordinates.T.to(self._storage.dtype)
        for columns in self._storage.split(COLUMNS, dim=1):
            columns[:kept] = rotation @ columns[: self.size]
        self.size = kept
        self.projected = coordinates.T @ self.projected @ coordinates
        self.coupling = coordinates.T @ self.coupling

    def widen(self, rows: Tensor) -> None:
        """Let what of these rows [k, p] lies outside of the space wait for its product too: a way on where it is
        exhausted, or as good as invariant."""
        waiting = self.next

        def outside(some: Tensor) -> Tensor:
            return some - (some @ self.basis.T) @ self.basis - (some @ waiting.T) @ waiting

        rows = orthonormal_rows(outside(rows))
        # rounding that was scaled up to norm 1 lies inside of the space: of such rows nothing is left now
        q, r = torch.linalg.qr(outside(rows).T)
        u, sigma, _ = torch.linalg.svd(r)
        rows = orthonormal_rows(outside((q @ u[:, sigma > 0.5]).T))
        self.next = torch.cat([waiting, rows])
        self.coupling = torch.cat([self.coupling, self.coupling.new_zeros(self.size, rows.shape[0])], dim=1)

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values θ [m] ascending, coordinates of their vectors in the basis as columns [m, m], residuals [m].

        Residuals are ‖A v − θ v‖, all float64.
        """
        values, coordinates = torch.linalg.eigh(self.projected)
        residuals = torch.linalg.vector_norm(self.coupling.T @ coordinates, dim=0)
        return values, coordinates, residuals

    def _append(self, block: Tensor) -> None:
        needed = self.size + block.shape[0]
        if needed > self._storage.shape[0]:
            rows = max(needed, min(2 * self._storage.shape[0], self._most))
            grown = block.new_empty(rows, block.shape[1])
            grown[: self.size] = self.basis
            self._storage = grown
        self._storage[self.size : needed] = block
        self.size = needed

    def _project(self, rows: Tensor, n_new: int) -> None:
        """Border T with the new rows [n_new, m]."""
        old = self.size - n_new
        bordered = rows.new_zeros(self.size, self.size)
        bordered[:old, :old] = self.projected
        bordered[old:] = rows
        bordered[:old, old:] = rows[:, :old].T
        corner = bordered[old:, old:]
        bordered[old:, old:] = (corner + corner.T) / 2
        self.projected = bordered
        if bordered.isfinite().all():
            self.largest = max(self.largest, float(torch.linalg.matrix_norm(rows, 2)))

    def _split(self, rest: Tensor) -> tuple[Tensor, Tensor]:
        """rest [n, p] = coupling [n, r] · rows [r, p], orthonormal; directions that are rounding are dropped."""
        q, r = torch.linalg.qr(rest.T)
        if not r.isfinite().all():
            return rest[:0], self.projected.new_zeros(rest.shape[0], 0)
        u, sigma, _ = torch.linalg.svd(r.double(), full_matrices=False)
        kept = sigma > 10 * rest.shape[1] ** 0.5 * torch.finfo(rest.dtype).eps * self.largest
        rows = (q @ u[:, kept].to(rest.dtype)).T.contiguous()
        # q loses orthogonality to the basis by eps·‖A‖/σ when a small rest is scaled up
        rows -= (rows @ self.basis.T) @ self.basis
        rows = orthonormal_rows(rows)
        return rows, (rest @ rows.T).double()
