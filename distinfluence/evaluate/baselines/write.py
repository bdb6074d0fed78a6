"""Writing the scores of a baseline as a result, strip by strip, in this process.

A strip of all test points × one chunk of training points is what memory holds. Results are written, resumed and
replaced as those of influence models, and every tool that reads those reads these.
"""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Unpack

import numpy as np

from distinfluence.errors import SettingError, StoreNotFoundError
from distinfluence.evaluate.baselines.bm25 import Bm25
from distinfluence.evaluate.baselines.points import Points
from distinfluence.evaluate.baselines.rules import Baseline, PlainLoss, RandomScores, Scores
from distinfluence.influence.scores import InfluenceMode
from distinfluence.scaling.data.chunks import CHUNK_SIZE
from distinfluence.scaling.progress import Progress
from distinfluence.scaling.run_options import ExistingResult, RunOptions, RunSettings
from distinfluence.store import InfluenceResult, InfluenceWriter, Layout, mend, open_influences
from distinfluence.store.format.folder import place_of
from distinfluence.store.write.resume import chunks_of

BASELINES: Mapping[str, type[Baseline]] = {"bm25": Bm25, "loss": PlainLoss, "random": RandomScores}

STRIP_BYTES = 32 * 2**20  # Of the values of a strip, where nobody says how wide it is; several copies are held at once.
TEST_CHUNK_SIZE = 1024  # Test points that are read together, where nobody says.
COPIES = 8  # Strips in float32 that scoring and writing one hold at their peak.


