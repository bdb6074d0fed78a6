"""What looking into 2000 x 1,000,000 influences (8 GB) costs: rows, columns, tiles, rankings, pictures of the page.

The last line of the result's table is the time from the navigation of a browser to the drawn matrix, without the start
of the browser. It needs Chromium.

Run: python -m tests.benchmarks.reading [--folder FOLDER] [--memmap]

The strips of the result are one file, linked 245 times, so that it takes 400 MB of disk. With --memmap, 8 GB of plain
float32 are written beside it, row by row as NumPy has them, and read the same way; the bytes of it are those of the
pages that are touched. Before each read the operating system is asked to forget the files.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from distinfluence.browse.server.api import ResultApi
from distinfluence.store import open_influences
from tests.browse.conftest import CHROMIUM, serving
from tests.browse.results import WIDE, wide, wide_strip

PAGE = 4096


def forget(path: Path) -> None:
    """Ask the operating system to drop these files from memory."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measured(path: Path, read: Callable[[], object]) -> float:
    """Seconds of one read from the disk."""
    forget(path)
    began = time.perf_counter()
    read()
    return time.perf_counter() - began


def from_result(path: Path) -> None:
    """The table of the result."""
    whole, stored = 4 * WIDE.n_test * WIDE.n_train, ("stored", "stored")
    questions: dict[str, Callable[[ResultApi], object]] = {
        "row": lambda api: api.result[777],
        "column": lambda api: api.result[:, 777_777],
        "tile 256 x 256": lambda api: api.result[512:768, 500_000:500_256],
        "top 50 of a row": lambda api: api.result.top(777, 50),
        "top 50 of a column": lambda api: api.result.top_for_train(777_777, 50),
        "page: first view": lambda api: (api.summary(), api.picture(slice(0, 2000), slice(0, 10**6), 416, 900, stored)),
        "page: a tenth": lambda api: api.picture(slice(0, 2000), slice(0, 10**5), 416, 900, stored),
        "page: 2000 x 2000": lambda api: api.picture(slice(0, 2000), slice(0, 2000), 416, 900, stored),
        "page: test point": lambda api: api.test_point(777, 8),
        "page: suspects": lambda api: api.suspects("net_harm", 60),
    }
    for name, ask in questions.items():
        api = ResultApi(open_influences(path))
        seconds = measured(path, lambda api=api, ask=ask: ask(api))  # type: ignore[misc]
        print(
            f"{name:20s} {1e3 * seconds:8.0f} ms {api.bytes_read / 1e6:9.2f} MB {100 * api.bytes_read / whole:8.4f} %"
        )


def in_a_browser(path: Path) -> None:
    """The time from navigation to the drawn matrix."""
    name = "page: in a browser"
    if not Path(CHROMIUM).exists():
        print(f"{name:20s} not measured: there is no {CHROMIUM}")
        return
    from playwright.sync_api import sync_playwright

    forget(path)
    with sync_playwright() as playwright, serving(path) as server:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        page.goto(server.url)
        page.wait_for_selector("#map[data-drawn]")
        drawn = page.evaluate("performance.getEntriesByName('matrix drawn')[0].startTime")
        read = server.api.bytes_read
        browser.close()
    whole = 4 * WIDE.n_test * WIDE.n_train
    print(f"{name:20s} {drawn:8.0f} ms {read / 1e6:9.2f} MB {100 * read / whole:8.4f} %")


def from_memmap(path: Path) -> None:
    """The table of plain float32."""
    values = wide_strip()
    matrix = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(WIDE.n_test, WIDE.n_train))
    for start in range(0, WIDE.n_test, 50):
        rows = np.tile(values[start : start + 50], (1, WIDE.n_strips))
        matrix[start : start + 50] = rows[:, : WIDE.n_train]
    matrix.flush()
    del matrix
    pages = {
        "row": 4 * WIDE.n_train,
        "column": PAGE * WIDE.n_test,
        "tile 256 x 256": 256 * PAGE,
        "top 50 of a row": 4 * WIDE.n_train,
        "top 50 of a column": PAGE * WIDE.n_test,
        "every 2222nd": PAGE * 416 * 900,
    }
    reads: dict[str, Callable[[np.ndarray], object]] = {
        "row": lambda m: m[777].copy(),
        "column": lambda m: m[:, 777_777].copy(),
        "tile 256 x 256": lambda m: m[512:768, 500_000:500_256].copy(),
        "top 50 of a row": lambda m: np.argpartition(m[777], -50)[-50:],
        "top 50 of a column": lambda m: np.argpartition(m[:, 777_777], -50)[-50:],
        "every 2222nd": lambda m: m[:: 2000 // 416, :: 10**6 // 900].copy(),
    }
    for name, read in reads.items():
        mapped = np.load(path, mmap_mode="r")
        seconds = measured(path, lambda mapped=mapped, read=read: read(mapped))  # type: ignore[misc]
        print(f"{name:20s} {1e3 * seconds:8.0f} ms {pages[name] / 1e6:9.2f} MB in pages")


def main() -> None:
    """Make, read, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="a temporary one if left out")
    parser.add_argument("--memmap", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        compare(options.folder or Path(temporary), options.memmap)


def compare(folder: Path, memmap: bool) -> None:
    """Both tables, from files in this folder."""
    path = folder / "wide.zarr"
    shutil.rmtree(path, ignore_errors=True)
    wide(path)
    print("result, strips of 4096, chunks of 32 x 2048, crc32c")
    from_result(path)
    in_a_browser(path)
    shutil.rmtree(path)
    if memmap:
        print("memmap, row by row")
        from_memmap(folder / "plain.npy")
        (folder / "plain.npy").unlink()


if __name__ == "__main__":
    main()
