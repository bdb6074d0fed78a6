import hashlib
import tracemalloc
from typing import Any

import numpy as np
import pytest

from distinfluence.errors import DtypeError, SettingError
from distinfluence.store.format.fingerprint import combine, fingerprint_array, fingerprint_arrays, fingerprint_settings

BASE = np.arange(12, dtype=np.float32).reshape(3, 4)


def test_the_fingerprint_is_sha256_of_a_header_and_the_bytes() -> None:
    expected = hashlib.sha256(b'["array","<f4",[3,4]]' + BASE.tobytes()).hexdigest()
    assert fingerprint_array(BASE) == expected


@pytest.mark.parametrize(
    "same",
    [np.asfortranarray(BASE), BASE.astype(">f4"), np.repeat(BASE, 2, axis=1)[:, ::2], BASE[::-1][::-1].copy()],
    ids=["fortran", "big endian", "strided", "copy"],
)
def test_memory_layout_and_byte_order_do_not_matter(same: Any) -> None:
    assert fingerprint_array(same) == fingerprint_array(BASE)


@pytest.mark.parametrize(
    "other",
    [BASE.astype(np.float64), BASE.view(np.int32), BASE.reshape(4, 3), BASE + 1, BASE.T, BASE[:2]],
    ids=["dtype", "same bytes", "shape", "values", "transposed", "shorter"],
)
def test_dtype_shape_and_values_matter(other: Any) -> None:
    assert fingerprint_array(other) != fingerprint_array(BASE)


def test_large_strided_arrays_are_hashed_in_pieces() -> None:
    large = np.random.default_rng(0).standard_normal((2000, 1001))
    tracemalloc.start()
    strided = fingerprint_array(large[:, :1000])
    contiguous = fingerprint_array(large)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert strided == fingerprint_array(large[:, :1000].copy()) != contiguous
    assert peak < 4 * 2**20 < large.nbytes


def test_empty_scalar_and_string_arrays_have_fingerprints() -> None:
    arrays = [np.empty((0, 3)), np.float32(2), np.array(["a", "b"]), np.array([True]), np.empty((3, 0))[::2]]
    assert len({fingerprint_array(a) for a in arrays}) == len(arrays)


def test_objects_are_refused_rather_than_pickled() -> None:
    with pytest.raises(DtypeError, match="`array` must hold numbers.*got dtype object"):
        fingerprint_array(np.array([{}], dtype=object))


def test_names_matter_and_their_order_does_not() -> None:
    a, b = np.zeros(2), np.ones(2)
    assert fingerprint_arrays({"a": a, "b": b}) == fingerprint_arrays({"b": b, "a": a})
    assert fingerprint_arrays({"a": a, "b": b}) != fingerprint_arrays({"a": b, "b": a})
    assert combine({"x": "1", "y": "2"}) == combine({"y": "2", "x": "1"}) != combine({"x": "12", "y": ""})


def test_equal_settings_have_equal_fingerprints() -> None:
    settings = {"damping": 0.1, "blocks": ("a", "b"), "n": 3}
    assert fingerprint_settings(settings) == fingerprint_settings(
        {"n": np.int64(3), "blocks": ["a", "b"], "damping": 0.1}
    )
    assert fingerprint_settings(settings) != fingerprint_settings({**settings, "damping": 0.2})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"a": {"b": object()}}, r"a\.b` must be made of JSON values, got object"),
        ({"tol": float("nan")}, r"tol` must be finite"),
        ({1: 2}, "strings as keys, got 1"),
        ({"a": [1, {2}]}, r"a\[1\]` must be made of JSON"),
    ],
)
def test_settings_that_are_no_json_are_refused_by_name(settings: Any, message: Any) -> None:
    with pytest.raises(SettingError, match=message):
        fingerprint_settings(settings)
