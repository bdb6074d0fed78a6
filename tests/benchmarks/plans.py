"""Plans next to what was measured, and the method that `auto` chooses next to its other candidates.

Run: python -m tests.benchmarks.plans [--limit SECONDS]

Five shapes: the demo's digits, a tabular model, an MLP with more parameters than samples, a small CNN and a tiny
transformer. First, the plan of a run (with rates that are measured as `distinfluence plan` does) and the seconds that
each stage took. Then every candidate of `auto` on the Gauss–Newton matrix of the same shapes, to one tolerance: what it
is estimated to take, what it took, and the largest residual. All on one thread and in seconds of the processor, since
other work may disturb the clock; a candidate that takes longer than the limit is stopped.
"""

import argparse
import itertools
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from distinfluence import (
    AutoInfluence,
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    InfluenceFunctionModel,
    NystroemSketchInfluence,
    SequentialInfluenceCalculator,
)
from distinfluence.app import demo
from distinfluence.scaling import Progress
from distinfluence.scaling.progress import Bar
from distinfluence.scaling.stages import probe
from distinfluence.solvers.auto import Auto
from distinfluence.solvers.demand import System, Systems

LIMIT = 6.0  # seconds that a candidate may take
RTOL = 1e-4
DAMPING = 0.01
STAGES = ("fit", "factors", "strips")

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Shape:
    """A model with data. planned: the influence model of the first table."""

    name: str
    make: Callable[[], tuple[nn.Module, Data, Data]]
    planned: Callable[[nn.Module], InfluenceFunctionModel]


class Transformer(nn.Module):
    """Token ids [n, t] → classes, by one layer of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.wide = nn.Linear(32, 64)
        self.head = nn.Linear(64, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        out: Tensor = self.head(torch.tanh(self.wide(x)).mean(dim=1))
        return out


def digits() -> tuple[nn.Module, Data, Data]:
    """The demo's own."""
    return demo.train_model(), demo.train_data(), demo.test_data()


def mlp(sizes: tuple[int, ...], n: int, k: int) -> Callable[[], tuple[nn.Module, Data, Data]]:
    """Random data for an MLP of these widths."""

    def make() -> tuple[nn.Module, Data, Data]:
        layers: list[nn.Module] = []
        for i, o in itertools.pairwise(sizes):
            layers += [nn.Linear(i, o), nn.Tanh()]
        return (
            nn.Sequential(*layers[:-1]),
            labelled(torch.randn(n, sizes[0]), sizes[-1]),
            labelled(torch.randn(k, sizes[0]), sizes[-1]),
        )

    return make


def labelled(x: Tensor, classes: int) -> Data:
    """Inputs with random labels."""
    return x, torch.randint(classes, (len(x),))


def cnn() -> tuple[nn.Module, Data, Data]:
    """8 × 8 images, some 50,000 parameters."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 32, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(512, 86), nn.Tanh(), nn.Linear(86, 10)),
    )
    return model, labelled(torch.randn(200, 1, 8, 8), 10), labelled(torch.randn(16, 1, 8, 8), 10)


def transformer() -> tuple[nn.Module, Data, Data]:
    """Sequences of 16 tokens."""
    train, test = (labelled(torch.randint(50, (n, 16)), 5) for n in (256, 16))
    return Transformer(), train, test


LOSS = nn.CrossEntropyLoss()
SHAPES = (
    Shape("digits, cg", digits, lambda m: CgInfluence(m, LOSS, DAMPING, rtol=RTOL, second_order_mode="ggn")),
    Shape("tabular, direct", mlp((12, 24, 3), 340, 102), lambda m: DirectInfluence(m, LOSS, DAMPING)),
    Shape(
        "MLP, direct",
        mlp((60, 70, 16), 400, 34),
        lambda m: DirectInfluence(m, LOSS, DAMPING, second_order_mode="ggn"),
    ),
    Shape("CNN, nystroem", cnn, lambda m: NystroemSketchInfluence(m, LOSS, 60, DAMPING, second_order_mode="ggn")),
    Shape("transformer, ekfac", transformer, lambda m: EkfacInfluence(m, True, DAMPING)),
)
MORE = (Shape("MLP, n = 4000", mlp((60, 70, 16), 4000, 34), lambda m: AutoInfluence(m, LOSS, DAMPING)),)


class ProcessorTime(Progress):
    """Quiet; counts the processor's seconds of each stage instead of the clock's."""

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str) -> Iterator[Bar]:
        start = time.process_time()
        with super().stage(name, total, unit) as bar:
            yield bar
        self.seconds[name] = time.process_time() - start


def made(shape: Shape) -> tuple[nn.Module, Data, Data]:
    """The shape's model and data, seeded."""
    torch.manual_seed(0)
    model, train, test = shape.make()
    return model.eval(), train, test


