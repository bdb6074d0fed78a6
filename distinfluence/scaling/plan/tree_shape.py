"""How a sum over chunks is cut: into at most GROUPS groups of neighbours, which are added FAN_IN at a time.

A task sums one group, chunk after chunk; FAN_IN of those sums are added, then FAN_IN of these, and so on. Groups and
order depend on the number of chunks alone, so that the bits of a sum depend neither on how many workers there are nor
on which of them took what.
"""

from collections import Counter
from collections.abc import Sequence

GROUPS = 256  # at most: tasks that a scheduler hands out in a quarter of a second
FAN_IN = 4
PER_WORKER = 2  # groups that are under way on a worker: one runs, one waits


def groups(n_chunks: int) -> list[range]:
    """Return the chunks of each group: neighbours, as many in each as in any other or one more."""
    n = min(n_chunks, GROUPS)
    return [range(n_chunks * i // n, n_chunks * (i + 1) // n) for i in range(n)]


def homes(n_groups: int, before: dict[int, str], workers: Sequence[str]) -> dict[int, str]:
    """Group → worker: the one that had it if it is there, as long as none has more than its share."""
    share = -(-n_groups // len(workers))
    load: Counter[str] = Counter(dict.fromkeys(workers, 0))
    found: dict[int, str] = {}
    for group in range(n_groups):
        had = before.get(group, "")
        if had in load and load[had] < share:
            found[group] = had
            load[had] += 1
    free = iter([worker for worker in workers for _ in range(share - load[worker])])
    return found | {group: next(free) for group in range(n_groups) if group not in found}


def results_held(n_chunks: int, workers: int) -> int:
    """Results of a kernel that a worker has at most while chunks are summed, those of which it makes one not counted.

    FAN_IN that are being added and what comes of them, one that is done in the meantime for each other task under way,
    and at every level above what waits for its neighbours.
    """
    own, levels = -(-min(n_chunks, GROUPS) // workers), 0
    while own > 1:
        own, levels = -(-own // FAN_IN), levels + 1
    return FAN_IN + 1 + (PER_WORKER - 1) + (FAN_IN - 1) * max(0, levels - 1) if levels else 1


def pass_tasks(n_chunks: int) -> int:
    """Return the number of tasks of a pass over chunks on a cluster: the groups and their additions."""
    level = tasks = min(n_chunks, GROUPS)
    while level > 1:
        tasks += level // FAN_IN + (level % FAN_IN > 1)
        level = -(-level // FAN_IN)
    return tasks
