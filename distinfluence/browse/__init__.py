"""Looking at a result: tables, plots, one file of HTML to send, and a page in the browser.

Imports nothing: the command line asks for `browse.commands` to print its help, and must not wait for the rest.
"""

__all__: list[str] = []
