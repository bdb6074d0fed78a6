"""What released peers return for a question, what is right, and what ours returns.

Each peer is run by its own environment (tests/benchmarks/environments.py) and leaves arrays; the right answers are
dense, in float64, by plain autograd.
"""

import json
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distinfluence import (
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    InfluenceFunctionModel,
    InverseHarmonicMeanInfluence,
    JacobiPreConditioner,
)
from tests.benchmarks.environments import PEERS, python_of
from tests.benchmarks.truth import models
from tests.benchmarks.truth.cases import cast
from tests.reference import Reference
from tests.zoo import Case

HERE = Path(__file__).parent
N_TRAIN, N_TEST = 23, 78  # more tests than parameters, and batches of 7 that do not divide the training set


@dataclass(frozen=True)
class Answers:
    """What a peer returned, by case, and the errors of those cases that raised."""

    arrays: Mapping[str, Any]
    errors: Mapping[str, str]

    def said(self, name: str, show: Callable[[Any], str]) -> str:
        """The answer in words; the exception if that is what came."""
        return f"`{self.errors[name]}`" if name in self.errors else show(self.arrays[name])


def asked(peer: str, folder: Path) -> Answers | str:
    """All cases of a peer, run by its own environment; or why there are none."""
    spec, arrays, errors = (folder / f"{peer}{end}" for end in (".json", ".npz", "-errors.json"))
    names = [name for name in models.MODELS if "group" in name or name in ("circular padding", "twice")]
    content = {"models": str(HERE / "models.py"), "train": N_TRAIN, "names": names}
    spec.write_text(json.dumps({**content, "damping": mlp_damping(), "sharp": sharp_damping()}))
    try:
        command = [str(python_of(peer)), str(HERE / f"runner_{peer}.py"), *map(str, (spec, arrays, errors))]
    except subprocess.CalledProcessError:
        return "cannot be installed here"
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode:
        return f"does not run: {done.stderr.strip().splitlines()[-1][:100]}"
    return Answers(dict(np.load(arrays)), json.loads(errors.read_text()))


def problem(name: str) -> Case:
    """A model of the comparisons, in float32."""
    model, x, y = models.build(name)
    return Case(model, nn.CrossEntropyLoss(), (x[:N_TRAIN], y[:N_TRAIN]), (x[N_TRAIN:], y[N_TRAIN:]))


@cache
def exact(name: str) -> Reference:
    """Its dense references."""
    return Reference(cast(problem(name), torch.float64))


@cache
def mlp_damping() -> float:
    """Enough to make the Hessian definite, and a twentieth of its norm beyond that."""
    values = torch.linalg.eigvalsh(exact("mlp").matrix("hessian"))
    return 0.05 * float(values.abs().max()) + max(0.0, -1.1 * float(values[0]))


def off(found: Any, right: Tensor) -> str:
    """Error of an array relative to the right one, in norms; or that it isn't finite."""
    given = torch.as_tensor(np.asarray(found, dtype=np.float64))
    if not bool(torch.isfinite(given).all()):
        return "NaN"
    return f"error {float((given - right).norm() / right.norm()):.1g}"


@dataclass(frozen=True)
class Defect:
    """One row. peer's and ours: what comes out, made by running."""

    question: str
    right: str
    peers: Callable[[Answers], str]
    ours: Callable[[], str]


def mlp(make: Callable[[Case], InfluenceFunctionModel], batch: int) -> InfluenceFunctionModel:
    """One of our models, fitted on the MLP's training samples."""
    case = problem("mlp")
    x, y = case.train
    return make(case).fit([(x[i : i + batch], y[i : i + batch]) for i in range(0, len(x), batch)])


def scores_of(make: Callable[[Case], InfluenceFunctionModel], batch: int, tests: int = N_TEST) -> Tensor:
    """Ours: [tests, 23]."""
    case = problem("mlp")
    x_test, y_test = (part[:tests] for part in case.test)
    return mlp(make, batch).influences(x_test, y_test, *case.train)


def right(mode: str = "hessian", tests: int = N_TEST) -> Tensor:
    """The MLP's influences by the dense matrix."""
    return exact("mlp").influences(mode, mlp_damping())[:tests]


