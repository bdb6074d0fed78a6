"""Baselines without gradients: scores by definition, in results that are written and read as any other."""

import math
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn
from torch.utils.data import DataLoader, Dataset

from distinfluence import GradientDotInfluence, InfluenceResult, open_influences
from distinfluence.app.yaml_file import to_yaml
from distinfluence.cli import main
from distinfluence.errors import (
    DistinfluenceError,
    FingerprintError,
    MissingDependencyError,
    NonDeterministicDataError,
    NonFiniteError,
    SettingError,
    ShapeError,
    StoreExistsError,
)
from distinfluence.evaluate import (
    Baseline,
    Bm25,
    PlainLoss,
    RandomScores,
    mislabel_recall,
    net_harm,
    write_baseline,
)
from distinfluence.evaluate.baselines import write as write_module
from distinfluence.scaling import Progress
from distinfluence.scaling.data.chunks import chunked
from distinfluence.scaling.data.sources import InThisProcess
from distinfluence.scaling.dispatch.executor import InProcess
from distinfluence.scaling.stages.inspect import look
from distinfluence.scaling.worker.context import LocalContext
from distinfluence.store import InfluenceWriter
from tests.test_job import content
from tests.zoo import build

TRAIN = [
    "the cat sat on the mat",
    "a dog, a dog and a Dog",
    "",
    "Straße und Häuser; STRASSE",
    "кошка сидит на ковре",
    "the dog sat near the cat and the mat on the mat",
    "!? . -",
    "猫は座る 犬",
]
TEST = ["cat mat mat", "кошка Häuser", "", "zebra", "THE DOG dog", "猫は座る"]


def words(text: str) -> list[str]:
    """Runs of two or more letters, digits or underscores."""
    return [word for word in re.split(r"[^\w]+", text.lower()) if len(word) > 1]


def textbook(test: list[str], train: list[str], k1: float = 1.5, b: float = 0.75) -> np.ndarray[Any, Any]:
    """BM25 as Lucene has it since version 8: without the factor k1 + 1, and with an idf that is never negative."""
    documents = [Counter(words(text)) for text in train]
    lengths = [sum(counts.values()) for counts in documents]
    mean, n = sum(lengths) / len(train), len(train)
    scores = np.zeros((len(test), n))
    for i, query in enumerate(test):
        for word in words(query):  # once for each time that it is there
            having = sum(word in counts for counts in documents)
            idf = math.log(1 + (n - having + 0.5) / (having + 0.5))
            for j, counts in enumerate(documents):
                tf = counts[word]
                scores[i, j] += idf * tf / (tf + k1 * (1 - b + b * lengths[j] / mean)) if tf else 0.0
    return scores


def bits(result: InfluenceResult) -> bytes:
    values: np.ndarray[Any, Any] = np.asarray(result.influences[:])
    return values.tobytes()


@pytest.mark.parametrize(("settings", "chunk"), [({}, None), ({"k1": 0.9, "b": 0.4}, 3), ({"k1": 0, "b": 1}, None)])
def test_bm25_is_that_of_the_textbook(tmp_path: Path, settings: dict[str, float], chunk: int | None) -> None:
    result = write_baseline(tmp_path / "bm25", Bm25(**settings), TEST, TRAIN, chunk_size=chunk)
    expected = textbook(TEST, TRAIN, **settings)
    np.testing.assert_allclose(result.influences[:], expected, rtol=1e-6, atol=0)
    assert not expected[[2, 3]].any() and not expected[:, [2, 6]].any()  # empty texts and those without common words
    assert (expected > 0).sum() == 8
    assert result.complete
    assert result.provenance["solver"]["method"] == "bm25"


