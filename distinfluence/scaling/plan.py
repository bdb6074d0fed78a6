"""What a run will need, worked out before it starts: chunk sizes, memory by stage, passes, bytes on disk, time.

A pure function of a few numbers. With b bytes a number, p parameters, m test points, n training points, and for a
method its `Demand` (s bytes of state, v vectors for each right-hand side), a worker holds, beside an empty process and
the model (and data sets that it builds for itself):

| stage | bytes |
|---|---|
| fit | kept chunks + products + sums |
| factors, by rows | kept chunks + products + s + (v + 2)·t·p·b for t test points in a chunk |
| factors, by data | kept chunks + products + sums + 2·t·p·b |
| strips | kept chunks + s + panel·p·b + 2·G + m·c·(2·b + 12) for c training points in a strip |

with G = min(c·p·b, GRADIENT_BYTES), and for products 4·p·b for each row taken at once, ROW_BYTES at most if that is one
row or more; or 2·G and up to KEPT_ROW_BYTES of gradients that are kept, where the curvature is made of the gradients of
samples (the empirical Fisher matrix, DataInf). Sums are k·p·b of broadcast rows, for the k rows of a pass, and as much,
or the matrix that a fit sums, for each of 2 + `results_held` results of a kernel: in the making, and waiting to be
added. The gradients of the training set are made ⌈m / panel⌉ times for the strips.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

from distinfluence.errors import PlanError
from distinfluence.gradients import GRADIENT_BYTES, MOST_ROWS, ROW_BYTES
from distinfluence.influence.demand import Demand
from distinfluence.sample_risk import KEPT_ROW_BYTES
from distinfluence.scaling.groups import GROUPS, pass_tasks, results_held

USABLE = 0.8  # of a worker's memory limit: at 0.7 Dask begins to pause, at 0.95 it kills
RESIDENT_SHARE = 0.25  # of a worker's memory that factors may take during strips
KEPT_SHARE, KEPT_MOST = 0.125, 2**30  # of a worker's memory for loaded chunks that it keeps between tasks, and no more
MOST_STRIPS = 4000  # tasks that scheduler and client carry easily
STRIPS_PER_WORKER = 4  # at least, so that a slow one does not hold up the end
SMALLEST, LARGEST = 16, 8192  # training points in a strip, where nobody says better
ON_HOST = frozenset({"an idle process", "data sets", "kept chunks"})  # parts of a stage that no GPU holds
TEST_CHUNK = 1024  # test points that are solved together, where memory allows


@dataclass(frozen=True)
class Work:
    """What is to be computed.

    n_test, n_train, n_fit: samples of the matrix's rows and columns, and of the fit. p: covered parameters; itemsize:
    bytes of a number. train_bytes: of one training sample as it is loaded. model_bytes: parameters and buffers.
    built_bytes: of data sets that every process builds for itself. by_gradients: whether the curvature is made of
    gradients of single samples, some of which a process then keeps between passes. most_rows: multiplied at once.
    entry: numbers in an entry of the matrix (1, or those of an input for mode "perturbation"). demand: of the method.
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
    most_rows: int = MOST_ROWS

    def kept(self, n: int, most: int) -> int:
        """Bytes of loaded chunks of n samples that a process keeps; none where they are views of a built data set."""
        return 0 if self.built_bytes >= n * self.train_bytes else min(most, n * self.train_bytes)

    @property
    def row(self) -> int:
        """Bytes of a vector of parameters."""
        return self.p * self.itemsize


