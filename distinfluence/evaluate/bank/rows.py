"""The bank on the disk: a zarr group of its own, with one row for each retraining.

A row is found by the key of its retraining. Keys are written last, so a row is visible only when it is whole. A row
that is damaged, or whose weights are not those that its key promises, counts as missing. Nothing is unpickled.
"""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from distinfluence.atomic import appearing
from distinfluence.errors import CorruptStoreError, FingerprintError, ForeignStoreError, StoreError
from distinfluence.evaluate.bank.identity import Belongs, differences
from distinfluence.evaluate.retraining import Retraining
from distinfluence.store.format.fingerprint import to_json
from distinfluence.store.format.folder import LocalFolder, attributes_of, surfaced_errors
from distinfluence.store.format.layout import ArraySpec
from distinfluence.store.read.guarded_store import GuardedStore, checked, is_bounded

FORMAT, FORMAT_VERSION = "distinfluence-bank", 1
BLOCK = 256  # Rows by which the arrays grow.
COLUMNS = 2**20  # Weights in one chunk, at most.
READ_BYTES = 2**26  # Of weights that are read at once.
_REPEAT = "repeat"  # Name of an attribute.
_RESUME = "run again; the retrainings that were written are kept."


@dataclass(frozen=True, eq=False)
class BankRow:
    """What is known of one retrained model.

    Attributes:
        retraining: The training run.
        losses: What the model makes of the test points, [n_test].
        member_losses: Its losses at the drawn training points, [n_probe].
    """

    retraining: Retraining
    losses: NDArray[np.float64]
    member_losses: NDArray[np.float64]

    @cached_property
    def subset(self) -> str:
        """Digest of the weights: equal for other seeds of the same training points."""
        return hashlib.sha256(self.retraining.weights.tobytes()).hexdigest()

    @cached_property
    def outcome(self) -> str:
        """Digest of all losses."""
        return hashlib.sha256(self.losses.tobytes() + self.member_losses.tobytes()).hexdigest()


