"""What each stage of a run takes: tasks, passes, products, bytes, flops, time. The formulae are those of `plan`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from distinfluence.curvature import PlannedWork
from distinfluence.influence.checks.products import check_bytes
from distinfluence.model.gradients import rows_at_once, samples_at_once
from distinfluence.model.sample_risk import KEPT_ROW_BYTES
from distinfluence.scaling.plan.problem import Chunks, Machine, Problem, Rates
from distinfluence.scaling.plan.tree_shape import GROUPS, pass_tasks, results_held

ON_HOST = frozenset({"an idle process", "PyTorch at work", "data sets", "kept chunks"})  # what no GPU holds
TORCH_BYTES = 96 * 2**20  # that a process grows by at its first derivative: code that PyTorch loads when it needs it
STAGE_SECONDS = 0.1  # of a stage that has next to nothing to do: files, tasks, reports
STORED_BYTES = 1e8  # of a fit that are stored in a second
DOUBLE = 2.5  # times as long take the flops of a fit, in float64 and not all of them products of matrices
FACTOR_BYTES = 256 * 2**20  # of factors that are taken apart at once


@dataclass(frozen=True)
class Stage:
    """One stage of a plan.

    Attributes:
        name: Name of the stage, as progress shows it.
        tasks: Number of tasks that are submitted.
        passes: Passes over the training data.
        parts: Bytes that a worker holds at the peak, by what they are for.
        flops: Floating-point operations of a worker, as far as they are counted.
        seconds: Estimated time; None where nothing was measured.
        products: Products of a row with the curvature over all samples, in all passes together.
    """

    name: str
    tasks: int
    passes: int
    parts: Mapping[str, int]
    flops: float = 0.0
    seconds: float | None = None
    products: int = 0

    @property
    def bytes(self) -> int:
        """Peak of a worker."""
        return sum(self.parts.values())

    @property
    def on_device(self) -> Mapping[str, int]:
        """The parts that lie on the GPU of a worker that has one."""
        return {name: nbytes for name, nbytes in self.parts.items() if name not in ON_HOST}


def sweep_bytes(work: Problem, machine: Machine, rows: int, gradients: int) -> int:
    """Return the bytes that a pass which multiplies rows works in; one row is taken at once however large it is.

    Gradients of a micro-batch are there by parameter and as rows, and those before are not always given back by then.
    """
    if work.by_gradients:
        return 3 * gradients
    return 4 * work.row * max(1, min(rows, rows_at_once(work.row, machine.device_memory is None)))


def stages_of(work: Problem, machine: Machine, chunks: Chunks, solve: str, rates: Rates | None) -> tuple[Stage, ...]:
    """Return the stages of a run in their order. rates: measured, for the times; None leaves them out."""
    run = _Run(work, machine, chunks, solve, rates)
    extras = (run.self_influence(), run.contributions())
    return (run.fit(), run.factors(), run.strips(), *(stage for stage in extras if stage is not None))


@dataclass(frozen=True)
class _Run:
    """What stages have in common."""

    work: Problem
    machine: Machine
    chunks: Chunks
    solve: str
    rates: Rates | None

    @property
    def n_strips(self) -> int:
        return ceil(self.work.n_train, self.chunks.train)

    @property
    def fit_chunks(self) -> int:
        return ceil(self.work.n_fit, self.chunks.train)

    @property
    def at_work(self) -> int:
        """Workers that a pass over the data keeps busy."""
        return min(self.machine.workers, self.fit_chunks, GROUPS)

    @property
    def pass_tasks(self) -> int:
        return 0 if self.machine.alone else pass_tasks(self.fit_chunks)

    @property
    def gradients(self) -> int:
        """Bytes of those of a micro-batch."""
        at_once = samples_at_once(self.work.row, self.machine.device_memory is None)
        return min(self.chunks.train, at_once) * self.work.row

    @property
    def kept_gradients(self) -> int:
        """Of a pass for the next one; workers of a cluster keep none, see `Alternatives.timed`."""
        if not (self.work.by_gradients and self.machine.alone):
            return 0
        return min(self.work.n_fit * self.work.row, KEPT_ROW_BYTES // self.gradients * self.gradients)

    @property
    def always(self) -> dict[str, int]:
        """What every worker holds."""
        work = self.work
        return {
            "an idle process": self.machine.process,
            "PyTorch at work": TORCH_BYTES,
            "the model": work.model_bytes,
            "data sets": work.built_bytes,
            "kept chunks": work.kept(work.n_fit, self.machine.kept),
            "a chunk": 2 * self.chunks.train * work.train_bytes,  # as it is loaded, and as it is computed with
            "kept gradients": self.kept_gradients,
        }

    def solving(self, rows: int) -> dict[str, int]:
        """Return what a worker holds that solves for `rows` right-hand sides by itself."""
        products = sweep_bytes(self.work, self.machine, rows, self.gradients) if self.work.over_data else 0
        state = self.work.demand.state_bytes
        return {"products": products, "the fitted state": state, "the solve": solving_bytes(self.work, rows)}

    def sums(self, rows: int, matrix: int = 0) -> int:
        """Bytes of what a pass for `rows` rows broadcasts, and of its partial sums; matrix: that is summed instead."""
        results = 2 if self.machine.alone else 2 + results_held(self.fit_chunks, self.machine.workers)
        return rows * self.work.row + results * max(rows * self.work.row, matrix)

    def work_flops(self, rows: int, derivatives: int = 0, other: float = 0.0) -> float:
        """Flops of products with the curvature, of derivatives of every sample, and of what is not over data."""
        return self.work.sample_flops * self.work.n_fit * (6.0 * rows + 3.0 * derivatives) + other

    def work_seconds(self, work: PlannedWork, workers: int) -> float | None:
        """Time of passes over the data on some workers, and of what one process does by itself."""
        if self.rates is None:
            return None
        n, rates = self.work.n_fit, self.rates
        over_data = STAGE_SECONDS * workers + n * (work.rows / rates.products + work.derivatives / rates.gradients)
        over_data += work.passes * self.fit_chunks * rates.fixed
        return over_data / workers + DOUBLE * work.flops / rates.flops

    def fit(self) -> Stage:
        demand, work = self.work.demand, self.work.demand.fit
        seconds = self.work_seconds(work, self.at_work)
        making = {
            "products": max(
                sweep_bytes(self.work, self.machine, demand.fit_rows, self.gradients),
                check_bytes(self.work.p, self.work.itemsize),  # before
            ),
            "sums": self.sums(demand.fit_rows, demand.sum_bytes),
        }
        return Stage(
            "fit",
            self.fit_chunks + work.passes * self.pass_tasks,
            work.passes,
            self.always | (making if work.passes else {}),
            self.work_flops(work.rows, work.derivatives, work.flops),
            None if seconds is None else seconds + demand.state_bytes / STORED_BYTES,
            work.rows,
        )

    def solves(self, groups: int, rows: int) -> PlannedWork:
        """Return the work of so many solves for so many rows each."""
        solve, largest = self.work.demand.solve, self.work.largest_block
        if not self.work.over_data:
            return PlannedWork(flops=groups * solve.flops_for(rows, largest))
        epochs = solve.blocks * ceil(solve.batches, self.fit_chunks)
        others = replace(solve, measured=0) if solve.by_default else solve
        passes = solve.passes_for(rows, largest) + (groups - 1) * others.passes_for(rows, largest) + groups * epochs
        products = solve.rows_for(rows, largest) + (groups - 1) * others.rows_for(rows, largest)
        products += groups * rows * epochs
        return PlannedWork(passes, products, flops=groups * solve.flops_for(rows, largest))

    def factors(self) -> Stage:
        work, rows = self.work, self.chunks.test
        n_solves, by_rows = ceil(work.n_test, rows), self.solve == "rows"
        solving = self.solves(n_solves, ceil(work.n_test, n_solves))
        here = {  # the solve itself is the driver's
            "products": sweep_bytes(work, self.machine, rows, self.gradients) if work.over_data else 0,
            "test gradients": 2 * rows * work.row,
            "sums": self.sums(rows),
        }
        return Stage(
            "factors",
            n_solves if by_rows else n_solves + solving.passes * self.pass_tasks,
            solving.passes,
            self.always | (self.solving(rows) if by_rows else here),
            self.work_flops(solving.rows, 0, solving.flops),
            self.work_seconds(solving, min(self.machine.workers, n_solves) if by_rows else self.at_work),
            solving.rows,
        )

    def strips(self) -> Stage:
        work, chunks, b = self.work, self.chunks, self.work.itemsize
        panels, entries = ceil(work.n_test, chunks.panel), work.n_test * chunks.train * work.entry
        product_flops = 2.0 * work.n_test * work.n_train * work.p * (1 if work.entry == 1 else 3)
        seconds = None
        if self.rates is not None:
            alone = panels * work.n_train / self.rates.gradients + product_flops / self.rates.flops
            seconds = STAGE_SECONDS + alone / self.machine.workers
        parts = {
            "kept chunks": work.kept(work.n_train, self.machine.kept),
            "the fitted state": work.demand.state_bytes,
            "factors of a panel": chunks.panel * work.row,
            "kept gradients": self.kept_gradients if self.solve == "rows" else 0,
            "gradients": 2 * self.gradients,
            "a strip": entries * (2 * b + 4) + (8 * entries if work.entry == 1 else 0),
        }
        flops = product_flops + 3.0 * work.sample_flops * work.n_train * panels
        return Stage("strips", self.n_strips, panels, self.always | parts, flops, seconds)

    def self_influence(self) -> Stage | None:
        """Solves for the training points of each strip, on one worker; see `own_influence`."""
        work, group = self.work, min(self.chunks.test, self.chunks.train)
        if not work.self_influence:
            return None
        full, rest = divmod(work.n_train, self.chunks.train)
        groups = full * ceil(self.chunks.train, group) + ceil(rest, group)
        solving = self.solves(groups, group)
        parts = self.always | self.solving(group)
        flops = self.work_flops(solving.rows, 0, solving.flops)
        seconds = self.work_seconds(solving, min(self.machine.workers, self.n_strips))
        return Stage("self-influence", self.n_strips, solving.passes, parts, flops, seconds, solving.rows)

    def contributions(self) -> Stage | None:
        """Gradients of ranked points once more, and their products by layer; see `taking_apart`."""
        work, pairs = self.work, 2 * self.work.n_test * self.work.contributions
        if not pairs:
            return None
        points, product_flops = min(work.n_train, pairs), 2.0 * pairs * work.p
        seconds = None
        if self.rates is not None:
            seconds = (points / self.rates.gradients + product_flops / self.rates.flops) / self.machine.workers
        parts = {
            "the fitted state": work.demand.state_bytes,
            "factors of some": min(work.n_test * work.row, max(FACTOR_BYTES, work.row)),
            "gradients": 2 * self.gradients,
        }
        flops = product_flops + 3.0 * work.sample_flops * points
        return Stage("contributions", min(self.n_strips, pairs), 1, self.always | parts, flops, seconds)


def solving_bytes(work: Problem, rows: int) -> int:
    """Return the bytes that a solve holds for `rows` right-hand sides."""
    needed = int((work.demand.row_vectors + 2) * rows * work.row)
    beside = int((work.demand.beside_vectors + 2) * rows * work.row)
    return min(needed, work.demand.most_bytes + beside) if work.demand.most_bytes else needed


def ceil(a: int, b: int) -> int:
    """Return ⌈a / b⌉."""
    return -(-a // b)
