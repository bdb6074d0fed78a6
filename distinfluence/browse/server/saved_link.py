"""Where the page of a result is found again: its port and its token, kept for the user alone, so that links last.

A file for each result, readable by its owner only, in the folder where programs keep their state ($XDG_STATE_HOME, or
~/.local/state); never with the result, which others may read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from distinfluence.atomic import appearing
from distinfluence.errors import SettingError

_TOKEN = re.compile(r"[A-Za-z0-9_-]{16,200}", re.ASCII)


@dataclass(frozen=True)
class Link:
    """Holds the address of a server.

    Attributes:
        port: The port; 0 takes a free one.
        token: The token that a request must know.
    """

    port: int
    token: str


def new_token() -> str:
    """Return 192 random bits as text."""
    return secrets.token_urlsafe(24)


def checked_token(token: str) -> str:
    """Return a token of the user's own.

    Raises:
        SettingError: The token could be guessed, or does not fit an address.
    """
    if not _TOKEN.fullmatch(token):
        raise SettingError(
            f"`token` must be 16 to 200 letters, digits, - or _, got {len(token)} characters. Leave it out for a "
            "random one."
        )
    return token


def kept_link(result: str) -> Link | None:
    """Return what was kept for the result at this path or URL; None if there is nothing, or nothing sound."""
    try:
        found = json.loads(_file(result).read_text(encoding="utf-8"))
        link = Link(int(found["port"]), checked_token(found["token"]))
    except (OSError, ValueError, LookupError, TypeError, SettingError):
        return None
    return link if 0 < link.port < 2**16 else None


def keep_link(result: str, link: Link) -> None:
    """Keep it, readable by its owner only; in a home that cannot be written to, links end with the server."""
    file = _file(result)
    with contextlib.suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with appearing(file) as partial:
            partial.touch(mode=0o600, exist_ok=False)
            partial.write_text(json.dumps(asdict(link)), encoding="utf-8")


def _file(result: str) -> Path:
    home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    name = hashlib.sha256(result.encode("utf-8", errors="surrogateescape")).hexdigest()[:32]
    return Path(home).expanduser() / "distinfluence" / "browse" / f"{name}.json"
