"""What scores are worth."""

from distinfluence.evaluate.mislabel import MislabelRecall, mislabel_recall, net_harm
from distinfluence.evaluate.verify import Verification, verify, verify_entries

__all__ = ["MislabelRecall", "Verification", "mislabel_recall", "net_harm", "verify", "verify_entries"]
