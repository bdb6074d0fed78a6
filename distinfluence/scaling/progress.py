"""Progress of a run: a bar on a terminal, a line every few seconds elsewhere, and the seconds of each stage."""

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

LINE_SECONDS = 10.0


class Bar:
    """Progress of one stage."""

    def __init__(self, name: str, total: int | None, unit: str, show: bool) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.count = 0
        self._note = ""
        self._printed: tuple[int, str] | None = None
        self._start = self._last = time.monotonic()
        self._lines = show and not sys.stderr.isatty()
        self._bar = tqdm(desc=name, total=total, unit=f" {unit}", disable=not (show and sys.stderr.isatty()))

    def advance(self, n: int = 1) -> None:
        """n more are done."""
        self.count += n
        self._bar.update(n)
        self._line()

    def note(self, text: str) -> None:
        """A word beside the bar, such as the number of passes."""
        self._note = text
        self._bar.set_postfix_str(text)
        self._line()

    def close(self) -> None:
        """End of the stage."""
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
        elapsed = time.monotonic() - self._start
        print(f"{self.name}: {done}{note}{elapsed:.1f} s", file=sys.stderr, flush=True)


class Progress:
    """The stages of a run. show: whether to print; seconds: stage → wall time, of those that have ended."""

    def __init__(self, show: bool = True) -> None:
        self.show = show
        self.seconds: dict[str, float] = {}

    def say(self, text: str) -> None:
        """A line that people should read, above the bar if there is one."""
        if self.show:
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()

    def warn(self, text: str) -> None:
        """What people should know even of a run that says nothing: then a warning of Python's."""
        if self.show:
            self.say(f"warning: {text}")
        else:
            warnings.warn(text, RuntimeWarning, stacklevel=3)

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str) -> Iterator[Bar]:
        """A stage with its bar; its time is kept also when it fails."""
        bar = Bar(name, total, unit, self.show)
        start = time.perf_counter()
        try:
            yield bar
        finally:
            bar.close()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
