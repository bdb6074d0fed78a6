"""A whole SLURM on this host: munge, a controller and two virtual nodes, in one scratch folder, without systemd.

`python -m tests.slurm.host` brings one up and keeps it until Ctrl-C, for trying things by hand.

Nodes n1 and n2 claim 8 CPUs, 16 GB and two counted GPUs each, whatever the host has. Partitions: cpu, gpu, spot (whose
jobs are requeued when one of urgent wants their place) and urgent. Nothing here limits what a job really uses.
"""

import contextlib
import fcntl
import os
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.processes import finished

PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
PACKAGES = ("slurmd", "slurmctld", "slurm-client", "munge")
NODES = ("n1", "n2")
GPUS = 2
PREFIX = "di-slurm-"
SECOND_ADDRESS = ("127.0.0.2/8", "dev", "lo")
# Linux gives outgoing connections ports from 32768 on, so none of them takes one of these, also while a node is down.
PORTS = range(20000, 32000)
START_SECONDS = 120.0  # A daemon that takes longer to answer counts as one that does not start.
SEARCH = f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"  # where Debian keeps the daemons

CONFIGURATION = """
ClusterName=distinfluence
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# the second word is also how long a requeued job has to wait: two minutes, where nobody says otherwise
AuthInfo=socket={root}/run/munge.socket,cred_expire=5
StateSaveLocation={root}/controller
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/%n.log
# no cgroups, no accounting
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=300
SlurmctldTimeout=30
SlurmdTimeout=30
GresTypes=gpu
# without it a job takes the whole memory of its node
DefMemPerCPU=1000
{nodes}
PartitionName=DEFAULT Nodes=ALL LLN=YES DefaultTime=30 MaxTime=1-0 State=UP
PartitionName=cpu    Default=YES PriorityTier=10
PartitionName=gpu    PriorityTier=10
PartitionName=spot   PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent PriorityTier=20 PreemptMode=OFF
"""


class SlurmUnavailableError(Exception):
    """SLURM is not installed and cannot be, or does not start; the message says why."""


def install() -> None:
    """Install Debian's packages where programs are missing, one process at a time.

    Raises:
        SlurmUnavailableError: If that is impossible here.
    """
    with _alone("install"):
        _install()


