"""What is lost when a run is killed?

A run in a process of its own writes a matrix of 100 × 1200 in 60 strips. The script kills it (SIGKILL, which no
program can catch) when at least ten strips are marked as whole, starts it again with `existing="resume"`, kills it once
more, and lets the third run finish. Beside it, a run that nobody disturbed. No strip that was marked is made again, and
the bits of the two matrices are equal.

About 30 seconds on one core. Prints what was there after each kill, and whether the bits are equal. The folder must be
without the results of an earlier run.

    python examples/killed_and_resumed.py --out .
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from distinfluence import CgInfluence, SequentialInfluenceCalculator, open_influences

N_TRAIN, N_TEST, STRIP = 1200, 100, 20
N_STRIPS = N_TRAIN // STRIP


@dataclass(frozen=True)
class Findings:
    """strips_at_kills: marked strips, of `n_strips`, after each kill. remade: how many of those were made again."""

    strips_at_kills: list[int]
    n_strips: int
    remade: int
    equal: bool


def main(out: Path) -> Findings:
    """Disturb one run, leave another alone, compare, print."""
    path, undisturbed = out / "killed.zarr", out / "undisturbed.zarr"
    if path.exists():
        sys.exit(f"{path} is there already. Remove it, or pass another folder.")
    at_kills, marks = [], dict[str, int]()
    for _ in range(2):
        killed_after(10 + len(marks), path)
        now = marked(path)
        at_kills.append(len(now))
        print(f"killed with {len(now)} of {N_STRIPS} strips")
        remade = sum(now[strip] != when for strip, when in marks.items())
        marks = now
    subprocess.run(command(path), check=True)
    remade += sum(marked(path)[strip] != when for strip, when in marks.items())
    subprocess.run(command(undisturbed), check=True)
    equal = np.array_equal(open_influences(path)[:], open_influences(undisturbed)[:])
    print(f"resumed and finished; strips that were made again: {remade}; bits equal to an undisturbed run: {equal}")
    return Findings(at_kills, N_STRIPS, remade, bool(equal))


def run(path: Path) -> None:
    """The run itself: only this knows that it may be killed: `existing="resume"` and the named scratch folder."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 5)).eval()
    x, y = torch.randn(N_TRAIN, 20), torch.randint(5, (N_TRAIN,))
    influence = CgInfluence(model, nn.CrossEntropyLoss(), 0.01, rtol=1e-4, atol=0.0, second_order_mode="ggn")
    calculator = SequentialInfluenceCalculator(influence, scratch=path.with_suffix(".scratch"))
    calculator.fit(x, y, chunk_size=STRIP).to_zarr(path, x[:N_TEST], y[:N_TEST], existing="resume", progress=False)


def command(path: Path) -> list[str]:
    """This script, as the run."""
    return [sys.executable, str(Path(__file__).absolute()), "--run", str(path)]


def killed_after(strips: int, path: Path) -> None:
    """Start the run, and kill it when so many strips are marked."""
    process = subprocess.Popen(command(path))
    while len(marked(path)) < strips:
        if process.poll() is not None:
            sys.exit("the run ended before it could be killed")
        time.sleep(0.01)
    process.kill()
    process.wait()


def marked(path: Path) -> dict[str, int]:
    """Strip → when its mark was written; one that is made again gets a new mark."""
    marks = (path / "strip_status" / "c").glob("*")
    return {mark.name: mark.stat().st_mtime_ns for mark in marks if mark.name.isdigit()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the results")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        run(given.run)
    else:
        main(given.out)
