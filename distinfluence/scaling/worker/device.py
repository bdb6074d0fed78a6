"""Which device a task computes on, decided where the task runs: the caller may sit on a host without a GPU."""

import os
import socket
from collections.abc import Callable

import torch
from distributed import Client, get_worker

from distinfluence.errors import ClusterError, SettingError

DEVICES = ("auto", "cpu", "cuda")
PROCESSES = "DISTINFLUENCE_PROCESSES"  # in a job's environment: worker processes that share what the job was granted


def check_device(device: str) -> str:
    """Return the name. Raises SettingError unless it is one of `DEVICES`."""
    if device not in DEVICES:
        raise SettingError(f"`device` must be one of {list(DEVICES)}, got {device!r}. Choose one of these.")
    return device


def task_device(asked: str) -> torch.device:
    """Return the device of this process. asked: "auto" takes a GPU if the process sees one; else a type of device.

    Processes of one batch job take its GPUs in turn; every other process takes the first that CUDA_VISIBLE_DEVICES
    lets it see.

    Args:
        asked: A type of device; "auto" takes a GPU if the process sees one.

    Raises:
        ClusterError: The process sees no GPU although "cuda" is asked for.
    """
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    if asked != "cuda":
        return torch.device(asked)
    if not torch.cuda.is_available():
        raise ClusterError(
            f"`device` must be there where tasks run, and process {os.getpid()} on {socket.gethostname()} sees no GPU "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}). Start workers with one (`--gres=gpu:1` "
            "for jobs of SLURM) and a torch built for it, or say `device: auto`."
        )
    return torch.device("cuda", _number_in_job() % torch.cuda.device_count())


def device_memory(device: torch.device, read: Callable[[torch.device], tuple[int, int]] | None = None) -> int | None:
    """Return the bytes that this process may take on a GPU: what is free, and what it holds itself. None for the host.

    Args:
        device: The device.
        read: Returns (free, total) bytes of a device; by default torch's own function.
    """
    if device.type == "cpu":
        return None
    free, total = (read or torch.cuda.mem_get_info)(device)
    held = torch.cuda.memory_reserved(device) if device.type == "cuda" and read is None else 0
    return min(total, free + held)


def smallest_device(client: Client, asked: str) -> int | None:
    """Return the least `device_memory` of the workers, where tasks are to compute on `asked`; None without GPUs."""
    if asked == "cpu":
        return None
    found = client.run(_task_device_memory, asked, on_error="ignore")  # who lacks a GPU says so in its first task
    known = [memory for memory in found.values() if memory is not None]
    return min(known) if known else None


def _task_device_memory(asked: str) -> int | None:
    return device_memory(task_device(asked))


def _number_in_job() -> int:
    """Return which process of a batch job this one is: the last part of its worker's name. 0 anywhere else."""
    if int(os.environ.get(PROCESSES) or 1) < 2:
        return 0
    try:
        number = str(get_worker().name).rpartition("-")[2]
    except ValueError:  # no worker
        return 0
    return int(number) if number.isdigit() else 0
