"""What a cluster file's `settings` come to: dask-jobqueue's own arguments, made fit for torch and for time limits."""

import difflib
import hashlib
import inspect
import re
import signal
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dask
from dask.utils import parse_bytes
from distributed.security import Security

from distinfluence.errors import MissingDependencyError, SettingError
from distinfluence.scaling.clusters.slurm import batch_job
from distinfluence.scaling.clusters.walltime import lifetime_arguments, worker_seconds
from distinfluence.scaling.data.recipe import Recipe
from distinfluence.scaling.worker.device import PROCESSES

QUEUES: Mapping[str, str] = {
    "htcondor": "HTCondorCluster",
    "lsf": "LSFCluster",
    "moab": "MoabCluster",
    "oar": "OARCluster",
    "pbs": "PBSCluster",
    "sge": "SGECluster",
    "slurm": "SLURMCluster",
}
OURS = ("n_workers", "job_cls", "asynchronous", "loop")  # of dask-jobqueue's arguments, set here

# What dask-jobqueue's arguments must be. It writes them into a script as they are, so that a wrong one is silent there.
TEXTS = frozenset(
    {
        *("account", "interface", "job_name", "local_directory", "log_directory", "memory", "name", "project"),
        *("protocol", "python", "queue", "shared_temp_directory", "shebang", "walltime", "worker_command"),
    }
)
LISTS = frozenset({"job_directives_skip", "job_extra_directives", "job_script_prologue", "worker_extra_args"})
COUNTS = frozenset({"cores", "job_cpu", "processes"})
SLURMS_WORDS = {"cpus_per_task": "cores", "mem": "memory", "partition": "queue", "time": "walltime"}
LEAST_MEMORY = 2**20  # Bytes. A smaller number lacks its unit.


def job_kind(kind: str) -> bool:
    """Say whether this kind of cluster is one of jobs: a key of `QUEUES`, or a dask-jobqueue class as module:Class."""
    return kind in QUEUES or ":" in kind


def cluster_class(kind: str) -> Any:
    """Return the dask-jobqueue class that `kind` names. Raises MissingDependencyError without dask-jobqueue."""
    with _interrupts_left_alone():
        if ":" in kind:
            return Recipe(kind).resolve()
        try:
            import dask_jobqueue
        except ImportError as error:
            raise MissingDependencyError(
                f"a cluster of kind {kind!r} needs dask-jobqueue. Run: pip install 'dask-jobqueue>=0.9' cryptography"
            ) from error
        return getattr(dask_jobqueue, QUEUES[kind])


@contextmanager
def _interrupts_left_alone() -> Iterator[None]:
    """Undo that importing dask-jobqueue makes Ctrl-C an exit with status 0, as if all were done."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is not before:
            signal.signal(signal.SIGINT, before)


def check_settings(kind: str, settings: Mapping[str, object]) -> None:
    """Check the settings of a queue's jobs, as far as that is possible without the queue.

    Args:
        kind: A key of `QUEUES`. The names of settings are checked if dask-jobqueue is installed.
        settings: The settings.

    Raises:
        SettingError: If a setting is unknown, or not what it must be.
    """
    with suppress(MissingDependencyError):
        cluster = cluster_class(kind)
        _check_names(settings_by_name(settings), cluster, f"jobqueue.{cluster.job_cls.config_name}")
    job_memory(settings)
    walltime = settings.get("walltime")
    if kind == "slurm" and walltime is not None:
        lifetime_arguments(str(walltime))


def settings_by_name(settings: Mapping[str, object]) -> dict[str, Any]:
    """Return settings under dask-jobqueue's names of arguments, numbers as texts where a text is meant.

    Raises:
        SettingError: A setting is not what it must be.
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        own = name.replace("-", "_")
        if own in found:
            forms = f"{own.replace('_', '-')} and {own}"
            raise SettingError(f"`settings.{own}` of the cluster is given twice, as {forms}. Remove one.")
        found[own] = _fitting(own, value)
    return found


def _fitting(name: str, value: object) -> object:
    """Return a setting's value as dask-jobqueue takes it."""
    number = isinstance(value, int) and not isinstance(value, bool)
    if value is None:
        return None
    if name in TEXTS:
        if not number and not isinstance(value, str):
            raise SettingError(f"`settings.{name}` of the cluster must be a text, got {value!r}. Put it in quotes.")
        return str(value)  # a project may have a number for its name
    if name in COUNTS and not (isinstance(value, int) and number and value >= 1):
        remedy = "Remove the quotes." if isinstance(value, str) and value.isdecimal() else "Write such a number."
        raise SettingError(
            f"`settings.{name}` of the cluster must be a whole number of at least 1, got {value!r}. {remedy}"
        )
    return _texts(name, value) if name in LISTS else value


def _texts(name: str, value: object) -> list[str]:
    items = value if isinstance(value, list | tuple) else [None]
    if not all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in items):
        raise SettingError(
            f'`settings.{name}` of the cluster must be a list of texts, got {value!r}. Write ["…", "…"].'
        )
    return [str(item) for item in items]


def job_processes(settings: Mapping[str, object]) -> int:
    """Return the number of worker processes of each job.

    Raises:
        SettingError: A setting is not what it must be.
    """
    return int(settings_by_name(settings).get("processes") or 1)


def job_memory(settings: Mapping[str, object]) -> int | None:
    """Return the bytes that each worker will get, None where the settings leave that to dask-jobqueue's own files.

    Raises:
        SettingError: A setting is not what it must be.
    """
    memory = settings_by_name(settings).get("memory")
    return None if memory is None else bytes_of("settings.memory", memory) // job_processes(settings)


