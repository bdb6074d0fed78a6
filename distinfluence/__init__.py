"""Exact, resumable, distributed influence functions for PyTorch models.

Names are imported when they are first used: whoever opens a result does not wait for torch, whoever asks a model in
memory does not wait for dask and zarr.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

# where each public name is at home; a test compares it with what type checkers see above
_HOMES = {
    "distinfluence.blocks": (
        "BlockMode",
        "ParameterBlocks",
    ),
    "distinfluence.curvature": (
        "EmpiricalFisherOperator",
        "GGNOperator",
        "HessianOperator",
        "SecondOrderMode",
    ),
    "distinfluence.errors": ("DistinfluenceError",),
    "distinfluence.influence": (
        "ArnoldiInfluence",
        "AutoInfluence",
        "CgInfluence",
        "ChebyshevInfluence",
        "DirectInfluence",
        "EkfacInfluence",
        "FitReport",
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
    "distinfluence.language": ("LanguageModelObjective",),
    "distinfluence.objective": (
        "Objective",
        "SupervisedObjective",
    ),
    "distinfluence.risk": ("EmpiricalRisk",),
    "distinfluence.scaling": (
        "DaskInfluenceCalculator",
        "ModelRecipe",
        "Recipe",
        "SequentialInfluenceCalculator",
        "load_fit",
        "save_fit",
    ),
    "distinfluence.solvers": (
        "EkfacPreConditioner",
        "JacobiPreConditioner",
        "NystroemPreConditioner",
    ),
    "distinfluence.store": (
        "InfluenceResult",
        "annotate",
        "open_influences",
    ),
}


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(module), name)
            globals()[name] = value
            return value
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
