"""Solvers for (A + λI) x = b, one file a method."""

from distinfluence.solvers.arnoldi import Arnoldi, Eigenpairs
from distinfluence.solvers.base import Outcome, Solution, Solver, SolverState
from distinfluence.solvers.block_cg import BlockCG
from distinfluence.solvers.cg import CG
from distinfluence.solvers.direct import Direct, Factorisation
from distinfluence.solvers.krylov import BlockKrylov
from distinfluence.solvers.nystroem import LowRank, NystroemSketch, Sketched, nystroem
from distinfluence.solvers.preconditioner import (
    FittedPreconditioner,
    Preconditioner,
    SupportsDamping,
    SupportsStorage,
)

__all__ = [
    "CG",
    "Arnoldi",
    "BlockCG",
    "BlockKrylov",
    "Direct",
    "Eigenpairs",
    "Factorisation",
    "FittedPreconditioner",
    "LowRank",
    "NystroemSketch",
    "Outcome",
    "Preconditioner",
    "Sketched",
    "Solution",
    "Solver",
    "SolverState",
    "SupportsDamping",
    "SupportsStorage",
    "nystroem",
]
