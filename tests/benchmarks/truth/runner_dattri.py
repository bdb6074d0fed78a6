"""What dattri returns, by the interpreter of its own environment: runner_dattri.py SPEC.json OUT.npz OUT.json."""

import json
import sys
import warnings
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
import numpy as np  # noqa: E402
import torch  # noqa: E402
from dattri.algorithm.influence_function import (  # type: ignore[import-not-found]  # noqa: E402
    IFAttributorArnoldi,
    IFAttributorCG,
    IFAttributorEKFAC,
    IFAttributorExplicit,
)
from dattri.task import AttributionTask  # type: ignore[import-not-found]  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

CASES = (
    *((method, batch, "mlp") for method in ("cg", "explicit") for batch in (23, 7)),
    ("arnoldi", 23, "mlp"),
    ("ekfac", 1, "mlp"),
)


def scores(models: Any, spec: dict[str, Any], batch: int, method: str, name: str) -> Any:
    """[n_train, n_test] by dattri's own sign."""
    torch.manual_seed(0)
    model, x, y = models.build(name)
    n = spec["train"]

    def loss(parameters: Any, sample: Any) -> Any:
        x, y = sample
        single = x.dim() == 1
        out = torch.func.functional_call(model, parameters, (x[None] if single else x,))
        return torch.nn.functional.cross_entropy(out, y.reshape(-1).long())

    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    damping = spec["damping"]
    made = {
        "cg": lambda: IFAttributorCG(task, max_iter=40, tol=1e-4, regularization=damping),
        "explicit": lambda: IFAttributorExplicit(task, regularization=damping),
        "arnoldi": lambda: IFAttributorArnoldi(task, proj_dim=43, max_iter=43, regularization=damping),
        "ekfac": lambda: IFAttributorEKFAC(task, damping=damping),
    }[method]()
    train = DataLoader(TensorDataset(x[:n], y[:n]), batch_size=batch, shuffle=False)
    tests = DataLoader(TensorDataset(x[n : n + 6], y[n : n + 6]), batch_size=6, shuffle=False)
    made.cache(train)
    return made.attribute(train, tests)


def main() -> None:
    """Every case; one that raises leaves its error."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    models = SourceFileLoader("models", spec["models"]).load_module()
    found, errors = {}, {}
    for method, batch, name in CASES:
        case = f"{method}, {name}, batches of {batch}"
        try:
            found[case] = np.asarray(scores(models, spec, batch, method, name).detach())
        except Exception as error:
            first = str(error).strip().splitlines()[0][:80] if str(error) else ""
            errors[case] = f"{type(error).__name__}: {first}"
    np.savez(sys.argv[2], **found)
    Path(sys.argv[3]).write_text(json.dumps(errors))


if __name__ == "__main__":
    main()
