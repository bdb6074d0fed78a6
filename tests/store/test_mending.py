"""Whatever byte of a result is damaged is found, and is made again with nothing else."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distinfluence.store import Damage, InfluenceWriter, Layout, find_damage, mend, open_influences
from tests.store.conftest import matrix, write_all

FILES = {
    "influences/c/0/1": Damage((1,), ()),
    "strip_status/c/2": Damage((2,), ()),
    "train_loss/c/0": Damage((0,), ()),
    "train_total/c/1": Damage((1,), ()),
    "strips/index/c/1/0/0/0": Damage((1,), ()),
    "test_loss/c/0": Damage((), ("test_loss",)),
    "iterations/c/0": Damage((), ("iterations",)),
    "top_index": Damage((), ("top_index",)),
    "bottom_value": Damage((), ("bottom_value",)),
}


def complete(writer: InfluenceWriter, layout: Layout) -> None:
    ones = np.ones(layout.n_test)
    writer.write_test(slice(0, layout.n_test), loss=ones, iterations=ones.astype(int), converged=ones > 0)
    write_all(writer, matrix(layout))
    writer.finish()


def damage(file: Path, how: str) -> None:
    if file.is_dir():  # of a ranking, whose chunks are its own matter
        file = next(each for each in sorted(file.rglob("*")) if each.is_file() and each.name != "zarr.json")
    if how == "gone":
        file.unlink()
    elif how == "torn":
        os.truncate(file, 3)
    else:
        content = bytearray(file.read_bytes())
        content[0] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize("how", ["flipped", "torn", "gone"])
@pytest.mark.parametrize("name", list(FILES))
def test_a_damaged_byte_is_found_and_made_again(make: Any, layout: Any, name: str, how: str) -> None:
    writer, values = make(layout, finish=False)
    complete(writer, layout)
    assert not find_damage(writer.path)
    assert str(find_damage(writer.path)) == "nothing"
    before = {file: file.stat().st_mtime_ns for file in (writer.path / "influences").rglob("?") if file.is_file()}
    damage(writer.path / name, how)
    found = find_damage(writer.path)
    if how == "gone" and not name.startswith(("influences", "top", "bottom")):
        return  # reads as what was never given, or as a strip that is pending
    assert found == FILES[name]
    again = InfluenceWriter.open(writer.path)
    assert mend(again) == found
    assert again.pending() == list(found.strips)
    assert not open_influences(writer.path).complete
    assert again.knows_tests() == (not any(array in found.arrays for array in ("test_loss", "iterations")))
    complete(again, layout)
    assert not find_damage(writer.path)
    result = open_influences(writer.path)
    np.testing.assert_array_equal(result[:], values)
    np.testing.assert_array_equal(result.top(0).values, np.sort(values[0])[::-1][:4])
    now = {file: file.stat().st_mtime_ns for file in before}
    assert {int(file.name) for file in before if before[file] != now[file]} == set(found.strips)


def test_damage_is_said_in_words() -> None:
    assert str(Damage(tuple(range(12)), ("top_index",))) == "strips 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, … and `top_index`"
