"""A real SLURM for tests: one controller and two nodes on this machine, in one folder, gone when the test is.

The daemons stay in the foreground as children of the test's process and die with it. Each node is a slurmd in a UTS and
mount namespace of its own: its host name is node1 or node2, and both names resolve. Where that is not allowed, the two
nodes have this machine's two names, the other one being localhost. No cgroups, database, systemd or network are needed;
the resources of a node are only declared.
"""

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
PACKAGES = "munge slurmctld slurmd slurm-client"  # Debian's names
SBIN = os.pathsep.join(["/usr/sbin", "/sbin", "/usr/local/sbin"])
PR_SET_PDEATHSIG = 1
CPUS, MEMORY_MB = 2, 8000
UNDER_WAY = ("PENDING", "CONFIGURING", "RUNNING", "SIGNALING", "COMPLETING")  # states of a job

# proctrack/linuxproc finds a step's processes by their parents, so orphans would be lost: never killed, and holding
# srun's pipes. As their subreaper slurmstepd inherits them; the attribute survives the exec.
STEPD = """#!/usr/bin/perl
use POSIX ();
my %prctl = (x86_64 => 157, aarch64 => 167, riscv64 => 167, ppc64le => 171, s390x => 172);
my $number = $prctl{(POSIX::uname())[4]};
syscall($number, 36, 1, 0, 0, 0) if $number;
my ($real) = grep { -x } map { "$_/slurmstepd" } "/usr/sbin", "/usr/local/sbin", "/usr/lib/slurm", "/usr/bin";
exec {$real} $real, @ARGV or die "slurmstepd: $!";
"""

