"""A fitted influence model on disk: a zarr group of its arrays, with what they belong to. Nothing is pickled.

Every chunk is stored, also one of zeros, with a checksum, and on the disk before the folder has its name: what is
missing or other than it was written is found when it is read.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from torch import Tensor
from zarr.codecs import Crc32cCodec

from distinfluence.atomic import appearing
from distinfluence.errors import (
    CorruptStoreError,
    FingerprintError,
    ForeignStoreError,
    StoreExistsError,
    StoreNotFoundError,
)
from distinfluence.influence.arrays import to_numpy, to_tensor
from distinfluence.influence.base import InfluenceFunctionModel
from distinfluence.influence.report import FitReport
from distinfluence.model.identity.probe import Probe
from distinfluence.model.identity.structure import structure
from distinfluence.model.reducer import ChunkReducer
from distinfluence.scaling.data.recipe import fingerprint_module
from distinfluence.solvers.spectrum import Extremes
from distinfluence.store.format.fingerprint import combine, fingerprint_settings, to_json
from distinfluence.store.format.folder import surfaced_errors

KIND, VERSION = "distinfluence fit", 4
DIFFERENT = {
    "parameters": "other parameters than the model has",
    "structure": "another forward",
    "settings": "other settings",
    "objective": "another objective",
    "data": "other data",
}
PLAIN = [field.name for field in fields(FitReport) if field.name not in ("details", "spectrum")]


def fit_name(influence: InfluenceFunctionModel, reducer: ChunkReducer, sha256: str, certify: bool) -> str:
    """Return the name of a fit's folder in a scratch folder: the same for the same model, settings and chunks.

    Args:
        influence: The influence model.
        reducer: The data in chunks.
        sha256: Fingerprint of the chunks.
        certify: Whether the fit finds the ends of the spectrum.
    """
    asked: dict[str, object] = {"solver": influence.asked_settings(), "certify": certify, "format": VERSION}
    asked |= {"objective": influence.objective_settings, "chunks": list(reducer.chunk_sizes)}
    asked |= {"structure": structure(influence.risk.module)}
    parameters = fingerprint_module(influence.risk.module)
    key = combine({"parameters": parameters, "data": sha256, "settings": fingerprint_settings(asked)})
    return f"fit-{key[:16]}"


def save_fit(influence: InfluenceFunctionModel, path: str | Path) -> Path:
    """Write a fitted influence model's state to a new folder, whole or not at all.

    Args:
        influence: A fitted influence model.
        path: The folder to make.

    Returns:
        The folder.

    Raises:
        NotFittedError: Before `fit`.
        StoreExistsError: If there is something at `path` already.
        DiskFullError: If there is not enough space.
    """
    report, target = influence.fit_report, Path(path).expanduser()
    if target.exists():
        raise StoreExistsError(f"`path` {target} exists. Remove it or choose another.")
    arrays = {f"state/{name}": tensor for name, tensor in influence.state_arrays().items()}
    arrays |= {f"details/{b}/{name}": t for b, own in report.details.items() for name, t in own.items()}
    belongs = {
        "kind": KIND,
        "version": VERSION,
        "names": list(arrays),
        **_belongs(influence, influence.reducer),
        "report": to_json(_plain(report), "report"),
    }
    with surfaced_errors("write a fit to", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with appearing(target, sync=True) as partial:
            _write(partial, arrays, belongs)
    return target


def _write(folder: Path, arrays: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> None:
    group = zarr.open_group(str(folder), mode="w", zarr_format=3)
    for number, (name, tensor) in enumerate(arrays.items()):
        values = to_numpy(tensor)
        with zarr.config.set({"array.write_empty_chunks": True}):  # else a lost chunk would read as zeros
            array = group.create_array(
                f"a{number}",
                shape=values.shape,
                dtype=values.dtype,
                compressors=[Crc32cCodec()],
                attributes={"name": name},
            )
            array[...] = values
    group.attrs.update(attributes)


def _belongs(influence: InfluenceFunctionModel, reducer: ChunkReducer) -> dict[str, Any]:
    """Return what fixes a fit, by what to call it when it differs."""
    return {
        "parameters": fingerprint_module(influence.risk.module),
        "structure": dict(structure(influence.risk.module)),
        "settings": to_json(influence.asked_settings(), "settings"),
        "objective": to_json(influence.objective_settings, "objective"),
        "data": reducer.digest,
        "probe": None if reducer.checked is None else reducer.checked.probe.to_json(),
    }


def load_fit(influence: InfluenceFunctionModel, path: str | Path, data: object) -> InfluenceFunctionModel:
    """Restore a fit that `save_fit` wrote, without the work of `fit`.

    Model, objective, settings and data are compared before anything is restored, also by what the model computes for
    some samples.

    Args:
        influence: An influence model made with the same model, objective and settings.
        path: The folder that `save_fit` wrote.
        data: The training set, as for `fit`, in any order.

    Returns:
        The influence model, fitted.

    Raises:
        StoreNotFoundError: If `path` does not exist.
        ForeignStoreError: If `path` is not a saved fit.
        CorruptStoreError: If its bytes are not those that were written.
        FingerprintError: If model, objective, settings or data differ. The message says which.
        DistinfluenceError: What the checks of `fit` raise.
    """
    source = Path(path).expanduser()
    if not source.exists():
        raise StoreNotFoundError(f"`path` {source} does not exist. Pass a folder that `save_fit` wrote.")
    with surfaced_errors("read the fit", source):
        attributes, arrays = _read(source)
    reducer = influence.reducer_of(data)
    if reducer.drawn and reducer.checked is None:
        reducer.checked = influence.check(reducer.drawn)
    _require_same(source, attributes, _belongs(influence, reducer))
    report = _report(attributes["report"], arrays)
    state = {name.removeprefix("state/"): t for name, t in arrays.items() if name.startswith("state/")}
    device = influence.risk.device
    return influence.restore(reducer, {name: tensor.to(device) for name, tensor in state.items()}, report)


def _require_same(source: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise FingerprintError naming all that differs."""
    differ = []
    for name, words in DIFFERENT.items():
        if there[name] == here[name]:
            continue
        both = isinstance(there[name], dict) and isinstance(here[name], dict)
        if name == "data":
            words += f", {here[name].rpartition('-')[2]} samples in place of {there[name].rpartition('-')[2]}"
        keys = [k for k in {**there[name], **here[name]} if there[name].get(k) != here[name].get(k)] if both else []
        differ.append(f"{words} ({', '.join(repr(key) for key in keys[:5])})" if keys else words)
    if there["probe"] and here["probe"] and not differ:
        differ += Probe.from_json(here["probe"]).differences(Probe.from_json(there["probe"]))
    if differ:
        raise FingerprintError(
            f"`path` {source} holds a fit of another model, objective, data or settings: {'; '.join(differ)}. Load it "
            "with those that it was made with, or fit again."
        )


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
            if array.nchunks_initialized < array.nchunks:
                raise CorruptStoreError(f"`path` {source} is damaged: chunks of {name!r} are gone. Fit again.")
            found[str(name)] = to_tensor(np.asarray(array[...]))
    except (ForeignStoreError, CorruptStoreError):
        raise
    except (FileNotFoundError, KeyError, zarr.errors.GroupNotFoundError) as error:
        raise ForeignStoreError(f"`path` {source} is no saved fit: {error}. Pass what `save_fit` wrote.") from error
    except (ValueError, TypeError, AssertionError) as error:
        raise CorruptStoreError(f"`path` {source} is damaged: {error}. Remove it and fit again.") from error
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
