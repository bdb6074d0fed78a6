"""How much the loss of a query rises without what helps it most: `distinfluence evaluate` on a small transformer.

Run: python -m tests.benchmarks.removal

The causal transformer of an example, 24 wide, on 213 passages of text by characters. Queries are passages of the same
text, shifted by half a passage, so each shares its halves with two of the training set. Adam, 30 epochs; the 5 % that
help a query most are removed, against as many random passages, from two seeds each.
"""

import importlib
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distinfluence import LanguageModelObjective
from distinfluence.app.config import Job
from distinfluence.app.evaluation import evaluate_job
from distinfluence.app.yaml_file import to_yaml
from distinfluence.scaling import Progress

WIDTH, EPOCHS, BATCH, RATE = 24, 30, 32, 5e-3
HALF, FIRST, LAST = 32, 5, 45  # characters; passages that queries begin in
EXAMPLE = importlib.import_module("examples.which_passages_taught_this_continuation")
HERE = "tests.benchmarks.removal"


def _characters() -> tuple[Tensor, int]:
    texts = EXAMPLE.passages()
    alphabet = sorted(set("".join(texts)))
    return torch.tensor([[alphabet.index(c) for c in text] for text in texts]), len(alphabet)


def build() -> nn.Module:
    """Return the untrained network."""
    net: nn.Module = EXAMPLE.Transformer(_characters()[1], WIDTH)
    return net


def train_data() -> dict[str, Tensor]:
    """Return the passages."""
    return {"input_ids": _characters()[0]}


def test_data() -> dict[str, Tensor]:
    """Return the queries."""
    ids = _characters()[0]
    text, n = ids.flatten(), ids.shape[1]
    return {"input_ids": torch.stack([text[i * n + HALF : (i + 1) * n + HALF] for i in range(FIRST, LAST)])}


def train(indices: NDArray[np.int64], seed: int) -> nn.Module:
    """Train on some passages."""
    torch.manual_seed(seed)
    net, ids = build(), train_data()["input_ids"][torch.from_numpy(np.array(indices))]
    steps = EPOCHS * -(-len(ids) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for batch in ids[torch.randperm(len(ids))].split(BATCH):
            logits = net(batch)[:, :-1]
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def job() -> dict[str, Any]:
    """Return the content of the job file."""
    damping = {"fraction": 0.1, "of": "mean"}
    return {
        "model": {"factory": f"{HERE}:build"},
        "loss": f"distinfluence:{LanguageModelObjective.__name__}",
        "data": {"train": f"{HERE}:train_data", "test": f"{HERE}:test_data"},
        "method": {"name": "ekfac", "update_diagonal": True, "hessian_regularization": damping},
        "output": "influences.zarr",
        "cluster": {"kind": "local", "workers": 2},
        "evaluate": {
            "train": f"{HERE}:train",
            "output": "evaluation",
            "subsets": 0,
            "removal": {"fractions": [0.05], "queries": 10, "seeds": 2, "controls": 4},
        },
    }


def main() -> None:
    """Retrain, score, print."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.yaml"
        file.write_text(to_yaml(job()))
        start = time.perf_counter()
        found = evaluate_job(Job.read(file), progress=Progress(False))
        print(f"{time.perf_counter() - start:.0f} s\n{found}")


if __name__ == "__main__":
    main()
