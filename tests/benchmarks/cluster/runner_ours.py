"""One measurement of ours, on a cluster or in this process: python -m … runner_ours SPEC.json OUT.json."""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

import distinfluence as di
from distinfluence.scaling import ClusterSpec, InfluenceCalculator, Progress, connected
from tests.benchmarks.cluster.models import N_TEST, N_TRAIN, build, query_samples, train_samples, warm


def cpu_seconds() -> float:
    """Of this process and its children, so far."""
    own = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (own, *own.children(recursive=True)))


def influence(spec: dict[str, Any], model: nn.Module) -> di.InfluenceFunctionModel:
    mode: dict[str, Any] = {"second_order_mode": "hessian"}
    if spec["method"] == "nystroem":
        rest = {"residual_rows": spec.get("residual_rows"), **mode}
        return di.NystroemSketchInfluence(model, nn.CrossEntropyLoss(), spec["rank"], spec["damping"], **rest)
    return di.CgInfluence(model, nn.CrossEntropyLoss(), spec["damping"], rtol=spec["rtol"], atol=0.0, **mode)


def measure(calculator: InfluenceCalculator, spec: dict[str, Any], folder: str) -> dict[str, Any]:
    start, before, progress = time.perf_counter(), cpu_seconds(), Progress(False)
    calculator.fit(*train_samples(spec.get("n_train", N_TRAIN)), chunk_size=spec["chunk"], progress=progress)
    solve = {"test_chunk_size": spec["test_chunk"], "solve": spec.get("solve", "auto")}
    tests = query_samples(spec.get("n_test", N_TEST))
    result = calculator.to_zarr(Path(folder) / "i.zarr", *tests, **solve, progress=progress)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - before
    np.save(spec["scores"], result[:])
    return {"seconds": seconds, "cpu": cpu, "stages": progress.seconds}


def main() -> None:
    """Fit, compute and write; wall and CPU seconds of all processes, seconds by stage, and the matrix."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    model = build(spec["model"])
    model.load_state_dict(torch.load(spec["state"], weights_only=True))
    asked = influence(spec, model)
    warm()
    with tempfile.TemporaryDirectory() as folder:
        if spec["route"] == "sequential":
            torch.set_num_threads(1)
            found = measure(di.SequentialInfluenceCalculator(asked), spec, folder)
        else:
            with connected(ClusterSpec(workers=2)) as client:
                client.run(warm)
                found = measure(di.DaskInfluenceCalculator(asked, client), spec, folder)
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
