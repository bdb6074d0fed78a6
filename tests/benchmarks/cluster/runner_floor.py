"""One of two processes that do the bare work of the strips at the same time: runner_floor.py SPEC.json OUT.json."""

import json
import sys
import time
from pathlib import Path

import torch
from torch import nn

import distinfluence as di
from distinfluence.gradients import loss_gradients
from tests.benchmarks.cluster.models import N_TEST, N_TRAIN, build, train_samples


def meet(folder: Path, part: int) -> None:
    """Wait until the other process is here, too."""
    (folder / str(part)).touch()
    while not all((folder / str(other)).exists() for other in range(2)):
        time.sleep(0.001)


def main() -> None:
    """Per-sample gradients of every other chunk once, times random factors; the seconds."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    model = build(spec["model"])
    model.load_state_dict(torch.load(spec["state"], weights_only=True))
    influence = di.CgInfluence(model, nn.CrossEntropyLoss(), spec["damping"])
    x, y = train_samples()
    factors, chunk = torch.randn(N_TEST, influence.n_parameters), spec["chunk"]
    warm = influence.place(x[:8], y[:8])
    torch.mm(factors, loss_gradients(influence.risk, warm).rows.T)
    meet(Path(spec["meet"]), spec["part"])
    start = time.perf_counter()
    for begin in range(spec["part"] * chunk, N_TRAIN, 2 * chunk):
        batch = influence.place(x[begin : begin + chunk], y[begin : begin + chunk])
        torch.mm(factors, loss_gradients(influence.risk, batch).rows.T)
    Path(sys.argv[2]).write_text(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
