"""Running a job: from its description to the result on disk, with a summary for people."""

import shutil
import sys
from pathlib import Path

import numpy as np

from distinfluence.config import Job
from distinfluence.scaling import DaskInfluenceCalculator, Progress, connected
from distinfluence.store import InfluenceResult, check_output


def run_job(
    job: Job, *, overwrite: bool = False, resume: bool = False, progress: Progress | None = None
) -> InfluenceResult:
    """Start or join the cluster, fit, compute, write; returns the result.

    overwrite, resume: as `InfluenceCalculator.to_zarr`. Files of the run lie in `scratch` until it is complete.
    """
    progress = progress or Progress()
    model, recipe = job.influence_model()
    output = job.path(job.output)
    check_output(output, overwrite=overwrite, resume=resume)
    scratch = job.path(job.scratch) if job.scratch is not None else output.with_name(f".{output.name}.scratch")
    with connected(job.cluster_spec()) as client:
        calculator = DaskInfluenceCalculator(model, client, recipe=recipe, scratch=scratch)
        calculator.fit(job.recipe(job.data.train), chunk_size=job.chunks.train, certify=job.certify, progress=progress)
        result = calculator.to_zarr(
            output,
            job.recipe(job.data.test),
            mode=job.mode,
            test_chunk_size=job.chunks.test,
            solve=job.solve,
            top_k=job.top_k,
            overwrite=overwrite,
            resume=resume,
            progress=progress,
            attributes={"job": job.model_dump(mode="json")},
        )
    _remove(scratch)
    return result


def program() -> str:
    """How to call this command from the shell: by name where that is found, else by its path."""
    if shutil.which("distinfluence") is not None:
        return "distinfluence"
    beside = Path(sys.executable).with_name("distinfluence")
    if not beside.is_file():
        return f"{sys.executable} -m distinfluence"
    return str(beside.relative_to(Path.cwd())) if beside.is_relative_to(Path.cwd()) else str(beside)


def summary(result: InfluenceResult) -> str:
    """What a run made and what it cost, for the terminal."""
    provenance = result.provenance
    solver, covered = provenance["solver"], provenance["parameters"]
    lines = [
        f"{' × '.join(map(str, result.shape))} influences (test × train) in {result.path}",
        f"{solver['method']} on the {solver['second_order_mode']}, "
        f"damping {_damping(solver['hessian_regularization'])}, "
        f"{covered['covered']} of {covered['total']} parameters covered ({covered['coverage']:.1%})",
        f"{int(np.sum(result.converged))} of {result.shape[0]} rows converged, worst relative residual "
        f"{float(np.nanmax(result.relative_residual)):.1e}, at most {int(np.max(result.iterations))} iterations",
    ]
    if not result.complete:
        lines.append(f"running: {result.progress:.0%} of the strips are written")
    seconds = provenance.get("summary", {}).get("seconds", {})
    if seconds:
        lines.append("time: " + ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()))
    return "\n".join([*lines, *provenance.get("remarks", [])])


def _damping(by_block: dict[str, float]) -> str:
    values = sorted(set(by_block.values()))
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g} by block"


def _remove(scratch: Path) -> None:
    """The scratch folder, if the run left nothing of its own in it."""
    for file in scratch.iterdir():
        if file.is_file() and file.name.startswith(("state-", "array-", "model-")):
            file.unlink()
    if not any(scratch.iterdir()):
        scratch.rmdir()
