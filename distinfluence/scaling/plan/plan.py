"""What a run will need, worked out before it starts: chunk sizes, memory by stage, passes, bytes on disk, time.

A pure function of a few numbers. With b bytes a number, p parameters, m test points, n training points, and for a
method its `Demand` (s bytes of state, v vectors for each right-hand side), a worker holds, besides a process with
PyTorch, the model, a chunk of samples twice (as loaded, and as computed with), and data sets that it builds for itself:

| stage | bytes |
|---|---|
| fit | kept chunks + products + sums |
| factors, by rows | kept chunks + products + s + (v + 2)·t·p·b for t test points in a chunk |
| factors, by data | kept chunks + products + sums + 2·t·p·b |
| strips | kept chunks + s + panel·p·b + 2·G + m·c·(2·b + 12) for c training points in a strip |

with G = min(c, `samples_at_once`)·p·b, and for products 4·p·b for each row taken at once, `rows_at_once` at most; or
3·G where the curvature is made of the gradients of samples (the empirical Fisher matrix, DataInf), of which one process
without a cluster keeps up to KEPT_ROW_BYTES besides. Sums are k·p·b of broadcast rows, for the k rows of a pass, and as
much, or the matrix that a fit sums, for each of 2 + `results_held` results of a kernel: in the making, and waiting to
be added. The gradients of the training set are made ⌈m / panel⌉ times for the strips.
"""

import itertools
from dataclasses import dataclass, field

from dask.utils import format_bytes

from distinfluence.errors import PlanError
from distinfluence.scaling.plan.costs import TORCH_BYTES, Stage, ceil, solving_bytes, stages_of
from distinfluence.scaling.plan.problem import Chunks, FixedSizes, Machine, Problem, Rates
from distinfluence.scaling.plan.tree_shape import GROUPS, results_held

USABLE = 0.8  # of a worker's memory limit: at 0.7 Dask begins to pause, at 0.95 it kills
RESIDENT_SHARE = 0.25  # of a worker's memory that factors may take during strips
MOST_STRIPS = 4000  # tasks that scheduler and client carry easily
STRIPS_PER_WORKER = 4  # at least, so that a slow one does not hold up the end
SMALLEST, LARGEST = 16, 8192  # training points in a strip, where nobody says better
TEST_CHUNK = 1024  # test points that are solved together, where memory allows


@dataclass(frozen=True)
class Plan:
    """Describes what a run will do and need; `str()` gives the table that is shown before it starts.

    Attributes:
        work: Sizes of the problem.
        machine: Where the run takes place.
        chunks: Samples in each kind of chunk.
        solve: "rows" or "data", see `RunOptions`.
        stages: The stages, with their tasks, passes and bytes.
        driver_bytes: Memory of the process that drives the run, in addition to an idle one.
        disk_bytes: Size of the result.
        scratch_bytes: Size of files that are deleted when the result is complete.
        remarks: What else a reader should know, in sentences.
    """

    work: Problem
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
        return ceil(self.work.n_train, self.chunks.train)

    @property
    def n_solves(self) -> int:
        """Test chunks, each solved once."""
        return ceil(self.work.n_test, self.chunks.test)

    @property
    def n_panels(self) -> int:
        """How often the gradients of the training set are made for the strips."""
        return ceil(self.work.n_test, self.chunks.panel)

    @property
    def seconds(self) -> float | None:
        """Estimated time of all stages, None where nothing was measured."""
        known = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(known) if known else None

    def __str__(self) -> str:
        work, machine, chunks = self.work, self.machine, self.chunks
        lines = [
            f"plan: {work.n_test} × {work.n_train} influences of {work.p} parameters on {machine.workers} "
            f"worker{'s' if machine.workers > 1 else ''} of {format_bytes(machine.memory)}"
            + ("" if machine.device_memory is None else f" with {format_bytes(machine.device_memory)} on a GPU"),
            f"  chunks: {chunks.train} training points in each of {_count(self.n_strips, 'strip')}, {chunks.test} test "
            f"points in each of {_count(self.n_solves, 'solve')} (by {self.solve}), factors in "
            f"{_count(self.n_panels, 'panel')} of {chunks.panel}",
            f"  {'stage':<15}{'tasks':>9}{'passes':>9}{'products':>10}{'a worker holds':>18}{'flops':>10}{'about':>10}",
        ]
        for stage in self.stages:
            seconds = "" if stage.seconds is None else _time(stage.seconds)
            flops = f"{stage.flops:.1e}" if stage.flops else ""
            lines.append(
                f"  {stage.name:<15}{stage.tasks:>9}{stage.passes:>9}{stage.products or '':>10}"
                f"{format_bytes(stage.bytes):>18}{flops:>10}{seconds:>10}"
            )
        lines.append(
            f"  on disk: {format_bytes(self.disk_bytes)} for the result, "
            f"{format_bytes(self.scratch_bytes)} of scratch while it runs; "
            f"this process: {format_bytes(self.driver_bytes)} more than idle"
        )
        return "\n".join([*lines, *(f"  {remark}" for remark in self.remarks)])


