"""How long one waits for an import and for help, beside `import torch`.

Run: python -m tests.benchmarks.importing [--repeats 10]

Each is a fresh interpreter, all in turns, so that what else the machine does falls on all of them alike; the seconds of
an interpreter that imports nothing are taken off. Medians, and the ratios to torch of medians.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time

import torch

HELP = "from distinfluence.cli import main; main(['--help'], standalone_mode=False)"
CODES = {
    "import torch": "import torch",
    "import distinfluence": "import distinfluence",
    "distinfluence --help": HELP,
    "from distinfluence import open_influences": "from distinfluence import open_influences",
    "from distinfluence import CgInfluence": "from distinfluence import CgInfluence",
    "from distinfluence import *": "from distinfluence import *",
}


def seconds(code: str) -> float:
    """Wall time of a fresh interpreter that runs this code."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Measure in turns, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=10)
    repeats = parser.parse_args().repeats
    codes = {"": "", **CODES}
    for code in codes.values():
        seconds(code)  # files come from memory afterwards
    found: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(repeats):
        for name, code in codes.items():
            found[name].append(seconds(code))
    empty = statistics.median(found.pop(""))
    medians = {name: statistics.median(times) - empty for name, times in found.items()}
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {repeats} of each, medians; ", end="")
    print(f"an interpreter alone takes {empty:.2f} s")
    for name, took in medians.items():
        print(f"{name:<44}{took:>7.2f} s {took / medians['import torch']:>7.2f} × torch")


if __name__ == "__main__":
    main()
