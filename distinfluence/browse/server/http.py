"""The page's server: tornado on this machine's loopback, one result, read-only.

There are no paths to walk: a request names one of a few questions, and whole numbers. Every request must carry the
token (once in the address, from then on in a cookie) and the name of this machine; what is sent back may run no script
but the page's own. Questions are answered by threads, so that a slow disk does not stop the page.

The chunks are read here and not by a zarr reader in the page: checksums are compared, links, sizes and codecs are
guarded and bytes are counted in one place for every reader, no file of the result is ever served, and the page needs no
foreign code. The price is a picture sent for each view, in half precision and packed: at most 1.7 MB.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import re
import socket
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

import tornado.httpserver
import tornado.web

from distinfluence.browse.server.api import ResultApi
from distinfluence.browse.server.saved_link import checked_token, new_token
from distinfluence.browse.views.picture import packed
from distinfluence.errors import DistinfluenceError, SettingError

_log = logging.getLogger(__name__)
_SCRIPTS = (
    *("page", "address", "dom", "cards", "matrix", "paint", "axes", "point", "sets", "classes", "suspects"),
    *("provenance", "saliency", "share"),
)
_PAGE = {
    "": ("index.html", "text/html"),
    "page.css": ("page.css", "text/css"),
    **{f"{name}.js": (f"{name}.js", "text/javascript") for name in _SCRIPTS},
}
_PACKED = 2**10  # bytes from which an answer is compressed
_DAYS = 90  # that a browser keeps the token, so that a bookmark opens tomorrow
_WHOLE = re.compile(r"-?\d{1,12}", re.ASCII)
_NUMBER = re.compile(r"-?\d{1,12}(\.\d{1,20})?", re.ASCII)
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_NO_TOKEN, _OTHER_NAME = "The token is missing or wrong", "This server is not called that"
_ADVICE = {
    _NO_TOKEN: "Open the whole address that `distinfluence browse` printed, or that `copy link` on the page copied: "
    "it ends in the token. Run `distinfluence browse` again to have it printed.",
    _OTHER_NAME: "Open the address that `distinfluence browse` printed; start it with --name to call it otherwise.",
}
_ERROR_PAGE = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
    "<title>Not shown</title><h1>{reason}</h1><p>{advice}</p></html>\n"
)
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


class BrowseServer:
    """Serve one result at `url`, which holds the token. Start and stop it within a running event loop.

    Args:
        api: Questions about the result.
        host: The address to listen on, IPv4 or IPv6; any but loopback lets whoever has the token see the result.
        port: The port; 0 takes a free one.
        token: The token of requests; random by default.
        names: Other names by which browsers call this machine.

    Raises:
        SettingError: The port is taken, the host cannot be listened on, or the token could be guessed.
    """

    def __init__(
        self,
        api: ResultApi,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self.api = api
        self.token = new_token() if token is None else checked_token(token)
        self.host = host.strip("[]")
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            # closes itself if it cannot
            self._socket = socket.create_server((self.host, port), family=family, backlog=64)
        except (OSError, OverflowError) as error:
            raise SettingError(
                f"`host` {host} and `port` {port} cannot be listened on: {error}. Take others."
            ) from error
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]
        self.is_local = is_loopback(self.host)
        own = LOOPBACK if self.is_local else (*LOOPBACK, socket.gethostname(), socket.getfqdn())
        self.hosts = {f"{name.lower()}:{self.port}" for name in (*own, _bracketed(self.host), *names)}
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="browse")
        self._server: tornado.httpserver.HTTPServer | None = None

    @property
    def url(self) -> str:
        """The address of the page with the token."""
        everywhere = self.host in ("0.0.0.0", "::")  # noqa: S104  # recognised here, never chosen
        return f"http://{socket.gethostname() if everywhere else _bracketed(self.host)}:{self.port}/?token={self.token}"

    def is_called(self, host: str) -> bool:
        """Whether `host`, name and port as a browser sends them, is this server.

        A page of another site whose name was made to point here would be let in without this (DNS rebinding). No site
        can have an address as its name, so that addresses are let in where others are.
        """
        if host.lower() in self.hosts:
            return True
        address, colon, port = host.rpartition(":")
        if self.is_local or not colon or port != str(self.port):
            return False
        try:
            if address.startswith("[") and address.endswith("]"):
                ipaddress.IPv6Address(address[1:-1])
            else:
                ipaddress.IPv4Address(address)
        except ValueError:
            return False
        return True

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
        """Keep the server, whose token and names count."""
        self.server = server

    def set_default_headers(self) -> None:
        """Set safe headers, also with errors."""
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
        if not self.server.is_called(self.request.host):
            raise tornado.web.HTTPError(403, reason=_OTHER_NAME)
        if self.request.method not in ("GET", "HEAD"):
            raise tornado.web.HTTPError(405)
        given = self.get_query_argument("token", "") or self.get_cookie(self.cookie) or ""
        if not hmac.compare_digest(given.encode(), self.server.token.encode()):
            raise tornado.web.HTTPError(403, reason=_NO_TOKEN)

    @property
    def cookie(self) -> str:
        """One per port, as browsers share cookies between ports."""
        return f"distinfluence-{self.server.port}"

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Send text where a browser asks for a page, else JSON, which no browser runs."""
        advice = _ADVICE.get(self._reason, "Open the address that `distinfluence browse` printed.")
        if "text/html" in self.request.headers.get("Accept", ""):
            self.set_header("Content-Type", "text/html; charset=utf-8")
            self.finish(_ERROR_PAGE.format(reason=escape(self._reason), advice=escape(advice)))
            return
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps({"error": f"{self._reason}. {advice}"}))

    def send(self, content: bytes) -> None:
        """Send the answer, packed if that is worth it and the browser can unpack."""
        if len(content) >= _PACKED and "gzip" in self.request.headers.get("Accept-Encoding", ""):
            packer = zlib.compressobj(1, wbits=31)
            content = packer.compress(content) + packer.flush()
            self.set_header("Content-Encoding", "gzip")
        self.finish(content)


