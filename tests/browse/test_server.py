"""The page's server against those who should not see, and results that should not be trusted."""

import gzip
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr

from distinfluence.browse.commands import _listening
from distinfluence.browse.export.html_report import write_report
from distinfluence.browse.server.api import ResultApi
from distinfluence.browse.server.http import BrowseServer
from distinfluence.browse.server.saved_link import Link, keep_link, kept_link
from distinfluence.browse.views.picture import packed
from distinfluence.errors import CorruptStoreError, SettingError, ShapeError
from distinfluence.store import InfluenceWriter, Layout, annotate, open_influences
from tests.browse.conftest import serving
from tests.processes import started


class Answer:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    def json(self) -> Any:
        return json.loads(self.body)


def ask(server: BrowseServer, path: str, *, method: str = "GET", token: bool = True, **headers: str) -> Answer:
    """One request, its path sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    given = {"Host": f"127.0.0.1:{server.port}"}
    if token:
        given["Cookie"] = f"distinfluence-{server.port}={server.token}"
    for name, value in {**given, **{name.replace("_", "-"): value for name, value in headers.items()}}.items():
        connection.putheader(name, value)
    connection.endheaders()
    try:
        return Answer(connection.getresponse())
    finally:
        connection.close()


def small(path: Path, **layout: Any) -> Path:
    writer = InfluenceWriter.create(path, Layout(3, 8, 4, **layout), {})
    for i in range(2):
        writer.write_strip(i, np.random.default_rng(i).standard_normal((3, 4)))
    writer.finish()
    annotate(path, "train", [f"text {i}" for i in range(8)], kind="text")
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowseServer]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "secret.txt").write_text("the secret")
    with serving(small(folder / "i.zarr")) as running:
        yield running


def test_it_listens_on_this_machine_only(server: BrowseServer) -> None:
    assert server._socket.getsockname()[0] == "127.0.0.1"
    with socket.socket() as elsewhere:
        elsewhere.settimeout(5)
        assert elsewhere.connect_ex(("127.0.0.2", server.port)) != 0


@pytest.mark.parametrize("path", ["/", "/page.js", "/api/summary", "/api/test?index=0", "/api/nothing", "/nothing"])
def test_without_the_token_nothing_is_said(server: BrowseServer, path: str) -> None:
    for token in ("", "wrong", server.token[:-1], "é"):
        for answer in (
            ask(server, path, token=False, Cookie=f"distinfluence-{server.port}={token.encode().hex()}"),
            ask(server, f"{path}{'&' if '?' in path else '?'}token={token.encode().hex()}", token=False),
        ):
            assert answer.status == 403
            assert b"influences" not in answer.body and b"html" not in answer.body


def test_a_browser_without_the_token_is_told_what_to_do_on_a_page(server: BrowseServer) -> None:
    answer = ask(server, "/", token=False, Accept="text/html,application/xhtml+xml,*/*;q=0.8")
    assert answer.status == 403 and answer.headers["Content-Type"] == "text/html; charset=utf-8"
    text = answer.body.decode()
    assert "The token is missing or wrong" in text and "distinfluence browse" in text
    assert "i.zarr" not in text and "<script" not in text and server.token not in text
    assert ask(server, "/", Host="evil.example", Accept="text/html").body.decode().count("--name") == 1


def test_the_token_moves_from_the_address_into_a_cookie(server: BrowseServer) -> None:
    answer = ask(server, f"/?token={server.token}", token=False)
    assert (answer.status, answer.headers["Location"]) == (302, "/")
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Lax" in cookie and "expires=" in cookie
    assert ask(server, "/", token=False, Cookie=cookie.partition(";")[0]).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost.evil:{port}"]
)
def test_another_name_of_the_server_is_refused(server: BrowseServer, host: str) -> None:
    assert ask(server, "/api/summary", Host=host.format(port=server.port)).status == 403
    assert ask(server, "/api/summary", Host=f"localhost:{server.port}").status == 200


def test_another_site_is_refused(server: BrowseServer) -> None:
    assert ask(server, "/api/summary", Sec_Fetch_Site="cross-site").status == 403
    assert ask(server, "/api/summary", Sec_Fetch_Site="same-origin").status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_nothing_can_be_changed(server: BrowseServer, method: str) -> None:
    assert ask(server, "/api/summary", method=method).status == 405


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/..%2fsecret.txt",
        "/%2e%2e/secret.txt",
        "/%252e%252e%252fsecret.txt",
        "//etc/passwd",
        "/zarr.json",
        "/influences/c/0/0",
        "/page.js/../../secret.txt",
        "/page.js%00.txt",
        "/api/..%2f..%2fsecret.txt",
        "/api/test/../../../secret.txt",
        "/api/summary%2f..",
        "/server.py",
        "/page.css.bak",
        "\\..\\secret.txt",
        "http://127.0.0.1/secret.txt",
    ],
)
def test_no_path_leads_to_a_file(server: BrowseServer, path: str) -> None:
    answer = ask(server, path)
    assert answer.status in (400, 404)
    assert b"secret" not in answer.body.replace(b"secret.txt", b"") and b"root:" not in answer.body


@pytest.mark.parametrize("path", ["/", "/page.js", "/api/summary", "/api/test?index=99", "/nothing"])
def test_every_answer_forbids_foreign_scripts_and_frames(server: BrowseServer, path: str) -> None:
    headers = ask(server, path).headers
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'") and "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
    assert "Server" not in headers and "Access-Control-Allow-Origin" not in headers


def test_the_page_loads_nothing_from_elsewhere(server: BrowseServer) -> None:
    for path in ("/", "/page.js", "/page.css"):
        text = ask(server, path).body.decode()
        assert "http:" not in text and "https:" not in text and "innerHTML" not in text and "eval(" not in text


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("test?index=3", "no test point 3"),
        ("test?index=-1", "no test point -1"),
        ("test?index=1e3", "`index` must be a whole number"),
        ("test?index=٣", "`index` must be a whole number"),
        ("test", "`index` must be a whole number"),
        ("test?index=0&k=0", "`k` must be from 1"),
        ("test?index=0&k=999999999", "`k` must be from 1"),
        ("train?index=8", "no train point 8"),
        ("suspects?by=__class__", "`by` must be"),
        ("picture?rows=0:3&columns=0:9&height=9&width=9", "`columns` must be a range within 0:8"),
        ("picture?rows=3:0&columns=0:8&height=9&width=9", "`rows` must be a range within 0:3"),
        ("picture?rows=0:3&columns=0:8&height=999999&width=9", "`height` and `width`"),
        ("picture?rows=0:3&columns=0:8&height=9&width=9&row-order=evil", "`order` of test points"),
        ("cell?rows=0:1", "`columns` must be a range"),
        ("pair?test=0&train=8", "no train point 8"),
        ("set?tests=0:4", "`tests` must be a range within 0:3"),
        ("set?class=1", "no test point has the label 1"),
        ("set?class=nan", "`class` must be the number of a label"),
        ("classes", "at most 256 classes"),
        ("saliency?test=0&train=0", "mode 'perturbation'"),
    ],
)
def test_a_wrong_question_gets_a_clear_answer(server: BrowseServer, question: str, said: str) -> None:
    from urllib.parse import quote

    answer = ask(server, "/api/" + quote(question, safe="?=&:"))
    assert answer.status == 422
    assert said in answer.json()["error"]


def test_a_picture_is_little_endian_halves_times_a_scale(server: BrowseServer) -> None:
    answer = ask(server, "/api/picture?rows=0:3&columns=1:7&height=3&width=3")
    about = json.loads(answer.headers["X-Picture"])
    scale = about.pop("scale")
    assert about == {"shape": [3, 3], "block": [1, 1], "damaged": []}
    values = open_influences(server.api.result.path)[:, 1:7].reshape(3, 3, 2)
    expected = np.take_along_axis(values, np.abs(values).argmax(axis=2)[..., np.newaxis], axis=2)[..., 0]
    cells = np.frombuffer(answer.body, "<f2").reshape(3, 3).astype(np.float64) * scale
    np.testing.assert_allclose(cells, expected, rtol=2**-10)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_packed_cells_keep_three_digits_and_what_is_no_number(size: float) -> None:
    values = np.array([[size, -size / 100, np.nan], [np.inf, 0.0, 1e6 * size]], np.float32)
    cells, scale = packed(values)
    back = cells.astype(np.float64) * scale
    np.testing.assert_allclose(back[0, :2], values[0, :2], rtol=1e-3)
    assert np.isnan(back[0, 2]) and np.isposinf(back[1, 0]) and back[1, 1] == 0 and np.isfinite(back[1, 2])


def test_answers_are_packed_for_browsers_that_unpack(server: BrowseServer) -> None:
    for path in ("/page.css", "/matrix.js"):
        plain, packed = ask(server, path), ask(server, path, Accept_Encoding="gzip, br")
        assert "Content-Encoding" not in plain.headers and packed.headers["Content-Encoding"] == "gzip"
        assert len(packed.body) < len(plain.body) and gzip.decompress(packed.body) == plain.body


def test_a_link_within_the_result_shows_no_other_file(tmp_path: Path) -> None:
    path = small(tmp_path / "i.zarr")
    (tmp_path / "secret").write_bytes(b"the secret, long enough to be read")
    for chunk in ("samples/train/text/c/0", "influences/c/0/0"):
        (path / chunk).unlink()
        os.symlink(tmp_path / "secret", path / chunk)
    with serving(path) as server:
        for question in ("train?index=1", "cell?rows=0:3&columns=0:8&row-order=stored&column-order=stored"):
            answer = ask(server, f"/api/{question}")
            assert answer.status == 422
            assert b"the secret" not in answer.body and "leads out of the result" in answer.json()["error"]


def replaced(path: Path, name: str, **array: Any) -> None:
    group = zarr.open_group(str(path), mode="r+")
    del group[name]
    group.create_array(name, compressors=None, **array)


@pytest.mark.parametrize(
    ("name", "array", "question"),
    [
        ("top_index", {"shape": (3, 8), "dtype": "float64"}, "test?index=0"),
        ("influences", {"shape": (3, 10**12), "dtype": "float32", "chunks": (1, 1)}, "train?index=0"),
        ("influences", {"shape": (3, 8), "dtype": "float32", "chunks": (2**20, 2**20)}, "train?index=0"),
        ("samples/train/offsets", {"shape": (9,), "dtype": "int64", "fill_value": 2**60}, "train?index=0"),
        ("samples/train/text", {"shape": (10**15,), "dtype": "uint8", "chunks": (2**40,)}, "train?index=0"),
        ("train_total", {"shape": (7,), "dtype": "float32"}, "suspects"),
    ],
)
def test_hostile_arrays_are_an_answer_and_no_crash(tmp_path: Path, name: str, array: Any, question: str) -> None:
    path = small(tmp_path / "i.zarr")
    replaced(path, name, **array)
    with serving(path) as server:
        answer = ask(server, f"/api/{question}")
        assert answer.status == 422, answer.body
        assert "must" in answer.json()["error"]
        assert ask(server, "/api/traffic").status == 200


def test_missing_metadata_and_torn_json_are_an_answer_and_no_crash(tmp_path: Path) -> None:
    path = small(tmp_path / "i.zarr")
    with serving(path) as server:
        (path / "top_value/zarr.json").write_text('{"zarr_format": 3, "node_type": "arr')
        (path / "train_total/zarr.json").unlink()
        assert ask(server, "/api/test?index=0").status == 422
        assert ask(server, "/api/suspects").status == 200  # made from the matrix


@pytest.mark.parametrize(
    "layout",
    [
        {"n_test": 2**40, "n_train": 8, "strip": 8, "input_shape": [], "top_k": 1},
        {"n_test": 3, "n_train": 2**31 - 1, "strip": 1, "input_shape": [], "top_k": 1},
    ],
)
def test_a_result_that_says_it_is_enormous_is_refused_at_once(tmp_path: Path, layout: Any) -> None:
    path = small(tmp_path / "i.zarr")
    zarr.open_group(str(path), mode="r+").attrs["layout"] = layout
    with pytest.raises(SettingError, match="can be browsed"):
        ResultApi(open_influences(path))


def test_influences_of_inputs_answer_only_what_they_can(tmp_path: Path) -> None:
    layout = Layout(2, 4, 2, input_shape=(3, 5))
    writer = InfluenceWriter.create(tmp_path / "p.zarr", layout, {})
    values = np.random.default_rng(0).standard_normal((2, 4, 3, 5)).astype(np.float32)
    writer.write_strip(0, values[:, :2])
    with serving(tmp_path / "p.zarr") as server:
        assert ask(server, "/api/summary").json()["input_shape"] == [3, 5]
        found = ask(server, "/api/saliency?test=1&train=0").json()
        assert found["norm"] == pytest.approx(np.linalg.norm(values[1, 0]))
        place, value = found["numbers"][0]
        assert values[1, 0][tuple(map(int, place.split(", ")))] == pytest.approx(value)
        assert abs(value) == pytest.approx(np.abs(values[1, 0]).max()) and (found["height"], found["width"]) == (3, 5)
        norms = np.linalg.norm(values[1].reshape(4, 15), axis=1)[:2]
        assert [point["index"] for point in found["strongest"]] == np.argsort(-norms).tolist()
        assert not ask(server, "/api/saliency?test=1&train=3").json()["known"]
        for question in ("test?index=0", "picture?rows=0:2&columns=0:4&height=2&width=4", "set", "suspects"):
            answer = ask(server, f"/api/{question}")
            assert answer.status == 422, question


def test_a_layout_that_is_none_is_refused(tmp_path: Path) -> None:
    path = small(tmp_path / "i.zarr")
    zarr.open_group(str(path), mode="r+").attrs["layout"] = "huge"
    with pytest.raises(CorruptStoreError, match="`layout`"):
        open_influences(path)


def test_a_port_that_is_taken_is_said(server: BrowseServer) -> None:
    with pytest.raises(SettingError, match="cannot be listened on"):
        BrowseServer(server.api, port=server.port)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_stopped(tmp_path: Path, sent: signal.Signals) -> None:
    path = small(tmp_path / "i.zarr")
    root = str(Path(__file__).parents[2])
    with started(
        [sys.executable, "-m", "distinfluence", "browse", path, "--no-open"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root},
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:") and "?token=" in url
        address, _, token = url.partition("/?token=")
        deadline = time.monotonic() + 60
        while True:
            try:
                connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
                connection.request("GET", f"/api/summary?token={token}")
                assert json.loads(connection.getresponse().read())["n_train"] == 8
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            finally:
                connection.close()
        process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


@pytest.mark.parametrize("codec", ["zstd", "gzip"])
def test_compressed_arrays_are_refused_as_they_may_expand_to_anything(tmp_path: Path, codec: str) -> None:
    path = small(tmp_path / "i.zarr")
    file = path / "test_loss/zarr.json"
    metadata = json.loads(file.read_text())
    metadata["codecs"].append({"name": codec, "configuration": {"level": 1, "checksum": False}})
    if codec == "gzip":
        del metadata["codecs"][-1]["configuration"]["checksum"]
    file.write_text(json.dumps(metadata))
    with pytest.raises(SettingError, match=r"arrays \(test_loss\) with codecs"):
        ResultApi(open_influences(path))


@pytest.mark.parametrize("said", [2**31 - 1, 0])
def test_rounded_results_are_shown_and_a_chunk_that_says_it_is_larger_is_refused(tmp_path: Path, said: int) -> None:
    path = small(tmp_path / "i.zarr", mantissa_bits=7)
    api = ResultApi(open_influences(path))
    assert np.isfinite(api.result[0]).all()
    file = path / "influences/c/0/0"
    content = bytearray(file.read_bytes())
    offset = int.from_bytes(content[-20:-12], "little")  # of the first chunk: the index of a shard is at its end
    content[offset + 4 : offset + 8] = said.to_bytes(4, "little")
    stop = offset + int.from_bytes(content[-12:-4], "little") - 4
    content[stop : stop + 4] = google_crc32c.value(bytes(content[offset:stop])).to_bytes(4, "little")
    file.write_bytes(content)
    with pytest.raises(CorruptStoreError, match=f"expands to {said} bytes"):
        open_influences(path)[0]


@pytest.mark.parametrize("codec", ["evil", "numcodecs.pickle"])
def test_codecs_that_could_run_code_are_not_known(tmp_path: Path, codec: str) -> None:
    path = small(tmp_path / "i.zarr")
    file = path / "test_loss/zarr.json"
    metadata = json.loads(file.read_text())
    metadata["codecs"].append({"name": codec, "configuration": {}})
    file.write_text(json.dumps(metadata))
    with serving(path) as server:
        answer = ask(server, "/api/test?index=0")
        assert answer.status == 422 and "Unknown codec" in answer.json()["error"]


def test_a_file_that_says_it_is_enormous_is_not_read(tmp_path: Path) -> None:
    path = small(tmp_path / "i.zarr")
    with (path / "train_total/c/0").open("wb") as file:
        file.truncate(2**40)
    with serving(path) as server:
        answer = ask(server, "/api/suspects")
        assert answer.status == 422 and "are read at once" in answer.json()["error"]


def test_a_mark_of_finished_strips_that_is_missing_is_an_answer_and_no_crash(tmp_path: Path) -> None:
    path = small(tmp_path / "i.zarr")
    with serving(path) as server:
        shutil.rmtree(path / "strip_status")
        answer = ask(server, "/api/summary")
        assert answer.status == 422 and "`strip_status`" in answer.json()["error"]


def test_rankings_that_name_no_training_point_are_an_answer_and_no_crash(tmp_path: Path) -> None:
    path = small(tmp_path / "i.zarr")
    with serving(path) as server:
        shutil.rmtree(path / "top_index/c")
        answer = ask(server, "/api/test?index=0")
        assert answer.status == 422 and "training point" in answer.json()["error"]


def test_attributes_longer_than_anyone_reads_are_cut(tmp_path: Path) -> None:
    path = small(tmp_path / "i.zarr")
    annotate(path, "train", labels=np.zeros(8), classes=["x" * 10**6])
    zarr.open_group(str(path), mode="r+").attrs["remarks"] = ["y" * 10**6] * 4
    with serving(path) as server:
        for question in ("summary", "convergence", "test?index=0", "suspects", "set"):
            answer = ask(server, f"/api/{question}")
            assert answer.status == 200 and len(answer.body) < 2**20, question


def test_metadata_that_link_out_of_the_result_are_not_read(tmp_path: Path) -> None:
    path = small(tmp_path / "i.zarr")
    metadata = path / "train_total/zarr.json"
    (tmp_path / "elsewhere.json").write_bytes(metadata.read_bytes())
    metadata.unlink()
    metadata.symlink_to(tmp_path / "elsewhere.json")
    with serving(path) as server:
        answer = ask(server, "/api/suspects")
        assert answer.status == 422 and "leads out of the result" in answer.json()["error"]


@pytest.mark.parametrize(
    ("host", "let_in", "refused"),
    [
        (
            "0.0.0.0",
            ["127.0.0.1", "192.0.2.7", "[::1]", socket.gethostname(), "my.name"],
            ["evil.example", "1.2.3.4.evil"],
        ),
        ("127.0.0.1", ["127.0.0.1", "localhost", "my.name"], ["192.0.2.7", "evil.example", "0.0.0.0"]),
        ("::1", ["[::1]", "localhost", "my.name"], ["192.0.2.7", "evil.example"]),
        ("::", ["[::1]", "[2001:db8::1]", "192.0.2.7", socket.gethostname()], ["evil.example", "[::1", "[evil]"]),
    ],
)
def test_it_is_called_what_others_may_call_it(tmp_path: Path, host: str, let_in: list[str], refused: list[str]) -> None:
    if ":" in host and not can_ipv6():
        pytest.skip("this machine has no IPv6")
    server = BrowseServer(ResultApi(open_influences(small(tmp_path / "i.zarr"))), host, names=["my.name"])
    try:
        assert [name for name in let_in if not server.is_called(f"{name}:{server.port}")] == []
        assert [name for name in refused if server.is_called(f"{name}:{server.port}")] == []
        assert not server.is_called(f"{let_in[0]}:1") and not server.is_called(let_in[0])
        name, _, token = server.url.removeprefix("http://").partition(f":{server.port}/?token=")
        assert token == server.token and server.is_called(f"{name}:{server.port}")
        assert name == {"0.0.0.0": socket.gethostname(), "::": socket.gethostname(), "::1": "[::1]"}.get(host, host)
    finally:
        server._socket.close()


def can_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_who_listens_to_all_is_answered_from_another_address(tmp_path: Path) -> None:
    with serving(small(tmp_path / "i.zarr"), host="0.0.0.0") as server:
        connection = http.client.HTTPConnection("127.0.0.2", server.port, timeout=60)
        connection.request("GET", f"/api/summary?token={server.token}")
        assert connection.getresponse().status == 200
        connection.close()


@pytest.mark.parametrize("token", ["short", "x" * 201, "with spaces in it, and more", "ümlaut-and-something"])
def test_a_token_that_could_be_guessed_or_does_not_fit_is_refused(tmp_path: Path, token: str) -> None:
    api = ResultApi(open_influences(small(tmp_path / "i.zarr")))
    with pytest.raises(SettingError, match="`token` must be 16 to 200"):
        BrowseServer(api, token=token)


def test_a_link_is_kept_for_its_owner_alone_and_only_for_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert kept_link("/a/result.zarr") is None
    keep_link("/a/result.zarr", Link(4711, "a-token-of-some-length"))
    assert kept_link("/a/result.zarr") == Link(4711, "a-token-of-some-length")
    assert kept_link("/b/result.zarr") is None
    (file,) = (tmp_path / "state/distinfluence/browse").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
    for torn in ("", "{}", "[]", '{"port": 0, "token": "a-token-of-some-length"}', '{"port": 80, "token": "short"}'):
        file.write_text(torn)
        assert kept_link("/a/result.zarr") is None
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/nowhere")
    keep_link("/a/result.zarr", Link(4711, "a-token-of-some-length"))  # nothing is kept, and nothing is raised


def test_the_next_start_has_the_same_link_unless_a_new_one_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    api = ResultApi(open_influences(small(tmp_path / "i.zarr")))

    def started(port: int | None = None, token: str | None = None, new: bool = False) -> tuple[int, str]:
        server = _listening(api, "127.0.0.1", port, token, (), new)
        server._socket.close()
        return server.port, server.token

    first = started()
    assert started() == first
    assert started(token="a-token-of-my-own-choice")[1] == "a-token-of-my-own-choice"
    assert started() == first
    with socket.create_server(("127.0.0.1", first[0])):  # taken by another page of this result
        assert started()[0] != first[0]
        with pytest.raises(SettingError, match="cannot be listened on"):
            started(port=first[0])
    assert started(new=True)[1] != first[1]


def test_a_set_of_test_points_is_ranked_by_its_mean(tmp_path: Path) -> None:
    path = tmp_path / "i.zarr"
    writer = InfluenceWriter.create(path, Layout(70, 40, 16), {})
    values = np.random.default_rng(0).standard_normal((70, 40)).astype(np.float32)
    for i in range(3):
        writer.write_strip(
            i, values[:, writer.layout.strip_slice(i)], gradient_norm=np.ones(len(values[0][i * 16 :][:16]))
        )
    writer.write_test(slice(0, 70), error_bound=np.arange(70.0))
    writer.finish()
    of_test, of_train = np.arange(70) % 3, np.arange(40) % 4
    annotate(path, "test", labels=of_test, classes=["a", "b", "c"])
    annotate(path, "train", labels=of_train)
    with serving(path) as server:
        for query, rows in (
            ("tests=5:50", np.arange(5, 50)),
            ("class=1", np.flatnonzero(of_test == 1)),
            ("", np.arange(70)),
        ):
            found = ask(server, f"/api/set?{query}&k=3").json()
            means = values[rows].mean(axis=0, dtype=np.float64)
            for end, order in (("helpful", np.argsort(-means)), ("harmful", np.argsort(means))):
                assert [point["index"] for point in found[end]] == order[:3].tolist()
                assert [point["value"] for point in found[end]] == pytest.approx(means[order[:3]], rel=1e-5)
            assert found["n"] == rows.size and found["helpful"][0]["bound"] == pytest.approx(rows.mean())
        among = ask(server, "/api/set?class=2&among=3&k=500").json()
        assert {point["index"] for point in among["helpful"]} == set(range(3, 40, 4))
        assert among["names"] == {"of": "c", "among": "3"}
        table = ask(server, "/api/classes").json()["values"]
        expected = [[values[of_test == a][:, of_train == b].mean() for b in range(4)] for a in range(3)]
        np.testing.assert_allclose(table, expected, rtol=1e-4, atol=1e-6)


def test_sets_of_a_damaged_result_leave_out_what_is_damaged(tmp_path: Path) -> None:
    path = small(tmp_path / "i.zarr")
    annotate(path, "test", labels=[0, 0, 1])
    annotate(path, "train", labels=np.zeros(8))
    content = bytearray((path / "influences/c/0/1").read_bytes())
    content[10] ^= 1
    (path / "influences/c/0/1").write_bytes(content)
    with serving(path) as server:
        found = ask(server, "/api/set?tests=0:2&k=8").json()
        assert found["damaged"] == [1] and {point["index"] for point in found["helpful"]} == {0, 1, 2, 3}
        assert ask(server, "/api/classes").json()["damaged"] == [1]


def test_a_report_says_what_is_damaged(tmp_path: Path) -> None:
    path = small(tmp_path / "i.zarr")
    content = bytearray((path / "influences/c/0/1").read_bytes())
    content[10] ^= 1
    (path / "influences/c/0/1").write_bytes(content)
    shutil.rmtree(path / "top_index/c")
    write_report(ResultApi(open_influences(path)), tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "Strips 1 of the matrix are damaged" in text and "grey is not computed or damaged" in text
    assert text.count("<h2>Test point") == 3 and text.count('<p class="damaged">') == 4  # each ranking says so too


def test_a_report_of_an_unfinished_and_of_an_empty_result_says_how_far_it_is(tmp_path: Path) -> None:
    writer = InfluenceWriter.create(tmp_path / "i.zarr", Layout(3, 8, 4), {})
    write_report(ResultApi(open_influences(writer.path)), tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "Nothing is computed yet" in text and "0 of 2 strips" in text and "<img" not in text
    writer.write_strip(0, np.ones((3, 4)))
    write_report(ResultApi(open_influences(writer.path)), tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "1 of 2 strips" in text and "training 3" in text and "training 4" not in text and 'damaged">' not in text


def test_a_report_of_influences_of_inputs_is_refused(tmp_path: Path) -> None:
    InfluenceWriter.create(tmp_path / "p.zarr", Layout(2, 4, 2, input_shape=(3,)), {})
    with pytest.raises(ShapeError, match="`export` wants one number"):
        write_report(ResultApi(open_influences(tmp_path / "p.zarr")), tmp_path / "r.html")
