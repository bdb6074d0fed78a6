"""The page's server: tornado on this machine's loopback, one result, read-only.

There are no paths to walk: a request names one of a few questions, and whole numbers. Every request must carry the
token (once in the address, from then on in a cookie) and the name of this machine; what is sent back may run no script
but the page's own. Questions are answered by threads, so that a slow disk does not stop the page.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import secrets
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import tornado.httpserver
import tornado.web

from distinfluence.browse.api import ResultApi
from distinfluence.errors import DistinfluenceError, SettingError

_log = logging.getLogger(__name__)
_PAGE = {
    "": ("index.html", "text/html"),
    "page.js": ("page.js", "text/javascript"),
    "page.css": ("page.css", "text/css"),
}
_WHOLE = re.compile(r"-?\d{1,12}", re.ASCII)
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


class BrowseServer:
    """Serves one result. `url`: where, with the token. Start and stop it within a running event loop.

    host: the address to listen on; another than 127.0.0.1 lets whoever has the token see the result. port: 0 takes a
    free one. Raises SettingError if the port is taken.
    """

    def __init__(self, api: ResultApi, host: str = "127.0.0.1", port: int = 0, token: str | None = None) -> None:
        self.api = api
        self.token = secrets.token_urlsafe(24) if token is None else token
        self.host = host
        try:
            self._socket = socket.create_server((host, port), backlog=64)  # closes itself if it cannot
        except (OSError, OverflowError) as error:
            raise SettingError(
                f"`host` {host} and `port` {port} cannot be listened on: {error}. Take others."
            ) from error
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]
        self.hosts = {f"{name}:{self.port}" for name in (*LOOPBACK, host)}
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="browse")
        self._server: tornado.httpserver.HTTPServer | None = None

    @property
    def url(self) -> str:
        """The address of the page with the token."""
        name = self.host if self.host != "0.0.0.0" else "127.0.0.1"
        return f"http://{name}:{self.port}/?token={self.token}"

    def start(self) -> None:
        """Listen, from the running event loop."""
        self._server = tornado.httpserver.HTTPServer(
            tornado.web.Application(
                [(r"/([a-z.]*)", PageHandler, {"server": self}), (r"/api/([a-z-]+)", ApiHandler, {"server": self})],
                default_handler_class=NothingHandler,
                default_handler_args={"server": self},
                log_function=lambda handler: None,
            ),
            max_buffer_size=2**16,
            max_header_size=2**14,
        )
        self._server.add_socket(self._socket)

    async def stop(self) -> None:
        """Close the port and wait for what is being answered."""
        if self._server is not None:
            self._server.stop()
            await self._server.close_all_connections()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def ask(self, question: Callable[[], Any]) -> Any:
        """Answer in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, question)


class GuardedHandler(tornado.web.RequestHandler):
    """Lets in who names this machine and has the token; every answer forbids other scripts, frames and guesses."""

    def initialize(self, server: BrowseServer) -> None:
        """The server, whose token and names count."""
        self.server = server

    def set_default_headers(self) -> None:
        """Safe ones, also with errors."""
        self.clear_header("Server")
        for name, value in {
            "Content-Security-Policy": _POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }.items():
            self.set_header(name, value)

    def prepare(self) -> None:
        """Refuse, before anything is looked at."""
        # A page of another site whose name was made to point here would be let in without this (DNS rebinding).
        if self.request.host.lower() not in self.server.hosts:
            raise tornado.web.HTTPError(403, reason="This server is not called that")
        if self.request.method not in ("GET", "HEAD"):
            raise tornado.web.HTTPError(405)
        given = self.get_query_argument("token", "") or self.get_cookie(self.cookie) or ""
        if not hmac.compare_digest(given.encode(), self.server.token.encode()):
            raise tornado.web.HTTPError(403, reason="The token is missing or wrong")

    @property
    def cookie(self) -> str:
        """One per port, as browsers share cookies between ports."""
        return f"distinfluence-{self.server.port}"

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """As JSON, which no browser runs."""
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps({"error": f"{self._reason}. Open the address that `distinfluence browse` printed."}))


