"""The questions that pyDVL is asked; runner_pydvl.py has its answers."""

import tempfile
from collections.abc import Callable
from importlib.metadata import requires
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from distinfluence import (
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    InfluenceFunctionModel,
    InverseHarmonicMeanInfluence,
    JacobiPreConditioner,
    LissaInfluence,
    NystroemSketchInfluence,
    SequentialInfluenceCalculator,
)
from distinfluence.errors import SettingError
from tests.benchmarks.truth.cases import cast
from tests.benchmarks.truth.dense import kronecker
from tests.benchmarks.truth.questions import (
    N_TEST,
    N_TRAIN,
    Defect,
    exact,
    mlp,
    mlp_damping,
    off,
    problem,
    right,
    scores_of,
    shape_of,
    sharp_damping,
)
from tests.influence.test_ekfac import bases, in_row_order
from tests.reference import Reference
from tests.zoo import Case

LAYERS = {"0": slice(0, 25), "2": slice(25, 43)}  # columns of the MLP's two layers


def _cg(mode: str = "hessian", **settings: Any) -> Callable[[Case], InfluenceFunctionModel]:
    return lambda c: CgInfluence(
        c.model, c.loss, mlp_damping(), **{"rtol": 1e-5, "atol": 0.0, **settings}, second_order_mode=mode
    )


def _direct(mode: str) -> Callable[[Case], InfluenceFunctionModel]:
    return lambda c: DirectInfluence(c.model, c.loss, mlp_damping(), second_order_mode=mode)


def _row_cg_factors() -> Tensor:
    return mlp(_cg(use_block_cg=False), 23).influence_factors(*problem("mlp").test)


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


def _scores_and_factors() -> str:
    case = problem("mlp")
    x, y = (part[:6] for part in case.test)
    made = mlp(lambda c: InverseHarmonicMeanInfluence(c.model, c.loss, mlp_damping()), 7)
    from_factors = made.influences_from_factors(made.influence_factors(x, y), *case.train)
    return off(made.influences(x, y, *case.train), from_factors.double())


def _mode_as_text() -> str:
    case, made = problem("mlp"), mlp(_direct("hessian"), 23)
    return shape_of(made.influences_from_factors(made.influence_factors(*case.test), *case.train, mode="up").shape)


def _by_block() -> dict[str, float]:
    return {"0": mlp_damping(), "2": 2 * mlp_damping()}


def _right_by_block() -> Tensor:
    made, total = exact("mlp"), torch.zeros(N_TEST, N_TRAIN, dtype=torch.float64)
    test, train = (made.gradients(data) for data in (made.case.test, made.case.train))
    for columns, damping in zip(LAYERS.values(), _by_block().values(), strict=True):
        matrix = made.matrix("hessian")[columns, columns]
        eye = torch.eye(len(matrix), dtype=torch.float64)
        total += torch.linalg.solve(matrix + damping * eye, test[:, columns].T).T @ train[:, columns].T
    return total


def _our_blocks(damping: dict[str, float]) -> Tensor:
    return scores_of(lambda c: DirectInfluence(c.model, c.loss, damping, block_structure="layer_wise"), 23)


def _unknown_block() -> str:
    try:
        _our_blocks({"nothing": mlp_damping()})
    except SettingError:
        return "refused"
    return "accepted"


def _residual(factors: Any) -> str:
    """The largest relative residual of factors of six tests."""
    made = exact("mlp")
    x, b = torch.as_tensor(np.asarray(factors)).double(), made.gradients(made.case.test)[:6]
    left = b - x @ made.matrix("hessian") - mlp_damping() * x
    return f"{float((left.norm(dim=1) / b.norm(dim=1)).max()):.0e}"


def _our_residual() -> str:
    made = mlp(_cg(use_block_cg=False, rtol=1e-3), 23)
    return _residual(made.influence_factors(*(part[:6] for part in problem("mlp").test)))


