"""Per-sample gradients, curvature products, EKFAC and strips on a device: achieved rates beside the device's own.

Run: python -m tests.benchmarks.gpu [--device cuda] [--widths 1024 3072] [--samples 4096]

The device's own rates are measured in the same run: a GEMM of 8192³ (512³ on a CPU) in float32 and in bfloat16, and a
copy of 1 GiB (128 MiB). Flops are those of the mathematics. The network has two layers of nearly all its p parameters,
and the first one's inputs have neither gradient nor tangent: a sample takes 2·p for a forward pass, p for the gradients
by the layers' outputs, p for its gradient from these, 6·p for a Gauss–Newton product with one row, and 2·m·p in a strip
against m factors. Bytes are what has to be moved once: gradients written; rows read and written; factors read.
Below them: what a run takes of the device's memory at most, beside what its plan says. Without a GPU all of it runs on
the CPU, to be tested.
"""

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from distinfluence import (
    EkfacInfluence,
    InfluenceFunctionModel,
    KrylovInfluence,
    NystroemSketchInfluence,
    SequentialInfluenceCalculator,
)
from distinfluence.model.gradients import loss_gradients, samples_at_once


@dataclass(frozen=True)
class Task:
    """What is timed. flops, moved: of the mathematics. narrow: the model's passes are in bfloat16."""

    name: str
    call: Callable[[], object]
    flops: float
    moved: float
    narrow: bool = False


@dataclass(frozen=True)
class Own:
    """The device's own rates: FLOP/s of a GEMM in float32 and bfloat16, bytes/s of a copy (read and written)."""

    flops: float
    narrow: float
    copy: float


