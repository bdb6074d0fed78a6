"""What scores are worth."""

from distinfluence.evaluate.baselines.bm25 import Bm25
from distinfluence.evaluate.baselines.rules import Baseline, PlainLoss, RandomScores
from distinfluence.evaluate.baselines.write import write_baseline
from distinfluence.evaluate.figure import Figure
from distinfluence.evaluate.lds import LinearDatamodelingScore, linear_datamodeling_score
from distinfluence.evaluate.mislabel import MislabelRecall, mislabel_recall, net_harm
from distinfluence.evaluate.retraining import Retrainer, Retraining, random_subsets, retrainings_of
from distinfluence.evaluate.verify import Verification, verify, verify_entries

__all__ = [
    "Baseline",
    "Bm25",
    "Figure",
    "LinearDatamodelingScore",
    "MislabelRecall",
    "PlainLoss",
    "RandomScores",
    "Retrainer",
    "Retraining",
    "Verification",
    "linear_datamodeling_score",
    "mislabel_recall",
    "net_harm",
    "random_subsets",
    "retrainings_of",
    "verify",
    "verify_entries",
    "write_baseline",
]
