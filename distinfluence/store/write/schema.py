"""How a result begins: its attributes and its arrays, empty."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from distinfluence.errors import SettingError
from distinfluence.store.format.fingerprint import to_json
from distinfluence.store.format.folder import FORMAT, FORMAT_VERSION, RUNNING, Location
from distinfluence.store.format.layout import FLOAT32_BITS, ArraySpec, Layout, array_specs

SIGN_CONVENTION = (
    "positive: the training point helps (without it the test measurement rises by about influence / n_train); "
    "negative: it harms"
)
_RESERVED = frozenset(
    {"quarantined", "format", "format_version", "state", "layout", "sign_convention", "created", "summary"}
)


def stored_attributes(layout: Layout, attributes: Mapping[str, object]) -> dict[str, Any]:
    """Return all attributes of a new result.

    Raises:
        SettingError: An attribute is not valid JSON, or has a name that the store uses itself.
    """
    taken = sorted(_RESERVED & set(attributes))
    if taken:
        raise SettingError(f"`attributes` must not use the store's own names, got {', '.join(taken)}. Rename them.")
    plain = to_json(attributes, "attributes")
    assert isinstance(plain, dict)
    own: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "state": RUNNING,
        "layout": layout.to_attributes(),
        "sign_convention": SIGN_CONVENTION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return {**own, **plain}


def build(folder: Location, layout: Layout, attributes: dict[str, Any]) -> None:
    """Create an empty result at `folder`, which must not exist."""
    group = zarr.open_group(folder.writable_store(), mode="w-", zarr_format=3, attributes=attributes)
    if layout.ranked:
        group.create_group("strips")
    if layout.levels:
        group.create_group("overview")
    for spec in array_specs(layout):
        create_array(group, spec, layout)


def create_array(group: zarr.Group, spec: ArraySpec, layout: Layout) -> zarr.Array[Any]:
    """Create one array of a result, without a chunk yet."""
    # All-fill chunks are not stored, which loses nothing: influences are finite, their fill is NaN.
    return group.create_array(
        spec.name,
        shape=spec.shape,
        chunks=spec.chunks,
        shards=spec.shards,
        dtype=spec.dtype,
        fill_value=spec.fill,
        compressors=_codecs(spec.name, layout),
        dimension_names=spec.dims,
    )


def _codecs(name: str, layout: Layout) -> list[Any]:
    """Return checksums, and compression where rounding makes it worth its time."""
    if name == "influences" and layout.mantissa_bits < FLOAT32_BITS:
        return [BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"), Crc32cCodec()]
    return [Crc32cCodec()]