# batch: the default; preempt: its jobs are requeued for those of `urgent`; grace: the same, with a
# while between the request to stop and the end.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
# Jobs take their port from their number, and several clusters share this machine's
FirstJobId={first}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a job that was put back waits before it may start again; SLURM's default is 120
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters={communication}
DebugFlags=NO_CONF_HASH
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=1000
GresTypes=gpu
SchedulerParameters=sched_interval=1,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
SlurmdTimeout=30
MinJobAge=7200
ReturnToService=2
InactiveLimit=0
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=batch   Nodes=ALL Default=YES PriorityTier=1  PreemptMode=OFF     DefaultTime=60
PartitionName=preempt Nodes=ALL Default=NO  PriorityTier=1  PreemptMode=REQUEUE DefaultTime=60
PartitionName=grace   Nodes=ALL Default=NO  PriorityTier=1  PreemptMode=REQUEUE DefaultTime=60 GraceTime=60
PartitionName=urgent  Nodes=ALL Default=NO  PriorityTier=20 PreemptMode=OFF     DefaultTime=60
"""

# What a slurmd's namespace is made of. While it starts, the daemon reads other CommunicationParameters than its jobs
# will: it must listen on its own address only, to be distinct from the other node's, and a srun inside a node on all.
NODE = """set -e
hostname "$0"
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/slurmd.conf" "$1/slurm.conf"
folder=$1
(until [ -s "$folder/slurmd.$0.pid" ]; do sleep 0.05; done; umount "$folder/slurm.conf") &
shift
exec "$@"
"""
NAMESPACES = (
    ("unshare", "--uts", "--mount", "--"),
    ("unshare", "--user", "--map-current-user", "--keep-caps", "--uts", "--mount", "--"),
)


def missing() -> list[str]:
    path = os.pathsep.join([os.environ["PATH"], SBIN])
    return [program for program in PROGRAMS if not shutil.which(program, path=path)]


class Cluster:
    """A running SLURM; `env` is what its commands and jobs need."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self.folder = folder
        self.env = {**env, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{env['PATH']}:{SBIN}", "LC_ALL": "C"}
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.namespaces = namespaces()
        self.host = socket.gethostname().partition(".")[0]
        self.nodes = ("node1", "node2") if self.namespaces else (self.host, "localhost")
        folder.mkdir(mode=0o755)
        self._write()
        self._start()

    def _write(self) -> None:
        folder = self.folder
        for name in ("state", *(f"spool.{node}" for node in self.nodes)):
            (folder / name).mkdir()
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o400)
        (folder / "slurmstepd").write_text(STEPD)
        (folder / "slurmstepd").chmod(0o755)
        ports = free_ports(1 + len(self.nodes))
        net = ports[0] % 200 + 20  # loopback, and different for each node of each cluster
        hosts, nodes = [f"127.0.0.1 localhost {self.host}", "::1 ip6-localhost"], []
        for number, (node, port) in enumerate(zip(self.nodes, ports[1:], strict=True), 1):
            name, address = (node, f"127.0.{net}.{number}") if self.namespaces else (self.host, "127.0.0.1")
            hosts.append(f"{address} {node}")
            # A link to a device will do for a GPU, a plain file would not.
            (folder / f"gpu{number - 1}").symlink_to("/dev/null")
            nodes.append(
                f"NodeName={node} NodeHostname={name} NodeAddr={address} Port={port} CPUs={CPUS} "
                f"SocketsPerBoard=1 CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory={MEMORY_MB} Gres=gpu:2"
            )
        (folder / "hosts").write_text("\n".join([*hosts, ""]))
        (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={folder}/gpu[0-1] Flags=nvidia_gpu_env\n")
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n" if version() >= (23, 11) else "# not used\n")
        first = ports[0] % 3000 // 10 * 1000 + 1
        values = {
            "first": first,
            "host": self.host,
            "port": ports[0],
            "folder": folder,
            "user": user(),
            "nodes": "\n".join(nodes),
        }
        for name, communication in (("slurm", "NoCtldInAddrAny"), ("slurmd", "NoCtldInAddrAny,NoInAddrAny")):
            (folder / f"{name}.conf").write_text(CONFIG.format(**values, communication=communication))

    def _start(self) -> None:
        at = self.folder
        force = ["--force"] if os.geteuid() == 0 else []  # munged does not like to be root
        names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        self._daemon("munged", ["munged", "-F", *force, *(f"--{key}={at / name}" for key, name in names.items())])
        self._until("munged", (at / "munge.socket").exists)
        self._daemon("slurmctld", ["slurmctld", "-D", "-f", str(at / "slurm.conf")])
        for node in self.nodes:
            self.start(node)
        self._until("the nodes", lambda: self.query("sinfo", "-h", "-p", "batch", "-o", "%D %t") == "2 idle")

    def start(self, node: str) -> None:
        """Switch a node on."""
        at = self.folder
        inside = [*self.namespaces, "sh", "-c", NODE, node, str(at)] if self.namespaces else []
        slurmd = ["slurmd", "-D", "-N", node, "-f", str(at / "slurm.conf"), "-d", str(at / "slurmstepd")]
        (at / f"slurmd.{node}.pid").unlink(missing_ok=True)
        self._daemon(f"slurmd.{node}", [*inside, *slurmd])

    def lose(self, node: str) -> None:
        """Cut a node's power: all that runs in its namespace is gone at once, and nobody is notified."""
        slurmd = int((self.folder / f"slurmd.{node}.pid").read_text())
        own = _uts(slurmd)
        assert own and own != _uts(os.getpid())
        (daemon,) = (each for each in self.daemons if node in each.args)  # type: ignore[operator]
        self.daemons.remove(daemon)
        while there := [process for process in psutil.process_iter() if _uts(process.pid) == own]:
            for process in there:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            daemon.poll()

    def _daemon(self, name: str, command: Sequence[str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            daemon = subprocess.Popen(
                command, cwd="/", env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip
        self.daemons.append(daemon)

    def _until(self, what: str, done: Callable[[], bool], seconds: float = 200) -> None:
        end = time.monotonic() + seconds
        while not done():
            if time.monotonic() > end or any(daemon.poll() is not None for daemon in self.daemons):
                raise RuntimeError(f"{what} not ready\n{self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        files = sorted(self.folder.glob("*.log"))
        return "".join(f"--- {file.name}\n{file.read_text(errors='replace')[-3000:]}\n" for file in files)

    def run(self, *command: str, **options: object) -> str:
        """What a command prints; it must succeed."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=200, **options)  # type: ignore[call-overload]
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return str(done.stdout)

    def query(self, *command: str) -> str:
        """The same, '' where it fails."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=200)
        return done.stdout.strip() if done.returncode == 0 else ""

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job: JobState, Restarts, ExitCode, Reason, ..."""
        words = self.run("scontrol", "-o", "show", "job", number).split()
        return dict(word.partition("=")[::2] for word in words)

    def wait(self, number: str, until: Callable[[dict[str, str]], bool], seconds: float = 300) -> dict[str, str]:
        """What SLURM knows of a job as soon as it is as it should be. Asked, not `sbatch --wait`: that looks rarely."""
        end = time.monotonic() + seconds
        while not until(job := self.job(number)):
            assert time.monotonic() < end, f"job {number} is {job}\n{self.logs()}"
            time.sleep(0.2)
        return job

    def ended(self, number: str, seconds: float = 300) -> dict[str, str]:
        return self.wait(number, lambda job: job["JobState"] not in UNDER_WAY, seconds)

    def stop(self) -> None:
        """Cancel the jobs, end the daemons, and then whatever is left of the jobs."""
        self.query("scancel", "--user", user())
        end = time.monotonic() + 200
        while time.monotonic() < end and self.query("squeue", "-h"):
            time.sleep(0.2)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in self.processes():
            process.kill()
        shutil.rmtree(self.folder)

    def processes(self) -> list[psutil.Process]:
        """Steps and jobs: what has this cluster's SLURM_CONF and was not started from here."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SLURM_CONF", "").startswith(f"{self.folder}{os.sep}"):
                    found.append(process)
            except psutil.Error:
                continue
        return found


def _uts(pid: int) -> str:
    """The namespace in which a process has its host name; '' of one that is gone."""
    try:
        return str(Path(f"/proc/{pid}/ns/uts").readlink())
    except OSError:
        return ""


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def namespaces() -> Sequence[str]:
    """The command that gives a node a host name and a view of files of its own; empty where that is not allowed."""
    # As root slurmd calls setgroups, which a user namespace refuses.
    possible = NAMESPACES[:1] if os.geteuid() == 0 else NAMESPACES
    for command in possible:
        if subprocess.run([*command, "hostname", "x"], capture_output=True, timeout=200).returncode == 0:
            return command
    return ()


def free_ports(count: int) -> list[int]:
    """Neighbouring ports between those of jobs and the ephemeral ones, free on all of loopback."""
    for first in range(30000 + os.getpid() % 200 * 10, 32700, 10):
        ports = range(first, first + count)
        try:
            for port in ports:
                with socket.socket() as probe:
                    probe.bind(("", port))
            return list(ports)
        except OSError:
            continue
    raise RuntimeError("no free ports")


def user() -> str:
    return subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()


def version() -> tuple[int, ...]:
    slurmd = shutil.which("slurmd", path=os.pathsep.join([os.environ["PATH"], SBIN])) or "slurmd"
    text = subprocess.run([slurmd, "-V"], capture_output=True, text=True, check=True).stdout.split()[-1]
    return tuple(int(part) for part in text.split(".")[:2])


def cluster_or_skip(folder: Path, env: Mapping[str, str]) -> Cluster:
    if lacking := missing():
        pytest.skip(f"SKIPPED, NOT TESTED HERE: no {', '.join(lacking)} (apt-get install {PACKAGES})")
    return Cluster(folder, env)
