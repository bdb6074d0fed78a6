"""What scores are worth."""

from distinfluence.evaluate.effects import Effects
from distinfluence.evaluate.figure import Figure
from distinfluence.evaluate.lds import LinearDatamodelingScore, linear_datamodeling_score
from distinfluence.evaluate.leave_one_out import LeaveOneOut
from distinfluence.evaluate.mislabel import MislabelRecall, mislabel_recall, net_harm
from distinfluence.evaluate.removal import LossRises, QueryLossDifference
from distinfluence.evaluate.retraining import Retrainer, Retraining, random_subsets, retrainings_of
from distinfluence.evaluate.verify import Verification, verify, verify_entries
from distinfluence.evaluate.weight_steps import WeightSteps

__all__ = [
    "Effects",
    "Figure",
    "LeaveOneOut",
    "LinearDatamodelingScore",
    "LossRises",
    "MislabelRecall",
    "QueryLossDifference",
    "Retrainer",
    "Retraining",
    "Verification",
    "WeightSteps",
    "linear_datamodeling_score",
    "mislabel_recall",
    "net_harm",
    "random_subsets",
    "retrainings_of",
    "verify",
    "verify_entries",
]
