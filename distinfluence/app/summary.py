"""A result in a few lines, for the terminal. Loads neither torch nor dask, for which nobody should wait to look."""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from distinfluence.store import InfluenceResult
from distinfluence.store.read.facts import how_solved, method_of


def program() -> str:
    """Say how to call this command from the shell: by name where that is found, else by its path."""
    if shutil.which("distinfluence") is not None:
        return "distinfluence"
    beside = Path(sys.executable).with_name("distinfluence")
    if not beside.is_file():
        return f"{sys.executable} -m distinfluence"
    return str(beside.relative_to(Path.cwd())) if beside.is_relative_to(Path.cwd()) else str(beside)


def summary(result: InfluenceResult) -> str:
    """Say what a run made and what it cost, for the terminal."""
    provenance = result.provenance
    kind = "scores" if provenance.get("baseline") else "influences"
    lines = [f"{' × '.join(map(str, result.shape))} {kind} (test × train) in {result.path}"]
    if provenance.get("baseline"):
        lines.append(method_of(provenance))
    else:
        covered = provenance["parameters"]
        lines += [
            f"{_method(provenance['solver'])}, {covered['covered']} of {covered['total']} parameters covered "
            f"({covered['coverage']:.1%})",
            f"{how_solved(result.converged, result.relative_residual)}{_iterations(int(np.max(result.iterations)))}",
        ]
    if not result.complete:
        lines.append(f"running: {result.progress:.0%} of the strips are written")
    seconds = provenance.get("summary", {}).get("seconds", {})
    if seconds:
        lines.append("time: " + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()))
    return "\n".join([*lines, *provenance.get("remarks", [])])


def _method(solver: dict[str, Any]) -> str:
    if solver["second_order_mode"] == "none":
        return f"{solver['method']}, without curvature"
    return (
        f"{solver['method']} on the {solver['second_order_mode']}, damping {_damping(solver['hessian_regularization'])}"
    )


def _iterations(most: int) -> str:
    """Nothing for methods that have none."""
    return f", at most {most} iteration{'' if most == 1 else 's'}" if most > 0 else ""


def _damping(by_block: dict[str, float]) -> str:
    values = sorted(set(by_block.values()))
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g} by block"
