"""The shell's way to look at a result: `distinfluence browse`, `export` and `plot`."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import sys
import webbrowser
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, ParamSpec, Protocol

import click

from distinfluence.errors import DistinfluenceError, SettingError

if TYPE_CHECKING:
    from distinfluence.browse.server.api import ResultApi
    from distinfluence.browse.server.http import BrowseServer
    from distinfluence.browse.views.rendering import PointSource
    from distinfluence.store import InfluenceResult

P = ParamSpec("P")
_result = click.argument("path")  # a folder or a URL
_file = click.Path(path_type=Path, dir_okay=False)


class JobSources(Protocol):
    """Samples and labels of a job's data, for `--job`; a layer above this one knows jobs."""

    def __call__(
        self, job: Path, result: InfluenceResult, render: str | None, compared: bool
    ) -> Mapping[Literal["test", "train"], PointSource]:
        """Return the samples and labels of both axes.

        Args:
            job: The job file.
            result: The result that the job made.
            render: The renderer to use instead of the job's own, if any.
            compared: Read the data once and make sure that the result was made with them.
        """


def register(group: click.Group, sources: JobSources) -> None:
    """Add the commands to the command line."""
    for command in (browse, export, plot):
        group.add_command(command)
    group.context_settings["obj"] = sources


def condition(result: InfluenceResult, *, check: bool = False) -> str:
    """Return complete, running or damaged, and how far the result is.

    Args:
        result: The result.
        check: Read everything and compare the checksums.
    """
    from distinfluence.store.repair import Damage, find_damage

    damage = find_damage(result.path) if check else Damage(tuple(result.lost_strips()), ())
    if damage:
        return f"damaged: {damage}; `run JOB --resume --check` makes them again"
    done = f"{result.layout.n_strips - result.n_missing} of {result.layout.n_strips} strips"
    checked = ", every byte as it was written" if check else ""
    apart = "".join(f"; strip {i} was quarantined: {reason}" for i, reason in result.quarantined.items())
    return f"{'complete' if result.complete else 'running'}, {done}{checked}{apart}"


