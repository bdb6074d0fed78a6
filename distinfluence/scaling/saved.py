"""A fitted influence model on disk: a zarr group of its arrays, with what they belong to. Nothing is pickled."""

import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from torch import Tensor

from distinfluence.dataplane import DataPlane, LocalPlane
from distinfluence.errors import FingerprintError, ForeignStoreError, StoreError, StoreExistsError, StoreNotFoundError
from distinfluence.influence.arrays import to_numpy, to_tensor
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.report import FitReport
from distinfluence.scaling.recipe import fingerprint_module
from distinfluence.solvers.spectrum import Extremes
from distinfluence.store.fingerprint import to_json

KIND, VERSION = "distinfluence fit", 1
PLAIN = [field.name for field in fields(FitReport) if field.name not in ("details", "spectrum")]


def save_fit(influence: InfluenceFunctionModel, path: str | Path) -> Path:
    """Write a fitted influence model's state to a new folder, whole or not at all.

    Raises NotFittedError before `fit`, StoreExistsError where there is something already, StoreError for a full disk.
    """
    report, target = influence.fit_report, Path(path).expanduser()
    if target.exists():
        raise StoreExistsError(f"`path` {target} exists. Remove it or choose another.")
    arrays = {f"state/{name}": tensor for name, tensor in influence.state_arrays().items()}
    arrays |= {f"details/{b}/{name}": t for b, own in report.details.items() for name, t in own.items()}
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        group = zarr.open_group(str(partial), mode="w", zarr_format=3)
        for number, (name, tensor) in enumerate(arrays.items()):
            values = to_numpy(tensor)
            array = group.create_array(f"a{number}", shape=values.shape, dtype=values.dtype, compressors=None)
            array.attrs["name"] = name
            array[...] = values
        group.attrs.update(
            {
                "kind": KIND,
                "version": VERSION,
                "names": list(arrays),
                "parameters": fingerprint_module(influence.risk.module),
                "settings": to_json(influence.settings(), "settings"),
                "report": to_json(_plain(report), "report"),
            }
        )
        partial.rename(target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StoreError(f"`path` {target}: cannot be written ({error.strerror or error}). Free space.") from error
    return target


def load_fit(influence: InfluenceFunctionModel, path: str | Path, data: object) -> InfluenceFunctionModel:
    """The influence model, fitted as it was when `save_fit` wrote it, without the work of `fit`.

    influence: made with the same model and settings. data: the training set, as for `fit`; it is read once and checked,
    and its number of samples compared. Raises StoreNotFoundError, ForeignStoreError for a folder that is no saved fit,
    FingerprintError, saying what differs, for another model, other settings or other data.
    """
    source = Path(path).expanduser()
    if not source.exists():
        raise StoreNotFoundError(f"`path` {source} does not exist. Pass a folder that `save_fit` wrote.")
    attributes, arrays = _read(source)
    if attributes["parameters"] != fingerprint_module(influence.risk.module):
        raise FingerprintError(f"`path` {source} was fitted to other parameters than the model has. Fit again.")
    report = _report(attributes["report"], arrays)
    plane = data if isinstance(data, DataPlane) else LocalPlane(influence.risk, data)
    if plane.n_samples != report.n_samples:
        raise FingerprintError(f"`data` has {plane.n_samples} samples; {source} was fitted to {report.n_samples}.")
    state = {name.removeprefix("state/"): t for name, t in arrays.items() if name.startswith("state/")}
    device = influence.risk.device
    fitted = influence.restore(plane, {name: tensor.to(device) for name, tensor in state.items()}, report)
    own, saved = to_json(fitted.settings(), "settings"), attributes["settings"]
    if own != saved:
        both = sorted({*own, *saved}) if isinstance(own, dict) and isinstance(saved, dict) else []
        differ = [key for key in both if own.get(key) != saved.get(key)]  # type: ignore[union-attr]
        raise FingerprintError(f"`influence` differs from {source} in {differ}. Make it with the same settings.")
    return fitted


def _read(source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        group = zarr.open_group(str(source), mode="r", zarr_format=3)
        attributes = dict(group.attrs)
        if attributes.get("kind") != KIND or attributes.get("version") != VERSION:
            raise ForeignStoreError(
                f"`path` {source} is no saved fit of version {VERSION}. Pass what `save_fit` wrote."
            )
        names = attributes["names"]
        assert isinstance(names, list)
        found = {}
        for number, name in enumerate(names):
            array = group[f"a{number}"]
            assert isinstance(array, zarr.Array)
            found[str(name)] = to_tensor(np.asarray(array[...]))
    except (FileNotFoundError, KeyError, zarr.errors.GroupNotFoundError) as error:
        if isinstance(error, ForeignStoreError):
            raise
        raise ForeignStoreError(f"`path` {source} is no saved fit: {error}. Pass what `save_fit` wrote.") from error
    return attributes, found


def _plain(report: FitReport) -> dict[str, object]:
    values = {name: getattr(report, name) for name in PLAIN}
    return values | {"spectrum": {block: asdict(extremes) for block, extremes in report.spectrum.items()}}


def _report(raw: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> FitReport:
    details: dict[str, dict[str, Tensor]] = {}
    for name, tensor in arrays.items():
        if name.startswith("details/"):
            block, _, own = name.removeprefix("details/").rpartition("/")
            details.setdefault(block, {})[own] = tensor
    plain = {name: raw[name] for name in PLAIN}
    plain |= {"uncovered": tuple(raw["uncovered"]), "remarks": tuple(raw["remarks"])}
    spectrum = {block: Extremes(**values) for block, values in raw["spectrum"].items()}
    return FitReport(**plain, details=details, spectrum=spectrum)