@dataclass(frozen=True)
class BaselinePlan:
    """What writing a baseline will need.

    Attributes:
        method: Name of the baseline.
        n_test: Number of test points.
        n_train: Number of training points.
        strip: Training points in a strip.
    """

    method: str
    n_test: int
    n_train: int
    strip: int

    def __str__(self) -> str:
        strips = -(-self.n_train // self.strip)
        return (
            f"{self.method}, a baseline: {self.n_test} × {self.n_train} scores without gradients, in this process\n"
            f"strips: {strips} of {self.strip} training points, about "
            f"{COPIES * 4 * self.n_test * self.strip / 2**20:.0f} MiB for the scores of one\n"
            f"disk: {4 * self.n_test * self.n_train / 2**20:.1f} MiB"
        )


def write_baseline(
    path: str | Path,
    baseline: Baseline,
    test: object,
    train: object,
    *,
    options: RunOptions | None = None,
    progress: bool | Progress = False,
    **settings: Unpack[RunSettings],
) -> InfluenceResult:
    """Score training points without gradients, and write the scores as a result like that of an influence model.

    Args:
        path: A folder, or a URL that fsspec can write to.
        baseline: `RandomScores`, `PlainLoss` or `Bm25`.
        test: The test points: data as for `InfluenceFunctionModel.fit`, or a list of texts.
        train: The training points, in the same form.
        options: Chunk sizes, `top_k`, `mantissa_bits`, what to do with a result that is there, and attributes; the
            defaults of `RunOptions` if None.
        progress: Whether to show progress bars, or what shows them.
        **settings: Options as keywords, which override `options`: write_baseline(…, existing="resume").

    Returns:
        The result, opened.

    Raises:
        SettingError: If an option is not valid, or is one of influences alone.
        StoreError: If `path` cannot be used.
        FingerprintError: If a result to be resumed is of another baseline, other data or other settings.
    """
    options = checked_options(options, **settings)
    options.check_path(path)
    bars, output = progress if isinstance(progress, Progress) else Progress(progress), place_of(path)
    with bars.beside(output):
        tests, trains = points_of(path, test, train, options)
        with bars.stage("look at the data", None, "chunks"):
            (tests, test_sha256), (trains, train_sha256) = tests.looked_at(), trains.looked_at()
        data = {"test_data": test_sha256, "train_data": train_sha256}
        with bars.stage("begin", None, "points"):
            scores = baseline.begin(tests, trains)
        writer = _writer(path, baseline, (tests, trains), scores, data, options)
        if options.existing is ExistingResult.REPAIR and (damage := mend(writer)):
            bars.warn(f"{damage} of {path} are damaged and made again.")
        _write(writer, scores, bars)
    return open_influences(path)


def checked_options(options: RunOptions | None = None, **settings: Unpack[RunSettings]) -> RunOptions:
    """Return the options. Raises SettingError for those that only influences have."""
    options = (options or RunOptions()).updated(**settings)
    for name, asked in (
        ("mode", options.mode is not InfluenceMode.UP),
        ("contributions", options.contributions),
        ("self_influence", options.self_influence),
    ):
        if asked:
            raise SettingError(f"`{name}` is of influences, and a baseline has none. Omit it.")
    return options


def points_of(path: str | Path, test: object, train: object, options: RunOptions) -> tuple[Points, Points]:
    """Return test and training points in chunks: those that a resumed result has, those asked for, or usual ones."""
    begun = chunks_of(path) if options.resumes else None
    test_size, train_size = (None, None) if begun is None else (begun["test"][0], begun["train"])
    tests = Points.of("test", test, options.test_chunk_size or test_size, TEST_CHUNK_SIZE)
    usual = min(CHUNK_SIZE, max(1, STRIP_BYTES // (4 * tests.n)))
    return tests, Points.of("train", train, options.chunk_size or train_size, usual)


def planned(path: str | Path, baseline: str, test: object, train: object, options: RunOptions) -> BaselinePlan:
    """Plan what `write_baseline` will do; the data are counted, and nothing is computed."""
    tests, trains = points_of(path, test, train, checked_options(options))
    return BaselinePlan(baseline, tests.n, trains.n, _strip(trains))


def _strip(train: Points) -> int:
    return min(train.n, train.sizes[0] if train.chunks is None else train.chunks.strip)


def _writer(
    path: str | Path,
    baseline: Baseline,
    points: tuple[Points, Points],
    scores: Scores,
    data: Mapping[str, str],
    options: RunOptions,
) -> InfluenceWriter:
    """Begin the result, or open the one that is to be resumed."""
    test, train = points
    layout = Layout(
        n_test=test.n,
        n_train=train.n,
        strip=_strip(train),
        top_k=options.top_k,
        mantissa_bits=options.mantissa_bits,
    )
    fingerprints = {**data, **scores.fingerprints}
    settings: dict[str, object] = {
        "solver": {"method": baseline.method, **baseline.settings()},
        "mode": str(options.mode),
        "chunks": {"test": list(test.sizes), "train": layout.strip, "panel": test.n, "solve": "rows"},
        **{name: scores.attributes[name] for name in ("objective", "structure") if name in scores.attributes},
    }
    if options.resumes:
        try:
            return InfluenceWriter.resume(path, layout, fingerprints, settings)
        except StoreNotFoundError:
            pass  # nothing to go on with: begin
    attributes = {
        **options.attributes,
        **scores.attributes,
        **settings,
        "baseline": True,
        "fingerprints": fingerprints,
        "remarks": [baseline.remark],
        "error_bound": "none",
        "versions": {name: version(name) for name in ("torch", "zarr", "numpy", *_packages(baseline))}
        | {"python": platform.python_version()},
    }
    return InfluenceWriter.create(path, layout, attributes, overwrite=options.replaces)


def _packages(baseline: Baseline) -> list[str]:
    return ["bm25s"] if isinstance(baseline, Bm25) else []


def _write(writer: InfluenceWriter, scores: Scores, bars: Progress) -> None:
    pending = writer.pending()
    with bars.stage("strips", len(pending), "strips") as bar:
        for i in pending:
            columns = writer.layout.strip_slice(i)
            strip = scores.strip(i, columns.start, columns.stop)
            writer.write_strip(i, np.asarray(strip.values, dtype=np.float32), loss=strip.loss)
            bar.advance()
    if scores.test_loss is not None:
        writer.write_test(slice(0, writer.layout.n_test), loss=scores.test_loss)
    writer.finish({"seconds": {name: round(seconds, 3) for name, seconds in bars.seconds.items()}})