def test_bm25_of_many_texts_is_that_of_the_package_and_the_same_in_every_cut(tmp_path: Path) -> None:
    import bm25s

    generator = np.random.default_rng(0)
    lexicon = [f"w{i}" for i in range(300)]
    train, test = (
        [" ".join(generator.choice(lexicon, p=_zipf(300), size=size)) for size in generator.integers(0, 40, n)]
        for n in (90, 20)
    )
    index = bm25s.BM25(method="lucene", dtype="float64")
    index.index(bm25s.tokenize(train, stopwords=None, show_progress=False), show_progress=False)
    queries = bm25s.tokenize(test, stopwords=None, return_ids=False, show_progress=False)
    expected = [index.get_scores(query) if query else np.zeros(90) for query in queries]
    whole = write_baseline(tmp_path / "whole", Bm25(), test, train)
    np.testing.assert_allclose(whole.influences[:], expected, rtol=1e-6)
    cut = write_baseline(tmp_path / "cut", Bm25(), test, train, chunk_size=7)
    assert bits(cut) == bits(whole)


def _zipf(n: int) -> np.ndarray[Any, Any]:
    weights = 1 / np.arange(1, n + 1)
    return np.asarray(weights / weights.sum())


def test_texts_come_from_lists_fields_and_callables_and_the_fingerprints_are_those_of_the_data(tmp_path: Path) -> None:
    train, test = ([{"text": text, "n": i} for i, text in enumerate(texts)] for texts in (TRAIN, TEST))

    def loader(samples: list[dict[str, Any]]) -> DataLoader[Any]:
        return DataLoader(
            samples,
            batch_size=4,
            collate_fn=lambda batch: (
                torch.tensor([[sample["n"]] for sample in batch]).float(),
                torch.zeros(len(batch), 1),
            ),
        )

    expected = textbook(TEST, TRAIN)
    risk, home = GradientDotInfluence(nn.Linear(1, 1), nn.MSELoss()), InThisProcess()
    look_at = partial(look, InProcess(), LocalContext("fingerprints", risk), progress=Progress(False), what="data")
    data = {"test_data": loader(test), "train_data": loader(train)}
    seen = {name: look_at(data=chunked(own, None, home)).sha256 for name, own in data.items()}
    ways: list[Any] = ["text", lambda sample: sample["text"], (TEST, TRAIN)]
    for number, texts in enumerate(ways):
        result = write_baseline(tmp_path / str(number), Bm25(texts), loader(test), loader(train))
        np.testing.assert_allclose(result.influences[:], expected, rtol=1e-6)
        assert seen.items() <= result.provenance["fingerprints"].items()
        assert "parameters" not in result.provenance["fingerprints"]
    arrays = torch.arange(len(TEST)).float()[:, None], torch.arange(len(TRAIN)).float()[:, None]
    by_array = Bm25(lambda sample: TRAIN[int(sample[0])])
    result = write_baseline(tmp_path / "arrays", by_array, *arrays)
    np.testing.assert_allclose(result.influences[:], textbook(TRAIN[: len(TEST)], TRAIN), rtol=1e-6)


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        (None, SettingError, "`texts` must say what the texts of the test points are"),
        ("title", SettingError, "`texts` 'title' must be a field of every sample, got a tuple"),
        (lambda sample: None, SettingError, "must give a text for each point, got NoneType for test point 0"),
        ((["a"], ["b", "c"]), ShapeError, "`texts` must be 2 texts of the test points, got 1"),
        ((["a"],), SettingError, "a pair of lists"),
    ],
)
def test_texts_that_are_not_there_are_refused(
    texts: Any, error: type[DistinfluenceError], message: str, tmp_path: Path
) -> None:
    data = torch.ones(2, 1), torch.ones(2)
    with pytest.raises(error, match=message):
        write_baseline(tmp_path / "bm25", Bm25(texts), data, data)
    assert not (tmp_path / "bm25").exists()


@pytest.mark.parametrize(
    "settings", [{"k1": -1}, {"k1": math.nan}, {"k1": math.inf}, {"b": 1.1}, {"b": "0.5"}, {"b": True}]
)
def test_settings_of_bm25_out_of_range_are_refused(settings: Any) -> None:
    with pytest.raises(SettingError, match=f"`{next(iter(settings))}` must be a number from 0 to"):
        Bm25(**settings)


def test_bm25_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(MissingDependencyError, match="pip install bm25s"):
        Bm25()


