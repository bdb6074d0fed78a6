"""Ours on two Dask workers beside pyDVL 0.10's Dask calculator on two workers, and beside ourselves in one process.

Run: python -m tests.benchmarks.cluster [--models mlp cnn] [--limit 900]

256 × 4096 influences, float32, Hessian: a Nyström sketch for an MLP 784-64-10 (p = 50,890), conjugate gradients for a
small CNN (p = 9,098). pyDVL by its two routes: `influences`, which its documentation begins with, and factors first.
Times hold fit, solves and scores, and for ours the writing of the result, but not what PyTorch imports at the first use
of a process; CPU seconds are those of all processes.
Errors are ‖Î − I‖/‖I‖ of the first 32 rows against float64 conjugate gradients with a residual of 1e-6; for
conjugate gradients ours take the loosest tolerance whose error is not larger than pyDVL's. Then our own run in one
process of one thread against two workers of one thread, and strips and sketches against their bare work in two
processes at the same time: a gradient pass and `torch.mm` of the same shapes, and Hessian products.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import distinfluence as di
from tests.benchmarks.cluster.models import N_TEST, build, query_samples, train_samples, trained
from tests.benchmarks.environments import FOLDER, python_of

HERE = Path(__file__).parent
DAMPING, RANK, CHUNK, TEST_CHUNK = 0.1, 50, 512, 64
REFERENCE_ROWS = 32  # test points that errors are measured for: exact solves of all would take longer than the rest
LADDER = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4)


def run(who: list[str], spec: dict[str, Any], limit: float) -> dict[str, Any]:
    """What a runner found, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("spec.json", "out.json")]
        files[0].write_text(json.dumps(spec | {"scores": f"{folder}/scores.npy"}))
        try:
            done = subprocess.run([*who, *map(str, files)], timeout=limit, capture_output=True, text=True)
        except subprocess.TimeoutExpired:
            return {"why": f"more than {limit:.0f} s", "more_than": limit}
        if done.returncode:
            return {"why": done.stderr.strip().splitlines()[-1][:200]}
        found: dict[str, Any] = json.loads(files[1].read_text())
        scores = Path(folder) / "scores.npy"
        return found | ({"scores": np.load(scores)} if scores.is_file() else {})


def reference(name: str, state: dict[str, Any]) -> NDArray[np.float64]:
    model = build(name).double()
    model.load_state_dict(state)
    (x, y), (xt, yt) = train_samples(), query_samples()
    exact = di.CgInfluence(model.double(), nn.CrossEntropyLoss(), DAMPING, rtol=1e-6, atol=0.0, maxiter=2000)
    exact.fit([(x.double(), y)])
    few = slice(0, REFERENCE_ROWS)
    factors, report = exact.influence_factors(xt[few].double(), yt[few], return_report=True)
    assert bool(report.converged.all())
    scores: NDArray[np.float64] = exact.influences_from_factors(factors, x.double(), y).numpy()
    return scores


def error(found: dict[str, Any], exact: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(found["scores"][: len(exact)] - exact) / np.linalg.norm(exact))


def line(what: str, found: dict[str, Any], exact: NDArray[np.float64], ours: dict[str, Any] | None = None) -> None:
    if "why" in found:
        bound = found.get("more_than", 0.0) / ours["seconds"] if ours and "seconds" in ours else 0.0
        print(f"  {what:<34} {found['why']}{f', more than {bound:.1f}× wall' if bound else ''}", flush=True)
        return
    ratio = ""
    if ours is not None and "seconds" in ours:
        ratio = f"{found['seconds'] / ours['seconds']:7.1f}× wall {found['cpu'] / ours['cpu']:7.1f}× CPU"
    stages = " ".join(f"{k} {v:.1f}" for k, v in found.get("stages", {}).items())
    print(
        f"  {what:<34} {found['seconds']:7.1f} s {found['cpu']:7.1f} CPU s  error {error(found, exact):.1e} "
        f"{ratio}{stages}",
        flush=True,
    )


