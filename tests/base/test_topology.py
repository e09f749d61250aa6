import socket

import pytest

from megaft.base import topology
from megaft.base.errors import ConfigError
from megaft.base.topology import discover, first_host, is_main_of

MASTER = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}
TORCH = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", **MASTER}
SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "n[07-09,12],login",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "3",
}
# As slurmctld 22.05 gives them: the shell of `salloc -n 4` with LaunchParameters=use_interactive_step ...
SALLOC = {
    **{"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "4"},
    **{"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "n1"},
    **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
}
# ... and a task that srun starts from there, on the second node alone.
SRUN_IN_SALLOC = SALLOC | {
    **{"SLURM_STEP_ID": "2", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n2"},
    **{"SLURM_PROCID": "1", "SLURM_LOCALID": "1"},
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}


@pytest.mark.parametrize(
    ("environment", "launcher", "ranks", "master"),
    [
        pytest.param(TORCH, "torch", (3, 1, 4), ("10.0.0.7", 29500), id="deepspeed and torchrun"),
        pytest.param(SLURM, "slurm", (5, 1, 8), ("n07", 23456), id="srun derives the master from the job"),
        pytest.param(SLURM | MASTER, "slurm", (5, 1, 8), ("10.0.0.7", 29500), id="a given master wins"),
        pytest.param(OPENMPI | MASTER, "openmpi", (2, 2, 3), ("10.0.0.7", 29500), id="mpirun"),
        pytest.param(SLURM | OPENMPI | MASTER, "openmpi", (2, 2, 3), ("10.0.0.7", 29500), id="mpirun inside a job"),
        pytest.param(SLURM | TORCH, "torch", (3, 1, 4), ("10.0.0.7", 29500), id="deepspeed inside a job"),
        pytest.param(SALLOC | TORCH, "torch", (3, 1, 4), ("10.0.0.7", 29500), id="torchrun in a shell of salloc"),
        pytest.param(SRUN_IN_SALLOC, "slurm", (1, 1, 2), ("n2", 20209), id="srun in a shell of salloc"),
        pytest.param(SALLOC | HYDRA | MASTER, "mpich", (3, 1, 4), ("10.0.0.7", 29500), id="mpiexec inside a job"),
        pytest.param(SLURM | {"PMI_RANK": "5", "PMI_SIZE": "8"}, "slurm", (5, 1, 8), ("n07", 23456), id="srun's PMI"),
    ],
)
def test_discover(environment, launcher, ranks, master):
    topology = discover(environment)
    assert topology.launcher == launcher
    assert (topology.rank, topology.local_rank, topology.world_size) == ranks
    assert (topology.master_addr, topology.master_port) == master


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({}, id="a shell"),
        pytest.param(SALLOC, id="a shell of salloc that is a step"),
        pytest.param({name: SALLOC[name] for name in SALLOC if "STEP" not in name}, id="an older salloc's"),
        pytest.param({name: SLURM[name] for name in SLURM if "STEP" not in name}, id="a batch script"),
        pytest.param(SALLOC | {"SLURM_JOB_ID": "8"}, id="a batch script submitted in a shell of salloc"),
        pytest.param(SALLOC | {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"}, id="srun -n 1"),
    ],
)
def test_plain_python_is_one_rank(environment):
    topology = discover(environment)
    assert (topology.rank, topology.local_rank, topology.world_size, topology.is_main) == (0, 0, 1, True)
    assert topology.master_addr == "127.0.0.1"
    assert is_main_of(environment)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n07", "n07"),
        ("n07,n08", "n07"),
        ("n[07-09,12],login", "n07"),
        ("rack1-n[3],x", "rack1-n3"),
        ("a[1-2]-ib", "a1-ib"),
    ],
)
def test_first_host(nodelist, host):
    assert first_host(nodelist) == host


@pytest.mark.parametrize("broken", [{"RANK": "x"}, {"WORLD_SIZE": ""}, {"MASTER_PORT": "http"}])
def test_a_broken_variable_is_named(broken):
    with pytest.raises(ConfigError, match=next(iter(broken))):
        discover(TORCH | broken)


def test_ranks_without_a_master_are_refused():
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        discover({name: value for name, value in TORCH.items() if name not in MASTER})


@pytest.mark.parametrize(
    ("environment", "is_main"),
    [({}, True), (TORCH, False), (TORCH | {"RANK": "0"}, True), (SLURM, False), (SLURM | {"SLURM_PROCID": "0"}, True)],
)
def test_who_speaks_is_known_before_the_ranks_meet(environment, is_main):
    assert is_main_of(environment) is is_main


def test_a_free_port_is_none_that_the_kernel_gives_away(monkeypatch):
    """Else another program may have it before a rank listens to it."""
    first, taken = int(topology.EPHEMERAL_PORTS.read_text().split()[0]), topology.free_port()
    with socket.create_server(("127.0.0.1", taken)):
        free = topology.free_port()
        assert taken < first
        assert free < first
        draws = iter([taken - topology.LOWEST_PORT, *[free - topology.LOWEST_PORT] * 99])
        monkeypatch.setattr(topology.secrets, "randbelow", lambda _: next(draws))
        assert topology.free_port() == free != taken


def test_any_port_is_taken_where_the_kernel_gives_all_away(monkeypatch, tmp_path):
    monkeypatch.setattr(topology, "EPHEMERAL_PORTS", tmp_path / "range")
    (tmp_path / "range").write_text("1024\t65535\n")
    assert topology.free_port() > 1023
