"""Baselines as values, and what each makes of one strip of training points."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from typing_extensions import override

from distinfluence.errors import NonFiniteError, SettingError
from distinfluence.evaluate.baselines.points import Points
from distinfluence.influence.arrays import to_numpy, to_tensor_batch
from distinfluence.model.batch import Batch
from distinfluence.model.blocks import BlockMode, ParameterBlocks
from distinfluence.model.counter_random import Uniform
from distinfluence.model.gradients import micro_batches
from distinfluence.model.identity.structure import structure
from distinfluence.model.objective import Loss, Objective, as_objective
from distinfluence.model.sample_risk import SampleRisk
from distinfluence.scaling.data.recipe import fingerprint_module
from distinfluence.scaling.worker.cache import named_samples
from distinfluence.solvers.base import check_count

Values = NDArray[np.floating[Any]]
SEEDS = 2**32  # Streams of random numbers that can be told apart.


@dataclass(frozen=True)
class Strip:
    """The scores of some training points for all test points, [n_test, n]. loss: of the training points, [n]."""

    values: Values
    loss: Values | None = None


class Scores(ABC):
    """A baseline that has seen all points, ready to score strips.

    Attributes:
        fingerprints: Name → sha256 of what was used in addition to the data.
        attributes: What the result records in addition.
        test_loss: Losses of the test points, [n_test]; None where none were computed.
    """

    fingerprints: Mapping[str, str] = {}
    attributes: Mapping[str, object] = {}
    test_loss: Values | None = None

    @abstractmethod
    def strip(self, index: int, start: int, stop: int) -> Strip:
        """Score a strip.

        Args:
            index: Number of the strip.
            start: Its first training point.
            stop: One after its last training point.
        """


class Baseline(ABC):
    """A way to score training points without gradients. Subclasses are frozen dataclasses of its settings.

    Attributes:
        method: Its name in results and job files.
        remark: What the result says of it, a sentence.
    """

    method: ClassVar[str]
    remark: ClassVar[str]

    @abstractmethod
    def settings(self) -> dict[str, object]:
        """Return what fixes the scores in addition to the data.

        Returns:
            Name → value, in JSON's types.
        """

    @abstractmethod
    def begin(self, test: Points, train: Points) -> Scores:
        """Do the work that is not of a single strip.

        Args:
            test: The test points.
            train: The training points.

        Returns:
            What scores the strips.
        """


@dataclass(frozen=True)
class RandomScores(Baseline):
    """Scores that are drawn uniformly from -1 to 1: what a ranking by chance reaches.

    A score is a function of the seed and of the numbers of both points alone. Chunks, strips and interruptions change
    nothing.

    Args:
        seed: Seed of the draw, 0 ≤ seed < 2³².

    Raises:
        SettingError: If the seed is out of range.
    """

    method: ClassVar[str] = "random"
    remark: ClassVar[str] = "Random scores: no model was used."
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("seed", self.seed, least=0)
        if self.seed >= SEEDS:
            raise SettingError(f"`seed` must be below {SEEDS}, got {self.seed}. Take a smaller one.")

    @override
    def settings(self) -> dict[str, object]:
        return {"seed": int(self.seed)}

    @override
    def begin(self, test: Points, train: Points) -> Scores:
        return _Drawn(int(self.seed), test.n)


@dataclass(frozen=True)
class _Drawn(Scores):
    seed: int
    n_test: int

    def strip(self, index: int, start: int, stop: int) -> Strip:
        drawn = Uniform(torch.arange(start, stop), self.seed)(self.n_test)
        return Strip((2.0 * drawn - 1.0).T.numpy())


@dataclass(frozen=True, eq=False)
class PlainLoss(Baseline):
    """Minus the loss of each training point, for every test point: points that the model fits badly count as harmful.

    The usual baseline of mislabel detection, where `net_harm` of these scores ranks by the loss. It does not
    distinguish test points. One forward pass over the data, no gradients.

    Args:
        model: Any `nn.Module`. It is only read.
        loss: A torch loss of (outputs, targets), or an `Objective`.
        device: Where to evaluate; the device of the model if None.
    """

    method: ClassVar[str] = "loss"
    remark: ClassVar[str] = "Scores are minus the losses of the training points, the same for every test point."
    model: nn.Module
    loss: Loss | Objective
    device: torch.device | None = None

    @override
    def settings(self) -> dict[str, object]:
        return {}

    @override
    def begin(self, test: Points, train: Points) -> Scores:
        blocks = ParameterBlocks.of(self.model, BlockMode.FULL)
        return _Losses(SampleRisk(self.model, as_objective(self.loss), blocks, self.device), test, train)


class _Losses(Scores):
    """Losses of one model."""

    def __init__(self, risk: SampleRisk, test: Points, train: Points) -> None:
        for points in (test, train):
            if points.chunks is None:
                raise SettingError(
                    f"`{points.axis}` must be data that the model takes, got texts alone. Pass what it was trained on."
                )
        self._risk, self._train = risk, train
        module = risk.module
        kind = type(module)
        self.fingerprints = {"parameters": fingerprint_module(module)}
        self.attributes = {
            "objective": risk.objective.settings(),
            "structure": structure(module),
            "model": {"class": f"{kind.__module__}.{kind.__qualname__}"},
        }
        losses = [self._of(test, index, measured=True) for index in range(len(test.sizes))]
        self.test_loss = np.concatenate(losses)
        self._n_test = test.n

    @override
    def strip(self, index: int, start: int, stop: int) -> Strip:
        losses = self._of(self._train, index)
        return Strip(np.broadcast_to(-losses, (self._n_test, len(losses))), losses)

    def _of(self, points: Points, index: int, measured: bool = False) -> Values:
        """Losses of the points of a chunk, or what is measured of them."""
        assert points.chunks is not None
        start = points.chunks.starts[index]
        with named_samples(index, start, points.sizes[index]):
            batch = self._risk.place(to_tensor_batch(points.load(index)))
            if index == 0:
                self._risk.check(batch)
            values = np.concatenate([*self._evaluated(batch, measured)])
            bad = np.flatnonzero(~np.isfinite(values)).tolist()
            if bad:
                raise NonFiniteError(
                    f"`model` gives NaN or infinity as the loss of samples {bad[:10]} of this batch ({len(bad)} of "
                    f"{len(values)}). Look at these samples."
                )
            return values

    def _evaluated(self, batch: Batch, measured: bool) -> Iterator[Values]:
        value = self._risk.measurements if measured else self._risk.losses
        with torch.no_grad():
            for part in micro_batches(self._risk, batch):
                yield np.asarray(to_numpy(value(self._risk.parameters, part)), dtype=np.float64)