def seconds(call: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """The least of the repeats, after one to warm up, the device waited for."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def own_rates(device: torch.device) -> Own:
    """Measured on data that is no zeros, large enough to fill the device."""
    size, n = (8192, 2**28) if device.type == "cuda" else (512, 2**25)
    a, b = torch.randn(2, size, size, device=device)
    narrow_a, narrow_b = a.bfloat16(), b.bfloat16()
    source, target = torch.randn(2, n, device=device)
    flops = 2.0 * size**3
    return Own(
        flops=flops / seconds(lambda: a @ b, device, 5),
        narrow=flops / seconds(lambda: narrow_a @ narrow_b, device, 5),
        copy=2.0 * 4 * n / seconds(lambda: target.copy_(source), device, 5),
    )


def network(width: int, device: torch.device) -> nn.Module:
    """An MLP of three layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
    return model.to(device).eval()


def passes_of(influence: InfluenceFunctionModel, x: Tensor, y: Tensor, factors: Tensor) -> Iterator[Task]:
    """What every method does with the model, with n samples and m factors [m, p]."""
    (m, p), n, risk = factors.shape, len(x), influence.risk
    row, is_narrow = 4.0 * p, risk.autocast is not None
    suffix = ", bfloat16" if is_narrow else ""
    k = min(n, samples_at_once(int(row), x.device.type == "cpu"))
    part = influence.place(x[:k], y[:k])
    gradients = functools.partial(loss_gradients, risk, part)
    yield Task(f"{k} sample gradients{suffix}", gradients, 4.0 * k * p, k * row, is_narrow)
    (operator,) = influence.operators.values()
    for k in (8, 64):
        product = functools.partial(operator.matmat, torch.randn(k, p, device=x.device))
        yield Task(f"product of {k} rows over {n}{suffix}", product, 6.0 * p * n * k, 2 * k * row, is_narrow)
    strip = functools.partial(influence.influences_from_factors, factors, x, y)
    yield Task(f"strip of {m} × {n}{suffix}", strip, (3.0 + 2 * m) * p * n, m * row, is_narrow)


def ekfac_tasks(model: nn.Module, width: int, x: Tensor, y: Tensor, factors: Tensor) -> Iterator[Task]:
    """Fit and strip of EKFAC, with what of the fit are eigenvectors."""
    (m, p), n = factors.shape, len(x)
    ekfac = EkfacInfluence(model, True, 0.1, loss=nn.CrossEntropyLoss())
    sides = [width, width + 1] * 2 + [10, width + 1]
    sums = 2.0 * n * sum(side**2 for side in sides)
    yield Task(f"EKFAC fit over {n}", functools.partial(ekfac.fit, [(x, y)]), 2 * 3.0 * p * n + sums, 8.0 * p)
    draws = (torch.randn(side, side, device=x.device, dtype=torch.float64) for side in sides)
    squares = [draw @ draw.T for draw in draws]

    def decompose() -> None:
        for square in squares:
            torch.linalg.eigh(square)

    yield Task("- its eigendecompositions", decompose, 9.0 * sum(side**3 for side in sides), 0.0)
    strip = functools.partial(ekfac.influences_from_factors, factors, x, y)
    yield Task(f"EKFAC strip of {m} × {n}", strip, (3.0 + 2 * m) * p * n, 4.0 * m * p)


def tasks(model: nn.Module, width: int, x: Tensor, y: Tensor, m: int) -> Iterator[Task]:
    """What is timed on one model, with n samples and m factors."""
    influence = KrylovInfluence(model, nn.CrossEntropyLoss(), 0.1, second_order_mode="ggn").fit([(x, y)])
    factors = torch.randn(m, influence.n_parameters, device=x.device)
    yield from passes_of(influence, x, y, factors)
    yield from passes_of(influence.in_mixed_precision().fit([(x, y)]), x, y, factors)
    yield from ekfac_tasks(model, width, x, y, factors)


def rates(model: nn.Module, width: int, device: torch.device, n: int, m: int, own: Own) -> Iterator[str]:
    """The table of one model."""
    x, y = torch.randn(n, width, device=device), torch.randint(0, 10, (n,), device=device)
    p = sum(parameter.numel() for parameter in model.parameters())
    yield f"MLP of width {width}: p = {p}, {n} samples"
    yield "| work | ms | TFLOP/s | of the GEMM's | GB/s | of the copy's |"
    yield "|---|---|---|---|---|---|"
    for task in tasks(model, width, x, y, m):
        took = seconds(task.call, device)
        gemm = own.narrow if task.narrow else own.flops
        yield (
            f"| {task.name} | {1e3 * took:.2f} | {task.flops / took / 1e12:.3f} | {task.flops / took / gemm:.0%} | "
            f"{task.moved / took / 1e9:.1f} | {task.moved / took / own.copy:.0%} |"
        )


def memory(model: nn.Module, width: int, device: torch.device, n: int, m: int) -> Iterator[str]:
    """What each stage of a run takes at most of the device's memory, beside the plan; for a CPU the plan alone."""
    train = torch.randn(n, width), torch.randint(0, 10, (n,))
    test = torch.randn(m, width), torch.randint(0, 10, (m,))
    yield "| run | GPU memory, MiB, by the plan | measured | measured/plan |"
    yield "|---|---|---|---|"
    for influence in (
        KrylovInfluence(model, nn.CrossEntropyLoss(), 1.0, second_order_mode="ggn"),
        NystroemSketchInfluence(model, nn.CrossEntropyLoss(), min(50, n), 1.0, second_order_mode="ggn"),
    ):
        calculator = SequentialInfluenceCalculator(influence)
        plan = calculator.plan(*train, *test)
        planned = max(sum(stage.on_device.values()) for stage in plan.stages) / 2**20
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        with tempfile.TemporaryDirectory() as folder:
            fitted = calculator.fit(*train, chunk_size=plan.chunks.train)
            fitted.to_zarr(Path(folder) / "i.zarr", *test, test_chunk_size=plan.chunks.test, progress=False)
        held = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else float("nan")
        name = f"{type(influence).__name__}, {m} × {n}, width {width}"
        yield f"| {name} | {planned:.0f} | {held:.0f} | {held / planned:.2f} |"
        del calculator, influence, fitted


def table(device: torch.device, widths: list[int], n: int, m: int) -> Iterator[str]:
    """All lines, as they are measured."""
    own = own_rates(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    yield (
        f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; GEMM {own.flops / 1e12:.1f} TFLOP/s in "
        f"float32, {own.narrow / 1e12:.1f} in bfloat16; copy {own.copy / 1e9:.0f} GB/s"
    )
    for width in widths:
        model = network(width, device)
        yield ""
        yield from rates(model, width, device, n, m, own)
        yield ""
        yield from memory(model, width, device, n, max(1, m // 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 3072])
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--tests", type=int, default=256)
    given = parser.parse_args()
    for line in table(torch.device(given.device), given.widths, given.samples, given.tests):
        print(line, flush=True)


if __name__ == "__main__":
    main()