@contextlib.contextmanager
def _alone(what: str) -> Iterator[None]:
    """Only one process of this user is in here at a time; a process that is killed lets the next one in."""
    with Path(tempfile.gettempdir(), f"{PREFIX}{what}-{os.geteuid()}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _install() -> None:
    missing = [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise SlurmUnavailableError(
            f"{', '.join(missing)} not found, and only root on Debian or Ubuntu can install it. As root: apt-get "
            f"install {' '.join(PACKAGES)}"
        )
    command = ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with _no_services_started():
        for before in ([], ["apt-get", "update"]):
            if before:
                finished(before, limit=600, env=environment)
            done = finished(command, limit=600, env=environment)
            if done.returncode == 0:
                return
    raise SlurmUnavailableError(f"{' '.join(command)}: {done.stderr[-500:]}")


@contextlib.contextmanager
def _no_services_started(policy: Path = Path("/usr/sbin/policy-rc.d")) -> Iterator[None]:
    """Debian starts the daemons of what it installs, unless this file of the administrator's says no."""
    if policy.exists():
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink()


class SlurmHost:
    """SLURM in a folder of its own; `environment` is what commands need to talk to it."""

    def __init__(self, root: Path | None = None) -> None:
        # a short path: sockets have room for a hundred characters
        self.root = root or Path(tempfile.mkdtemp(prefix=PREFIX, dir="/tmp"))
        self.configuration = self.root / "slurm.conf"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "PATH": SEARCH,
            "LC_ALL": "C.UTF-8",
            "SLURM_CONF": str(self.configuration),
        }

    def start(self) -> None:
        """Bring all up, or take all down again and raise SlurmUnavailableError with the logs."""
        stop_orphans()
        try:
            with _alone("shared"):  # ports and the second address are shared with all others on this host
                self._write_files()
                self._second_address()
            self._start_munge()
            self.start_controller()
            for node in NODES:
                self.start_node(node)
            self._until(self._nodes_are_up, START_SECONDS, "the nodes did not register")
        except SlurmUnavailableError:
            self.stop()
            raise

    def stop(self) -> None:
        """Cancel every job, end every process of theirs and every daemon, remove the folder."""
        if self._controller_answers():
            ids = self("squeue", "-h", "-o", "%A").split()
            if ids:
                self("scancel", "--full", *ids, check=False)
            with contextlib.suppress(SlurmUnavailableError):
                self._until(lambda: not self("squeue", "-h", "-o", "%A").split(), 20, "jobs are left")
        self._end_job_processes()
        for name in (*NODES, "slurmctld", "munged"):
            self._end_daemon(name)
        with _alone("shared"):
            ours = (self.root / "address").is_file()
            shutil.rmtree(self.root, ignore_errors=True)
            others = _roots()
            if ours and others:  # they listen on it too: the last of them takes it away
                (others[0] / "address").touch()
            elif ours:
                finished(["ip", "addr", "del", *SECOND_ADDRESS])

    def __call__(self, *command: object, check: bool = True, timeout: float = 60) -> str:
        """Run a command of SLURM; its output. Raises CalledProcessError with its errors as a note."""
        done = finished(command, limit=timeout, env=self.environment)
        if check and done.returncode:
            error = subprocess.CalledProcessError(done.returncode, done.args, done.stdout, done.stderr)
            error.add_note(done.stderr)
            raise error
        return done.stdout

    def start_controller(self) -> None:
        """slurmctld, from an empty state."""
        self._daemon("slurmctld", "-c", "-f", self.configuration)
        self._until(self._controller_answers, START_SECONDS, "the controller does not answer")

    def start_node(self, node: str) -> None:
        """slurmd of one virtual node, if it does not run."""
        if (self.root / "run" / f"{node}.pid").is_file():
            return
        self._daemon("slurmd", "-N", node, "-f", self.configuration)

    def _write_files(self) -> None:
        for name in ("controller", "run", "log", "devices", "munge", *(f"spool/{node}" for node in NODES)):
            (self.root / name).mkdir(parents=True)
        self.root.chmod(0o755)  # munge wants its socket to be reachable, and its key not to be
        (self.root / "munge").chmod(0o700)
        (self.root / "owner.new").write_text(str(os.getpid()))
        (self.root / "owner.new").rename(self.root / "owner")  # never seen without its number
        key = self.root / "munge" / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        controller_port, *node_ports = _free_ports(1 + len(NODES))
        host = socket.gethostname().partition(".")[0]
        nodes = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=16000 "
            f"Gres=gpu:{GPUS} State=UNKNOWN"
            for node, port in zip(NODES, node_ports, strict=True)
        ]
        user = _user()
        self.configuration.write_text(
            CONFIGURATION.format(
                host=host, controller_port=controller_port, user=user, root=self.root, nodes="\n".join(nodes)
            )
        )
        # a device file is what makes SLURM set CUDA_VISIBLE_DEVICES; it is looked at, never opened
        devices = [self._device(number) for number in range(GPUS)]
        lines = [f"NodeName={','.join(NODES)} Name=gpu File={device}" for device in devices]
        (self.root / "gres.conf").write_text("\n".join(["AutoDetect=off", *lines, ""]))
        # slurmd loads a cgroup plugin even where nothing uses it; this one is content without /sys/fs/cgroup
        (self.root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def _second_address(self) -> None:
        """Where 127.0.0.1 is the only address, name look-ups of the C library find nothing, and SLURM cannot listen."""
        if not finished(["hostname", "-I"]).stdout.split():
            added = finished(["ip", "addr", "add", *SECOND_ADDRESS])
            if added.returncode == 0:
                (self.root / "address").touch()  # ours to take away again

    def _device(self, number: int) -> Path:
        device = self.root / "devices" / f"gpu{number}"
        try:
            os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        except PermissionError:
            return (Path("/dev/null"), Path("/dev/zero"))[number]
        return device

    def _start_munge(self) -> None:
        run, munge = self.root / "run", self.root / "munge"
        self._daemon(
            "munged",
            f"--key-file={munge / 'munge.key'}",
            f"--socket={run / 'munge.socket'}",
            f"--pid-file={run / 'munged.pid'}",
            f"--seed-file={munge / 'seed'}",
            f"--log-file={self.root / 'log' / 'munged.log'}",
            "--num-threads=2",
            "--force",
        )
        check = ("munge", "-S", str(run / "munge.socket"), "-n")
        self._until(lambda: self._succeeds(check), START_SECONDS, "munge does not answer")

    def _daemon(self, *command: object) -> None:
        with (self.root / "log" / "daemons.log").open("a") as log:
            # not `finished`: it would kill the daemon, which is still in the group of the command that starts it
            done = subprocess.run(
                [str(part) for part in command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=60,
                check=False,
            )
        if done.returncode:
            raise SlurmUnavailableError(self._with_logs(f"{command[0]} ended with status {done.returncode}"))

    def _succeeds(self, command: Sequence[str]) -> bool:
        try:
            return finished(command, limit=30, env=self.environment).returncode == 0
        except AssertionError:  # no answer in that time
            return False

    def _controller_answers(self) -> bool:
        return self.configuration.is_file() and self._succeeds(("scontrol", "ping"))

    def _nodes_are_up(self) -> bool:
        return self.node_states() == dict.fromkeys(NODES, "idle")

    def node_states(self) -> dict[str, str]:
        """Node → its state, in sinfo's short word."""
        lines = self("sinfo", "-h", "-N", "-p", "cpu", "-o", "%N %t").splitlines()
        return {line.split()[0]: line.split()[1] for line in lines}

    def _until(self, condition: Callable[[], bool], seconds: float, otherwise: str) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise SlurmUnavailableError(self._with_logs(otherwise))
            time.sleep(0.1)

    def _with_logs(self, message: str) -> str:
        logs = sorted((self.root / "log").glob("*.log"))
        tails = [f"== {log.name}\n" + "\n".join(log.read_text().splitlines()[-8:]) for log in logs]
        return "\n".join([f"SLURM does not start here: {message}", *tails])

    def _end_job_processes(self, node: str | None = None, *, gently: bool = True) -> None:
        """What jobs left: processes that SLURM started with this configuration, and the guards of their steps."""
        for signum in (signal.SIGTERM, signal.SIGKILL)[not gently :]:
            ours = list(self._job_processes(node))
            guards = {_parent(pid) for pid in ours}
            for pid in [*ours, *(pid for pid in guards if _command(pid).startswith("slurmstepd"))]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signum)
            end = time.monotonic() + 3
            while any(True for _ in self._job_processes(node)) and time.monotonic() < end:
                time.sleep(0.05)

    def _job_processes(self, node: str | None = None) -> Iterator[int]:
        mark = f"SLURM_CONF={self.configuration}".encode()
        where = b"SLURMD_NODENAME=" + (node or "").encode()
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit() or int(folder.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                variables = (folder / "environ").read_bytes().split(b"\0")
                in_job = any(variable.startswith(b"SLURM_JOB_ID=") for variable in variables)
                if mark in variables and in_job and (node is None or where in variables):
                    yield int(folder.name)

    def crash_node(self, node: str) -> None:
        """End a node as a power cut does: its slurmd and all that ran there are gone without a word."""
        file = self.root / "run" / f"{node}.pid"
        os.kill(int(file.read_text()), signal.SIGKILL)
        file.unlink()
        self._end_job_processes(node, gently=False)

    def _end_daemon(self, name: str) -> None:
        file = self.root / "run" / f"{name}.pid"
        if not file.is_file():
            return
        pid = int(file.read_text().strip() or 0)
        for signum in (signal.SIGTERM, signal.SIGKILL):
            if str(self.root) not in _command(pid):  # gone, or its number is another's by now
                break
            os.kill(pid, signum)
            end = time.monotonic() + 10
            while _command(pid) and time.monotonic() < end:
                time.sleep(0.05)
        file.unlink(missing_ok=True)


def stop_orphans() -> None:
    """Take down what was left when the process that brought it up was killed."""
    with _alone("orphans"):
        for root in _roots():
            if _is_orphan(root):
                SlurmHost(root).stop()


def _roots() -> list[Path]:
    """Return the folders of every SLURM of these tests that is up, or was left."""
    return [root for root in Path("/tmp").glob(f"{PREFIX}*/") if (root / "owner").is_file()]


def _is_orphan(root: Path) -> bool:
    owner = root / "owner"
    try:
        return owner.owner() == _user() and not _command(int(owner.read_text()))
    except FileNotFoundError:  # its owner is just taking it down
        return False


def _free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on and that no other SLURM of these tests has been given."""
    texts = [(root / "slurm.conf").read_text() for root in _roots() if (root / "slurm.conf").is_file()]
    given = {int(port) for text in texts for port in re.findall(r"Port=(\d+)", text)}
    found: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            found += [port] if port not in given else []
        if len(found) == count:
            return found
    raise SlurmUnavailableError(f"{count} free ports were expected in {PORTS}, found {found}. End other programs.")


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.geteuid()).pw_name


def _command(pid: int) -> str:
    """The command line of a process, empty if there is none."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _parent(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid:")), 0)


def main() -> None:
    """Up until Ctrl-C or SIGTERM."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.default_int_handler)
    install()
    host = SlurmHost()
    host.start()
    try:
        print(f"export SLURM_CONF={host.configuration}", flush=True)  # noqa: T201
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        host.stop()


if __name__ == "__main__":
    main()
