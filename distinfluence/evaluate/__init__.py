"""What scores are worth."""

from distinfluence.evaluate.lds import LinearDatamodelingScore, linear_datamodeling_score
from distinfluence.evaluate.mislabel import MislabelRecall, mislabel_recall, net_harm
from distinfluence.evaluate.verify import Verification, verify, verify_entries

__all__ = [
    "LinearDatamodelingScore",
    "MislabelRecall",
    "Verification",
    "linear_datamodeling_score",
    "mislabel_recall",
    "net_harm",
    "verify",
    "verify_entries",
]
