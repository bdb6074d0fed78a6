"""The same with kronfluence, by the interpreter of its own environment: runner_kronfluence.py SPEC.json OUT.json."""

import json
import logging
import sys
import tempfile
import time
import warnings
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
import numpy as np  # noqa: E402
import torch  # noqa: E402
from kronfluence.analyzer import Analyzer, prepare_model  # type: ignore[import-not-found]  # noqa: E402
from kronfluence.arguments import FactorArguments, ScoreArguments  # type: ignore[import-not-found]  # noqa: E402
from kronfluence.task import Task  # type: ignore[import-not-found]  # noqa: E402
from torch.utils.data import TensorDataset  # noqa: E402


def main() -> None:
    """Seconds and peak bytes above the start of both stages."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(spec["threads"])
    models = SourceFileLoader("models", spec["models"]).load_module()
    name = spec["model"]

    class OfModel(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Any:
            x, y = batch
            outputs = model(x)
            if sample:
                with torch.no_grad():
                    drawn = torch.distributions.Categorical(logits=outputs.detach()).sample()
                y = torch.cat([y[:, :1], drawn[:, :-1]], dim=1) if name == "transformer" else drawn
            return models.losses(name, outputs, y).sum()

        def compute_measurement(self, batch: Any, model: Any) -> Any:
            return self.compute_train_loss(batch, model)

    def analyzer(folder: str, label: str) -> Any:
        task = OfModel()
        model = prepare_model(models.build(name), task)
        return Analyzer(analysis_name=label, model=model, task=task, cpu=True, output_dir=folder, disable_tqdm=True)

    train, queries = (TensorDataset(*part) for part in models.data(name))
    factors = FactorArguments(strategy="ekfac", use_empirical_fisher=spec["fisher"] == "empirical")
    scores = ScoreArguments(damping_factor=None)  # a tenth of the mean eigenvalue

    def fit(made: Any, dataset: Any, label: str) -> None:
        made.fit_all_factors(
            label, dataset, per_device_batch_size=models.BATCH, factor_args=factors, overwrite_output_dir=True
        )

    def score(made: Any, some: Any, dataset: Any, label: str) -> Any:
        made.compute_pairwise_scores(
            f"{label}-scores", label, some, dataset, per_device_query_batch_size=len(some),
            per_device_train_batch_size=models.BATCH, score_args=scores, overwrite_output_dir=True,
        )  # fmt: skip
        return made.load_pairwise_scores(f"{label}-scores")["all_modules"]

    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        small = TensorDataset(*(part[:8] for part in train.tensors))
        warm = analyzer(folder, "warm")
        fit(warm, small, "warm")
        score(warm, small, small, "warm")
        made = analyzer(folder, "timed")
        before, start = models.reset_peak(), time.perf_counter()
        fit(made, train, "timed")
        found["fit_seconds"] = time.perf_counter() - start
        found["fit_bytes"] = models.resident() - before
        before, start = models.reset_peak(), time.perf_counter()
        matrix = score(made, queries, train, "timed")
        found["score_seconds"] = time.perf_counter() - start
        found["score_bytes"] = models.resident() - before
    np.save(spec["scores"], matrix.float().numpy())
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
