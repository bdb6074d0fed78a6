"""The mistakes that people make in job and cluster files, through the command line: file, line, key, what to write."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from distinfluence.app.config import Job
from distinfluence.app.sections import ClusterSection
from distinfluence.cli import main

JOB = """\
model:
  factory: "tests.scaling.sources:model"
loss: "torch.nn:CrossEntropyLoss"
data:
  train: "tests.scaling.sources:train"
  test: "tests.scaling.sources:test"
method:
  name: cg
  hessian_regularization: 0.01
cluster:
  workers: 1
output: influences.zarr
"""
CLUSTER = """\
kind: slurm
workers: 2
settings:
  cores: 1
  memory: 2GB
  walltime: 4:00:00
"""

JOBS: dict[str, tuple[str, str, str]] = {
    "an unknown key": (
        "method:",
        "methods:",
        "line 7: `methods` is not a key of a job file. Did you mean `method`?",
    ),
    "a missing key": (
        'loss: "torch.nn:CrossEntropyLoss"\n',
        "",
        "`loss` is missing. Add it: `model`, `loss`, `data`, `method`, `output` cannot be left out here.",
    ),
    "a key in the wrong section": (
        "  name: cg\n",
        "  name: cg\n  workers: 2\n",
        "line 9: `method`: `workers` is not a parameter of 'cg'. Known: hessian_regularization, rtol, atol, maxiter, ",
    ),
    "a key given twice": (
        "  workers: 1\n",
        "  workers: 1\n  workers: 2\n",
        ", line 12, column 3: `workers` is given twice, first in line 11. Remove one.",
    ),
    "wrong indentation": (
        "  name: cg\n",
        "   name: cg\n",
        ", line 9, column 3: this is not valid YAML: expected <block end>, but found '<block mapping start>'. Indent ",
    ),
    "a tab": (
        "  name: cg\n",
        "\tname: cg\n",
        ", line 8, column 1: this is not valid YAML: found character '\\t' that cannot start any token. The line is "
        "indented with a tab: use spaces.",
    ),
    "a number in quotes": (
        "  workers: 1\n",
        '  workers: "1"\n',
        "line 11: `cluster.workers` must be a whole number, got '1'. Remove the quotes.",
    ),
    "a parameter in quotes": (
        "  name: cg\n",
        '  name: cg\n  rtol: "1e-4"\n',
        "line 9: `method`: `rtol` must be a number, got '1e-4'. Remove the quotes.",
    ),
    "a damping in quotes": (
        "0.01",
        "'0.01'",
        "line 9: `method`: `hessian_regularization` must be a number, got '0.01'. Remove the quotes.",
    ),
    "a dot in place of a colon": (
        "sources:model",
        "sources.model",
        "line 2: `model.factory.target` must name something as `module:name`, got 'tests.scaling.sources.model'. Did "
        "you mean `tests.scaling.sources:model`?",
    ),
    "a name that the module lacks": (
        "sources:train",
        "sources:trian",
        ", line 5, `data.train`: `tests.scaling.sources:trian`: 'tests.scaling.sources' has no 'trian'. Correct ",
    ),
    "a method that is none": (
        "name: cg",
        "name: cgs",
        "line 8: `method`: `name` must be a method, got 'cgs'. Did you mean `cg`?",
    ),
    "a parameter that is none": (
        "hessian_regularization",
        "damping",
        "line 9: `method`: `damping` is not a parameter of 'cg'. Known: hessian_regularization, ",
    ),
    "a negative damping": (
        "0.01",
        "-0.01",
        ", line 9, `method`: `hessian_regularization` must be a finite number ≥ 0 or a `RelativeDamping`, got -0.01",
    ),
    "no workers": (
        "workers: 1",
        "workers: 0",
        "line 11: `cluster.workers` must be at least 1, got 0. Write such a number, or leave the key out.",
    ),
    "a path that is none": (
        'sources:model"\n',
        'sources:model"\n  checkpoint: nothing.pt\n',
        ", line 3, `model`: `checkpoint` FOLDER/nothing.pt cannot be read: [Errno 2] No such file or directory",
    ),
    "yes for true": (
        "output:",
        "certify: yes\noutput:",
        "line 12: `certify` must be true or false, got 'yes'. Write true.",
    ),
    "off for false": (
        "  name: cg\n",
        "  name: cg\n  use_block_cg: off\n",
        "line 9: `method`: `use_block_cg` must be true or false, got 'off'. Write false.",
    ),
    "on for a number": (
        "output:",
        "contributions: on\noutput:",
        "line 12: `contributions` must be true, false or a whole number of at least 1, got 'on'. Write one of these.",
    ),
    "a whole number with a point": (
        "output:",
        "top_k: 50.0\noutput:",
        "line 12: `top_k` must be a whole number, got 50.0. Write 50.",
    ),
    "a number out of its range": (
        "output:",
        "mantissa_bits: 32\noutput:",
        "line 12: `mantissa_bits` must be at most 23, got 32. Write such a number, or leave the key out.",
    ),
    "another word for it": (
        "output:",
        "device: gpu\noutput:",
        "line 12: `device` must be 'auto', 'cpu' or 'cuda', got 'gpu'. Did you mean `cuda`?",
    ),
    "a text for a section": (
        "cluster:\n  workers: 1\n",
        "cluster: local\n",
        "line 10: `cluster` must be a mapping with keys among kind, workers, minimum, memory_limit, address, timeout",
    ),
    "a folder that is a number with a point": (
        "influences.zarr",
        "1.5",
        "line 12: `output` must be a folder or a URL, got 1.5. Put a name in quotes.",
    ),
    "bytes without a unit": (
        "workers: 1",
        "memory_limit: 16",
        "line 11: `cluster`: `memory_limit` of the cluster must be bytes with their unit, got '16', which is 16 bytes.",
    ),
}
CLUSTERS: dict[str, tuple[str, str, str]] = {
    "an unknown kind": (
        "kind: slurm",
        "kind: slrum",
        "line 1: `kind` of the cluster must be one of ['local', 'cuda', ",
    ),
    "an unknown kind, and what was meant": ("kind: slurm", "kind: slrum", "got 'slrum'. Did you mean 'slurm'?"),
    "an unknown key": (
        "workers:",
        "worker:",
        "line 2: `worker` is not a key of a cluster file. Did you mean `workers`?",
    ),
    "an unknown setting": (
        "walltime",
        "wall-tme",
        "line 6: `settings.wall_tme` is not a setting of dask-jobqueue's SLURMCluster. Did you mean `walltime`?",
    ),
    "a word of sbatch": (
        "  cores: 1\n",
        "  cores: 1\n  partition: cpu\n",
        "line 5: `settings.partition` is not a setting of dask-jobqueue's SLURMCluster. Did you mean `queue`?",
    ),
    "a time that SLURM cannot read": (
        "4:00:00",
        "4h",
        "line 6: `settings.walltime` of the cluster must be a time as sbatch reads it, got '4h'. Write "
        "hours:minutes:seconds ('01:30:00'), days-hours ('2-12') or minutes ('90').",
    ),
    "a time with a point": (
        "4:00:00",
        "1.5",
        "line 6: `settings.walltime` of the cluster must be a text, got 1.5. Put",
    ),
    "memory without a unit": (
        "2GB",
        "16",
        "line 5: `settings.memory` of the cluster must be bytes with their unit, got '16', which is 16 bytes. Did you "
        "mean '16GB'?",
    ),
    "memory of an unknown unit": ("2GB", "2gigs", "`settings.memory` of the cluster must be bytes such as '16GB', got"),
    "true for a name": (
        "  cores: 1\n",
        "  queue: true\n  cores: 1\n",
        "line 4: `settings.queue` of the cluster must be a text, got True. Put it in quotes.",
    ),
    "cores in quotes": (
        "cores: 1",
        "cores: '1'",
        "line 4: `settings.cores` of the cluster must be a whole number of at least 1, got '1'. Remove the quotes.",
    ),
    "a text for a list": (
        "  cores: 1\n",
        '  job-extra-directives: "--gres=gpu:1"\n  cores: 1\n',
        "line 4: `settings.job_extra_directives` of the cluster must be a list of texts, got '--gres=gpu:1'. Write ",
    ),
    "a setting given twice": (
        "  cores: 1\n",
        "  job-name: a\n  job_name: b\n  cores: 1\n",
        "`settings.job_name` of the cluster is given twice, as job-name and job_name. Remove one.",
    ),
}


def planned(folder: Path, job: str, cluster: str = "") -> tuple[int, str]:
    (folder / "job.yaml").write_text(job)
    words = ["plan", str(folder / "job.yaml")]
    if cluster:
        (folder / "cluster.yaml").write_text(cluster)
        words += ["--cluster", str(folder / "cluster.yaml")]
    outcome = CliRunner().invoke(main, words)
    return outcome.exit_code, outcome.output


@pytest.mark.parametrize("name", list(JOBS))
def test_a_mistake_in_a_job_file_is_told_with_its_place_and_remedy(name: str, tmp_path: Path) -> None:
    right, wrong, message = JOBS[name]
    assert JOB.count(right) == 1
    status, said = planned(tmp_path, JOB.replace(right, wrong))
    assert status == 1, said
    assert said.startswith(f"Error: `{tmp_path / 'job.yaml'}`")
    assert message.replace("FOLDER", str(tmp_path)) in said


@pytest.mark.parametrize("name", list(CLUSTERS))
def test_a_mistake_in_a_cluster_file_is_told_with_its_place_and_remedy(name: str, tmp_path: Path) -> None:
    right, wrong, message = CLUSTERS[name]
    assert CLUSTER.count(right) == 1
    status, said = planned(tmp_path, JOB, CLUSTER.replace(right, wrong))
    assert status == 1, said
    assert said.startswith(f"Error: `{tmp_path / 'cluster.yaml'}`")
    assert message in said


def test_the_files_without_a_mistake_are_taken(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    model, _ = Job.read(tmp_path / "job.yaml").influence_model()
    assert model.damping == {"full": 0.01}
    assert ClusterSection.read(tmp_path / "cluster.yaml").spec().settings["walltime"] == "4:00:00"
