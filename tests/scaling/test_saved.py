"""Fitted influence models written to disk and read again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr

from distinfluence import (
    ArnoldiInfluence,
    DirectInfluence,
    EkfacInfluence,
    InfluenceFunctionModel,
    NystroemSketchInfluence,
    RelativeDamping,
    load_fit,
    save_fit,
)
from distinfluence.errors import (
    FingerprintError,
    ForeignStoreError,
    NotFittedError,
    StoreExistsError,
    StoreNotFoundError,
)
from tests.layers.networks import network
from tests.zoo import Case

MAKE: dict[str, Callable[[Case], InfluenceFunctionModel]] = {
    "ekfac": lambda case: EkfacInfluence(case.model, True, RelativeDamping(0.1)),
    "direct": lambda case: DirectInfluence(case.model, case.loss, 0.1, second_order_mode="ggn"),
    "arnoldi": lambda case: ArnoldiInfluence(case.model, case.loss, 0.1, second_order_mode="ggn"),
    "nystroem": lambda case: NystroemSketchInfluence(case.model, case.loss, 8, 0.1, second_order_mode="ggn"),
}


@pytest.fixture
def case() -> Case:
    return network("conv2d, two groups")


@pytest.mark.parametrize("method", list(MAKE))
def test_a_saved_fit_scores_as_it_did_without_a_pass(case: Case, method: str, tmp_path: Path) -> None:
    influence = MAKE[method](case).fit(case.train)
    save_fit(influence, tmp_path / "fit")
    again = load_fit(MAKE[method](case), tmp_path / "fit", case.train)
    assert again.plane.passes == 0
    found, before_it = (one.influences(*case.test, *case.train) for one in (again, influence))
    torch.testing.assert_close(found, before_it, rtol=1e-9, atol=1e-11)  # matrices may be read in another layout
    report, before = again.fit_report, influence.fit_report
    assert (report.treatments, report.damping, report.remarks) == (before.treatments, before.damping, before.remarks)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "fit"]


def test_it_is_a_zarr_group_with_checksums(case: Case, tmp_path: Path) -> None:
    save_fit(MAKE["ekfac"](case).fit(case.train), tmp_path / "fit")
    group: Any = zarr.open_group(str(tmp_path / "fit"), mode="r")
    assert group.attrs["settings"]["method"] == "EkfacInfluence"
    assert not list((tmp_path / "fit").rglob("*.pkl"))


def test_what_does_not_belong_together_is_refused(case: Case, tmp_path: Path) -> None:
    influence = MAKE["ekfac"](case)
    with pytest.raises(NotFittedError):
        save_fit(influence, tmp_path / "fit")
    save_fit(influence.fit(case.train), tmp_path / "fit")
    with pytest.raises(StoreExistsError, match="exists"):
        save_fit(influence, tmp_path / "fit")
    with pytest.raises(StoreNotFoundError):
        load_fit(MAKE["ekfac"](case), tmp_path / "other", case.train)
    with pytest.raises(FingerprintError, match="update_diagonal"):
        load_fit(EkfacInfluence(case.model, False, RelativeDamping(0.1)), tmp_path / "fit", case.train)
    with pytest.raises(FingerprintError, match="samples"):
        load_fit(MAKE["ekfac"](case), tmp_path / "fit", case.test)
    other = network("conv2d, two groups", seed=1)
    with pytest.raises(FingerprintError, match="parameters"):
        load_fit(MAKE["ekfac"](other), tmp_path / "fit", other.train)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ForeignStoreError):
        load_fit(MAKE["ekfac"](case), tmp_path / "empty", case.train)
    zarr.open_group(str(tmp_path / "foreign"), mode="w")
    with pytest.raises(ForeignStoreError, match="no saved fit"):
        load_fit(MAKE["ekfac"](case), tmp_path / "foreign", case.train)
