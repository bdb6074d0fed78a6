"""The file of factors in the scratch folder, with the fields of each test point and checksums of both."""

import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distinfluence.atomic import appearing
from distinfluence.influence.arrays import (
    Array,
)
from distinfluence.influence.report import SolveReport
from distinfluence.scaling.scratch import save_whole, scratch_errors
from distinfluence.store import Layout
from distinfluence.store.format.layout import FLOAT32_BITS


def factor_fields(factors: torch.Tensor, report: SolveReport, losses: Array, norms: Array) -> dict[str, Array]:
    """Return each test point's fields by name; error bounds leave room for float32 storage."""
    bound = np.full(len(losses), np.nan)
    if report.error_bound is not None:
        sizes = torch.linalg.vector_norm(factors, dim=1, dtype=torch.float64).cpu()
        bound = (report.error_bound + torch.finfo(torch.float32).eps * sizes).numpy()
    return {
        "factor_norm": np.asarray(torch.linalg.vector_norm(factors, dim=1, dtype=torch.float64).cpu()),
        "loss": losses,
        "gradient_norm": norms,
        "relative_residual": report.relative_residual.numpy(),
        "iterations": report.iterations.numpy(),
        "converged": report.converged.numpy(),
        "error_bound": bound,
    }


FIELDS = {"loss": "f8", "gradient_norm": "f8", "relative_residual": "f8", "iterations": "i8", "converged": "?"}


FIELDS |= {"error_bound": "f8", "factor_norm": "f8"}


def stored_fields(fields: Mapping[str, Array], layout: Layout) -> dict[str, Array]:
    """Return the fields for the result, whose error bounds hold for rounded values, too."""
    kept = {name: values for name, values in fields.items() if name != "factor_norm"}
    if layout.mantissa_bits < FLOAT32_BITS:
        bound, norm = (np.asarray(fields[name], dtype=np.float64) for name in ("error_bound", "factor_norm"))
        kept["error_bound"] = bound + layout.rounding_error * norm
    return kept


def make_factor_file(file: Path, n_test: int, p: int, dtype: np.dtype[Any]) -> None:
    """Make an empty file for all factors [n_test, p], unless a whole one is there. Raises StoreError."""
    there = _factor_rows(str(file))
    if there is None or there.shape != (n_test, p) or there.dtype != dtype:
        with scratch_errors(file.parent, file.name), appearing(file) as partial:
            np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=(n_test, p))


def _factor_rows(file: str) -> "np.memmap[Any, Any] | None":
    """Return the factors, mapped to be read; None where there is no such file, or a torn one."""
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if isinstance(found, np.memmap) else None


def save_factors(file: str, start: int, factors: Array, fields: Mapping[str, Array]) -> None:
    """Write the factors' rows from `start`, then the fields in a file of their own, which says that both are there.

    That file has checksums of each row, and of each point's fields.

    Raises:
        StoreError: A file cannot be written.
    """
    with scratch_errors(Path(file).parent, f"{factors.nbytes / 2**20:.0f} MiB of factors"):
        offset = np.load(file, mmap_mode="r", allow_pickle=False).offset
        with open(file, "r+b", buffering=0) as rows:  # not through the map: a full disk would be a SIGBUS there
            rows.seek(offset + start * factors[0].nbytes)
            left = memoryview(np.ascontiguousarray(factors).reshape(-1).view(np.uint8).data)
            while left:
                left = left[rows.write(left) or 0 :]
            os.fsync(rows.fileno())
    known = [np.asarray(fields[name], dtype=np.float64) for name in FIELDS]
    stored = np.stack([*known, _checksums(factors)])
    save_whole(fields_file(file, start), np.vstack([stored, _checksums(stored.T)]), sync=True)


def saved_fields(file: str, start: int, check: bool = True) -> dict[str, Array] | None:
    """Return the fields that `save_factors` wrote for the rows from `start`; None if they are not as written.

    Args:
        file: The file of the factors.
        start: The first row.
        check: Whether to read the rows, too, and to return None if these have changed.
    """
    try:
        stored = np.load(fields_file(file, start), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if stored.ndim != 2 or len(stored) != len(FIELDS) + 2 or (_checksums(stored[:-1].T) != stored[-1]).any():
        return None
    if check:
        rows = _factor_rows(file)
        if rows is None or (_checksums(rows[start : start + stored.shape[1]]) != stored[-2]).any():
            return None
    return {name: values.astype(kind) for (name, kind), values in zip(FIELDS.items(), stored[:-2], strict=True)}


def _checksums(rows: Array) -> NDArray[np.float64]:
    """crc32 of each row [n, …]; exact as float64, in which fields are stored."""
    return np.array([zlib.crc32(np.ascontiguousarray(row).view(np.uint8).data) for row in rows], dtype=np.float64)


def fields_file(file: str, start: int) -> Path:
    """Return where the fields of the test points from `start` are, if their factors have been made."""
    return Path(file).with_name(f"fields-{start:09d}.npy")
