"""What is right and what comes out: the tables of the truth page, made by running.

Run: python -m tests.benchmarks.truth [dense retraining peers]

`dense`: every solver × curvature matrix × kind of layer × dtype against dense float64 matrices that plain autograd
makes one sample at a time. `retraining`: what the scores predict on a convex model against training again. `peers`:
what released peers return for the same question, each run by its own environment (tests/benchmarks/environments.py).
Each table is a file in docs/truth for docs/truth.md.
"""

import argparse
import datetime
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

import distinfluence
from tests.benchmarks.truth.dense import dense
from tests.benchmarks.truth.peers import peers
from tests.benchmarks.truth.retraining import retraining

TABLES = Path(__file__).parents[3] / "docs" / "truth"


def head(name: str) -> list[str]:
    """When, with what, and by which command."""
    return [
        f"*{datetime.date.today()}; Python {platform.python_version()}, torch {torch.__version__}, distinfluence "
        f"{distinfluence.__version__}; `python -m tests.benchmarks.truth {name}`*",
        "",
    ]


WRITERS: Mapping[str, Callable[[], list[str]]] = {"dense": dense, "retraining": retraining, "peers": peers}


def main() -> None:
    """Write the tables that are named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", default=[], help=", ".join(WRITERS))
    names = parser.parse_args().names or list(WRITERS)
    if unknown := set(names) - set(WRITERS):
        sys.exit(f"no such table: {', '.join(sorted(unknown))}; there are {', '.join(WRITERS)}")
    TABLES.mkdir(exist_ok=True)
    for name in names:
        text = "\n".join([*head(name), *WRITERS[name]()])
        (TABLES / f"{name}.md").write_text(text.rstrip() + "\n")
        print(text, flush=True)


if __name__ == "__main__":
    main()
