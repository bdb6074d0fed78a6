"""Looking at a result: tables, plots, one file of HTML to send, and a page in the browser.

Loads nothing by itself: the command line asks for `browse.commands` to print its help, and must not wait for the rest.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distinfluence.browse.views.rendering import Drawable, PointSource, Renderer, Tokens

__all__ = ["Drawable", "PointSource", "Renderer", "Tokens"]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(import_module("distinfluence.browse.views.rendering"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
