"""One measurement of ours, as its user would do it: python -m tests.benchmarks.peers.runner_ours SPEC.json OUT.json."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import distinfluence as di
from tests.benchmarks.peers.models import build


def influence(spec: dict[str, Any], model: nn.Module) -> di.InfluenceFunctionModel:
    loss, damping, rtol, method = nn.CrossEntropyLoss(), spec["damping"], spec.get("rtol"), spec["method"]
    mode: dict[str, Any] = {"second_order_mode": spec["matrix"]}
    if method == "direct":
        return di.DirectInfluence(model, loss, damping, **mode)
    if method in ("row cg", "block cg"):
        return di.CgInfluence(model, loss, damping, rtol=rtol, atol=0.0, use_block_cg=method == "block cg", **mode)
    if method == "krylov":
        return di.KrylovInfluence(model, loss, damping, rtol=rtol, **mode)
    if method == "chebyshev":
        return di.ChebyshevInfluence(model, loss, damping, rtol=rtol, **mode)
    if method == "lissa":
        rest: dict[str, Any] = {"scale": spec["scale"], "maxiter": spec["maxiter"]}
        return di.LissaInfluence(model, loss, damping, rtol=1e-4, **rest, **mode)
    if method == "arnoldi":
        return di.ArnoldiInfluence(model, loss, damping, rank_estimate=spec["rank"], **mode)
    if method == "nystroem":
        return di.NystroemSketchInfluence(model, loss, spec["rank"], damping, **mode)
    return di.InverseHarmonicMeanInfluence(model, loss, damping)


def main() -> None:
    """Fit and score; the time of both, the scores, and the passes over the training data."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(spec["threads"])
    data = torch.load(spec["data"], weights_only=True)
    net = build(spec["model"])
    net.load_state_dict(data["state"])
    small = (data["x"][:20], data["y"][:20])
    # warm up, with a damping at which the Hessian of these few is definite: else Direct makes its eigenvalues
    influence({**spec, "damping": 10.0}, net).fit(small).influences(data["xt"][:2], data["yt"][:2], *small)
    loader = DataLoader(TensorDataset(data["x"], data["y"]), batch_size=spec["batch"])
    start = time.perf_counter()
    model = influence(spec, net).fit(loader)
    scores = model.influences(data["xt"], data["yt"], data["x"], data["y"])
    seconds = time.perf_counter() - start
    np.save(spec["scores"], scores.numpy())
    Path(sys.argv[2]).write_text(json.dumps({"seconds": seconds, "passes": model.reducer.passes}))


if __name__ == "__main__":
    main()
