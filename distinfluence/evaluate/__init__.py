"""What scores are worth."""

from distinfluence.evaluate.mislabel import MislabelRecall, mislabel_recall, net_harm

__all__ = ["MislabelRecall", "mislabel_recall", "net_harm"]
