"""The questions that kronfluence and dattri are asked; their runners have the answers."""

from collections.abc import Callable

import torch
from torch import Tensor

from distinfluence import ArnoldiInfluence, CgInfluence, DirectInfluence, EkfacInfluence
from tests.benchmarks.truth.dense import kronecker
from tests.benchmarks.truth.questions import Answers, Defect, exact, mlp_damping, off, problem, right, scores_of
from tests.influence.test_ekfac import in_row_order


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


def _by_module() -> Tensor:
    case = problem("mlp")
    made = EkfacInfluence(case.model, True, 1.0).fit(case.train)
    rows = made.loss_gradients(made.place(*case.test)).rows
    factors = {block: rows[:, columns] for block, columns in made.risk.blocks.columns.items()}
    by_block = made.influences_from_factors_by_block(factors, *case.train)
    return torch.stack(list(by_block.values())).sum(dim=0).detach()


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
    _product("an embedding, a layer norm and a linear layer", "tokens"),
    Defect(
        "scores by module, summed, with a hook for gradients that leaves them as they are; 16 samples in batches of 8",
        "error ≤ 1e-3",
        lambda a: a.said("by module", lambda v: off(v, products("mlp")[:64, :16])),
        lambda: off(_by_module(), products("mlp")),
    ),
)


def _signless(name: str) -> Callable[[Answers], str]:
    return lambda a: a.said(name, lambda v: off(v.T, right(tests=6)))


def _case(method: str, batch: int) -> str:
    return f"{method}, mlp, batches of {batch}"


def _dattri(question: str, method: str, batch: int, ours: Callable[[], Tensor]) -> Defect:
    return Defect(question, "error ≤ 1e-3", _signless(_case(method, batch)), lambda: off(ours(), right(tests=6)))


def _cg(batch: int) -> Tensor:
    return scores_of(lambda c: CgInfluence(c.model, c.loss, mlp_damping(), rtol=1e-5, atol=0.0), batch, 6)


def _direct(batch: int) -> Tensor:
    return scores_of(lambda c: DirectInfluence(c.model, c.loss, mlp_damping()), batch, 6)


def _arnoldi() -> Tensor:
    return scores_of(lambda c: ArnoldiInfluence(c.model, c.loss, mlp_damping(), 43, complement=True), 23, 6)


def _ekfac() -> tuple[Tensor, Tensor]:
    """Ours, and that of Q Λ Qᵀ with Λ the diagonal of the empirical Fisher matrix in EKFAC's eigenvectors."""
    case, dense = problem("mlp"), exact("mlp")
    made = EkfacInfluence(case.model, True, mlp_damping(), fisher="empirical").fit(case.train)
    matrix = kronecker(made, "ekfac, empirical", dense)
    matrix.diagonal().add_(mlp_damping())
    test, train = (in_row_order(made, dense.gradients(data), dense) for data in (dense.case.test, dense.case.train))
    return made.influences(*case.test, *case.train)[:6].detach(), (torch.linalg.solve(matrix, test.T).T @ train.T)[:6]


RAGGED = "batches of 7, 7, 7, 2"
DATTRI = (
    _dattri("conjugate gradients, 40 iterations, one batch", "cg", 23, lambda: _cg(23)),
    _dattri(f"conjugate gradients, 40 iterations, {RAGGED}", "cg", 7, lambda: _cg(7)),
    _dattri("the dense inverse, one batch", "explicit", 23, lambda: _direct(23)),
    _dattri(f"the dense inverse, {RAGGED}", "explicit", 7, lambda: _direct(7)),
    _dattri("Arnoldi with as many vectors as there are parameters", "arnoldi", 23, _arnoldi),
    Defect(
        "EKFAC of the empirical Fisher matrix, one sample a batch",
        "error ≤ 1e-3",
        lambda a: a.said(_case("ekfac", 1), lambda v: off(v.T, _ekfac()[1])),
        lambda: off(*_ekfac()),
    ),
)
