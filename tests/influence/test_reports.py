"""The words of reports, for somebody who reads them for the first time."""

import re

import pytest

from distinfluence import CgInfluence, DirectInfluence, EkfacInfluence, InfluenceFunctionModel
from tests.zoo import Case, build


def words(influence: InfluenceFunctionModel, case: Case) -> tuple[str, str]:
    influence.fit(case.train)
    return str(influence.fit_report), str(influence.influence_factors(*case.test, return_report=True)[1])


@pytest.fixture
def case() -> Case:
    return build("mlp classification")


def test_a_factorisation_has_no_iterations_to_speak_of(case: Case) -> None:
    fit, solve = words(DirectInfluence(case.model, case.loss, 0.1, second_order_mode="ggn"), case)
    assert re.fullmatch(r"6 of 6 rows converged, worst relative residual \d\.\de-\d\d", solve)
    assert " 1 pass, " in fit


def test_iterations_are_counted_in_the_singular_and_in_the_plural(case: Case) -> None:
    for limit, said in ((1, "at most 1 iteration"), (2, "at most 2 iterations")):
        influence = CgInfluence(case.model, case.loss, 0.1, rtol=1e-9, maxiter=limit, second_order_mode="ggn")
        assert words(influence, case)[1].splitlines()[0].endswith(said)


def test_residuals_that_nobody_measured_are_no_number(case: Case) -> None:
    _, solve = words(EkfacInfluence(case.model, True, 0.1, loss=case.loss), case)
    assert solve.startswith("approximate, residuals not measured for 6 rows")
    assert "nan" not in solve
