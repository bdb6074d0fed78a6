"""Results to look at, their pages, and a browser."""

import asyncio
import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from distinfluence.browse.server.api import ResultApi
from distinfluence.browse.server.http import BrowseServer
from distinfluence.browse.views.points import Axis
from distinfluence.browse.views.rendering import PointSource
from distinfluence.store import open_influences
from tests.browse import results

CHROMIUM = os.environ.get("DISTINFLUENCE_CHROMIUM", "/usr/bin/chromium")


@pytest.fixture(scope="session", autouse=True)
def _own_links(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Links of pages are not kept among the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits' result; copy it before changing it."""
    return made_once(tmp_path_factory, "digits/influences.zarr", results.digits)


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "wide/wide.zarr", results.wide)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A result that the first of the processes that share the tests makes for all."""
    base = factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    path.parent.mkdir(exist_ok=True)
    with (path.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (path.parent / "made").exists():
            make(path)
            (path.parent / "made").touch()
    return path


@pytest.fixture
def own_digits(digits: Path, tmp_path: Path) -> Path:
    """A copy of the digits' result, to be damaged."""
    return Path(shutil.copytree(digits, tmp_path / "digits.zarr"))


@contextmanager
def serving(
    path: Path, host: str = "127.0.0.1", sources: Mapping[Axis, PointSource] | None = None
) -> Iterator[BrowseServer]:
    """The page of the result at `path`, served by a thread of this process."""
    server = BrowseServer(ResultApi(open_influences(path), sources), host)
    loop = asyncio.new_event_loop()
    started = threading.Event()

    def serve() -> None:
        asyncio.set_event_loop(loop)
        server.start()
        loop.call_soon(started.set)
        loop.run_forever()
        loop.run_until_complete(server.stop())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    assert started.wait(60)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium; a machine that has none skips these tests, but CI does not.

    Not for the whole session: Playwright keeps an event loop running in this thread, where no other can run meanwhile.
    """
    if not Path(CHROMIUM).exists():
        if os.environ.get("CI"):
            pytest.fail(f"{CHROMIUM} is missing: .ci/run installs it")
        pytest.skip(f"no Chromium at {CHROMIUM}; install Debian's `chromium`, or set DISTINFLUENCE_CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    """A page that fails its test for any error or blocked thing on it."""
    context = chromium.new_context(viewport={"width": 1280, "height": 860}, accept_downloads=True)
    context.set_default_timeout(60_000)
    page = context.new_page()
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    page.troubles = troubles
    yield page
    context.close()
    assert not [trouble for trouble in troubles if "status of 422" not in trouble]


@pytest.fixture
def visit(page: Any, request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Open a result at a view and wait until it is shown; at the end a picture is kept where CI collects them."""
    with_servers: list[Any] = []

    def visit(path: Path, view: str = "") -> Any:
        manager = serving(path)
        server = manager.__enter__()
        with_servers.append(manager)
        page.server = server
        page.goto(server.url + view)
        page.wait_for_selector("body[data-shown]:not([data-shown=''])")
        return page

    yield visit
    kept = os.environ.get("DISTINFLUENCE_SCREENSHOTS")
    if kept:
        Path(kept).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(kept) / f"{request.node.name}.png"))
    page.goto("about:blank")
    for manager in with_servers:
        manager.__exit__(None, None, None)