def test_random_scores_depend_on_the_seed_and_the_points_alone(tmp_path: Path) -> None:
    test, train = [""] * 30, [""] * 200
    result = write_baseline(tmp_path / "0", RandomScores(), test, train)
    assert bits(write_baseline(tmp_path / "cut", RandomScores(), test, train, chunk_size=33)) == bits(result)
    more = write_baseline(tmp_path / "more", RandomScores(), test * 2, train + train)
    assert np.array_equal(np.asarray(more.influences[:])[:30, :200], result.influences[:])
    values = np.asarray(result.influences[:], dtype=np.float64)
    assert -1 <= values.min() < -0.99 < 0.99 < values.max() <= 1
    assert abs(values.mean()) < 4 / math.sqrt(3 * values.size)  # four standard errors
    assert len(np.unique(values)) > 0.99 * values.size
    other = np.asarray(write_baseline(tmp_path / "1", RandomScores(1), test, train).influences[:])
    for one, two in ((values, other), (values[:-1], values[1:]), (values[:, :-1], values[:, 1:])):
        assert abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) < 4 / math.sqrt(one.size)


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5])
def test_a_seed_that_has_no_stream_of_its_own_is_refused(seed: Any) -> None:
    with pytest.raises(SettingError, match="`seed` must be"):
        RandomScores(seed)


def test_the_plain_loss_is_minus_the_loss_of_each_training_point_and_finds_mislabelled_ones(tmp_path: Path) -> None:
    case = build("mlp classification")
    x, _ = case.train
    with torch.no_grad():
        case.model[-1].weight.mul_(20)  # sure of itself
        labels = case.model(x).argmax(dim=1)
    wrong = [3, 11]
    labels[wrong] = (labels[wrong] + 1) % 3
    result = write_baseline(tmp_path / "loss", PlainLoss(case.model, case.loss), case.test, (x, labels), chunk_size=5)
    with torch.no_grad():
        losses = nn.functional.cross_entropy(case.model(x), labels, reduction="none").numpy()
        test = nn.functional.cross_entropy(case.model(case.test[0]), case.test[1], reduction="none").numpy()
    np.testing.assert_allclose(result.influences[:], np.tile(-losses, (len(test), 1)), rtol=1e-6)
    np.testing.assert_allclose(result.read("train_loss"), losses, rtol=1e-6)
    np.testing.assert_allclose(result.read("test_loss"), test, rtol=1e-6)
    assert mislabel_recall(net_harm(result.influences[:]), wrong, 2).found == 2
    assert {"parameters", "test_data", "train_data"} == set(result.provenance["fingerprints"])


def test_the_plain_loss_refuses_texts_and_losses_that_are_not_finite(tmp_path: Path) -> None:
    case = build("mlp regression")
    with pytest.raises(SettingError, match="`test` must be data that the model takes"):
        write_baseline(tmp_path / "loss", PlainLoss(case.model, case.loss), TEST, TRAIN)
    x, y = (tensor.clone() for tensor in case.train)
    x[9] = 1e300
    with pytest.raises(NonFiniteError, match=r"chunk 1 \(samples 6 to 11\).*samples \[3\]"):
        write_baseline(tmp_path / "loss", PlainLoss(case.model, case.loss), case.test, (x, y), chunk_size=6)


def baseline_of(method: str) -> tuple[Baseline, Any, Any]:
    case = build("mlp classification")
    if method == "loss":
        return PlainLoss(case.model, case.loss), case.test, case.train
    return (Bm25() if method == "bm25" else RandomScores()), TEST, TRAIN


