"""Sums over chunks on a cluster: few tasks, the same bits whoever takes part, few results held, no end."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Client
from torch import Tensor, nn

from distinfluence import (
    ArnoldiInfluence,
    CgInfluence,
    DaskInfluenceCalculator,
    EkfacInfluence,
    InfluenceFunctionModel,
    NystroemSketchInfluence,
)
from distinfluence.model.batch import Batch
from distinfluence.model.risk import LossAndGradient
from distinfluence.model.sample_risk import SampleRisk
from distinfluence.scaling import ClusterSpec, connected
from distinfluence.scaling.dispatch.dask_reducer import DaskReducer
from distinfluence.scaling.dispatch.tree_sum import Tree
from distinfluence.scaling.plan.tree_shape import PER_WORKER, groups, homes, pass_tasks, results_held
from tests.zoo import build


def test_many_chunks_are_few_groups_of_neighbours() -> None:
    for n in (1, 7, 256, 257, 4000):
        found = groups(n)
        assert [chunk for group in found for chunk in group] == list(range(n))
        assert len(found) == min(n, 256)
        assert max(map(len, found)) - min(map(len, found)) <= 1
        assert Tree([()] * len(found), {}).total + 1 == pass_tasks(n)
    assert pass_tasks(4000) == pass_tasks(256) == 256 + 64 + 16 + 4 + 1


def test_a_worker_has_the_groups_that_it_had_and_none_more_than_its_share() -> None:
    first = homes(256, {}, ["a", "b"])
    assert first == {group: "a" if group < 128 else "b" for group in range(256)}
    third = homes(256, first, ["a", "b", "c"])
    assert max(Counter(third.values()).values()) == 86
    assert sum(third[group] == first[group] for group in range(256)) == 172
    back = homes(256, third, ["b", "c"])
    assert sum(back[group] == third[group] for group in range(256)) == 170


class Done:
    """In place of a future."""

    status = "finished"

    def __init__(self, key: str) -> None:
        self.key = key

    def release(self) -> None:
        """Nothing."""


@pytest.mark.parametrize("n_workers", [1, 2, 5])
def test_few_results_are_held_whatever_the_order_in_which_tasks_end(n_workers: int) -> None:
    chance, workers = random.Random(0), [f"w{i}" for i in range(n_workers)]
    tree = Tree([(i,) for i in range(256)], {})
    tree.see(workers)
    under_way: list[int] = []
    most, ended = 0, set()
    while tree.total not in ended:
        while (index := tree.next(len(under_way), 3 * n_workers)) is not None:
            tree.call(index)  # its inputs are there
            under_way.append(index)
        assert sum(index < 256 for index in under_way) <= PER_WORKER * n_workers
        additions = [index for index in under_way if index >= 256]  # of higher priority: before another group ends
        index = chance.choice(additions or under_way)
        under_way.remove(index)
        tree.finished(index, Done(str(index)))
        ended.add(index)
        most = max(most, len(tree.kept()))
    assert ended == set(range(tree.total + 1))
    assert most <= n_workers * results_held(256, n_workers)
    assert tree.kept() == {}


def test_a_sum_says_how_many_samples_are_done_and_counts_none_twice() -> None:
    told: list[int] = []
    tree = Tree([(i,) for i in range(3)], {}, [10, 10, 5], told.append)
    tree.see(["a"])
    ended: list[int] = []
    while tree.total not in ended:
        index = tree.next(0, 1)
        assert index is not None
        tree.call(index)
        tree.finished(index, Done(str(index)))
        ended.append(index)
        if len(ended) == 1:
            tree.lost(index)
    assert len(ended) == 5  # three groups, the first one again, and their sum
    assert told == [10, 20, 25]


def test_results_that_cannot_be_had_are_made_again_from_the_chunks_if_need_be() -> None:
    tree = Tree([(i,) for i in range(16)], {})
    tree.see(["a"])
    begun: list[int] = []
    lost = False
    while tree.total not in begun:
        index = tree.next(0, 3)
        assert index is not None
        begun.append(index)
        tree.finished(index, Done(str(index)))
        if not lost and len(begun) == 12:
            lost = True
            assert 16 in tree.kept()  # the sum of the first four
            assert tree.lost(16) == [20]
    assert Counter(begun)[16] == 2
    assert [Counter(begun)[i] for i in range(16)] == [2] * 4 + [1] * 12


# --- on a cluster --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Troubled:
    """Kernel: losses and gradients; once, after some chunks, `what` happens. folder: where that is noted."""

    folder: str
    what: str = ""

    def __call__(self, risk: SampleRisk, batch: Batch, *broadcast: Tensor) -> tuple[Tensor, ...]:
        time.sleep(0.05)
        with open(f"{self.folder}/{os.getpid()}", "a") as file:
            file.write(".")
        flag, seen = Path(self.folder, "happened"), sum(len(f.read_text()) for f in Path(self.folder).glob("[0-9]*"))
        if self.what and seen > 6 and not flag.exists():
            flag.write_text(str(os.getpid()))
            if self.what == "error":
                raise OSError("not now")
            os.kill(os.getpid(), signal.SIGSTOP if self.what == "stop" else signal.SIGKILL)
        return LossAndGradient()(risk, batch, *broadcast)


@pytest.fixture(scope="module")
def own() -> Iterator[Client]:
    with connected(ClusterSpec(workers=2)) as client:
        yield client


@pytest.fixture
def reducer(own: Client) -> DaskReducer:
    own.wait_for_workers(2, timeout=60)
    case = build("mlp classification")
    model = CgInfluence(case.model, case.loss, 0.01, second_order_mode="ggn")
    reducer = DaskInfluenceCalculator(model, own).fit(*case.train, chunk_size=1).model.reducer
    assert isinstance(reducer, DaskReducer)
    reducer.executor.slow_seconds = 1.0
    return reducer


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("what", ["error", "stop", "kill"])
def test_a_sum_survives_what_happens_to_a_worker_with_the_same_bits(
    own: Client, reducer: DaskReducer, tmp_path: Path, what: str
) -> None:
    quiet = reducer.sum(LossAndGradient())
    try:
        troubled = reducer.sum(Troubled(str(tmp_path), what))
    finally:
        if what == "stop":
            os.kill(int((tmp_path / "happened").read_text()), signal.SIGCONT)
    assert (tmp_path / "happened").exists()
    assert same(quiet, troubled)
    events = reducer.executor.events
    assert events["retried"] == (what == "error")
    assert what != "stop" or events["backed up"] + events["made again"] > 0


def test_a_sum_waits_for_workers_where_none_is_left(own: Client, reducer: DaskReducer) -> None:
    quiet = reducer.sum(LossAndGradient())
    for pid in own.run(os.getpid).values():
        os.kill(pid, signal.SIGKILL)
    while own.nthreads():
        time.sleep(0.01)
    assert same(reducer.sum(LossAndGradient()), quiet)


def test_the_tasks_of_a_pass_are_counted_and_chunks_stay_where_they_were(
    own: Client, reducer: DaskReducer, tmp_path: Path
) -> None:
    reducer.executor.slow_seconds = 60.0  # or workers that have just started are taken for slow
    before = reducer.executor.events["submitted"]
    reducer.sum(LossAndGradient())
    assert reducer.executor.events["submitted"] - before == pass_tasks(23) == 23 + 6 + 2 + 1
    where: list[Any] = []
    for turn in ("first", "second"):
        (tmp_path / turn).mkdir()
        reducer.sum(Troubled(str(tmp_path / turn)))
        where.append({file.name: len(file.read_text()) for file in (tmp_path / turn).iterdir()})
    assert sum(where[1].values()) == 23
    assert sum(abs(where[0].get(pid, 0) - n) for pid, n in where[1].items()) <= 4


@dataclass(frozen=True)
class Wide:
    """Kernel: a megabyte for each chunk."""

    def __call__(self, risk: SampleRisk, batch: Batch, *broadcast: Tensor) -> tuple[Tensor, ...]:
        time.sleep(0.02)
        return (torch.ones(2**17, dtype=torch.float64),)


def outgoing(dask_worker: Any) -> int:
    """Bytes that a worker has sent to others."""
    return int(dask_worker.transfer_outgoing_bytes_total)


def test_sums_are_added_where_they_were_made_and_few_are_sent(own: Client, reducer: DaskReducer) -> None:
    before = sum(own.run(outgoing).values())
    (total,) = reducer.sum(Wide())
    assert torch.equal(total, torch.full_like(total, 23))
    # of 23 groups and 8 additions two cross over, more where a worker is slow and the other takes from it
    assert sum(own.run(outgoing).values()) - before < 12 * 2**20


def arnoldi(model: nn.Module, loss: nn.Module) -> InfluenceFunctionModel:
    return ArnoldiInfluence(model, loss, 0.1, rank_estimate=8, second_order_mode="ggn")


def sketch(model: nn.Module, loss: nn.Module) -> InfluenceFunctionModel:
    return NystroemSketchInfluence(model, loss, 16, 0.1, second_order_mode="ggn")


def ekfac(model: nn.Module, loss: nn.Module) -> InfluenceFunctionModel:
    return EkfacInfluence(model, True, 0.1, loss=loss)


@pytest.mark.parametrize("method", [arnoldi, sketch, ekfac])
def test_workers_send_each_other_at_most_half_of_the_sums_that_a_fit_adds(
    own: Client, method: Callable[..., InfluenceFunctionModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    own.wait_for_workers(2, timeout=60)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)).double().eval()
    x, y = torch.randn(24, 64, dtype=torch.float64), torch.randint(4, (24,))
    add, sizes = DaskReducer.sum, list[int]()

    def noted(reducer: DaskReducer, *arguments: Any) -> tuple[Tensor, ...]:
        total = add(reducer, *arguments)
        sizes.append(sum(tensor.nbytes for tensor in total))
        return total

    monkeypatch.setattr(DaskReducer, "sum", noted)
    before = sum(own.run(outgoing).values())
    reducer = DaskInfluenceCalculator(method(model, nn.CrossEntropyLoss()), own).fit(x, y, chunk_size=1).model.reducer
    sent = sum(own.run(outgoing).values()) - before
    assert reducer.passes == len(sizes) > 0
    # an addition is made where most of what it adds is; all but the total is added; 64 KiB a pass for what is shared
    assert sent <= sum((pass_tasks(24) - 1) // 2 * size + 2**16 for size in sizes)
