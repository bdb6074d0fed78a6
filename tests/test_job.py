"""Job files: every mistake is named with its remedy, before anything runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from distinfluence import CgInfluence, DirectInfluence, InfluenceFunctionModel, RelativeDamping
from distinfluence.app import job
from distinfluence.app.config import Job
from distinfluence.app.sections import ClusterSection
from distinfluence.app.yaml_file import to_yaml
from distinfluence.errors import ConfigError, MissingDependencyError, RecipeError, UnsupportedModelError
from distinfluence.influence.registry import METHODS


def content(**changes: Any) -> dict[str, Any]:
    return {
        "model": {"factory": "tests.scaling.sources:model"},
        "loss": "torch.nn:CrossEntropyLoss",
        "data": {"train": "tests.scaling.sources:train", "test": "tests.scaling.sources:test"},
        "method": {"name": "direct", "hessian_regularization": 0.01},
        "output": "influences.zarr",
        **changes,
    }


def test_a_job_builds_the_influence_model_that_it_names(tmp_path: Path) -> None:
    model, recipe = Job.parse(content(), tmp_path).influence_model()
    assert isinstance(model, DirectInfluence)
    assert model.damping == {"full": 0.01}
    assert recipe.checkpoint is None
    method = {"name": "cg", "second_order_mode": "ggn", "rtol": 1e-4, "block_structure": "layer_wise"}
    model, _ = Job.parse(content(method=method), tmp_path).influence_model()
    assert isinstance(model, CgInfluence)
    assert model.settings()["rtol"] == 1e-4
    assert len(model.damping) == 2


def test_a_model_that_cannot_be_used_is_not_told_as_a_fault_of_the_method(tmp_path: Path) -> None:
    factory = {"target": "torch.nn:LazyLinear", "arguments": {"out_features": 2}}
    with pytest.raises(
        UnsupportedModelError, match="`job`, `model`: `model` has the parameter 'weight', which is not initialised"
    ):
        Job.parse(content(model={"factory": factory}), tmp_path).influence_model()


def test_a_job_may_ask_for_mixed_precision(tmp_path: Path) -> None:
    factory = {"target": "torch.nn:Linear", "arguments": {"in_features": 3, "out_features": 2}}
    model, _ = Job.parse(content(model={"factory": factory, "mixed_precision": "bfloat16"}), tmp_path).influence_model()
    assert model.settings()["mixed_precision"] == "bfloat16"
    with pytest.raises(ConfigError, match="mixed_precision"):
        Job.parse(content(model={"factory": factory, "mixed_precision": "half"}), tmp_path)


def test_a_loss_can_be_a_class_with_arguments_or_a_function(tmp_path: Path) -> None:
    for loss in (
        {"target": "torch.nn:CrossEntropyLoss", "arguments": {"label_smoothing": 0.1}},
        "torch.nn.functional:cross_entropy",
    ):
        model, _ = Job.parse(content(loss=loss), tmp_path).influence_model()
        assert model.objective.settings()["loss"]


def test_paths_and_modules_are_looked_up_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "beside_the_job.py").write_text("import torch\n\n\ndef build():\n    return torch.nn.Linear(4, 3)\n")
    job = Job.parse(content(model={"factory": "beside_the_job:build"}), tmp_path)
    assert job.path(Path("influences.zarr")) == (tmp_path / "influences.zarr").resolve()
    model, _ = job.influence_model()
    assert model.n_parameters == 15


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk": {"train": 5}}, "`chunk` is not a key of a job file. Did you mean `chunks`?"),
        ({"chunks": {"trian": 5}}, "`chunks.trian` is not a key of a job file. Did you mean `train`?"),
        ({"chunks": {"train": 0}}, "`chunks.train` must be at least 1, got 0."),
        ({"model": {"checkpoint": "m.pt"}}, "`model.factory` is missing."),
        ({"method": {"name": "cgg"}}, "got 'cgg'. Did you mean `cg`?"),
        (
            {"method": {"name": "cg", "hesian_regularization": 0.1}},
            "`method`: `hesian_regularization` is not a parameter of 'cg'. Did you mean `hessian_regularization`?",
        ),
        ({"cluster": {"kind": "kubernetes"}}, "`cluster`: `kind` of the cluster must be one of ['local', 'cuda', "),
        ({"cluster": {"kind": "slurm"}}, "`workers` must say how many jobs to submit"),
        ({"cluster": {"kind": "slurm", "workers": 2, "minimum": 3}}, "`minimum` must be between 1 and `workers`"),
        (
            {"cluster": {"on_death": "leave"}},
            "`on_death` must be one of ['cancel', 'leave'], and is for clusters of jobs",
        ),
        ({"device": "gpu"}, "`device` must be 'auto', 'cpu' or 'cuda', got 'gpu'."),
        ({"cluster": {"kind": "address"}}, "`address` must say where the scheduler is"),
        ({"cluster": {"settings": {"queue": "cpu"}}}, "`settings` are for clusters of jobs and GPUs"),
        ({"mode": "down"}, "`mode` must be 'up' or 'perturbation', got 'down'."),
        ({"cluster": {"worker": 3}}, "Did you mean `workers`?"),
        (
            {"model": "my_model:build"},
            "`model` must be a mapping with keys among factory, checkpoint, mixed_precision, got 'my_model",
        ),
        ({"method": "cg"}, "`method` must be a mapping, got 'cg'."),
        ({"mode": "down"}, "has 1 mistake:"),
        (
            {"output": "s3://bucket/i.zarr"},
            "`scratch` must name a folder where `output` is a URL, got 's3://bucket/i.z",
        ),
        (
            {"output": "s3://bucket/i.zarr", "scratch": "x", "contributions": True},
            "`contributions` are written to folders alone",
        ),
        ({"model": {"factory": {"target": "a:b", "arguments": {"x": float("inf")}}}}, "must be finite, got inf"),
        ({"scratch": "gs://bucket/x"}, "`scratch` must be a file or folder, got 'gs://bucket/x'."),
    ],
)
def test_a_mistake_in_a_job_is_named_with_what_was_meant(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Job.parse(content(**changes), tmp_path)
    assert message in str(caught.value)


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 mistakes"):
        Job.parse(content(outptu="x", chunks={"train": "many"}), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must hold a mapping .* got a list"),
        ("a: [1", "is not valid YAML"),
        ("", "is empty. Pass the path of a job file"),
        ("!!python/object:os.system {}", "the tag `!!python/object:os.system` is not known"),
    ],
)
def test_a_file_that_is_no_job_says_so(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        Job.read(tmp_path / "job.yaml")


def test_wrong_references_and_parameters_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no 'build_it'"):
        Job.parse(content(model={"factory": "tests.scaling.sources:build_it"}), tmp_path).influence_model()
    with pytest.raises(ConfigError, match="hessian_regularization"):
        Job.parse(content(method={"name": "direct"}), tmp_path).influence_model()


def test_a_damping_can_be_a_rule_also_by_block(tmp_path: Path) -> None:
    rule = {"fraction": 0.2, "of": "largest"}
    method = {"name": "krylov", "hessian_regularization": rule}
    model, _ = Job.parse(content(method=method), tmp_path).influence_model()
    assert model.hessian_regularization == RelativeDamping(0.2, "largest")
    method = {
        "name": "auto",
        "hessian_regularization": {"0": {"fraction": 0.1}, "2": 0.5},
        "block_structure": "layer_wise",
    }
    model, _ = Job.parse(content(method=method), tmp_path).influence_model()
    assert model.hessian_regularization == {"0": RelativeDamping(0.1), "2": 0.5}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_has_a_name_in_job_files(name: str, tmp_path: Path) -> None:
    damping = {"hessian_regularization": 0.1} if "hessian_regularization" in signature(METHODS[name]).parameters else {}
    model, _ = Job.parse(content(method={"name": name, **damping}), tmp_path).influence_model()
    assert type(model) is METHODS[name]
    assert set(METHODS.values()) == set(kinds_below(InfluenceFunctionModel))


def kinds_below(kind: type[Any]) -> list[type[Any]]:
    """The classes of the package that inherit from this one and from which no other inherits."""
    own = [each for each in kind.__subclasses__() if each.__module__.startswith("distinfluence")]  # tests make others
    return [below for each in own for below in (kinds_below(each) or [each])]


@pytest.mark.parametrize(
    ("written", "limit"), [("0.5", "0.5"), ("0", "0"), ("4294967296", "4294967296"), ("4GiB", "4GiB"), ("auto", "auto")]
)
def test_a_memory_limit_is_a_share_or_bytes(written: str, limit: str, tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(f"memory_limit: {written}\n")
    assert ClusterSection.read(tmp_path / "cluster.yaml").spec().memory_limit == limit


def test_numbers_may_be_names_where_a_text_is_meant(tmp_path: Path) -> None:
    made = Job.parse(content(output=2026, scratch=7, model={"factory": "a:b", "checkpoint": 3}), tmp_path)
    assert (made.result, made.scratch) == ((tmp_path / "2026").resolve(), Path("7"))
    assert made.model.checkpoint == Path("3")
    assert Job.parse(content(contributions=3), tmp_path).options().contributions == 3
    assert Job.parse(content(contributions=False), tmp_path).options().contributions == 0


def test_numbers_need_no_dot(tmp_path: Path) -> None:
    text = to_yaml(content(method={})).replace("method: {}", "method: {name: cg, rtol: 1e-4, atol: +1E-12}")
    (tmp_path / "job.yaml").write_text(text.replace("output:", "scratch: '1e-4'\noutput:"))
    job = Job.read(tmp_path / "job.yaml")
    assert job.method == {"name": "cg", "rtol": 1e-4, "atol": 1e-12}
    assert job.scratch == Path("1e-4")


def test_a_performance_report_is_dasks_own_and_wants_bokeh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    @contextmanager
    def recorded(filename: str) -> Iterator[None]:
        asked.append(filename)
        yield

    monkeypatch.setattr(job, "performance_report", recorded)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with job.reported(None):
        pass
    with pytest.raises(MissingDependencyError, match="pip install bokeh"), job.reported(tmp_path / "report.html"):
        pass
    assert asked == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with job.reported(tmp_path / "report.html"):
        assert asked == [str(tmp_path / "report.html")]


def test_an_output_may_be_a_folder_or_a_url(tmp_path: Path) -> None:
    made = Job.parse(content(output=f"file://{tmp_path}/i.zarr"), tmp_path)
    assert made.result == (tmp_path / "i.zarr").resolve()
    assert made.scratch_folder.name == ".i.zarr.scratch"
    assert made.logs_folder.name == "i.zarr.logs"
    made = Job.parse(content(output="s3://bucket/i.zarr", scratch="scratch"), tmp_path)
    assert made.result == "s3://bucket/i.zarr"
    assert made.scratch_folder == (tmp_path / "scratch").resolve()
    assert made.logs_folder == made.scratch_folder / "logs"
    assert made.model_dump(mode="json")["output"] == "s3://bucket/i.zarr"
