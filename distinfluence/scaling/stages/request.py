"""What a run is asked for, what it is asked of, and the run that carries it out."""

from dataclasses import dataclass
from pathlib import Path

from distinfluence.errors import ChunkError
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.model.identity.probe import Probe
from distinfluence.scaling.data.chunks import ChunkedData
from distinfluence.scaling.dispatch.executor import Executor
from distinfluence.scaling.partition import Partition
from distinfluence.scaling.plan.plan import Plan
from distinfluence.scaling.progress import Progress
from distinfluence.scaling.run_options import RunOptions
from distinfluence.scaling.stages.probe import Sample
from distinfluence.scaling.worker.context import Context
from distinfluence.store import InfluenceWriter


@dataclass(frozen=True)
class FittedRun:
    """What a fit leaves for the stages after it.

    Attributes:
        model: The fitted influence model.
        context: Where tasks get the fitted model from.
        executor: What runs the tasks.
        train: The training data.
        sha256: Fingerprint of the training data.
        sample: What one of the training samples is like.
        probe: What the model makes of some samples.
        numbered: Whether the training data have the caller's order. Those of a shuffling loader do not.
    """

    model: InfluenceFunctionModel
    context: Context
    executor: Executor
    train: ChunkedData
    sha256: str
    sample: Sample
    probe: Probe
    numbered: bool = True

    @property
    def columns(self) -> ChunkedData:
        """The training data as columns of the matrix. Raises ChunkError if nobody knows which sample is which."""
        if not self.numbered:
            raise ChunkError(
                "`x` must be passed, since the model was fitted to a DataLoader that shuffles: columns for the samples "
                "of the fit would have no numbers."
            )
        return self.train


@dataclass(frozen=True)
class Request:
    """Holds what is asked of a run, in addition to the fitted model.

    Attributes:
        test: The test data.
        columns: The training points of the matrix's columns.
        plan: Chunk sizes, panel, and where the run solves: "rows" solves each test chunk on one worker, which sweeps
            the training set by itself; "data" solves here and spreads each sweep over the workers.
        options: The options of the run.
        partition: The strips to make, where several runs work on one result.
    """

    test: ChunkedData
    columns: ChunkedData
    plan: Plan
    options: RunOptions
    partition: Partition


@dataclass(frozen=True)
class Run:
    """A request that is being carried out: its stages take this. folder: of its factors, in the scratch folder."""

    fitted: FittedRun
    request: Request
    writer: InfluenceWriter
    folder: Path
    partition: Partition
    progress: Progress

    @property
    def factors(self) -> str:
        """The file of the factors of all test points."""
        return str(self.folder / "factors.npy")

    @property
    def pending(self) -> list[int]:
        """The strips that are left to this run."""
        return self.partition.of(self.writer.pending())
