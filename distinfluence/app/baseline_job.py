"""Jobs whose method is a baseline: scores without gradients, made in this process. No worker is started."""

from distinfluence.app.config import Job
from distinfluence.errors import FingerprintError, SettingError
from distinfluence.evaluate import write_baseline
from distinfluence.evaluate.baselines.points import Points
from distinfluence.evaluate.baselines.write import BaselinePlan, planned
from distinfluence.scaling import ExistingResult, Progress
from distinfluence.store import InfluenceResult


def run_baseline(job: Job, existing: ExistingResult | str, progress: Progress) -> InfluenceResult:
    """Write the scores of the job's baseline.

    Args:
        job: The job.
        existing: What to do with a result that is there.
        progress: What shows the progress.

    Returns:
        The result.
    """
    options = job.options(existing)
    options.check_path(job.result)
    baseline = job.baseline()
    return write_baseline(
        job.result, baseline, _data(job, "test"), _data(job, "train"), options=options, progress=progress
    )


def plan_baseline(job: Job) -> BaselinePlan:
    """Plan what `run_baseline` will do."""
    job.baseline()
    name = str(job.method["name"])
    return planned(job.result, name, _data(job, "test"), _data(job, "train"), job.options())


def refuse_baseline(job: Job, what: str, instead: str) -> None:
    """Raise SettingError if the job's method is a baseline, for which something makes no sense."""
    if job.is_baseline:
        raise SettingError(f"`method` {job.method['name']!r} is a baseline, which {what}. {instead}")


def require_same_data(job: Job, result: InfluenceResult) -> None:
    """Check that a baseline's result was made with the data that the job names. Raises FingerprintError."""
    cut = result.provenance["chunks"]
    recorded = result.provenance["fingerprints"]
    sizes = {"test": cut["test"][0], "train": cut["train"]}
    other = [
        f"{axis} data"
        for axis, size in sizes.items()
        if Points.of(axis, _data(job, axis), size, size).looked_at()[1] != recorded[f"{axis}_data"]
    ]
    if other:
        raise FingerprintError(
            f"`{result.path}` was made with other {' and '.join(other)} than this job names. Take the job that made it."
        )


def _data(job: Job, axis: str) -> object:
    """Return the recipe of the data; what it builds where that may be a list of texts."""
    recipe = job.recipe(job.data.test if axis == "test" else job.data.train)
    if job.method["name"] == "bm25" and "texts" not in job.method:
        with job.mistakes_of("data", axis):
            return recipe.build()
    return recipe
