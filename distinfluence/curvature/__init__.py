"""Curvature matrices as linear operators, one file a matrix."""

from collections.abc import Mapping
from enum import StrEnum

from distinfluence.curvature.base import (
    CurvatureOperator,
    MatrixOperator,
    PlannedWork,
    SupportsBatches,
    SupportsDouble,
    SupportsEigenbasis,
    SupportsGaussNewton,
    SupportsSampleGradients,
    Work,
)
from distinfluence.curvature.empirical_fisher import EmpiricalFisherOperator
from distinfluence.curvature.ggn import GGNOperator
from distinfluence.curvature.hessian import HessianOperator
from distinfluence.curvature.kronecker import KroneckerOperator
from distinfluence.curvature.none import NoCurvature
from distinfluence.curvature.over_data import DataOperator

__all__ = [
    "CurvatureOperator",
    "DataOperator",
    "EmpiricalFisherOperator",
    "GGNOperator",
    "HessianOperator",
    "KroneckerOperator",
    "MatrixOperator",
    "NoCurvature",
    "PlannedWork",
    "SecondOrderMode",
    "SupportsBatches",
    "SupportsDouble",
    "SupportsEigenbasis",
    "SupportsGaussNewton",
    "SupportsSampleGradients",
    "Work",
    "operator_class",
]


class SecondOrderMode(StrEnum):
    """Which curvature matrix of the mean training loss."""

    EMPIRICAL_FISHER = "empirical_fisher"
    GGN = "ggn"
    HESSIAN = "hessian"
    NONE = "none"  # A = 0


_OPERATORS: Mapping[SecondOrderMode, type[DataOperator]] = {
    SecondOrderMode.EMPIRICAL_FISHER: EmpiricalFisherOperator,
    SecondOrderMode.GGN: GGNOperator,
    SecondOrderMode.HESSIAN: HessianOperator,
    SecondOrderMode.NONE: NoCurvature,
}


def operator_class(mode: SecondOrderMode) -> type[DataOperator]:
    """Return the operator of a second-order mode.

    Args:
        mode: Which curvature matrix.

    Returns:
        The class of its operator over a data set.
    """
    return _OPERATORS[mode]
