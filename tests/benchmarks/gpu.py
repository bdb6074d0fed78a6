"""Per-sample gradients, curvature products, EKFAC and strips on a device: achieved rates beside the device's own.

Run: python -m tests.benchmarks.gpu [--device cuda] [--widths 1024 3072] [--samples 4096]

The device's own rates are measured in the same run: a GEMM of 8192³ (512³ on a CPU) in float32 and in bfloat16, and a
copy of 1 GiB (128 MiB). Flops are those of the mathematics: 2·p a sample for a forward pass, 6·p for a gradient, 12·p
for a product with one row, 2·m·p a training sample for a strip against m factors. Bytes are what has to be moved once:
gradients written; rows read and written; factors read. Below them: what a run's stages take of the device's memory,
beside what its plan says. Without a GPU it runs on the CPU, to be tested.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from distinfluence import EkfacInfluence, KrylovInfluence, NystroemSketchInfluence, SequentialInfluenceCalculator
from distinfluence.gradients import loss_gradients, samples_at_once


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


def tasks(model: nn.Module, width: int, x: Tensor, y: Tensor, m: int) -> Iterator[Task]:
    """What is timed on one model, with n samples and m factors."""
    n, loss, device = len(x), nn.CrossEntropyLoss(), x.device
    influence = KrylovInfluence(model, loss, 0.1, second_order_mode="ggn").fit([(x, y)])
    narrow = influence.in_mixed_precision().fit([(x, y)])
    p, row = influence.n_parameters, 4.0 * influence.n_parameters
    k = min(n, samples_at_once(int(row), device.type == "cpu"))
    part = influence.place(x[:k], y[:k])
    few, many, factors = (torch.randn(rows, p, device=device) for rows in (8, 64, m))
    for each, suffix in ((influence, ""), (narrow, ", bfloat16")):
        risk, (operator,), is_narrow = each.risk, each.operators.values(), each is narrow
        yield Task(f"{k} sample gradients{suffix}", lambda: loss_gradients(risk, part), 6 * k * p, k * row, is_narrow)
        for rows in (few, many):
            name = f"product of {len(rows)} rows over {n}{suffix}"
            flops, moved = 12.0 * p * n * len(rows), 2 * len(rows) * row
            yield Task(name, lambda rows=rows: operator.matmat(rows), flops, moved, is_narrow)  # type: ignore[misc]
        flops, moved = (6.0 + 2 * m) * p * n, (m + n) * row
        yield Task(
            f"strip of {m} × {n}{suffix}", lambda: each.influences_from_factors(factors, x, y), flops, moved, is_narrow
        )
    ekfac = EkfacInfluence(model, True, 0.1, loss=loss)
    sides = [width, width + 1] * 2 + [10, width + 1]
    sums = 2.0 * n * sum(side**2 for side in sides)
    yield Task(f"EKFAC fit over {n}", lambda: ekfac.fit([(x, y)]), (2 * 6 + 2) * p * n + sums, 8.0 * p)
    squares = [s @ s.T for s in (torch.randn(side, side, device=device, dtype=torch.float64) for side in sides)]
    decomposed = 9.0 * sum(side**3 for side in sides)
    yield Task("- its eigendecompositions", lambda: [torch.linalg.eigh(s) for s in squares], decomposed, 0.0)
    yield Task(
        f"EKFAC strip of {m} × {n}",
        lambda: ekfac.influences_from_factors(factors, x, y),
        (6.0 + 2 * m) * p * n,
        m * row,
    )


def rates(model: nn.Module, width: int, device: torch.device, n: int, m: int, own: Own) -> list[str]:
    """The table of one model."""
    x, y = torch.randn(n, width, device=device), torch.randint(0, 10, (n,), device=device)
    p = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        f"MLP of width {width}: p = {p}, {n} samples",
        "| work | ms | TFLOP/s | of the GEMM's | GB/s | of the copy's |",
        "|---|---|---|---|---|---|",
    ]
    for task in tasks(model, width, x, y, m):
        took = seconds(task.call, device)
        gemm = own.narrow if task.narrow else own.flops
        lines.append(
            f"| {task.name} | {1e3 * took:.2f} | {task.flops / took / 1e12:.3f} | {task.flops / took / gemm:.0%} | "
            f"{task.moved / took / 1e9:.1f} | {task.moved / took / own.copy:.0%} |"
        )
    return lines


def memory(model: nn.Module, width: int, device: torch.device, n: int, m: int) -> list[str]:
    """What each stage of a run takes at most of the device's memory, beside the plan; for a CPU the plan alone."""
    train = torch.randn(n, width), torch.randint(0, 10, (n,))
    test = torch.randn(m, width), torch.randint(0, 10, (m,))
    lines = ["| stage | plan, MiB | measured | measured/plan |", "|---|---|---|---|"]
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
        lines.append(f"| {name} | {planned:.0f} | {held:.0f} | {held / planned:.2f} |")
        del calculator, influence, fitted
    return lines


def table(device: torch.device, widths: list[int], n: int, m: int) -> list[str]:
    """All lines."""
    own = own_rates(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; GEMM {own.flops / 1e12:.1f} TFLOP/s in "
        f"float32, {own.narrow / 1e12:.1f} in bfloat16; copy {own.copy / 1e9:.0f} GB/s",
    ]
    for width in widths:
        model = network(width, device)
        lines += ["", *rates(model, width, device, n, m, own), "", *memory(model, width, device, n, max(1, m // 4))]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 3072])
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--tests", type=int, default=256)
    given = parser.parse_args()
    print("\n".join(table(torch.device(given.device), given.widths, given.samples, given.tests)))


if __name__ == "__main__":
    main()
