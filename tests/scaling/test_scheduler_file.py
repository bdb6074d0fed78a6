"""A scheduler of somebody else's, known by its file."""

from pathlib import Path

import numpy as np
from distributed import Client

from distinfluence import open_influences
from distinfluence.app.config import Job
from distinfluence.app.job import run_job
from distinfluence.app.sections import ClusterSection
from distinfluence.app.yaml_file import to_yaml
from distinfluence.scaling import Progress
from tests.reference import Reference
from tests.test_job import content
from tests.zoo import build


def test_a_run_joins_the_scheduler_of_a_file_and_leaves_its_workers_running(client: Client, tmp_path: Path) -> None:
    client.write_scheduler_file(str(tmp_path / "scheduler.json"))
    file = tmp_path / "cluster.yaml"
    file.write_text(to_yaml({"kind": "scheduler_file", "address": str(tmp_path / "scheduler.json")}))
    workers = set(client.nthreads())
    job = Job.parse(content(chunks={"train": 8}), tmp_path).on(ClusterSection.read(file))
    run_job(job, progress=Progress(False))
    expected = Reference(build("mlp classification")).influences("hessian", 0.01).numpy()
    np.testing.assert_allclose(open_influences(tmp_path / "influences.zarr")[:], expected, rtol=1e-6, atol=1e-4)
    assert set(client.nthreads()) == workers
