"""Drawing samples from all over a data set by their content, whatever their order, their batches or the process.

Half of the drawn samples have targets that differ from each other: what a loss does to a batch of one class says
nothing of a batch of several.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from distinfluence.model.batch import Batch, joined, leaves, map_batch
from distinfluence.model.counter_random import mixed, sample_keys

N_SAMPLES = 16
TARGETS = ("labels", "label", "targets", "target", "y")
N_TARGETS = 8  # of these samples, with different targets

Place = tuple[int, int]  # a chunk and the sample in it


def name_seed(name: str) -> int:
    """Return a seed that depends on a name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])


@dataclass(frozen=True)
class Draw:
    """Which samples of some chunks come into question, and a digest of them all.

    samples: (key, target, place), the N_SAMPLES of the smallest keys. by_target: the same for the smallest key of each
    of the N_TARGETS smallest targets. total: sums of all samples' bits, whatever their order; n: how many they are.
    """

    samples: tuple[tuple[int, int, Place], ...] = ()
    by_target: tuple[tuple[int, int, Place], ...] = ()
    total: tuple[int, int] = (0, 0)
    n: int = 0

    @classmethod
    def of(cls, batch: Batch, chunk: int) -> Self:
        """Draw from one chunk."""
        keys, targets = sample_keys(batch).cpu(), sample_keys(_target(batch)).cpu()
        by_key = keys.sort(stable=True)[1]
        distinct = by_key[torch.cat([torch.ones(1, dtype=torch.bool), keys[by_key].diff() != 0])]
        by_target = distinct[targets[distinct].sort(stable=True)[1]]  # for each target, the smallest key comes first
        first = by_target[torch.cat([torch.ones(1, dtype=torch.bool), targets[by_target].diff() != 0])]
        some = torch.cat([distinct[:N_SAMPLES], first[:N_TARGETS]]).tolist()
        entries = [(int(keys[i]), int(targets[i]), (chunk, i)) for i in some]
        total = int(mixed(keys + 1).sum()), int(mixed(keys + 2).sum())
        return cls(_smallest(entries), _each_target(entries), total, len(keys))

    def __add__(self, other: "Draw") -> "Draw":
        """Return the draw of both."""
        total = tuple((a + b) % 2**64 for a, b in zip(self.total, other.total, strict=True))
        return Draw(
            _smallest([*self.samples, *other.samples]),
            _each_target([*self.by_target, *other.by_target]),
            (total[0], total[1]),
            self.n + other.n,
        )

    @property
    def digest(self) -> str:
        """Of all samples' content, whatever their order."""
        return f"{self.total[0] % 2**64:016x}{self.total[1] % 2**64:016x}-{self.n}"

    @property
    def candidates(self) -> tuple[Place, ...]:
        """Samples that may be drawn yet."""
        return tuple(dict.fromkeys(place for _, _, place in (*self.by_target, *self.samples)))

    @property
    def places(self) -> dict[Place, int]:
        """The drawn samples, place → key, in the order of their keys."""
        chosen = {key: place for key, _, place in self.by_target}
        for key, _, place in self.samples:
            if len(chosen) < N_SAMPLES:
                chosen.setdefault(key, place)
        return {place: key for key, place in sorted(chosen.items())}


def _target(batch: Batch) -> Tensor:
    """Return what names a sample's class, if anything does: what is called so, else the last tensor."""
    named = {name.rpartition("[")[2].strip("]'\""): tensor for name, tensor in leaves(batch)}
    return next((named[name] for name in TARGETS if name in named), list(named.values())[-1])


def _smallest(entries: Sequence[tuple[int, int, Place]]) -> tuple[tuple[int, int, Place], ...]:
    """Each content once, whichever of equal samples comes first."""
    first = {entry[0]: entry for entry in sorted(entries, reverse=True)}
    return tuple(first[key] for key in sorted(first)[:N_SAMPLES])


def _each_target(entries: Sequence[tuple[int, int, Place]]) -> tuple[tuple[int, int, Place], ...]:
    first = {entry[1]: entry for entry in sorted(entries, reverse=True)}
    return tuple(first[target] for target in sorted(first)[:N_TARGETS])


def grouped(samples: Sequence[Batch]) -> list[Batch]:
    """Join samples (batches of one) with others of the same shapes and dtypes, the largest batch first."""
    groups: dict[tuple[object, ...], list[Batch]] = {}
    for sample in samples:
        form = tuple((name, tensor.dtype, tensor.shape[1:]) for name, tensor in leaves(sample))
        groups.setdefault(form, []).append(sample)
    ordered = sorted(groups.values(), key=len, reverse=True)
    with torch.inference_mode(False):
        return [joined(group) for group in ordered]


def sample_of(batch: Batch, index: int) -> Batch:
    """One sample of a batch, as a batch of its own that shares no memory with it."""
    with torch.inference_mode(False):
        return map_batch(lambda tensor: tensor[index : index + 1].clone(), batch)
