"""The choice of a method is made once: a fit keeps it, plans follow it, and a run goes on with no other."""

from pathlib import Path

import pytest

from distinfluence import AutoInfluence, SequentialInfluenceCalculator
from distinfluence.errors import FingerprintError
from distinfluence.solvers import auto
from tests.zoo import Case, build

PLENTY, LITTLE = 10**10, 60_000


@pytest.fixture
def case() -> Case:
    return build("mlp classification")


def influence(case: Case) -> AutoInfluence:
    return AutoInfluence(case.model, case.loss, 0.1, rows=4)


def test_a_fit_keeps_what_it_chose_whatever_memory_is_free_later(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "free_bytes", lambda device: PLENTY)
    model = influence(case)
    asked = model.settings()
    model.fit(case.train)
    assert model.settings() == asked | {"chosen": {"full": "Direct"}}
    assert model.asked_settings() == asked
    demand = model.demand()
    monkeypatch.setattr(auto, "free_bytes", lambda device: LITTLE)
    assert model.demand() == demand
    assert influence(case).demand() != demand
    other = influence(case).fit(case.train)
    assert other.settings() != model.settings()


def test_a_run_goes_on_with_the_method_that_it_began_with(
    case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "i.zarr"
    monkeypatch.setattr(auto, "free_bytes", lambda device: PLENTY)
    SequentialInfluenceCalculator(influence(case)).fit(*case.train).to_zarr(path, *case.test, progress=False)
    again = SequentialInfluenceCalculator(influence(case)).fit(*case.train)
    again.to_zarr(path, *case.test, existing="resume", progress=False)
    monkeypatch.setattr(auto, "free_bytes", lambda device: LITTLE)
    other = SequentialInfluenceCalculator(influence(case)).fit(*case.train)
    with pytest.raises(FingerprintError, match="chosen.full` is .Direct. there"):
        other.to_zarr(path, *case.test, existing="resume", progress=False)
