"""A question that is put to a released peer and to us: what the peer returned, what is right, what ours returns.

Each peer is run by its own environment (tests/benchmarks/environments.py) and leaves arrays; the right answers are
dense, in float64, by plain autograd.
"""

import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distinfluence import InfluenceFunctionModel
from tests.benchmarks.environments import python_of
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
    names = [name for name in models.MODELS if "group" in name or name in ("circular padding", "twice", "tokens")]
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


def sharp_damping() -> float:
    """A thousandth of the Hessian's norm beyond what makes it definite."""
    values = torch.linalg.eigvalsh(exact("mlp").matrix("hessian"))
    return 0.001 * float(values.abs().max()) + max(0.0, -float(values[0]))


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


def shape_of(found: Any) -> str:
    """Numbers of an array's shape, or of an array that is one."""
    return " × ".join(str(int(size)) for size in found)


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
