import errno
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr

from distinfluence.errors import (
    CorruptStoreError,
    IncompleteResultError,
    IndexRangeError,
    SettingError,
    StoreError,
)
from distinfluence.store import InfluenceWriter, Layout, open_influences

from .conftest import ATTRIBUTES, matrix, write_all


def shards_on_disk(path: Any) -> Any:
    return sorted(
        p.relative_to(path / "influences" / "c") for p in (path / "influences" / "c").rglob("*") if p.is_file()
    )


@pytest.mark.parametrize("n_test", [1, 31, 32, 33, 65])
@pytest.mark.parametrize(("n_train", "strip"), [(1, 1), (24, 8), (23, 8), (23, 23), (4500, 4099)])
def test_what_is_written_is_read(tmp_path: Path, n_test: Any, n_train: Any, strip: Any) -> None:
    layout = Layout(n_test, n_train, strip)
    values = matrix(layout)
    writer = InfluenceWriter.create(tmp_path / "r", layout, {})
    write_all(writer, values)
    writer.finish()
    result = open_influences(tmp_path / "r")
    np.testing.assert_array_equal(result[:], values)
    np.testing.assert_array_equal(result.train_loss, np.arange(n_train))
    np.testing.assert_array_equal(result.train_gradient_norm, np.arange(n_train) + 0.5)


def test_any_zarr_reader_opens_the_result(make: Any, layout: Any) -> None:
    writer, values = make(layout)
    group = zarr.open_group(str(writer.path), mode="r")
    assert group.metadata.zarr_format == 3
    influences = group["influences"]
    assert influences.dtype == np.float32
    assert np.isnan(influences.fill_value)
    assert influences.metadata.dimension_names == ("test", "train")
    assert (influences.chunks, influences.shards) == ((5, 8), (5, 8))
    np.testing.assert_array_equal(influences[:], values)
    inner = json.loads((writer.path / "influences" / "zarr.json").read_text())["codecs"][0]["configuration"]["codecs"]
    assert [codec["name"] for codec in inner] == ["bytes", "crc32c"]
    dtypes = {name: str(array.dtype) for name, array in group.arrays()}
    assert dtypes == {
        "influences": "float32",
        "test_loss": "float32",
        "test_gradient_norm": "float32",
        "relative_residual": "float32",
        "iterations": "int32",
        "converged": "bool",
        "error_bound": "float32",
        "train_loss": "float32",
        "train_gradient_norm": "float32",
        "train_total": "float32",
        "self_influence": "float32",
        "self_influence_error": "float32",
        "strip_status": "uint8",
        "top_index": "int32",
        "top_value": "float32",
        "bottom_index": "int32",
        "bottom_value": "float32",
    }


@pytest.mark.parametrize("consolidated", [True, False])
def test_xarray_opens_the_result_with_named_dimensions(make: Any, layout: Any, consolidated: Any) -> None:
    writer, values = make(layout)
    dataset = xr.open_zarr(str(writer.path), consolidated=consolidated)
    assert dataset["influences"].dims == ("test", "train")
    assert dataset["test_loss"].dims == dataset["converged"].dims == ("test",)
    assert dataset["top_index"].dims == ("test", "rank")
    np.testing.assert_array_equal(dataset["influences"].values, values)
    assert dataset["top_index"].dtype == np.int32


def test_a_running_result_opens_too(make: Any, layout: Any) -> None:
    writer, values = make(layout, finish=False, skip=(1,))
    seen = xr.open_zarr(str(writer.path), consolidated=False)["influences"].values
    np.testing.assert_array_equal(seen[:, :8], values[:, :8])
    assert np.isnan(seen[:, 8:16]).all()


def test_the_attributes_say_what_it_is(make: Any, layout: Any) -> None:
    writer, _ = make(layout, finish=False)
    attributes = dict(zarr.open_group(str(writer.path), mode="r").attrs)
    assert attributes["format"] == "distinfluence"
    assert attributes["format_version"] == 1
    assert attributes["state"] == "running"
    assert attributes["sign_convention"].startswith("positive: the training point helps")
    assert {name: attributes[name] for name in ATTRIBUTES} == ATTRIBUTES
    writer.reopen([0])
    write_all(writer, matrix(layout))
    writer.finish()
    assert zarr.open_group(str(writer.path), mode="r").attrs["state"] == "complete"


@pytest.mark.parametrize("attributes", [{"state": "done"}, {"solver": object()}, {"solver": {"atol": float("inf")}}])
def test_attributes_that_cannot_be_stored_are_refused_before_anything_is_made(
    tmp_path: Path, layout: Any, attributes: Any
) -> None:
    with pytest.raises(SettingError, match="attributes"):
        InfluenceWriter.create(tmp_path / "r", layout, attributes)
    assert not list(tmp_path.iterdir())


def test_one_strip_is_one_file(tmp_path: Path) -> None:
    layout = Layout(n_test=70, n_train=5000, strip=1024)
    writer = InfluenceWriter.create(tmp_path / "r", layout, {})
    write_all(writer, matrix(layout))
    assert [str(p) for p in shards_on_disk(writer.path)] == [f"0/{i}" for i in range(5)]


