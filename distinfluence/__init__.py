"""Exact, resumable, distributed influence functions for PyTorch models."""

from distinfluence.blocks import BlockMode, ParameterBlocks
from distinfluence.curvature import (
    EmpiricalFisherOperator,
    GGNOperator,
    HessianOperator,
    SecondOrderMode,
)
from distinfluence.errors import DistinfluenceError
from distinfluence.influence import (
    ArnoldiInfluence,
    AutoInfluence,
    CgInfluence,
    ChebyshevInfluence,
    DirectInfluence,
    EkfacInfluence,
    FitReport,
    InfluenceFunctionModel,
    InfluenceMode,
    InverseHarmonicMeanInfluence,
    KrylovInfluence,
    LissaInfluence,
    NystroemSketchInfluence,
    RelativeDamping,
    SelfInfluences,
    SolveReport,
)
from distinfluence.language import LanguageModelObjective
from distinfluence.objective import Objective, SupervisedObjective
from distinfluence.risk import EmpiricalRisk
from distinfluence.scaling import (
    DaskInfluenceCalculator,
    ModelRecipe,
    Recipe,
    SequentialInfluenceCalculator,
    load_fit,
    save_fit,
)
from distinfluence.solvers import EkfacPreConditioner, JacobiPreConditioner, NystroemPreConditioner
from distinfluence.store import InfluenceResult, annotate, open_influences

__version__ = "0.1.0"

__all__ = [
    "ArnoldiInfluence",
    "AutoInfluence",
    "BlockMode",
    "CgInfluence",
    "ChebyshevInfluence",
    "DaskInfluenceCalculator",
    "DirectInfluence",
    "DistinfluenceError",
    "EkfacInfluence",
    "EkfacPreConditioner",
    "EmpiricalFisherOperator",
    "EmpiricalRisk",
    "FitReport",
    "GGNOperator",
    "HessianOperator",
    "InfluenceFunctionModel",
    "InfluenceMode",
    "InfluenceResult",
    "InverseHarmonicMeanInfluence",
    "JacobiPreConditioner",
    "KrylovInfluence",
    "LanguageModelObjective",
    "LissaInfluence",
    "ModelRecipe",
    "NystroemPreConditioner",
    "NystroemSketchInfluence",
    "Objective",
    "ParameterBlocks",
    "Recipe",
    "RelativeDamping",
    "SecondOrderMode",
    "SelfInfluences",
    "SequentialInfluenceCalculator",
    "SolveReport",
    "SupervisedObjective",
    "annotate",
    "load_fit",
    "open_influences",
    "save_fit",
]
