"""One measurement of pyDVL; run by the interpreter of pyDVL's own environment: runner_pydvl.py SPEC.json OUT.json."""

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
import numpy as np  # noqa: E402
import torch  # noqa: E402
from pydvl.influence import torch as peer  # type: ignore[import-not-found]  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402


def influence(spec: dict[str, Any], model: torch.nn.Module) -> Any:
    mode = {
        "hessian": peer.SecondOrderMode.HESSIAN,
        "empirical_fisher": peer.SecondOrderMode.GAUSS_NEWTON,
    }[spec["matrix"]]
    loss, damping, rtol = torch.nn.functional.cross_entropy, spec["damping"], spec.get("rtol")
    tolerance = {} if rtol is None else {"rtol": rtol, "atol": 0.0}
    method = spec["method"]
    if method == "direct":
        return peer.DirectInfluence(model, loss, regularization=damping, second_order_mode=mode)
    if method in ("row cg", "block cg"):
        block = {"solve_simultaneously": method == "block cg", "maxiter": spec.get("maxiter")}
        return peer.CgInfluence(model, loss, regularization=damping, second_order_mode=mode, **tolerance, **block)
    if method == "lissa":
        rest = {"scale": spec["scale"], "maxiter": spec["maxiter"]}
        return peer.LissaInfluence(model, loss, regularization=damping, second_order_mode=mode, **rest)
    if method == "arnoldi":
        return peer.ArnoldiInfluence(model, loss, regularization=damping, second_order_mode=mode, rank=spec["rank"])
    if method == "nystroem":
        return peer.NystroemSketchInfluence(
            model, loss, regularization=damping, rank=spec["rank"], second_order_mode=mode
        )
    return peer.InverseHarmonicMeanInfluence(model, loss, regularization=damping)


def main() -> None:
    """Fit and score; the time of both, the scores, and the forward passes in samples."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(spec["threads"])
    data = torch.load(spec["data"], weights_only=True)
    from importlib.machinery import SourceFileLoader

    build = SourceFileLoader("models", spec["models"]).load_module().build  # the same file for everybody
    net = build(spec["model"])
    net.load_state_dict(data["state"])
    net.eval()
    seen = [0]
    net.register_forward_hook(lambda _m, args, _o: seen.__setitem__(0, seen[0] + len(args[0])))
    loader = DataLoader(TensorDataset(data["x"], data["y"]), batch_size=spec["batch"])
    small = DataLoader(TensorDataset(data["x"][:20], data["y"][:20]), batch_size=20)
    try:  # warm up on a handful of samples
        influence(spec, net).fit(small).influences(data["xt"][:2], data["yt"][:2], data["x"][:4], data["y"][:4])
    except Exception as error:
        print(f"warm-up: {error}", file=sys.stderr)
    seen[0] = 0
    start = time.perf_counter()
    fitted = influence(spec, net).fit(loader)
    scores = fitted.influences(data["xt"], data["yt"], data["x"], data["y"])
    seconds = time.perf_counter() - start
    np.save(spec["scores"], scores.detach().numpy())
    Path(sys.argv[2]).write_text(json.dumps({"seconds": seconds, "forward_samples": seen[0]}))


if __name__ == "__main__":
    main()
