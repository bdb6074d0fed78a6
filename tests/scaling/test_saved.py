"""Fitted influence models written to disk and read again."""

import os
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
    CorruptStoreError,
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
    assert again.reducer.passes == 0
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


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a flipped bit": lambda fit: flip(largest(fit)),
    "a torn file": lambda fit: os.truncate(largest(fit), 3),
    "an empty file": lambda fit: os.truncate(largest(fit), 0),
    "a lost chunk": lambda fit: largest(fit).unlink(),
    "torn metadata": lambda fit: os.truncate(fit / "a0" / "zarr.json", 20),
    "empty attributes": lambda fit: os.truncate(fit / "zarr.json", 0),
}


def largest(fit: Path) -> Path:
    """The largest chunk: `c`, `c/0`, `c/0/0`, …"""
    chunks = [file for file in fit.rglob("*") if file.is_file() and "c" in file.relative_to(fit).parts]
    return max(chunks, key=lambda file: file.stat().st_size)


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_fit_is_found_and_not_taken(case: Case, damage: str, tmp_path: Path) -> None:
    save_fit(MAKE["direct"](case).fit(case.train), tmp_path / "fit")
    DAMAGES[damage](tmp_path / "fit")
    with pytest.raises(CorruptStoreError):
        load_fit(MAKE["direct"](case), tmp_path / "fit", case.train)


def test_a_fit_of_zeros_is_whole(case: Case, tmp_path: Path) -> None:
    influence = MAKE["direct"](case).fit(case.train)
    for tensor in influence.state_arrays().values():
        tensor.zero_()
    save_fit(influence, tmp_path / "fit")
    loaded = load_fit(MAKE["direct"](case), tmp_path / "fit", case.train).state_arrays()
    assert loaded.keys() == influence.state_arrays().keys()
    assert not any(tensor.any() for tensor in loaded.values())


def test_a_fit_is_on_the_disk_before_it_has_its_name(case: Case, tmp_path: Path, monkeypatch: Any) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("distinfluence.atomic.sync_to_disk", synced.extend)
    save_fit(MAKE["direct"](case).fit(case.train), tmp_path / "fit")
    assert synced.pop() == tmp_path / "fit"
    written = {file.relative_to(tmp_path / "fit").parts for file in (tmp_path / "fit").rglob("*") if file.is_file()}
    assert {file.relative_to(tmp_path).parts[1:] for file in synced} == written