def _ekfac(name: str, damping: float) -> tuple[Case, EkfacInfluence]:
    case = problem(name)
    return case, EkfacInfluence(case.model, True, damping).fit(case.train)


def _traces(found: Any) -> str:
    """Of the two layers, over those of the exact Fisher matrix, which is the Gauss–Newton matrix here."""
    matrix = exact("mlp").matrix("ggn")
    exact_traces = [float(matrix[columns, columns].trace()) for columns in LAYERS.values()]
    return ", ".join(f"{float(mine) / true:.2f}" for mine, true in zip(found, exact_traces, strict=True))


def _our_traces() -> str:
    return _traces([basis.values.sum() for basis in bases(_ekfac("mlp", 1.0)[1])])


def _ekfac_scores(name: str) -> Defect:
    def ours() -> str:
        case, made = _ekfac(name, mlp_damping())
        dense = exact(name)
        matrix = kronecker(made, "ekfac", dense)
        matrix.diagonal().add_(mlp_damping())
        data = (dense.case.test, dense.case.train)
        test, train = (in_row_order(made, dense.gradients(part), dense) for part in data)
        return off(made.influences(*case.test, *case.train).detach(), torch.linalg.solve(matrix, test.T).T @ train.T)

    kind = "with biases" if name == "mlp" else "without biases"
    return Defect(
        f"EKFAC of linear layers {kind}: scores against those of the matrix that it has fitted",
        "error ≤ 1e-3",
        lambda a: a.said(f"ekfac, {name}", lambda v: off(v[0], torch.from_numpy(v[1]))),
        ours,
    )


def _by_layer() -> str:
    case, made = _ekfac("mlp", 1.0)
    return shape_of(next(iter(made.influences_by_block(*case.test, *case.train).values())).shape)


def _halved(samples: list[Any]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in samples]) / 2, torch.stack([y for _, y in samples])


def _lissa(name: str, **loader: Any) -> tuple[Tensor, int]:
    """The factor of a test, and the steps that it took."""
    case = problem(name)
    made = LissaInfluence(case.model, case.loss, 1.0, maxiter=2000, scale=10.0, rtol=1e-4)
    made.fit(DataLoader(TensorDataset(*case.train), batch_size=23, **loader))
    factors, report = made.influence_factors(*(part[:1] for part in case.test), return_report=True)
    return factors, int(report.iterations.max())


def _halved_factor() -> Tensor:
    case = cast(problem("mlp"), torch.float64)
    x, y = case.train
    return Reference(Case(case.model, case.loss, (x / 2, y), case.test)).factors("hessian", 1.0)[:1]


def _sketched(largest: Any) -> str:
    return f"{float(largest) / float(torch.linalg.matrix_norm(exact('mlp').matrix('hessian'), 2)):.3g}"


def _our_sketch() -> str:
    made = mlp(lambda c: NystroemSketchInfluence(c.model, c.loss, 30, mlp_damping()), 23)
    return _sketched(made.fit_report.details["full"]["eigenvalues"].max())


def _stored(found: Any) -> str:
    return f"{found.dtype}, {off(found, exact('tokens').influences('hessian', mlp_damping()))}"


def _our_stored() -> str:
    case = problem("tokens")
    made = SequentialInfluenceCalculator(DirectInfluence(case.model, case.loss, mlp_damping())).fit(*case.train)
    with tempfile.TemporaryDirectory() as folder:
        return _stored(made.to_zarr(f"{folder}/scores.zarr", *case.test, progress=False).influences[:])


def _shuffled() -> str:
    case = problem("mlp")
    made = SequentialInfluenceCalculator(DirectInfluence(case.model, case.loss, mlp_damping())).fit(*case.train)
    loader = DataLoader(TensorDataset(*case.train), batch_size=23, shuffle=True)
    return off(made.influences(*case.test, loader).compute(), exact("mlp").influences("hessian", mlp_damping()))