class NothingHandler(GuardedHandler):
    """All other addresses."""

    def get(self) -> None:
        """There is nothing."""
        raise tornado.web.HTTPError(404)


class PageHandler(GuardedHandler):
    """The page, its style and its script: three files, by name."""

    def get(self, name: str) -> None:
        """A file of the page; the token moves from the address into a cookie."""
        if self.get_query_argument("token", ""):
            self.set_cookie(self.cookie, self.server.token, httponly=True, samesite="Strict", path="/")
            self.redirect("/" + name)  # the browser keeps the fragment, and its history does not keep the token
            return
        if name not in _PAGE:
            raise tornado.web.HTTPError(404)
        file, kind = _PAGE[name]
        self.set_header("Content-Type", f"{kind}; charset=utf-8")
        self.finish(resources.files("distinfluence.browse").joinpath("page", file).read_bytes())


class ApiHandler(GuardedHandler):
    """The questions of the page."""

    async def get(self, name: str) -> None:
        """JSON, or the cells of a picture."""
        if self.request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            raise tornado.web.HTTPError(403, reason="Asked from another site")
        try:
            if name == "picture":
                await self._picture()
            else:
                self._json(await self.server.ask(self._question(name)))
        except DistinfluenceError as error:
            self.set_status(422)
            self._json({"error": str(error)})
        except tornado.web.HTTPError:
            raise
        except Exception:
            # a defect, or a store so odd that no check foresaw it: the page goes on, the terminal has the trace
            _log.exception("cannot answer %s", urlsplit(self.request.uri or "").path)
            self.set_status(500)
            self._json(
                {"error": "This cannot be shown; the terminal says why. `distinfluence info --check` reads all."}
            )

    def _question(self, name: str) -> Callable[[], Any]:
        api = self.server.api
        if name == "cell":
            rows, columns, orders = self._window("rows"), self._window("columns"), self._orders()
            return lambda: api.cell(rows, columns, orders)
        if name in ("test", "train"):
            index, k = self._whole("index"), self._whole("k", 8)
            return lambda: api.test_point(index, k) if name == "test" else api.train_point(index, k)
        if name == "suspects":
            by, k = self.get_query_argument("by", "net_harm"), self._whole("k", 60)
            return lambda: api.suspects(by, k)
        plain: Mapping[str, Callable[[], Any]] = {
            "summary": api.summary,
            "convergence": api.convergence,
            "traffic": lambda: {"bytes_read": api.bytes_read},
        }
        if name not in plain:
            raise tornado.web.HTTPError(404)
        return plain[name]

    async def _picture(self) -> None:
        rows, columns, orders = self._window("rows"), self._window("columns"), self._orders()
        height, width = self._whole("height"), self._whole("width")
        picture = await self.server.ask(lambda: self.server.api.picture(rows, columns, height, width, orders))
        about = {"shape": picture.values.shape, "block": picture.block, "damaged": picture.damaged[:100]}
        self.set_header("Content-Type", "application/octet-stream")
        self.set_header("X-Picture", json.dumps(about))
        self.finish(np.ascontiguousarray(picture.values, dtype="<f4").tobytes())

    def _json(self, value: Any) -> None:
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps(value, default=str))

    def _whole(self, name: str, default: int | None = None) -> int:
        text = self.get_query_argument(name, "" if default is None else str(default))
        if not _WHOLE.fullmatch(text):
            raise SettingError(f"`{name}` must be a whole number, got {text[:40]!r}.")
        return int(text)

    def _window(self, name: str) -> slice:
        start, colon, stop = self.get_query_argument(name, "").partition(":")
        if not (colon and _WHOLE.fullmatch(start) and _WHOLE.fullmatch(stop)):
            raise SettingError(f"`{name}` must be a range as 0:100, got {start[:40] + colon + stop[:40]!r}.")
        return slice(int(start), int(stop))

    def _orders(self) -> tuple[str, str]:
        return self.get_query_argument("row-order", "stored"), self.get_query_argument("column-order", "stored")
