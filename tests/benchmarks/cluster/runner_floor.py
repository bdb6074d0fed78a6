"""One of two processes that do a stage's bare work at the same time: python -m … runner_floor SPEC.json OUT.json."""

import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import distinfluence as di
from distinfluence.curvature.hessian import HessianProduct
from distinfluence.model.batch import Batch
from distinfluence.model.gradients import loss_gradients
from distinfluence.model.sample_risk import SampleRisk
from tests.benchmarks.cluster.models import N_TRAIN, build, train_samples


def meet(folder: Path, part: int) -> None:
    """Wait until the other process is here, too."""
    (folder / str(part)).touch()
    while not all((folder / str(other)).exists() for other in range(2)):
        time.sleep(0.001)


def strip(risk: SampleRisk, batch: Batch, factors: Tensor) -> None:
    """Per-sample gradients, and their products with the factors."""
    torch.mm(factors, loss_gradients(risk, batch).rows.T)


def products(risk: SampleRisk, batch: Batch, rows: Tensor) -> None:
    """What one pass of a fit does with a chunk."""
    HessianProduct()(risk, batch, rows)


def main() -> None:
    """`passes` times every other chunk: a strip with `rows` random factors, or Hessian products; the seconds."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    model = build(spec["model"])
    model.load_state_dict(torch.load(spec["state"], weights_only=True))
    influence = di.CgInfluence(model, nn.CrossEntropyLoss(), spec["damping"])
    x, y = train_samples()
    rows, chunk = torch.randn(spec["rows"], influence.n_parameters), spec["chunk"]
    work = {"strip": strip, "products": products}[spec["work"]]
    work(influence.risk, influence.place(x[:8], y[:8]), rows)  # warm
    meet(Path(spec["meet"]), spec["part"])
    start = time.perf_counter()
    for _ in range(spec["passes"]):
        for begin in range(spec["part"] * chunk, N_TRAIN, 2 * chunk):
            work(influence.risk, influence.place(x[begin : begin + chunk], y[begin : begin + chunk]), rows)
    Path(sys.argv[2]).write_text(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
