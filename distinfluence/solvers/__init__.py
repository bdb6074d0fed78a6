"""Solvers for (A + λI) x = b, one file a method."""

from distinfluence.solvers.arnoldi import Arnoldi, Eigenpairs
from distinfluence.solvers.auto import Auto, AutoState
from distinfluence.solvers.base import Outcome, Solution, Solver, SolverState, WrappedState
from distinfluence.solvers.block_cg import BlockCG
from distinfluence.solvers.cg import CG
from distinfluence.solvers.chebyshev import Chebyshev, Interval
from distinfluence.solvers.direct import Direct, Factorisation
from distinfluence.solvers.ekfac import Ekfac, EkfacInverse, EkfacPreConditioner
from distinfluence.solvers.harmonic_mean import InverseHarmonicMean
from distinfluence.solvers.jacobi import Diagonal, JacobiPreConditioner
from distinfluence.solvers.krylov import BlockKrylov
from distinfluence.solvers.lanczos import BlockLanczos
from distinfluence.solvers.lissa import LiSSA, LissaState
from distinfluence.solvers.nystroem import LowRank, NystroemSketch, NystroemState
from distinfluence.solvers.nystroem_preconditioner import NystroemInverse, NystroemPreConditioner
from distinfluence.solvers.preconditioner import (
    FittedPreconditioner,
    Preconditioner,
    SupportsDamping,
    SupportsStorage,
)
from distinfluence.solvers.quadrature import Brackets, quadratic_forms
from distinfluence.solvers.refined import Refined, Refinement
from distinfluence.solvers.spectrum import Extremes, extreme_eigenvalues, mean_eigenvalue

__all__ = [
    "CG",
    "Arnoldi",
    "Auto",
    "AutoState",
    "BlockCG",
    "BlockKrylov",
    "BlockLanczos",
    "Brackets",
    "Chebyshev",
    "Diagonal",
    "Direct",
    "Eigenpairs",
    "Ekfac",
    "EkfacInverse",
    "EkfacPreConditioner",
    "Extremes",
    "Factorisation",
    "FittedPreconditioner",
    "Interval",
    "InverseHarmonicMean",
    "JacobiPreConditioner",
    "LiSSA",
    "LissaState",
    "LowRank",
    "NystroemInverse",
    "NystroemPreConditioner",
    "NystroemSketch",
    "NystroemState",
    "Outcome",
    "Preconditioner",
    "Refined",
    "Refinement",
    "Solution",
    "Solver",
    "SolverState",
    "SupportsDamping",
    "SupportsStorage",
    "WrappedState",
    "extreme_eigenvalues",
    "mean_eigenvalue",
    "quadratic_forms",
]
