"""A Slurm of two nodes on this machine: its own munge, controller and two slurmd, under one folder, as this user.

Needs Debian's slurm-wlm and munge to be installed and touches nothing of a Slurm that the machine already has.
"""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
# Debian puts the daemons into a folder that is not on everybody's path.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

CONFIGURATION = """
ClusterName=k2test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it starts again
AuthInfo=socket={folder}/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
ReturnToService=2
# the machine may have fewer cores than the two nodes say
SlurmdParameters=config_overrides
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
KillWait=20
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 Sockets=1 CoresPerSocket=4 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 Sockets=1 CoresPerSocket=4 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """Programs that are not installed here; none means that a Slurm can be started."""
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCH_PATH) is None]


class Slurm:
    """Commands against the Slurm whose configuration file is given."""

    def __init__(self, configuration: Path) -> None:
        self.environment = {"SLURM_CONF": str(configuration), "PATH": SEARCH_PATH}

    def run(self, *command: str, cwd: Path | None = None, **more: str) -> str:
        """What a Slurm command prints. CalledProcessError when it fails."""
        environment = {**os.environ, **self.environment, **more}
        shown = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert shown.returncode == 0, f"{command} ended with {shown.returncode}: {shown.stderr}"
        return shown.stdout.strip()

    def facts(self, job: str) -> dict[str, str]:
        """Slurm's facts about a job: JobState, ExitCode, Restarts and so on."""
        words = self.run("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, states: Sequence[str], seconds: float = 300) -> dict[str, str]:
        """Wait for the job to be in one of `states`; its facts then."""
        deadline = time.monotonic() + seconds
        while (facts := self.facts(job))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {job} is {facts['JobState']}, not one of {states}: {facts}"
            time.sleep(0.3)
        return facts

    def end_jobs(self, seconds: float = 30) -> None:
        """Kill every job: its processes would outlive the daemons."""
        self.run("scancel", "--signal=KILL", "--full", f"--user={getpass.getuser()}")
        self.run("scancel", f"--user={getpass.getuser()}")
        deadline = time.monotonic() + seconds
        while self.run("squeue", "--noheader"):
            assert time.monotonic() < deadline, f"jobs do not end: {self.run('squeue')}"
            time.sleep(0.2)


@contextlib.contextmanager
def slurm_on_this_machine(folder: Path) -> Iterator[Slurm]:
    """Start munge, a controller and two nodes, wait until the nodes are idle; end all of them afterwards."""
    for name in ("state", "spool.n1", "spool.n2"):
        (folder / name).mkdir()
    configuration = folder / "slurm.conf"
    facts = {"host": socket.gethostname().split(".")[0], "user": getpass.getuser(), "folder": folder}
    configuration.write_text(CONFIGURATION.format(ports=free_ports(3), **facts))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    daemons = [
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files],
        ["slurmctld", "-D", "-f", str(configuration)],
        *(["slurmd", "-D", "-N", node, "-f", str(configuration)] for node in ("n1", "n2")),
    ]
    slurm, running = Slurm(configuration), []
    try:
        for command in daemons:
            running.append(_start(command, folder, slurm.environment))
            if command[0] == "munged":
                _wait_for((folder / "munge.socket").exists, "munge's socket", folder)
        _wait_for(lambda: _idle_nodes(slurm) == 2, "two idle nodes", folder)
        try:
            yield slurm
        finally:
            slurm.end_jobs()
    finally:
        for process in reversed(running):
            process.terminate()
        for process in running:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


def _start(command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen:
    program = shutil.which(command[0], path=SEARCH_PATH)
    assert program is not None, f"{command[0]} is not installed"
    with (folder / f"{command[0]}.out").open("a") as output:
        return subprocess.Popen(
            [program, *command[1:]], stdout=output, stderr=output, env={**os.environ, **environment}
        )


def _idle_nodes(slurm: Slurm) -> int:
    try:
        return slurm.run("scontrol", "show", "nodes").count("State=IDLE ")
    except AssertionError:  # the controller is not there yet
        return 0


def _wait_for(condition, what: str, folder: Path, seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        logs = "\n".join(path.read_text()[-1500:] for path in folder.glob("*.out"))
        assert time.monotonic() < deadline, f"no {what} after {seconds} s:\n{logs}"
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
