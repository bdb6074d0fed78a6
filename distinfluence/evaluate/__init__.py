"""What scores are worth."""

from distinfluence.evaluate.agreement import Agreement, rank_agreement
from distinfluence.evaluate.figure import Figure
from distinfluence.evaluate.lds import LinearDatamodelingScore, linear_datamodeling_score, seed_matched_score
from distinfluence.evaluate.mislabel import (
    MislabelDetection,
    MislabelRecall,
    detect_mislabelled,
    mislabel_recall,
    net_harm,
)
from distinfluence.evaluate.planted import PlantedRecall, planted_recall
from distinfluence.evaluate.retraining import Retrainer, Retraining, random_subsets, retrainings_of
from distinfluence.evaluate.statistics import Estimate, PerQuery, remarks_on_baselines
from distinfluence.evaluate.verify import Verification, verify, verify_entries

__all__ = [
    "Agreement",
    "Estimate",
    "Figure",
    "LinearDatamodelingScore",
    "MislabelDetection",
    "MislabelRecall",
    "PerQuery",
    "PlantedRecall",
    "Retrainer",
    "Retraining",
    "Verification",
    "detect_mislabelled",
    "linear_datamodeling_score",
    "mislabel_recall",
    "net_harm",
    "planted_recall",
    "random_subsets",
    "rank_agreement",
    "remarks_on_baselines",
    "retrainings_of",
    "seed_matched_score",
    "verify",
    "verify_entries",
]