@pytest.mark.parametrize("method", ["bm25", "loss"])
def test_an_interrupted_baseline_is_resumed_to_the_same_bits_and_nothing_is_made_twice(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    baseline, test, train = baseline_of(method)
    whole = write_baseline(tmp_path / "whole", baseline, test, train, chunk_size=3)
    path, written = tmp_path / "result", list[int]()
    real = InfluenceWriter.write_strip

    def failing(self: InfluenceWriter, i: int, *values: Any, **more: Any) -> bool:
        if i == 1 and len(written) == 1:
            raise KeyboardInterrupt
        written.append(i)
        return real(self, i, *values, **more)

    monkeypatch.setattr(InfluenceWriter, "write_strip", failing)
    with pytest.raises(KeyboardInterrupt):
        write_baseline(path, baseline, test, train, chunk_size=3)
    written.append(-1)
    result = write_baseline(path, baseline, test, train, existing="resume")  # in the chunks that it was begun with
    assert written == [0, -1, *range(1, result.layout.n_strips)]
    assert bits(result) == bits(whole)
    assert result.complete
    with pytest.raises(StoreExistsError):
        write_baseline(path, baseline, test, train)
    strip = next(file for file in (path / "influences" / "c").rglob("*") if file.is_file())
    strip.write_bytes(b"\xff" * strip.stat().st_size)
    written.clear()
    with pytest.warns(RuntimeWarning, match="are damaged and made again"):
        assert bits(write_baseline(path, baseline, test, train, existing="repair")) == bits(whole)
    assert len(written) == 1
    others = {
        "bm25": Bm25(k1=1.2),
        "random": RandomScores(3),
        "loss": PlainLoss(nn.Linear(4, 3).double(), nn.CrossEntropyLoss()),
    }
    with pytest.raises(FingerprintError, match="begun with other inputs"):
        write_baseline(path, others[method], test, train, existing="resume")
    more = (TEST[::-1], train) if method != "loss" else ((test[0] * 2, test[1]), train)
    with pytest.raises(FingerprintError, match="test_data"):
        write_baseline(path, baseline, *more, existing="resume")
    assert write_baseline(path, others[method], test, train, existing="replace").complete


def test_a_large_result_is_made_in_narrow_strips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_module, "STRIP_BYTES", 4 * 40 * 16)
    shapes = []
    real = InfluenceWriter.write_strip

    def seen(self: InfluenceWriter, i: int, values: Any, **more: Any) -> bool:
        shapes.append(values.shape)
        return real(self, i, values, **more)

    monkeypatch.setattr(InfluenceWriter, "write_strip", seen)
    write_baseline(tmp_path / "result", RandomScores(), ["a"] * 40, ["b"] * 100)
    assert shapes == [(40, 16)] * 6 + [(40, 4)]


@pytest.mark.parametrize("asked", [{"mode": "perturbation"}, {"contributions": 3}, {"self_influence": True}])
def test_what_only_influences_have_is_refused(asked: Any, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=f"`{next(iter(asked))}` is of influences, and a baseline has none"):
        write_baseline(tmp_path / "result", RandomScores(), TEST, TRAIN, **asked)


def texts_of_train() -> list[str]:
    return TRAIN


def texts_of_test() -> list[str]:
    return TEST


def as_text(sample: Any) -> str:
    """Of a sample of tests.scaling.sources: its label as a word."""
    return f"label {'abc'[int(sample[1])] * 2}"


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def job_file(folder: Path, **changes: Any) -> Path:
    (folder / "job.yaml").write_text(to_yaml(content(**changes)))
    return folder / "job.yaml"


@pytest.mark.parametrize(
    "method",
    [
        {"name": "loss"},
        {"name": "random", "seed": 3},
        {"name": "bm25", "texts": "tests.test_baselines:as_text", "k1": 1},
    ],
    ids=lambda method: method["name"],
)
def test_a_job_of_a_baseline_is_planned_run_resumed_and_looked_at(method: dict[str, Any], tmp_path: Path) -> None:
    job, output = job_file(tmp_path, method=method, chunks={"train": 6, "test": 4}), tmp_path / "influences.zarr"
    planned = command("plan", job)
    assert f"{method['name']}, a baseline: 6 × 23 scores without gradients" in planned.output
    assert "strips: 4 of 6 training points" in planned.output
    assert not output.exists()
    done = command("run", job, "--quiet")
    assert done.exit_code == 0, done.output
    assert "6 × 23 scores (test × train)" in done.output
    result = open_influences(output)
    case = build("mlp classification")
    if method["name"] == "loss":
        with torch.no_grad():
            expected = -nn.functional.cross_entropy(case.model(case.train[0]), case.train[1], reduction="none").numpy()
        np.testing.assert_allclose(result.influences[:], np.tile(expected, (6, 1)), rtol=1e-6)
        assert "no model was used" not in done.output
    else:
        assert "no model was used" in done.output
    if method["name"] == "bm25":
        test, train = ([as_text((None, y)) for y in data[1]] for data in (case.test, case.train))
        np.testing.assert_allclose(result.influences[:], textbook(test, train, k1=1), rtol=1e-6)
    before = bits(result)
    again = command("run", job, "--quiet", "--resume")
    assert again.exit_code == 0, again.output
    assert bits(open_influences(output)) == before
    assert command("run", job, "--quiet").exit_code == 1
    info = command("info", output, "--check").output
    assert "complete" in info
    assert "converged" not in info
    assert f"{method['name']}, a baseline" in info
    assert ("model: " in info) == (method["name"] == "loss")
    top = command("top", output, 0, "-k", 3)
    assert top.exit_code == 0, top.output
    assert top.output.splitlines()[0].partition(" 0.")[0] == f"test sample 0{': loss' * (method['name'] == 'loss')}"
    assert "residual" not in top.output
    assert "nan" not in top.output + command("top", output, "--tests", "0:3").output
    refused = command("verify", job)
    assert refused.exit_code == 1
    assert f"`method` '{method['name']}' is a baseline, which has no exact scores" in refused.output
    assert "one process makes alone" in command("run", job, "--part", "0/2").output
    assert command("annotate", job).exit_code == 0
    other = job_file(tmp_path, method=method, data=dict.fromkeys(("train", "test"), "tests.scaling.sources:test"))
    assert "made with other train data" in command("annotate", other).output