class BankRows:
    """The rows of a bank. Only one process may write at a time; see `Partition.alone`.

    Args:
        path: The bank's folder, which is made if there is none.
        belongs: What the bank was made with, or will be.
        probe: The drawn training points, ascending, [n_probe].

    Attributes:
        damaged: Number of rows that could not be read and count as missing.
        repeat: Largest change of a loss when a model was trained a second time in the same way; None before that.

    Raises:
        FingerprintError: If the bank belongs to other data, another trainer or another loss.
        ForeignStoreError: If the path holds something else.
        StoreError: If the bank has a newer format, or cannot be read.
        CorruptStoreError: If an array is not what the bank says.
    """

    def __init__(self, path: LocalFolder, belongs: Belongs, probe: NDArray[np.int64]) -> None:
        self.path, self.damaged = path, 0
        self._sizes = belongs.n_train, belongs.n_test, len(probe)
        with surfaced_errors("create", path, _RESUME):
            if not path.is_used():
                self._create(belongs, probe)
        attributes = _attributes(path)
        found = differences(Belongs.from_json(attributes.get("belongs"), path), belongs)
        if found:
            raise FingerprintError(
                f"`path` {path} is the bank of other retrainings: {'; '.join(found)}. Pass another path, or delete the "
                "bank to train all models again."
            )
        repeat = attributes.get(_REPEAT)
        self.repeat = float(repeat) if isinstance(repeat, (int, float)) else None
        self._slots: dict[str, int] = {}
        self._opened: dict[str, zarr.Array[Any]] = {}
        self._capacity = 0
        self.refresh()

    def _create(self, belongs: Belongs, probe: NDArray[np.int64]) -> None:
        attributes: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "belongs": belongs.to_json(),
            "probe": to_json(probe.tolist(), "probe"),
            "versions": {name: version(name) for name in ("torch", "numpy", "zarr")},
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with appearing(self.path) as new:
                group = zarr.open_group(str(new), mode="w-", zarr_format=3, attributes=attributes)
                for spec in self._specs(BLOCK):
                    group.create_array(
                        spec.name,
                        shape=spec.shape,
                        chunks=spec.chunks,
                        dtype=spec.dtype,
                        fill_value=spec.fill,
                        compressors=[BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"), Crc32cCodec()],
                        dimension_names=spec.dims,
                    )
        except OSError:
            if not self.path.is_used():  # else another process was faster
                raise

    def _specs(self, capacity: int) -> list[ArraySpec]:
        n_train, n_test, n_probe = self._sizes
        rows, nan = capacity, float("nan")
        wide = (1, min(n_train, COLUMNS))
        return [
            ArraySpec("weights", (rows, n_train), wide, None, "float64", nan, ("retraining", "train")),
            ArraySpec("seed", (rows,), (1,), None, "int64", 0, ("retraining",)),
            ArraySpec("losses", (rows, n_test), (1, n_test), None, "float64", nan, ("retraining", "test")),
            ArraySpec("member_losses", (rows, n_probe), (1, n_probe), None, "float64", nan, ("retraining", "probe")),
            ArraySpec("key", (rows, 32), (1, 32), None, "uint8", 0, ("retraining", "byte")),
        ]

    def _open(self, *, write: bool = False) -> dict[str, zarr.Array[Any]]:
        """Open the arrays, as they are now: another process may have made them longer."""
        store = GuardedStore(self.path, read_only=not write)
        group = zarr.open_group(store, mode="r+" if write else "r", zarr_format=3, use_consolidated=False)
        key = group.get("key")
        self._capacity = key.shape[0] if isinstance(key, zarr.Array) else 0
        arrays = {spec.name: self._checked(group.get(spec.name), spec) for spec in self._specs(self._capacity)}
        for name, array in arrays.items():
            if not is_bounded(array):
                raise CorruptStoreError(
                    f"`{name}` of {self.path} has codecs that no bank has: {array.compressors}. Delete the bank."
                )
        return arrays

    def _checked(self, array: object, spec: ArraySpec) -> zarr.Array[Any]:
        """Check an array, which may be longer than the keys: who made it longer was killed before the keys were."""
        length = array.shape[0] if isinstance(array, zarr.Array) and array.ndim else 0
        spec = spec._replace(shape=(max(length, spec.shape[0]), *spec.shape[1:]))
        return checked(array, spec, self.path)

    def refresh(self) -> None:
        """Read which rows are there: another process may have written some."""
        with surfaced_errors("read", self.path, _RESUME):
            key = self._open()["key"]
            self._slots, self._opened = {}, {}
            for start in range(0, self._capacity, BLOCK):
                for slot, own in enumerate(self._keys(key, start, min(start + BLOCK, self._capacity)), start):
                    if own.any():
                        self._slots.setdefault(own.tobytes().hex(), slot)

    def _keys(self, key: Any, start: int, stop: int) -> NDArray[np.uint8]:
        """Return the keys of some rows, [n, 32]; zeros where there is none, or a damaged one."""
        try:
            return np.asarray(key[start:stop])
        except (ValueError, RuntimeError, IndexError):
            if stop - start == 1:
                self.damaged += 1
                return np.zeros((1, 32), dtype=np.uint8)
            middle = (start + stop) // 2
            return np.concatenate([self._keys(key, start, middle), self._keys(key, middle, stop)])

    def __contains__(self, key: str) -> bool:
        return key in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def read(self, wanted: Mapping[str, Retraining]) -> dict[str, BankRow]:
        """Return the rows of retrainings that are there and whole, by key."""
        there = [(retraining, key) for key, retraining in wanted.items() if key in self._slots]
        step = max(1, READ_BYTES // (8 * self._sizes[0]))
        found: dict[str, BankRow] = {}
        if there:
            with surfaced_errors("read", self.path, _RESUME):
                arrays = self._open()
                for start in range(0, len(there), step):
                    found |= self._read(arrays, there[start : start + step])
        for _, key in there:
            if key not in found:
                self.damaged += 1
                del self._slots[key]
        return found

    def _read(self, arrays: Mapping[str, Any], there: Sequence[tuple[Retraining, str]]) -> dict[str, BankRow]:
        slots = np.array([self._slots[key] for _, key in there])
        try:
            weights, seeds, losses, members = (
                np.asarray(arrays[name].oindex[slots]) for name in ("weights", "seed", "losses", "member_losses")
            )
        except (ValueError, RuntimeError, IndexError):
            half = len(there) // 2  # one of them is damaged
            return self._read(arrays, there[:half]) | self._read(arrays, there[half:]) if half else {}
        return {
            key: BankRow(retraining, losses[i], members[i])
            for i, (retraining, key) in enumerate(there)
            if np.array_equal(weights[i], retraining.weights)
            and seeds[i] == retraining.seed
            and np.isfinite(losses[i]).all()
            and np.isfinite(members[i]).all()
        }

    def write(self, rows: Mapping[str, BankRow]) -> None:
        """Add rows by their keys; those that are there already are skipped."""
        new = {key: row for key, row in rows.items() if key not in self._slots}
        if not new:
            return
        with surfaced_errors("write", self.path, _RESUME):
            slots = self._free(len(new))
            arrays, kept = self._writable(), [*new.values()]
            _put(arrays["weights"], slots, np.stack([row.retraining.weights for row in kept]))
            _put(arrays["seed"], slots, np.array([row.retraining.seed for row in kept], dtype=np.int64))
            _put(arrays["losses"], slots, np.stack([row.losses for row in kept]))
            _put(arrays["member_losses"], slots, np.stack([row.member_losses for row in kept]))
            # last: what has a key is whole
            _put(arrays["key"], slots, np.stack([np.frombuffer(bytes.fromhex(key), np.uint8) for key in new]))
        self._slots |= dict(zip(new, slots, strict=True))

    def write_repeat(self, difference: float) -> None:
        """Note by how much losses changed when a model was trained a second time in the same way."""
        with surfaced_errors("write", self.path, _RESUME):
            zarr.open_group(str(self.path), mode="r+", zarr_format=3, use_consolidated=False).attrs[_REPEAT] = (
                difference
            )
        self.repeat = difference

    def _writable(self) -> dict[str, zarr.Array[Any]]:
        """Return the arrays to write to, opened once: nobody else makes them longer meanwhile."""
        if not self._opened:
            self._opened = self._open(write=True)
        return self._opened

    def _free(self, n: int) -> list[int]:
        """Return the first n places without a row, after making the arrays longer where there are too few."""
        if self._capacity < len(self._slots) + n:
            capacity = -(-(len(self._slots) + n) // BLOCK) * BLOCK
            for array in self._writable().values():  # the keys last, which say how many there are
                array.resize((capacity, *array.shape[1:]))
            self._opened = {}
            self._writable()
        used = set(self._slots.values())
        return list(itertools.islice((slot for slot in range(self._capacity) if slot not in used), n))


def _put(array: zarr.Array[Any], slots: Sequence[int], values: NDArray[Any]) -> None:
    if slots[-1] - slots[0] + 1 == len(slots):
        array[slots[0] : slots[-1] + 1] = values
    else:
        array.oindex[np.array(slots)] = values


def _attributes(path: LocalFolder) -> dict[str, Any]:
    """Return the attributes of the bank at `path`. Raises ForeignStoreError, StoreError."""
    with surfaced_errors("read", path, _RESUME):
        attributes = attributes_of(path, FORMAT)
        if attributes is None:
            raise ForeignStoreError(
                f"`path` {path} is not a bank of retrainings: {path.looks_like()}. Pass another path; nothing was "
                "touched."
            )
    found = attributes.get("format_version")
    if found != FORMAT_VERSION:
        raise StoreError(
            f"`path` {path} is a bank of format version {found!r}, this distinfluence reads {FORMAT_VERSION}. Install "
            "the distinfluence that wrote it, or pass another path."
        )
    return attributes