def make_plan(work: Problem, machine: Machine, asked: FixedSizes | None = None, rates: Rates | None = None) -> Plan:
    """Plan a run, and choose the chunk sizes that are not fixed.

    Args:
        work: Sizes of the problem.
        machine: Where the run takes place.
        asked: Sizes that are fixed. Default: none.
        rates: Measured rates, to estimate times from. Default: no times.

    Returns:
        The plan.

    Raises:
        PlanError: If a stage needs more memory than a worker has. The message says which change would make it fit.
    """
    asked = asked or FixedSizes()
    chunks = Chunks(
        train=min(work.n_train, asked.train or _strip(work, machine)),
        test=min(work.n_test, asked.test or _test_chunk(work, machine)),
        panel=min(work.n_test, asked.panel or max(1, int(RESIDENT_SHARE * machine.resident) // work.row)),
    )
    n_solves, n_strips = ceil(work.n_test, chunks.test), ceil(work.n_train, chunks.train)
    solve = asked.solve
    if solve == "auto":
        solve = "rows" if not work.over_data or n_solves >= machine.workers else "data"
    stages = stages_of(work, machine, chunks, solve, rates)
    held_here = work.demand.fit_bytes + (solving_bytes(work, chunks.test) if solve == "data" else 0)
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


def _room(work: Problem, machine: Machine) -> int:
    process = machine.process + TORCH_BYTES
    room = int(USABLE * machine.memory) - process - work.model_bytes - work.built_bytes - machine.kept
    if machine.device_memory is not None:
        room = min(room, int(USABLE * machine.device_memory) - work.model_bytes)
    return max(1, room)


def _strip(work: Problem, machine: Machine) -> int:
    """Training points in a strip: enough strips for all workers, few enough for one scheduler, small enough to hold."""
    fair = work.n_train // (STRIPS_PER_WORKER * machine.workers)
    entry = work.n_test * work.entry * (2 * work.itemsize + (12 if work.entry == 1 else 4))
    held = _room(work, machine) // 4 // max(entry, work.train_bytes)
    fewest = -(-work.n_train // MOST_STRIPS)
    size = max(SMALLEST, min(fair, held, LARGEST), 1)
    if held < SMALLEST:
        size = max(1, held)
    return min(work.n_train, max(_power_of_two(size), _power_of_two(2 * fewest - 1)))


def _test_chunk(work: Problem, machine: Machine) -> int:
    room = (_room(work, machine) - work.demand.state_bytes) // 2
    vectors = int((work.demand.row_vectors + 2) * work.row)
    if work.over_data and not machine.alone:
        vectors = max(vectors, (5 + results_held(GROUPS, machine.workers)) * work.row)
    if work.demand.most_bytes and room > work.demand.most_bytes:
        vectors, room = int((work.demand.beside_vectors + 2) * work.row), room - work.demand.most_bytes
    most = max(1, min(TEST_CHUNK, room // vectors))
    fair = ceil(work.n_test, machine.workers)
    return min(work.n_test, most, fair if fair >= 64 or not work.over_data else most)


def _remarks(work: Problem, chunks: Chunks) -> tuple[str, ...]:
    remarks = []
    passes = work.demand.solve.passes_for(chunks.test, work.largest_block)
    if not work.demand.by_method and work.over_data:
        remarks.append(
            f"passes and products are usual numbers ({passes} passes a solve): the matrix decides, within a factor of "
            "three as a rule."
        )
    panels = ceil(work.n_test, chunks.panel)
    if panels > 1:
        remarks.append(
            f"factors take {format_bytes(work.n_test * work.row)}, {format_bytes(chunks.panel * work.row)} at a time: "
            f"the training gradients are made {panels} times. Workers with more memory would make them once."
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
            "a chunk": "Pass a smaller `chunk_size` (chunks.train).",
            "a strip": "Pass a smaller `chunk_size` (chunks.train).",
            "gradients": "Pass a smaller `chunk_size` (chunks.train).",
            "factors of a panel": "Pass a smaller `panel_size` (chunks.panel).",
            "the fitted state": "Use an iterative method, such as cg, or block_structure='layer_wise'.",
        }.get(name, "")
        raise PlanError(
            f"the stage {stage.name!r} needs {format_bytes(needed)} a worker, which may take "
            f"{format_bytes(limit)} (95 % of {'its GPU' if on_device else 'its memory limit'}); most of it is "
            f"{name}, {format_bytes(largest)}. "
            f"{remedy}{' Or g' if remedy else 'G'}ive each worker at least {format_bytes(int(needed / USABLE))}"
            f"{' of GPU memory.' if on_device else ', fewer workers on a host for instance.'}"
        )


def _power_of_two(n: int) -> int:
    return 1 << (max(1, n).bit_length() - 1)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
