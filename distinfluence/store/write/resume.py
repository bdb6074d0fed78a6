"""Whether a run may go on with a result: same layout, model, data and settings, or a refusal that says what differs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from distinfluence.errors import FingerprintError
from distinfluence.store.format.fingerprint import to_json
from distinfluence.store.format.folder import place_of, read_attributes, require_free
from distinfluence.store.format.layout import Layout

_MISSING = object()


def check_output(path: str | os.PathLike[str], *, overwrite: bool = False, resume: bool = False) -> None:
    """Pass if a result may be begun or resumed at `path`: to be asked before anything is computed.

    Nothing is touched.

    Raises:
        ForeignStoreError: `path` holds something that distinfluence did not write.
        StoreExistsError: `path` holds a result that is neither to be overwritten nor resumed.
    """
    folder = place_of(path)
    if resume and folder.is_used():
        read_attributes(folder)
    else:
        require_free(folder, overwrite)


def check_resumable(
    path: str | os.PathLike[str],
    layout: Layout,
    fingerprints: Mapping[str, str],
    settings: Mapping[str, object] | None = None,
) -> None:
    """Pass if the result at `path` was begun with this layout, these fingerprints and these settings.

    Args:
        path: The result, or where it would be.
        layout: The layout to compare.
        fingerprints: Name → hex; must be the recorded ones, no more and no fewer.
        settings: The attributes that must agree, such as {"solver": {...}}.

    Raises:
        FingerprintError: Something differs; the message names every difference.
        StoreError: The result cannot be opened.
    """
    folder = place_of(path)
    stored = read_attributes(folder)
    differences = [
        *_differences("layout", stored.get("layout"), layout.to_attributes()),
        *_differences("fingerprints", stored.get("fingerprints", {}), to_json(fingerprints, "fingerprints")),
    ]
    for name, value in (settings or {}).items():
        differences += _differences(name, stored.get(name, _MISSING), to_json(value, name))
    if differences:
        raise FingerprintError(
            f"`path` {folder} was begun with other inputs, expected the same to resume: {'; '.join(differences)}. "
            "Resume with the inputs it began with, write to another path, or pass existing='replace' to start again."
        )


def chunks_of(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the chunk sizes that the result at `path` was begun with, for resuming it; None if there is none."""
    folder = place_of(path)
    if not folder.is_used():
        return None
    found = read_attributes(folder).get("chunks")
    return found if isinstance(found, dict) else None


def _differences(name: str, there: object, here: object) -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted({*there, *here})
        return [
            d for key in keys for d in _differences(f"{name}.{key}", there.get(key, _MISSING), here.get(key, _MISSING))
        ]
    if there == here and isinstance(there, bool) == isinstance(here, bool):
        return []
    return [f"`{name}` is {_brief(there)} there, {_brief(here)} here"]


def _brief(value: object) -> str:
    text = "not recorded" if value is _MISSING else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
