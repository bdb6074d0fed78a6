"""Does the matrix depend on where it is made?

The same matrix three times: by workers that are started here; by workers of a scheduler that is running already,
joined by its address; and, where there is a queue, by SLURM jobs. The only thing that changes is the `ClusterSpec`. The
bits are equal.

20 seconds on two idle cores, a minute on busy ones. Prints what each run took and whether its matrix is that of the
first. With SLURM, run it on a folder that every node sees, and say which partition:

    python examples/on_a_cluster.py --out . [--partition cpu]
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from distributed import Client
from torch import nn

from distinfluence import CgInfluence, DaskInfluenceCalculator, InfluenceResult
from distinfluence.scaling import ClusterSpec, connected

WORKERS = 2


@dataclass(frozen=True)
class Findings:
    """kinds: the clusters that were used, the first one the reference. equal: whether all matrices have its bits."""

    kinds: list[str]
    equal: bool


def main(out: Path, partition: str | None = None) -> Findings:
    """Run everywhere, compare, print."""
    with running_scheduler(out) as address:
        specs = {
            "local": ClusterSpec("local", workers=WORKERS),
            "address": ClusterSpec("address", address=address),
        }
        if partition is not None:
            settings = {"queue": partition, "cores": 1, "memory": "2GB", "walltime": "00:10:00"}
            specs["slurm"] = ClusterSpec("slurm", workers=WORKERS, settings=settings)
        results = {kind: computed(kind, spec, out) for kind, spec in specs.items()}
    if partition is None:
        print("slurm    left out: say --partition where there is a queue")
    first = results["local"][:]
    equal = {kind: bool(np.array_equal(result[:], first)) for kind, result in results.items()}
    print("All bits are equal." if all(equal.values()) else f"The bits differ: {equal}")
    return Findings(kinds=list(results), equal=all(equal.values()))


def computed(kind: str, spec: ClusterSpec, out: Path) -> InfluenceResult:
    """400 training and 40 test points of a small network on this cluster."""
    model, x, y = problem()
    influence = CgInfluence(model, nn.CrossEntropyLoss(), 0.01, rtol=1e-5, atol=0.0, second_order_mode="ggn")
    start = time.perf_counter()
    with connected(spec, folder=out / "logs", announce=print) as client:
        calculator = DaskInfluenceCalculator(influence, client, scratch=out / f"scratch-{kind}")
        calculator.fit(x, y, chunk_size=50)
        path = out / f"{kind}.zarr"
        result = calculator.to_zarr(path, x[:40], y[:40], solve="rows", existing="replace", progress=False)
    seconds = time.perf_counter() - start
    print(f"{kind:8s} {' × '.join(map(str, result.shape))} in {seconds:.1f} s, all converged: {result.converged.all()}")
    return result


def problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A network 10-16-3 and 400 samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 3)).eval()
    return model, torch.randn(400, 10), torch.randint(3, (400,))


@contextmanager
def running_scheduler(out: Path) -> Iterator[str]:
    """Stands for the cluster that your site runs: `dask scheduler` and `dask worker`, here. Yields its address."""
    file = out / "scheduler.json"
    file.unlink(missing_ok=True)
    dask = [sys.executable, "-m", "dask"]
    here = ["--host", "127.0.0.1"]
    programs = [
        [*dask, "scheduler", *here, "--port", "0", "--no-dashboard", "--scheduler-file", str(file)],
        [*dask, "worker", *here, "--nworkers", str(WORKERS), "--nthreads", "1", "--scheduler-file", str(file)],
    ]
    with (out / "scheduler.log").open("w") as log:
        processes = [subprocess.Popen(program, stdout=log, stderr=log) for program in programs]
        try:
            while not file.exists() and processes[0].poll() is None:
                time.sleep(0.1)
            with Client(scheduler_file=str(file), timeout=60) as client:
                client.wait_for_workers(WORKERS, timeout=60)
                address = client.scheduler.address
            yield address
        finally:
            for process in reversed(processes):
                process.terminate()
            for process in processes:
                process.wait(timeout=60)


if __name__ == "__main__":  # needed: workers are processes that read this file again
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the results")
    parser.add_argument("--partition", help="of SLURM; without it, SLURM is left out")
    given = parser.parse_args()
    if not main(given.out.absolute(), given.partition).equal:
        sys.exit(1)
