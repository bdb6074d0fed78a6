"""Arnoldi: the contract at full rank, and what a low rank promises."""

from dataclasses import replace

import pytest
import torch

from distinfluence.solvers.arnoldi import Arnoldi, Eigenpairs

from .contract import SolverContract
from .systems import P


class TestArnoldi(SolverContract[Eigenpairs]):
    solver = Arnoldi(damping=0.0, rank_estimate=P)
    accuracy = 1e-8
