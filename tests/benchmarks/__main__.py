"""Runs the benchmarks, one after the other, and keeps what each printed with when, where and with what it was made.

Run: python -m tests.benchmarks [NAME …] [--list], or `make bench [ONLY="NAME …"]`

Each record is a text file in docs/benchmarks, which the pages of the documentation show as it is. A benchmark that
fails leaves the record that was there.
"""

import argparse
import datetime
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "docs" / "benchmarks"
NOT_RUN = "not run yet"
PACKAGES = ("distinfluence", "torch", "numpy", "dask", "zarr")


@dataclass(frozen=True)
class Bench:
    """One record. module: below tests.benchmarks. minutes: about how long it takes on two cores."""

    name: str
    module: str
    minutes: float
    arguments: tuple[str, ...] = ()
    cuda: bool = False

    @property
    def record(self) -> Path:
        """The file that the documentation shows."""
        return RECORDS / f"{self.name}.txt"

    @property
    def command(self) -> tuple[str, ...]:
        """What is run, after the interpreter."""
        return ("-m", f"tests.benchmarks.{self.module}", *self.arguments)


BENCHES = (
    Bench("importing", "importing", 2),
    Bench("passes", "passes", 5),
    Bench("plans", "plans", 5),
    Bench("lds", "lds", 8),
    Bench("removal", "removal", 6),
    Bench("reading", "reading", 5, ("--memmap",)),
    Bench("scale", "scale", 15),
    Bench("soak", "soak", 7),
    Bench("dispatch", "dispatch", 3),
    Bench("kronecker", "kronecker", 10, ("--repeats", "2")),
    Bench("cluster", "cluster", 4, ("--models", "mlp", "--limit", "150")),
    Bench("cluster-cnn", "cluster", 60, ("--models", "cnn", "--limit", "1800")),
    Bench("peers", "peers", 25, ("--limit", "45", "--dampings", "0.1", "0.01")),
    Bench("gpu", "gpu", 5, cuda=True),
)


def machine() -> str:
    """Processor, cores and memory; the GPU if there is one."""
    names = {line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")}
    processor = ", ".join(sorted(names)) or platform.machine()
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor}, {len(os.sched_getaffinity(0))} cores, {memory}{gpu}"


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.is_file() else []


def header(command: tuple[str, ...], seconds: float, load: float) -> str:
    """The lines above what a benchmark printed. load: of the machine, before the benchmark began."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    fields = {
        "date": f"{datetime.date.today()}",
        "machine": f"{machine()}; load before the run {load:.1f}",
        "versions": f"Python {platform.python_version()}, {versions}",
        "command": f"python {shlex.join(command)}",
        "took": f"{seconds:.0f} s",
    }
    return "".join(f"{name:<10}{text}\n" for name, text in fields.items())


def run(bench: Bench) -> bool:
    """Run it, print what it prints, and keep it if it succeeds."""
    print(f"\n== {bench.name}, about {bench.minutes:g} minutes", flush=True)
    load, start = os.getloadavg()[0], time.perf_counter()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    lines = []
    with subprocess.Popen(
        [sys.executable, *bench.command], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip() + "\n")
    if process.returncode:
        print(f"== {bench.name} failed with status {process.returncode}; its record is as it was", flush=True)
        return False
    RECORDS.mkdir(exist_ok=True)
    bench.record.write_text(header(bench.command, time.perf_counter() - start, load) + "\n" + "".join(lines).lstrip())
    return True


def listing() -> str:
    """Names, what each takes, and when it was last run."""
    lines = []
    for bench in BENCHES:
        text = bench.record.read_text() if bench.record.is_file() else NOT_RUN
        when = NOT_RUN if text.startswith(NOT_RUN) else text.splitlines()[0].removeprefix("date").strip()
        lines.append(f"{bench.name:<12}about {bench.minutes:>3g} minutes   {when}")
    return "\n".join(lines)


def main() -> None:
    """Run those that are named, or all that this machine can."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(bench.name for bench in BENCHES))
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    given = parser.parse_args()
    unknown = set(given.names) - {bench.name for bench in BENCHES}
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}. --list says what there is.")
    if given.list:
        print(listing())
        return
    wanted = [bench for bench in BENCHES if bench.name in (given.names or [b.name for b in BENCHES])]
    here = [bench for bench in wanted if torch.cuda.is_available() or not bench.cuda]
    for bench in wanted:
        if bench not in here:
            print(f"== {bench.name} needs a GPU; its record is as it was")
    failed = [bench.name for bench in here if not run(bench)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