def planned(shape: Shape) -> None:
    """Print the seconds of each stage, planned and measured."""
    model, train, test = made(shape)
    with tempfile.TemporaryDirectory() as folder:
        calculator = SequentialInfluenceCalculator(shape.planned(model), scratch=folder)
        plan = calculator.plan(*train, *test, calibrate=True)
        bars = ProcessorTime(show=False)
        calculator.fit(*train, chunk_size=plan.chunks.train, progress=bars)
        path = Path(folder) / "influences.zarr"
        calculator.to_zarr(path, *test, test_chunk_size=plan.chunks.test, progress=bars)
    estimated = {stage.name: stage.seconds or 0.0 for stage in plan.stages}
    cells = [f"{estimated[name]:>9.2f}{bars.seconds.get(name, 0.0):>9.2f}" for name in STAGES]
    total, took = sum(estimated.values()), sum(bars.seconds.get(name, 0.0) for name in STAGES)
    sizes = f"{plan.work.p:>8}{plan.work.n_fit:>6}{plan.work.n_test:>5}"
    print(f"{shape.name:<20}{sizes}{''.join(cells)}{total:>9.2f}{took:>9.2f}{total / took:>7.2f}", flush=True)


class TooLong(BaseException):
    """The limit has passed; no `except Exception` catches it."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TooLong in the block after so many seconds of the processor."""

    def stop(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def candidates(shape: Shape, limit: float) -> None:
    """Print what each candidate of `auto` is estimated to take, and took."""
    model, train, test = made(shape)
    batches = [(x, y) for x, y in zip(train[0].split(250), train[1].split(250), strict=True)]
    influence = CgInfluence(model, LOSS, DAMPING, second_order_mode="ggn").fit(batches)
    (operator,) = influence.operators.values()
    rows = influence.measurement_gradients(influence.place(*test)).rows
    operator.matmat(rows[:1]), operator.matmat(rows)  # what is made once is made
    auto = Auto(DAMPING, rtol=RTOL, rows=len(rows))
    chosen = type(auto.choose(operator)[0]).__name__
    systems = Systems((System.of(operator),), operator.dtype, operator.device)
    took: dict[str, float] = {}
    lines = []
    for kind, estimate in auto.estimates(systems).items():
        solver, start, passes = auto.built(kind), time.process_time(), operator.work.passes
        try:
            with at_most(limit):
                solution = solver.solve(solver.fit(operator), rows)
            took[kind] = time.process_time() - start
            residual = f"{float(solution.relative_residual.max()):.0e}"
            seconds = f"{took[kind]:.2f}"
        except TooLong:
            seconds, residual = f"> {limit:.0f}", "-"
        made_passes = operator.work.passes - passes
        lines.append((kind, f"{kind:<13}{estimate.seconds:>10.2f}{seconds:>9}{made_passes:>8}{residual:>10}"))
    fastest = min(took.values())
    sizes = f"p = {operator.size}, n = {len(train[0])}, {len(rows)} rows"
    print(f"{shape.name.partition(',')[0]}: {sizes}")
    for kind, line in lines:
        ratio = f"{took[kind] / fastest:.2f}" if kind in took else "-"
        print(f"  {line}{ratio:>8}{'  chosen' if kind == chosen else ''}", flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=LIMIT)
    limit = parser.parse_args().limit
    torch.set_num_threads(1)
    probe.CLOCK = time.process_time
    heads = "".join(f"{name:>18}" for name in (*STAGES, "all"))
    print(f"seconds, each planned and measured{heads[12:]}  ratio")
    print(f"{'':<20}{'p':>8}{'n':>6}{'k':>5}" + f"{'planned':>9}{'took':>9}" * 4)
    for shape in SHAPES:
        planned(shape)
    print(f"\n  candidates{'estimated':>13}{'seconds':>9}{'passes':>8}{'residual':>10}{'ratio':>8}")
    for shape in (*SHAPES, *MORE):
        candidates(shape, limit)


if __name__ == "__main__":
    main()
