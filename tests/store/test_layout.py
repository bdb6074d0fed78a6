import math
from typing import Any

import pytest

from distinfluence.errors import ChunkError, DistinfluenceError, IndexRangeError, SettingError, ShapeError
from distinfluence.store import Layout


@pytest.mark.parametrize(
    ("sizes", "chunk", "shard", "n_strips"),
    [
        (dict(n_test=1024, n_train=131072, strip=4096), (32, 2048), (1024, 4096), 32),
        (dict(n_test=33, n_train=10, strip=10), (32, 10), (64, 10), 1),
        (dict(n_test=1, n_train=1, strip=1), (1, 1), (1, 1), 1),
        (dict(n_test=7, n_train=20, strip=7), (7, 7), (7, 7), 3),
        (dict(n_test=7, n_train=20_000, strip=5000), (7, 1250), (7, 5000), 4),
        (dict(n_test=7, n_train=20_000, strip=4099), (7, 4099), (7, 4099), 5),  # a prime, kept whole
        (dict(n_test=3, n_train=6, strip=2, input_shape=(4, 5)), (3, 2, 4, 5), (3, 2, 4, 5), 3),
        (
            dict(n_test=64, n_train=512, strip=64, input_shape=(3, 224, 224)),
            (6, 1, 3, 224, 224),
            (66, 64, 3, 224, 224),
            8,
        ),
    ],
)
def test_strips_are_cut_into_chunks_that_divide_them(sizes: Any, chunk: Any, shard: Any, n_strips: Any) -> None:
    layout = Layout(**sizes)
    assert (layout.chunk_shape, layout.shard_shape, layout.n_strips) == (chunk, shard, n_strips)
    assert all(s % c == 0 for s, c in zip(shard, chunk, strict=True))


@pytest.mark.parametrize("n_train", [1, 7, 8, 9, 100])
@pytest.mark.parametrize("strip", [1, 3, 7])
def test_strips_cover_every_training_point_once(n_train: Any, strip: Any) -> None:
    layout = Layout(n_test=2, n_train=n_train, strip=min(strip, n_train))
    covered = [j for i in range(layout.n_strips) for j in range(*layout.strip_slice(i).indices(n_train))]
    assert covered == list(range(n_train))


def test_inner_chunks_stay_small_when_entries_are_whole_inputs() -> None:
    for side in (8, 32, 64, 224):
        layout = Layout(n_test=100, n_train=4096, strip=1024, input_shape=(3, side, side))
        assert math.prod(layout.chunk_shape) <= 2**20


def test_a_strip_without_a_usable_divisor_is_refused_with_ones_that_would_do() -> None:
    with pytest.raises(ChunkError, match=r"`strip`.*got 10007.*8192 or 10240"):
        Layout(n_test=4, n_train=100_000, strip=10_007)
    for strip in (8192, 10240):
        Layout(n_test=4, n_train=100_000, strip=strip)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n_test": 0}, ShapeError, "`n_test` must be at least 1, got 0"),
        ({"n_train": 0}, ShapeError, "`n_train` must be at least 1, got 0"),
        ({"n_train": 2**31}, ShapeError, "`n_train` must be at most"),
        ({"n_test": 2.0}, ShapeError, "`n_test` must be an integer, got 2.0"),
        ({"n_test": True}, ShapeError, "`n_test` must be an integer, got True"),
        ({"strip": 0}, ChunkError, "`strip` must be at least 1"),
        ({"strip": 11}, ChunkError, r"`strip` must be at most `n_train`=10, got 11. Pass min\(strip, n_train\)"),
        ({"input_shape": (3, 0)}, ShapeError, r"`input_shape\[1\]` must be at least 1"),
        ({"input_shape": 3}, ShapeError, "`input_shape` must be a tuple"),
        ({"top_k": 0}, SettingError, "`top_k` must be at least 1"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(change: Any, error: Any, message: Any) -> None:
    with pytest.raises(error, match=message) as raised:
        Layout(**{"n_test": 2, "n_train": 10, "strip": 5, **change})
    assert isinstance(raised.value, DistinfluenceError)


def test_a_strip_that_is_not_there_is_refused() -> None:
    layout = Layout(n_test=2, n_train=10, strip=5)
    for i in (2, -1):
        with pytest.raises(IndexRangeError, match="from 0 to 1"):
            layout.strip_slice(i)


def test_a_layout_survives_the_attributes() -> None:
    layout = Layout(n_test=2, n_train=10, strip=5, input_shape=(2, 3), top_k=7)
    assert Layout.from_attributes(layout.to_attributes()) == layout
