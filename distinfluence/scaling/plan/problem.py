"""What a plan is made from: what is to be computed, where, and what is fixed already."""

from dataclasses import dataclass

from distinfluence.solvers.demand import Demand

KEPT_SHARE, KEPT_MOST = 0.125, 2**30  # of a worker's memory for loaded chunks that it keeps between tasks, and no more


@dataclass(frozen=True)
class Problem:
    """Describes what the run will compute.

    Attributes:
        n_test: Test points, the rows of the matrix.
        n_train: Training points, the columns of the matrix.
        n_fit: Samples of the fit.
        p: Covered parameters.
        itemsize: Bytes of a number.
        train_bytes: Bytes of one training sample as it is loaded.
        model_bytes: Bytes of the model's parameters and buffers.
        demand: What the method needs.
        entry: Numbers in an entry of the matrix: 1, or the numbers of an input for mode "perturbation".
        top_k: Training points at each end of a ranking.
        over_data: Whether the method's solves make passes over the training data.
        built_bytes: Bytes of data sets that every process builds for itself.
        by_gradients: Whether the curvature is made of gradients of single samples; a process keeps some between passes.
        contributions: Pairs at each end of a ranking that are split into contributions.
        self_influence: Whether self-influences are computed.
        forward_flops: Flops of the model's outputs for one sample; 0 if they were not counted.
        block_size: Parameters of the largest block of the curvature; all of them if 0.
    """

    n_test: int
    n_train: int
    n_fit: int
    p: int
    itemsize: int
    train_bytes: int
    model_bytes: int
    demand: Demand
    entry: int = 1
    top_k: int = 50
    over_data: bool = True
    built_bytes: int = 0
    by_gradients: bool = False
    contributions: int = 0
    self_influence: bool = False
    forward_flops: float = 0.0
    block_size: int = 0

    @property
    def sample_flops(self) -> float:
        """Flops of the model's outputs for one sample: as counted, and two for each parameter at least."""
        return max(2.0 * self.p, self.forward_flops)

    @property
    def largest_block(self) -> int:
        """Parameters of the largest block."""
        return self.block_size or self.p

    def kept(self, n: int, most: int) -> int:
        """Bytes of loaded chunks of n samples that a process keeps; none where they are views of a built data set."""
        return 0 if self.built_bytes >= n * self.train_bytes else min(most, n * self.train_bytes)

    @property
    def row(self) -> int:
        """Bytes of a vector of parameters."""
        return self.p * self.itemsize


@dataclass(frozen=True)
class Machine:
    """Where a run takes place.

    Args:
        workers: Number of worker processes.
        memory: Bytes that each of them may take.
        process: Bytes of an idle one.
        device_memory: Bytes that each may take on its GPU; None where it computes on the host.
        alone: Whether one process does everything, so that sums wait for nobody.
    """

    workers: int
    memory: int
    process: int
    device_memory: int | None = None
    alone: bool = False

    @property
    def kept(self) -> int:
        """Bytes of loaded chunks that a worker keeps."""
        return kept_bytes(self.memory)

    @property
    def resident(self) -> int:
        """Bytes where factors are held while strips are made: of the host or its GPU, whichever has fewer."""
        return self.memory if self.device_memory is None else min(self.memory, self.device_memory)


@dataclass(frozen=True)
class Chunks:
    """Samples in a chunk: of training points (a strip), of test points solved together, of factors in memory."""

    train: int
    test: int
    panel: int


@dataclass(frozen=True)
class FixedSizes:
    """Chunk sizes that are fixed already; None where the plan chooses."""

    train: int | None = None
    test: int | None = None
    panel: int | None = None
    solve: str = "auto"


@dataclass(frozen=True)
class Rates:
    """Measured speeds of one process: sample gradients, and sample · row products, in a second; flops of a GEMM.

    fixed: seconds that a pass takes for each chunk, however few samples and rows there are.
    """

    gradients: float
    products: float
    flops: float
    fixed: float = 0.0


def kept_bytes(memory: int) -> int:
    """Return the bytes of loaded chunks that a process which may take `memory` bytes keeps between tasks."""
    return min(KEPT_MOST, int(KEPT_SHARE * memory))
