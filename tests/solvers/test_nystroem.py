"""NystroemSketch: the contract at full rank, and what a sketch of lower rank promises."""

from distinfluence.solvers.nystroem import NystroemSketch, Sketched

from .contract import SolverContract
from .systems import P


class TestNystroemSketch(SolverContract[Sketched]):
    solver = NystroemSketch(damping=0.0, rank=P)
    accuracy = 1e-8
