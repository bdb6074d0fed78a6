"""Which values a writer takes, and which it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distinfluence.errors import DtypeError, IndexRangeError, NonFiniteError, SettingError, ShapeError
from distinfluence.store import InfluenceWriter, Layout, open_influences

from .conftest import matrix


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_a_strip_that_is_not_finite_is_refused_and_stays_unmarked(tmp_path: Path, layout: Any, bad: Any) -> None:
    writer = InfluenceWriter.create(tmp_path / "r", layout, {})
    values = matrix(layout).astype(np.float64)[:, 8:16]
    values[3, 2] = bad
    with pytest.raises(NonFiniteError, match=r"values of strip 1` must be finite.*at \[3, 2\]"):
        writer.write_strip(1, values)
    assert writer.pending() == [0, 1, 2]
    assert not (Path(writer.path) / "influences" / "c").exists()


def test_arguments_of_write_strip_are_checked(tmp_path: Path, layout: Any) -> None:
    writer = InfluenceWriter.create(tmp_path / "r", layout, {})
    good = np.zeros((5, 8), np.float32)
    with pytest.raises(ShapeError, match=r"strip 2` must be \(5, 7\), got \(5, 8\)|strip 2 must be \(5, 7\)"):
        writer.write_strip(2, good)
    with pytest.raises(DtypeError, match="floating point, got int64"):
        writer.write_strip(0, good.astype(np.int64))
    with pytest.raises(IndexRangeError, match="strip from 0 to 2, got 3"):
        writer.write_strip(3, good)
    with pytest.raises(ShapeError, match=r"`loss` must be \(8,\)"):
        writer.write_strip(0, good, loss=np.zeros(7))
    with pytest.raises(NonFiniteError, match="gradient_norm of strip 0"):
        writer.write_strip(0, good, gradient_norm=np.full(8, np.nan))
    assert writer.pending() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
def test_other_floats_are_stored_as_float32(tmp_path: Path, layout: Any, dtype: Any) -> None:
    writer = InfluenceWriter.create(tmp_path / "r", layout, {})
    values = matrix(layout)[:, :8].astype(dtype)
    writer.write_strip(0, values)
    np.testing.assert_array_equal(open_influences(writer.path)[:, :8], values.astype(np.float32))


def test_strided_values_are_stored_in_order(tmp_path: Path, layout: Any) -> None:
    writer = InfluenceWriter.create(tmp_path / "r", layout, {})
    values = matrix(layout)
    writer.write_strip(0, np.asfortranarray(values)[:, :8])
    np.testing.assert_array_equal(open_influences(writer.path)[:, :8], values[:, :8])


def test_what_is_known_of_test_points_is_kept(tmp_path: Path, layout: Any) -> None:
    writer = InfluenceWriter.create(tmp_path / "r", layout, {})
    writer.write_test(
        slice(1, 3),
        loss=np.array([1.0, 2.0]),
        gradient_norm=np.array([3.0, 4.0]),
        relative_residual=np.array([1e-6, np.inf]),
        iterations=np.array([5, 6]),
        converged=np.array([True, False]),
    )
    writer.write_test(slice(3, None), loss=np.array([7.0, 8.0]))
    result = open_influences(writer.path)
    np.testing.assert_array_equal(result.test_loss, np.float32([np.nan, 1, 2, 7, 8]))
    np.testing.assert_array_equal(result.test_gradient_norm, np.float32([np.nan, 3, 4, np.nan, np.nan]))
    np.testing.assert_array_equal(result.relative_residual, np.float32([np.nan, 1e-6, np.inf, np.nan, np.nan]))
    np.testing.assert_array_equal(result.iterations, [-1, 5, 6, -1, -1])
    np.testing.assert_array_equal(result.converged, [False, True, False, False, False])


@pytest.mark.parametrize(
    ("rows", "given", "error", "message"),
    [
        (slice(0, 6), {}, IndexRangeError, "within 0 to 5"),
        (slice(2, 2), {}, IndexRangeError, "not be empty"),
        (slice(-2, None), {}, IndexRangeError, "within 0 to 5"),
        (slice(0, 4, 2), {}, SettingError, "without step"),
        (3, {}, SettingError, "`rows` must be a slice"),
        (slice(0, 2), {"loss": np.zeros(3)}, ShapeError, r"`loss` must be \(2,\)"),
        (slice(0, 2), {"iterations": np.zeros(2)}, DtypeError, "`iterations` must convert to int32"),
        (slice(0, 2), {"converged": np.zeros(2)}, DtypeError, "`converged` must convert to bool"),
        (slice(0, 2), {"loss": np.array([0, np.nan])}, NonFiniteError, "test_loss"),
    ],
)
def test_arguments_of_write_test_are_checked(
    tmp_path: Path, layout: Any, rows: Any, given: Any, error: Any, message: Any
) -> None:
    writer = InfluenceWriter.create(tmp_path / "r", layout, {})
    with pytest.raises(error, match=message):
        writer.write_test(rows, **given)


@pytest.mark.parametrize("bits", [1, 7, 10, 22])
def test_rounded_values_keep_their_bits_and_take_less_space(bits: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    values = (generator.standard_normal((32, 4096)) * 10.0 ** generator.integers(-12, 12, (32, 1))).astype(np.float32)
    sizes = {}
    for kept in (bits, 23):
        layout = Layout(n_test=32, n_train=4096, strip=4096, top_k=5, mantissa_bits=kept)
        writer = InfluenceWriter.create(tmp_path / f"{kept}.zarr", layout, {})
        writer.write_strip(0, values)
        writer.finish()
        sizes[kept] = sum(f.stat().st_size for f in (tmp_path / f"{kept}.zarr/influences/c").rglob("*") if f.is_file())
        stored = open_influences(tmp_path / f"{kept}.zarr")[:]
        assert (np.abs(stored - values) <= layout.rounding_error * np.abs(values)).all()
        assert not (stored.view(np.uint32) & np.uint32((1 << (23 - kept)) - 1)).any()
    if bits <= 10:
        assert sizes[bits] < 0.65 * sizes[23]


@pytest.mark.parametrize("bits", [0, 24, 1.5])
def test_mantissas_that_float32_does_not_have_are_refused(bits: float) -> None:
    with pytest.raises(SettingError, match="mantissa_bits"):
        Layout(n_test=1, n_train=1, strip=1, mantissa_bits=bits)