@dataclass(frozen=True)
class Machine:
    """Where it is to run. workers: processes; memory: bytes that each may take; process: bytes of an idle one.

    device_memory: bytes that each may take on the GPU that it computes on; None where that is the host.
    alone: whether one process does everything, so that sums wait for nobody.
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
class Asked:
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


@dataclass(frozen=True)
class Stage:
    """One stage. tasks: submitted; passes: over the training data; parts: what a worker holds → bytes."""

    name: str
    tasks: int
    passes: int
    parts: Mapping[str, int]
    flops: float = 0.0
    seconds: float | None = None

    @property
    def bytes(self) -> int:
        """Peak of a worker."""
        return sum(self.parts.values())

    @property
    def on_device(self) -> Mapping[str, int]:
        """The parts that lie on the GPU of a worker that has one."""
        return {name: nbytes for name, nbytes in self.parts.items() if name not in ON_HOST}


@dataclass(frozen=True)
class Plan:
    """What a run will do and need; `str()` is the table that is shown before it starts.

    solve: "rows" or "data", see `InfluenceCalculator.to_zarr`. driver_bytes: of the process that drives the run, beside
    an idle one. disk_bytes: of the result; scratch_bytes: of files that go when it is complete.
    """

    work: Work
    machine: Machine
    chunks: Chunks
    solve: str
    stages: tuple[Stage, ...]
    driver_bytes: int
    disk_bytes: int
    scratch_bytes: int
    remarks: tuple[str, ...] = field(default=())

    @property
    def n_strips(self) -> int:
        """Strips of the matrix."""
        return _ceil(self.work.n_train, self.chunks.train)

    @property
    def n_solves(self) -> int:
        """Test chunks, each solved once."""
        return _ceil(self.work.n_test, self.chunks.test)

    @property
    def n_panels(self) -> int:
        """How often the gradients of the training set are made for the strips."""
        return _ceil(self.work.n_test, self.chunks.panel)

    @property
    def peak(self) -> int:
        """Bytes that a worker takes at most."""
        return max(stage.bytes for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        """Estimated time of all stages, None where nothing was measured."""
        known = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(known) if known else None

    def __str__(self) -> str:
        work, machine, chunks = self.work, self.machine, self.chunks
        lines = [
            f"plan: {work.n_test} × {work.n_train} influences of {work.p} parameters on {machine.workers} "
            f"worker{'s' if machine.workers > 1 else ''} of {_size(machine.memory)}"
            + ("" if machine.device_memory is None else f" with {_size(machine.device_memory)} on a GPU"),
            f"  chunks: {chunks.train} training points in each of {_count(self.n_strips, 'strip')}, {chunks.test} test "
            f"points in each of {_count(self.n_solves, 'solve')} (by {self.solve}), factors in "
            f"{_count(self.n_panels, 'panel')} of {chunks.panel}",
            f"  {'stage':<9}{'tasks':>9}{'passes':>9}{'a worker holds':>18}{'flops':>10}{'about':>10}",
        ]
        for stage in self.stages:
            seconds = "" if stage.seconds is None else _time(stage.seconds)
            flops = f"{stage.flops:.1e}" if stage.flops else ""
            lines.append(
                f"  {stage.name:<9}{stage.tasks:>9}{stage.passes:>9}{_size(stage.bytes):>18}{flops:>10}{seconds:>10}"
            )
        lines.append(
            f"  on disk: {_size(self.disk_bytes)} for the result, {_size(self.scratch_bytes)} of scratch while it runs;"
            f" this process: {_size(self.driver_bytes)} more than idle"
        )
        return "\n".join([*lines, *(f"  {remark}" for remark in self.remarks)])


def make_plan(work: Work, machine: Machine, asked: Asked | None = None, rates: Rates | None = None) -> Plan:
    """The plan of a run; chunk sizes that were not asked for are chosen.

    Raises PlanError, with the change that would make it fit, if a stage needs more than a worker has.
    """
    asked = asked or Asked()
    chunks = Chunks(
        train=min(work.n_train, asked.train or _strip(work, machine)),
        test=min(work.n_test, asked.test or _test_chunk(work, machine)),
        panel=min(work.n_test, asked.panel or max(1, int(RESIDENT_SHARE * machine.resident) // work.row)),
    )
    n_solves, n_strips = _ceil(work.n_test, chunks.test), _ceil(work.n_train, chunks.train)
    solve = asked.solve
    if solve == "auto":
        solve = "rows" if not work.over_data or n_solves >= machine.workers else "data"
    stages = _stages(work, machine, chunks, solve, rates)
    held_here = work.demand.fit_bytes + (_solving(work, chunks.test) if solve == "data" else 0)
    rankings = n_strips * min(work.top_k, chunks.train) * 2 * work.n_test * 8 if work.entry == 1 else 0
    scratch = work.n_test * work.row + work.model_bytes + work.demand.state_bytes
    plan = Plan(
        work,
        machine,
        chunks,
        solve,
        stages,
        driver_bytes=held_here,
        disk_bytes=4 * work.n_test * work.n_train * work.entry + rankings + 8 * (work.n_train + 3 * work.n_test),
        scratch_bytes=scratch,
        remarks=_remarks(work, chunks),
    )
    _check(plan)
    return plan


def kept_bytes(memory: int) -> int:
    """Bytes of loaded chunks that a process which may take `memory` bytes keeps between tasks."""
    return min(KEPT_MOST, int(KEPT_SHARE * memory))


def _sweep(work: Work, rows: int, gradients: int) -> int:
    """Bytes of work space of a pass that multiplies rows; one row is taken at once however many bytes it needs."""
    if work.by_gradients:
        return 2 * gradients
    one = 4 * work.row
    return one * max(1, min(rows, work.most_rows, ROW_BYTES // one))


def _stages(work: Work, machine: Machine, chunks: Chunks, solve: str, rates: Rates | None) -> tuple[Stage, ...]:
    demand, b = work.demand, work.itemsize
    n_solves, n_strips = _ceil(work.n_test, chunks.test), _ceil(work.n_train, chunks.train)
    panels, fit_chunks = _ceil(work.n_test, chunks.panel), _ceil(work.n_fit, chunks.train)
    kept = work.kept(work.n_fit, machine.kept)
    common = {"an idle process": machine.process, "the model": work.model_bytes, "data sets": work.built_bytes}
    gradients = min(chunks.train * work.row, max(GRADIENT_BYTES, work.row))
    kept_rows = min(work.n_fit * work.row, KEPT_ROW_BYTES // gradients * gradients) if work.by_gradients else 0
    fitting, sweeping = (_sweep(work, rows, gradients) for rows in (demand.fit_rows, chunks.test))
    loaded = {"kept chunks": kept, "kept gradients": kept_rows}
    results = 2 if machine.alone else 2 + results_held(fit_chunks, machine.workers)
    fit_sums = demand.fit_rows * work.row + results * max(demand.fit_rows * work.row, demand.sum_bytes)
    data_sums = (1 + results) * chunks.test * work.row
    a_pass = 0 if machine.alone else pass_tasks(fit_chunks)
    solving = {"the fitted state": demand.state_bytes, "the solve": _solving(work, chunks.test)}
    sweeps = demand.solve_passes * n_solves if work.over_data else 0
    entries = work.n_test * chunks.train * work.entry
    product_flops = 12.0 * work.p * work.n_fit
    at_work = min(machine.workers, fit_chunks, GROUPS)
    per_pass = 0.0 if rates is None else work.n_fit / rates.products / at_work
    by_rows = min(machine.workers, n_solves) if solve == "rows" else at_work
    strips_flops = 2.0 * work.n_test * work.n_train * work.p * (1 if work.entry == 1 else 3)
    gradient_flops = 6.0 * work.p * work.n_train * panels

    def about(seconds: float) -> float | None:
        return None if rates is None else seconds

    return (
        Stage(
            "fit",
            fit_chunks + demand.fit_passes * a_pass,
            demand.fit_passes,
            common | loaded | ({"products": fitting, "sums": fit_sums} if demand.fit_passes else {}),
            product_flops * demand.fit_passes,
            about(per_pass * demand.fit_passes),
        ),
        Stage(
            "factors",
            n_solves if solve == "rows" else n_solves + sweeps * a_pass,
            sweeps,
            common
            | loaded
            | {"products": sweeping if work.over_data else 0}
            | (solving if solve == "rows" else {"test gradients": 2 * chunks.test * work.row, "sums": data_sums}),
            product_flops * sweeps * chunks.test,
            about(per_pass * sweeps * chunks.test * at_work / by_rows),
        ),
        Stage(
            "strips",
            n_strips,
            panels,
            common
            | {
                "kept chunks": work.kept(work.n_train, machine.kept),
                "the fitted state": demand.state_bytes,
                "factors of a panel": chunks.panel * work.row,
                "kept gradients": kept_rows if solve == "rows" else 0,
                "gradients": 2 * gradients,
                "a strip": entries * (2 * b + 4) + (8 * entries if work.entry == 1 else 0),
            },
            strips_flops + gradient_flops,
            about(
                0.0
                if rates is None
                else (panels * work.n_train / rates.gradients + strips_flops / rates.flops) / machine.workers
            ),
        ),
    )


def _solving(work: Work, rows: int) -> int:
    needed = int((work.demand.row_vectors + 2) * rows * work.row)
    beside = int((work.demand.beside_vectors + 2) * rows * work.row)
    return min(needed, work.demand.most_bytes + beside) if work.demand.most_bytes else needed


def _room(work: Work, machine: Machine) -> int:
    room = int(USABLE * machine.memory) - machine.process - work.model_bytes - work.built_bytes - machine.kept
    if machine.device_memory is not None:
        room = min(room, int(USABLE * machine.device_memory) - work.model_bytes)
    return max(1, room)


def _strip(work: Work, machine: Machine) -> int:
    """Training points in a strip: enough strips for all workers, few enough for one scheduler, small enough to hold."""
    fair = work.n_train // (STRIPS_PER_WORKER * machine.workers)
    entry = work.n_test * work.entry * (2 * work.itemsize + (12 if work.entry == 1 else 4))
    held = _room(work, machine) // 4 // max(entry, work.train_bytes)
    fewest = -(-work.n_train // MOST_STRIPS)
    size = max(SMALLEST, min(fair, held, LARGEST), 1)
    if held < SMALLEST:
        size = max(1, held)
    return min(work.n_train, max(_power_of_two(size), _power_of_two(2 * fewest - 1)))


def _test_chunk(work: Work, machine: Machine) -> int:
    room = (_room(work, machine) - work.demand.state_bytes) // 2
    vectors = int((work.demand.row_vectors + 2) * work.row)
    if work.over_data and not machine.alone:
        vectors = max(vectors, (5 + results_held(GROUPS, machine.workers)) * work.row)
    if work.demand.most_bytes and room > work.demand.most_bytes:
        vectors, room = int((work.demand.beside_vectors + 2) * work.row), room - work.demand.most_bytes
    most = max(1, min(TEST_CHUNK, room // vectors))
    fair = _ceil(work.n_test, machine.workers)
    return min(work.n_test, most, fair if fair >= 64 or not work.over_data else most)


def _remarks(work: Work, chunks: Chunks) -> tuple[str, ...]:
    remarks = []
    if not work.demand.by_method and work.over_data:
        remarks.append(
            f"passes of the factors are a usual number ({work.demand.solve_passes} a solve): the matrix decides."
        )
    panels = _ceil(work.n_test, chunks.panel)
    if panels > 1:
        remarks.append(
            f"factors take {_size(work.n_test * work.row)}, {_size(chunks.panel * work.row)} at a time: the training "
            f"gradients are made {panels} times. Workers with more memory would make them once."
        )
    return tuple(remarks)


def _check(plan: Plan) -> None:
    limits = [(plan.machine.memory, False)]
    if plan.machine.device_memory is not None:
        limits.append((plan.machine.device_memory, True))
    for stage, (memory, on_device) in itertools.product(plan.stages, limits):
        parts, limit = stage.on_device if on_device else stage.parts, int(0.95 * memory)
        needed = sum(parts.values())
        if needed <= limit:
            continue
        name, largest = max(parts.items(), key=lambda part: part[1])
        remedy = {
            "the solve": "Pass a smaller `test_chunk_size` (chunks.test), or a method that holds fewer vectors: "
            "chebyshev, datainf.",
            "test gradients": "Pass a smaller `test_chunk_size` (chunks.test).",
            "sums": "Pass a smaller `test_chunk_size` (chunks.test), or a smaller rank to the method.",
            "products": "A row of parameters is multiplied whole: cover fewer parameters.",
            "a strip": "Pass a smaller `chunk_size` (chunks.train).",
            "gradients": "Pass a smaller `chunk_size` (chunks.train).",
            "factors of a panel": "Pass a smaller `panel_size` (chunks.panel).",
            "the fitted state": "Use an iterative method, such as cg, or block_structure='layer_wise'.",
        }.get(name, "")
        raise PlanError(
            f"the stage {stage.name!r} needs {_size(needed)} a worker, which may take {_size(limit)} (95 % of "
            f"{'its GPU' if on_device else 'its memory limit'}); most of it is {name}, {_size(largest)}. "
            f"{remedy}{' Or g' if remedy else 'G'}ive each worker at least {_size(int(needed / USABLE))}"
            f"{' of GPU memory.' if on_device else ', fewer workers on a host for instance.'}"
        )


def _power_of_two(n: int) -> int:
    return 1 << (max(1, n).bit_length() - 1)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _size(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" or n >= 100 else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
