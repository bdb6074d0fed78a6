"""Influence matrices over chunked data, on this machine or on a Dask cluster."""

from distinfluence.scaling.calculator import (
    DaskInfluenceCalculator,
    InfluenceCalculator,
    SequentialInfluenceCalculator,
)
from distinfluence.scaling.chunks import ChunkedData
from distinfluence.scaling.clusters import ClusterSpec, connected
from distinfluence.scaling.progress import Progress
from distinfluence.scaling.recipe import ModelRecipe, Recipe

__all__ = [
    "ChunkedData",
    "ClusterSpec",
    "DaskInfluenceCalculator",
    "InfluenceCalculator",
    "ModelRecipe",
    "Progress",
    "Recipe",
    "SequentialInfluenceCalculator",
    "connected",
]
