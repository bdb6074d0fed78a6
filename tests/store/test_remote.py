"""Results behind URLs: the same numbers, only what is asked for is read, and errors that say what is wrong."""

import functools
import importlib.util
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from distinfluence.errors import MissingDependencyError, StoreError, StoreNotFoundError
from distinfluence.store import InfluenceWriter, Layout, open_influences

from .conftest import matrix


@pytest.fixture
def remote(tmp_path: Path, layout: Layout) -> Iterator[tuple[str, Any]]:
    """A result in fsspec's file system in memory, and beside it the one it was copied from."""
    writer, values = InfluenceWriter.create(tmp_path / "r.zarr", layout, {}), matrix(layout)
    for i in range(layout.n_strips):
        writer.write_strip(i, values[:, layout.strip_slice(i)])
    writer.finish()
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "r.zarr"), "/shelf/r.zarr", recursive=True)
    yield "memory://shelf/r.zarr", open_influences(tmp_path / "r.zarr")
    memory.rm("/shelf", recursive=True)


def test_a_url_reads_as_a_folder_does(remote: tuple[str, Any]) -> None:
    url, local = remote
    result = open_influences(url)
    assert result.complete
    assert result.path.name == "r.zarr"
    np.testing.assert_array_equal(result[:], local[:])
    np.testing.assert_array_equal(result.top(0, 3).indices, local.top(0, 3).indices)
    assert result.lost_strips() == result.damaged_strips() == []
    np.testing.assert_array_equal(result.to_xarray()["influences"].values, local[:])
    assert "r.zarr" in repr(result)


def test_only_what_is_asked_for_is_fetched(remote: tuple[str, Any]) -> None:
    url, local = remote
    result = open_influences(url)
    before = result.bytes_read
    assert before > 0  # metadata
    assert result[0, 0] == local[0, 0]
    assert before < result.bytes_read


def test_a_strip_that_is_gone_is_seen(remote: tuple[str, Any]) -> None:
    url, _ = remote
    fsspec.filesystem("memory").rm("/shelf/r.zarr/influences/c/0/1")
    assert open_influences(url).lost_strips() == [1]


def test_urls_that_lead_nowhere_say_so() -> None:
    with pytest.raises(StoreNotFoundError, match="memory://nowhere"):
        open_influences("memory://nowhere")
    with pytest.raises(StoreError, match="fsspec knows"):
        open_influences("nosuchprotocol://x/y")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


def test_a_result_on_a_web_server_opens_or_names_the_package_it_needs(remote: tuple[str, Any]) -> None:
    _, local = remote
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(local.path.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/r.zarr"
    try:
        if importlib.util.find_spec("aiohttp") is None:
            with pytest.raises(MissingDependencyError, match="aiohttp"):
                open_influences(url)
        else:
            np.testing.assert_array_equal(open_influences(url)[:], local[:])
    finally:
        server.shutdown()
        server.server_close()
