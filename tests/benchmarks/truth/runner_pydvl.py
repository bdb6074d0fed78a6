"""What pyDVL returns, by the interpreter of its own environment: runner_pydvl.py SPEC.json OUT.npz OUT.json."""

import json
import logging
import re
import sys
import tempfile
import warnings
from importlib.machinery import SourceFileLoader
from importlib.metadata import requires
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
logging.disable(logging.ERROR)
import dask.array as da  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import zarr  # noqa: E402
from pydvl.influence import (  # type: ignore[import-not-found]  # noqa: E402
    DaskInfluenceCalculator,
    DisableClientSingleThreadCheck,
    InfluenceMode,
    SequentialInfluenceCalculator,
)
from pydvl.influence import torch as peer  # noqa: E402
from pydvl.influence.torch.operator import (  # type: ignore[import-not-found]  # noqa: E402
    DirectSolveOperator,
    LissaOperator,
)
from pydvl.influence.torch.preconditioner import JacobiPreconditioner  # type: ignore[import-not-found]  # noqa: E402
from pydvl.influence.torch.util import (  # type: ignore[import-not-found]  # noqa: E402
    BlockMode,
    NestedTorchCatAggregator,
    TorchNumpyConverter,
)
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

FISHER, HESSIAN = peer.SecondOrderMode.GAUSS_NEWTON, peer.SecondOrderMode.HESSIAN
LOSS = torch.nn.functional.cross_entropy


