"""One measurement of curvlinops; run by the interpreter of its own environment: runner_curvlinops.py SPEC OUT."""

import json
import sys
import time
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
import numpy as np  # noqa: E402
import torch  # noqa: E402
from curvlinops import (  # noqa: E402
    CGInverseLinearOperator,
    EFLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
)
from torch.func import functional_call, grad, vmap  # noqa: E402

OPERATORS = {
    "hessian": HessianLinearOperator,
    "ggn": GGNLinearOperator,
    "empirical_fisher": EFLinearOperator,
}


def main() -> None:
    """Solve for the test gradients, multiply with the training gradients; the time of both, and the scores."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(spec["threads"])
    data = torch.load(spec["data"], weights_only=True)
    from importlib.machinery import SourceFileLoader

    net = SourceFileLoader("models", spec["models"]).load_module().build(spec["model"])
    net.load_state_dict(data["state"])
    net.eval()
    parameters = [p for p in net.parameters() if p.requires_grad]
    names = {name: p.detach() for name, p in net.named_parameters()}
    loss = torch.nn.CrossEntropyLoss()
    batches = [
        (data["x"][i : i + spec["batch"]], data["y"][i : i + spec["batch"]]) for i in range(0, 1500, spec["batch"])
    ]

    def gradients(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        def of_one(p: dict[str, torch.Tensor], a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            value: torch.Tensor = loss(functional_call(net, p, (a[None],)), b[None])
            return value

        parts = vmap(grad(of_one), in_dims=(None, 0, 0))(names, x, y)
        return torch.cat([part.flatten(1) for part in parts.values()], dim=1)

    def once() -> torch.Tensor:
        operator = OPERATORS[spec["matrix"]](net, loss, parameters, batches, check_deterministic=False)
        damped = operator + spec["damping"] * torch_identity(operator)
        inverse = CGInverseLinearOperator(damped, eps=0, tolerance=spec["rtol"], max_iter=spec.get("maxiter", 1000))
        factors = inverse @ gradients(data["xt"], data["yt"]).T
        scores: torch.Tensor = factors.T @ gradients(data["x"], data["y"]).T
        return scores

    def torch_identity(operator: object) -> object:
        from curvlinops.examples import IdentityLinearOperator

        return IdentityLinearOperator([p.shape for p in parameters], parameters[0].device, parameters[0].dtype)

    gradients(data["x"][:4], data["y"][:4])
    start = time.perf_counter()
    scores = once()
    seconds = time.perf_counter() - start
    np.save(spec["scores"], scores.detach().numpy())
    Path(sys.argv[2]).write_text(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
