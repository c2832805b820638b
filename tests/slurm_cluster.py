"""A SLURM cluster of two nodes on one machine; python tests/slurm_cluster.py runs tests/test_slurm.py on it.

As root, where apt can install slurm-wlm and munge; anywhere else it says so and does nothing. Everything that
the cluster writes is in one temporary folder, its munge socket and key too, and it ends with the tests.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

PACKAGES = ("slurm-wlm", "munge")
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
NODES = ("n0", "n1")
NOTICED_S = 12
CONF = """\
ClusterName=longspan
SlurmctldHost=localhost(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout={noticed}
KillWait=30
JobRequeue=1
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""
NODE = (
    "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=2 Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket=2 ThreadsPerCore=1 RealMemory=1000 State=UNKNOWN"
)


def missing() -> str | None:
    """Why there can be no cluster on this machine as it is; None if there can."""
    if os.geteuid() != 0:
        return "it needs root"
    absent = [name for name in DAEMONS if shutil.which(name) is None]
    return f"there is no {', '.join(absent)}" if absent else None


def installed() -> str | None:
    """As `missing`, after trying to install what is missing."""
    if missing() is None or os.geteuid() != 0:
        return missing()
    if shutil.which("apt-get") is None:
        return f"{missing()}, and no apt-get to install {' and '.join(PACKAGES)}"
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", *PACKAGES]):
        try:
            done = subprocess.run(
                ["apt-get", "-o", "Acquire::http::Timeout=30", *words],
                env=env, capture_output=True, text=True, check=False, timeout=300,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"apt-get {words[0]} took more than 300 s"
        if done.returncode:
            return f"apt-get {words[0]} failed: {' '.join(done.stderr.split())[-300:]}"
    return missing()


def wait_for(what: str, found: Callable[[], bool], seconds: float = 400.0) -> float:
    """Waits until it is found, and returns for how many seconds."""
    began = time.monotonic()
    while not found():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.05)
    return time.monotonic() - began


class Cluster:
    """The daemons of a cluster whose files are in `folder`. `env` is what the commands of SLURM need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        ports = _free_ports(1 + len(NODES))
        nodes = "\n".join(NODE.format(name=n, port=p) for n, p in zip(NODES, ports[1:], strict=True))
        text = CONF.format(folder=folder, ports=ports, nodes=nodes, names=",".join(NODES), noticed=NOTICED_S)
        (folder / "slurm.conf").write_text(text)
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)

    def start(self) -> None:
        """Starts all daemons and waits until both nodes are idle."""
        files = {
            "key-file": "key",
            "socket": "sock",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        private = [f"--{name}={self.folder}/munge.{end}" for name, end in files.items()]
        # munge's rules about the folders of its files would refuse a temporary one
        self._run("munged", "--foreground", "--force", *private)
        wait_for("munge", lambda: (self.folder / "munge.sock").exists())
        self._run("slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        wait_for("idle nodes", lambda: self.states() == ["idle"] * len(NODES))

    def start_node(self, name: str) -> None:
        # what it starts inherits the name, by which kill_node finds it
        self._run("slurmd", "-D", "-N", name, called=name, SLURMD_NODENAME=name)

    def kill_node(self, name: str) -> None:
        """Kills what runs on a node at once, as a power cut would: its daemon, its jobs and their ranks."""
        daemon = self._processes.pop(name)
        daemon.kill()
        daemon.wait()
        for pid, environ in _processes():
            if f"SLURMD_NODENAME={name}".encode() in environ and self._ours(environ):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def running(self, folder: Path) -> list[int]:
        """The processes that work for a run folder."""
        return [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if str(folder).encode() in _read(path)
        ]

    def command(self, *words: str) -> str:
        """What one of SLURM's commands says."""
        return subprocess.run(words, env=self.env, capture_output=True, text=True, check=True).stdout.strip()

    def states(self) -> list[str]:
        return self.command("sinfo", "--noheader", "--Node", "--format=%t").split()

    def job(self, job: str) -> dict[str, str]:
        """What scontrol knows of a job."""
        told = self.command("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in told if "=" in word)

    def stop(self) -> None:
        """Ends what is left of the jobs, then the daemons."""
        with suppress(subprocess.CalledProcessError):
            self.command("scancel", "--user=root")
            wait_for("jobs end", lambda: not self.command("squeue", "--noheader"))
        for process in reversed(self._processes.values()):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _ours(self, environ: bytes) -> bool:
        return f"SLURM_CONF={self.folder}/slurm.conf".encode() in environ

    def _run(self, daemon: str, *words: str, called: str | None = None, **env: str) -> None:
        with (self.folder / f"{called or daemon}.out").open("ab") as out:
            self._processes[called or daemon] = subprocess.Popen(
                [daemon, *words], env=self.env | env, stdout=out, stderr=out
            )


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _processes() -> Iterator[tuple[int, bytes]]:
    """Every process with its environment."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        yield int(path.parent.name), _read(path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster that runs."""
    made = Cluster(folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def main(words: list[str]) -> int:
    why = installed()
    if why is not None:
        print(f"\n*** SLURM tests SKIPPED, nothing was tested: {why} ***\n")
        return 0
    return pytest.main(
        [
            "-m",
            "slurm",
            "-s",
            "-o",
            "faulthandler_timeout=900",
            str(Path(__file__).with_name("test_slurm.py")),
            *words,
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
