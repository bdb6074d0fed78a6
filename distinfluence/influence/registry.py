"""The methods by the names that job files use. A new method is one solver, one influence model, and one line here."""

from collections.abc import Mapping

from distinfluence.influence.arnoldi import ArnoldiInfluence
from distinfluence.influence.auto import AutoInfluence
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.cg import CgInfluence
from distinfluence.influence.chebyshev import ChebyshevInfluence
from distinfluence.influence.direct import DirectInfluence
from distinfluence.influence.ekfac import EkfacInfluence
from distinfluence.influence.gradient_products import GradientCosineInfluence, GradientDotInfluence
from distinfluence.influence.harmonic_mean import InverseHarmonicMeanInfluence
from distinfluence.influence.krylov import KrylovInfluence
from distinfluence.influence.lissa import LissaInfluence
from distinfluence.influence.nystroem import NystroemSketchInfluence

METHODS: Mapping[str, type[InfluenceFunctionModel]] = {
    "arnoldi": ArnoldiInfluence,
    "auto": AutoInfluence,
    "cg": CgInfluence,
    "chebyshev": ChebyshevInfluence,
    "datainf": InverseHarmonicMeanInfluence,
    "direct": DirectInfluence,
    "ekfac": EkfacInfluence,
    "gradient_cosine": GradientCosineInfluence,
    "gradient_dot": GradientDotInfluence,
    "krylov": KrylovInfluence,
    "lissa": LissaInfluence,
    "nystroem": NystroemSketchInfluence,
}
