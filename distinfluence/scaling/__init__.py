"""Influence matrices over chunked data, on this machine or on a Dask cluster."""

from distinfluence.scaling.calculator import InfluenceCalculator
from distinfluence.scaling.chunks import ChunkedData
from distinfluence.scaling.clusters import ClusterSpec, connected
from distinfluence.scaling.logs import LogToFolder
from distinfluence.scaling.on_dask import DaskInfluenceCalculator
from distinfluence.scaling.plan import Plan, make_plan
from distinfluence.scaling.progress import Progress
from distinfluence.scaling.recipe import ModelRecipe, Recipe
from distinfluence.scaling.saved import load_fit, save_fit
from distinfluence.scaling.sequential import SequentialInfluenceCalculator
from distinfluence.scaling.slurm import was_requeued
from distinfluence.scaling.stages import Stage
from distinfluence.scaling.work import Machine

__all__ = [
    "ChunkedData",
    "ClusterSpec",
    "DaskInfluenceCalculator",
    "InfluenceCalculator",
    "LogToFolder",
    "Machine",
    "ModelRecipe",
    "Plan",
    "Progress",
    "Recipe",
    "SequentialInfluenceCalculator",
    "Stage",
    "connected",
    "load_fit",
    "make_plan",
    "save_fit",
    "was_requeued",
]