def test_a_strip_of_zeros_is_on_disk_as_well(tmp_path: Path, layout: Any) -> None:
    writer = InfluenceWriter.create(tmp_path / "r", layout, {})
    write_all(writer, np.zeros(layout.shape, np.float32))
    assert len(shards_on_disk(writer.path)) == layout.n_strips
    writer.finish()
    assert not open_influences(writer.path)[:].any()


def test_perturbation_influences_keep_the_shape_of_the_inputs(tmp_path: Path) -> None:
    layout = Layout(n_test=3, n_train=7, strip=3, input_shape=(2, 4))
    values = matrix(layout)
    writer = InfluenceWriter.create(tmp_path / "r", layout, {})
    write_all(writer, values, skip=(1,))
    assert writer.pending() == [1]
    write_all(writer, values)
    writer.finish()
    group = zarr.open_group(str(writer.path), mode="r")
    assert group["influences"].metadata.dimension_names == ("test", "train", "input_0", "input_1")
    assert not {"top_index", "bottom_index", "strips"} & set(group)
    assert len(shards_on_disk(writer.path)) == 3
    np.testing.assert_array_equal(open_influences(writer.path)[:], values)


@pytest.mark.parametrize("strip", [1, 2], ids=["inner strip", "ragged last strip"])
def test_a_flipped_byte_is_found_and_its_strip_can_be_computed_again(make: Any, layout: Any, strip: Any) -> None:
    writer, values = make(layout)
    columns = layout.strip_slice(strip)
    shard = writer.path / "influences" / "c" / "0" / str(strip)
    content = bytearray(shard.read_bytes())
    content[17] ^= 1
    shard.write_bytes(content)
    result = open_influences(writer.path)
    with pytest.raises(CorruptStoreError, match="damaged.*damaged_strips"):
        result[0, columns]
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_group(str(writer.path), mode="r")["influences"][0, columns]
    np.testing.assert_array_equal(result[:, :8], values[:, :8])
    assert result.damaged_strips() == [strip]
    writer.reopen(result.damaged_strips())
    assert writer.pending() == [strip]
    assert not open_influences(writer.path).complete
    write_all(writer, values)
    writer.finish()
    assert open_influences(writer.path).damaged_strips() == []
    np.testing.assert_array_equal(open_influences(writer.path)[:], values)


@pytest.mark.parametrize("n_bytes", [0, 3, 40])
def test_a_truncated_shard_is_found_and_can_be_computed_again(make: Any, layout: Any, n_bytes: Any) -> None:
    writer, values = make(layout)
    shard = writer.path / "influences" / "c" / "0" / "1"
    shard.write_bytes(shard.read_bytes()[:n_bytes])
    assert open_influences(writer.path).damaged_strips() == [1]
    writer.reopen([1])
    write_all(writer, values)
    assert open_influences(writer.path).damaged_strips() == []


@pytest.mark.parametrize("n_bytes", [0, 3, 40, 200])
@pytest.mark.parametrize("torn", ["influences/c/0/2", "train_loss/c/2", "strips/index/c/2/0/0/0"])
def test_torn_files_of_an_unmarked_strip_are_replaced(make: Any, layout: Any, torn: Any, n_bytes: Any) -> None:
    writer, values = make(layout, finish=False)
    file = writer.path / torn
    file.write_bytes(file.read_bytes()[:n_bytes])
    zarr.open_group(str(writer.path), mode="r+")["strip_status"][2] = 0
    write_all(writer, values)
    writer.finish()
    result = open_influences(writer.path)
    np.testing.assert_array_equal(result[:], values)
    np.testing.assert_array_equal(result.train_loss, np.arange(23))
    np.testing.assert_array_equal(result.top(0).values, np.sort(values[0])[::-1][:4])


def test_reopened_strips_are_gone_and_pending(make: Any, layout: Any) -> None:
    writer, values = make(layout)
    with pytest.raises(IndexRangeError, match="from 0 to 2, got 3"):
        writer.reopen([1, 3])
    writer.reopen([])
    assert open_influences(writer.path).complete
    writer.reopen([1])
    result = open_influences(writer.path)
    assert (result.complete, result.n_missing, writer.pending()) == (False, 1, [1])
    assert np.isnan(result[:, 8:16]).all()
    np.testing.assert_array_equal(result[:, 16:], values[:, 16:])


