"""What scores are worth."""

from distinfluence.evaluate.agreement import Agreement, rank_agreement
from distinfluence.evaluate.bank.checks import MemberEffect
from distinfluence.evaluate.bank.retraining_bank import RetrainingBank
from distinfluence.evaluate.baselines.bm25 import Bm25
from distinfluence.evaluate.baselines.rules import Baseline, PlainLoss, RandomScores
from distinfluence.evaluate.baselines.write import write_baseline
from distinfluence.evaluate.checks.effects import Effects
from distinfluence.evaluate.checks.leave_one_out import LeaveOneOut
from distinfluence.evaluate.checks.linear_datamodeling import LinearDatamodeling
from distinfluence.evaluate.checks.removal import LossRises, QueryLossDifference
from distinfluence.evaluate.checks.weight_steps import WeightSteps
from distinfluence.evaluate.evaluation import Check, Evaluation, evaluate
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
from distinfluence.evaluate.trainers.script import ScriptTrainer
from distinfluence.evaluate.trainers.small_networks import SmallNetworks
from distinfluence.evaluate.trainers.to_minimum import ToMinimum
from distinfluence.evaluate.verify import Verification, verify, verify_entries

__all__ = [
    "Agreement",
    "Baseline",
    "Bm25",
    "Check",
    "Effects",
    "Estimate",
    "Evaluation",
    "Figure",
    "LeaveOneOut",
    "LinearDatamodeling",
    "LinearDatamodelingScore",
    "LossRises",
    "MemberEffect",
    "MislabelDetection",
    "MislabelRecall",
    "PerQuery",
    "PlainLoss",
    "PlantedRecall",
    "QueryLossDifference",
    "RandomScores",
    "Retrainer",
    "Retraining",
    "RetrainingBank",
    "ScriptTrainer",
    "SmallNetworks",
    "ToMinimum",
    "Verification",
    "WeightSteps",
    "detect_mislabelled",
    "evaluate",
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
    "write_baseline",
]
