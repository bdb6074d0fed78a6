"""Looking at a result: tables, plots, one file of HTML to send, and a page in the browser."""

from distinfluence.browse.api import ResultApi
from distinfluence.browse.rendering import PointSource, Shown

__all__ = ["PointSource", "ResultApi", "Shown"]