def _clean(command: Callable[P, None]) -> Callable[P, None]:
    """Show our errors as one message with status 1; anything else is a defect and keeps its trace."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except DistinfluenceError as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(1)

    return run


@click.command()
@_result
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others can be reached.")
@click.option("--name", "names", multiple=True, help="Another name that browsers call this machine by.")
@click.option(
    "--port",
    default=None,
    show_default="the last one, or a free one",
    type=click.IntRange(0, 65535),
    help="0: a free one.",
)
@click.option(
    "--token",
    envvar="DISTINFLUENCE_TOKEN",
    help="What a link must carry. By default a random one, kept for this result, so that links last.",
)
@click.option("--new-link", is_flag=True, help="A new port and token: links that were given away do not work any more.")
@click.option("--job", type=_file, help="Take samples and labels from the data of this job, as they are asked for.")
@click.option("--render", help="With --job, module:callable that makes of one input what is shown.")
@click.option("--trust", is_flag=True, help="With --job, do not read all data to compare them with the result's.")
@click.option(
    "--open/--no-open", "opened", default=None, help="Open a browser, or do not. By default, where there is one."
)
@click.pass_obj
@_clean
def browse(
    sources: JobSources | None,
    path: str,
    host: str,
    names: tuple[str, ...],
    port: int | None,
    token: str | None,
    new_link: bool,
    job: Path | None,
    render: str | None,
    trust: bool,
    opened: bool | None,
) -> None:
    """Look at the result at PATH on a page in the browser.

    The page is served by this machine to this machine, to whoever has the token in the address; nothing is loaded from
    a network. Ctrl-C ends it.
    """
    from distinfluence.browse.server.api import ResultApi
    from distinfluence.browse.server.http import is_loopback
    from distinfluence.store import open_influences

    if job is None and (render is not None or trust):
        raise SettingError("`--render` and `--trust` are about the data of a job: pass --job too.")
    result = open_influences(path)
    shown = None if job is None or sources is None else sources(job, result, render, not trust)
    server = _listening(ResultApi(result, shown), host, port, token, names, new_link)
    if not is_loopback(host):
        click.echo(f"note: {host} may be reached from other machines; the address below lets anyone in.", err=True)
    asyncio.run(_serve(server, _has_browser() if opened is None else opened))


def _listening(
    api: ResultApi, host: str, port: int | None, token: str | None, names: tuple[str, ...], new_link: bool
) -> BrowseServer:
    """Return a server on the port, and with the token, that this result had last, unless told otherwise."""
    from distinfluence.browse.server.http import BrowseServer
    from distinfluence.browse.server.saved_link import Link, keep_link, kept_link

    whose = str(api.result.path)
    kept = None if new_link else kept_link(whose)
    known = (kept.token if kept else None) if token is None else token
    try:
        server = BrowseServer(api, host, port if port is not None else kept.port if kept else 0, known, names)
    except SettingError:
        if port is not None or kept is None:
            raise
        server = BrowseServer(api, host, 0, known, names)  # the last one is taken, by another page of this result say
    if token is None:  # who passes one keeps it
        keep_link(whose, Link(server.port, server.token))
    return server


async def _serve(server: BrowseServer, opened: bool) -> None:
    stop = asyncio.Event()
    for each in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(each, stop.set)
    server.start()
    click.echo(server.url)  # not before: whoever reads it may connect, or press Ctrl-C, at once
    if opened:
        webbrowser.open(server.url)
    await stop.wait()
    await server.stop()


def _has_browser() -> bool:
    """Whether a window can be opened: without one, Python would start a browser of text in this terminal."""
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


@click.command()
@_result
@click.option("--csv", type=_file, help="Write the rankings, or a slice, as CSV.")
@click.option("--parquet", type=_file, help="The same as Parquet.")
@click.option("--html", type=_file, help="Write the highlights as one file of HTML, to send.")
@click.option("-k", type=click.IntRange(min=1), default=50, show_default=True, help="How many of each ranking.")
@click.option("--tests", default=":", show_default=True, help="Test points, as 0:100.")
@click.option("--trains", default=None, help="Training points, as 0:100: every entry of the slice instead of rankings.")
@click.option("--partial", is_flag=True, help="What is there of a result that is still running.")
@_clean
def export(
    path: str,
    csv: Path | None,
    parquet: Path | None,
    html: Path | None,
    k: int,
    tests: str,
    trains: str | None,
    partial: bool,
) -> None:
    """Write the rankings of the result at PATH, a slice of it, or its highlights to files.

    \b
      distinfluence export influences.zarr --csv top.csv -k 10
      distinfluence export influences.zarr --parquet slice.parquet --tests 0:100 --trains 0:5000
      distinfluence export influences.zarr --html highlights.html
    """
    from distinfluence.browse.export.html_report import write_report
    from distinfluence.browse.export.tables import entries, rankings, write_csv, write_parquet
    from distinfluence.browse.server.api import ResultApi
    from distinfluence.store import open_influences

    if csv is None and parquet is None and html is None:
        raise SettingError("`export` needs a file to write: pass --csv, --parquet or --html.")
    result = open_influences(path)
    rows = _range("--tests", tests, result.shape[0])
    columns = None if trains is None else _range("--trains", trains, result.shape[1])
    for file, write in ((csv, write_csv), (parquet, write_parquet)):
        if file is not None:
            tables = rankings(result, rows, k, partial) if columns is None else entries(result, rows, columns, partial)
            click.echo(f"{file}: {write(file, tables)} lines")
    if html is not None:
        write_report(ResultApi(result), html)
        click.echo(f"{html}: {html.stat().st_size} bytes")


@click.command()
@_result
@click.argument("file", type=_file)
@click.option("--what", type=click.Choice(["heatmap", "scores", "residuals"]), default="heatmap", show_default=True)
@_clean
def plot(path: str, file: Path, what: str) -> None:
    """Draw the result at PATH to the PNG file FILE: the matrix, the spectrum of its scores, or the residuals."""
    from distinfluence.browse.export.plots import plot as draw
    from distinfluence.store import open_influences

    draw(open_influences(path), what, file)
    click.echo(str(file))


def _range(name: str, text: str, n: int) -> slice:
    start, colon, stop = text.partition(":")
    try:
        if not colon:
            raise ValueError
        window = slice(int(start or 0), int(stop or n))
    except ValueError:
        raise SettingError(f"`{name}` must be a range as 0:100, got {text!r}.") from None
    if not 0 <= window.start < window.stop <= n:
        raise SettingError(f"`{name}` must be a range within 0:{n} that is not empty, got {text!r}.")
    return window