def _tiles() -> str:
    case = problem("mlp")
    made = SequentialInfluenceCalculator(DirectInfluence(case.model, case.loss, mlp_damping())).fit(*case.train)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(
            InfluenceFunctionModel, "solve", autospec=True, side_effect=InfluenceFunctionModel.solve
        ) as solves,
    ):
        six = (part[:6] for part in case.test)
        made.to_zarr(f"{folder}/scores.zarr", *six, chunk_size=6, test_chunk_size=3, progress=False)
    return str(solves.call_count)


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
    Defect(
        "DataInf: scores of 6 tests at once, and by way of their factors",
        "error ≤ 1e-3",
        lambda a: a.said("datainf, scores", lambda v: off(v, torch.from_numpy(a.arrays["datainf, from factors"]))),
        _scores_and_factors,
    ),
    Defect(
        'scores from factors, of 78 tests and 23 training samples, mode="up"',
        "78 × 23",
        lambda a: a.said("mode as text", shape_of),
        _mode_as_text,
    ),
    Defect(
        "a damping for each layer, as the documentation has it",
        "error ≤ 1e-3",
        lambda a: a.said("damping by block", lambda v: off(v, _right_by_block())),
        lambda: off(_our_blocks(_by_block()), _right_by_block()),
    ),
    Defect(
        "a damping for a layer that there isn't",
        "refused",
        lambda a: a.said("damping of an unknown block", lambda v: "accepted"),
        _unknown_block,
    ),
    Defect(
        "conjugate gradients, row by row, asked for a relative residual of 1e-3: what they work to",
        "1e-4 to 1e-3",
        lambda a: a.said("rtol", _residual),
        _our_residual,
    ),
    Defect(
        "EKFAC: traces of the two layers' matrices over those of the Fisher matrix",
        "1.00, 1.00",
        lambda a: a.said("ekfac trace", _traces),
        _our_traces,
    ),
    _ekfac_scores("mlp"),
    _ekfac_scores("mlp without biases"),
    Defect(
        "EKFAC: scores of a layer, of 78 tests and 23 training samples",
        "78 × 23",
        lambda a: a.said("ekfac by layer", shape_of),
        _by_layer,
    ),
    Defect(
        "LiSSA, a loader whose collate function halves the inputs",
        "error ≤ 1e-2",
        lambda a: a.said("lissa, halved", lambda v: off(v, _halved_factor())),
        lambda: off(_lissa("mlp", collate_fn=_halved)[0], _halved_factor()),
    ),
    Defect(
        "LiSSA to 1e-4 with a ReLU unit that no input reaches: steps, of 2000 at most",
        "≤ 500",
        lambda a: a.said("lissa, dead unit", lambda v: f"{int(v[0])}"),
        lambda: str(_lissa("dead unit")[1]),
    ),
    Defect(
        "a Nyström sketch of the indefinite Hessian, rank 30: its largest eigenvalue over the norm of the matrix",
        "≤ 1.01",
        lambda a: a.said("sketch", _sketched),
        _our_sketch,
    ),
    Defect(
        "token ids: scores as they are in the zarr array",
        "float32, error ≤ 1e-3",
        lambda a: a.said("token ids", _stored),
        _our_stored,
    ),
    Defect(
        "a training loader that shuffles, tests in two batches: columns of the second against those of the first",
        "error ≤ 1e-3",
        lambda a: a.said("shuffled", lambda v: off(v[3:], torch.from_numpy(v[:3]).double())),
        _shuffled,
    ),
    Defect(
        "two chunks of tests, four of training samples: how often a system is solved",
        "2",
        lambda a: a.said("tiles", lambda v: str(int(v[0]))),
        _tiles,
    ),
    Defect(
        "whether it must have a numpy below 2",
        "no",
        lambda a: a.said("numpy", lambda v: "yes" if v[0] else "no"),
        lambda: "yes" if any(s.startswith("numpy") and "<2" in s for s in requires("distinfluence") or ()) else "no",
    ),
)
