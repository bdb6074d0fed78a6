"""Progress of a run: a bar on a terminal, a line every few seconds elsewhere, and the seconds of each stage.

A run that writes a result also leaves a sign of life next to it, see `distinfluence.store.run_state`.
"""

import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from distinfluence.store.format.remote import RemoteFolder
from distinfluence.store.run_state import HEARTBEAT_SECONDS, RunState, manifest_file, pace_of, write_state

LINE_SECONDS = 10.0
NOTE_SECONDS = 0.1  # Between two notes that a terminal shows.


class Bar:
    """Progress of one stage."""

    def __init__(self, name: str, total: int | None, unit: str, show: bool) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.count = 0
        self._note = ""
        self._printed: tuple[int, str] | None = None
        self._start = self._last = time.monotonic()
        self._noted = -NOTE_SECONDS
        self._lines = show and not sys.stderr.isatty()
        self._bar = tqdm(desc=name, total=total, unit=f" {unit}", disable=not (show and sys.stderr.isatty()))

    def advance(self, n: int = 1) -> None:
        """Count n more as done."""
        self.count += n
        self._bar.update(n)
        self._line()

    def note(self, text: str) -> None:
        """Show a word next to the bar, such as the number of passes."""
        self._note = text
        if time.monotonic() - self._noted >= NOTE_SECONDS:
            self._noted = time.monotonic()
            self._bar.set_postfix_str(text)
        self._line()

    def close(self) -> None:
        """End the stage."""
        self._bar.set_postfix_str(self._note, refresh=False)
        self._bar.close()
        if self._lines and self._printed != (self.count, self._note):
            self._print()

    def _line(self) -> None:
        if self._lines and time.monotonic() - self._last >= LINE_SECONDS:
            self._last = time.monotonic()
            self._print()

    def _print(self) -> None:
        self._printed = (self.count, self._note)
        of = "" if self.total is None else f" of {self.total}"
        unit = "pass" if (self.count, of, self.unit) == (1, "", "passes") else self.unit
        done = f"{self.count}{of} {unit}, " if self.count or of else ""  # nothing is counted in some stages
        note = f"{self._note}, " if self._note else ""
        pace = pace_of(self.count, self.total, self.elapsed)
        line = f"{self.name}: {done}{note}{f'{pace}, ' if pace else ''}{self.elapsed:.1f} s"
        print(line, file=sys.stderr, flush=True)

    @property
    def elapsed(self) -> float:
        """Seconds since the stage began."""
        return time.monotonic() - self._start


class Progress:
    """The stages of a run, shown as progress bars, or as lines where standard error is not a terminal.

    Args:
        show: Whether to print.

    Attributes:
        seconds: Wall time of each stage that has ended, by its name.
    """

    def __init__(self, show: bool = True) -> None:
        self.show = show
        self.seconds: dict[str, float] = {}
        self._file: Path | None = None
        self._state = RunState.here()
        self._bar: Bar | None = None
        self._one_at_a_time = threading.Lock()

    @contextmanager
    def beside(self, output: Path | str | RemoteFolder, part: str = "") -> Iterator[None]:
        """Say in a file next to the output what the run is doing, until it ends; the file stays if it ends badly.

        Within another such block, the file of the outer block goes on.

        Args:
            output: The result's folder. Behind a URL there is no such file.
            part: Name of the part that this process makes, where several processes share a result.

        Yields:
            Nothing.
        """
        if self._file is not None or not isinstance(output, Path):
            yield
            return
        self._file, self._state = manifest_file(output, part), RunState.here(part)
        ended = threading.Event()
        heart = threading.Thread(target=self._beat, args=(ended,), daemon=True)
        self._tell()
        heart.start()
        try:
            yield
        except BaseException as error:
            how = "failed" if isinstance(error, Exception) else "stopped"
            self._state = replace(self._state, ended=how, error=str(error))
            raise
        finally:
            ended.set()
            heart.join()
            self._tell()
            if not self._state.ended:
                with suppress(OSError):
                    self._file.unlink(missing_ok=True)
            self._file = None

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            self._tell()

    def _tell(self) -> None:
        bar = self._bar
        with self._one_at_a_time:
            if bar is not None:
                self._state = replace(
                    self._state, stage=bar.name, done=bar.count, total=bar.total, unit=bar.unit, seconds=bar.elapsed
                )
            self._state = replace(self._state, heard=time.time())
            if self._file is not None:
                write_state(self._file, self._state)

    def say(self, text: str) -> None:
        """Print a line that people should read, above the bar if there is one.

        Args:
            text: The line.
        """
        if self.show:
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()

    def warn(self, text: str) -> None:
        """Print what people should know; a run that prints nothing issues a Python warning instead.

        Args:
            text: The warning.
        """
        if self.show:
            self.say(f"warning: {text}")
        else:
            warnings.warn(text, RuntimeWarning, stacklevel=3)

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str) -> Iterator[Bar]:
        """Begin a stage, and end it with the block. Its time is kept also when it fails.

        Args:
            name: Name of the stage.
            total: Number of units in all; None if it is not known.
            unit: Name of the unit that is counted.

        Yields:
            The stage's bar.
        """
        bar = self._bar = Bar(name, total, unit, self.show)
        self._tell()
        start = time.perf_counter()
        try:
            yield bar
        finally:
            bar.close()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
