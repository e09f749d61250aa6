"""A real SLURM on this machine: munged, slurmctld and one slurmd per node, in their own folder and ports."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from faults_hosts import can_change_user

from megaft.base.parallel import free_port

DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("n1", "n2", "n3")
"""Partition main has n1 and n2, spare has n2 and n3: main survives the loss of n3."""
GPUS = [f"gpu{number}" for number in range(8)]
"""GPUs of each node; SLURM accepts any file as a device."""

CONFIG = """\
ClusterName=megaft
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
ReturnToService=1
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MinJobAge=600
KillWait=20
OverTimeLimit=0
JobRequeue=1
GresTypes=gpu
SlurmdParameters=config_overrides
SlurmdTimeout=300
{nodes}
PartitionName=main Nodes={main} Default=YES MaxTime=60 State=UP DefaultTime=5
PartitionName=spare Nodes={spare} MaxTime=60 State=UP DefaultTime=5
"""
NODE = (
    "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} "
    "CPUs=16 Boards=1 SocketsPerBoard=1 CoresPerSocket=16 ThreadsPerCore=1 RealMemory=8000 Gres=gpu:{num_gpus}"
)


@dataclass(frozen=True)
class Cluster:
    """A folder with a running SLURM, and its commands."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command, **kwargs):
        """Run a command of SLURM; return its output."""
        environment = self.environment | kwargs.pop("environment", {})
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, **kwargs)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number):
        """Return the fields of `scontrol show job`."""
        words = self.run("scontrol", "--oneliner", "show", "job", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)


@pytest.fixture(scope="session")
def cluster():
    """Yield a running Cluster; its daemons are ended by pid, and its folder is deleted."""
    missing = [name for name in (*DAEMONS, "sbatch") if shutil.which(name, path=_path()) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: slurmctld slurmd slurm-client munge)")
    if not can_change_user():
        pytest.skip("SLURM's daemons must be started by root")
    folder = Path(tempfile.mkdtemp(prefix="megaft-slurm-"))  # munge wants every folder above its socket open to all
    try:
        with _running(folder) as running:
            yield running
    finally:
        shutil.rmtree(folder)


def _path():
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


@contextmanager
def _running(folder):
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
    cluster, daemons = Cluster(folder, environment), []
    _configure(cluster)
    commands = _commands(cluster)
    try:
        for command in commands:
            daemons.append(_start(command, folder / f"{len(daemons)}.out", environment))
            if command[0] == "munged":
                wait_for(lambda: (folder / "munge" / "socket").exists(), folder)
        wait_for(lambda: _num_idle(cluster) == len(NODES), folder)
        yield cluster
    finally:
        if len(daemons) == len(commands):
            cluster.run("scancel", "--user=root", "--signal=KILL", "--full")
            wait_for(lambda: not cluster.run("squeue", "--noheader"), folder)
        for daemon in reversed(daemons):
            _end(daemon)
        _end_left_behind(folder)


def _configure(cluster):
    folder = cluster.folder
    folder.chmod(0o755)
    for name in ("munge", "state", *(f"spool/{name}" for name in NODES)):
        (folder / name).mkdir(parents=True)
    (folder / "munge").chmod(0o755)
    key = folder / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    (folder / "slurm.conf").write_text(_config(cluster))
    for name in GPUS:
        (folder / name).touch()
    (folder / "gres.conf").write_text(f"NodeName={','.join(NODES)} Name=gpu File={folder}/gpu[0-{len(GPUS) - 1}]\n")


def _config(cluster):
    return CONFIG.format(
        folder=cluster.folder,
        port=free_port(),
        nodes="\n".join(NODE.format(name=name, port=free_port(), num_gpus=len(GPUS)) for name in NODES),
        main=",".join(NODES[:2]),
        spare=",".join(NODES[-2:]),
    )


def _commands(cluster):
    munge, config = cluster.folder / "munge", ("-f", str(cluster.folder / "slurm.conf"))
    munged = [
        *("munged", "--foreground", "--num-threads=2", f"--key-file={munge}/key", f"--socket={munge}/socket"),
        *(f"--pid-file={munge}/pid", f"--seed-file={munge}/seed", f"--log-file={munge}/log"),
    ]
    return [munged, ["slurmctld", "-D", *config], *(["slurmd", "-D", "-N", name, *config] for name in NODES)]


def _start(command, output_path, environment):
    with output_path.open("w") as output:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _end(daemon, seconds=10):
    daemon.terminate()
    try:
        daemon.wait(seconds)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _end_left_behind(folder):
    """End steps that survive on a lost node; their environment names this folder."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended meanwhile
            if os.fsencode(f"SLURM_CONF={folder}/") in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)


def _num_idle(cluster):
    command = ("sinfo", "--Node", "--noheader", "--format=%N %t")
    try:
        lines = cluster.run(*command).splitlines()
    except AssertionError:  # the controller is not there yet
        return 0
    return len({line.split()[0] for line in lines if line.endswith(" idle")})


def wait_for(is_there, folder, seconds=300):
    """Wait for SLURM to reach a state; show the daemons' output if it never does."""
    deadline = time.monotonic() + seconds
    while not is_there():
        if time.monotonic() > deadline:
            logs = [f"{path.name}: {path.read_text()[-2000:]}" for path in sorted(folder.glob("*.out"))]
            raise TimeoutError(f"SLURM did not do it in {seconds} s\n" + "\n".join(logs))
        time.sleep(0.1)