def halved(samples: list[Any]) -> Any:
    """A collate function that does something to the inputs."""
    return torch.stack([x for x, _ in samples]) / 2, torch.stack([y for _, y in samples])


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

    def datainf(self) -> Any:
        model, train, test = self.parts()
        return train, test, peer.InverseHarmonicMeanInfluence(model, LOSS, self.damping).fit(self.loader(train, 7))

    def few(self, factors: bool) -> Any:
        train, test, made = self.datainf()
        six = [part[:6] for part in test]
        if factors:
            return made.influences_from_factors(made.influence_factors(*six), *train)
        return made.influences(*six, *train)

    def by_text(self) -> Any:
        train, test, made = self.datainf()
        return torch.tensor(made.influences_from_factors(made.influence_factors(*test), *train, mode="up").shape)

    def by_block(self, damping: dict[str, float]) -> Any:
        model, train, test = self.parts()
        made = peer.DirectInfluence(model, LOSS, regularization=damping, block_structure=BlockMode.LAYER_WISE)
        return made.fit(self.loader(train, 23)).influences(*test, *train)

    def ekfac_of(self, name: str, damping: float) -> Any:
        model, train, test = self.parts(name)
        made = peer.EkfacInfluence(model, update_diagonal=True, hessian_regularization=damping)
        return train, [part[:6] for part in test], made.fit(self.loader(train, 23))

    def ekfac_trace(self) -> Any:
        _, _, made = self.ekfac_of("mlp", 1.0)
        return torch.stack([diagonal.sum() for _, (_, _, _, diagonal) in made.ekfac_representation])

    def ekfac_scores(self, name: str) -> Any:
        """Its scores, and those of the matrix that it has fitted, made layer by layer: [2, 6, n]."""
        train, test, made = self.ekfac_of(name, self.damping)
        total: Any = 0.0
        start = 0
        both = [made._loss_grad(*data).double() for data in (test, train)]
        for _, (_, right, left, diagonal) in made.ekfac_representation:
            o, i = left.shape[0], right.shape[0]
            inputs = i - (name == "mlp")
            v, w = (
                torch.cat([g[:, start : start + o * inputs].reshape(-1, o, inputs), b[:, :, None]], dim=2)
                if inputs < i
                else g[:, start : start + o * i].reshape(-1, o, i)
                for g in both
                for b in [g[:, start + o * inputs : start + o * i]]
            )
            v, w = (left.double().T @ part @ right.double() for part in (v, w))
            solved = v / (diagonal.double().reshape(o, i) + self.damping)
            total = total + torch.einsum("aoi,boi->ab", solved, w)
            start += o * i
        return torch.stack([made.influences(*test, *train).double(), total])

    def ekfac_by_layer(self) -> Any:
        _, train, test = self.parts()
        _, _, made = self.ekfac_of("mlp", 1.0)
        return torch.tensor(next(iter(made.influences_by_layer(*test, *train).values())).shape)

    def lissa(self, name: str, collate: Any) -> Any:
        """Factors, and how many steps they took."""
        model, train, test = self.parts(name)
        steps, step = [], LissaOperator._lissa_step
        LissaOperator._lissa_step = lambda *a: (steps.append(1), step(*a))[1]  # type: ignore[func-returns-value]
        made = peer.LissaInfluence(model, LOSS, regularization=1.0, scale=10.0, maxiter=2000, rtol=1e-4)
        loader = DataLoader(TensorDataset(*train), batch_size=23, collate_fn=collate)
        found = made.fit(loader).influence_factors(*(part[:1] for part in test))
        LissaOperator._lissa_step = step
        return torch.tensor([float(len(steps))]) if collate is None else found

    def sketch(self) -> Any:
        model, train, _ = self.parts()
        made = peer.NystroemSketchInfluence(model, LOSS, regularization=self.damping, rank=30)
        blocks = made.fit(self.loader(train, 23)).block_mapper.composable_block_dict
        return next(iter(blocks.values())).op.low_rank_representation.eigen_vals.max()

    def stored(self) -> Any:
        """Influences of token ids in float64, as they come out of a zarr array."""
        model, train, test = self.parts("tokens")
        made = peer.DirectInfluence(model, LOSS, regularization=self.damping).fit(self.loader(train, 23))
        calculator = DaskInfluenceCalculator(made, TorchNumpyConverter(), DisableClientSingleThreadCheck)
        arrays = [da.from_array(part.numpy(), chunks=-1) for part in (*test, *train)]
        with tempfile.TemporaryDirectory() as folder:
            calculator.influences(*arrays).to_zarr(f"{folder}/scores.zarr")
            return torch.from_numpy(zarr.open(f"{folder}/scores.zarr", mode="r")[:])

    def shuffled(self) -> Any:
        """The same three tests in two batches: [6, 23]."""
        model, train, (x, y) = self.parts()
        made = peer.DirectInfluence(model, LOSS, regularization=self.damping).fit(self.loader(train, 23))
        tests = DataLoader(TensorDataset(x[:3].repeat(2, 1), y[:3].repeat(2)), batch_size=3)
        loader = DataLoader(TensorDataset(*train), batch_size=23, shuffle=True)
        lazy = SequentialInfluenceCalculator(made).influences(tests, loader)
        return lazy.compute(aggregator=NestedTorchCatAggregator())

    def tiles(self) -> Any:
        """How often test factors are solved for, of two test chunks and four training chunks."""
        model, train, test = self.parts()
        made = peer.DirectInfluence(model, LOSS, regularization=self.damping).fit(self.loader(train, 23))
        calculator = DaskInfluenceCalculator(made, TorchNumpyConverter(), DisableClientSingleThreadCheck)
        solves, solve = [], DirectSolveOperator._apply_to_mat
        DirectSolveOperator._apply_to_mat = lambda *a: (solves.append(1), solve(*a))[1]  # type: ignore[func-returns-value]
        few = [da.from_array(part[:6].numpy(), chunks=(3, *part.shape[1:])) for part in test]
        many = [da.from_array(part.numpy(), chunks=(6, *part.shape[1:])) for part in train]
        calculator.influences(*few, *many).compute(scheduler="synchronous")
        DirectSolveOperator._apply_to_mat = solve
        return torch.tensor([len(solves)])

    def numpy_pin(self) -> Any:
        found = [spec for spec in requires("pyDVL") or [] if re.match(r"numpy\b", spec)]
        return torch.tensor([int("<2" in found[0])])

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
            "datainf, scores": lambda: self.few(False),
            "datainf, from factors": lambda: self.few(True),
            "mode as text": self.by_text,
            "damping by block": lambda: self.by_block({"0": self.damping, "2": 2 * self.damping}),
            "damping of an unknown block": lambda: self.by_block({"nothing": self.damping}),
            "rtol": lambda: self.factors(6, self.damping, **{**tight, "rtol": 1e-3}),
            "ekfac trace": self.ekfac_trace,
            "ekfac, mlp": lambda: self.ekfac_scores("mlp"),
            "ekfac, mlp without biases": lambda: self.ekfac_scores("mlp without biases"),
            "ekfac by layer": self.ekfac_by_layer,
            "lissa, halved": lambda: self.lissa("mlp", halved),
            "lissa, dead unit": lambda: self.lissa("dead unit", None),
            "sketch": self.sketch,
            "token ids": self.stored,
            "shuffled": self.shuffled,
            "tiles": self.tiles,
            "numpy": self.numpy_pin,
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
