"""Several writers at once, and writers that are killed. Real processes, each a small script."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import distinfluence
from distinfluence.store import InfluenceWriter, Layout, open_influences
from tests.processes import started

from .conftest import matrix

WORKER = """
import sys
import numpy as np
from distinfluence.store import InfluenceWriter, Layout
path, first, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
writer = InfluenceWriter.open(path)
values = np.random.default_rng(0).standard_normal(writer.layout.shape).astype(np.float32)
own = writer.pending()[first::step]  # before another one has begun
print("ready", flush=True)
sys.stdin.readline()
for i in own:
    columns = writer.layout.strip_slice(i)
    points = np.arange(columns.start, columns.stop, dtype=np.float32)
    writer.write_strip(i, values[:, columns], loss=points, gradient_norm=points)
"""


@contextlib.contextmanager
def writing(path: Path, first: int = 0, step: int = 1) -> "Iterator[subprocess.Popen[str]]":
    """Keep a writer that is ready, and waits for `go`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(distinfluence.__file__).parents[1])}
    command = [sys.executable, "-c", WORKER, path, first, step]
    with started(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process


def go(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def test_two_processes_that_write_different_strips_lose_nothing(tmp_path: Path) -> None:
    layout = Layout(n_test=40, n_train=2000, strip=50, top_k=10)
    InfluenceWriter.create(tmp_path / "r", layout, {})
    with writing(tmp_path / "r", 0, 2) as even, writing(tmp_path / "r", 1, 2) as odd:
        go(even)
        go(odd)
        assert (even.wait(60), odd.wait(60)) == (0, 0)
    InfluenceWriter.open(tmp_path / "r").finish()
    result = open_influences(tmp_path / "r")
    np.testing.assert_array_equal(result[:], matrix(layout))
    np.testing.assert_array_equal(result.train_loss, np.arange(2000))
    np.testing.assert_array_equal(result.top(7).indices, np.argsort(-matrix(layout)[7], kind="stable")[:10])


def test_every_marked_strip_is_whole_after_a_kill_at_any_moment(tmp_path: Path) -> None:
    layout = Layout(n_test=256, n_train=40_000, strip=1000, top_k=20)
    values = matrix(layout)
    InfluenceWriter.create(tmp_path / "r", layout, {})
    delays = iter(np.random.default_rng(5).uniform(0.02, 0.12, 100))
    kills = 0
    for _ in range(6):
        with writing(tmp_path / "r") as worker:
            go(worker)
            time.sleep(float(next(delays)))
            worker.kill()
            kills += worker.wait(60) == -9
        result = open_influences(tmp_path / "r")
        pending = set(InfluenceWriter.open(tmp_path / "r").pending())
        for i in set(range(layout.n_strips)) - pending:
            columns = layout.strip_slice(i)
            np.testing.assert_array_equal(result[:, columns], values[:, columns])
            np.testing.assert_array_equal(result.train_loss[columns], np.arange(columns.start, columns.stop))
    assert kills >= 3
    with writing(tmp_path / "r") as worker:
        go(worker)
        assert worker.wait(60) == 0
    InfluenceWriter.open(tmp_path / "r").finish()
    result = open_influences(tmp_path / "r")
    np.testing.assert_array_equal(result[:], values)
    for i in (0, 100, 255):
        np.testing.assert_array_equal(result.top(i).indices, np.argsort(-values[i], kind="stable")[:20])
        np.testing.assert_array_equal(result.bottom(i).indices, np.argsort(values[i], kind="stable")[:20])