def test_a_job_of_texts_alone_needs_no_model(tmp_path: Path) -> None:
    data = {axis: f"tests.test_baselines:texts_of_{axis}" for axis in ("train", "test")}
    model = {"factory": "tests.no_such_module:model"}
    assert command("run", job_file(tmp_path, method={"name": "bm25"}, data=data, model=model), "--quiet").exit_code == 0
    np.testing.assert_allclose(open_influences(tmp_path / "influences.zarr")[:], textbook(TEST, TRAIN), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "bm52"}}, "Did you mean `bm25`"),
        ({"method": {"name": "bm25", "k": 1}}, "`k` is not a parameter of 'bm25'. Did you mean `k1`?"),
        ({"method": {"name": "bm25", "texts": 3}}, "`texts` must be a text"),
        ({"method": {"name": "random", "seed": 0.5}}, "`seed` must be a whole number"),
        ({"method": {"name": "loss", "model": "a"}}, "`model` is not a parameter of 'loss'"),
        ({"method": {"name": "gradient_dot", "hessian_regularization": 1}}, "is not a parameter of 'gradient_dot'"),
        ({"method": {"name": "random"}, "self_influence": True}, "`self_influence` is of influences"),
        ({"method": {"name": "random"}, "mode": "perturbation"}, "`mode` is of influences"),
    ],
)
def test_a_mistake_in_a_baselines_job_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    outcome = command("plan", job_file(tmp_path, **changes))
    assert outcome.exit_code == 1
    assert message in " ".join(outcome.output.split())


def test_a_job_of_gradient_products_is_run_and_verified(tmp_path: Path) -> None:
    job = job_file(tmp_path, method={"name": "gradient_cosine"}, chunks={"train": 7, "test": 4, "panel": 6})
    done = command("run", job, "--quiet", "--part", "0/1")
    assert done.exit_code == 0, done.output
    assert "without curvature, 43 of 43 parameters covered" in done.output
    verified = command("verify", job, "--tests", 3, "--trains", 9)
    assert verified.exit_code == 0, verified.output
    assert "no bounds to compare with" in verified.output
    assert float(verified.output.partition("relative error ")[2].partition(",")[0]) < 1e-6


class Restless(Dataset[tuple[torch.Tensor, int]]):
    """A data set whose samples are other ones each time."""

    reads = 0

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.reads += 1
        return torch.full((4,), float(self.reads)), 0


def test_data_that_change_between_two_readings_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "distinfluence.scaling.worker.cache.kept_bytes", lambda limit: 0
    )  # so that chunks are read again
    case = build("mlp classification", dtype=torch.float32)
    with pytest.raises(NonDeterministicDataError):
        write_baseline(tmp_path / "loss", PlainLoss(case.model, case.loss), case.test, Restless(), chunk_size=2)
