"""Influence models: risk + blocks + curvature + solver behind the seed interface."""

from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.cg import CgInfluence
from distinfluence.influence.direct import DirectInfluence
from distinfluence.influence.report import BlockReport, FitReport, SolveReport
from distinfluence.influence.scores import InfluenceMode, Tile

__all__ = [
    "BlockReport",
    "CgInfluence",
    "DirectInfluence",
    "FitReport",
    "InfluenceFunctionModel",
    "InfluenceMode",
    "SolveReport",
    "Tile",
]