def _cg(mode: str = "hessian", **settings: Any) -> Callable[[Case], InfluenceFunctionModel]:
    return lambda c: CgInfluence(
        c.model, c.loss, mlp_damping(), **{"rtol": 1e-5, "atol": 0.0, **settings}, second_order_mode=mode
    )


def _direct(mode: str) -> Callable[[Case], InfluenceFunctionModel]:
    return lambda c: DirectInfluence(c.model, c.loss, mlp_damping(), second_order_mode=mode)


def _row_cg_factors() -> Tensor:
    return mlp(_cg(use_block_cg=False), 23).influence_factors(*problem("mlp").test)


def sharp_damping() -> float:
    """A thousandth of the Hessian's norm beyond what makes it definite."""
    values = torch.linalg.eigvalsh(exact("mlp").matrix("hessian"))
    return 0.001 * float(values.abs().max()) + max(0.0, -float(values[0]))


def _sharp_factor() -> Tensor:
    return exact("mlp").factors("hessian", sharp_damping())[:1]


def _block_cg_factor() -> Tensor:
    made = mlp(lambda c: CgInfluence(c.model, c.loss, sharp_damping()), 23)
    return made.influence_factors(*(part[:1] for part in problem("mlp").test))


def _harmonic(tests: int) -> Tensor:
    case = problem("mlp")
    made = mlp(lambda c: InverseHarmonicMeanInfluence(c.model, c.loss, mlp_damping()), 7)
    return made.influence_factors(*(part[:tests] for part in case.test))[:1]


def _perturbation() -> str:
    case = problem("mlp")
    x, y = (part[:5] for part in case.train)
    found = mlp(_direct("hessian"), 23).influences(*case.test, x, y, mode="perturbation")
    return off(found, exact("mlp").perturbation("hessian", mlp_damping())[:, :5])


def _ekfac_leaves() -> str:
    case = problem("mlp")
    EkfacInfluence(case.model, True, mlp_damping()).fit(case.train).influences(*case.test, *case.train)
    return f"{sum(p.grad is not None for p in case.model.parameters())} of 4"


def _ekfac_wide() -> str:
    case = cast(problem("mlp"), torch.float64)
    found = EkfacInfluence(case.model, True, mlp_damping()).fit(case.train).influences(*case.test, *case.train)
    return f"{str(found.dtype).removeprefix('torch.')}, {'finite' if bool(torch.isfinite(found).all()) else 'NaN'}"


def _preconditioned() -> str:
    few: dict[str, Any] = {"use_block_cg": False, "maxiter": 3, "rtol": 1e-10}
    plain = scores_of(_cg(**few), 23, 6)
    helped = scores_of(_cg(**few, pre_conditioner=JacobiPreConditioner(10)), 23, 6)
    return "the same" if torch.equal(plain, helped) else "another"