def compare(name: str, python: Path, limit: float) -> None:
    method = "nystroem" if name == "mlp" else "cg"
    with tempfile.TemporaryDirectory() as folder:
        model = trained(name)
        torch.save(model.state_dict(), f"{folder}/state.pt")
        exact = reference(name, model.state_dict())
        spec = {"model": name, "method": method, "state": f"{folder}/state.pt", "damping": DAMPING, "rank": RANK}
        spec |= {"chunk": CHUNK, "test_chunk": TEST_CHUNK, "threads": 1, "models": str(HERE / "models.py")}
        own = [sys.executable, "-m", "tests.benchmarks.cluster.runner_ours"]
        theirs = [str(python), str(HERE / "runner_pydvl.py")]
        print(f"{name}, {method}, damping {DAMPING}", flush=True)
        peers = {
            route: run(theirs, spec | {"route": route, "rtol": LADDER[0]}, limit)
            for route in ("factors first", "influences")
        }
        errors = [error(found, exact) for found in peers.values() if "scores" in found]
        ours: dict[str, Any] = {}
        for rtol in LADDER if method == "cg" else LADDER[:1]:
            ours = run(own, spec | {"route": "cluster", "rtol": rtol}, limit)
            if "why" in ours or method != "cg" or not errors or error(ours, exact) <= max(errors):
                break
        line("ours, 2 workers", ours, exact)
        if method == "nystroem":  # the peer measures none
            ours = run(own, spec | {"route": "cluster", "rtol": rtol, "residual_rows": 0}, limit)
            line("ours, 2 workers, no residuals", ours, exact)
        for route, found in peers.items():
            line(f"pyDVL, 2 workers, {route}", found, exact, ours)
        line(
            "ours, in one process",
            run(own, spec | {"route": "sequential", "rtol": rtol, "residual_rows": 0}, limit),
            exact,
            ours,
        )
        if "stages" in ours:
            floors(spec, ours, limit)


def workers(limit: float) -> None:
    """Strips of a second or more: two workers of one thread beside one process of one thread."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(trained("mlp").state_dict(), f"{folder}/state.pt")
        spec = {"model": "mlp", "method": "nystroem", "state": f"{folder}/state.pt", "damping": DAMPING, "rank": 10}
        spec |= {"chunk": 2048, "test_chunk": 1024, "n_train": 16384, "n_test": 1024, "residual_rows": 0}
        own = [sys.executable, "-m", "tests.benchmarks.cluster.runner_ours"]
        found = {route: run(own, spec | {"route": route}, limit)["stages"] for route in ("sequential", "cluster")}
    for stage in ("fit", "strips"):
        one, two = (found[route][stage] for route in ("sequential", "cluster"))
        print(f"1024 × 16384, {stage}: one process {one:.1f} s, two workers {two:.1f} s: {one / two:.2f}×", flush=True)


def bare(spec: dict[str, Any], limit: float, **work: Any) -> float:
    """Seconds of a stage's bare work, half in each of two processes."""
    own = [sys.executable, "-m", "tests.benchmarks.cluster.runner_floor"]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        parts = [spec | work | {"part": part, "meet": folder} for part in range(2)]
        return max(float(part["seconds"]) for part in pool.map(lambda part: run(own, part, limit), parts))


def floors(spec: dict[str, Any], ours: dict[str, Any], limit: float) -> None:
    """Stages against their floors: of strips, per-sample gradients once and one GEMM; of sketches, the products."""
    took = ours.get("stages", {})
    least = bare(spec, limit, work="strip", rows=N_TEST, passes=1)
    print(
        f"  strips: {took['strips']:.2f} s on 2 workers; gradients and torch.mm in two processes at the same time "
        f"{least:.2f} s: {least / took['strips']:.0%} of that rate",
        flush=True,
    )
    if spec["method"] == "nystroem":
        fit = bare(spec, limit, work="products", rows=RANK, passes=2)
        print(
            f"  fit: {took['fit']:.2f} s on 2 workers; two passes of {RANK} Hessian products in two processes at the "
            f"same time {fit:.2f} s: {fit / took['fit']:.0%} of that rate\n"
            f"  both floors: {fit + least:.2f} s; no run of two passes and strips of gradients takes less here",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn"])
    parser.add_argument("--limit", type=float, default=900)
    parser.add_argument("--venvs", type=Path, default=FOLDER, help="folder of the peer's environment")
    given = parser.parse_args()
    python = python_of("pydvl", given.venvs)
    for name in given.models:
        compare(name, python, given.limit)
    workers(given.limit)


if __name__ == "__main__":
    main()
