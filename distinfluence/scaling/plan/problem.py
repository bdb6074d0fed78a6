"""What a plan is made from: what is to be computed, where, and what is fixed already."""

from dataclasses import dataclass

from distinfluence.solvers.demand import Demand

KEPT_SHARE, KEPT_MOST = 0.125, 2**30  # of a worker's memory for loaded chunks that it keeps between tasks, and no more


@dataclass(frozen=True)
class Problem:
    """What is to be computed.

    n_test, n_train, n_fit: samples of the matrix's rows and columns, and of the fit. p: covered parameters; itemsize:
    bytes of a number. train_bytes: of one training sample as it is loaded. model_bytes: parameters and buffers.
    built_bytes: of data sets that every process builds for itself. by_gradients: whether the curvature is made of
    gradients of single samples, some of which a process then keeps between passes.
    entry: numbers in an entry of the matrix (1, or those of an input for mode "perturbation"). demand: of the method.
    contributions: pairs at each end of a ranking that are taken apart; self_influence: whether those are made.
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
    """Measured speeds of one process: sample gradients, and sample · row products, in a second; flops of a GEMM."""

    gradients: float
    products: float
    flops: float


def kept_bytes(memory: int) -> int:
    """Bytes of loaded chunks that a process which may take `memory` bytes keeps between tasks."""
    return min(KEPT_MOST, int(KEPT_SHARE * memory))