def test_the_mark_comes_last(tmp_path: Path, layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = InfluenceWriter.create(tmp_path / "r", layout, {})
    values = matrix(layout)
    with monkeypatch.context() as patch:
        patch.setattr(InfluenceWriter, "_mark", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            writer.write_strip(1, values[:, 8:16])
    assert [str(p) for p in shards_on_disk(writer.path)] == ["0/1"]
    assert InfluenceWriter.open(writer.path).pending() == [0, 1, 2]
    assert open_influences(writer.path).n_missing == 3
    assert writer.write_strip(1, values[:, 8:16])
    assert writer.pending() == [0, 2]


def test_a_shard_is_one_assignment_and_nothing_follows_the_mark(
    tmp_path: Path, layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    original = zarr.Array.__setitem__

    def spy(array: Any, key: Any, value: Any) -> None:
        written.append(array.name)
        original(array, key, value)

    writer = InfluenceWriter.create(tmp_path / "r", layout, {})
    monkeypatch.setattr(zarr.Array, "__setitem__", spy)
    writer.write_strip(0, matrix(layout)[:, :8], loss=np.ones(8))
    assert written.count("/influences") == 1
    assert written[-1] == "/strip_status"


def test_a_marked_strip_whose_shard_is_gone_is_pending(make: Any, layout: Any) -> None:
    writer, values = make(layout, finish=False)
    (writer.path / "influences" / "c" / "0" / "2").unlink()
    assert writer.pending() == [2]
    assert writer.write_strip(2, values[:, 16:])
    assert writer.pending() == []


def test_writing_a_strip_again_changes_nothing(make: Any, layout: Any) -> None:
    writer, values = make(layout)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in writer.path.rglob("*") if p.is_file()}
    assert writer.write_strip(0, values[:, :8]) is False
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in writer.path.rglob("*") if p.is_file()} == before


def test_finish_refuses_while_strips_are_pending(make: Any, layout: Any) -> None:
    writer, values = make(layout, finish=False, skip=(0, 2))
    with pytest.raises(IncompleteResultError, match=r"2 of 3 strips are not written yet \(0, 2\)"):
        writer.finish()
    write_all(writer, values)
    writer.finish()
    writer.finish()
    assert open_influences(writer.path).complete


def test_finish_can_be_killed_and_called_again(make: Any, layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, values = make(layout, finish=False)
    with monkeypatch.context() as patch:
        patch.setattr(zarr, "consolidate_metadata", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            writer.finish()
    InfluenceWriter.open(writer.path).finish()
    assert "consolidated_metadata" in json.loads((writer.path / "zarr.json").read_text())
    np.testing.assert_array_equal(open_influences(writer.path).top(0).values, np.sort(values[0])[::-1][:4])


def test_finish_refuses_a_marked_strip_without_its_ranking(make: Any, layout: Any) -> None:
    writer, _ = make(layout, finish=False)
    (writer.path / "strips/index/c/1/0/0/0").unlink()
    with pytest.raises(CorruptStoreError, match=r"ranking of strip 1.*reopen\(\[1\]\)"):
        writer.finish()


def test_what_killed_writers_left_is_swept_when_it_is_old(make: Any, layout: Any) -> None:
    writer, _ = make(layout, finish=False)
    old, fresh = (writer.path / "influences/c/0" / f"{i}.x.partial" for i in (0, 1))
    for file in (old, fresh):
        file.write_bytes(b"half a shard")
    os.utime(old, (0, 0))
    writer.finish()
    assert not old.exists() and fresh.exists()


def test_a_full_disk_is_said_and_the_strip_stays_unmarked(
    tmp_path: Path, layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = InfluenceWriter.create(tmp_path / "r", layout, {})

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(zarr.Array, "__setitem__", full)
        with pytest.raises(StoreError, match=f"strip 1.*{writer.path}.*No space left.*Free space") as raised:
            writer.write_strip(1, matrix(layout)[:, 8:16])
    assert raised.value.errno == errno.ENOSPC
    assert writer.pending() == [0, 1, 2]


def test_a_disk_that_fills_up_for_real_is_said(tmp_path: Path, layout: Any) -> None:
    import resource
    import signal

    writer = InfluenceWriter.create(tmp_path / "r", Layout(64, 4096, 4096), {})
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StoreError, match="strip 0.*File too large"):
            writer.write_strip(0, np.ones((64, 4096), np.float32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert writer.pending() == [0]
    assert shards_on_disk(writer.path) == []
    assert writer.write_strip(0, np.ones((64, 4096), np.float32))


def test_shards_are_synced_before_the_mark(tmp_path: Path, layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda d: synced.append(os.readlink(f"/proc/self/fd/{d}")))
    writer = InfluenceWriter.create(tmp_path / "r", layout, {})
    writer.write_strip(0, matrix(layout)[:, :8])
    names = [os.path.relpath(p, writer.path) for p in synced]
    assert names.index("influences/c/0/0") < names.index("strip_status/c/0")
    assert "influences/c/0" in names
    writer.write_test(slice(0, 5), loss=np.ones(5))
    write_all(writer, matrix(layout))
    synced.clear()
    writer.finish()
    files = {os.path.relpath(p, writer.path) for p in synced if os.path.isfile(p)}
    assert files == {f"{e}_{w}/c/0/0" for e in ("top", "bottom") for w in ("index", "value")} | {"test_loss/c/0"}


def test_a_writer_travels_as_its_path(make: Any, layout: Any) -> None:
    writer, _ = make(layout, finish=False, skip=(1,))
    again = pickle.loads(pickle.dumps(writer))
    assert (again.path, again.layout, again.pending()) == (writer.path, layout, [1])
    assert len(pickle.dumps(writer)) < 1000