PYDVL = (
    Defect(
        "the Fisher matrix, all samples in one batch",
        "error ≤ 1e-3",
        lambda a: a.said("fisher, one batch", lambda v: off(v, right("empirical_fisher"))),
        lambda: off(scores_of(_direct("empirical_fisher"), 23), right("empirical_fisher")),
    ),
    Defect(
        "the Fisher matrix, batches of 7, 7, 7, 2",
        "error ≤ 1e-3",
        lambda a: a.said("fisher, four batches", lambda v: off(v, right("empirical_fisher"))),
        lambda: off(scores_of(_direct("empirical_fisher"), 7), right("empirical_fisher")),
    ),
    Defect(
        "conjugate gradients to 1e-10, batches of 7, 7, 7, 2",
        "error ≤ 1e-3",
        lambda a: a.said("cg, ragged batches", lambda v: off(v, right(tests=6))),
        lambda: off(scores_of(_cg(), 7, 6), right(tests=6)),
    ),
    Defect(
        "factors of 78 tests by conjugate gradients, row by row, 43 parameters",
        "error ≤ 1e-3",
        lambda a: a.said("row cg, many tests", lambda v: off(v, exact("mlp").factors("hessian", mlp_damping()))),
        lambda: off(_row_cg_factors(), exact("mlp").factors("hessian", mlp_damping())),
    ),
    Defect(
        "factors of one test by block conjugate gradients with its defaults, a damping of a thousandth of the norm",
        "error ≤ 1e-2",
        lambda a: a.said("block cg, one test", lambda v: off(v, _sharp_factor())),
        lambda: off(_block_cg_factor(), _sharp_factor()),
    ),
    Defect(
        "three iterations with and without a Jacobi preconditioner",
        "another result",
        lambda a: a.said(
            "with preconditioner",
            lambda v: "the same" if np.array_equal(v, a.arrays["without preconditioner"]) else "another",
        ),
        _preconditioned,
    ),
    Defect(
        "DataInf: factor of a test point alone, and with 11 others",
        "error ≤ 1e-3",
        lambda a: a.said("datainf alone", lambda v: off(a.arrays["datainf together"], torch.from_numpy(v).double())),
        lambda: off(_harmonic(12), _harmonic(1).double()),
    ),
    Defect(
        "perturbation influences of 78 tests on 5 training samples",
        "error ≤ 1e-3",
        lambda a: a.said("perturbation", lambda v: off(v, exact("mlp").perturbation("hessian", mlp_damping())[:, :5])),
        _perturbation,
    ),
    Defect(
        "EKFAC: parameters whose `.grad` is filled afterwards",
        "0 of 4",
        lambda a: a.said("gradients left", lambda v: f"{int(v[0])} of 4"),
        _ekfac_leaves,
    ),
    Defect(
        "EKFAC of a model in float64",
        "float64, finite",
        lambda a: a.said("ekfac in float64", lambda v: f"{v.dtype}, {'finite' if np.isfinite(v).all() else 'NaN'}"),
        _ekfac_wide,
    ),
)


def products(name: str) -> Tensor:
    """Dot products of gradients by plain autograd, [tests, 23]."""
    made = exact(name)
    return made.gradients(made.case.test) @ made.gradients(made.case.train).T


def our_products(name: str) -> Tensor:
    """The same, layer by layer."""
    case = problem(name)
    made = EkfacInfluence(case.model, True, 1.0).fit(case.train)
    gradients = made.loss_gradients(made.place(*case.test)).rows
    return made.influences_from_factors(gradients, *case.train)


def _product(question: str, name: str) -> Defect:
    return Defect(
        question,
        "error ≤ 1e-3",
        lambda a: a.said(name, lambda v: off(v, products(name))),
        lambda: off(our_products(name).detach(), products(name)),
    )


KRONFLUENCE = (
    _product("dot products of gradients, a convolution", "one group"),
    _product("a convolution in two groups", "two groups"),
    _product("a convolution in four groups", "four groups"),
    _product("a convolution with circular padding", "circular padding"),
    _product("a module called twice, with the flag for it", "twice"),
)


def _signless(name: str) -> Callable[[Answers], str]:
    return lambda a: a.said(name, lambda v: off(v.T, right(tests=6)))


DATTRI = tuple(
    Defect(
        f"{'conjugate gradients, 40 iterations' if method == 'cg' else 'the dense inverse'}, {kind}",
        "error ≤ 1e-3",
        _signless(f"{method}, batches of {batch}"),
        (lambda b=batch: off(scores_of(_cg(), b, 6), right(tests=6)))  # type: ignore[misc]
        if method == "cg"
        else (lambda b=batch: off(scores_of(_direct("hessian"), b, 6), right(tests=6))),  # type: ignore[misc]
    )
    for method in ("cg", "explicit")
    for batch, kind in ((23, "one batch"), (7, "batches of 7, 7, 7, 2"))
)

DEFECTS: Mapping[str, tuple[Defect, ...]] = {"pydvl": PYDVL, "kronfluence": KRONFLUENCE, "dattri": DATTRI}


def peers() -> list[str]:
    """A row for each question that was put to a peer and to us."""
    lines = ["| peer | question | right | it returns | ours |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for peer, defects in DEFECTS.items():
            found = asked(peer, Path(folder))
            label = PEERS[peer][0].replace("[influence]", "").replace("==", " ")
            for defect in defects:
                theirs = found if isinstance(found, str) else defect.peers(found)
                lines.append(f"| {label} | {defect.question} | {defect.right} | {theirs} | {defect.ours()} |")
    return [*lines, ""]
