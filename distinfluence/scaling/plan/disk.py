"""Whether the disks have room for what a plan will write."""

import os
import shutil
from pathlib import Path

from dask.utils import format_bytes

from distinfluence.errors import (
    DiskFullError,
)
from distinfluence.scaling.plan.plan import Plan


def require_space(plan: Plan, output: Path | None, scratch: Path, share_of_result: float = 1.0) -> None:
    """Check that the disks have room for what the plan will write.

    What lies at `output` counts as room: a run that goes on has written it already, and one that overwrites deletes it.
    Factors and fits in `scratch` count as room, too.

    Args:
        plan: The plan of the run.
        output: Where the result will be; None if that is not a folder.
        scratch: The scratch folder.
        share_of_result: Share of the plan's bytes, below 1 where values are rounded and compressed.

    Raises:
        DiskFullError: There is too little room. The message says how much to free.
    """
    needed: dict[int, list[tuple[str, Path, int, int]]] = {}
    places = [("scratch", scratch, plan.scratch_bytes)]
    if output is not None:
        places.insert(0, ("output", output, int(share_of_result * plan.disk_bytes)))
    for name, folder, nbytes in places:
        disk = _existing(folder)
        needed.setdefault(disk.stat().st_dev, []).append((name, disk, nbytes, bytes_in(folder)))
    for uses in needed.values():
        free = shutil.disk_usage(uses[0][1]).free
        missing = sum(max(0, nbytes - there) for _, _, nbytes, there in uses) - free
        if missing > 0:
            listed = " and ".join(f"{format_bytes(nbytes)} for `{name}`" for name, _, nbytes, _ in uses)
            raise DiskFullError(
                f"the run needs {listed} on the disk of {uses[0][1]}, which has {format_bytes(free)} free. Free "
                f"{format_bytes(missing)}, put `output` or `scratch` on another disk, or store fewer `mantissa_bits`."
            )


def bytes_in(folder: Path) -> int:
    """Return the bytes that the files in a folder take on the disk; holes in them take none."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name)).st_blocks * 512
            except OSError:  # gone meanwhile
                continue
    return total


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
