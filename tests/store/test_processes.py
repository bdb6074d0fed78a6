"""Several writers at once, and writers that are killed. Real processes, each a small script."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import distinfluence
from distinfluence.store import InfluenceWriter, Layout, open_influences

from .conftest import matrix

WORKER = """
import sys
import numpy as np
from distinfluence.store import InfluenceWriter, Layout
path, first, step = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
writer = InfluenceWriter.open(path)
values = np.random.default_rng(0).standard_normal(writer.layout.shape).astype(np.float32)
print("ready", flush=True)
sys.stdin.readline()
for i in writer.pending()[first::step]:
    columns = writer.layout.strip_slice(i)
    points = np.arange(columns.start, columns.stop, dtype=np.float32)
    writer.write_strip(i, values[:, columns], loss=points, gradient_norm=points)
"""


def start(path: Any, first: Any = 0, step: Any = 1) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(distinfluence.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(path), str(first), str(step)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: Any) -> None:
    process.stdin.write("go\n")
    process.stdin.flush()


def test_two_processes_that_write_different_strips_lose_nothing(tmp_path: Path) -> None:
    layout = Layout(n_test=40, n_train=2000, strip=50, top_k=10)
    InfluenceWriter.create(tmp_path / "r", layout, {})
    workers = [start(tmp_path / "r", first, 2) for first in (0, 1)]
    for worker in workers:
        go(worker)
    for worker in workers:
        assert worker.wait(60) == 0
        worker.stdin.close(), worker.stdout.close()
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
        worker = start(tmp_path / "r")
        go(worker)
        time.sleep(float(next(delays)))
        worker.kill()
        kills += worker.wait(60) == -9
        worker.stdin.close(), worker.stdout.close()
        result = open_influences(tmp_path / "r")
        pending = set(InfluenceWriter.open(tmp_path / "r").pending())
        for i in set(range(layout.n_strips)) - pending:
            columns = layout.strip_slice(i)
            np.testing.assert_array_equal(result[:, columns], values[:, columns])
            np.testing.assert_array_equal(result.train_loss[columns], np.arange(columns.start, columns.stop))
    assert kills >= 3
    worker = start(tmp_path / "r")
    go(worker)
    assert worker.wait(60) == 0
    worker.stdin.close(), worker.stdout.close()
    InfluenceWriter.open(tmp_path / "r").finish()
    result = open_influences(tmp_path / "r")
    np.testing.assert_array_equal(result[:], values)
    for i in (0, 100, 255):
        np.testing.assert_array_equal(result.top(i).indices, np.argsort(-values[i], kind="stable")[:20])
        np.testing.assert_array_equal(result.bottom(i).indices, np.argsort(values[i], kind="stable")[:20])
