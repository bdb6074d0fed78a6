"""Results written to object stores: files there whole or not at all, marks last, nothing renamed, locked or synced."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from distributed import LocalCluster

from distinfluence import DirectInfluence, SequentialInfluenceCalculator
from distinfluence.app.config import Job
from distinfluence.app.job import run_job
from distinfluence.errors import FingerprintError, ForeignStoreError, SettingError, StoreError, StoreExistsError
from distinfluence.scaling import Progress
from distinfluence.store import (
    InfluenceWriter,
    Layout,
    annotate,
    find_damage,
    mend,
    open_influences,
)
from distinfluence.store.format.remote import RemoteStore
from distinfluence.store.write.resume import check_output, chunks_of
from tests.reference import Reference
from tests.store.conftest import ATTRIBUTES, matrix, write_all
from tests.test_job import content
from tests.zoo import build

URL = "memory://bucket/i.zarr"


@pytest.fixture
def bucket() -> Iterator[Any]:
    """fsspec's file system in memory, which like S3 has nothing but whole objects."""
    memory = fsspec.filesystem("memory")
    yield memory
    if memory.exists("/bucket"):
        memory.rm("/bucket", recursive=True)


def test_a_result_is_written_gone_on_with_and_completed_behind_a_url(bucket: Any, layout: Layout) -> None:
    check_output(URL)
    assert chunks_of(URL) is None
    values = matrix(layout)
    writer = InfluenceWriter.create(URL, layout, {**ATTRIBUTES, "chunks": {"train": 8}})
    write_all(writer, values, skip=(1,))
    again = pickle.loads(pickle.dumps(writer))
    assert again.pending() == [1]
    assert not open_influences(URL).complete
    with pytest.raises(StoreExistsError):
        check_output(URL)
    check_output(URL, resume=True)
    assert chunks_of(URL) == {"train": 8}
    with pytest.raises(FingerprintError):
        InfluenceWriter.resume(URL, layout, {"model parameters": "other"})
    again = InfluenceWriter.resume(URL, layout, ATTRIBUTES["fingerprints"])
    assert not again.write_strip(0, values[:, layout.strip_slice(0)])
    write_all(again, values)
    ones = np.ones(layout.n_test)
    again.write_test(slice(0, layout.n_test), loss=ones, iterations=ones.astype(int))
    again.finish()
    result = open_influences(URL)
    assert result.complete
    np.testing.assert_array_equal(result[:], values)
    np.testing.assert_array_equal(result.top(0).values, np.sort(values[0])[::-1][:4])
    assert not find_damage(URL)


def test_the_mark_is_what_is_written_last(bucket: Any, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = InfluenceWriter.create(URL, layout, ATTRIBUTES)
    before = set(bucket.find("/bucket"))
    order: list[str] = []
    put = RemoteStore.set

    async def noted(self: Any, key: str, value: Any, byte_range: Any = None) -> None:
        order.append(key)
        await put(self, key, value, byte_range)

    monkeypatch.setattr(RemoteStore, "set", noted)
    writer.write_strip(1, matrix(layout)[:, 8:16])
    assert order[-1] == "strip_status/c/1"
    assert "influences/c/0/1" in order
    assert len(order) == len(set(order))  # no object twice, none read back
    assert {path.partition("i.zarr/")[2] for path in set(bucket.find("/bucket")) - before} == set(order)


def test_damage_behind_a_url_is_mended(bucket: Any, layout: Layout) -> None:
    values = matrix(layout)
    writer = InfluenceWriter.create(URL, layout, ATTRIBUTES)
    write_all(writer, values)
    writer.finish()
    shard = "/bucket/i.zarr/influences/c/0/2"
    content = bytearray(bucket.cat_file(shard))
    content[0] ^= 1
    bucket.pipe_file(shard, bytes(content))
    assert find_damage(URL).strips == (2,)
    mend(writer)
    assert writer.pending() == [2]
    assert not bucket.exists(shard)
    write_all(writer, values)
    writer.finish()
    assert not find_damage(URL)


def test_what_others_put_there_is_never_touched_and_ours_only_if_asked(bucket: Any, layout: Layout) -> None:
    bucket.pipe_file("/bucket/i.zarr/mine.txt", b"mine")
    with pytest.raises(ForeignStoreError, match="nothing was touched"):
        InfluenceWriter.create(URL, layout, ATTRIBUTES, overwrite=True)
    assert bucket.cat_file("/bucket/i.zarr/mine.txt") == b"mine"
    bucket.rm("/bucket", recursive=True)
    first = InfluenceWriter.create(URL, layout, ATTRIBUTES)
    write_all(first, matrix(layout))
    with pytest.raises(StoreExistsError):
        InfluenceWriter.create(URL, layout, ATTRIBUTES)
    assert InfluenceWriter.create(URL, layout, ATTRIBUTES, overwrite=True).pending() == [0, 1, 2]


def test_what_cannot_be_written_to_says_so(bucket: Any, layout: Layout) -> None:
    with pytest.raises(StoreError, match="zip://"):
        InfluenceWriter.create("zip://i.zarr::/nowhere/a.zip", layout, ATTRIBUTES)
    InfluenceWriter.create(URL, layout, ATTRIBUTES)
    with pytest.raises(SettingError, match="Copy the result here"):
        annotate(URL, "test", labels=np.arange(5))


def test_a_run_writes_to_a_url_as_to_a_folder(bucket: Any, tmp_path: Path) -> None:
    case = build("mlp classification")
    influence = DirectInfluence(case.model, case.loss, 0.01, second_order_mode="ggn")
    calculator = SequentialInfluenceCalculator(influence, scratch=tmp_path / "scratch").fit(*case.train, chunk_size=5)
    here = calculator.to_zarr(tmp_path / "i.zarr", *case.test, progress=False)
    there = calculator.to_zarr(URL, *case.test, progress=False)
    assert there.complete
    np.testing.assert_array_equal(there[:], here[:])
    bucket.rm("/bucket/i.zarr/strip_status/c/1")
    again = calculator.to_zarr(URL, *case.test, existing="repair", progress=False)
    np.testing.assert_array_equal(again[:], here[:])


def test_a_job_writes_to_a_url_from_its_workers(bucket: Any, tmp_path: Path) -> None:
    one = LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0")
    with one as cluster:  # in this process, since memory is not shared
        described = content(
            cluster={"kind": "address", "address": cluster.scheduler_address},
            output=URL,
            scratch="scratch",
            chunks={"train": 12},
        )
        result = run_job(Job.parse(described, tmp_path), progress=Progress(False))
    assert result.complete
    assert str(result.path) == URL
    assert list((tmp_path / "scratch").iterdir()) == []
    expected = Reference(build("mlp classification")).influences("hessian", 0.01).numpy()
    np.testing.assert_allclose(result[:], expected, rtol=1e-6, atol=1e-4)
