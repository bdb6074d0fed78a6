"""What pyDVL returns, by the interpreter of its own environment: runner_pydvl.py SPEC.json OUT.npz OUT.json."""

import json
import sys
import warnings
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
import numpy as np  # noqa: E402
import torch  # noqa: E402
from pydvl.influence import InfluenceMode  # type: ignore[import-not-found]  # noqa: E402
from pydvl.influence import torch as peer  # noqa: E402
from pydvl.influence.torch.preconditioner import JacobiPreconditioner  # type: ignore[import-not-found]  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

FISHER, HESSIAN = peer.SecondOrderMode.GAUSS_NEWTON, peer.SecondOrderMode.HESSIAN
LOSS = torch.nn.functional.cross_entropy


class Runs:
    """The cases, by name; each returns an array."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.models = SourceFileLoader("models", spec["models"]).load_module()
        self.spec, self.damping, self.n = spec, spec["damping"], spec["train"]

    def parts(self, name: str = "mlp") -> Any:
        model, x, y = self.models.build(name)
        return model, (x[: self.n], y[: self.n]), (x[self.n :], y[self.n :])

    def loader(self, train: Any, batch: int) -> Any:
        return DataLoader(TensorDataset(*train), batch_size=batch)

    def direct(self, batch: int, mode: Any) -> Any:
        model, train, test = self.parts()
        made = peer.DirectInfluence(model, LOSS, regularization=self.damping, second_order_mode=mode)
        return made.fit(self.loader(train, batch)).influences(*test, *train)

    def cg(self, batch: int, mode: Any, tests: int | None = None, **settings: Any) -> Any:
        model, train, test = self.parts()
        made = peer.CgInfluence(model, LOSS, regularization=self.damping, second_order_mode=mode, **settings)
        few = [part[:tests] for part in test]
        return made.fit(self.loader(train, batch)).influences(*few, *train)

    def factors(self, tests: int, damping: float, **settings: Any) -> Any:
        model, train, test = self.parts()
        made = peer.CgInfluence(model, LOSS, regularization=damping, **settings)
        return made.fit(self.loader(train, 23)).influence_factors(*(part[:tests] for part in test))

    def harmonic(self, tests: int) -> Any:
        model, train, test = self.parts()
        made = peer.InverseHarmonicMeanInfluence(model, LOSS, regularization=self.damping)
        return made.fit(self.loader(train, 7)).influence_factors(*(part[:tests] for part in test))[:1]

    def perturbation(self) -> Any:
        model, train, test = self.parts()
        made = peer.DirectInfluence(model, LOSS, regularization=self.damping).fit(self.loader(train, 23))
        return made.influences(*test, *(part[:5] for part in train), mode=InfluenceMode.Perturbation)

    def ekfac(self, dtype: Any) -> Any:
        model, train, test = self.parts()
        model = model.to(dtype)
        (x, y), (xt, yt) = ((part[0].to(dtype), part[1]) for part in (train, test))
        made = peer.EkfacInfluence(model, update_diagonal=True, hessian_regularization=self.damping)
        scores = made.fit(self.loader((x, y), 23)).influences(xt, yt, x, y)
        left = sum(p.grad is not None for p in model.parameters())
        return torch.tensor([float(left)]) if dtype is torch.float32 else scores

    def cases(self) -> dict[str, Any]:
        tight = {"rtol": 1e-10, "atol": 0.0, "maxiter": 500, "solve_simultaneously": False}
        few = {"solve_simultaneously": False, "maxiter": 3, "rtol": 1e-10, "atol": 0.0}
        return {
            "fisher, one batch": lambda: self.direct(23, FISHER),
            "fisher, four batches": lambda: self.direct(7, FISHER),
            "cg, ragged batches": lambda: self.cg(7, HESSIAN, 6, **tight),
            "row cg, many tests": lambda: self.factors(78, self.damping, **tight),
            "block cg, one test": lambda: self.factors(1, self.spec["sharp"], solve_simultaneously=True),
            "without preconditioner": lambda: self.cg(23, HESSIAN, 6, **few),
            "with preconditioner": lambda: self.cg(
                23, HESSIAN, 6, **few, preconditioner=JacobiPreconditioner(num_samples_estimator=10)
            ),
            "datainf alone": lambda: self.harmonic(1),
            "datainf together": lambda: self.harmonic(12),
            "perturbation": self.perturbation,
            "gradients left": lambda: self.ekfac(torch.float32),
            "ekfac in float64": lambda: self.ekfac(torch.float64),
        }


def main() -> None:
    """Every case; one that raises leaves its error."""
    found, errors = {}, {}
    for name, case in Runs(json.loads(Path(sys.argv[1]).read_text())).cases().items():
        try:
            found[name] = np.asarray(case().detach())
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80] if str(error) else ''}"
    np.savez(sys.argv[2], **found)
    Path(sys.argv[3]).write_text(json.dumps(errors))


if __name__ == "__main__":
    main()