def bytes_of(name: str, memory: str) -> int:
    """Return the bytes that a text such as "16GB" says.

    Raises:
        SettingError: The text is not a number of bytes, or one so small that its unit is missing.
    """
    try:
        found = int(parse_bytes(memory))
    except ValueError as error:
        raise SettingError(f"`{name}` of the cluster must be bytes such as '16GB', got {memory!r}.") from error
    if found < LEAST_MEMORY:
        raise SettingError(
            f"`{name}` of the cluster must be bytes with their unit, got {memory!r}, which is {found} bytes. "
            f"Did you mean '{memory.strip()}GB'?"
        )
    return found


def is_slurm(cluster: Any) -> bool:
    """Say whether the jobs of a class of dask-jobqueue clusters go to SLURM."""
    return str(cluster.job_cls.submit_command).endswith("sbatch")


def job_arguments(
    cluster: Any, settings: Mapping[str, object], environment: Mapping[str, str], folder: Path
) -> dict[str, Any]:
    """Return dask-jobqueue's arguments: the settings, and what makes its jobs fit for torch and for time limits."""
    given = settings_by_name(settings)
    section = f"jobqueue.{cluster.job_cls.config_name}"
    _check_names(given, cluster, section)

    def chosen(name: str, default: Any) -> Any:
        configured = dask.config.get(f"{section}.{name.replace('_', '-')}", None)
        return given.get(name) if given.get(name) is not None else configured or default

    given["processes"] = int(chosen("processes", 1))
    # one thread in each process, whatever number of cores the job asks for: they are for torch's own threads
    extra = ["--nthreads", "1", *map(str, chosen("worker_extra_args", []))]
    given["job_name"] = given.get("job_name") or given.pop("name", None) or "distinfluence"
    if is_slurm(cluster):
        if all(option.partition("=")[0] != "--lifetime" for option in extra):
            extra += lifetime_arguments(str(chosen("walltime", "0")))
        given["job_name"] = _marked(str(given["job_name"]), folder)
        _check_directives(chosen("job_extra_directives", []))
    given["worker_extra_args"] = extra
    if cluster.job_cls.submit_command is not None:  # else it is no script: a command of this host, in this environment
        variables = {**environment, PROCESSES: str(given["processes"])}
        exports = [f"export {name}=${{{name}:-{value}}}" for name, value in variables.items()]
        given["job_script_prologue"] = [*exports, *chosen("job_script_prologue", [])]
    given["log_directory"] = str(Path(str(chosen("log_directory", folder))).expanduser().absolute())
    given["shared_temp_directory"] = str(Path(str(chosen("shared_temp_directory", folder))).expanduser().absolute())
    for name in ("log_directory", "shared_temp_directory"):
        Path(given[name]).mkdir(parents=True, exist_ok=True)
    given["scheduler_options"] = {"dashboard_address": "127.0.0.1:0", **chosen("scheduler_options", {})}
    given["security"] = _security(given.get("security", True))
    return given


def seconds_of_workers(cluster: Any, arguments: Mapping[str, Any]) -> float | None:
    """Return the seconds that a worker of jobs with these arguments has, None if they have no end."""
    walltime = arguments.get("walltime") or dask.config.get("jobqueue.slurm.walltime", None)
    return worker_seconds(arguments["worker_extra_args"], str(walltime) if is_slurm(cluster) and walltime else None)


def _marked(name: str, folder: Path) -> str:
    """Return a job name that is this run's alone: by it the jobs are found that nobody has a number of.

    A driver that is a job itself has the same mark when it is started again, and so finds what its last start left.
    """
    job = batch_job()
    mark = uuid.uuid4().hex if job is None else hashlib.sha256(f"{job} {folder}".encode()).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9_.+-]', '-', name)}-{mark[:8]}"


def _check_directives(directives: object) -> None:
    for directive in directives if isinstance(directives, list | tuple) else ():
        if re.match(r"-J|--job-name", str(directive)):
            raise SettingError(
                f"`settings.job-extra-directives` must not name the jobs, got {directive!r}: they are found by their "
                "name. Say `job-name` for the first part of it."
            )


def _security(wanted: object) -> Any:
    """Return TLS settings: without, a scheduler takes code from whoever reaches its port."""
    if wanted is not True:
        return wanted or None
    try:
        return Security.temporary()
    except ImportError as error:
        raise MissingDependencyError(
            "certificates between scheduler and workers need `cryptography`. Run: pip install cryptography, "
            "or set `security: false` where only you can reach this host's ports."
        ) from error


def _check_names(given: Mapping[str, object], cluster: Any, section: str) -> None:
    known = {name.replace("-", "_") for name in dask.config.get(section, {})}
    for base in (*inspect.getmro(cluster), *inspect.getmro(cluster.job_cls)):
        if base is not object and "__init__" in vars(base):
            known |= set(inspect.signature(vars(base)["__init__"]).parameters)
    known -= {"self", "scheduler", "job_kwargs", "base_class_kwargs", "kwargs", *OURS}
    for name in given:
        if name in OURS:
            raise SettingError(f"`settings.{name}` of the cluster is set by distinfluence. Leave it out.")
        if name not in known:
            close = difflib.get_close_matches(SLURMS_WORDS.get(name, name), sorted(known), n=1)
            raise SettingError(
                f"`settings.{name}` is not a setting of dask-jobqueue's {cluster.__name__}."
                + (f" Did you mean `{close[0]}`?" if close else f" Known: {', '.join(sorted(known))}.")
            )
