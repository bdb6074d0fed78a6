"""What scores are worth."""

from distinfluence.evaluate.figure import Figure
from distinfluence.evaluate.lds import LinearDatamodelingScore, linear_datamodeling_score
from distinfluence.evaluate.mislabel import MislabelRecall, mislabel_recall, net_harm
from distinfluence.evaluate.retraining import Retrainer, Retraining, random_subsets, retrainings_of
from distinfluence.evaluate.trainers.script import ScriptTrainer
from distinfluence.evaluate.trainers.small_networks import SmallNetworks
from distinfluence.evaluate.trainers.to_minimum import ToMinimum
from distinfluence.evaluate.verify import Verification, verify, verify_entries

__all__ = [
    "Figure",
    "LinearDatamodelingScore",
    "MislabelRecall",
    "Retrainer",
    "Retraining",
    "ScriptTrainer",
    "SmallNetworks",
    "ToMinimum",
    "Verification",
    "linear_datamodeling_score",
    "mislabel_recall",
    "net_harm",
    "random_subsets",
    "retrainings_of",
    "verify",
    "verify_entries",
]
