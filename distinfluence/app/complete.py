"""Whether a resumed job has nothing left to do, found out in this process, before any worker starts.

Everything that a resumed run compares is compared here, too: the method as it was asked for, the model's parameters and
forward, the objective, the cut, every sample of the data by its fingerprint, and the model's losses and gradients at
drawn samples. The samples are read and the model is evaluated in this process, which is done only where both are small.
Where anything differs, is larger or cannot be known here, the run goes its usual way: workers decide, and refuse.
"""

from dataclasses import replace

from distinfluence.app.config import Job
from distinfluence.influence import InfluenceFunctionModel
from distinfluence.model.identity.probe import Probe, probed
from distinfluence.model.identity.structure import structure
from distinfluence.scaling import ExistingResult, Plan, Progress, RunOptions
from distinfluence.scaling.data.chunks import chunked
from distinfluence.scaling.data.recipe import fingerprint_module
from distinfluence.scaling.data.sources import InThisProcess
from distinfluence.scaling.dispatch.executor import InProcess
from distinfluence.scaling.stages.inspect import drawn_samples, look
from distinfluence.scaling.worker.context import LocalContext
from distinfluence.store import InfluenceResult, InfluenceWriter, find_damage, open_influences
from distinfluence.store.format.fingerprint import to_json

MOST_BYTES = 2 * 2**30  # Of the data, and of the model's gradients, that this process may hold for the comparison.
GRADIENTS = 4  # Vectors of parameters that are held when the model is compared.


def with_asked(options: RunOptions, job: Job, model: InfluenceFunctionModel, plan: Plan) -> RunOptions:
    """Return the options of a run whose result records what it takes to find out that it is complete.

    Args:
        options: The options.
        job: The job.
        model: Its influence model.
        plan: The plan of the run.
    """
    work = plan.work
    data_bytes = work.built_bytes + (work.n_train + work.n_test) * work.train_bytes
    needed = {"data": data_bytes, "gradients": GRADIENTS * work.row}
    return replace(options, attributes={**options.attributes, "asked": _asked(job, model), "comparison_bytes": needed})


def _asked(job: Job, model: InfluenceFunctionModel) -> dict[str, object]:
    """Return what is the same before and after a fit, and decides what the fit makes."""
    return {"solver": model.asked_settings(), "certify": job.certify}


def complete_result(job: Job, model: InfluenceFunctionModel, options: RunOptions) -> InfluenceResult | None:
    """Return the job's result if it is complete and certainly the result of this job; None if a run must decide.

    Args:
        job: The job.
        model: Its influence model, as `Job.influence_model` returned it.
        options: The options of the run.
    """
    try:
        result = open_influences(job.result)
        same = (
            result.complete
            and _is_whole(result, options)
            and _is_asked(result, job, model, options)
            and max(result.provenance["comparison_bytes"].values()) <= MOST_BYTES
            and _is_of_these_data(result, job, model)
        )
    except Exception:  # no result, or a damaged one, or data that only workers can read: a run says so
        return None
    return result if same else None


def _is_whole(result: InfluenceResult, options: RunOptions) -> bool:
    """Say whether nothing of what is asked for is missing, be it files that were lost or extras."""
    writer = InfluenceWriter.open(result.path)
    pairs = min(options.contributions, result.layout.k)
    return not (
        writer.pending()
        or not writer.knows_tests()
        or (options.self_influence and writer.without_self_influence())
        or (pairs and result.n_contributions != pairs)
        or (options.existing is ExistingResult.REPAIR and find_damage(result.path))
    )


def _is_asked(result: InfluenceResult, job: Job, model: InfluenceFunctionModel, options: RunOptions) -> bool:
    """Compare all that is known without the data."""
    recorded, layout, module = result.provenance, result.layout, model.risk.module
    cut = recorded["chunks"]
    sizes = (
        (options.chunk_size, cut["train"], layout.n_train),
        (options.test_chunk_size, cut["test"][0], layout.n_test),
        (options.panel_size, cut["panel"], layout.n_test),
    )
    here = {
        "asked": to_json(_asked(job, model), "asked"),
        "objective": to_json(model.objective_settings, "objective"),
        "structure": to_json(structure(module), "structure"),
        "mode": str(options.mode),
    }
    return (
        all(name in recorded and recorded[name] == value for name, value in here.items())
        and recorded["fingerprints"]["parameters"] == fingerprint_module(module)
        and all(asked is None or min(asked, most) == own for asked, own, most in sizes)
        and options.solve in ("auto", cut["solve"])
        and (options.top_k, options.mantissa_bits) == (layout.top_k, layout.mantissa_bits)
    )


def _is_of_these_data(result: InfluenceResult, job: Job, model: InfluenceFunctionModel) -> bool:
    """Read the data as they were cut, and compare them and what the model makes of them."""
    recorded, home = result.provenance, InThisProcess()
    train = chunked(job.recipe(job.data.train), None, home, recorded["chunks"]["train"])
    test = chunked(job.recipe(job.data.test), None, home, recorded["chunks"]["test"][0])
    if (test.n_samples, train.n_samples) != result.shape[:2] or list(test.sizes) != recorded["chunks"]["test"]:
        return False
    context, quiet = LocalContext("complete", model), Progress(False)
    looked, tests = (look(InProcess(), context, data, quiet, "data") for data in (train, test))
    here = {"fit_data": looked.sha256, "train_data": looked.sha256, "test_data": tests.sha256}
    if any(recorded["fingerprints"][name] != sha256 for name, sha256 in here.items()):
        return False
    drawn = drawn_samples(InProcess(), model.risk, looked)
    return not probed(model.risk, drawn).probe.differences(Probe.from_json(recorded["probe"]))
