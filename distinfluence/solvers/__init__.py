"""Solvers for (A + λI) x = b, one file a method."""

from distinfluence.solvers.arnoldi import Arnoldi
from distinfluence.solvers.auto import Auto
from distinfluence.solvers.base import (
    Outcome,
    Solution,
    Solver,
    SolverState,
    check_damping,
    check_rhs,
    check_tolerance,
)
from distinfluence.solvers.block_cg import BlockCG
from distinfluence.solvers.cg import CG
from distinfluence.solvers.chebyshev import Chebyshev
from distinfluence.solvers.direct import Direct
from distinfluence.solvers.ekfac import Ekfac, EkfacPreConditioner
from distinfluence.solvers.harmonic_mean import InverseHarmonicMean
from distinfluence.solvers.jacobi import JacobiPreConditioner
from distinfluence.solvers.krylov import BlockKrylov
from distinfluence.solvers.lissa import LiSSA
from distinfluence.solvers.nystroem import NystroemSketch
from distinfluence.solvers.nystroem_preconditioner import NystroemPreConditioner
from distinfluence.solvers.preconditioner import (
    FittedPreconditioner,
    Preconditioner,
    SupportsDamping,
    SupportsDemand,
    SupportsStorage,
)
from distinfluence.solvers.quadrature import Brackets, quadratic_forms
from distinfluence.solvers.refined import Refined
from distinfluence.solvers.residuals import (
    approximation,
)
from distinfluence.solvers.spectrum import Extremes, extreme_eigenvalues, mean_eigenvalue

__all__ = [
    "CG",
    "Arnoldi",
    "Auto",
    "BlockCG",
    "BlockKrylov",
    "Brackets",
    "Chebyshev",
    "Direct",
    "Ekfac",
    "EkfacPreConditioner",
    "Extremes",
    "FittedPreconditioner",
    "InverseHarmonicMean",
    "JacobiPreConditioner",
    "LiSSA",
    "NystroemPreConditioner",
    "NystroemSketch",
    "Outcome",
    "Preconditioner",
    "Refined",
    "Solution",
    "Solver",
    "SolverState",
    "SupportsDamping",
    "SupportsDemand",
    "SupportsStorage",
    "approximation",
    "check_damping",
    "check_rhs",
    "check_tolerance",
    "extreme_eigenvalues",
    "mean_eigenvalue",
    "quadratic_forms",
]
