"""Solvers for (A + λI) x = b, one file a method."""

from distinfluence.solvers.base import Outcome, Solution, Solver, SolverState
from distinfluence.solvers.block_cg import BlockCG
from distinfluence.solvers.cg import CG
from distinfluence.solvers.direct import Direct, Factorisation
from distinfluence.solvers.krylov import BlockKrylov
from distinfluence.solvers.preconditioner import (
    FittedPreconditioner,
    Preconditioner,
    SupportsDamping,
    SupportsStorage,
)

__all__ = [
    "CG",
    "BlockCG",
    "BlockKrylov",
    "Direct",
    "Factorisation",
    "FittedPreconditioner",
    "Outcome",
    "Preconditioner",
    "Solution",
    "Solver",
    "SolverState",
    "SupportsDamping",
    "SupportsStorage",
]
