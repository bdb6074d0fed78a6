"""Per-sample gradients, curvature products, EKFAC and strips on a device: achieved rates beside the device's own.

Run: python -m tests.benchmarks.gpu [--device cuda] [--width 1024] [--samples 4096]

The device's own rates are measured in the same run: a float32 GEMM of 4096³ (1024³ on a CPU), and a copy of 1 GiB
(128 MiB). Flops are those of the mathematics: 2·p a sample for a forward pass, 6·p for a gradient, 12·p for a product
with one row, 2·m·p a training sample for a strip against m factors. Without a GPU it runs on the CPU, to be tested.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from distinfluence import EkfacInfluence, KrylovInfluence
from distinfluence.gradients import loss_gradients


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


def peak(device: torch.device) -> tuple[float, float]:
    """FLOP/s of a GEMM and bytes/s of a copy (read and written)."""
    size, n = (4096, 2**28) if device.type == "cuda" else (1024, 2**25)
    a, b = torch.randn(2, size, size, device=device)
    source, target = torch.zeros(2, n, device=device)
    flops = 2 * size**3 / seconds(lambda: a @ b, device)
    return flops, 2 * 4 * n / seconds(lambda: target.copy_(source), device)


def row(what: str, took: float, flops: float, moved: float, own: tuple[float, float]) -> str:
    return (
        f"| {what} | {1e3 * took:.1f} | {flops / took / 1e12:.3f} | {flops / took / own[0]:.0%} | "
        f"{moved / took / 1e9:.1f} | {moved / took / own[1]:.0%} |"
    )


def table(device: torch.device, width: int, n: int, tests: int) -> list[str]:
    """The lines of the table, for an MLP of three layers on random data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
    model = model.to(device).eval()
    x, y = torch.randn(n, width, device=device), torch.randint(0, 10, (n,), device=device)
    own = peak(device)
    influence = KrylovInfluence(model, nn.CrossEntropyLoss(), 0.1, second_order_mode="ggn").fit([(x, y)])
    p, risk = influence.n_parameters, influence.risk
    part = risk.place((x[:64], y[:64]))
    (operator,) = influence.operators.values()
    vectors, factors = torch.randn(8, p, device=device), torch.randn(tests, p, device=device)

    def strip() -> Tensor:
        return influence.influences_from_factors(factors, x[:256], y[:256])

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; p = {p}, {n} samples; GEMM "
        f"{own[0] / 1e12:.2f} TFLOP/s, copy {own[1] / 1e9:.0f} GB/s",
        "| work | ms | TFLOP/s | of the GEMM's | GB/s | of the copy's |",
        "|---|---|---|---|---|---|",
    ]
    took = seconds(lambda: loss_gradients(risk, part), device)
    lines.append(row("64 sample gradients", took, 6.0 * p * 64, 4.0 * p * 64, own))
    took = seconds(lambda: operator.matmat(vectors), device)
    lines.append(row(f"product of 8 rows over {n}", took, 12.0 * p * n * 8, 4.0 * p * 16, own))
    ekfac = EkfacInfluence(model, True, 0.1, loss=nn.CrossEntropyLoss())
    took = seconds(lambda: ekfac.fit([(x, y)]), device, 1)
    squares = 2 * width**2 + 3 * width**2
    lines.append(row(f"EKFAC fit over {n}", took, 2 * 6.0 * p * n + 2.0 * n * squares, 4.0 * p, own))
    took = seconds(strip, device)
    lines.append(row(f"strip of 256 × {tests}", took, (6.0 + 2.0 * tests) * p * 256, 4.0 * p * (tests + 256), own))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--tests", type=int, default=256)
    given = parser.parse_args()
    print("\n".join(table(torch.device(given.device), given.width, given.samples, given.tests)))


if __name__ == "__main__":
    main()
