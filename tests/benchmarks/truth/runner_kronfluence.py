"""What kronfluence returns, by its own environment's interpreter: runner_kronfluence.py SPEC.json OUT.npz OUT.json.

With its strategy "identity" a score is the dot product of two gradients, for which there is one right value.
"""

import json
import logging
import sys
import tempfile
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


class Classes(Task):  # type: ignore[misc]
    """Cross-entropy of classes."""

    def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Any:
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    def compute_measurement(self, batch: Any, model: Any) -> Any:
        return self.compute_train_loss(batch, model)


class Processed(Classes):
    """With a hook for gradients that leaves them as they are."""

    enable_post_process_per_sample_gradient = True


def products(models: Any, name: str, n: int, folder: str, by_module: bool = False) -> Any:
    """Dot products of the gradients of tests and training samples, [tests, n]; summed over modules if `by_module`."""
    model, x, y = models.build(name)
    if by_module:  # whole batches: a ragged one raises
        x, y, n = torch.cat([x[:16], x[n : n + 64]]), torch.cat([y[:16], y[n : n + 64]]), 16
    task = Processed() if by_module else Classes()
    made = Analyzer("truth", prepare_model(model, task), task, cpu=True, output_dir=folder, disable_tqdm=True)
    train, test = TensorDataset(x[:n], y[:n]), TensorDataset(x[n:], y[n:])
    arguments = FactorArguments(strategy="identity", has_shared_parameters=name == "twice")
    made.fit_all_factors("f", train, per_device_batch_size=8, factor_args=arguments, overwrite_output_dir=True)
    made.compute_pairwise_scores(
        "s",
        "f",
        test,
        train,
        per_device_query_batch_size=16,
        per_device_train_batch_size=8,
        score_args=ScoreArguments(compute_per_module_scores=by_module),
        overwrite_output_dir=True,
    )
    return sum(made.load_pairwise_scores("s").values())


def main() -> None:
    """Every model; one that raises leaves its error."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    models = SourceFileLoader("models", spec["models"]).load_module()
    found, errors = {}, {}
    cases = [(name, name, False) for name in spec["names"]] + [("by module", "mlp", True)]
    for case, name, by_module in cases:
        try:
            with tempfile.TemporaryDirectory() as folder:
                found[case] = np.asarray(products(models, name, spec["train"], folder, by_module).float())
        except Exception as error:
            errors[case] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80]}"
    np.savez(sys.argv[2], **found)
    Path(sys.argv[3]).write_text(json.dumps(errors))


if __name__ == "__main__":
    main()
