"""Fit and score with EkfacInfluence: python -m tests.benchmarks.kronecker.runner_ours SPEC.json OUT.json."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

import distinfluence as di
from tests.benchmarks.kronecker.models import BATCH, build, data, reset_peak, resident


def main() -> None:
    """Seconds and peak bytes above the start of both stages."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(spec["threads"])
    name = spec["model"]
    model, (train, queries) = build(name), data(name)
    loss = di.LanguageModelObjective(reduction="sum") if name == "transformer" else None

    def influence() -> di.EkfacInfluence:
        return di.EkfacInfluence(model, True, di.RelativeDamping(0.1), loss=loss, fisher=spec["fisher"])

    small = tuple(part[:8] for part in train)
    influence().fit(small).influences(*small)  # warm up
    loader = DataLoader(TensorDataset(*train), batch_size=BATCH)
    found: dict[str, float] = {}
    before, start = reset_peak(), time.perf_counter()
    fitted = influence().fit(loader)
    found["fit_seconds"] = time.perf_counter() - start
    found["fit_bytes"] = resident() - before
    before, start = reset_peak(), time.perf_counter()
    scores = fitted.influences(*queries, *train)
    found["score_seconds"] = time.perf_counter() - start
    found["score_bytes"] = resident() - before
    np.save(spec["scores"], scores.numpy())
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