class NothingHandler(GuardedHandler):
    """All other addresses."""

    def get(self) -> None:
        """Answer that there is nothing."""
        raise tornado.web.HTTPError(404)


class PageHandler(GuardedHandler):
    """The page, its style and its script: three files, by name."""

    def get(self, name: str) -> None:
        """Send a file of the page; the token moves from the address into a cookie."""
        if self.get_query_argument("token", ""):
            # Lax, as a link in a chat or a mail on the web must open: GET is all there is, and changes nothing.
            self.set_cookie(self.cookie, self.server.token, httponly=True, samesite="Lax", path="/", expires_days=_DAYS)
            self.redirect("/" + name)  # the browser keeps the fragment, and its history does not keep the token
            return
        if name not in _PAGE:
            raise tornado.web.HTTPError(404)
        file, kind = _PAGE[name]
        self.set_header("Content-Type", f"{kind}; charset=utf-8")
        self.send(resources.files("distinfluence.browse").joinpath("page", file).read_bytes())


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
        plain: Mapping[str, Callable[[], Any]] = {
            "summary": api.summary,
            "convergence": api.convergence,
            "traffic": lambda: {"bytes_read": api.bytes_read},
            "link": lambda: {"token": self.server.token},  # for who has it already, to pass on
        }
        if name in plain:
            return plain[name]
        with_parameters = {
            "cell": self._cell,
            "pair": self._pair,
            "test": self._point,
            "train": self._point,
            "set": self._set,
            "classes": self._classes,
            "saliency": self._saliency,
            "suspects": self._suspects,
        }
        if name not in with_parameters:
            raise tornado.web.HTTPError(404)
        return with_parameters[name](api, name)

    def _cell(self, api: ResultApi, name: str) -> Callable[[], Any]:
        rows, columns, orders = self._window("rows"), self._window("columns"), self._orders()
        return lambda: api.cell(rows, columns, orders)

    def _pair(self, api: ResultApi, name: str) -> Callable[[], Any]:
        test, train, orders = self._whole("test"), self._whole("train"), self._orders()
        return lambda: api.pair(test, train, orders)

    def _point(self, api: ResultApi, name: str) -> Callable[[], Any]:
        index, k = self._whole("index"), self._whole("k", 8)
        return lambda: api.test_point(index, k) if name == "test" else api.train_point(index, k)

    def _set(self, api: ResultApi, name: str) -> Callable[[], Any]:
        tests = self._window("tests") if self.get_query_argument("tests", "") else None
        of, among, k = self._label("class"), self._label("among"), self._whole("k", 8)
        return lambda: api.test_set(tests, of, among, k)

    def _classes(self, api: ResultApi, name: str) -> Callable[[], Any]:
        everything = self._whole("all", 0) == 1
        return lambda: api.class_table(everything)

    def _saliency(self, api: ResultApi, name: str) -> Callable[[], Any]:
        test, train, k = self._whole("test"), self._whole("train"), self._whole("k", 12)
        return lambda: api.saliency(test, train, k)

    def _suspects(self, api: ResultApi, name: str) -> Callable[[], Any]:
        by, k = self.get_query_argument("by", "net_harm"), self._whole("k", 60)
        return lambda: api.suspects(by, k)

    async def _picture(self) -> None:
        rows, columns, orders = self._window("rows"), self._window("columns"), self._orders()
        height, width = self._whole("height"), self._whole("width")
        picture = await self.server.ask(lambda: self.server.api.picture(rows, columns, height, width, orders))
        shares, scale = packed(picture.values)
        about = {"shape": shares.shape, "block": picture.block, "damaged": picture.damaged[:100], "scale": scale}
        self.set_header("Content-Type", "application/octet-stream")
        self.set_header("X-Picture", json.dumps(about))
        self.send(shares.tobytes())

    def _json(self, value: Any) -> None:
        self.set_header("Content-Type", "application/json")
        self.send(json.dumps(value, default=str).encode())

    def _label(self, name: str) -> float | None:
        text = self.get_query_argument(name, "")
        if text and not _NUMBER.fullmatch(text):
            raise SettingError(f"`{name}` must be the number of a label, got {text[:40]!r}.")
        return float(text) if text else None

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


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
