"""EkfacInfluence beside kronfluence 1.0.1: same model, data, dtype, threads, Fisher matrix and damping rule.

Run: python -m tests.benchmarks.kronecker [--models mlp cnn transformer] [--fishers sampled]

Each measurement is a process of its own that has warmed up. Peak memory is of the resident set, above what was resident
before the stage. The floor is the time of the stage's matrix products at the rate of a large torch.mm measured here.
Scores of both are compared with the empirical Fisher matrix, where nothing is drawn: their correlation must be 1.
"""

import argparse
import datetime
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.benchmarks.environments import FOLDER, PEERS, python_of
from tests.benchmarks.kronecker.models import SIZES, build

HERE = Path(__file__).parent


def measured(who: str, command: list[str], spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One process's figures, with its scores."""
    scores, out, file = folder / f"{who}.npy", folder / f"{who}.json", folder / f"{who}-spec.json"
    file.write_text(json.dumps({**spec, "scores": str(scores)}))
    subprocess.run([*command, str(file), str(out)], check=True, stdout=subprocess.DEVNULL)
    return {**json.loads(out.read_text()), "scores": np.load(scores)}


def gemm_rate() -> float:
    """Flops per second of a product of 2048 × 2048 matrices."""
    a = torch.randn(2048, 2048)
    a @ a
    start = time.perf_counter()
    for _ in range(3):
        a @ a
    return 3 * 2 * 2048**3 / (time.perf_counter() - start)


def floors(name: str) -> tuple[float, float]:
    """Flops of the matrix products of the fit and of the scores, from the shapes of the layers that are covered.

    Fit: twice a forward pass and a reverse pass without weight gradients, the second moments of both sides, and the
    rotation into the eigenbasis with the squares. Scores: one pass, and the cheaper of the two contractions.
    """
    n, q = SIZES[name]
    model, fit, scores = build(name), 0.0, 0.0
    positions = {"mlp": 1, "transformer": 64}.get(name, 0)
    side = 32
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            side //= layer.stride[0]
            t, o, i = side * side, layer.out_channels, layer.in_channels * 9
        elif isinstance(layer, nn.Linear):
            t, o, i = positions or 1, layer.out_features, layer.in_features
        else:
            continue
        fit += n * (2 * 4 * t * o * i + 2 * t * (o * o + i * i))
        rotate = min(2 * t * (o * o + i * i), 2 * o * i * (o + i))
        fit += n * (rotate + 2 * t * o * i)
        scores += n * (4 * t * o * i + 2 * q * o * i)
        if t > 1:  # with one position queries are outer products, and only their sides are rotated
            scores += n * 2 * t * o * i + q * 4 * (o * o * i + o * i * i)
    return fit, scores


def main() -> None:
    """Print a table of both, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn", "transformer"], choices=list(SIZES))
    parser.add_argument("--fishers", nargs="+", default=["sampled", "empirical"], choices=["sampled", "empirical"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--venvs", type=Path, default=FOLDER, help="folder of the peer's environment")
    parser.add_argument("--output", default="", help="a JSON file for the results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    commands = {
        "ours": [sys.executable, "-m", "tests.benchmarks.kronecker.runner_ours"],
        "kronfluence": [str(python_of("kronfluence", arguments.venvs)), str(HERE / "runner_kronfluence.py")],
    }
    rate = gemm_rate()
    print(
        f"{datetime.date.today()}, {platform.machine()}, {arguments.threads} threads, torch {torch.__version__}, "
        f"{PEERS['kronfluence'][0]}, float32, medians of {arguments.repeats}; torch.mm {rate / 1e9:.0f} GFLOP/s"
    )
    print(f"{'':32}{'ours':>9} {'MiB':>6} {'floor':>8} {'kronfluence':>13} {'MiB':>6} {'ratio':>7} {'correlation':>12}")
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        for fisher in arguments.fishers:
            rows += compared(name, fisher, commands, arguments, rate)
    for stage, goal in (("fit", 1.5), ("score", 2.0)):
        ratios = [row["ratio"] for row in rows if row["stage"] == stage]
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        print(f"{stage}: geometric mean {mean:.2f}×, least {min(ratios):.2f}×, goal {goal}×")
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(rows, indent=1))


def compared(
    name: str, fisher: str, commands: dict[str, list[str]], arguments: argparse.Namespace, rate: float
) -> list[dict[str, Any]]:
    """Both, in turns, for one model and Fisher matrix."""
    spec = {"model": name, "fisher": fisher, "threads": arguments.threads, "models": str(HERE / "models.py")}
    found: dict[str, list[dict[str, Any]]] = {who: [] for who in commands}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.repeats):
            for who, command in commands.items():
                found[who].append(measured(who, command, spec, Path(folder)))
    one, other = (np.ravel(found[who][-1]["scores"]).astype(float) for who in commands)
    correlation = float(np.corrcoef(one, other)[0, 1])
    rows = []
    for stage, flops in zip(("fit", "score"), floors(name), strict=True):
        own, peers = (statistics.median(run[f"{stage}_seconds"] for run in found[who]) for who in commands)
        memory, peers_memory = (
            statistics.median(run[f"{stage}_bytes"] for run in found[who]) / 2**20 for who in commands
        )
        row = {"model": name, "fisher": fisher, "stage": stage, "ours": own, "kronfluence": peers, "ratio": peers / own}
        row |= {"mib": memory, "kronfluence_mib": peers_memory, "floor": flops / rate, "correlation": correlation}
        rows.append(row)
        print(
            f"{name:12} {fisher:10} {stage:7} {own:8.2f}s {memory:6.0f} {flops / rate:7.2f}s {peers:12.2f}s "
            f"{peers_memory:6.0f} {peers / own:6.2f}× {correlation:12.6f}",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
