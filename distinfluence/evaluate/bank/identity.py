"""What a bank belongs to: the data in their order, the trainer and the loss, as digests that have names."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from distinfluence.errors import CorruptStoreError
from distinfluence.model.identity.structure import identity
from distinfluence.model.objective import Objective
from distinfluence.scaling.data.recipe import Recipe
from distinfluence.store.format.fingerprint import Json, canonical_json, fingerprint_array, to_json

DEPTH = 4  # Levels of names that a difference is told by.
NAMED = 5  # Differences that a message lists.


@dataclass(frozen=True)
class DataIdentity:
    """A data set by its content.

    Attributes:
        n: Number of samples.
        in_order: Digest of all samples, in their order.
        in_any_order: Digest of all samples, whatever their order.
    """

    n: int
    in_order: str
    in_any_order: str

    @classmethod
    def of(cls, keys: NDArray[np.int64]) -> Self:
        """keys: hash of each sample's content, [n]."""
        return cls(len(keys), fingerprint_array(keys), fingerprint_array(np.sort(keys)))

    def difference(self, here: "DataIdentity", what: str) -> str:
        """Say how the data of the bank differ from those at hand; empty if they do not."""
        if self.in_order == here.in_order:
            return ""
        if self.in_any_order == here.in_any_order:
            return f"the {what} data are in another order"
        counts = "" if self.n == here.n else f" ({self.n} samples, here {here.n})"
        return f"the {what} data differ{counts}"


@dataclass(frozen=True)
class Belongs:
    """What the rows of a bank belong to.

    Attributes:
        training: The training data, whose order gives indices their meaning.
        test: The test data.
        trainer: Name → digest of what the trainer consists of.
        loss: Name → digest of what the loss consists of.
    """

    training: DataIdentity
    test: DataIdentity
    trainer: dict[str, str]
    loss: dict[str, str]

    @property
    def n_train(self) -> int:
        """Number of training points."""
        return self.training.n

    @property
    def n_test(self) -> int:
        """Number of test points."""
        return self.test.n

    def to_json(self) -> Json:
        """As JSON values."""
        data = {name: [one.n, one.in_order, one.in_any_order] for name, one in self._data.items()}
        return to_json({**data, "trainer": self.trainer, "loss": self.loss}, "belongs")

    @property
    def _data(self) -> dict[str, DataIdentity]:
        return {"training": self.training, "test": self.test}

    @classmethod
    def from_json(cls, raw: object, path: Path) -> Self:
        """Return it again. Raises CorruptStoreError for anything else."""
        try:
            assert isinstance(raw, dict)
            training, test = (DataIdentity(int(n), str(a), str(b)) for n, a, b in (raw["training"], raw["test"]))
            trainer, loss = ({str(k): str(v) for k, v in raw[name].items()} for name in ("trainer", "loss"))
        except (AssertionError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptStoreError(
                f"`path` {path} does not say which data and trainer its rows belong to. Delete the bank."
            ) from error
        return cls(training, test, trainer, loss)


def differences(bank: Belongs, here: Belongs) -> list[str]:
    """Say what differs between a bank and what is at hand; empty if nothing does."""
    data = [bank.training.difference(here.training, "training"), bank.test.difference(here.test, "test")]
    found = [text for text in data if text]
    for what, there, own in (("`train`", bank.trainer, here.trainer), ("the loss", bank.loss, here.loss)):
        names = sorted(name for name in {*there, *own} if there.get(name) != own.get(name))
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            found.append(f"{what} differs in {', '.join(names[:NAMED])}{more}")
    return found


def trainer_identity(train: object) -> dict[str, str]:
    """Return what fixes a trainer: what its method `settings` returns if it has one, else its code and attributes."""
    return digests(_known(train, DEPTH))


def _known(value: object, depth: int) -> Json:
    """Return the identity of a value; objects of this package, which `identity` knows by name alone, by attributes."""
    settings = None if isinstance(value, type) else getattr(value, "settings", None)
    if callable(settings):
        return {"class": identity(type(value)), "settings": to_json(settings(), "settings")}
    if isinstance(value, Recipe):
        return {"recipe": value.target, "arguments": identity(value.arguments), "code": identity(value.resolve())}
    found = identity(value)
    ours = type(value).__module__.partition(".")[0] == "distinfluence"
    if isinstance(found, str) and ours and depth and hasattr(value, "__dict__"):
        unchanging = getattr(type(value), "UNCHANGING", ())

        def relevant(name: str) -> bool:
            return not name.startswith("_") and name not in unchanging

        own = {name: _known(inner, depth - 1) for name, inner in vars(value).items() if relevant(name)}
        return {"class": found, **own}
    return found


def loss_identity(objective: Objective) -> dict[str, str]:
    """Return what fixes the loss and the measurement."""
    return digests(to_json(objective.settings(), "objective"))


def digests(value: Json) -> dict[str, str]:
    """Return name → digest for the parts of a JSON value: values may hold what nobody wants to see in a file."""
    return dict(_parts(value, "", DEPTH))


def _parts(value: Json, name: str, depth: int) -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value and depth:
        inner = (_parts(item, f"{name}.{key}" if name else str(key), depth - 1) for key, item in value.items())
        return [part for parts in inner for part in parts]
    return [(name or "itself", hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16])]
