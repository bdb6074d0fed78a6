"""Influence matrices over chunked data, on this machine or on a Dask cluster."""

from distinfluence.scaling.calculator import InfluenceCalculator
from distinfluence.scaling.clusters.connect import ClusterSpec, connected
from distinfluence.scaling.clusters.slurm import was_requeued
from distinfluence.scaling.dask_calculator import DaskInfluenceCalculator
from distinfluence.scaling.data.chunks import ChunkedData
from distinfluence.scaling.data.recipe import ModelRecipe, Recipe
from distinfluence.scaling.plan.costs import Stage
from distinfluence.scaling.plan.plan import Plan, make_plan
from distinfluence.scaling.plan.problem import Machine
from distinfluence.scaling.progress import Progress
from distinfluence.scaling.run_options import ExistingResult, RunOptions
from distinfluence.scaling.saved_fit import load_fit, save_fit
from distinfluence.scaling.sequential_calculator import SequentialInfluenceCalculator
from distinfluence.scaling.worker.logs import LogToFolder

__all__ = [
    "ChunkedData",
    "ClusterSpec",
    "DaskInfluenceCalculator",
    "ExistingResult",
    "InfluenceCalculator",
    "LogToFolder",
    "Machine",
    "ModelRecipe",
    "Plan",
    "Progress",
    "Recipe",
    "RunOptions",
    "SequentialInfluenceCalculator",
    "Stage",
    "connected",
    "load_fit",
    "make_plan",
    "save_fit",
    "was_requeued",
]
