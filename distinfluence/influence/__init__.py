"""Influence models: risk + blocks + curvature + solver behind the seed interface."""

from distinfluence.influence.arnoldi import ArnoldiInfluence
from distinfluence.influence.auto import AutoInfluence
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.cg import CgInfluence
from distinfluence.influence.chebyshev import ChebyshevInfluence
from distinfluence.influence.damping import RelativeDamping
from distinfluence.influence.direct import DirectInfluence
from distinfluence.influence.ekfac import EkfacInfluence
from distinfluence.influence.gradient_products import GradientCosineInfluence, GradientDotInfluence
from distinfluence.influence.harmonic_mean import InverseHarmonicMeanInfluence
from distinfluence.influence.krylov import KrylovInfluence
from distinfluence.influence.lissa import LissaInfluence
from distinfluence.influence.nystroem import NystroemSketchInfluence
from distinfluence.influence.report import BlockReport, FitReport, SolveReport
from distinfluence.influence.scores import InfluenceMode, Tile
from distinfluence.influence.self_influence import SelfInfluences

__all__ = [
    "ArnoldiInfluence",
    "AutoInfluence",
    "BlockReport",
    "CgInfluence",
    "ChebyshevInfluence",
    "DirectInfluence",
    "EkfacInfluence",
    "FitReport",
    "GradientCosineInfluence",
    "GradientDotInfluence",
    "InfluenceFunctionModel",
    "InfluenceMode",
    "InverseHarmonicMeanInfluence",
    "KrylovInfluence",
    "LissaInfluence",
    "NystroemSketchInfluence",
    "RelativeDamping",
    "SelfInfluences",
    "SolveReport",
    "Tile",
]
