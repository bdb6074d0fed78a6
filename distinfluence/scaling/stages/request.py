"""What a run is asked for, and what it is asked of."""

from collections.abc import Mapping
from dataclasses import dataclass

from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.scores import InfluenceMode
from distinfluence.model.identity.probe import Probe
from distinfluence.scaling.data.chunks import ChunkedData
from distinfluence.scaling.dispatch.executor import Executor
from distinfluence.scaling.partition import Partition
from distinfluence.scaling.plan.plan import Plan
from distinfluence.scaling.stages.probe import Sample
from distinfluence.scaling.worker.context import Context


@dataclass(frozen=True)
class FittedRun:
    """What a fit leaves for the stages after it.

    sha256: of the data that was fitted to; sample: what one of them is like; probe: what the model makes of some.
    """

    model: InfluenceFunctionModel
    context: Context
    executor: Executor
    train: ChunkedData
    sha256: str
    sample: Sample
    probe: Probe


@dataclass(frozen=True)
class Request:
    """What is asked of a run, beyond the fitted model.

    plan: chunk sizes, panel, and where is solved: "rows" solves each test chunk on one worker, which sweeps the
    training set by itself; "data" solves here and spreads each sweep over the workers. input_shape: of one training
    input for mode "perturbation", else empty. check: read what is there of a run that goes on, and make anew what is
    damaged. partition: the part of the strips to make, of runs that work on one result.
    """

    test: ChunkedData
    columns: ChunkedData
    mode: InfluenceMode
    plan: Plan
    input_shape: tuple[int, ...]
    top_k: int
    mantissa_bits: int
    overwrite: bool
    resume: bool
    attributes: Mapping[str, object]
    contributions: int = 0
    self_influence: bool = False
    check: bool = False
    partition: Partition | None = None
