"""Exact, resumable, distributed influence functions for PyTorch models.

Importing this package loads nothing else: each public name brings its module when it is first used, so that nobody
waits for what they do not need (dask, zarr, even torch).
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
        GradientCosineInfluence,
        GradientDotInfluence,
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
    from distinfluence.model.blocks import BlockMode, ParameterBlocks
    from distinfluence.model.language import LanguageModelObjective
    from distinfluence.model.objective import Objective, SupervisedObjective
    from distinfluence.model.risk import EmpiricalRisk
    from distinfluence.scaling import (
        DaskInfluenceCalculator,
        ExistingResult,
        ModelRecipe,
        Recipe,
        RunOptions,
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
    "ExistingResult",
    "FitReport",
    "GGNOperator",
    "GradientCosineInfluence",
    "GradientDotInfluence",
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
    "RunOptions",
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

# module → the public names that it brings, as for the type checker above
_NAMES = {
    "model.blocks": ("BlockMode", "ParameterBlocks"),
    "curvature": ("EmpiricalFisherOperator", "GGNOperator", "HessianOperator", "SecondOrderMode"),
    "errors": ("DistinfluenceError",),
    "influence": (
        "ArnoldiInfluence",
        "AutoInfluence",
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
    ),
    "model.language": ("LanguageModelObjective",),
    "model.objective": ("Objective", "SupervisedObjective"),
    "model.risk": ("EmpiricalRisk",),
    "scaling": (
        "DaskInfluenceCalculator",
        "ExistingResult",
        "ModelRecipe",
        "Recipe",
        "RunOptions",
        "SequentialInfluenceCalculator",
        "load_fit",
        "save_fit",
    ),
    "solvers": ("EkfacPreConditioner", "JacobiPreConditioner", "NystroemPreConditioner"),
    "store": ("InfluenceResult", "annotate", "open_influences"),
}
_PACKAGES = {module.partition(".")[0] for module in _NAMES}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name in _PACKAGES:
        return import_module(f"distinfluence.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(f"distinfluence.{_HOMES[name]}"), name)
    globals()[name] = found  # found at once the next time
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
