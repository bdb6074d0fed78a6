"""What a pass over the training set costs: curvature products with many rows, against the work that they must do.

Run: python -m tests.benchmarks.passes

The floor is counted in gradients of the mean loss (one forward and backward over the whole set): a product with one
row needs at least about one of them. Then what pieces of a chunk do to products, what the memory settings of Dask's
workers do to a pass, and what the size of micro-batches does to a strip.
"""

import argparse
import functools
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import dask
import torch
from distributed import Client, LocalCluster
from torch import nn

from distinfluence import CgInfluence, DaskInfluenceCalculator, EmpiricalRisk, SecondOrderMode
from distinfluence.app.demo import build_model, train_data
from distinfluence.curvature import DataOperator, operator_class, over_data
from distinfluence.model.alternatives import Alternatives
from distinfluence.model.batch import take
from distinfluence.model.gradients import EVEN, GRADIENT_BYTES, loss_gradients, samples_at_once
from distinfluence.model.sample_risk import SampleRisk
from distinfluence.model.untouched import double_differentiable
from distinfluence.scaling.clusters.connect import WORKER_ENVIRONMENT
from tests.benchmarks.cluster import models as cluster_models
from tests.benchmarks.peers.models import build

Way = Callable[[torch.Tensor], torch.Tensor]


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call, after one that warms up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def mean_gradient(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """One forward and backward over the whole set."""
    loss = nn.functional.cross_entropy(model(x), y)
    torch.autograd.grad(loss, list(model.parameters()))


def products(name: str, repeats: int) -> None:
    """Time of a product by every way, in gradients for each row, and what the operator takes beside the least of them.

    The floor of an MLP with p parameters on N samples: a gradient of the mean loss is about 6·N·p flops, a row of a
    Gauss–Newton product 8·N·p, of a Hessian product 10·N·p.
    """
    x, y = train_data()
    model = build(name)
    unit = median_seconds(lambda: mean_gradient(model, x, y), 5 * repeats)
    print(
        f"\n{name}: one gradient of the mean loss over {len(y)} samples: {unit * 1e3:.2f} ms; gradients' time per row:"
    )
    batches = [(x[i : i + 250], y[i : i + 250]) for i in range(0, len(y), 250)]
    for mode in SecondOrderMode:
        operator = operator_class(mode)(EmpiricalRisk(model, nn.CrossEntropyLoss(), batches))
        for k in (1, 64, 297):
            rows = torch.randn(k, operator.size)
            ways = ways_of(operator, rows)
            with double_differentiable():
                times = [median_seconds(functools.partial(apply_all, way, rows), repeats) for way in ways]
            taken = median_seconds(lambda operator=operator, rows=rows: operator.matmat(rows), repeats)  # type: ignore[misc]
            ratio = f"{taken / min(times):.2f}× the least" if times else ""
            cells = "".join(f"{seconds / k / unit:>8.2f}" for seconds in times)
            print(f"{mode:<18}{k:>5} rows  taken {taken / k / unit:>6.2f}  {ratio:<16} ways {cells}")


def apply_all(ways: Sequence[Way], rows: torch.Tensor) -> None:
    """One way for all pieces of the chunk."""
    for way in ways:
        way(rows)


def ways_of(operator: DataOperator, rows: torch.Tensor) -> list[tuple[Way, ...]]:
    """The ways to the product that the operator chooses among, each piece by piece; none where there is but one."""
    found: list[Sequence[Way]] = []
    fastest = Alternatives.fastest

    def spying(risk: SampleRisk, what: str, ways: Any, small: Any, real: Any) -> Any:
        found.append(ways)
        return fastest(risk, what, ways, small, real)

    Alternatives.fastest = spying  # type: ignore[assignment, method-assign]
    try:
        operator.matmat(rows)
    finally:
        Alternatives.fastest = fastest  # type: ignore[method-assign]
    return list(zip(*found, strict=True))


def pieces(repeats: int) -> None:
    """Products of 64 rows with a chunk of 512 samples, whole, in pieces of 64 samples, and as the operator takes it."""
    wide = [nn.Linear(784, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 10)]
    x, y = cluster_models.train_samples(512)
    of_64 = over_data.WORKING_BYTES // (over_data.AT_ONCE * 64)
    for name, model in (("MLP 784-512-512-10", nn.Sequential(*wide).eval()), ("CNN", cluster_models.build("cnn"))):
        for mode in (SecondOrderMode.GGN, SecondOrderMode.HESSIAN):
            cells = []
            for what, known in (("whole", 0), ("pieces of 64", of_64), ("ours", None)):
                operator = operator_class(mode)(EmpiricalRisk(model, nn.CrossEntropyLoss(), [(x, y)]))
                if known is not None:
                    over_data.CONVOLVED_BYTES[operator.risk.sample] = known
                product = functools.partial(operator.matmat, torch.randn(64, operator.size))
                cells.append(f"{what} {median_seconds(product, repeats):.2f} s")
            print(f"{name}, {mode}, 64 rows of a chunk of 512: {', '.join(cells)}")


def page_faults() -> int:
    """Page faults of this process so far that needed no disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def passes_on_workers(repeats: int) -> None:
    """Wall time and page faults of a GGN pass with 297 rows on two workers, as Dask sets memory up and as we do.

    In this order: what is set once stays in the environment of later workers.
    """
    for name, environment in (("Dask's own", {}), ("ours", WORKER_ENVIRONMENT)):
        settings = {f"distributed.nanny.pre-spawn-environ.{key}": value for key, value in environment.items()}
        with (
            dask.config.set(settings),
            LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=":0") as cluster,
            Client(cluster) as client,
        ):
            model = CgInfluence(build_model(), nn.CrossEntropyLoss(), 0.01, second_order_mode="ggn")
            reducer = DaskInfluenceCalculator(model, client).fit(*train_data(), chunk_size=250).model.reducer
            operator = operator_class(SecondOrderMode.GGN)(EmpiricalRisk.over(reducer))
            rows = torch.randn(297, operator.size)
            operator.matmat(rows)
            before = sum(client.run(page_faults).values())
            seconds = median_seconds(lambda operator=operator, rows=rows: operator.matmat(rows), repeats)  # type: ignore[misc]
            faults = (sum(client.run(page_faults).values()) - before) / (repeats + 1)
            print(
                f"a pass with 297 rows on 2 workers, {name} memory settings: {seconds:.2f} s, {faults:,.0f} page faults"
            )


def strips_in_micro_batches(repeats: int) -> None:
    """A strip of 2048 samples: gradients of so many at once, times the factors of 1024 test points; p = 50,890."""
    model, (x, y) = cluster_models.build("mlp"), cluster_models.train_samples(2048)
    influence = CgInfluence(model, nn.CrossEntropyLoss(), 0.01)
    batch, factors = influence.place(x, y), torch.randn(1024, influence.n_parameters)
    row = influence.n_parameters * factors.itemsize
    most, ours = GRADIENT_BYTES // row, samples_at_once(row, on_cpu=True)
    for n, what in (
        (most, f"what {GRADIENT_BYTES >> 20} MiB hold"),
        (most - most % EVEN, "a few less"),
        (ours, "ours"),
    ):

        def strip(n: int = n) -> None:
            for start in range(0, len(x), n):
                rows = loss_gradients(influence.risk, take(batch, start, min(start + n, len(x)))).rows
                torch.mm(factors, rows.T)

        print(f"a strip in micro-batches of {n:>4} samples ({what}): {median_seconds(strip, repeats):.2f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, 1 thread per process")
    for name in ("mlp", "cnn"):
        products(name, arguments.repeats)
    pieces(arguments.repeats)
    passes_on_workers(arguments.repeats)
    strips_in_micro_batches(arguments.repeats)
